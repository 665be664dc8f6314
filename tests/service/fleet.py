"""A service without HTTP: real worker processes on a real database, and what tests ask of them."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

import light_child
import pytest
import sqlalchemy as sa

from forked import PROCESSES
from llmprune_service import tables
from llmprune_service.database import make_engine
from llmprune_service.engine import JOBS, VERSION, Queue
from llmprune_service.jobs import Jobs, Row
from llmprune_service.schemas import FINISHED, JobRequest
from llmprune_service.settings import Settings
from llmprune_service.store import Store

TTL = 2.0
_TERMINAL = frozenset({"job.succeeded", "job.failed", "job.cancelled"})
_PATIENCE = 40.0
_PR_SET_PDEATHSIG = 1
_WRITTEN = "jobs, events, blocks, workers, leases, dbos.workflow_status, dbos.operation_outputs"
T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """What a light child wrote down: ``what`` is start, begin, done or end."""

    what: str
    block: int | None
    job: str
    attempt: str
    pid: int
    time: float


class Worker:
    """A worker process; signals are sent to it alone, as a crash would hit it."""

    def __init__(self, environment: Mapping[str, str], log: Path, slot: int, version: str) -> None:
        self.log = log
        self.process: ForkServerProcess = PROCESSES.Process(target=_work, args=(dict(environment), log, slot, version))
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.process.kill()
        self.process.join(10)

    def wait(self, seconds: float = 20.0) -> int:
        """Its exit code, once it has ended by itself."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"the worker still runs after {seconds} seconds"
        return self.process.exitcode


