"""Jobs in the database: what clients may do with them. Each verb is one transaction; the queue changes in the same one.

Every query names the tenant; another tenant's job is not found. Who executes a job writes through
:mod:`llmprune_service.execution`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from llmprune_service import idempotency, tables, webhooks
from llmprune_service.database import now
from llmprune_service.engine import Queue, run_id
from llmprune_service.problems import Problem, not_found
from llmprune_service.schemas import (
    FINISHED,
    PHASES,
    WEBHOOK_EVENTS,
    AutoRequest,
    Error,
    JobPatch,
    JobRequest,
    JobView,
    ProgressView,
)
from llmprune_service.settings import Settings
from llmprune_service.store import Store, remove_tree
from llmprune_service.submissions import Submission

Row = sa.Row[Any]
Events = Sequence[tuple[str, Mapping[str, Any]]]  # type and data
ACTIVE = ("queued", "running", "cancelling")
_RETRY_LATER = {"Retry-After": "60"}


class Jobs:
    """The jobs of all tenants. ``tenant`` None means any: for administrators and for the service itself."""

    def __init__(self, engine: sa.Engine, queue: Queue, settings: Settings) -> None:
        self.engine = engine
        self.queue = queue
        self.settings = settings
        self.now = now(engine)

    # Submitting and looking -----------------------------------------------------------------------------------------

    def submit(
        self,
        tenant: str,
        request: JobRequest | AutoRequest,
        *,
        revision: str | None = None,
        bytes_reserved: int = 0,
        idempotency_key: str | None = None,
    ) -> tuple[Row, bool]:
        """Queue a job; returns it and whether it is new (False: the key was used for the same request before).

        Raises:
            Problem: 422 for a key used with another request, 429 with too many jobs queued, 507 over the disk quota.
        """
        submission = Submission(request, revision, bytes_reserved)
        try:
            with self.engine.begin() as connection:
                idempotency.remember(connection, tenant, request, idempotency_key, submission.id)
                (row,) = self.place(connection, tenant, [submission])
        except IntegrityError:
            known = self.replay(tenant, request, idempotency_key)
            assert known is not None
            return known, False
        return row, True

    def replay(self, tenant: str, request: JobRequest | AutoRequest, idempotency_key: str | None) -> Row | None:
        """The job this key made before, or None; raises Problem 422 if that was for another request."""
        made = idempotency.made_by(self.engine, tenant, request, idempotency_key)
        return None if made is None else self.get(tenant, made)

    def get(self, tenant: str | None, job_id: str) -> Row:
        """One job; raises Problem 404."""
        with self.engine.connect() as connection:
            return self._get(connection, tenant, job_id)

    def list(
        self,
        tenant: str | None,
        *,
        limit: int = 20,
        after: str | None = None,
        status: str | None = None,
        model: str | None = None,
        method: str | None = None,
        sweep: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> tuple[Sequence[Row], bool]:
        """Jobs that match, newest first, and whether there are more; ``after`` is the last id of the page before."""
        jobs = tables.jobs
        query = sa.select(jobs).where(*_of_tenant(tenant))
        filters = {"status": status, "model": model, "method": method, "sweep_id": sweep}
        for name, value in filters.items():
            if value is not None:
                query = query.where(jobs.c[name] == value)
        for key, value in (metadata or {}).items():
            pair = tables.job_metadata.alias()
            query = query.where(sa.exists().where(pair.c.job_id == jobs.c.id, pair.c.key == key, pair.c.value == value))
        with self.engine.connect() as connection:
            if after is not None:
                last = self._get(connection, tenant, after)
                query = query.where(sa.tuple_(jobs.c.created_at, jobs.c.id) < sa.tuple_(last.created_at, last.id))
            rows = connection.execute(query.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit + 1)).all()
        return rows[:limit], len(rows) > limit

    def events(self, tenant: str | None, job_id: str, *, after: int = 0, limit: int = 100) -> Sequence[Row]:
        """Events with ``seq`` above ``after``, oldest first."""
        events = tables.events
        query = sa.select(events).where(events.c.job_id == job_id, events.c.seq > after).order_by(events.c.seq).limit(limit)
        return self._of_job(tenant, job_id, query)

    def blocks(self, tenant: str | None, job_id: str) -> Sequence[Row]:
        """Finished blocks, in order."""
        return self._of_job(tenant, job_id, _select(tables.blocks, job_id).order_by(tables.blocks.c.block))

    def artifacts(self, tenant: str | None, job_id: str) -> Sequence[Row]:
        """Files of the result, by name."""
        return self._of_job(tenant, job_id, _select(tables.artifacts, job_id).order_by(tables.artifacts.c.name))

    def artifact(self, tenant: str | None, job_id: str, name: str) -> Row:
        """One file of the result; raises Problem 404."""
        rows = self._of_job(tenant, job_id, _select(tables.artifacts, job_id).where(tables.artifacts.c.name == name))
        if not rows:
            raise not_found("artifact")
        return rows[0]

    def report(self, tenant: str | None, job_id: str) -> dict[str, Any] | None:
        """The library's report of a job that succeeded, as JSON; else None."""
        rows = self._of_job(tenant, job_id, _select(tables.reports, job_id))
        return dict(rows[0].report) if rows else None

    def pareto(self, tenant: str | None, *, model: str) -> Sequence[Row]:
        """Finished jobs of a model, oldest first, at most a thousand."""
        jobs = tables.jobs
        query = sa.select(jobs).where(*_of_tenant(tenant), jobs.c.model == model, jobs.c.status == "succeeded")
        with self.engine.connect() as connection:
            return connection.execute(query.order_by(jobs.c.created_at).limit(1000)).all()

    # Verbs ----------------------------------------------------------------------------------------------------------

    def cancel(self, tenant: str | None, job_id: str) -> Row:
        """Stop a job: at once if it waits, within a second or so if it runs. Repeating it changes nothing.

        Raises:
            Problem: 404, or 409 if it has ended otherwise.
        """
        with self.engine.begin() as connection:
            row = self._change(connection, tenant, job_id, "queued", status="cancelled", finished_at=self.now)
            if row is not None:
                row = self.append(connection, job_id, [("job.cancelled", {})])
            elif self._change(connection, tenant, job_id, "running", status="cancelling") is not None:
                return self.append(connection, job_id, [("job.cancelling", {})])
            else:
                row = self._get(connection, tenant, job_id)
                if row.status not in ("cancelling", "cancelled"):
                    raise _conflict(row, "cancelled", "queued or running")
                return row
        self.queue.cancel([run_id(job_id, row.run)])  # if this is lost, the run ends at its claim
        return row

    def resume(self, tenant: str | None, job_id: str) -> Row:
        """Go on with a cancelled job after its last finished block; raises Problem 404 or 409."""
        return self._enqueue_again(tenant, job_id, "cancelled", "resumed")

    def retry(self, tenant: str | None, job_id: str, *, from_start: bool = False) -> Row:
        """Try a failed job again under the same id, from the phase that failed or from the start; raises Problem 404 or 409."""
        return self._enqueue_again(tenant, job_id, "failed", "retried", from_start=from_start)

    def patch(self, tenant: str | None, job_id: str, patch: JobPatch) -> Row:
        """Change priority or metadata; raises Problem 404, or 409 for the priority of a job that does not wait."""
        stale = None
        with self.engine.begin() as connection:
            if patch.priority is not None:
                stale = self._change(connection, tenant, job_id, "queued", run=tables.jobs.c.run + 1, priority=patch.priority)
                if stale is None:
                    raise _conflict(self._get(connection, tenant, job_id), "moved in the queue", "queued")
                self.queue.enqueue(connection, job_id, stale.run, patch.priority)
                self.append(connection, job_id, [("job.queued", {"priority": patch.priority})])
            if patch.metadata is not None:
                self._get(connection, tenant, job_id)
                changed = {"metadata": patch.metadata, "updated_at": self.now}
                connection.execute(sa.update(tables.jobs).where(tables.jobs.c.id == job_id).values(changed))
                connection.execute(sa.delete(tables.job_metadata).where(tables.job_metadata.c.job_id == job_id))
                write_metadata(connection, job_id, patch.metadata)
            row = self._get(connection, tenant, job_id)
        if stale is not None:
            self.queue.cancel([run_id(job_id, stale.run - 1)])
        return row

    def delete(self, tenant: str | None, job_id: str) -> None:
        """Delete a finished job with its files; raises Problem 404 or 409."""
        with self.engine.begin() as connection:
            row = self._get(connection, tenant, job_id)
            if row.sweep_id is not None:  # of its last two jobs, deleted at once, one must see that the other is gone
                lock_sweep(connection, row.sweep_id, updated_at=self.now)
            deleted = connection.execute(
                sa.delete(tables.jobs).where(tables.jobs.c.id == job_id, tables.jobs.c.status.in_(sorted(FINISHED)))
            )
            if not deleted.rowcount:
                raise _conflict(row, "deleted", "finished; cancel it first")
            idempotency.forget(connection, row.tenant, job_id)
            if row.sweep_id is not None:
                self._delete_empty_sweep(connection, row.tenant, row.sweep_id)
        self.remove_files(row.tenant, job_id)

    def remove_files(self, tenant: str, job_id: str) -> None:
        """What a deleted job leaves behind in the queue and on disks."""
        self.queue.delete_job(job_id)
        Store(self.settings).delete(tenant, job_id)
        remove_tree(self.settings.work_dir / job_id)  # on other hosts, their workers sweep

    def workers(self) -> Sequence[Row]:
        """All workers that have not said goodbye."""
        with self.engine.connect() as connection:
            alive = (tables.workers.c.seen_at >= self.now - self.settings.heartbeat_ttl).label("alive")
            return connection.execute(sa.select(tables.workers, alive).order_by(tables.workers.c.id)).all()

    def drain(self, worker_id: str) -> Row:
        """Let a worker finish what it runs, take nothing more, and end; raises Problem 404."""
        with self.engine.begin() as connection:
            update = sa.update(tables.workers).where(tables.workers.c.id == worker_id).values(draining=True)
            if not connection.execute(update).rowcount:
                raise not_found("worker")
        return next(row for row in self.workers() if row.id == worker_id)

    # Parts, also for sweeps and for who executes ----------------------------------------------------------------------

    def place(self, connection: sa.Connection, tenant: str, submissions: Sequence[Submission]) -> Sequence[Row]:
        """Queue jobs inside the caller's transaction; raises Problem 429 or 507 where not all of them may be."""
        self._check_quota(connection, tenant, submissions)
        rows = []
        for submission in submissions:
            request = submission.request
            times = {"created_at": self.now, "updated_at": self.now}
            values = {"tenant": tenant, **submission.columns(self.settings), **times}
            connection.execute(sa.insert(tables.jobs).values(values))
            write_metadata(connection, submission.id, request.metadata)
            self.queue.enqueue(connection, submission.id, 1, request.priority)
            rows.append(self.append(connection, submission.id, [("job.queued", {"priority": request.priority})]))
        return rows

    def append(self, connection: sa.Connection, job_id: str, events: Events, *where: Any, **values: Any) -> Row:
        """Add events to a job, and change it; the update takes the row's lock, so ``seq`` has no holes and no doubles.

        Raises:
            Lost: the job is gone, or ``where`` does not hold (any more).
        """
        jobs = tables.jobs
        values |= {"last_seq": jobs.c.last_seq + len(events), "updated_at": self.now}
        row = connection.execute(sa.update(jobs).where(jobs.c.id == job_id, *where).values(**values).returning(jobs)).first()
        if row is None:
            raise Lost(job_id)
        first = row.last_seq - len(events) + 1
        rows = [
            {"job_id": job_id, "seq": seq, "type": kind, "data": dict(data)} for seq, (kind, data) in enumerate(events, first)
        ]
        if rows:
            connection.execute(sa.insert(tables.events).values(created_at=self.now), rows)
        for kind, _ in events:
            if kind in WEBHOOK_EVENTS:
                webhooks.announce(connection, self.queue, row, kind, view(row).model_dump(mode="json"))
        return row

    def _enqueue_again(self, tenant: str | None, job_id: str, status: str, verb: str, *, from_start: bool = False) -> Row:
        jobs = tables.jobs
        with self.engine.begin() as connection:
            row = self._change(
                connection, tenant, job_id, status, status="queued", run=jobs.c.run + 1, error=None, retries={}, recoveries=0,
                progress=None, started_at=None, finished_at=None, claim=None, worker=None,
                generation=jobs.c.generation + int(from_start),
            )  # fmt: skip
            if row is None:
                raise _conflict(self._get(connection, tenant, job_id), verb, status)
            if from_start:
                connection.execute(sa.delete(tables.blocks).where(tables.blocks.c.job_id == job_id))
            self.queue.enqueue(connection, job_id, row.run, row.priority)
            return self.append(connection, job_id, [("job.queued", {"priority": row.priority, "run": row.run})])

    def _change(
        self, connection: sa.Connection, tenant: str | None, job_id: str, expected: str, /, **values: Any
    ) -> Row | None:
        """Update a job of the ``expected`` status; None if it has another, or is not there."""
        jobs = tables.jobs
        where = (jobs.c.id == job_id, jobs.c.status == expected, *_of_tenant(tenant))
        return connection.execute(sa.update(jobs).where(*where).values(**values).returning(jobs)).first()

    def _get(self, connection: sa.Connection, tenant: str | None, job_id: str) -> Row:
        row = connection.execute(sa.select(tables.jobs).where(tables.jobs.c.id == job_id, *_of_tenant(tenant))).first()
        if row is None:
            raise not_found("job")
        return row

    def _of_job(self, tenant: str | None, job_id: str, query: sa.Select[Any]) -> Sequence[Row]:
        with self.engine.connect() as connection:
            self._get(connection, tenant, job_id)
            return connection.execute(query).all()

    def _delete_empty_sweep(self, connection: sa.Connection, tenant: str, sweep_id: str) -> None:
        jobs, sweeps = tables.jobs, tables.sweeps
        left = sa.exists().where(jobs.c.sweep_id == sweep_id)
        if connection.execute(sa.delete(sweeps).where(sweeps.c.id == sweep_id, ~left)).rowcount:
            idempotency.forget(connection, tenant, sweep_id)

    def _check_quota(self, connection: sa.Connection, tenant: str, submissions: Sequence[Submission]) -> None:
        jobs = tables.jobs
        active = sa.func.count().filter(jobs.c.status.in_(ACTIVE))
        count, used = connection.execute(
            sa.select(active, sa.func.coalesce(sa.func.sum(jobs.c.bytes_reserved), 0)).where(jobs.c.tenant == tenant)
        ).one()
        if count + len(submissions) > self.settings.max_queued:
            more = f", {len(submissions)} are to come" if len(submissions) > 1 else ""
            raise Problem(
                429, "too-many-jobs", f"{count} jobs are queued or running{more}, the limit is {self.settings.max_queued}. "
                "Wait for some to finish, or cancel some.", headers=_RETRY_LATER,
            )  # fmt: skip
        used = int(used)  # PostgreSQL sums up to a decimal
        needed = sum(submission.bytes_reserved for submission in submissions)
        if used + needed > self.settings.tenant_quota_bytes:
            what = "This job needs" if len(submissions) == 1 else f"These {len(submissions)} jobs need"
            raise Problem(
                507, "quota-exceeded", f"{what} {needed / 1e9:.1f} GB and {used / 1e9:.1f} GB of "
                f"{self.settings.tenant_quota_bytes / 1e9:.1f} GB are in use. Delete finished jobs.",
            )  # fmt: skip


