"""What is to be queued, before it has a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llmprune_service.ids import new_id
from llmprune_service.schemas import JobRequest
from llmprune_service.settings import Settings


@dataclass(frozen=True)
class Submission:
    """A job to be queued.

    Attributes:
        bytes_reserved: disk space that it needs, of its tenant's quota.
        sweep_id, sweep_index, point: the sweep it belongs to, its number and its name there.
    """

    request: JobRequest
    revision: str | None = None
    bytes_reserved: int = 0
    sweep_id: str | None = None
    sweep_index: int | None = None
    point: str | None = None
    id: str = field(default_factory=partial(new_id, "job"))

    def columns(self, settings: Settings) -> dict[str, Any]:
        """Its row, but for tenant and times."""
        request = self.request
        config = request.config
        return {
            "id": self.id, "status": "queued", "model": config.model, "revision": self.revision, "method": config.method,
            "pattern": config.pattern, "sparsity": config.sparsity, "priority": request.priority,
            "config": config.model_dump(mode="json", exclude_unset=True), "metadata": request.metadata, "retries": {},
            "timeout_s": request.timeout_s or settings.max_timeout_s, "bytes_reserved": self.bytes_reserved,
            "webhook": request.webhook.model_dump(mode="json") if request.webhook else None,
            "sweep_id": self.sweep_id, "sweep_index": self.sweep_index, "point": self.point,
        }  # fmt: skip
