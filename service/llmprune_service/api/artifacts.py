"""Files of a finished job: listed, and sent in ranges with a digest; and its report."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator
from pathlib import PurePosixPath
from typing import IO, Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from llmprune_service.api import auth
from llmprune_service.api.conditions import IfNoneMatch, matches
from llmprune_service.api.deps import FileName, JobId, JobsDep, StoreDep, UntilSent
from llmprune_service.api.jobs import OF_JOB
from llmprune_service.api.openapi import KEYED, header, problems
from llmprune_service.jobs import Jobs, Row
from llmprune_service.problems import Problem, not_found
from llmprune_service.schemas import ArtifactView, Page
from llmprune_service.store import Store

router = APIRouter(prefix="/v1", tags=["results"], responses=KEYED)
_CHUNK = 1 << 20
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII | re.IGNORECASE)
REPORT = "report.html"
# The report's own inline style and script work; it has no origin, reaches nothing, and cannot be framed.
_REPORT_CSP = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; font-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FILE_HEADERS = {
    "ETag": header("Strong: the sha256 of the file."),
    "Repr-Digest": header("`sha-256=:BASE64:` of the whole file (RFC 9530)."),
    "Accept-Ranges": header("`bytes`"),
}
_BYTES: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_FILE_RESPONSES = {
    200: {"description": "The file.", "content": _BYTES, "headers": _FILE_HEADERS},
    206: {
        "description": "The bytes of the range.",
        "content": _BYTES,
        "headers": _FILE_HEADERS | {"Content-Range": header("Where they lie.")},
    },
    304: {"description": "You have it.", "headers": _FILE_HEADERS},
    **problems(404, 416),
}


@router.get("/jobs/{job_id}/report", summary="The report", responses=OF_JOB)
def report(principal: auth.reader, job_id: JobId, jobs: JobsDep) -> dict[str, Any]:
    """`report.json` of the checkpoint: everything that was asked for, done, lost and gained."""
    report = jobs.report(principal.sees, job_id)
    if report is None:
        raise Problem(404, "no-report", "There is a report once the job has succeeded.")
    return {name: value for name, value in report.items() if name != "out"}  # a path of the worker's


@router.get(
    "/jobs/{job_id}/report.html", summary="The report as a page", response_class=Response,
    responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}, **problems(404)},
)  # fmt: skip
async def report_page(principal: auth.reader, job_id: JobId, jobs: JobsDep, store: StoreDep, until_sent: UntilSent) -> Response:
    """Self-contained, printable."""
    row = await run_in_threadpool(jobs.artifact, principal.sees, job_id, REPORT)
    file = await _open(store, row, until_sent)
    headers = _headers(row) | {"Content-Disposition": "inline", "Content-Security-Policy": _REPORT_CSP}
    return StreamingResponse(_chunks(file, 0, row.bytes), headers=headers, media_type="text/html; charset=utf-8")


@router.get("/jobs/{job_id}/artifacts", summary="Files of the result", responses=OF_JOB)
def list_artifacts(principal: auth.reader, job_id: JobId, jobs: JobsDep) -> Page[ArtifactView]:
    """The checkpoint's files and the report's."""
    rows = jobs.artifacts(principal.sees, job_id)
    return Page[ArtifactView](data=tuple(map(artifact_view, rows)), has_more=False)


def artifact_view(row: Row) -> ArtifactView:
    """A file as clients see it."""
    url = f"/v1/jobs/{row.job_id}/artifacts/{quote(row.name)}"
    return ArtifactView(name=row.name, bytes=row.bytes, sha256=row.sha256, media_type=row.media_type, url=url)


@router.get(
    "/jobs/{job_id}/artifacts/{name:path}", summary="Download a file", response_class=Response, responses=_FILE_RESPONSES
)
async def download(
    principal: auth.reader,
    job_id: JobId,
    name: FileName,
    jobs: JobsDep,
    store: StoreDep,
    until_sent: UntilSent,
    range: Annotated[str | None, Header(description="`bytes=FIRST-LAST`; several ranges are answered with all of it.")] = None,
    if_range: Annotated[str | None, Header(description="ETag of what you have a part of; else all of it is sent.")] = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Whole or in part. Check it against `Repr-Digest`, or `sha256` of the list."""
    row, headers = await _look_up(jobs, principal, job_id, name)
    if if_none_match is not None and matches(headers["ETag"], if_none_match):
        return Response(status_code=304, headers=headers)
    span = _span(range, row.bytes) if if_range is None or if_range == headers["ETag"] else None
    file = await _open(store, row, until_sent)
    first, past = span or (0, row.bytes)
    headers["Content-Length"] = str(past - first)
    if span:
        headers["Content-Range"] = f"bytes {first}-{past - 1}/{row.bytes}"
    return StreamingResponse(
        _chunks(file, first, past), 206 if span else 200, headers=headers, media_type=row.media_type
    )  # fmt: skip


@router.head(
    "/jobs/{job_id}/artifacts/{name:path}", summary="Size and digest of a file", response_class=Response,
    responses={
        200: {"description": "The file's headers.", "headers": _FILE_HEADERS},
        304: _FILE_RESPONSES[304],
        **problems(404),
    },
)  # fmt: skip
async def head(
    principal: auth.reader, job_id: JobId, name: FileName, jobs: JobsDep, if_none_match: IfNoneMatch = None
) -> Response:
    """What GET would send, without the file."""
    row, headers = await _look_up(jobs, principal, job_id, name)
    if if_none_match is not None and matches(headers["ETag"], if_none_match):
        return Response(status_code=304, headers=headers)
    return Response(headers=headers | {"Content-Length": str(row.bytes)}, media_type=row.media_type)


async def _look_up(jobs: Jobs, principal: auth.Principal, job_id: str, name: str) -> tuple[Row, dict[str, str]]:
    row = await run_in_threadpool(jobs.artifact, principal.sees, job_id, name)
    file_name = quote(PurePosixPath(row.name).name)
    return row, _headers(row) | {"Content-Disposition": f"attachment; filename*=utf-8''{file_name}"}


def _headers(row: Row) -> dict[str, str]:
    digest = base64.b64encode(bytes.fromhex(row.sha256)).decode()
    return {
        "ETag": f'"{row.sha256}"',
        "Repr-Digest": f"sha-256=:{digest}:",
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
    }


def _span(range_header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and the one past the last, or None for all of it: no range, several, or one that makes no sense.

    Raises:
        Problem: 416 for a range behind the end.
    """
    match = _RANGE.fullmatch((range_header or "").replace(" ", ""))
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, past = max(size - int(last), 0), size
    else:
        start, past = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < int(first):
            return None
    if start >= size:
        raise Problem(
            416,
            "range",
            f"The file has {size} bytes; ask for a range within them.",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, past


async def _open(store: Store, row: Row, until_sent: UntilSent) -> IO[bytes]:
    """The file, closed when the answer is sent; raises Problem 404 where somebody removed it."""
    try:
        file = await run_in_threadpool(store.open, row.path)
    except FileNotFoundError:
        raise not_found("artifact") from None
    until_sent.push_async_callback(run_in_threadpool, file.close)
    return file


async def _chunks(file: IO[bytes], first: int, past: int) -> AsyncIterator[bytes]:
    """The bytes from ``first`` to before ``past``, a mebibyte at a time: a few times faster than Starlette's 64 KiB."""
    await run_in_threadpool(file.seek, first)
    while first < past and (chunk := await run_in_threadpool(file.read, min(_CHUNK, past - first))):
        first += len(chunk)
        yield chunk
