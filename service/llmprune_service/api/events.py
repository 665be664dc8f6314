"""What happened to a job, as pages or as a stream."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from llmprune_service.api import auth
from llmprune_service.api.deps import FeedDep, JobId, JobsDep, Limit, UntilSent
from llmprune_service.api.feed import Feed, Frame, Reader, event_view, frame
from llmprune_service.api.openapi import KEYED, problems
from llmprune_service.jobs import Jobs, Row
from llmprune_service.problems import Problem
from llmprune_service.schemas import FINISHED, EventView, Page

router = APIRouter(prefix="/v1", tags=["jobs"], responses=KEYED)
STREAM = "text/event-stream"
_KEEP_ALIVE_SECONDS = 15.0
_PAGE = 500
_MAX_SEQ = 2**31 - 1
_OURS = re.compile(r"\d{1,10}", re.ASCII)
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second keeps nginx from holding events back

Seq = Annotated[int, Query(ge=0, le=_MAX_SEQ, description="Only events with a higher `seq`.")]


@router.get(
    "/jobs/{job_id}/events", response_model=Page[EventView], summary="Events of a job",
    responses={
        200: {
            "description": "A page; or, with `Accept: text/event-stream`, the events as they happen, to the end of the run.",
            "content": {STREAM: {"schema": {"type": "string"}}},
        },
        204: {"description": "The run is over and there are no events after `Last-Event-ID`: a browser need not come back."},
        **problems(404, 429),
    },
)  # fmt: skip
async def events(
    principal: auth.reader,
    job_id: JobId,
    request: Request,
    jobs: JobsDep,
    feed: FeedDep,
    until_sent: UntilSent,
    after: Seq = 0,
    limit: Limit = 100,
    last_event_id: Annotated[
        str | None, Header(description="The last `id` a broken stream brought; wins over `after`.")
    ] = None,
) -> Response:
    """Each Server-Sent Event has the event's `seq` as id, its type as event, and the entry of the page as data."""
    if STREAM not in request.headers.get("accept", ""):
        rows = await run_in_threadpool(jobs.events, principal.sees, job_id, after=after, limit=limit + 1)
        more = len(rows) > limit
        data = tuple(map(event_view, rows[:limit]))
        page = Page[EventView](data=data, has_more=more, next=str(data[-1].seq) if more else None)
        return Response(page.model_dump_json(), media_type="application/json")
    row = await run_in_threadpool(jobs.get, principal.sees, job_id)
    after = min(_seq(last_event_id, after), row.last_seq)
    if last_event_id is not None and row.status in FINISHED and after == row.last_seq:
        return Response(status_code=204)
    stream = follow(jobs, feed, row, after=after, principal=principal, until_sent=until_sent)
    return EventSourceResponse(stream, headers=_HEADERS)


def follow(
    jobs: Jobs, feed: Feed, row: Row, *, after: int, principal: auth.Principal, until_sent: UntilSent
) -> AsyncIterator[bytes]:
    """The stream of a job's events above ``after``, to the end of its run; raises Problem 429 before it begins."""
    reader = until_sent.enter_context(feed.watch(row, key=principal.key_id))
    return _follow(jobs, reader, principal.sees, row.id, after)


async def _follow(jobs: Jobs, reader: Reader, tenant: str | None, job_id: str, sent: int) -> AsyncIterator[bytes]:
    """What is in the database first, then what the feed brings: it brings everything from before that was read on."""
    while True:
        try:
            rows = await run_in_threadpool(jobs.events, tenant, job_id, after=sent, limit=_PAGE)
        except (SQLAlchemyError, Problem):
            return  # the database is away, or the job: who comes back is told
        if rows:
            sent = rows[-1].seq
            yield _join([frame(row) for row in rows])
        if len(rows) < _PAGE:
            break
    while True:
        update = await reader.next(_KEEP_ALIVE_SECONDS)
        if update is None:
            yield KEEPALIVE_COMMENT
            continue
        if fresh := [frame for frame in update.frames if frame.seq > sent]:
            sent = fresh[-1].seq
            yield _join(fresh)
        if update.head is None or (update.head.finished and sent == update.head.last_seq):
            return


def _join(frames: list[Frame]) -> bytes:
    return b"".join(frame.text for frame in frames)


def _seq(last_event_id: str | None, after: int) -> int:
    """An id we did not send means: from the beginning."""
    if last_event_id is None:
        return after
    return int(last_event_id) if _OURS.fullmatch(last_event_id) else 0
