"""What the stages of a job share: what is asked for, what is open, and what goes into the report."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.anatomy.blocks import Stack
from llmprune.anatomy.sites import Site, select
from llmprune.continuations import Continuations
from llmprune.engines.sharding import Shares
from llmprune.events import Event, Stage, Warned
from llmprune.io.journal import Journal
from llmprune.io.models import Source
from llmprune.io.statistics import Statistics
from llmprune.io.streaming import StreamedBlocks
from llmprune.io.text import TokenSet
from llmprune.measure.tasks import Tasks
from llmprune.measure.writing import Prompts
from llmprune.processes import first_says
from llmprune.report import (
    AllocationReport,
    Benchmark,
    BlockReport,
    ModelReport,
    Packed,
    RefinementReport,
    Report,
    StageReport,
    StatisticsReport,
    StructureReport,
    TaskReport,
)
from llmprune.scoring import Scores
from llmprune.spec import PruneConfig
from llmprune.stages import StageClock

_A = TypeVar("_A")
_E = TypeVar("_E", bound=Event)


@dataclass
class JobState:
    """What a job is given, and what its stages find out one after the other.

    Attributes:
        config: what is asked for.
        model, tokenizer: given for a model in memory (pruned in place); None to load ``config.model``.
        out: where the checkpoint goes; None writes nothing.
        resume: go on with the journal beside ``out``.
        dense_records: directory of what is measured of dense models, where jobs share that; None where they do not.
        shared: several processes do this job.
        first: this is the first of them, or alone.
        shares: what this one does of a walk that they share.
        own: the place of this one's hidden states in the first one's journal.
        fingerprint: what the journal and the checkpoint say of the run.
    """

    config: PruneConfig
    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    out: Path | None = None
    resume: bool = False
    dense_records: Path | None = None
    source: Source | None = None
    streamed: StreamedBlocks | None = None
    journal: Journal | None = None
    own: Journal | None = None
    warnings: list[str] = field(default_factory=list)
    stages: list[StageReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    statistics: list[StatisticsReport] = field(default_factory=list)
    opened: list[Statistics] = field(default_factory=list)
    resumed: bool = False
    allocation: AllocationReport | None = None
    refinement: RefinementReport | None = None
    structure: StructureReport | None = None
    continuations: Continuations | None = None
    tasks: Tasks | None = None
    scores: TaskReport | None = None
    packed: Packed | None = None
    benchmark: Benchmark | None = None
    report: Report | None = None
    # Known from before the first stage on.
    device: torch.device = field(init=False)
    shared: bool = field(init=False)
    first: bool = field(init=False)
    shares: Shares | None = field(init=False)
    in_memory: bool = field(init=False)
    calibration_source: str = field(init=False)
    eval_sources: tuple[str, ...] = field(init=False)
    # From the stages load and calibration on.
    stack: Stack = field(init=False)
    seq_len: int = field(init=False)
    model_report: ModelReport = field(init=False)
    calibration: TokenSet = field(init=False)
    texts: list[TokenSet] = field(init=False)
    prompts: Prompts = field(init=False)
    batch_size: int = field(init=False)
    fingerprint: dict[str, Any] = field(init=False)
    # From the stages that find them on.
    dense: Scores = field(init=False)
    pruned: Scores = field(init=False)
    walk_kind: str = field(init=False)
    dense_weights: dict[str, Tensor] = field(init=False)

    def agreed(self, work: Callable[[], _A]) -> _A:
        """What ``work()`` returns in this process, or in the first of several."""
        return first_says(work) if self.shared else work()

    def noted(self, events: Iterable[_E]) -> Generator[_E, None, Any]:
        """The same events; warnings among them are kept for the report. What a generator returns is handed on."""
        iterator = iter(events)
        while True:
            try:
                event = next(iterator)
            except StopIteration as stop:
                return stop.value
            if isinstance(event, Warned):
                self.warnings.append(event.message)
            yield event

    def warn(self, message: str) -> Warned:
        """Keep a warning for the report; its event."""
        self.warnings.append(message)
        return Warned(message=message)

    def clock(self, stage: Stage) -> StageClock:
        """The clock of a stage, which files its report here."""
        return StageClock(stage, self.stages)

    def sites(self) -> list[Site]:
        """All that are pruned."""
        return [site for sites in self.stack.sites for site in select(sites, self.config.skip)]

    @staticmethod
    def journal_of(out: Path) -> Journal:
        """The journal of the run that writes to ``out``."""
        return Journal(out.with_name(out.name + ".work"))


def config_fields(config: PruneConfig) -> dict[str, Any]:
    """What the journal and the checkpoint say of a config."""
    return {f"config.{name}": value for name, value in config.model_dump(mode="json").items()}
