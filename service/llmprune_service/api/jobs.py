"""Jobs: submit, look, wait, and the verbs."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Body, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from llmprune_service.api import auth
from llmprune_service.api.admission import IdempotencyKey, bytes_needed, check_disk, resolve, resolve_auto, submitting
from llmprune_service.api.auth import Principal
from llmprune_service.api.conditions import TAGGED, IfNoneMatch, matches, tagged, unless_known
from llmprune_service.api.deps import AfterId, FeedDep, JobId, JobsDep, Limit, SettingsDep, SweepFilter, WaitSeconds
from llmprune_service.api.feed import Feed, Head
from llmprune_service.api.openapi import KEYED, header, problems
from llmprune_service.api.views import Validation
from llmprune_service.jobs import Jobs, Row, view
from llmprune_service.problems import Problem
from llmprune_service.schemas import FINISHED, AutoRequest, BlockView, JobPatch, JobRequest, JobView, Page, Status
from llmprune_service.settings import Settings

router = APIRouter(prefix="/v1", tags=["jobs"], responses=KEYED)
OF_JOB = problems(404)
_MAX_WAIT = 60
_WAIT = re.compile(r"(?:^|[,;\s])wait=(\d{1,9})(?=$|[,;\s])", re.ASCII)
_FILTER = re.compile(r"metadata\[([A-Za-z0-9_.-]{1,64})\]", re.ASCII)
_CHANGED = {"description": "The job, changed.", "headers": {"Location": header("Where to look at it.")}}
_EXAMPLES: Any = {
    "bundled": {
        "summary": "The bundled model, which needs no network",
        "value": {"method": "wanda", "sparsity": 0.5, "num_samples": 16, "max_eval_tokens": 4096, "latency": False},
    },
    "hub": {
        "summary": "A model of the hub",
        "value": {"model": "HuggingFaceTB/SmolLM2-135M", "method": "sparsegpt", "pattern": "2:4", "metadata": {"team": "nlp"}},
    },
}
_BUDGETS: Any = {
    "bundled": {
        "summary": "The sparsest variant of the bundled model whose perplexity is at most 5 % higher",
        "value": {"base": {"num_samples": 16, "max_eval_tokens": 4096, "latency": False}, "max_perplexity_increase": "5%"},
    },
}
_QUEUED: Any = {
    202: {
        "description": "Queued; or what became of it meanwhile, with `Prefer: wait`.",
        "headers": {
            "Location": header("Where to look at it."),
            "Idempotent-Replayed": header("`true` if this key made the job before."),
            "Preference-Applied": header("How long the answer was held at most."),
        },
    },
    **problems(429, 507),
}
JobBody = Annotated[JobRequest, Body(openapi_examples=_EXAMPLES)]
AutoBody = Annotated[AutoRequest, Body(openapi_examples=_BUDGETS)]
Prefer = Annotated[str | None, Header(description="`wait=SECONDS`, at most 60: answer when the job has ended.")]


@router.post("/jobs", status_code=202, response_model=JobView, summary="Submit a job", responses=_QUEUED)
async def submit(
    principal: auth.writer,
    body: JobBody,
    request: Request,
    jobs: JobsDep,
    feed: FeedDep,
    response: Response,
    idempotency_key: IdempotencyKey = None,
    prefer: Prefer = None,
) -> JobView:
    """Queue a pruning job. Every field of the library's configuration may be given; `{}` prunes the bundled model to 50 %."""
    return await _submit(principal, body, request, jobs, feed, response, idempotency_key, prefer)


