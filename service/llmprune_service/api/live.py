"""A job as it goes on: its stages as bars, the time that is left, and what a stage brings down as curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from llmprune.io.report_plots import Plot, course_svg, error_svg
from llmprune_service import tables
from llmprune_service.api.page_text import stage_label
from llmprune_service.jobs import Jobs, Row, view
from llmprune_service.schemas import PHASES, JobView

MAX_POINTS = 2000
"""Progress events that a curve is drawn from; of more, every so many is read."""
_CURVES = {
    "refine": ("Refinement", "held-out loss", "passes"),
    "recover": ("Recovery", "held-out loss", "steps"),
    "allocate": ("Search of the allocation", "KL from dense", "steps"),
    "structure": ("Search of what goes", "KL from dense", "steps"),
}


class Stage(NamedTuple):
    """A stage that ended after ``seconds``, or the one that runs, ``done`` of ``total`` (0 where that is not known)."""

    name: str
    label: str
    done: int
    total: int
    seconds: float | None
    left: float | None = None

    @property
    def percent(self) -> float:
        """How far it is."""
        return 100.0 if self.seconds is not None else 100 * self.done / self.total if self.total else 0.0


def phases(row: Row) -> list[dict[str, str]]:
    """Each phase with its state: done, current, failed, stopped or waiting."""
    at = len(PHASES) if row.status == "succeeded" else PHASES.index(row.phase) if row.phase in PHASES else -1
    here = {"failed": "failed", "cancelled": "stopped", "queued": "waiting"}.get(row.status, "current")
    return [
        {"name": phase, "state": "done" if index < at else here if index == at else "waiting"}
        for index, phase in enumerate(PHASES)
    ]


def elapsed(row: Row, now: float) -> float | None:
    """Seconds since the job was begun, or that it took; None before."""
    return max(0.0, (row.finished_at or now) - row.started_at) if row.started_at else None


def stages(jobs: Jobs, row: Row) -> list[Stage]:
    """The stages that have ended, in order, each once, then the one that runs."""
    ended = {
        str(data.get("stage")): float(data.get("seconds") or 0.0)
        for data in _data(jobs, row, "job.metric") if data.get("name") == "stage"
    }  # fmt: skip
    current = _current(view(row)) if row.status in ("running", "cancelling") else None
    if current is not None:
        ended.pop(current.name, None)  # begun once more after an interruption
    found = [Stage(name, stage_label(name), 1, 1, seconds) for name, seconds in ended.items()]
    return [*found, *([current] if current else [])]


def _current(job: JobView) -> Stage | None:
    if job.progress is None:
        return None
    at = job.progress
    return Stage(at.stage, stage_label(at.stage), at.done, at.total, None, job.eta_s)


def curves(jobs: Jobs, row: Row, blocks: Sequence[Row]) -> list[Plot]:
    """What the blocks' errors are, and the course of whatever a stage brings down, as far as the job has come."""
    points = [(float(block.block), float(block.error)) for block in blocks if block.error is not None]
    found = [("errors", "Output error by layer", "Mean over the block's sites.", error_svg(points, len(blocks)))]
    for stage, course in _courses(jobs, row).items():
        title, value, steps = _CURVES.get(stage, (stage_label(stage), "value", "steps"))
        svg = course_svg(sorted(course.items()), label=f"{title}: {value} against {steps}", x=steps, y=value)
        found.append((stage, title, f"{value[:1].upper()}{value[1:]} against {steps}.", svg))
    return [Plot(name, title, note, svg) for name, title, note, svg in found if svg]


def _courses(jobs: Jobs, row: Row) -> dict[str, dict[float, float]]:
    """By stage: the value after so many steps, told last."""
    step = max(1, row.last_seq // MAX_POINTS)
    found: dict[str, dict[float, float]] = {}
    for data in _data(jobs, row, "job.progress", every=step):
        value = data.get("value")
        if isinstance(value, int | float) and math.isfinite(value):
            found.setdefault(str(data["stage"]), {})[float(data["done"])] = float(value)
    return found


def _data(jobs: Jobs, row: Row, kind: str, *, every: int = 1) -> list[Mapping[str, Any]]:
    """What the events of a kind carry, oldest first."""
    events = tables.events
    query = sa.select(events.c.data).where(events.c.job_id == row.id, events.c.type == kind, events.c.seq % every == 0)
    with jobs.engine.connect() as connection:
        return list(connection.execute(query.order_by(events.c.seq)).scalars())
