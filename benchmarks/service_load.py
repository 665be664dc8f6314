"""The service under load, with a real job running all the time: submissions, event streams, a long queue.

Limits that stand beside the numbers: every submission is durable, so on SQLite no more of them fit into a second than the
disk does fsyncs (PostgreSQL may sync several at once); events are looked for every ``poll_seconds``.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from benchmarks.service import (
    TENANT,
    Service,
    databases,
    host,
    job,
    make_inputs,
    number,
    percentile,
    say_where,
    serving,
    until,
)
from llmprune_service import tables
from llmprune_service.leader import Leader
from llmprune_service.schemas import FINISHED, JobRequest

_SUBMITTERS = 8
_SUBMIT_SECONDS = 20
_LAST, _BUSY, _FIRST = 0, 8, 9  # priorities: of the queue's mass, of the job that always runs, of the one measured
_FSYNC_SECONDS = 2.0
_STREAM_SECONDS = 180.0
_REPEATS = 5


def run(console: Console) -> dict[str, Any]:
    """Measure on each database, and print one table."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="llmprune-bench-inputs-") as folder:
        inputs = Path(folder)
        make_inputs(inputs, small=8, deep=48)
        for kind in databases():
            with serving(kind, inputs, num_workers=1) as (service, _), busy(service, job(inputs, "small")):
                rows.append({"database": kind, **measure(console, service, inputs)})
    sizes = {"queued": number("BENCH_QUEUED", 10_000), "readers": number("BENCH_READERS", 500), "submitters": _SUBMITTERS}
    result = {**sizes, "poll_seconds": service.settings.poll_seconds, "host": host(), "rows": rows}
    result["wrong"] = [
        f"{row['database']}: {row['readers'] - row['readers_complete']} readers missed events"
        for row in rows
        if row["readers_complete"] < row["readers"]
    ]
    _print(console, result)
    return result


def measure(console: Console, service: Service, inputs: Path) -> dict[str, Any]:
    """All numbers of one database, in the order that lets the queue grow."""
    api = service.process("api")
    facts: dict[str, Any] = {"api_idle_bytes": api.memory_info().rss, "fsyncs_per_second": fsyncs_per_second(service.folder)}
    body = job(inputs, "small", priority=_LAST)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "submissions": lambda: submissions(service, body, number("BENCH_SECONDS", _SUBMIT_SECONDS)),
        "streams": lambda: streams(service, job(inputs, "deep", priority=_FIRST), number("BENCH_READERS", 500)),
        "queue": lambda: long_queue(service, body, number("BENCH_QUEUED", 10_000)),
        "leader": lambda: {"leader_tick_seconds": leader_tick(service)},
    }
    for name, part in parts.items():
        began = time.monotonic()
        facts |= part()
        facts[f"api_bytes_after_{name}"] = api.memory_info().rss
        console.print(f"{service.engine.dialect.name}: {name} measured in {time.monotonic() - began:.0f} s")
    return facts


def fsyncs_per_second(folder: Path) -> float:
    """How often this disk makes an appended page durable: the limit of transactions that each wait for it."""
    count, began = 0, time.perf_counter()
    with (folder / "fsync").open("wb", buffering=0) as file:
        while time.perf_counter() - began < _FSYNC_SECONDS:
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            count += 1
    return count / (time.perf_counter() - began)


@contextmanager
def busy(service: Service, body: dict[str, Any]) -> Iterator[None]:
    """Two jobs always under way, so that the worker always runs one and takes none of the mass."""
    enough = threading.Event()
    request = JobRequest(**body, priority=_BUSY)
    ours: list[str] = []

    def top_up() -> None:
        while True:
            with service.engine.connect() as connection:
                ended = tables.jobs.c.status.in_(sorted(FINISHED))
                over = connection.scalar(sa.select(sa.func.count()).where(tables.jobs.c.id.in_(ours[-2:]), ended)) or 0
            for _ in range(2 if not ours else over):
                ours.append(service.jobs.submit(TENANT, request)[0].id)
            if enough.wait(0.5):
                return

    thread = threading.Thread(target=top_up)
    thread.start()
    try:
        until(lambda: bool(ours) and service.jobs.get(None, ours[0]).status == "running", 60, "The first job's start")
        yield
    finally:
        enough.set()
        thread.join()


