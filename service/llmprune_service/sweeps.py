"""Sweeps in the database: jobs that were submitted together and differ in what is compared. Each is an ordinary job.

A sweep's row holds what its jobs share; what becomes of it is what becomes of them. It lives as long as the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from llmprune.methods import method_of
from llmprune.spec import PruneConfig
from llmprune.sweep_spec import SweepConfig
from llmprune_service import idempotency, tables
from llmprune_service.ids import new_id
from llmprune_service.jobs import ACTIVE, Jobs, Row, lock_sweep
from llmprune_service.problems import Problem, not_found
from llmprune_service.schemas import FINISHED, JobRequest, ServiceFields, Status, SweepExtension, SweepRequest, SweepView
from llmprune_service.settings import Settings
from llmprune_service.submissions import Submission

Named = Mapping[str, JobRequest]  # jobs by the names of their points


class Tally(NamedTuple):
    """The jobs of a sweep by status, and when the last of them ended."""

    counts: dict[Status, int]
    finished_at: float | None

    @property
    def status(self) -> Status:
        """Running while a job is under way; then failed or cancelled if one of them is."""
        begun = set(self.counts) - {"queued"}
        if "queued" in self.counts or begun & set(ACTIVE):
            return "running" if begun else "queued"
        return next((status for status in ("failed", "cancelled") if status in begun), "succeeded")


class Sweeps:
    """The sweeps of all tenants; ``tenant`` None means any."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._engine = jobs.engine
        self.settings = jobs.settings

    def submit(
        self,
        tenant: str,
        request: SweepRequest,
        points: Named,
        *,
        revision: str | None = None,
        bytes_reserved: Sequence[int],
        idempotency_key: str | None = None,
    ) -> tuple[Row, bool]:
        """Queue all points of a sweep, or none; returns it and whether it is new.

        Raises:
            Problem: 422 for a key used with another request, 429 with too many jobs queued, 507 over the disk quota.
        """
        sweep_id, now = new_id("sweep"), self._jobs.now
        values = {
            "id": sweep_id, "tenant": tenant, "model": request.base.model, "revision": revision, "num_points": 0,
            "config": request.config.model_dump(mode="json", exclude_unset=True), "created_at": now, "updated_at": now,
            "fields": request.model_dump(mode="json", include=set(ServiceFields.model_fields), exclude_unset=True),
        }  # fmt: skip
        try:
            with self._engine.begin() as connection:
                idempotency.remember(connection, tenant, request, idempotency_key, sweep_id)
                row = connection.execute(sa.insert(tables.sweeps).values(values).returning(tables.sweeps)).one()
                row = self._place(connection, row, points, bytes_reserved)
        except IntegrityError:
            known = self.replay(tenant, request, idempotency_key)
            assert known is not None
            return known, False
        return row, True

    def replay(self, tenant: str, request: SweepRequest, idempotency_key: str | None) -> Row | None:
        """The sweep this key made before, or None; raises Problem 422 if that was for another request."""
        made = idempotency.made_by(self._engine, tenant, request, idempotency_key)
        return None if made is None else self.get(tenant, made)

    def get(self, tenant: str | None, sweep_id: str) -> Row:
        """One sweep; raises Problem 404."""
        with self._engine.connect() as connection:
            return self._get(connection, tenant, sweep_id)

    def list(self, tenant: str | None, *, limit: int = 20, after: str | None = None) -> tuple[Sequence[Row], bool]:
        """Newest first, and whether there are more; ``after`` is the last id of the page before."""
        sweeps = tables.sweeps
        query = sa.select(sweeps).where(*_of_tenant(tenant))
        with self._engine.connect() as connection:
            if after is not None:
                last = self._get(connection, tenant, after)
                query = query.where(sa.tuple_(sweeps.c.created_at, sweeps.c.id) < sa.tuple_(last.created_at, last.id))
            rows = connection.execute(query.order_by(sweeps.c.created_at.desc(), sweeps.c.id.desc()).limit(limit + 1)).all()
        return rows[:limit], len(rows) > limit

    def views(self, rows: Sequence[Row]) -> tuple[SweepView, ...]:
        """Sweeps as clients see them."""
        jobs = tables.jobs
        ended = sa.func.max(jobs.c.finished_at).label("ended")
        query = sa.select(jobs.c.sweep_id, jobs.c.status, sa.func.count().label("number"), ended)
        found: dict[str, list[Row]] = {row.id: [] for row in rows}
        with self._engine.connect() as connection:
            for group in connection.execute(query.where(jobs.c.sweep_id.in_(found)).group_by(jobs.c.sweep_id, jobs.c.status)):
                found[group.sweep_id].append(group)
        return tuple(_view(row, _tally(found[row.id])) for row in rows)

    def points(self, tenant: str | None, sweep_id: str) -> Sequence[Row]:
        """The jobs of a sweep, in its order; raises Problem 404."""
        with self._engine.connect() as connection:
            self._get(connection, tenant, sweep_id)
            return self._points(connection, sweep_id)

    # Verbs ----------------------------------------------------------------------------------------------------------

    def extend(self, row: Row, config: SweepConfig, points: Named, bytes_each: int) -> SweepExtension:
        """Queue those points whose names are new, or none; ``config`` is what the sweep is asked for from now on.

        Raises:
            Problem: 404, 409 if it is no longer as ``row`` has it, 422 for more points than a sweep may have, 429 with too many
                jobs queued, 507 over the disk quota.
        """
        unchanged = tables.sweeps.c.updated_at == row.updated_at
        asked = config.model_dump(mode="json", exclude_unset=True)
        with self._engine.begin() as connection:
            changed = lock_sweep(connection, row.id, unchanged, config=asked, updated_at=self._jobs.now)
            if changed is None:
                self._get(connection, None, row.id)
                raise Problem(409, "conflict", "The sweep was changed by another request meanwhile. Try again.")
            there = self._points(connection, row.id)
            names, configs = {point.point for point in there}, [PruneConfig.model_validate(point.config) for point in there]
            fresh = {name: request for name, request in points.items() if name not in names and request.config not in configs}
            check_number(len(there) + len(fresh), self.settings)
            if fresh:
                changed = self._place(connection, changed, fresh, [bytes_each] * len(fresh))
        known = tuple(name for name in points if name not in fresh)
        return SweepExtension(added=tuple(fresh), known=known, sweep=self.views([changed])[0])

    def cancel(self, tenant: str | None, sweep_id: str) -> Row:
        """Stop all jobs that have not ended. Repeating it changes nothing; raises Problem 404, or 409 if all have ended."""
        return self._each(tenant, sweep_id, self._jobs.cancel, "cancelled", ACTIVE, or_already="cancelled")

    def resume(self, tenant: str | None, sweep_id: str) -> Row:
        """Go on with the cancelled jobs; raises Problem 404, or 409 if there is none."""
        return self._each(tenant, sweep_id, self._jobs.resume, "resumed", ("cancelled",))

    def retry(self, tenant: str | None, sweep_id: str) -> Row:
        """Try the failed jobs again; raises Problem 404, or 409 if there is none."""
        return self._each(tenant, sweep_id, self._jobs.retry, "retried", ("failed",))

    def delete(self, tenant: str | None, sweep_id: str) -> None:
        """Delete a sweep with its jobs and their files; raises Problem 404, or 409 while a job is under way."""
        jobs, sweeps = tables.jobs, tables.sweeps
        with self._engine.begin() as connection:
            row = lock_sweep(connection, sweep_id, *_of_tenant(tenant), updated_at=self._jobs.now)
            if row is None:
                raise not_found("sweep")
            of_sweep = jobs.c.sweep_id == sweep_id
            finished = jobs.c.status.in_(sorted(FINISHED))
            ids = connection.scalars(sa.delete(jobs).where(of_sweep, finished).returning(jobs.c.id)).all()
            left = connection.scalar(sa.select(sa.func.count()).where(of_sweep))
            if left:
                raise _conflict(f"{left} of its jobs have not ended", "deleted", "all must have; cancel it first")
            connection.execute(sa.delete(sweeps).where(sweeps.c.id == sweep_id))
            idempotency.forget(connection, row.tenant, sweep_id)
        for job_id in ids:
            self._jobs.remove_files(row.tenant, job_id)

    # Parts ----------------------------------------------------------------------------------------------------------

    def _place(self, connection: sa.Connection, row: Row, points: Named, bytes_reserved: Sequence[int]) -> Row:
        """Number points after those that are there, and queue them; returns the sweep's row.

        Who needs most goes first: a worker that has done it has the statistics for the others.
        """
        submissions = [
            Submission(request, row.revision, needed, sweep_id=row.id, sweep_index=index, point=name)
            for index, ((name, request), needed) in enumerate(zip(points.items(), bytes_reserved, strict=True), row.num_points)
        ]
        self._jobs.place(connection, row.tenant, sorted(submissions, key=lambda job: -method_of(points[str(job.point)]).needs))
        changed = lock_sweep(connection, row.id, num_points=row.num_points + len(submissions))
        assert changed is not None
        return changed

    def _each(
        self,
        tenant: str | None,
        sweep_id: str,
        change: Callable[[str | None, str], Row],
        verb: str,
        statuses: Sequence[str],
        or_already: str | None = None,
    ) -> Row:
        """Change the jobs of these statuses, the last ones first: a worker that is set free by one finds no other to begin."""
        points = self.points(tenant, sweep_id)
        chosen = [point for point in points if point.status in statuses]
        if not chosen and or_already not in {point.status for point in points}:
            raise _conflict(f"none of its jobs is {' or '.join(statuses)}", verb, "one must be")
        for point in reversed(chosen):
            with suppress(Problem):  # it moved on meanwhile
                change(tenant, point.id)
        return self.get(tenant, sweep_id)

    def _get(self, connection: sa.Connection, tenant: str | None, sweep_id: str) -> Row:
        sweeps = tables.sweeps
        row = connection.execute(sa.select(sweeps).where(sweeps.c.id == sweep_id, *_of_tenant(tenant))).first()
        if row is None:
            raise not_found("sweep")
        return row

    def _points(self, connection: sa.Connection, sweep_id: str) -> Sequence[Row]:
        jobs = tables.jobs
        return connection.execute(sa.select(jobs).where(jobs.c.sweep_id == sweep_id).order_by(jobs.c.sweep_index)).all()


