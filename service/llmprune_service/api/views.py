"""Answers that are the API's alone: what :mod:`llmprune_service.schemas` does not share with others."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmprune.patterns import Structure


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class Validation(_Model):
    """What a job would be and need; nothing was queued."""

    object: Literal["validation"] = "validation"
    model: str
    revision: str | None = Field(description="The commit the job would be pinned to; null for a model on this host's disk.")
    gated: bool
    weights_bytes: int
    bytes_needed: int = Field(description="Disk space of the job: download, finished blocks, checkpoint.")
    warnings: list[str]
    plan: dict[str, Any] | None = Field(description="The output of `llmprune plan --json`, or null; warnings say why.")


class MethodView(_Model):
    """A pruning method; ``pattern`` is what it takes out whole, null where it leaves zeros inside of matrices."""

    object: Literal["method"] = "method"
    name: str
    summary: str
    paper: str
    needs: Literal["nothing", "norm", "mean", "gram"]
    scope: Literal["row", "matrix", "block"]
    updates_weights: bool
    pattern: Structure | None = None


class Methods(_Model):
    """The pruning methods, and the JSON Schema of their parameters."""

    object: Literal["list"] = "list"
    data: list[MethodView]
    config_schema: dict[str, Any]


class ParetoPoint(_Model):
    """A finished job; ``on_front`` if none on the same text is as sparse and better, or sparser and as good."""

    object: Literal["point"] = "point"
    job_id: str
    method: str
    pattern: str
    sparsity: float
    text: str | None
    perplexity_dense: float | None
    perplexity_pruned: float | None
    decode_tokens_per_second: dict[str, float] | None
    prefill_tokens_per_second: dict[str, float] | None
    checkpoint_bytes: int | None
    on_front: bool
    created_at: float


class Pareto(_Model):
    """All finished jobs of a model, at most a thousand, oldest first."""

    object: Literal["list"] = "list"
    data: list[ParetoPoint]


class Secret(_Model):
    """The tenant's secret: it signs for the webhooks that jobs name themselves."""

    object: Literal["secret"] = "secret"
    secret: str


class Delivery(_Model):
    """An event that was queued for a webhook."""

    object: Literal["delivery"] = "delivery"
    id: str


class Alive(_Model):
    """The process runs."""

    status: Literal["ok"] = "ok"


class Ready(_Model):
    """Requests can be served."""

    status: Literal["ready"] = "ready"
