"""What one process at a time does for all: gives jobs of dead workers to live ones, and sweeps up.

Level-triggered: every tick looks at the whole state, so a tick that fails is simply repeated. Any number of processes
run a Leader; a leased row decides which one acts. All times are the database's.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from llmprune_service import tables
from llmprune_service.engine import VERSION, WEBHOOKS, Run, run_id
from llmprune_service.jobs import Jobs, Lost, Row
from llmprune_service.settings import Settings

log = logging.getLogger(__name__)
_LEASE = "leader"
_UNDER_WAY = ("queued", "running", "cancelling")
_SWEEP_EVERY = 20  # ticks
_GAP = 0.6  # of a ttl: with the fifth between two heartbeats, a worker that beats is still seen as alive
# Time asleep counts too, where the system says it.
_clock = partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic


class Leader:
    """A thread that leads when nobody else does. ``holder`` names this process."""

    def __init__(self, jobs: Jobs, settings: Settings, *, holder: str) -> None:
        self._jobs = jobs
        self._settings = settings
        self._holder = holder
        self._ttl = settings.heartbeat_ttl
        self._last_tick, self._judge_from = -math.inf, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="leader")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; waits for the tick under way."""
        self._stop.set()
        self._thread.join(self._ttl)

    def tick(self) -> None:
        """Act once, if this process leads."""
        leads = self._lead()
        if self._may_judge() and leads:
            self._forget_workers()
            self._recover()
            self._renew_versions()
            self._settle()

    def _may_judge(self) -> bool:
        """False until a ttl has gone by since the database, or this process, was away: nobody, or nobody else, could beat.

        The gap between two ticks tells all of it: a database that raises or only waits, a stopped process, a suspended host.
        """
        now = _clock()
        if now - self._last_tick > _GAP * self._ttl:
            self._judge_from = now + self._ttl
        self._last_tick = now
        return now >= self._judge_from

    def _run(self) -> None:
        ticks = 0
        while not self._stop.wait(self._ttl / 5):
            try:
                self.tick()
                ticks += 1
                if ticks % _SWEEP_EVERY == 1 and self._lead():
                    self._sweep()
            except DBAPIError:
                log.warning("the database is away")
                self._last_tick = -math.inf
            except Exception:
                log.exception("a tick of the leader failed")

    def _lead(self) -> bool:
        """Renew this process's lease, or take one that ran out."""
        leases, now = tables.leases, self._jobs.now
        mine_or_stale = sa.or_(leases.c.holder == self._holder, leases.c.seen_at < now - self._ttl)
        take = sa.update(leases).where(leases.c.name == _LEASE, mine_or_stale).values(holder=self._holder, seen_at=now)
        with self._jobs.engine.begin() as connection:
            if connection.execute(take).rowcount:
                return True
        try:
            with self._jobs.engine.begin() as connection:
                connection.execute(sa.insert(leases).values(name=_LEASE, holder=self._holder, seen_at=now))
            return True
        except IntegrityError:
            return False

    def _live(self) -> set[str]:
        workers = tables.workers
        with self._jobs.engine.connect() as connection:
            return set(connection.scalars(sa.select(workers.c.id).where(workers.c.seen_at >= self._jobs.now - self._ttl)))

    def _recover(self) -> None:
        """Runs and deliveries whose worker is dead go back to the queue; jobs that killed too many are given up."""
        queue = self._jobs.queue
        held = queue.executing()  # before the workers: one that has just begun is then seen as alive
        delivering = queue.delivering()
        live = self._live()
        stranded = [run for run in held if run.executor not in live]
        for run in stranded:
            self._recover_run(run)
        lost = [workflow_id for workflow_id, executor in delivering if executor not in live]
        if lost:
            queue.hand_over(lost, WEBHOOKS)

    def _recover_run(self, run: Run) -> None:
        jobs, table, queue = self._jobs, tables.jobs, self._jobs.queue
        queue_again = False
        with jobs.engine.begin() as connection:
            row = connection.execute(sa.select(table).where(table.c.id == run.job_id, table.c.run == run.number)).first()
            if row is not None and row.worker not in (None, run.executor):
                return  # taken over since this tick began to look
            if row is not None and row.status in _UNDER_WAY:
                kind, facts, changes = self._outcome(row, run)
                queue_again = kind == "job.recovered"
                unchanged = (table.c.run == row.run, table.c.status == row.status)
                with suppress(Lost):  # the job moved on meanwhile
                    jobs.append(connection, row.id, [(kind, facts)], *unchanged, claim=None, worker=None, **changes)
        log.warning("a worker is lost", extra={"worker": run.executor, "job": run.job_id})
        if queue_again:
            queue.hand_over([run.id])
        else:
            queue.cancel([run.id])

    def _outcome(self, row: Row, run: Run) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """What becomes of a job whose worker is dead: the event, its data, and changed columns."""
        if row.status == "cancelling":
            return "job.cancelled", {}, {"status": "cancelled", "finished_at": self._jobs.now}
        if row.recoveries >= self._settings.max_recoveries:
            message = f"{row.recoveries + 1} workers died while running this job; it may be what kills them."
            error = {"code": "worker_lost", "message": message}
            return "job.failed", error, {"status": "failed", "error": error, "finished_at": self._jobs.now}
        recoveries = row.recoveries + 1
        return "job.recovered", {"worker": run.executor, "recoveries": recoveries}, {"recoveries": recoveries}

    def _renew_versions(self) -> None:
        """Runs that an older release enqueued wait for workers of its contract: enqueue them anew under ours."""
        for run in self._jobs.queue.left_behind(VERSION):
            self._enqueue_anew(run.job_id, run.number)

    def _settle(self) -> None:
        """Jobs that are under way while the engine has no run of theirs: one must not be able to hang for ever."""
        table = tables.jobs
        quiet = table.c.updated_at < self._jobs.now - 2 * self._ttl
        with self._jobs.engine.connect() as connection:
            columns = (table.c.id, table.c.run, table.c.status)
            under_way = table.c.status.in_(("running", "cancelling"))
            rows = connection.execute(sa.select(*columns).where(under_way, quiet).limit(1000)).all()
        if not rows:
            return
        active = self._jobs.queue.active([run_id(row.id, row.run) for row in rows])
        for row in rows:
            if run_id(row.id, row.run) not in active:
                self._enqueue_anew(row.id, row.run)

    def _enqueue_anew(self, job_id: str, run: int) -> None:
        jobs, table = self._jobs, tables.jobs
        with jobs.engine.begin() as connection:
            row = connection.execute(
                sa.update(table)
                .where(table.c.id == job_id, table.c.run == run, table.c.status.in_(_UNDER_WAY))
                .values(run=table.c.run + 1, claim=None, worker=None)
                .returning(table)
            ).first()
            if row is not None:
                jobs.queue.enqueue(connection, job_id, row.run, row.priority)
        jobs.queue.cancel([run_id(job_id, run)])

    def _forget_workers(self) -> None:
        """Rows of workers long dead; while they are fresh, a page shows them as lost."""
        workers = tables.workers
        with self._jobs.engine.begin() as connection:
            connection.execute(sa.delete(workers).where(workers.c.seen_at < self._jobs.now - 20 * self._ttl))

    def _sweep(self) -> None:
        """Delete what has been kept long enough."""
        now, day = self._jobs.now, 86400.0
        with self._jobs.engine.begin() as connection:
            for table, column, days in (
                (tables.idempotency_keys, tables.idempotency_keys.c.created_at, 2),
                (tables.sessions, tables.sessions.c.expires_at, 0),
                (tables.deliveries, tables.deliveries.c.created_at, 30),
            ):
                connection.execute(sa.delete(table).where(column < now - days * day))
        if self._settings.retention_days is not None:
            self._delete_jobs(self._expired(self._settings.retention_days))

    def _expired(self, days: float) -> list[str]:
        jobs = tables.jobs
        with self._jobs.engine.connect() as connection:
            over = jobs.c.finished_at < self._jobs.now - days * 86400.0
            return list(connection.scalars(sa.select(jobs.c.id).where(over).limit(100)))

    def _delete_jobs(self, ids: Iterable[str]) -> None:
        for job_id in ids:
            self._jobs.delete(None, job_id)
