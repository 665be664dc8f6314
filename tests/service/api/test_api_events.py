"""Events as pages and as streams: nothing twice, nothing missing, one poller for all."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import sqlalchemy as sa
from api_server import Server, Service, problem, read_events, wait_for

from llmprune_service.api import feed
from llmprune_service.api.feed import Feed, Head, Reader, Update

STREAM = {"Accept": "text/event-stream"}


def test_pages_of_events(service: Service) -> None:
    """Oldest first, from after a seq, with more to come said so."""
    job_id = service.submit()
    service.succeed(job_id)
    path = f"/v1/jobs/{job_id}/events"
    whole = service.get(path).json()
    assert [event["seq"] for event in whole["data"]] == list(range(1, len(whole["data"]) + 1))
    assert [event["type"] for event in whole["data"]][:2] == ["job.queued", "job.running"]
    assert whole["data"][-1]["type"] == "job.succeeded"
    first = service.get(path, params={"limit": 2}).json()
    assert (first["has_more"], first["next"]) == (True, "2")
    rest = service.get(path, params={"after": first["next"]}).json()
    assert first["data"] + rest["data"] == whole["data"]


def test_a_stream_brings_what_was_and_what_comes_and_ends(server: Server) -> None:
    """Every event once and in order, with the page's entry as data; the end of the run ends it."""
    job_id = server.submit()
    execution = server.run(job_id, num_blocks=2)
    timer = threading.Timer(0.4, lambda: execution.fail("crash", "it crashed"))
    timer.start()
    with server.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = read_events(response)
    timer.join()
    page = server.client.get(f"/v1/jobs/{job_id}/events").json()["data"]
    assert [event[0] for event in events] == list(range(1, len(page) + 1))
    assert [event[2] for event in events] == page
    assert events[-1][1] == "job.failed"


def test_a_stream_goes_on_after_last_event_id(server: Server) -> None:
    """Of header and query the header wins; a number we never sent is as good as the last."""
    job_id = server.submit()
    server.succeed(job_id)
    path = f"/v1/jobs/{job_id}/events"
    last = server.jobs.get(None, job_id).last_seq

    def seqs(**arguments: object) -> list[int]:
        with server.client.stream("GET", path, **arguments) as response:  # type: ignore[arg-type]
            return [event[0] for event in read_events(response)]

    assert seqs(headers=STREAM | {"Last-Event-ID": "3"}) == list(range(4, last + 1))
    assert seqs(headers=STREAM, params={"after": 3}) == list(range(4, last + 1))
    assert seqs(headers=STREAM | {"Last-Event-ID": "4"}, params={"after": 1}) == list(range(5, last + 1))
    assert seqs(headers=STREAM | {"Last-Event-ID": "rubbish"}) == list(range(1, last + 1))
    for at_end in (str(last), "99999999"):
        over = server.client.get(path, headers=STREAM | {"Last-Event-ID": at_end})
        assert (over.status_code, over.content) == (204, b""), "a browser would come back for ever"


def test_a_stream_ends_with_the_current_run_only(server: Server) -> None:
    """An earlier run's end does not end it."""
    job_id = server.submit()
    server.jobs.cancel(None, job_id)
    server.jobs.resume(None, job_id)
    timer = threading.Timer(0.4, server.jobs.cancel, [None, job_id])
    timer.start()
    with server.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as response:
        types = [event[1] for event in read_events(response)]
    timer.join()
    assert types == ["job.queued", "job.cancelled", "job.queued", "job.cancelled"]


def test_a_hundred_readers_share_one_poller(server: Server) -> None:
    """Each gets everything in order; the database is asked as often as for one."""
    job_ids = [server.submit() for _ in range(3)]
    statements = Counter[str]()

    @sa.event.listens_for(server.engine, "before_cursor_execute")
    def count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements["VALUES" if "spans" in statement else "other"] += 1

    async def read(client: httpx2.AsyncClient, job_id: str, ready: asyncio.Semaphore) -> list[int]:
        async with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as response:
            assert response.status_code == 200
            ready.release()
            return [int(line[4:]) async for line in response.aiter_lines() if line.startswith("id: ")]

    async def main() -> list[list[int]]:
        limits = httpx2.Limits(max_connections=200)
        async with httpx2.AsyncClient(base_url=server.url, headers=server.headers, limits=limits, timeout=60) as client:
            ready = asyncio.Semaphore(0)
            tasks = [asyncio.create_task(read(client, job_ids[index % 3], ready)) for index in range(100)]
            for _ in tasks:
                await ready.acquire()
            await asyncio.to_thread(advance)
            return await asyncio.gather(*tasks)

    def advance() -> None:
        statements.clear()
        before = server.app.state.feed.polls
        for job_id in job_ids:
            server.run(job_id, num_blocks=5).fail("crash", "over")
        wait_for(lambda: not server.app.state.feed._watches, "streams are still open")
        statements["polls"] = server.app.state.feed.polls - before

    seen = asyncio.run(main())
    assert len(seen) == 100
    for index, seqs in enumerate(seen):
        assert seqs == list(range(1, server.jobs.get(None, job_ids[index % 3]).last_seq + 1))
    assert 1 <= statements["VALUES"] <= statements["polls"]
    assert server.app.state.feed._open == Counter() or set(server.app.state.feed._open.values()) == {0}