def check_number(number: int, settings: Settings) -> None:
    """Raise Problem 422 for more points than a sweep may have."""
    limit, name = min((settings.max_sweep_points, "MAX_SWEEP_POINTS"), (settings.max_queued, "MAX_QUEUED"))
    if number > limit:
        raise Problem(
            422, "too-many-points", f"A sweep may have at most {limit} points here, and this one would have {number}. Name "
            f"fewer values, or let the operator raise LLMPRUNE_{name}.",
        )  # fmt: skip


def _tally(groups: Sequence[Row]) -> Tally:
    ends = [group.ended for group in groups if group.ended is not None]
    return Tally({group.status: group.number for group in groups}, max(ends, default=None))


def _view(row: Row, tally: Tally) -> SweepView:
    links = {"self": f"/v1/sweeps/{row.id}", "jobs": f"/v1/jobs?sweep={row.id}"}
    links |= {name: f"/v1/sweeps/{row.id}/{path}" for name, path in _PARTS.items()}
    fields = ServiceFields.model_validate(row.fields)
    return SweepView(
        id=row.id, status=tally.status, model=row.model, revision=row.revision, config=row.config, priority=fields.priority,
        timeout_s=fields.timeout_s, metadata=fields.metadata, num_points=sum(tally.counts.values()), counts=tally.counts,
        created_at=row.created_at, finished_at=tally.finished_at if tally.status in FINISHED else None, links=links,
    )  # fmt: skip


_PARTS = {"points": "points", "csv": "points.csv", "plot": "pareto.svg"}


def _of_tenant(tenant: str | None) -> tuple[sa.ColumnElement[bool], ...]:
    return () if tenant is None else (tables.sweeps.c.tenant == tenant,)


def _conflict(why: str, verb: str, needed: str) -> Problem:
    return Problem(409, "conflict", f"The sweep cannot be {verb}: {why}; {needed}.")
