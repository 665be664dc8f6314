"""Jobs of a service that is disturbed at random: every one must end, once, with the bytes of an undisturbed run.

Every 2 to 6 seconds, for five minutes, one of: SIGKILL to a worker, to a job's process, or to the API; a worker stopped
for longer than its heartbeat may be missing; the database crashed and started again. Clients repeat their submissions.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table
from sqlalchemy.exc import DBAPIError

from benchmarks.service import Service, databases, host, job, make_inputs, number, quiet_environment, say_where, serving
from benchmarks.service_outcome import outcome, sha256
from llmprune.spec import PruneConfig
from llmprune_service import tables
from llmprune_service.client import ServiceError
from llmprune_service.schemas import FINISHED

CONFIGS: tuple[dict[str, Any], ...] = (
    {"method": "wanda"},
    {"method": "sparsegpt"},
    {"method": "sparsegpt", "pattern": "2:4", "sequential": "group"},
    {"method": "wanda", "pattern": "4:8"},
)
KINDS = ("worker killed", "job killed", "worker frozen", "API killed", "database crashed")
_NUM_WORKERS = 3
_NUM_SUBMITTERS = 4
_SUBMITTED_BY = 0.6  # of the time with disturbances
_MAX_KILLS = 2  # of one job's process: the third is taken for the job's own fault, as it should be
_SECONDS_PER_JOB = 12
_PRUNE = """
import sys
from llmprune import PruneConfig, prune
prune(config=PruneConfig.model_validate_json(sys.argv[1]), out=sys.argv[2])
"""


def run(console: Console) -> dict[str, Any]:
    """Disturb a service on each database; ``wrong`` in the result says what must not be."""
    num_jobs, seconds = number("BENCH_JOBS", 200), number("BENCH_SECONDS", 300)
    rows, wrong = [], []
    with tempfile.TemporaryDirectory(prefix="llmprune-bench-inputs-") as folder:
        inputs = Path(folder)
        make_inputs(inputs, tiny=12)
        bodies = [job(inputs, "tiny", **config) for config in CONFIGS]
        wanted = [undisturbed(body, inputs / f"pruned-{index}") for index, body in enumerate(bodies)]
        console.print(f"{len(wanted)} configurations pruned with the library, undisturbed")
        for kind in databases():
            with serving(kind, inputs, num_workers=_NUM_WORKERS, max_recoveries=1000) as (service, server):
                row = Run(console, kind, service, server, bodies, num_jobs=num_jobs, seconds=seconds).measure(wanted)
            rows.append(row)
            console.print(f"{kind}: {row}")  # the other one may take another half an hour
            wrong += [f"{kind}: {complaint}" for complaint in row["wrong"]]
    result = {"num_jobs": num_jobs, "seconds": seconds, "workers": _NUM_WORKERS, "host": host(), "rows": rows, "wrong": wrong}
    _print(console, result)
    return result


def undisturbed(body: Mapping[str, Any], out: Path) -> dict[str, str]:
    """Prune with the library in a process of its own; returns the sha256 of each weights file."""
    config = PruneConfig.model_validate(body).model_dump_json(exclude_unset=True)
    command = [sys.executable, "-c", _PRUNE, config, str(out)]
    subprocess.run(command, env=quiet_environment(), check=True, capture_output=True, timeout=300, cwd=out.parent)
    return {file.name: sha256(file) for file in out.glob("*.safetensors")}


class Chaos:
    """Disturbs a service; ``counts`` says how often in which way."""

    def __init__(self, service: Service, server: Any, rng: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._service = service
        self._server = server
        self._rng = rng
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._frozen: set[str] = set()
        self._kills: Counter[str] = Counter()
        self._next = time.monotonic() + rng.uniform(2, 6)

    def step(self) -> None:
        """Undo what is due, and disturb if it is time."""
        self.undo(time.monotonic())
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._rng.uniform(2, 6)
        disturb = {
            "worker killed": self._kill_worker, "job killed": self._kill_job, "worker frozen": self._freeze,
            "API killed": self._kill_api, "database crashed": self._crash_database,
        }  # fmt: skip
        kind = next(kind for kind in self._rng.sample(KINDS, len(KINDS)) if disturb[kind]())
        self.counts[kind] += 1

    def undo(self, until: float = float("inf")) -> None:
        """Wake the frozen workers and start the database, as far as they are due."""
        due = [action for when, action in self._later if when <= until]
        self._later = [item for item in self._later if item[0] > until]
        for action in due:
            action()

    def _kill_worker(self) -> bool:
        self._service.signal(self._rng.choice(self._service.workers), signal.SIGKILL)
        return True

    def _kill_api(self) -> bool:
        self._service.signal("api", signal.SIGKILL)
        return True

    def _kill_job(self) -> bool:
        """The process of a job that has not lost one too often; False if there is none just now."""
        for name in self._rng.sample(self._service.workers, _NUM_WORKERS):
            try:
                for process in self._service.process(name).children():
                    job_id = Path(process.cwd()).parent.name
                    if self._kills[job_id] < _MAX_KILLS:
                        process.kill()
                        self._kills[job_id] += 1
                        return True
            except psutil.Error:  # it has just ended
                continue
        return False

    def _freeze(self) -> bool:
        awake = [name for name in self._service.workers if name not in self._frozen]
        if not awake:
            return False
        name = self._rng.choice(awake)
        process = self._service.running[name]
        process.send_signal(signal.SIGSTOP)
        self._frozen.add(name)

        def wake() -> None:
            process.send_signal(signal.SIGCONT)  # to none, if it was killed meanwhile
            self._frozen.discard(name)

        self._later.append((time.monotonic() + self._rng.uniform(5, 20), wake))
        return True

    def _crash_database(self) -> bool:
        if self._server is None or self._server.start in [action for _, action in self._later]:
            return False
        self._server.stop("immediate")
        self._later.append((time.monotonic() + self._rng.uniform(1, 4), self._server.start))
        return True


class Run:
    """One database: submitters, disturbances, and the search for what went wrong."""

    def __init__(
        self, console: Console, kind: str, service: Service, server: Any, bodies: list[dict[str, Any]], *, num_jobs: int,
        seconds: int,
    ) -> None:  # fmt: skip
        self._console = console
        self._kind = kind
        self._service = service
        self._bodies = bodies
        self._num_jobs = num_jobs
        self._seconds = seconds
        self._chaos = Chaos(service, server, random.Random(0))
        self._ids: dict[int, set[str]] = {index: set() for index in range(num_jobs)}
        self._began = time.monotonic()
        self._deadline = self._began + seconds + 120 + _SECONDS_PER_JOB * num_jobs

    def measure(self, wanted: list[dict[str, str]]) -> dict[str, Any]:
        """Do it all; the row of the table, with ``wrong``."""
        with ThreadPoolExecutor(_NUM_SUBMITTERS) as pool:
            submitters = [pool.submit(self._submit, first) for first in range(_NUM_SUBMITTERS)]
            try:
                self._watch(submitters)
            finally:
                self._deadline = 0.0 if not all(future.done() for future in submitters) else self._deadline
                self._chaos.undo()
        wall = time.monotonic() - self._began
        for future in submitters:
            future.result()
        found = outcome(self._service, self._ids, wanted)
        if found["wrong"]:
            self._service.is_kept = True
            self._console.print(f"Logs and files are kept in {self._service.folder}")
        return {"database": self._kind, "wall_seconds": wall, "disturbances": dict(self._chaos.counts), **found}

    def _submit(self, first: int) -> None:
        """Every so-many-th job, spread over the time, each submitted twice with one key and until it is accepted."""
        with self._service.client(timeout=10) as client:
            for index in range(first, self._num_jobs, _NUM_SUBMITTERS):
                due = self._began + index / self._num_jobs * _SUBMITTED_BY * self._seconds
                time.sleep(max(0.0, due - time.monotonic()))
                accepted = 0
                while accepted < 2 and time.monotonic() < self._deadline:
                    try:
                        job = client.submit(**self._bodies[index % len(self._bodies)], idempotency_key=f"chaos-{index}")
                        self._ids[index].add(job.id)
                        accepted += 1
                    except ServiceError as error:
                        if not error.temporary:
                            raise
                        time.sleep(0.5)

    def _watch(self, submitters: list[Future[None]]) -> None:
        """Disturb for the time set, then wait until all jobs have ended."""
        say_at = time.monotonic() + 30
        while time.monotonic() < self._deadline:
            self._service.keep()
            if time.monotonic() < self._began + self._seconds:
                self._chaos.step()
            else:
                self._chaos.undo(time.monotonic())
                if all(future.done() for future in submitters) and self._num_ended() >= self._num_jobs:
                    return
            if time.monotonic() > say_at:
                say_at += 30
                disturbances = sum(self._chaos.counts.values())
                self._console.print(f"{self._kind}: {self._num_ended()} of {self._num_jobs} ended, {disturbances} disturbances")
            time.sleep(0.2)

    def _num_ended(self) -> int:
        ended = sa.select(sa.func.count()).where(tables.jobs.c.status.in_(sorted(FINISHED)))
        try:
            with self._service.engine.connect() as connection:
                return int(connection.scalar(ended) or 0)
        except DBAPIError:  # it is being disturbed
            return 0


_COUNTS = {
    "moved to a live worker": "recoveries", "processes run again": "retries", "blocks kept": "blocks_kept",
}  # fmt: skip


def table_rows(result: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """What was counted, and its value on each database."""
    rows = result["rows"]
    for name in ("jobs", "succeeded"):
        yield name, [str(row[name]) for row in rows]
    for kind in KINDS:
        yield kind, [str(row["disturbances"].get(kind, 0)) for row in rows]
    for name, key in _COUNTS.items():
        yield name, [str(row[key]) for row in rows]
    yield "wall time", [f"{row['wall_seconds']:.0f} s" for row in rows]
    yield "median job", [f"{row['median_job_seconds']:.1f} s" for row in rows]
    for name in ("lost", "doubled", "differing"):
        yield f"{name} (must be 0)", [str(row[name]) for row in rows]
    yield "wrong in all (must be 0)", [str(len(row["wrong"])) for row in rows]


def _print(console: Console, result: dict[str, Any]) -> None:
    table = Table("", *(row["database"] for row in result["rows"]), title="Jobs under random kills")
    for name, values in table_rows(result):
        table.add_row(name, *values)
    console.print(table)
    console.print(say_where(result))
    for complaint in result["wrong"]:
        console.print(f"WRONG  {complaint}", style="red", markup=False)