class Fleet:
    """Jobs, and the workers that a test starts; further hosts are fleets with a folder of their own on the same database."""

    def __init__(self, folder: Path, url: str, **environment: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._environment = {
            "LLMPRUNE_DATA_DIR": str(folder), "LLMPRUNE_DATABASE_URL": url, "LLMPRUNE_DISK_FLOOR_BYTES": "0",
            "LLMPRUNE_HEARTBEAT_TTL": str(TTL), "LLMPRUNE_POLL_SECONDS": "0.1",
            **_names(environment),
        }  # fmt: skip
        self.settings = Settings(**{  # type: ignore[arg-type]
            name.removeprefix("LLMPRUNE_").lower(): value for name, value in self._environment.items()
        })  # fmt: skip
        self.engine = make_engine(url)
        queue = Queue(self.engine)
        # As an earlier worker has done: the very first one would look for its queue a second after its start.
        queue._client.register_queue(JOBS, worker_concurrency=1, polling_interval_sec=0.1)
        self.jobs = Jobs(self.engine, queue, self.settings)
        self.workers: list[Worker] = []

    def start(self, number: int = 1, *, version: str = VERSION, **environment: object) -> list[Worker]:
        """Start workers and wait until they have said hello; ``environment`` changes settings, by their names."""
        hello = len(self.jobs.workers()) + number
        passed_on = {name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ}
        everything = passed_on | self._environment | _names(environment)
        logs = [self.folder / f"worker-{len(self.workers) + slot}.log" for slot in range(number)]
        begun = [Worker(everything, log, slot, version) for slot, log in enumerate(logs)]
        self.workers += begun
        self.until(lambda: len(self.jobs.workers()) >= hello, "the workers are there")
        return begun

    def elsewhere(self, function: Callable[..., None], *arguments: object) -> int | None:
        """Call a function of a module, with settings and arguments, in a process of its own; returns its exit code."""
        process = PROCESSES.Process(target=_call, args=(self._environment, function, *arguments))
        process.start()
        process.join(30)
        return process.exitcode

    def close(self) -> None:
        """Kill what runs."""
        for worker in self.workers:
            worker.kill()
        self.jobs.queue.close()
        self.engine.dispose()

    # Jobs -----------------------------------------------------------------------------------------------------------

    def submit(self, *trouble: str, num_blocks: int = 4, seconds: float = 0.05, tenant: str = "default", **fields: Any) -> str:
        """Queue a light job; ``trouble`` as :mod:`light_child` reads it."""
        return str(self.jobs.submit(tenant, light_request(*trouble, num_blocks=num_blocks, seconds=seconds, **fields))[0].id)

    def row(self, job_id: str) -> Row:
        return self.jobs.get(None, job_id)

    def wait(self, job_id: str, *statuses: str, seconds: float = _PATIENCE) -> Row:
        """The job once it has one of the statuses, by default succeeded; any other final one fails the test at once."""
        wanted = statuses or ("succeeded",)

        def look() -> Row | None:
            row = self.row(job_id)
            if row.status in FINISHED and row.status not in wanted:
                pytest.fail(f"the job is {row.status}, not {wanted}: {row.error}\n{self.describe(job_id)}")
            return row if row.status in wanted else None

        return self.until(look, f"{job_id} is {' or '.join(wanted)}", seconds)

    def until(self, condition: Callable[[], T | None], what: str, seconds: float = _PATIENCE) -> T:
        """What the condition returns once that is true; fails the test with all that is known after ``seconds``."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := condition():
                return found
            time.sleep(0.02)
        pytest.fail(f"not within {seconds} seconds: {what}\n{self.describe()}")

    def holder(self, job_id: str) -> Worker:
        """The worker that runs the job."""
        held_by = self.row(job_id).worker
        pid = next(row.pid for row in self.jobs.workers() if row.id == held_by)
        return next(worker for worker in self.workers if worker.pid == pid)

    def events(self, job_id: str, *kinds: str) -> Sequence[Row]:
        """The job's events, of these types."""
        found = self.jobs.events(None, job_id, limit=10_000)
        return [event for event in found if not kinds or event.type in kinds]

    def freeze(self, worker: Worker) -> None:
        """SIGSTOP, at a moment when the worker holds no lock of the database: SQLite would wait for it for ever."""
        while True:
            worker.signal(signal.SIGSTOP)
            self.until(lambda: _state(worker.pid) == "T", "the worker is stopped")
            if self._is_free():
                return
            worker.signal(signal.SIGCONT)
            time.sleep(0.05)  # for it to come out of its transaction

    def _is_free(self) -> bool:
        """Whether nobody stays in the middle of writing."""
        url = self.engine.url
        try:
            if url.database and url.drivername == "sqlite":
                with closing(sqlite3.connect(url.database, timeout=0.3, isolation_level=None)) as connection:
                    connection.execute("BEGIN IMMEDIATE")
            else:
                with self.engine.begin() as transaction:
                    transaction.execute(sa.text("SET LOCAL lock_timeout = 300"))
                    transaction.execute(sa.text(f"LOCK TABLE {_WRITTEN} IN SHARE MODE"))
        except (sqlite3.OperationalError, sa.exc.OperationalError):
            return False
        return True

    # What the children wrote down -----------------------------------------------------------------------------------

    def log(self, job_id: str, what: str | None = None, block: int | None = None) -> list[Line]:
        """Lines of a job, oldest first."""
        file = self.folder / light_child.LOG
        lines = [Line(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
        return [
            line for line in lines
            if line.job == job_id and what in (None, line.what) and block in (None, line.block)
        ]  # fmt: skip

    def begun(self, job_id: str, block: int, times: int = 1) -> Line:
        """Wait until a block is begun (for the n-th time)."""
        return self.until(lambda: self.log(job_id, "begin", block)[times - 1 :], f"block {block} of {job_id} begins")[0]

    def done(self, job_id: str) -> list[int]:
        """Blocks that were done, in that order."""
        return [line.block for line in self.log(job_id, "done") if line.block is not None]

    # What must always be so -----------------------------------------------------------------------------------------

    def check(self, job_id: str, *ends: str, once: bool = True) -> None:
        """The events are whole and end as said, one end a run; each block was done, and done ``once``; all are filed."""
        self.check_events(job_id, *ends)
        done = self.done(job_id)
        row = self.row(job_id)
        blocks = range(row.config["num_samples"] if row.status == "succeeded" else len(set(done)))
        assert (sorted(done) if once else sorted(set(done))) == list(blocks), self.describe(job_id)
        assert [block.block for block in self.jobs.blocks(None, job_id)] == list(blocks), self.describe(job_id)
        if once:
            assert [event.data["block"] for event in self.events(job_id, "job.block")] == done, self.describe(job_id)
        if row.status == "succeeded":
            self.check_result(job_id)

    def check_events(self, job_id: str, *ends: str) -> None:
        """``seq`` without holes; its final events are ``ends`` (default: one success), with ``job.queued`` between them."""
        events = self.events(job_id)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert self.row(job_id).last_seq == len(events)
        kinds = [event.type for event in events]
        assert [kind for kind in kinds if kind in _TERMINAL] == list(ends or ["job.succeeded"]), self.describe(job_id)
        assert kinds[-1] in _TERMINAL
        following = [after for kind, after in pairwise(kinds) if kind in _TERMINAL]
        assert following == ["job.queued"] * (len(ends or [1]) - 1)

    def check_result(self, job_id: str) -> None:
        """The stored checkpoint is that of an undisturbed run, and nothing else is left."""
        row = self.row(job_id)
        weights = light_child.checkpoint_bytes(row.config["num_samples"], row.config.get("seed", 0))
        assert self.read(job_id, "model.safetensors") == weights
        assert {artifact.name for artifact in self.jobs.artifacts(None, job_id)} == {
            "model.safetensors", "report.json", "llmprune.json",
        }  # fmt: skip
        report = self.jobs.report(None, job_id)
        assert report is not None and len(report["blocks"]) == row.config["num_samples"] > 0
        self.until(lambda: not (self.settings.work_dir / job_id).exists(), "the working directory is gone")

    def read(self, job_id: str, name: str) -> bytes:
        """A stored file, whose size and digest are as its row says."""
        artifact = self.jobs.artifact(None, job_id, name)
        with Store(self.settings).open(artifact.path) as file:
            content = file.read()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (artifact.bytes, artifact.sha256)
        return content

    def describe(self, job_id: str | None = None) -> str:
        """All that is known, for the message of a failed test."""
        lines = [f"now {time.time():.2f}"]
        with suppress(sa.exc.DBAPIError):
            lines += [f"worker {dict(row._mapping)}" for row in self.jobs.workers()]
            for row in self.jobs.list(None, limit=20)[0] if job_id is None else [self.row(job_id)]:
                lines.append(
                    f"job {row.id} {row.status} run {row.run} attempt {row.attempt} of {row.worker}, "
                    f"recoveries {row.recoveries}, {row.retries} {row.error}"
                )
                lines += [f"    {event.created_at:.2f} {event.seq} {event.type} {event.data}" for event in self.events(row.id)]
                lines += [f"    {line}" for line in self.log(row.id)]
                for file in sorted((self.settings.work_dir / row.id).glob("*/log.txt")):
                    lines += [f"    {file.parent.name}: {file.read_text()[-2000:]}"]
        for worker in self.workers:
            lines.append(f"worker process {worker.pid}, exit code {worker.process.exitcode}:")
            lines.append(worker.log.read_text()[-3000:] if worker.log.exists() else "")
        return "\n".join(lines)

    # The engine's own records ---------------------------------------------------------------------------------------

    def runs(self, job_id: str) -> list[tuple[str, str, str | None]]:
        """Id, status and executor of the job's runs in the engine."""
        statuses = self.jobs.queue._client.list_workflows(workflow_id_prefix=f"{job_id}.")
        return sorted((status.workflow_id, status.status, status.executor_id) for status in statuses)

    def count(self, table: sa.Table, job_id: str) -> int:
        """Rows of a job in one of our tables."""
        column = table.c.get("job_id", table.c.get("id"))
        assert column is not None
        with self.engine.connect() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(table).where(column == job_id)).scalar_one()


TABLES_OF_JOBS = (tables.jobs, tables.job_metadata, tables.events, tables.blocks, tables.artifacts)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that waits to be collected does not."""
    return _state(pid) not in ("", "Z", "X")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def light_request(*trouble: str, num_blocks: int = 4, seconds: float = 0.05, **fields: Any) -> JobRequest:
    """A request for a light job."""
    config = {"num_samples": num_blocks, "damping": seconds, "skip": trouble, "latency": False}
    return JobRequest(**{**config, **fields})


def _call(environment: dict[str, str], function: Callable[..., None], *arguments: object) -> None:
    os.environ.update(environment)
    function(Settings(), *arguments)


def _work(environment: dict[str, str], log: Path, slot: int, version: str) -> None:
    """The body of a worker process, as ``llmprune worker --slot N`` has it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # with the tests, however they end
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from llmprune_service import engine, leader
    from llmprune_service.telemetry import configure_logging
    from llmprune_service.worker import Worker as ServiceWorker

    for module in (engine, leader):
        module.__dict__["VERSION"] = version  # as another release has it
    configure_logging(Settings())
    ServiceWorker(Settings(), slot=slot).run()


def _names(environment: Mapping[str, object]) -> dict[str, str]:
    return {f"LLMPRUNE_{name.upper()}": str(value) for name, value in environment.items()}
