"""The course of a refinement in words and as a curve, loss against seconds. Torch-free."""

from __future__ import annotations

import math
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
    """A curve in a square of 100 by 100, time to the right, and what its edges stand for."""

    path: str
    high: float
    low: float
    seconds: float

    @classmethod
    def of(cls, refinement: RefinementReport) -> Course | None:
        """None where fewer than two losses are finite."""
        points = [(point.seconds, point.loss) for point in refinement.points if math.isfinite(point.loss)]
        if len(points) < 2:
            return None
        losses = [loss for _, loss in points]
        high, low, seconds = max(losses), min(losses), points[-1][0]
        width, height = seconds or 1.0, (high - low) or 1.0
        places = [f"{100 * second / width:.2f} {100 * (high - loss) / height:.2f}" for second, loss in points]
        return cls(f"M{'L'.join(places)}", high, low, seconds)
