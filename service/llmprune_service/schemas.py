"""What goes over HTTP: the request is the library's PruneConfig with the service's own fields beside it."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from llmprune.spec import PruneConfig
from llmprune.sweep_spec import AXES as SWEEP_AXES
from llmprune.sweep_spec import AutoConfig, SweepConfig

Status = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
Kind = Literal["prune", "auto"]
AxisName = Literal[
    "perplexity", "perplexity_increase", "kl", "sparsity", "parameters", "bytes", "decode_speedup", "prefill_speedup",
    "decode_ms",
]  # fmt: skip
Phase = Literal["resolve", "fetch", "prune", "evaluate", "benchmark", "package"]
FINISHED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
PHASES: tuple[Phase, ...] = ("resolve", "fetch", "prune", "evaluate", "benchmark", "package")
WebhookEvent = Literal["job.running", "job.succeeded", "job.failed", "job.cancelled"]
WEBHOOK_EVENTS: tuple[WebhookEvent, ...] = ("job.running", "job.succeeded", "job.failed", "job.cancelled")
DEFAULT_PRIORITY = 5
MAX_METADATA = 16
T = TypeVar("T")
Values = Annotated[tuple[T, ...], Field(max_length=100)]

Priority = Annotated[int, Field(ge=0, le=9, description="9 is served first; equal ones in the order they came.")]
MetadataKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[
    dict[MetadataKey, MetadataValue],
    Field(max_length=MAX_METADATA, description="Up to 16 pairs of your own; lists filter by them."),
]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JobWebhook(_Model):
    """Where to tell of one job; signed with the tenant's secret (`GET /v1/webhooks/secret`)."""

    url: Annotated[str, StringConstraints(max_length=2048)]
    events: tuple[WebhookEvent, ...] = WEBHOOK_EVENTS


class ServiceFields(_Model):
    """What a submission says to the service rather than to the library."""

    priority: Priority = DEFAULT_PRIORITY
    timeout_s: Annotated[int, Field(ge=1)] | None = Field(None, description="Fail the job after running for so many seconds.")
    metadata: Metadata = Field(default_factory=dict)
    webhook: JobWebhook | None = None


class JobRequest(PruneConfig, ServiceFields):
    """A job: every field of PruneConfig (no ``model`` means the bundled one), and the service's own."""

    @property
    def config(self) -> PruneConfig:
        """The library's part: the fields that were set."""
        return PruneConfig.model_validate(self.model_dump(include=set(PruneConfig.model_fields), exclude_unset=True))


class SweepRequest(SweepConfig, ServiceFields):
    """Many jobs on one model: the library's SweepConfig, and the service's own fields for each of its jobs."""

    @property
    def config(self) -> SweepConfig:
        """The library's part: the fields that were set."""
        return SweepConfig.model_validate(self.model_dump(include=set(SweepConfig.model_fields), exclude_unset=True))

    def job(self, config: PruneConfig) -> JobRequest:
        """One of its jobs."""
        own = self.model_dump(include=set(ServiceFields.model_fields), exclude_unset=True)
        return JobRequest(**config.model_dump(exclude_unset=True), **own)


class AutoRequest(AutoConfig, ServiceFields):
    """The best model within a budget, as one job: the library's AutoConfig, and the service's own fields."""

    @property
    def config(self) -> AutoConfig:
        """The library's part: the fields that were set."""
        return AutoConfig.model_validate(self.model_dump(include=set(AutoConfig.model_fields), exclude_unset=True))

    def jobs(self) -> list[JobRequest]:
        """A job of every kind that it may try; raises ConfigError where a value is in no job that can be."""
        own = self.model_dump(include=set(ServiceFields.model_fields), exclude_unset=True)
        return [JobRequest(**family.model_dump(exclude_unset=True), **own) for family in self.families()]


