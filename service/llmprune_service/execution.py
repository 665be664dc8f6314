"""One execution of a job: the fenced writes of whoever holds the claim.

Taking a job over writes a new claim into its row; every later write of the one before is refused with :class:`Lost`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError

from llmprune.errors import one_line
from llmprune.report import Report
from llmprune_service import tables
from llmprune_service.ids import new_id
from llmprune_service.jobs import Jobs, Lost, Row
from llmprune_service.schemas import Phase
from llmprune_service.store import Artifact

log = logging.getLogger(__name__)
_RETRY_SECONDS = 0.5
T = TypeVar("T")


class Cancelled(Exception):
    """The job's owner told it to stop."""


class Draining(Exception):
    """The worker is to end; the job goes on elsewhere."""


class JobFailed(Exception):
    """The job cannot be done; ``code`` and message are the client's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Execution:
    """A claimed job. All writes wait for a database that is away, and raise Lost once another execution has the job."""

    def __init__(self, jobs: Jobs, row: Row) -> None:
        self._jobs = jobs
        self.job: Row = row
        self._pending: list[tuple[str, Mapping[str, Any]]] = []
        self._values: dict[str, Any] = {}
        self._phase: Phase | None = None

    @classmethod
    def claim(cls, jobs: Jobs, job_id: str, run: int, worker: str) -> Execution | None:
        """Take the job if ``run`` is still its own; None if it is over, or was cancelled before it began."""
        table = tables.jobs

        def take() -> Execution | None:
            with jobs.engine.begin() as connection:
                row = connection.execute(
                    sa.update(table)
                    .where(table.c.id == job_id, table.c.run == run, table.c.status.in_(("queued", "running", "cancelling")))
                    .values(
                        claim=new_id("claim"), worker=worker, attempt=table.c.attempt + 1, progress=None,
                        started_at=sa.func.coalesce(table.c.started_at, jobs.now),
                        status=sa.case((table.c.status == "queued", "running"), else_=table.c.status),
                    )
                    .returning(table)
                ).first()  # fmt: skip
                if row is None:
                    return None
                if row.status == "cancelling":
                    cancelled = {"status": "cancelled", "finished_at": jobs.now, "claim": None, "worker": None}
                    jobs.append(connection, job_id, [("job.cancelled", {})], **cancelled)
                    return None
                events = [("job.running", {"attempt": row.attempt, "worker": worker})]
                return cls(jobs, jobs.append(connection, job_id, events))

        return patiently(take)

    def say(self, kind: str, data: Mapping[str, Any], **values: Any) -> None:
        """Note an event and changed columns; :meth:`flush` writes them."""
        self._pending.append((kind, data))
        self._values |= values

    def note(self, **values: Any) -> None:
        """Change columns without an event."""
        self._values |= values

    def enter(self, phase: Phase) -> None:
        """Move to a phase and say so."""
        if self._phase != phase:
            self._phase = phase
            self.say("job.phase", {"phase": phase}, phase=phase)
            self.flush()

    def flush(self) -> str:
        """Write what was noted, or just look; returns the job's status. Raises Lost."""
        events, values = self._pending, self._values
        self._pending, self._values = [], {}

        def write() -> Row:
            if not events and not values:
                return self._look()
            with self._jobs.engine.begin() as connection:
                return self._jobs.append(connection, self.job.id, events, self._mine(), **values)

        self.job = patiently(write)
        return str(self.job.status)

    def succeed(self, report: Report, result: Mapping[str, Any], artifacts: Sequence[Artifact]) -> None:
        """End the job with its report and files; one that was told to stop meanwhile is cancelled."""
        size = sum(artifact.bytes for artifact in artifacts)

        def write() -> Row:
            with self._jobs.engine.begin() as connection:
                row = self._jobs.append(
                    connection, self.job.id, [("job.succeeded", {"result": dict(result)})],
                    self._mine(), tables.jobs.c.status == "running", status="succeeded", finished_at=self._jobs.now,
                    result=dict(result), bytes_reserved=size, claim=None, worker=None, progress=None,
                )  # fmt: skip
                connection.execute(sa.delete(tables.reports).where(tables.reports.c.job_id == self.job.id))
                content = json.loads(report.model_dump_json())
                connection.execute(sa.insert(tables.reports).values(job_id=self.job.id, report=content))
                self._put(connection, artifacts)
            return row

        try:
            self.job = patiently(write)
        except Lost:
            if self.flush() != "cancelling":
                raise
            self.cancelled()

    def fail(self, code: str, message: str) -> None:
        """End the job with an error."""
        error = {"code": code, "message": message}
        self.say("job.failed", error, status="failed", error=error, finished_at=self._jobs.now, claim=None, worker=None)
        self.flush()

    def file(self, artifacts: Sequence[Artifact]) -> None:
        """Show files of a job that will not succeed, in place of those it had. Raises Lost."""

        def write() -> Row:
            with self._jobs.engine.begin() as connection:
                row = self._jobs.append(connection, self.job.id, [], self._mine())
                self._put(connection, artifacts)
            return row

        self.job = patiently(write)

    def _put(self, connection: sa.Connection, artifacts: Sequence[Artifact]) -> None:
        table = tables.artifacts
        connection.execute(sa.delete(table).where(table.c.job_id == self.job.id))
        connection.execute(sa.insert(table), [{"job_id": self.job.id, **vars(artifact)} for artifact in artifacts])

    def cancelled(self) -> None:
        """End the job as its owner asked."""
        self.say("job.cancelled", {}, status="cancelled", finished_at=self._jobs.now, claim=None, worker=None)
        self.flush()

    def filed_blocks(self) -> set[int]:
        """Blocks that have a row."""
        return {row.block for row in patiently(lambda: self._jobs.blocks(None, self.job.id))}

    def add_block(self, block: Mapping[str, Any], num_blocks: int) -> None:
        """File a finished block together with its event; one that is done again replaces its row. Raises Lost."""
        table = tables.blocks
        event = {name: value for name, value in block.items() if name != "sha256"} | {"num_blocks": num_blocks}
        events, values = [*self._pending, ("job.block", event)], self._values
        self._pending, self._values = [], {}

        def write() -> Row:
            with self._jobs.engine.begin() as connection:
                job = self._jobs.append(connection, self.job.id, events, self._mine(), **values)
                connection.execute(sa.delete(table).where(table.c.job_id == job.id, table.c.block == block["block"]))
                row = {**block, "job_id": job.id, "attempt": job.attempt, "created_at": self._jobs.now}
                connection.execute(sa.insert(table).values(row))
            return job

        self.job = patiently(write)

    def _look(self) -> Row:
        with self._jobs.engine.connect() as connection:
            row = connection.execute(sa.select(tables.jobs).where(tables.jobs.c.id == self.job.id, self._mine())).first()
        if row is None:
            raise Lost(self.job.id)
        return row

    def _mine(self) -> sa.ColumnElement[bool]:
        mine: sa.ColumnElement[bool] = tables.jobs.c.claim == self.job.claim
        return mine


def patiently(work: Callable[[], T]) -> T:
    """Do database work, again and again while the database is away: a running job outlives its restart."""
    while True:
        try:
            return work()
        except DBAPIError as error:
            if not (isinstance(error, OperationalError) or error.connection_invalidated):
                raise
            log.warning("waiting for the database: %s", one_line(error))
            time.sleep(_RETRY_SECONDS)
