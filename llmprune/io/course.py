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
    """A curve: (place, value), the places rising and the values finite, two at least."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Course | None:
        """Without what is not finite; None where fewer than two are left."""
        finite = tuple(point for point in points if math.isfinite(point[1]))
        return cls(finite) if len(finite) > 1 else None

    @property
    def high(self) -> float:
        """The highest value."""
        return max(value for _, value in self.points)

    @property
    def low(self) -> float:
        """The lowest value."""
        return min(value for _, value in self.points)

    @property
    def end(self) -> float:
        """The last place."""
        return self.points[-1][0]
