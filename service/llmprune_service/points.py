"""The jobs of a sweep side by side: as a list, as CSV, as a plot. What each is worth is in its row, from its report."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.io.pareto import AXES, Point, pareto_svg, point_of
from llmprune.io.render import recipe
from llmprune.report import Report
from llmprune.spec import PruneConfig
from llmprune.sweep_report import Comparison, PointReport, PointStatus
from llmprune.sweeps.points import comparison
from llmprune_service.jobs import Row
from llmprune_service.schemas import AxisName, Error, SweepPoints, SweepPointView

_FROM_HEADLINE = {"perplexity": "perplexity_pruned", "kl": "kl", "sparsity": "sparsity", "bytes": "checkpoint_bytes"}


def axis_values(report: Report) -> dict[str, float | str]:
    """A value for each axis the report has one for, as JSON."""
    return finite(point_of(report, "").values)


def finite(values: Mapping[str, float]) -> dict[str, float | str]:
    """Values as JSON has them: what is not finite is a string."""
    return {key: value if math.isfinite(value) else str(value) for key, value in values.items()}


def results(rows: Sequence[Row], x: AxisName | None = None, y: AxisName | None = None) -> SweepPoints:
    """The jobs of a sweep side by side; axes that are not given are chosen."""
    found = _comparison(rows, x, y)
    data = tuple(_view(row, point) for row, point in zip(rows, found.points, strict=True))
    return SweepPoints(data=data, x=found.x, y=found.y, differing=found.differing, notes=found.notes)


def results_csv(rows: Sequence[Row], x: AxisName | None = None, y: AxisName | None = None) -> str:
    """One line a point: what it is, its value on every axis in full, and why it failed."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["point", "job_id", "status", "method", "pattern", "target_sparsity", "front", *AXES, "error"])
    for row, point in zip(rows, _comparison(rows, x, y).points, strict=True):
        facts = (row.point, row.id, row.status, row.method, row.pattern, repr(row.sparsity), int(point.on_front))
        values = (repr(point.values[key]) if key in point.values else "" for key in AXES)
        writer.writerow([*facts, *values, f"{row.error['code']}: {row.error['message']}" if row.error else ""])
    return lines.getvalue()


def results_svg(rows: Sequence[Row], x: AxisName | None = None, y: AxisName | None = None) -> str:
    """The points that have succeeded, each leading to the page of its job."""
    found = _comparison(rows, x, y)
    points = [
        Point(point.name, point.group, point.values, f"/ui/jobs/{row.id}")
        for row, point in zip(rows, found.points, strict=True)
        if row.status == "succeeded"
    ]
    return pareto_svg(points, found.x, found.y)


def _comparison(rows: Sequence[Row], x: AxisName | None, y: AxisName | None) -> Comparison:
    return comparison([_point(row) for row in rows], x, y)


def _point(row: Row) -> PointReport:
    config = PruneConfig.model_validate(row.config)
    status: PointStatus = "done" if row.status == "succeeded" else "failed"
    return PointReport(name=row.point, status=status, config=config, group=series_of(config), values=values_of(row))


def _view(row: Row, point: PointReport) -> SweepPointView:
    links = {"job": f"/v1/jobs/{row.id}", "page": f"/ui/jobs/{row.id}"}
    return SweepPointView(
        name=row.point, job_id=row.id, status=row.status, config=row.config, on_front=point.on_front, links=links,
        values={key: value if math.isfinite(value) else None for key, value in point.values.items()},
        error=Error(**row.error) if row.error else None,
    )  # fmt: skip


def values_of(row: Row) -> dict[str, float]:
    """What a row of jobs has for each axis."""
    result: dict[str, Any] = row.result or {}
    values = result.get("values")
    if values is None:  # of a release that kept the headline alone
        values = {key: result.get(name) for key, name in _FROM_HEADLINE.items()}
    return {key: float(value) for key in AXES if (value := values.get(key)) is not None}


def series_of(config: PruneConfig) -> str:
    """What the points of a line have in common: the method with what came with it, and the pattern."""
    return recipe(config) + ("" if config.pattern == "unstructured" else f" {config.pattern}")
