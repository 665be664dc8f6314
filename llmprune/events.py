"""What a running job says: a flat union of frozen pydantic models, one JSON object each.

Engines and :func:`llmprune.prune_iter` are generators of these. The command line draws them, the service stores them,
``--events`` writes them as JSON lines. Closing the generator cancels the job. Torch-free.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from llmprune.report import Benchmark, BlockReport, Conversion, Evaluation, Fetched, Generation, Recovery, Report, SiteReport
from llmprune.sweep_report import AutoReport, PointReport, SweepReport

Stage = Literal[
    "fetch", "load", "calibration", "dense", "allocate", "prune", "structure", "refine", "reconstruct", "pruned", "save",
    "benchmark", "generate", "convert", "recover",
]  # fmt: skip


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True)


class StageStarted(_Event):
    """A stage begins; ``total`` counts its steps (blocks, evaluation windows ...), 0 when unknown."""

    event: Literal["stage_started"] = "stage_started"
    stage: Stage
    total: int = 0
    resumed_at: int = 0


class Progress(_Event):
    """``done`` of ``total`` steps of a stage are finished.

    ``value`` is what the stage brings down, where it brings something down: the held-out loss of a refinement or a recovery,
    the KL of a search.
    """

    event: Literal["progress"] = "progress"
    stage: Stage
    done: int
    total: int
    detail: str = ""
    value: float | None = None


class StageFinished(_Event):
    """A stage ended after ``seconds``; peaks are of this stage alone, in bytes (None where not measurable)."""

    event: Literal["stage_finished"] = "stage_finished"
    stage: Stage
    seconds: float
    peak_cpu_bytes: int | None = None
    peak_gpu_bytes: int | None = None


class BlockStarted(_Event):
    """A decoder block is about to be pruned."""

    event: Literal["block_started"] = "block_started"
    block: int
    name: str
    num_blocks: int


class SitePruned(_Event):
    """One weight matrix is pruned."""

    event: Literal["site_pruned"] = "site_pruned"
    block: int
    site: SiteReport


class BlockFinished(_Event):
    """A decoder block is pruned and its outputs, the next block's inputs, are there.

    ``sha256`` is the digest of the weights file the journal keeps of it, None without a journal.
    """

    event: Literal["block_finished"] = "block_finished"
    block: int
    num_blocks: int
    report: BlockReport
    sha256: str | None = None


class Warned(_Event):
    """Something the user should know; also kept in the report."""

    event: Literal["warned"] = "warned"
    message: str


class Evaluated(_Event):
    """An evaluation is done; carries its numbers."""

    event: Literal["evaluated"] = "evaluated"
    evaluation: Evaluation


class Benchmarked(_Event):
    """A benchmark is done; carries its numbers."""

    event: Literal["benchmarked"] = "benchmarked"
    benchmark: Benchmark


class TextPiece(_Event):
    """What a model wrote since the last piece; ``model`` is its name."""

    event: Literal["text_piece"] = "text_piece"
    model: str
    text: str


class TextGenerated(_Event):
    """A text is written; carries it whole, with its numbers."""

    event: Literal["text_generated"] = "text_generated"
    generation: Generation


class Downloaded(_Event):
    """All that a job needs from the network is on this machine."""

    event: Literal["downloaded"] = "downloaded"
    fetched: Fetched


class Converted(_Event):
    """A checkpoint is packed or made dense; carries what was done."""

    event: Literal["converted"] = "converted"
    conversion: Conversion


class Recovered(_Event):
    """A pruned model is trained and written; carries what was done."""

    event: Literal["recovered"] = "recovered"
    recovery: Recovery


class PointStarted(_Event):
    """A job of a sweep or of a search begins: number ``index`` (from 0) of ``total``, 0 when unknown. Its events follow."""

    event: Literal["point_started"] = "point_started"
    name: str
    index: int
    total: int = 0


class PointFinished(_Event):
    """A job of a sweep or of a search ended, well or in an error; ``reused`` where an earlier run had done it."""

    event: Literal["point_finished"] = "point_finished"
    point: PointReport
    index: int
    total: int = 0
    reused: bool = False


class Swept(_Event):
    """A sweep is done; carries all its points."""

    event: Literal["swept"] = "swept"
    sweep: SweepReport


class Searched(_Event):
    """A search within a budget is over; carries what it found, if anything, and all that it tried."""

    event: Literal["searched"] = "searched"
    search: AutoReport


class Failed(_Event):
    """The run ended by an error, whose class and one-line message this is; the last line ``--events`` writes.

    What is not an error of :mod:`llmprune.errors` is an ``InternalError`` with the type alone as its message.
    """

    event: Literal["failed"] = "failed"
    error: str
    message: str
    exit_code: int


class Finished(_Event):
    """The job is done; carries the report."""

    event: Literal["finished"] = "finished"
    report: Report


Event = Annotated[
    StageStarted | Progress | StageFinished | BlockStarted | SitePruned | BlockFinished | Warned | Evaluated | Benchmarked
    | TextPiece | TextGenerated | Downloaded | Converted | Recovered | PointStarted | PointFinished
    | Swept | Searched | Failed | Finished,
    Field(discriminator="event"),
]  # fmt: skip
_adapter: TypeAdapter[Event] = TypeAdapter(Event)


def parse_event(line: str | bytes) -> Event:
    """Read one JSON line written by ``--events``."""
    return _adapter.validate_json(line)
