"""The page of one job: live while it runs, its report and files when it is done, and its plots as files."""

from __future__ import annotations

import time
from collections.abc import Sequence

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from llmprune.errors import UserError
from llmprune.io.formats import change_of, number, percent, rate, small, times, with_error
from llmprune.io.grid import make_grid
from llmprune.io.plots import standalone
from llmprune.io.report_plots import plots_of
from llmprune.report import Report
from llmprune.speed import overlap, pair_speeds
from llmprune_service import tables
from llmprune_service.api import auth, live
from llmprune_service.api.deps import JobId, JobsDep
from llmprune_service.api.html import PageRoute, render
from llmprune_service.api.page_text import Table, commands, target, tiles, verdict
from llmprune_service.jobs import Jobs, Row, view
from llmprune_service.problems import not_found
from llmprune_service.schemas import FINISHED

LOG_SIZE = 100

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/ui/jobs/{job_id}")
def show_job(request: Request, principal: auth.reader, job_id: JobId, jobs: JobsDep) -> Response:
    """One job: progress, result, files, events, and how to reproduce it."""
    tenant = principal.sees
    row = jobs.get(tenant, job_id)
    events = _newest_events(jobs, job_id)
    finished = row.status in FINISHED
    now = time.time()
    blocks = jobs.blocks(tenant, job_id)
    report = read_report(jobs, tenant, job_id) if row.status == "succeeded" else None
    return render(
        request, "job.html", principal, here="jobs", job=view(row), row=row, target=target(row), finished=finished, now=now,
        phases=live.phases(row), stages=live.stages(jobs, row), events=events,
        num_blocks=next((event.data["num_blocks"] for event in events if event.type == "job.block"), None),
        elapsed=live.elapsed(row, now), may_write=principal.may_write, blocks=blocks, artifacts=jobs.artifacts(tenant, job_id),
        plots=list(plots_of(report).values()) if report else live.curves(jobs, row, blocks),
        report=report, report_tables=_tables(report) if report else [], verdict=verdict(row),
        tiles=tiles(row.result) if row.result else [], commands=commands(row, str(request.base_url), auth=jobs.settings.auth),
    )  # fmt: skip


@router.get("/ui/jobs/{job_id}/plots/{name}.svg")
def show_plot(principal: auth.reader, job_id: JobId, name: str, jobs: JobsDep) -> Response:
    """One plot of a job as a file."""
    tenant = principal.sees
    row = jobs.get(tenant, job_id)
    report = read_report(jobs, tenant, job_id)
    found = plots_of(report).values() if report else live.curves(jobs, row, jobs.blocks(tenant, job_id))
    plot = next((plot for plot in found if plot.name == name), None)
    if plot is None:
        raise not_found("plot")
    headers = {"Content-Disposition": f'attachment; filename="{job_id}-{plot.name}.svg"'}
    return Response(standalone(plot.svg), media_type="image/svg+xml", headers=headers)


def read_report(jobs: Jobs, tenant: str | None, job_id: str) -> Report | None:
    """The report of a finished job; None where there is none, or it is another version's."""
    stored = jobs.report(tenant, job_id)
    try:
        return None if stored is None else Report.model_validate(stored)
    except (ValidationError, UserError):
        return None


def _newest_events(jobs: Jobs, job_id: str) -> Sequence[Row]:
    """Newest first, without the progress that the bar shows."""
    events = tables.events
    query = sa.select(events).where(events.c.job_id == job_id, events.c.type != "job.progress")
    with jobs.engine.connect() as connection:
        return connection.execute(query.order_by(events.c.seq.desc()).limit(LOG_SIZE)).all()


def _tables(report: Report) -> list[Table]:
    """The numbers behind the plots."""
    return [table for table in (_quality(report), _tasks(report), _speeds(report), *_sites(report)) if table.rows]


def _quality(report: Report) -> Table:
    head = ("Text", "Perplexity, dense", "Pruned", "Ratio", "KL", "Top-1", "seq_len")
    rows = [
        (
            item.text.source, number(item.perplexity_dense), number(item.perplexity_pruned), times(item.ratio),
            small(item.kl), percent(item.top1_agreement), str(item.text.seq_len),
        )
        for item in report.quality
    ]  # fmt: skip
    return Table("quality", "Quality", head, rows)


def _tasks(report: Report) -> Table:
    """Scores with their standard errors; ~ marks a change within two of them."""
    rows = []
    for score in report.tasks.scores if report.tasks else ():
        dense, pruned = with_error(score.dense, score.dense_stderr), with_error(score.pruned, score.pruned_stderr)
        rows.append((score.task, score.metric, dense, pruned, change_of(score)))
    return Table("tasks", "Zero-shot tasks, score ± standard error", ("Task", "Metric", "Dense", "Pruned", "Change"), rows)


def _speeds(report: Report) -> Table:
    rows = []
    for dense, pruned in pair_speeds(report.latency.dense, report.latency.pruned) if report.latency else ():
        ratio = times(pruned.tokens_per_second / dense.tokens_per_second) if pruned and dense.tokens_per_second else ""
        note = " (quartiles overlap)" if pruned and overlap(dense, pruned) else ""
        sizes = (dense.phase, str(dense.batch_size), str(dense.num_tokens))
        rows.append((*sizes, rate(dense.tokens_per_second), rate(pruned.tokens_per_second) if pruned else "", ratio + note))
    return Table("speed", "Tokens per second", ("Phase", "Batch", "Tokens", "Dense", "Pruned", "Ratio"), rows)


def _sites(report: Report) -> list[Table]:
    """Sparsity and output error of each site; experts are taken together."""
    grid = make_grid(report.blocks)
    head = ("Block", *grid.labels, "All")
    sparsities = [
        (str(row.block.index), *(percent(cell.sparsity if cell else None) for cell in row.cells), percent(row.block.sparsity))
        for row in grid.rows
    ]
    errors = [
        (str(row.block.index), *(small(cell.output_error if cell else None) for cell in row.cells), small(row.output_error))
        for row in grid.rows if row.output_error is not None
    ]  # fmt: skip
    return [Table("sites", "Sparsity by site", head, sparsities), Table("site-errors", "Output error by site", head, errors)]
