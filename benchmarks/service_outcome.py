"""What must hold once a disturbed service has come to rest: nothing lost, nothing done twice, nothing left lying about."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.service import Service
from llmprune_service import tables
from llmprune_service.jobs import Row
from llmprune_service.processes import wait_until
from llmprune_service.schemas import FINISHED
from llmprune_service.store import Store

_TERMINAL = frozenset(f"job.{status}" for status in FINISHED)
_REST_SECONDS = 15.0


def outcome(service: Service, submitted: Mapping[int, set[str]], wanted: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Counts, and ``wrong``: a sentence for everything that must not be.

    ``submitted`` holds the job ids each submission was answered with; ``wanted`` the weights' digests of the
    configurations, which the submissions took in turn.
    """
    wait_until(lambda: not service.strangers() and not leftover_folders(service), _REST_SECONDS)
    with service.engine.connect() as connection:
        rows = {row.id: row for row in connection.execute(sa.select(tables.jobs).order_by(tables.jobs.c.created_at))}
    events = {job_id: service.jobs.events(None, job_id, limit=100_000) for job_id in rows}
    lost = [f"submission {index} is lost" for index, ids in submitted.items() if not ids & set(rows)]
    lost += [
        f"{row.id} is {row.status} ({row.error}) after {' '.join(event.type.removeprefix('job.') for event in events[row.id])}"
        for row in rows.values()
        if row.status != "succeeded"
    ]
    doubled = _doubled(rows, submitted, events)
    holes = [f"{each} has holes in its events" for each, row in rows.items() if _numbers(events[each]) != row.last_seq]
    differing = [
        f"{job_id} has other bytes than an undisturbed run"
        for index, ids in submitted.items()
        for job_id in ids
        if job_id in rows and rows[job_id].status == "succeeded" and not _is_same(service, job_id, wanted[index % len(wanted)])
    ]
    left = [f"process {process.pid} is left over" for process in service.strangers()]
    left += [f"the work directory of {job_id} is left over" for job_id in leftover_folders(service)]
    return {
        "jobs": len(rows), "succeeded": sum(row.status == "succeeded" for row in rows.values()), "lost": len(lost),
        "doubled": len(doubled), "differing": len(differing), **_totals(service, rows),
        "wrong": [*lost, *doubled, *holes, *differing, *left],
    }  # fmt: skip


def leftover_folders(service: Service) -> list[str]:
    """Jobs that succeeded and still have a work directory."""
    folders = {folder.name for folder in service.settings.work_dir.iterdir()}
    succeeded = sa.select(tables.jobs.c.id).where(tables.jobs.c.status == "succeeded")
    with service.engine.connect() as connection:
        return sorted(folders & set(connection.scalars(succeeded)))


def sha256(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _doubled(rows: Mapping[str, Row], submitted: Mapping[int, set[str]], events: Mapping[str, Sequence[Row]]) -> list[str]:
    known = {job_id for ids in submitted.values() for job_id in ids}
    found = [f"submission {index} made {len(ids)} jobs" for index, ids in submitted.items() if len(ids) > 1]
    found += [f"{job_id} belongs to no submission" for job_id in rows if job_id not in known]
    for job_id, of_job in events.items():
        ends = [event.seq for event in of_job if event.type in _TERMINAL]
        if len(ends) > 1:
            found.append(f"{job_id} ended {len(ends)} times")
        elif ends and ends[0] != of_job[-1].seq:
            found.append(f"{job_id} went on after its end")
    return found


def _numbers(events: Sequence[Row]) -> int | None:
    """How far the events count from 1 without holes; None if they do not."""
    return len(events) if [event.seq for event in events] == list(range(1, len(events) + 1)) else None


def _is_same(service: Service, job_id: str, wanted: Mapping[str, str]) -> bool:
    """Whether the stored weights are those bytes, and every stored file is the one its row says."""
    store = Store(service.settings)
    weights = {}
    for artifact in service.jobs.artifacts(None, job_id):
        file = store.local_path(artifact.path)
        if file is None or not file.is_file() or sha256(file) != artifact.sha256:
            return False
        if file.suffix == ".safetensors":
            weights[artifact.name] = artifact.sha256
    return weights == wanted


def _totals(service: Service, rows: Mapping[str, Row]) -> dict[str, Any]:
    earlier = tables.blocks.c.attempt < tables.jobs.c.attempt
    query = sa.select(sa.func.count()).select_from(tables.blocks.join(tables.jobs)).where(earlier)
    times = [row.finished_at - row.started_at for row in rows.values() if row.finished_at and row.started_at]
    with service.engine.connect() as connection:
        return {
            "recoveries": sum(row.recoveries for row in rows.values()),
            "retries": sum(sum(row.retries.values()) for row in rows.values()),
            "blocks_kept": connection.scalar(query),
            "median_job_seconds": statistics.median(times) if times else 0.0,
        }