async def _submit(
    principal: Principal,
    body: JobRequest | AutoRequest,
    request: Request,
    jobs: Jobs,
    feed: Feed,
    response: Response,
    idempotency_key: str | None,
    prefer: str | None,
) -> JobView:
    request.app.state.buckets.take(principal.tenant)
    row, created = await to_thread.run_sync(_place, jobs, principal, body, idempotency_key, limiter=submitting)
    if not created:
        response.headers["Idempotent-Replayed"] = "true"
    if wanted := _WAIT.search(prefer or ""):
        seconds = min(int(wanted[1]), _MAX_WAIT)
        response.headers["Preference-Applied"] = f"wait={seconds}"
        with suppress(Problem):  # too many held answers: the job is queued all the same
            await feed.until(row, lambda head: head.finished, seconds=seconds, key=principal.key_id)
        row = await run_in_threadpool(jobs.get, principal.sees, row.id)
    response.headers["Location"] = f"/v1/jobs/{row.id}"
    return view(row)


def _place(jobs: Jobs, principal: Principal, body: JobRequest | AutoRequest, key: str | None) -> tuple[Row, bool]:
    """Check what is asked for, pin the model's commit, and queue the job; what was queued before needs none of it."""
    if key is not None and (row := jobs.replay(principal.tenant, body, key)) is not None:
        return row, False
    if isinstance(body, AutoRequest):  # the best so far waits while another one is confirmed
        resolved = resolve_auto(body, principal.tenant, jobs.settings)
        needed = bytes_needed(resolved, checkpoints=2)
    else:
        resolved = resolve(body, principal.tenant, jobs.settings)
        needed = bytes_needed(resolved)
    check_disk(jobs.settings, needed)
    return jobs.submit(principal.tenant, body, revision=resolved.revision, bytes_reserved=needed, idempotency_key=key)


@router.post("/auto", status_code=202, response_model=JobView, summary="Find the best model within a budget", responses=_QUEUED)
async def auto(
    principal: auth.writer,
    body: AutoBody,
    request: Request,
    jobs: JobsDep,
    feed: FeedDep,
    response: Response,
    idempotency_key: IdempotencyKey = None,
    prefer: Prefer = None,
) -> JobView:
    """Queue a search. It is one job, of kind `auto`: its result is the best model's, with `auto.json` of all that was tried."""
    return await _submit(principal, body, request, jobs, feed, response, idempotency_key, prefer)


@router.post("/jobs:validate", summary="Try a submission out", responses=problems(429))
async def validate(principal: auth.writer, body: JobBody, request: Request, settings: SettingsDep) -> Validation:
    """Check a submission, pin its model and plan the job; nothing is queued."""
    return await _validate(principal, body, request, settings)


@router.get("/models/{organisation}/{name}/compat", summary="Can this model be pruned?", responses=problems(404, 429))
async def compat(principal: auth.reader, organisation: str, name: str, request: Request, settings: SettingsDep) -> Validation:
    """What `jobs:validate` says of a job with nothing but this model; 422 says why it cannot be pruned here."""
    return await _validate(principal, JobRequest(model=f"{organisation}/{name}"), request, settings)


async def _validate(principal: Principal, body: JobRequest, request: Request, settings: Settings) -> Validation:
    resolved = await to_thread.run_sync(resolve, body, principal.tenant, settings, limiter=submitting)
    outcome = await request.app.state.planner.plan(body.config, resolved.revision)
    return Validation(
        model=body.model, revision=resolved.revision, gated=resolved.gated, weights_bytes=resolved.weights_bytes,
        bytes_needed=bytes_needed(resolved), warnings=[outcome.warning] if outcome.warning else [], plan=outcome.plan,
    )  # fmt: skip


_METADATA_FILTER = {
    "name": "metadata", "in": "query", "required": False, "style": "deepObject", "explode": True,
    "description": "`metadata[KEY]=VALUE`: jobs with that pair; several must all match.",
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}  # fmt: skip