def submissions(service: Service, body: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Rate and latency of submissions over HTTP from several clients at once."""
    stop_at = time.perf_counter() + seconds

    def submit(client: int) -> list[float]:
        taken: list[float] = []
        with http(service) as connection:
            while (began := time.perf_counter()) < stop_at:
                key = {"Idempotency-Key": f"load-{client}-{len(taken)}"}
                connection.post("/v1/jobs", json=body, headers=key).raise_for_status()
                taken.append(time.perf_counter() - began)
        return taken

    with ThreadPoolExecutor(_SUBMITTERS) as pool:
        taken = [each for one in pool.map(submit, range(_SUBMITTERS)) for each in one]
    return {
        "submissions_per_second": len(taken) / seconds, "submit_p50_seconds": percentile(taken, 50),
        "submit_p99_seconds": percentile(taken, 99),
    }  # fmt: skip


def http(service: Service) -> httpx2.Client:
    """A plain connection: the typed client's own work is not to be measured."""
    return httpx2.Client(base_url=service.url, headers={"Authorization": f"Bearer {service.key}"}, timeout=60, trust_env=False)


# Event streams --------------------------------------------------------------------------------------------------------


@dataclass
class Reader:
    """One open stream: the numbers of its events, and how late those were that happened while it was open."""

    seqs: list[int] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)


def streams(service: Service, body: dict[str, Any], num_readers: int) -> dict[str, Any]:
    """Many readers on one job of many events: all must get all; delays are from the event's own time to its arrival."""
    with service.client() as client:
        job_id = client.submit(**body).id
        readers = asyncio.run(_read_all(service, job_id, num_readers))
        client.wait(job_id, _STREAM_SECONDS)
    events = [row.seq for row in service.jobs.events(None, job_id, limit=100_000)]
    by_second = Counter(int(moment) for reader in readers for moment in reader.arrivals)
    delays = [delay for reader in readers for delay in reader.delays]
    return {
        "readers": num_readers, "readers_complete": sum(reader.seqs == events for reader in readers),
        "events_of_job": len(events), "events_in_busiest_second": max(by_second.values()),
        "event_delay_p50_seconds": percentile(delays, 50), "event_delay_p99_seconds": percentile(delays, 99),
    }  # fmt: skip


async def _read_all(service: Service, job_id: str, num_readers: int) -> list[Reader]:
    readers = [Reader() for _ in range(num_readers)]
    async with asyncio.timeout(_STREAM_SECONDS):
        await asyncio.gather(*(_read(service, job_id, reader) for reader in readers))
    return readers


async def _read(service: Service, job_id: str, reader: Reader) -> None:
    """A stream to its end, over a bare socket: hundreds of a client library's would measure the client."""
    incoming, outgoing = await asyncio.open_connection("127.0.0.1", service.settings.port)
    request = f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {service.key}\r\n"
    outgoing.write(f"{request}Accept: text/event-stream\r\nConnection: close\r\n\r\n".encode())
    status = await incoming.readline()
    assert b" 200 " in status, status
    opened = time.time()
    while line := await incoming.readline():
        if line.startswith(b"data:"):
            now, event = time.time(), json.loads(line[5:])
            reader.seqs.append(event["seq"])
            reader.arrivals.append(now)
            if event["created_at"] > opened:
                reader.delays.append(now - event["created_at"])
    outgoing.close()


# A long queue ---------------------------------------------------------------------------------------------------------


def long_queue(service: Service, body: dict[str, Any], num_queued: int) -> dict[str, Any]:
    """Fill the queue up without HTTP, then what it costs to list, to submit, and to be served first."""
    request = JobRequest(**body)
    missing = max(1, num_queued - _count_queued(service))
    began = time.perf_counter()
    for _ in range(missing):
        service.jobs.submit(TENANT, request)
    facts: dict[str, Any] = {"direct_submissions_per_second": missing / (time.perf_counter() - began)}
    with http(service) as connection:
        facts["list_50_seconds"] = _median(lambda: connection.get("/v1/jobs?limit=50").raise_for_status(), 20)
        facts["submit_long_queue_seconds"] = _median(lambda: connection.post("/v1/jobs", json=body).raise_for_status(), 50)
    facts["queued"] = _count_queued(service)
    waits = [_served_first(service, {**body, "priority": _FIRST}) for _ in range(_REPEATS)]
    return facts | {"first_start_seconds": statistics.median(waits), "first_start_worst_seconds": max(waits)}


