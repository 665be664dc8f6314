"""What is to be queued, before it has a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llmprune_service.ids import new_id
from llmprune_service.schemas import AutoRequest, JobRequest
from llmprune_service.settings import Settings


@dataclass(frozen=True)
class Submission:
    """A job to be queued.

    Attributes:
        bytes_reserved: disk space that it needs, of its tenant's quota.
        sweep_id, sweep_index, point: the sweep it belongs to, its number and its name there.
    """

    request: JobRequest | AutoRequest
    revision: str | None = None
    bytes_reserved: int = 0
    sweep_id: str | None = None
    sweep_index: int | None = None
    point: str | None = None
    id: str = field(default_factory=partial(new_id, "job"))

    def columns(self, settings: Settings) -> dict[str, Any]:
        """Its row, but for tenant and times."""
        request = self.request
        if isinstance(request, AutoRequest):  # what it will be is to be found out
            what = {"kind": "auto", "model": request.base.model, "method": "auto", "pattern": "auto", "sparsity": 0.0}
        else:
            what = {"model": request.model, "method": request.method, "pattern": request.pattern, "sparsity": request.sparsity}
        return {
            "id": self.id, **what, "status": "queued", "revision": self.revision, "priority": request.priority,
            "config": request.config.model_dump(mode="json", exclude_unset=True), "metadata": request.metadata, "retries": {},
            "timeout_s": request.timeout_s or settings.max_timeout_s, "bytes_reserved": self.bytes_reserved,
            "webhook": request.webhook.model_dump(mode="json") if request.webhook else None,
            "sweep_id": self.sweep_id, "sweep_index": self.sweep_index, "point": self.point,
        }  # fmt: skip
