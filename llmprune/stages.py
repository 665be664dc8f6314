"""The clock of a stage: wall time, peak memory, and the events at its ends."""

from __future__ import annotations

import time

from llmprune.devices import PeakMemory
from llmprune.events import Stage, StageFinished, StageStarted
from llmprune.report import StageReport


class StageClock:
    """Times one stage and files its report in ``stages``; peaks are of the stage alone."""

    def __init__(self, stage: Stage, stages: list[StageReport]) -> None:
        self.stage: Stage = stage
        self.stages = stages
        self.peak = PeakMemory()
        self.begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.perf_counter() - self.begun

    def started(self, total: int, resumed_at: int = 0) -> StageStarted:
        """The event that the stage begins, of ``total`` steps."""
        return StageStarted(stage=self.stage, total=total, resumed_at=resumed_at)

    def finished(self, seconds: float | None = None) -> StageFinished:
        """File the report; ``seconds`` in place of those since the stage began, for one that a journal remembers."""
        measured = {
            "seconds": self.seconds if seconds is None else seconds,
            "peak_cpu_bytes": self.peak.cpu_bytes,
            "peak_gpu_bytes": self.peak.gpu_bytes,
        }
        self.stages.append(StageReport.model_validate({"name": self.stage, **measured}))
        return StageFinished.model_validate({"stage": self.stage, **measured})
