"""Finished jobs side by side: one plot of their trade-off, one table; the address holds what is compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, NamedTuple
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response

from llmprune.io.pareto import AXES, Point, columns, front, pareto_svg, point_of, points_csv
from llmprune.io.render import recipe
from llmprune.io.report_plots import Plot
from llmprune.report import Report
from llmprune_service.api import auth
from llmprune_service.api.deps import JobsDep
from llmprune_service.api.html import PageRoute, render
from llmprune_service.api.job_page import read_report
from llmprune_service.api.page_text import target
from llmprune_service.ids import JOB_ID
from llmprune_service.jobs import Jobs, Row
from llmprune_service.problems import Problem

MAX_COMPARED = 100
NUM_OFFERED = 50
DEFAULT_AXES = ("sparsity", "perplexity")

router = APIRouter(route_class=PageRoute, include_in_schema=False)
Ids = Annotated[list[str], Query(alias="job", default_factory=list)]


class Compared(NamedTuple):
    """What was asked for: the points with their jobs, and a sentence on everything that cannot be shown."""

    rows: list[Row]
    points: list[Point]
    notes: list[str]


@router.get("/ui/compare")
def compare(
    request: Request, principal: auth.reader, jobs: JobsDep, ids: Ids, x: str = DEFAULT_AXES[0], y: str = DEFAULT_AXES[1]
) -> Response:
    """The chosen jobs, and which others could be chosen."""
    found = _find(jobs, principal.sees, ids)
    x, y, told = _axes(x, y)
    chosen = {row.id for row in found.rows}
    offered = [row for row in jobs.list(principal.sees, limit=NUM_OFFERED, status="succeeded")[0] if row.id not in chosen]
    query = urlencode([("job", row.id) for row in found.rows] + [("x", x), ("y", y)])
    keys = columns(found.points)
    table = [
        (row, point, on, [AXES[key].text(point.values.get(key)) for key in keys])
        for row, point, on in zip(found.rows, found.points, front(found.points, x, y), strict=True)
    ]
    return render(
        request, "compare.html", principal, here="compare", notes=[*found.notes, *told], axes=AXES, x=x, y=y, query=query,
        keys=keys, table=table, plot=_plot(found.points, x, y) if found.points else None,
        models=sorted({row.model for row in found.rows}),
        chosen=[(row, point.label) for row, point in zip(found.rows, found.points, strict=True)],
        offered=[(row, f"{row.model}, {row.method}, {target(row)}") for row in offered],
    )  # fmt: skip


@router.get("/ui/compare.svg")
def compare_plot(
    principal: auth.reader, jobs: JobsDep, ids: Ids, x: str = DEFAULT_AXES[0], y: str = DEFAULT_AXES[1]
) -> Response:
    """The plot as a file."""
    x, y, _ = _axes(x, y)
    svg = pareto_svg(_find(jobs, principal.sees, ids).points, x, y)
    return Response(svg, media_type="image/svg+xml", headers=_file(f"{y}-{x}.svg"))


@router.get("/ui/compare.csv")
def compare_table(
    principal: auth.reader, jobs: JobsDep, ids: Ids, x: str = DEFAULT_AXES[0], y: str = DEFAULT_AXES[1]
) -> Response:
    """All values as a file for spreadsheets."""
    x, y, _ = _axes(x, y)
    points = _find(jobs, principal.sees, ids).points
    return Response(points_csv(points, front(points, x, y)), media_type="text/csv", headers=_file("compared.csv"))


def _file(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}


def _axes(x: str, y: str) -> tuple[str, str, list[str]]:
    """Axes that there are, and what is wrong with those that were asked for."""
    told = [f"There is no axis {key!r}; there are {', '.join(AXES)}." for key in (x, y) if key not in AXES]
    return x if x in AXES else DEFAULT_AXES[0], y if y in AXES else DEFAULT_AXES[1], told


def _find(jobs: Jobs, tenant: str | None, ids: Sequence[str]) -> Compared:
    ids = list(dict.fromkeys(ids))
    notes = []
    if len(ids) > MAX_COMPARED:
        notes.append(f"At most {MAX_COMPARED} jobs are compared; the last {len(ids) - MAX_COMPARED} of this link are left out.")
    rows, reports = [], []
    for job_id in ids[:MAX_COMPARED]:
        row = _row(jobs, tenant, job_id)
        report = read_report(jobs, tenant, job_id) if row is not None else None
        if row is None:
            notes.append(f"There is no job {job_id!r} here: it was deleted, or the link is of another service.")
        elif report is None:
            notes.append(f"The job {row.id} ({row.model}) has no report to compare: it is {row.status}.")
        else:
            rows.append(row)
            reports.append(report)
    texts = {report.quality[0].text.sha256 for report in reports if report.quality}
    if len(texts) > 1:
        notes.append("These jobs were evaluated on different texts or tokens: their perplexities and KL cannot be compared.")
    return Compared(rows, _points(rows, reports), notes)


def _row(jobs: Jobs, tenant: str | None, job_id: str) -> Row | None:
    if not JOB_ID.fullmatch(job_id):
        return None
    try:
        return jobs.get(tenant, job_id)
    except Problem:
        return None


def _points(rows: Sequence[Row], reports: Sequence[Report]) -> list[Point]:
    """Named by what tells them apart: the model where there are several, then the end of the id where all else is alike."""
    several = len({row.model for row in rows}) > 1
    labels = [
        f"{row.model.rpartition('/')[2] + ' ' if several else ''}{recipe(report.config)} {target(row)}"
        for row, report in zip(rows, reports, strict=True)
    ]
    uses = Counter(labels)
    named = [label if uses[label] == 1 else f"{label} …{row.id[-4:]}" for label, row in zip(labels, rows, strict=True)]
    return [
        point_of(report, label, f"/ui/jobs/{row.id}")
        for row, report, label in zip(rows, reports, named, strict=True)
    ]  # fmt: skip


def _plot(points: Sequence[Point], x: str, y: str) -> Plot:
    title = f"{AXES[y].label[:1].upper()}{AXES[y].label[1:]} against {AXES[x].label}"
    return Plot("compare", title, f"{title}; the dashed line is the front.", pareto_svg(points, x, y))
