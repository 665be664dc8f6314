"""Sweeps: submit, extend, look, compare, and the verbs."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Body, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from llmprune_service.api import auth
from llmprune_service.api.admission import IdempotencyKey, submitting
from llmprune_service.api.conditions import TAGGED, IfNoneMatch, tagged, unless_known
from llmprune_service.api.deps import AfterSweepId, Limit, SweepId, SweepsDep
from llmprune_service.api.expansion import expand, extended
from llmprune_service.api.openapi import KEYED, header, problems
from llmprune_service.jobs import Row
from llmprune_service.points import results, results_csv, results_svg
from llmprune_service.schemas import AxisName, Page, SweepAxes, SweepExtension, SweepPoints, SweepRequest, SweepView
from llmprune_service.sweeps import Sweeps

router = APIRouter(prefix="/v1", tags=["sweeps"], responses=KEYED)
_OF_SWEEP = problems(404)
_LOCATION = header("Where to look at it.")
_CHANGED = {"description": "The sweep, changed.", "headers": {"Location": _LOCATION}}
_EXAMPLES: Any = {
    "bundled": {
        "summary": "Six points on the bundled model, which needs no network",
        "value": {
            "base": {"num_samples": 16, "max_eval_tokens": 4096, "latency": False},
            "methods": ["magnitude", "wanda"], "sparsities": [0.5, 0.6], "patterns": ["unstructured", "2:4"],
        },
    },
}  # fmt: skip
SweepBody = Annotated[SweepRequest, Body(openapi_examples=_EXAMPLES)]
X = Annotated[AxisName | None, Query(description="First axis of plot and front. Default: sparsity, or the size.")]
Y = Annotated[AxisName | None, Query(description="Second axis. Default: perplexity, or the KL.")]


@router.post(
    "/sweeps", status_code=202, response_model=SweepView, summary="Submit a sweep",
    responses={
        202: {
            "description": "All its jobs are queued.",
            "headers": {"Location": _LOCATION, "Idempotent-Replayed": header("`true` if this key made the sweep before.")},
        },
        **problems(429, 507),
    },
)  # fmt: skip
async def submit(
    principal: auth.writer,
    body: SweepBody,
    request: Request,
    sweeps: SweepsDep,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> SweepView:
    """Queue a job for every combination of the values of the axes: all of them, or none. Each is an ordinary job."""
    request.app.state.buckets.take(principal.tenant)
    row, created = await to_thread.run_sync(_place, sweeps, principal.tenant, body, idempotency_key, limiter=submitting)
    if not created:
        response.headers["Idempotent-Replayed"] = "true"
    return await run_in_threadpool(_changed, sweeps, row, response)


def _place(sweeps: Sweeps, tenant: str, body: SweepRequest, key: str | None) -> tuple[Row, bool]:
    if key is not None and (row := sweeps.replay(tenant, body, key)) is not None:
        return row, False
    found = expand(body, tenant, sweeps.settings)
    bytes_reserved = [found.bytes_first, *[found.bytes_each] * (len(found.points) - 1)]
    return sweeps.submit(
        tenant, body, found.points, revision=found.revision, bytes_reserved=bytes_reserved, idempotency_key=key
    )


@router.post("/sweeps/{sweep_id}/points", status_code=202, summary="Extend a sweep", responses=problems(404, 409, 429, 507))
async def extend(
    principal: auth.writer, sweep_id: SweepId, body: SweepAxes, request: Request, sweeps: SweepsDep
) -> SweepExtension:
    """Queue what these values add. An axis that is left out has all the values that it has; points that are there stay.

    So repeating it changes nothing.
    """
    request.app.state.buckets.take(principal.tenant)
    return await to_thread.run_sync(_extend, sweeps, principal.sees, sweep_id, body, limiter=submitting)


def _extend(sweeps: Sweeps, tenant: str | None, sweep_id: str, body: SweepAxes) -> SweepExtension:
    row = sweeps.get(tenant, sweep_id)
    asked, union = extended(row, body)
    found = expand(asked, row.tenant, sweeps.settings, revision=row.revision)
    return sweeps.extend(row, union, found.points, found.bytes_each)


@router.get("/sweeps", summary="List sweeps", responses=_OF_SWEEP)
def list_sweeps(principal: auth.reader, sweeps: SweepsDep, limit: Limit = 20, after: AfterSweepId = None) -> Page[SweepView]:
    """Newest first."""
    rows, more = sweeps.list(principal.sees, limit=limit, after=after)
    return Page[SweepView](data=sweeps.views(rows), has_more=more, next=rows[-1].id if more else None)


@router.get("/sweeps/{sweep_id}", response_model=SweepView, summary="Look at a sweep", responses={**TAGGED, **problems(404)})
def get_sweep(principal: auth.reader, sweep_id: SweepId, sweeps: SweepsDep, if_none_match: IfNoneMatch = None) -> Response:
    """How many of its jobs are in which state; `GET /v1/jobs?sweep=` lists them."""
    (view,) = sweeps.views([sweeps.get(principal.sees, sweep_id)])
    return unless_known(*tagged(view), if_none_match)


@router.delete("/sweeps/{sweep_id}", status_code=204, summary="Delete a sweep", responses=problems(404, 409))
def delete_sweep(principal: auth.writer, sweep_id: SweepId, sweeps: SweepsDep) -> None:
    """With its jobs and their files, once all have ended."""
    sweeps.delete(principal.sees, sweep_id)


@router.post("/sweeps/{sweep_id}/cancel", status_code=202, summary="Cancel", responses={202: _CHANGED, **problems(404, 409)})
def cancel(principal: auth.writer, sweep_id: SweepId, sweeps: SweepsDep, response: Response) -> SweepView:
    """All jobs that have not ended. Repeating it changes nothing."""
    return _changed(sweeps, sweeps.cancel(principal.sees, sweep_id), response)


@router.post("/sweeps/{sweep_id}/resume", status_code=202, summary="Resume", responses={202: _CHANGED, **problems(404, 409)})
def resume(principal: auth.writer, sweep_id: SweepId, sweeps: SweepsDep, response: Response) -> SweepView:
    """Go on with its cancelled jobs, each after its last finished block."""
    return _changed(sweeps, sweeps.resume(principal.sees, sweep_id), response)


@router.post("/sweeps/{sweep_id}/retry", status_code=202, summary="Retry", responses={202: _CHANGED, **problems(404, 409)})
def retry(principal: auth.writer, sweep_id: SweepId, sweeps: SweepsDep, response: Response) -> SweepView:
    """Try its failed jobs again, each under its id."""
    return _changed(sweeps, sweeps.retry(principal.sees, sweep_id), response)


def _changed(sweeps: Sweeps, row: Row, response: Response) -> SweepView:
    response.headers["Location"] = f"/v1/sweeps/{row.id}"
    return sweeps.views([row])[0]


# Results --------------------------------------------------------------------------------------------------------------


@router.get("/sweeps/{sweep_id}/points", summary="Points of a sweep", responses=_OF_SWEEP)
def points(principal: auth.reader, sweep_id: SweepId, sweeps: SweepsDep, x: X = None, y: Y = None) -> SweepPoints:
    """All of them, in the order of the sweep; those that have not succeeded are there without values."""
    return results(sweeps.points(principal.sees, sweep_id), x, y)


@router.get(
    "/sweeps/{sweep_id}/points.csv", summary="Points of a sweep as CSV", response_class=Response,
    responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}, **_OF_SWEEP},
)  # fmt: skip
def points_csv(principal: auth.reader, sweep_id: SweepId, sweeps: SweepsDep, x: X = None, y: Y = None) -> Response:
    """One line a point, with all values in full."""
    content = results_csv(sweeps.points(principal.sees, sweep_id), x, y)
    headers = {"Content-Disposition": f'attachment; filename="{sweep_id}.csv"'}
    return Response(content, media_type="text/csv; charset=utf-8", headers=headers)


@router.get(
    "/sweeps/{sweep_id}/pareto.svg", summary="Points of a sweep as a plot", response_class=Response,
    responses={200: {"content": {"image/svg+xml": {"schema": {"type": "string"}}}}, **_OF_SWEEP},
)  # fmt: skip
def pareto_plot(principal: auth.reader, sweep_id: SweepId, sweeps: SweepsDep, x: X = None, y: Y = None) -> Response:
    """Each point leads to the page of its job."""
    return Response(results_svg(sweeps.points(principal.sees, sweep_id), x, y), media_type="image/svg+xml")
