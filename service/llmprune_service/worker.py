"""A worker: one light process (no torch) that claims one job at a time and runs it in child processes.

It registers with the job engine, beats its heart, and ends when told to: a drain lets the current job be finished;
SIGTERM the current block, and the next worker goes on with the job.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import sqlalchemy as sa
from dbos import DBOS, error
from sqlalchemy.exc import SQLAlchemyError

from llmprune._version import __version__
from llmprune_service import engine as job_engine
from llmprune_service import tables, webhooks
from llmprune_service.database import make_engine
from llmprune_service.engine import DELIVER, JOBS, RUN_JOB, WEBHOOKS, Queue
from llmprune_service.execution import Draining, Execution
from llmprune_service.hardening import forbid_pickle
from llmprune_service.ids import new_id
from llmprune_service.jobs import Jobs, Lost
from llmprune_service.leader import Leader
from llmprune_service.runner import Runner
from llmprune_service.searching import SearchRunner
from llmprune_service.settings import Settings
from llmprune_service.store import Store, remove_tree

log = logging.getLogger(__name__)
_DELIVERIES_AT_A_TIME = 8


class Worker:
    """One slot of this host. ``run()`` returns when the worker has been told to end."""

    def __init__(self, settings: Settings, *, slot: int = 0, devices: str | None = None) -> None:
        self.settings = settings
        self.slot = slot
        self.devices = devices
        self.id = new_id("worker")
        self.engine = make_engine(settings.url)
        self.queue = Queue(self.engine)
        self.jobs = Jobs(self.engine, self.queue, settings)
        self.store = Store(settings)
        self.ending = threading.Event()  # takes no more jobs
        self._leaving = threading.Event()  # gives the current one away, too
        self._busy = threading.Lock()
        self._job_id: str | None = None

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or a drain."""
        global _current
        _current = self
        forbid_pickle()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._end())
        self._beat()
        leader = Leader(self.jobs, self.settings, holder=self.id)
        for body in (self._keep_beating, self._keep_sweeping):
            threading.Thread(target=body, daemon=True).start()
        leader.start()
        DBOS(config=job_engine.worker_config(self.engine, self.id))
        DBOS.listen_queues([JOBS, WEBHOOKS])
        DBOS.launch()
        polling = self.settings.poll_seconds
        DBOS.register_queue(JOBS, worker_concurrency=1, polling_interval_sec=polling, on_conflict="always_update")
        DBOS.register_queue(
            WEBHOOKS, worker_concurrency=_DELIVERIES_AT_A_TIME, polling_interval_sec=polling, on_conflict="always_update"
        )
        log.info("worker ready", extra={"worker": self.id, "slot": self.slot})
        self.ending.wait()
        with self._busy:  # until the current job is over, or lets go at the end of its block
            pass
        leader.stop()
        self._leave()
        # Claimed runs stay with the engine as they are; a tidy shutdown of its threads would wait for them.
        os._exit(0)

    def execute(self, job_id: str, run: int) -> str:
        """One run of a job, on the engine's thread; returns how it ended."""
        with self._busy:
            if self.ending.is_set():
                self._hand_back(job_id, run)
            execution = Execution.claim(self.jobs, job_id, run, self.id)
            if execution is None:
                return "over"
            self._job_id = job_id
            try:
                step = functools.partial(self._step, job_id, run)
                kind = SearchRunner if execution.job.kind == "auto" else Runner
                kind(execution, self.store, self.settings, self.devices, self._leaving.is_set, step).run()
            except Lost:
                log.warning("another worker has the job", extra={"job": job_id})
                return "lost"
            except error.DBOSException:
                raise  # the engine took the run away from this worker
            except Exception:
                log.exception("the job broke the worker", extra={"job": job_id})
                execution.fail("internal_error", "The service made a mistake; the worker's log says which. Retry the job.")
            finally:
                self._job_id = None
            return str(execution.job.status)

    def _end(self) -> None:
        self._leaving.set()
        self.ending.set()

    def _step(self, job_id: str, run: int, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A phase as a step of the engine, which remembers its end; that this worker is to end is none."""

        def guarded() -> dict[str, Any]:
            try:
                return work()
            except Draining:
                self._hand_back(job_id, run)

        return DBOS.run_step({"name": name}, guarded)

    def _hand_back(self, job_id: str, run: int) -> NoReturn:
        """Leave the run to another worker: this one takes nothing more. Never returns to the engine."""
        try:
            self.queue.hand_over([job_engine.run_id(job_id, run)])
            self._leave()
        except SQLAlchemyError:
            log.warning("the job was not handed back: the database is away, the leader will find it", extra={"job": job_id})
        os._exit(0)

    def _keep_beating(self) -> None:
        """To the very end: a worker that finishes its block is alive."""
        while True:
            time.sleep(self.settings.heartbeat_ttl / 5)
            try:
                if self._beat():
                    self.ending.set()
            except SQLAlchemyError:
                log.warning("no heartbeat: the database is away")

    def _beat(self) -> bool:
        """Say that this worker lives; returns whether it is to be drained."""
        workers = tables.workers
        with self.engine.begin() as connection:
            seen = {"seen_at": self.jobs.now, "job_id": self._job_id}
            update = sa.update(workers).where(workers.c.id == self.id).values(**seen).returning(workers.c.draining)
            row = connection.execute(update).first()
            if row is not None:
                return bool(row.draining)
            connection.execute(
                sa.insert(workers).values(
                    id=self.id, host=socket.gethostname(), pid=os.getpid(), slot=self.slot, device=self._device(),
                    version=__version__, started_at=self.jobs.now, **seen,
                )
            )  # fmt: skip
        return False

    def _keep_sweeping(self) -> None:
        while True:
            try:
                self._sweep()
            except SQLAlchemyError:
                log.warning("no sweep: the database is away")
            time.sleep(self.settings.heartbeat_ttl)

    def _sweep(self) -> None:
        """Delete working directories of this host whose job ended well, or was deleted, on another one."""
        if not self.settings.work_dir.is_dir():
            return
        folders = list(self.settings.work_dir.iterdir())
        jobs = tables.jobs
        mine = sa.select(jobs.c.id).where(jobs.c.id.in_([folder.name for folder in folders]), jobs.c.status != "succeeded")
        with self.engine.connect() as connection:
            needed = set(connection.scalars(mine))
        for folder in folders:
            if folder.name not in needed:
                remove_tree(folder)

    def _device(self) -> str:
        return f"gpu {self.devices}" if self.devices else "cpu"

    def _leave(self) -> None:
        """Say goodbye, so that nobody waits for the next heartbeat."""
        with self.engine.begin() as connection:
            connection.execute(sa.delete(tables.workers).where(tables.workers.c.id == self.id))


_current: Worker | None = None


@DBOS.workflow(name=RUN_JOB)
def _run_job(job_id: str, run: int) -> str:
    assert _current is not None
    return _current.execute(job_id, run)


@DBOS.workflow(name=DELIVER)
def _deliver(delivery_id: str, attempt: int) -> None:
    assert _current is not None
    webhooks.deliver(_current.engine, _current.queue, delivery_id, attempt, _current.settings)
