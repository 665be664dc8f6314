"""Jobs as points: what each is worth, which are on the front, in which fields they differ. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llmprune.errors import LlmpruneError, one_line
from llmprune.io.pareto import Point, front, point_of
from llmprune.report import Report
from llmprune.spec import PruneConfig
from llmprune.sweep_report import Comparison, PointReport

SAME = 0.01
"""Sizes that differ by less than this share are no reason for an axis."""


def done_point(report: Report, name: str, *, directory: str | None, kept: bool, seconds: float | None = None) -> PointReport:
    """The point of a finished job."""
    point = point_of(report, name)
    return PointReport(
        name=name,
        config=report.config,
        group=point.group,
        values=point.values,
        directory=directory,
        kept=kept,
        text=report.quality[0].text.sha256 if report.quality else None,
        seconds=report.seconds if seconds is None else seconds,
    )


def failed_point(config: PruneConfig, name: str, error: Exception, seconds: float) -> PointReport:
    """The point of a job that ended in an error."""
    reason = one_line(error) if isinstance(error, LlmpruneError) else f"{type(error).__name__}: {one_line(error)}"
    return PointReport(name=name, status="failed", config=config, error=reason, seconds=seconds)


def plotted(points: Sequence[PointReport]) -> list[Point]:
    """As points of a plot, each leading to its report's page."""
    pages = (f"{point.directory}/report.html" if point.directory else "" for point in points)
    return [Point(point.name, point.group, point.values, page) for point, page in zip(points, pages, strict=True)]


def compared(points: Sequence[PointReport], x: str | None = None, y: str | None = None) -> dict[str, Any]:
    """The fields of a Comparison: points with their places on the front of two axes, which are chosen where none are given."""
    x, y = x or _cost(points), y or _quality(points)
    on_front = front(plotted(points), x, y)
    marked = tuple(point.model_copy(update={"on_front": on}) for point, on in zip(points, on_front, strict=True))
    return {"points": marked, "x": x, "y": y, "differing": differing(points), "notes": _notes(points)}


def comparison(points: Sequence[PointReport], x: str | None = None, y: str | None = None) -> Comparison:
    """Points side by side; see :func:`compared`."""
    return Comparison(**compared(points, x, y))


def differing(points: Sequence[PointReport]) -> tuple[str, ...]:
    """The fields of PruneConfig in which the jobs differ."""
    configs = [point.config for point in points]
    return tuple(
        name
        for name in PruneConfig.model_fields
        if any(getattr(config, name) != getattr(configs[0], name) for config in configs)
    )


def _cost(points: Sequence[PointReport]) -> str:
    """Sparsity where the jobs differ in it, else the size where that differs."""
    for key in ("sparsity", "bytes"):
        if _differ([point.values[key] for point in points if key in point.values]):
            return key
    return "sparsity"


def _quality(points: Sequence[PointReport]) -> str:
    return next((key for key in ("perplexity", "kl") if any(key in point.values for point in points)), "perplexity")


def _differ(values: Sequence[float]) -> bool:
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and max(finite) - min(finite) > SAME * max(map(abs, finite))


def sizes_differ(points: Sequence[PointReport]) -> bool:
    """Whether some of the checkpoints are smaller than others."""
    return _differ([point.values["bytes"] for point in points if "bytes" in point.values])


def _notes(points: Sequence[PointReport]) -> tuple[str, ...]:
    notes = []
    texts = {point.text for point in points if point.text}
    if len(texts) > 1:
        notes.append(f"These were evaluated on {len(texts)} different texts or lengths: their perplexities cannot be compared.")
    if len({point.config.model for point in points}) > 1:
        notes.append("These are not all made from the same model.")
    broken = sum(not math.isfinite(point.values.get("perplexity", 0.0)) for point in points)
    if broken:
        notes.append(f"{broken} of {len(points)} have a perplexity that is not finite, and are on no front.")
    return tuple(notes)