def _served_first(service: Service, body: dict[str, Any]) -> float:
    """Seconds from when a job of the highest priority was there and the worker free, to its start."""
    with service.client() as client:
        job_id = client.submit(**body).id
        until(lambda: client.get(job_id).started_at is not None, 120, "The start of a job of priority 9")
        mine = client.get(job_id)
        client.cancel(job_id)
        client.wait(job_id, 60)
    assert mine.started_at is not None
    ended = tables.jobs.c.finished_at
    with service.engine.connect() as connection:
        freed = connection.scalar(sa.select(sa.func.max(ended)).where(ended <= mine.started_at)) or 0.0
    return mine.started_at - max(mine.created_at, freed)


def leader_tick(service: Service) -> float:
    """Median seconds of one look of the leader at the whole state; the lease is taken from whoever has it."""
    leader = Leader(service.jobs, service.settings, holder="benchmark")

    def tick() -> None:
        with service.engine.begin() as connection:
            connection.execute(sa.update(tables.leases).values(holder="benchmark"))
        leader.tick()

    return _median(tick, _REPEATS)


def _count_queued(service: Service) -> int:
    with service.engine.connect() as connection:
        queued = sa.select(sa.func.count()).select_from(tables.jobs).where(tables.jobs.c.status == "queued")
        return int(connection.scalar(queued) or 0)


def _median(work: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def table_rows(result: dict[str, Any]) -> Iterator[tuple[str, list[str], str]]:
    """What was measured, its value on each database, and the limit it stands against."""
    rows, polls = result["rows"], f"{_ms(result['poll_seconds'])} between polls"
    fsyncs = [row["fsyncs_per_second"] for row in rows]
    disk = " / ".join(f"{rate:.0f}" for rate in fsyncs) + " fsync/s (x it)"
    rates = [row["submissions_per_second"] for row in rows]
    yield f"submissions over HTTP, {result['submitters']} clients", _times(rates, fsyncs), disk
    yield "  median / p99", [_pair(row, "submit_p50_seconds", "submit_p99_seconds") for row in rows], ""
    direct = [row["direct_submissions_per_second"] for row in rows]
    yield "submissions without HTTP, 1 client", _times(direct, fsyncs), disk
    yield "event streams that got every event", [f"{row['readers_complete']} of {row['readers']}" for row in rows], "all"
    yield "  events delivered, busiest second", [f"{row['events_in_busiest_second']}" for row in rows], ""
    delays = [_pair(row, "event_delay_p50_seconds", "event_delay_p99_seconds") for row in rows]
    yield "  from event to arrival, median / p99", delays, polls
    yield "jobs in the queue", [f"{row['queued']}" for row in rows], ""
    yield "  list the newest 50", [_ms(row["list_50_seconds"]) for row in rows], ""
    one = " / ".join(_ms(1 / rate) for rate in fsyncs) + " a fsync"
    yield "  submit, 1 client", [_ms(row["submit_long_queue_seconds"]) for row in rows], one
    first = [_pair(row, "first_start_seconds", "first_start_worst_seconds") for row in rows]
    yield "  priority 9 starts, median / worst", first, polls
    yield "  one look of the leader", [_ms(row["leader_tick_seconds"]) for row in rows], ""
    yield "API memory, idle", [_mib(row["api_idle_bytes"]) for row in rows], ""
    for name in ("submissions", "streams", "queue"):
        yield f"  after {name}", [_mib(row[f"api_bytes_after_{name}"]) for row in rows], ""


def _times(rates: list[float], limits: list[float]) -> list[str]:
    return [f"{rate:.0f}/s ({rate / limit:.2f})" for rate, limit in zip(rates, limits, strict=True)]


def _pair(row: dict[str, Any], first: str, second: str) -> str:
    return f"{_ms(row[first])} / {_ms(row[second])}"


def _print(console: Console, result: dict[str, Any]) -> None:
    names = [row["database"] for row in result["rows"]]
    table = Table("a job running all the time", *names, "limit", title="The service under load")
    for name, values, limit in table_rows(result):
        table.add_row(name, *values, limit)
    console.print(table)
    console.print(say_where(result))
    for complaint in result["wrong"]:
        console.print(f"WRONG  {complaint}", style="red", markup=False)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.01 else f"{1e3 * seconds:.1f} ms"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