class Lost(Exception):
    """The job is no longer this execution's to write: another one has it, or it is gone."""


def lock_sweep(connection: sa.Connection, sweep_id: str, *where: sa.ColumnElement[bool], **values: Any) -> Row | None:
    """Change a sweep's row, which keeps it to this transaction; None if it is not there."""
    sweeps = tables.sweeps
    return connection.execute(sa.update(sweeps).where(sweeps.c.id == sweep_id, *where).values(values).returning(sweeps)).first()


def write_metadata(connection: sa.Connection, job_id: str, metadata: Mapping[str, str]) -> None:
    """The pairs once more as rows, for the filters of lists."""
    if metadata:
        rows = [{"job_id": job_id, "key": key, "value": value} for key, value in metadata.items()]
        connection.execute(sa.insert(tables.job_metadata), rows)


def view(row: Row) -> JobView:
    """A job as clients see it."""
    progress = eta = None
    if row.progress:
        stage, done, total = row.progress["stage"], row.progress["done"], row.progress["total"]
        progress = ProgressView(stage=stage, done=done, total=total, percent=round(100 * done / total, 1) if total else 0.0)
        fresh = done - row.progress["resumed_at"]
        if row.status == "running" and fresh > 0:
            eta = round((row.updated_at - row.progress["began"]) / fresh * (total - done), 1)
    metadata = {key: str(value) for key, value in row.metadata.items()}  # the worker refuses what SQL let in besides strings
    links = {"self": f"/v1/jobs/{row.id}", "events": f"/v1/jobs/{row.id}/events", "page": f"/ui/jobs/{row.id}"}
    if row.sweep_id is not None:
        links["sweep"] = f"/v1/sweeps/{row.sweep_id}"
    if row.status == "succeeded":
        links |= {"report": f"/v1/jobs/{row.id}/report", "artifacts": f"/v1/jobs/{row.id}/artifacts"}
    return JobView(
        id=row.id, kind=row.kind, sweep_id=row.sweep_id, point=row.point, status=row.status,
        phase=row.phase if row.phase in PHASES else None, model=row.model, revision=row.revision, config=row.config,
        priority=row.priority, timeout_s=row.timeout_s, metadata=metadata, progress=progress, eta_s=eta,
        attempt=row.attempt, recoveries=row.recoveries, worker=row.worker, result=row.result,
        error=Error(**row.error) if row.error else None, created_at=row.created_at, started_at=row.started_at,
        finished_at=row.finished_at, links=links,
    )  # fmt: skip


def _of_tenant(tenant: str | None) -> tuple[sa.ColumnElement[bool], ...]:
    return () if tenant is None else (tables.jobs.c.tenant == tenant,)


def _select(table: sa.Table, job_id: str) -> sa.Select[Any]:
    return sa.select(table).where(table.c.job_id == job_id)


def _conflict(row: Row, verb: str, needed: str) -> Problem:
    return Problem(409, "conflict", f"The job is {row.status}; to be {verb} it must be {needed}.")