def test_streams_of_a_key_are_limited(make_server: Callable[..., Server]) -> None:
    """429 with Retry-After; a stream that is closed makes room."""
    server = make_server(max_streams=2)
    path = f"/v1/jobs/{(job_id := server.submit())}/events"
    with server.client.stream("GET", path, headers=STREAM), server.client.stream("GET", path, headers=STREAM):
        refused = server.client.get(path, headers=STREAM)
        problem(refused, 429, "too-many-streams")
        assert refused.headers["retry-after"]
        problem(server.client.get(f"/v1/jobs/{job_id}", params={"wait": 5}), 429)
    wait_for(lambda: not any(server.app.state.feed._open.values()), "the streams were not let go of")
    with server.client.stream("GET", path, headers=STREAM) as again:
        assert again.status_code == 200


def test_deleting_a_job_ends_its_streams(server: Server) -> None:
    """Who watched is not left hanging."""
    job_id = server.submit()
    path = f"/v1/jobs/{job_id}/events"
    with ThreadPoolExecutor() as pool, server.client.stream("GET", path, headers=STREAM) as response:
        lines = response.iter_lines()
        assert next(lines) == "event: job.queued"
        rest = pool.submit(list, lines)
        with server.engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM jobs"))
        assert not any(line.startswith("event") for line in rest.result(timeout=20))


def test_stopping_the_server_ends_its_streams(make_server: Callable[..., Server]) -> None:
    """Without waiting out the grace period."""
    server = make_server()
    path = f"/v1/jobs/{server.submit()}/events"
    with server.client.stream("GET", path, headers=STREAM) as response, ThreadPoolExecutor() as pool:
        lines = response.iter_lines()
        next(lines)
        rest = pool.submit(list, lines)
        began = time.monotonic()
        server.app.state.feed.stop()
        rest.result(timeout=20)
        assert time.monotonic() - began < 5


def test_a_silent_stream_is_kept_alive(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies close what says nothing."""
    monkeypatch.setattr("llmprune_service.api.events._KEEP_ALIVE_SECONDS", 0.2)
    with server.client.stream("GET", f"/v1/jobs/{server.submit()}/events", headers=STREAM) as response:
        assert next(line for line in response.iter_lines() if line.startswith(":")) == ": ping"


def test_a_reader_that_falls_behind_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets what was queued and then the end, so that it comes back with Last-Event-ID."""
    monkeypatch.setattr(feed, "_BACKLOG", 2)
    head = Head("running", 1, 1.0)

    async def main() -> list[Update | None]:
        reader = Reader()
        for _ in range(5):
            reader.offer(Update(head))
        return [await reader.next(0.01) for _ in range(4)]

    assert asyncio.run(main()) == [Update(head), Update(head), Update(None), None]


def test_the_feed_outlives_a_database_that_is_away(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks again, and brings what happened meanwhile."""
    monkeypatch.setattr(feed, "_AWAY_SECONDS", 0.05)
    row = service.jobs.get(None, service.submit())
    poller = Feed(service.engine, poll_seconds=0.02, max_streams=10)
    read = poller._read
    failures = iter([True, True])

    def flaky(cursors: dict[str, int]) -> dict[str, Update]:
        if next(failures, False):
            raise sa.exc.OperationalError("select", {}, Exception("away"))
        return read(cursors)

    monkeypatch.setattr(poller, "_read", flaky)

    async def main() -> list[bytes]:
        task = asyncio.create_task(poller.run())
        with poller.watch(row, key="key") as reader:
            await asyncio.to_thread(service.jobs.cancel, None, row.id)
            frames: list[bytes] = []
            while not frames:
                update = await reader.next(5)
                assert update is not None
                frames += [frame.text for frame in update.frames]
        task.cancel()
        return frames

    assert b"event: job.cancelled" in asyncio.run(main())[0]
    assert next(failures, None) is None