@router.get("/jobs", summary="List jobs", responses=OF_JOB, openapi_extra={"parameters": [_METADATA_FILTER]})
def list_jobs(
    principal: auth.reader,
    request: Request,
    jobs: JobsDep,
    limit: Limit = 20,
    after: AfterId = None,
    status: Status | None = None,
    model: str | None = None,
    method: str | None = None,
    sweep: SweepFilter = None,
) -> Page[JobView]:
    """Newest first."""
    metadata = {match[1]: value for name, value in request.query_params.items() if (match := _FILTER.fullmatch(name))}
    rows, more = jobs.list(
        principal.sees, limit=limit, after=after, status=status, model=model, method=method, sweep=sweep, metadata=metadata
    )
    return Page[JobView](data=tuple(map(view, rows)), has_more=more, next=rows[-1].id if more else None)


@router.get(
    "/jobs/{job_id}", response_model=JobView, summary="Look at a job",
    responses={**TAGGED, **problems(404, 429)},
)  # fmt: skip
async def get_job(
    principal: auth.reader,
    job_id: JobId,
    jobs: JobsDep,
    feed: FeedDep,
    wait: WaitSeconds = 0,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """With `wait`, the answer is held until the job is no longer what `If-None-Match` names (or what it is now)."""
    row = await run_in_threadpool(jobs.get, principal.sees, job_id)
    body, tag = tagged(view(row))
    if wait and row.status not in FINISHED and (if_none_match is None or matches(tag, if_none_match)):
        seen = Head.of(row)
        await feed.until(row, lambda head: head != seen, seconds=wait, key=principal.key_id)
        body, tag = tagged(view(await run_in_threadpool(jobs.get, principal.sees, job_id)))
    return unless_known(body, tag, if_none_match)


@router.patch("/jobs/{job_id}", summary="Change priority or metadata", responses=problems(404, 409))
def patch_job(principal: auth.writer, job_id: JobId, body: JobPatch, jobs: JobsDep) -> JobView:
    """The priority can be changed while the job is queued."""
    return view(jobs.patch(principal.sees, job_id, body))


@router.delete("/jobs/{job_id}", status_code=204, summary="Delete a finished job", responses=problems(404, 409))
def delete_job(principal: auth.writer, job_id: JobId, jobs: JobsDep) -> None:
    """With its files, at once."""
    jobs.delete(principal.sees, job_id)


@router.post("/jobs/{job_id}/cancel", status_code=202, summary="Cancel", responses={202: _CHANGED, **problems(404, 409)})
def cancel(principal: auth.writer, job_id: JobId, jobs: JobsDep, response: Response) -> JobView:
    """A queued job at once, a running one within a second or so. Repeating it changes nothing."""
    return _changed(jobs.cancel(principal.sees, job_id), response)


@router.post("/jobs/{job_id}/resume", status_code=202, summary="Resume", responses={202: _CHANGED, **problems(404, 409)})
def resume(principal: auth.writer, job_id: JobId, jobs: JobsDep, response: Response) -> JobView:
    """Go on with a cancelled job after its last finished block."""
    return _changed(jobs.resume(principal.sees, job_id), response)


@router.post("/jobs/{job_id}/retry", status_code=202, summary="Retry", responses={202: _CHANGED, **problems(404, 409)})
def retry(
    principal: auth.writer,
    job_id: JobId,
    jobs: JobsDep,
    response: Response,
    start: Annotated[
        Literal["start", "failed"], Query(alias="from", description="`start` forgets finished blocks.")
    ] = "failed",
) -> JobView:
    """Try a failed job again under the same id."""
    return _changed(jobs.retry(principal.sees, job_id, from_start=start == "start"), response)


def _changed(row: Row, response: Response) -> JobView:
    response.headers["Location"] = f"/v1/jobs/{row.id}"
    return view(row)


@router.get("/jobs/{job_id}/checkpoints", summary="Finished blocks", responses=OF_JOB)
def checkpoints(principal: auth.reader, job_id: JobId, jobs: JobsDep) -> Page[BlockView]:
    """In order, as far as the job has come."""
    rows = jobs.blocks(principal.sees, job_id)
    blocks = tuple(BlockView.model_validate(row, from_attributes=True) for row in rows)
    return Page[BlockView](data=blocks, has_more=False)
