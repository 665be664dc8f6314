"""The job engine behind a narrow interface: DBOS Transact on the service's own database, public API only.

The engine knows queues, ids and who runs what; what a job is lies in our ``jobs`` table. An id in its queue is
``JOB.RUN``: resuming, retrying or reordering a job enqueues a new run, and a run that is no longer the job's own stops
at its claim. Payloads are JSON, never pickle: who can write the database must not be able to run code in a worker.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from dbos import DBOSClient, DBOSConfig, DBOSPortableJSONSerializer, EnqueueOptions, WorkflowStatus

APPLICATION = "llmprune"
# Workers take only what was enqueued under their version. It is the number of the contract between the two, not of a
# release, so that jobs survive an upgrade; raise it when old runs cannot be continued: Leader then enqueues them anew.
VERSION = "1"
JOBS = "llmprune-jobs"
WEBHOOKS = "llmprune-webhooks"
RUN_JOB = "run_job"
DELIVER = "deliver"
_ACTIVE = ("ENQUEUED", "DELAYED", "PENDING")
_LOWEST = 10


@dataclass(frozen=True)
class Run:
    """One enqueued run of a job; ``executor`` is the worker that holds it, None while it waits."""

    id: str
    job_id: str
    number: int
    executor: str | None
    version: str | None


class Queue:
    """Enqueue, cancel, resume and look; running is :mod:`llmprune_service.worker`'s part."""

    def __init__(self, engine: sa.Engine) -> None:
        _quiet()
        self._client = DBOSClient(
            system_database_engine=engine,
            serializer=DBOSPortableJSONSerializer(),
            application_name=APPLICATION,
            retry_connection_errors=False,
            lazy=True,
        )

    def close(self) -> None:
        """Let go of what the client holds; the engine stays its owner's."""
        self._client.destroy()

    def enqueue(self, connection: sa.Connection, job_id: str, run: int, priority: int) -> None:
        """Queue a run inside the caller's transaction; priority 9 is served first."""
        options: EnqueueOptions = {
            "workflow_name": RUN_JOB,
            "queue_name": JOBS,
            "workflow_id": run_id(job_id, run),
            "app_version": VERSION,
            "priority": _LOWEST - priority,
        }
        self._client.enqueue_in_transaction(connection, options, job_id, run)

    def enqueue_delivery(self, connection: sa.Connection, delivery_id: str, attempt: int, delay_seconds: float = 0) -> None:
        """Queue one attempt at delivering a webhook inside the caller's transaction."""
        options: EnqueueOptions = {
            "workflow_name": DELIVER,
            "queue_name": WEBHOOKS,
            "workflow_id": f"{delivery_id}.{attempt}",
            "app_version": VERSION,
        }
        if delay_seconds > 0:
            options["delay_seconds"] = delay_seconds
        self._client.enqueue_in_transaction(connection, options, delivery_id, attempt)

    def cancel(self, ids: Iterable[str]) -> None:
        """Take runs out of the queue; one that is being executed is refused its next step."""
        for workflow_id in ids:
            self._client.cancel_workflow(workflow_id)

    def hand_over(self, ids: Sequence[str], queue: str = JOBS) -> None:
        """Give runs whose worker is dead back to the queue; the dead one's late writes are refused."""
        self._client.resume_workflows(list(ids), queue_name=queue)

    def executing(self) -> list[Run]:
        """Runs a worker holds, dead or alive."""
        return [_run(status) for status in self._list(JOBS, "PENDING")]

    def left_behind(self, version: str) -> list[Run]:
        """Runs that wait under an older version of the contract than this one; what is executing may still end there."""
        versions = [item["version_name"] for item in self._client.list_application_versions()]
        older = [name for name in versions if name.isdigit() and int(name) < int(version)]
        if not older:
            return []
        found = self._client.list_workflows(
            queue_name=JOBS, status=["ENQUEUED", "DELAYED"], app_version=older, load_input=False, load_output=False
        )
        return [_run(status) for status in found]

    def delivering(self) -> list[tuple[str, str | None]]:
        """Ids and workers of deliveries under way."""
        return [(status.workflow_id, status.executor_id) for status in self._list(WEBHOOKS, "PENDING")]

    def active(self, ids: Sequence[str]) -> set[str]:
        """Those of the runs that are waiting or executing."""
        found = self._client.list_workflows(workflow_ids=list(ids), status=list(_ACTIVE), load_input=False, load_output=False)
        return {status.workflow_id for status in found}

    def delete_job(self, job_id: str) -> None:
        """Forget all runs of a job."""
        found = self._client.list_workflows(workflow_id_prefix=f"{job_id}.", load_input=False, load_output=False)
        if found:
            self._client.delete_workflows([status.workflow_id for status in found])

    def steps(self, job_id: str, run: int) -> list[str]:
        """Names of the phases a run has finished."""
        return [step["function_name"] for step in self._client.list_workflow_steps(run_id(job_id, run), load_output=False)]

    def check(self) -> None:
        """Raise where the database cannot be reached."""
        self._client.check_connection()

    def _list(self, queue: str, status: str) -> list[WorkflowStatus]:
        return self._client.list_workflows(queue_name=queue, status=status, load_input=False, load_output=False)


def run_id(job_id: str, run: int) -> str:
    """The engine's id of a run."""
    return f"{job_id}.{run}"


def worker_config(engine: sa.Engine, executor_id: str) -> DBOSConfig:
    """The engine's configuration in a worker; ``executor_id`` is unique to the process, as overlapping ones strand runs."""
    _quiet()
    return {
        "name": APPLICATION,
        "system_database_url": "sqlite:///unused" if engine.dialect.name == "sqlite" else "postgresql://unused/unused",
        "system_database_engine": engine,
        "application_version": VERSION,
        "executor_id": executor_id,
        "serializer": DBOSPortableJSONSerializer(),
        "log_level": "WARNING",
        "run_migrations": False,
    }


def _run(status: WorkflowStatus) -> Run:
    job_id, _, number = status.workflow_id.rpartition(".")
    return Run(status.workflow_id, job_id, int(number) if number.isdigit() else 0, status.executor_id, status.app_version)


def _quiet() -> None:
    logging.getLogger("dbos").setLevel(logging.WARNING)
