"""One reader of the database for all who watch jobs: event streams and held answers.

A single task looks every ``poll_seconds`` at the jobs somebody watches, in one query, fetches the new events of those
that changed in a second one, and hands both to every watcher. Watchers are as cheap as a queue.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import anyio
import sqlalchemy as sa
from anyio import to_thread
from fastapi.sse import format_sse_event
from sqlalchemy.exc import SQLAlchemyError

from llmprune_service import tables
from llmprune_service.jobs import Row
from llmprune_service.problems import Problem
from llmprune_service.schemas import FINISHED, EventView

log = logging.getLogger(__name__)
_BACKLOG = 200  # updates a slow watcher may be behind; a poll makes at most one
_AWAY_SECONDS = 2.0


@dataclass(frozen=True)
class Head:
    """Where a job is: what changes whenever anything of it does."""

    status: str
    last_seq: int
    updated_at: float

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen unless somebody asks for it."""
        return self.status in FINISHED

    @classmethod
    def of(cls, row: Row) -> Head:
        """The head of a row of jobs."""
        return cls(row.status, row.last_seq, row.updated_at)


class Frame(NamedTuple):
    """An event, ready to be sent."""

    seq: int
    text: bytes


class Update(NamedTuple):
    """What a poll found of one job; ``head`` is None once the job is deleted or the service ends."""

    head: Head | None
    frames: Sequence[Frame] = ()


class Reader:
    """One watcher's queue of updates. A reader that falls behind is cut off: it gets a last update without head."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Update] = asyncio.Queue()
        self._cut = False

    async def next(self, seconds: float) -> Update | None:
        """The next update, or None when there was none for so long."""
        try:
            async with asyncio.timeout(seconds):
                return await self._queue.get()
        except TimeoutError:
            return None

    def offer(self, update: Update) -> None:
        """Queue an update, unless too many are waiting."""
        if self._cut:
            return
        self._cut = update.head is None or self._queue.qsize() >= _BACKLOG
        self._queue.put_nowait(Update(None) if self._cut else update)


@dataclass
class _Watch:
    """A job somebody watches; ``cursor`` is the last event that was handed out."""

    cursor: int
    head: Head | None = None
    readers: set[Reader] = field(default_factory=set)


class Feed:
    """The one poller. Belongs to the event loop; :meth:`stop` may be called from any thread."""

    def __init__(self, engine: sa.Engine, *, poll_seconds: float, max_streams: int) -> None:
        self._engine = engine
        self._poll_seconds = poll_seconds
        self._max_streams = max_streams
        self._watches: dict[str, _Watch] = {}
        self._open: Counter[str] = Counter()
        self._wanted = asyncio.Event()
        self._limiter = anyio.CapacityLimiter(1)  # its own thread: it must not wait for those that serve requests
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False
        self.polls = 0

    @contextmanager
    def watch(self, row: Row, *, key: str) -> Iterator[Reader]:
        """Updates of a job from what ``row`` shows on; events up to then are the caller's to read.

        Raises:
            Problem: 429 when the API key has too many open.
        """
        if self._open[key] >= self._max_streams:
            raise Problem(
                429, "too-many-streams", f"This key has {self._max_streams} streams and held answers open, which is the limit. "
                "Close some.", headers={"Retry-After": "10"},
            )  # fmt: skip
        watch = self._watches.setdefault(row.id, _Watch(row.last_seq))
        reader = Reader()
        watch.readers.add(reader)
        self._open[key] += 1
        self._wanted.set()
        if self._stopped or watch.head is not None:
            reader.offer(Update(None if self._stopped else watch.head))
        try:
            yield reader
        finally:
            self._open[key] -= 1
            watch.readers.discard(reader)
            if not watch.readers:
                self._watches.pop(row.id, None)

    async def until(self, row: Row, done: Callable[[Head], bool], *, seconds: float, key: str) -> None:
        """Return when the job's head is ``done``, the job is deleted, or the time is over. Raises Problem 429."""
        if done(Head.of(row)):
            return
        deadline = asyncio.get_running_loop().time() + seconds
        with self.watch(row, key=key) as reader:
            while (left := deadline - asyncio.get_running_loop().time()) > 0:
                update = await reader.next(left)
                if update is not None and (update.head is None or done(update.head)):
                    return

    async def run(self) -> None:
        """Poll for as long as anybody watches; ends when cancelled."""
        self._loop = asyncio.get_running_loop()
        while True:
            if not self._watches:
                self._wanted.clear()
                await self._wanted.wait()
            try:
                await self._poll()
                pause = self._poll_seconds
            except SQLAlchemyError:
                log.warning("events cannot be read: the database is away")
                pause = max(_AWAY_SECONDS, self._poll_seconds)
            await asyncio.sleep(pause)

    def stop(self) -> None:
        """End all streams and held answers: an HTTP server waits for them before it shuts down."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._stopped = True
        for watch in self._watches.values():
            _offer(watch, Update(None))

    async def _poll(self) -> None:
        cursors = {job_id: watch.cursor for job_id, watch in self._watches.items()}
        found = await to_thread.run_sync(self._read, cursors, limiter=self._limiter)
        self.polls += 1
        for job_id in cursors:
            watch, update = self._watches.get(job_id), found.get(job_id, Update(None))
            if watch is None or (update.head is not None and update.head == watch.head):
                continue
            fresh = [frame for frame in update.frames if frame.seq > watch.cursor]
            if update.head is not None:
                watch.head, watch.cursor = update.head, max(watch.cursor, update.head.last_seq)
            _offer(watch, Update(update.head, fresh))

    def _read(self, cursors: Mapping[str, int]) -> dict[str, Update]:
        """Heads of the jobs, and their events above the cursors; runs in a thread."""
        jobs, events = tables.jobs, tables.events
        columns = (jobs.c.id, jobs.c.status, jobs.c.last_seq, jobs.c.updated_at)
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(*columns).where(jobs.c.id.in_(list(cursors)))).all()
            changed = [(row.id, cursors[row.id], row.last_seq) for row in rows if row.last_seq > cursors[row.id]]
            frames: dict[str, list[Frame]] = {row.id: [] for row in rows}
            if changed:
                spans = sa.values(
                    sa.column("job_id", sa.Text), sa.column("after", sa.Integer), sa.column("upto", sa.Integer), name="spans"
                ).data(changed).cte()  # fmt: skip
                within = (events.c.seq > spans.c.after) & (events.c.seq <= spans.c.upto)
                query = sa.select(events).join(spans, (events.c.job_id == spans.c.job_id) & within)
                for event in connection.execute(query.order_by(events.c.job_id, events.c.seq)):
                    frames[event.job_id].append(frame(event))
        heads = {row.id: Head(row.status, row.last_seq, row.updated_at) for row in rows}
        return {job_id: Update(head, frames[job_id]) for job_id, head in heads.items()}


def frame(row: Row) -> Frame:
    """A row of events as Server-Sent Event: ``id`` is its seq, ``event`` its type, ``data`` the whole of it as JSON."""
    event = event_view(row)
    return Frame(row.seq, format_sse_event(data_str=event.model_dump_json(), event=row.type, id=str(row.seq)))


def event_view(row: Row) -> EventView:
    """A row of events as clients see it."""
    return EventView(seq=row.seq, type=row.type, created_at=row.created_at, data=row.data)


def _offer(watch: _Watch, update: Update) -> None:
    for reader in tuple(watch.readers):
        reader.offer(update)
