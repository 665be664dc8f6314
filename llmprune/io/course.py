"""A refinement in words, and courses as curves: of a loss against seconds, of a divergence against generations. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.report import Recovery, RefinementReport


def refinement_line(refinement: RefinementReport, taken: str | None = None) -> str:
    """What a refinement gained; ``taken`` is its time in words, left out where none is to be told."""
    last = refinement.points[-1]
    return (
        f"Refined by {refinement.name}: held-out loss {refinement.loss_before:.4f} -> {refinement.loss_after:.4f} in "
        f"{last.num_passes:,} passes, {last.num_accepted:,} of them accepted, {last.num_swaps:,} swaps"
        + (f", {taken}" if taken else "")
    )


def recovery_line(recovery: Recovery, taken: str | None = None) -> str:
    """What a recovery gained; ``taken`` is its time in words, left out where none is to be told."""
    config = recovery.config
    how = f"low-rank updates (rank {config.rank})" if config.mode == "lora" else "all parameters"
    lesson = "of the dense model's outputs" if recovery.teacher else "of the text alone"
    return (
        f"Recovered by {recovery.points[-1].step:,} steps {lesson}, {how}: held-out loss {recovery.loss_before:.4f} -> "
        f"{recovery.loss_after:.4f}, no zero filled" + (f", {taken}" if taken else "")
    )


@dataclass(frozen=True)
class Course:
    """A curve in a square of 100 by 100, from 0 at the left to ``end``, and what its other edges stand for."""

    path: str
    high: float
    low: float
    end: float

    @classmethod
    def of(cls, refinement: RefinementReport) -> Course | None:
        """The loss against seconds; None where fewer than two are finite."""
        return cls.through([(point.seconds, point.loss) for point in refinement.points])

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Course | None:
        """Through (place, value), the places rising from 0; None where fewer than two values are finite."""
        points = [(place, value) for place, value in points if math.isfinite(value)]
        if len(points) < 2:
            return None
        values = [value for _, value in points]
        high, low, end = max(values), min(values), points[-1][0]
        width, height = end or 1.0, (high - low) or 1.0
        places = [f"{100 * place / width:.2f} {100 * (high - value) / height:.2f}" for place, value in points]
        return cls(f"M{'L'.join(places)}", high, low, end)
