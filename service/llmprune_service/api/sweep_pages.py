"""The pages of sweeps: the list with a form for another one, and one sweep as a plot and a table that grow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from llmprune.errors import UserError
from llmprune.io.pareto import AXES
from llmprune.io.report_plots import Plot
from llmprune_service.api import auth
from llmprune_service.api import sweeps as api_sweeps
from llmprune_service.api.auth import Principal
from llmprune_service.api.deps import AfterSweepId, SweepId, SweepsDep
from llmprune_service.api.errors import pointer
from llmprune_service.api.forms import FIELDS, Form
from llmprune_service.api.html import PageRoute, render
from llmprune_service.api.page_text import curl
from llmprune_service.points import results, results_svg
from llmprune_service.problems import Problem
from llmprune_service.schemas import FINISHED, AxisName, SweepAxes, SweepPointView, SweepRequest
from llmprune_service.sweeps import Sweeps

PAGE_SIZE = 50
VALUES = {
    "methods": "magnitude, wanda, sparsegpt", "patterns": "unstructured, 2:4", "sparsities": "0.4, 0.5, 0.6",
    "allocations": "uniform, owl", "efforts": "fast, best",
}  # fmt: skip
"""The axes of a sweep, each with values it may have."""
SHARED = ("model", "calibration", "num_samples", "max_eval_tokens")
"""Fields of all jobs that the form offers; the API takes every one."""
Verb = Literal["cancel", "resume", "retry", "delete"]
X = Annotated[AxisName | None, Query()]

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/ui/sweeps")
def list_sweeps(request: Request, principal: auth.reader, sweeps: SweepsDep, after: AfterSweepId = None) -> Response:
    """The newest sweeps, and the form for another one."""
    return _sweeps_page(request, principal, sweeps, after=after)


@router.post("/ui/sweeps")
async def submit_sweep(request: Request, principal: auth.writer, form: Form, sweeps: SweepsDep) -> Response:
    """Submit what the form says, as the API does."""
    base = {name: form[name] for name in SHARED if name in form}
    try:
        body = _checked(SweepRequest, {"base": base, **_axes(form)})
        sweep = await api_sweeps.submit(principal, body, request, sweeps, Response())
    except (Problem, UserError) as error:
        return await run_in_threadpool(_sweeps_page, request, principal, sweeps, form=form, problem=_problem(error))
    return RedirectResponse(f"/ui/sweeps/{sweep.id}", 303)


def _axes(form: Mapping[str, str]) -> dict[str, list[str]]:
    """Values by axis, separated by commas or spaces."""
    return {axis: form[axis].replace(",", " ").split() for axis in VALUES if axis in form}


def _checked(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """Raises Problem 422 with an entry for each field that is wrong."""
    assert issubclass(kind, BaseModel)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        errors = [{"pointer": pointer(item["loc"]), "detail": item["msg"]} for item in error.errors()]
        raise Problem(422, "invalid", "Some fields cannot be used.", errors=errors) from None


def _problem(error: Problem | UserError) -> Problem:
    """The library's errors as the pages show them."""
    return error if isinstance(error, Problem) else Problem(422, "invalid", str(error))


def _sweeps_page(
    request: Request,
    principal: Principal,
    sweeps: Sweeps,
    *,
    after: str | None = None,
    form: Mapping[str, str] | None = None,
    problem: Problem | None = None,
) -> Response:
    rows, more = sweeps.list(principal.sees, limit=PAGE_SIZE, after=after)
    answer = render(
        request, "sweeps.html", principal, status=problem.status if problem else 200, here="sweeps",
        sweeps=sweeps.views(rows), after=after, next=f"/ui/sweeps?after={rows[-1].id}" if more else None, now=time.time(),
        may_write=principal.may_write, fields=[FIELDS[name] for name in SHARED], axes=VALUES, form=form or {}, problem=problem,
    )  # fmt: skip
    answer.headers.update(problem.headers if problem else {})
    return answer


@router.get("/ui/sweeps/{sweep_id}")
def show_sweep(
    request: Request, principal: auth.reader, sweep_id: SweepId, sweeps: SweepsDep, x: X = None, y: X = None
) -> Response:
    """One sweep: its points so far."""
    return _sweep_page(request, principal, sweeps, sweep_id, x=x, y=y)


def _sweep_page(
    request: Request,
    principal: Principal,
    sweeps: Sweeps,
    sweep_id: str,
    *,
    x: AxisName | None = None,
    y: AxisName | None = None,
    form: Mapping[str, str] | None = None,
    problem: Problem | None = None,
) -> Response:
    row = sweeps.get(principal.sees, sweep_id)
    (sweep,) = sweeps.views([row])
    jobs = sweeps.points(principal.sees, sweep_id)
    found = results(jobs, x, y)
    keys = [key for key in AXES if any(key in point.values for point in found.data)]
    title = f"{AXES[found.y].label[:1].upper()}{AXES[found.y].label[1:]} against {AXES[found.x].label}"
    plot = Plot("pareto", title, f"{title}; the dashed line is the front.", results_svg(jobs, x, y)) if keys else None
    answer = render(
        request, "sweep.html", principal, status=problem.status if problem else 200, here="sweeps", sweep=sweep,
        finished=sweep.status in FINISHED, now=time.time(), found=found, keys=keys, axes=AXES, plot=plot, problem=problem,
        table=[(point, [_shown(point, key) for key in keys]) for point in found.data], values=VALUES, form=form or {},
        may_write=principal.may_write,
        command=curl(row.config | row.fields, str(request.base_url), auth=sweeps.settings.auth, path="v1/sweeps"),
        compare="&".join(f"job={point.job_id}" for point in found.data if point.status == "succeeded"),
    )  # fmt: skip
    answer.headers.update(problem.headers if problem else {})
    return answer


def _shown(point: SweepPointView, key: str) -> str:
    """A value with its unit; None is one that is not finite."""
    value = point.values.get(key)
    return "not finite" if key in point.values and value is None else AXES[key].text(value) if value is not None else ""


@router.post("/ui/sweeps/{sweep_id}/points")
async def extend_sweep(request: Request, principal: auth.writer, form: Form, sweep_id: SweepId, sweeps: SweepsDep) -> Response:
    """Add what the form says, as the API does."""
    try:
        await api_sweeps.extend(principal, sweep_id, _checked(SweepAxes, _axes(form)), request, sweeps)
    except (Problem, UserError) as error:
        problem = _problem(error)
        return await run_in_threadpool(_sweep_page, request, principal, sweeps, sweep_id, form=form, problem=problem)
    return RedirectResponse(f"/ui/sweeps/{sweep_id}", 303)


@router.post("/ui/sweeps/{sweep_id}/{verb}")
def change_sweep(principal: auth.writer, _: Form, sweep_id: SweepId, verb: Verb, sweeps: SweepsDep) -> Response:
    """Cancel, resume, retry or delete all its jobs."""
    if verb == "delete":
        sweeps.delete(principal.sees, sweep_id)
        return RedirectResponse("/ui/sweeps", 303)
    {"cancel": sweeps.cancel, "resume": sweeps.resume, "retry": sweeps.retry}[verb](principal.sees, sweep_id)
    return RedirectResponse(f"/ui/sweeps/{sweep_id}", 303)