class SweepAxes(_Model):
    """Further values of a sweep's axes; an axis that is left out has the values it has."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    methods: Values[str] = ()
    patterns: Values[str] = ()
    sparsities: Values[float] = ()
    allocations: Values[str] = ()
    efforts: Values[str] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not any(self.axes.values()):
            raise ValueError(f"nothing to add: give values of {', '.join(SWEEP_AXES)}")
        return self

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """The values by axis."""
        return {axis: getattr(self, axis) for axis in SWEEP_AXES}


class JobPatch(_Model):
    """What may be changed after submission."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    priority: Priority | None = Field(None, description="While the job is queued.")
    metadata: Metadata | None = Field(None, description="Replaces what is there.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.priority is None and self.metadata is None:
            raise ValueError("give priority, metadata, or both")
        return self


class Error(_Model):
    """Why a job failed."""

    code: str
    message: str


class ProgressView(_Model):
    """How far the current stage is; ``percent`` is of the stage."""

    stage: str
    done: int
    total: int
    percent: float


class JobView(_Model):
    """A job as the API shows it. Times are unix seconds."""

    object: Literal["job"] = "job"
    id: str
    kind: Kind = "prune"
    sweep_id: str | None = Field(None, description="The sweep it is a point of.")
    point: str | None = Field(None, description="Its name there.")
    status: Status
    phase: Phase | None
    model: str
    revision: str | None
    config: dict[str, Any]
    priority: int
    timeout_s: int
    metadata: dict[str, str]
    progress: ProgressView | None
    eta_s: float | None
    attempt: int
    recoveries: int
    worker: str | None
    result: dict[str, Any] | None
    error: Error | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    links: dict[str, str]


class SweepView(_Model):
    """A sweep: running while one of its jobs is under way, then failed or cancelled if one of them is.

    ``counts`` are its jobs by status; what they came to is in ``/points``. Times are unix seconds.
    """

    object: Literal["sweep"] = "sweep"
    id: str
    status: Status
    model: str
    revision: str | None
    config: dict[str, Any]
    priority: int
    timeout_s: int | None
    metadata: dict[str, str]
    num_points: int
    counts: dict[Status, int]
    created_at: float
    finished_at: float | None
    links: dict[str, str]


class SweepPointView(_Model):
    """A job of a sweep. ``values`` are by axis of a plot: null is not finite, what was not measured is left out."""

    object: Literal["point"] = "point"
    name: str
    job_id: str
    status: Status
    config: dict[str, Any]
    values: dict[str, float | None]
    on_front: bool
    error: Error | None
    links: dict[str, str]


class SweepPoints(_Model):
    """What a sweep came to so far; ``on_front`` are the points that no other one beats on both axes ``x`` and ``y``."""

    object: Literal["list"] = "list"
    data: tuple[SweepPointView, ...]
    x: str
    y: str
    differing: tuple[str, ...] = Field(description="The fields in which the jobs differ.")
    notes: tuple[str, ...] = Field(description="What to mind when they are compared.")


class SweepExtension(_Model):
    """What was added: names of the new points, and of those that were there already and stay as they are."""

    object: Literal["extension"] = "extension"
    added: tuple[str, ...]
    known: tuple[str, ...]
    sweep: SweepView


class EventView(_Model):
    """One thing that happened to a job; ``seq`` counts from 1 without holes."""

    object: Literal["event"] = "event"
    seq: int
    type: str
    created_at: float
    data: dict[str, Any]


class BlockView(_Model):
    """A finished block."""

    object: Literal["checkpoint"] = "checkpoint"
    block: int
    name: str
    sparsity: float | None
    error: float | None
    seconds: float | None
    sha256: str | None
    attempt: int
    created_at: float


class ArtifactView(_Model):
    """A file of the result."""

    object: Literal["artifact"] = "artifact"
    name: str
    bytes: int
    sha256: str
    media_type: str
    url: str


class WorkerView(_Model):
    """A process that runs one job at a time."""

    object: Literal["worker"] = "worker"
    id: str
    host: str
    slot: int
    device: str
    version: str
    status: Literal["idle", "busy", "draining", "lost"]
    job_id: str | None
    started_at: float
    seen_at: float


class ApiKeyRequest(_Model):
    """A key to make."""

    tenant: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")] = "default"
    name: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    scopes: tuple[Literal["read", "write", "admin"], ...] = Field(("read", "write"), min_length=1)
    expires_in_s: Annotated[int, Field(ge=1)] | None = None


class ApiKeyView(_Model):
    """A key; ``key`` is there once, in the answer that made it."""

    object: Literal["api_key"] = "api_key"
    id: str
    tenant: str
    name: str
    scopes: tuple[str, ...]
    created_at: float
    expires_at: float | None
    last_used_at: float | None
    key: str | None = None


class WebhookRequest(_Model):
    """A receiver of events of all the tenant's jobs."""

    url: Annotated[str, StringConstraints(max_length=2048)]
    events: tuple[WebhookEvent, ...] = Field(WEBHOOK_EVENTS, min_length=1)


class WebhookView(_Model):
    """A registered receiver; ``secret`` is there once, in the answer that made it."""

    object: Literal["webhook"] = "webhook"
    id: str
    url: str
    events: tuple[str, ...]
    created_at: float
    secret: str | None = None


class Page(_Model, Generic[T]):
    """One page of a list; the next one is asked for with ``after=next``."""

    object: Literal["list"] = "list"
    data: tuple[T, ...]
    has_more: bool
    next: str | None = None
