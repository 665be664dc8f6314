"""Pages for people: the jobs, one job live, the workers, signing in, the API's description. No inline script or style."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import FileResponse, RedirectResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.staticfiles import StaticFiles

from llmprune.errors import UserError
from llmprune.io.render import SCRIPT_FILE
from llmprune.report import Plan
from llmprune_service.api import auth, forms, live
from llmprune_service.api import jobs as api_jobs
from llmprune_service.api.admin import worker_view
from llmprune_service.api.auth import Principal
from llmprune_service.api.deps import AfterId, EngineDep, FeedDep, JobId, JobsDep, SettingsDep
from llmprune_service.api.forms import Form
from llmprune_service.api.html import FOLDER, PageRoute, render
from llmprune_service.api.page_text import curl, headline, stage_label
from llmprune_service.api.views import Validation
from llmprune_service.jobs import Jobs, Row, view
from llmprune_service.problems import Problem
from llmprune_service.schemas import Status

PAGE_SIZE = 50
_EXAMPLE = {"method": "wanda", "sparsity": 0.5}
# Swagger UI sets style attributes, and draws its icons from data: URLs.
_DOCS_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
Verb = Literal["cancel", "resume", "retry", "restart", "delete"]

router = APIRouter(route_class=PageRoute, include_in_schema=False)


def mount_static(app: FastAPI) -> None:
    """Serve the pages' own files under /static."""
    app.mount("/static", StaticFiles(directory=FOLDER / "static"), name="static")


@router.get("/static/plots.js")
def script_of_plots() -> Response:
    """The library's: its own report carries the same."""
    return FileResponse(SCRIPT_FILE, media_type="text/javascript")


# Jobs -----------------------------------------------------------------------------------------------------------------


@router.get("/")
def list_jobs(
    request: Request,
    principal: auth.reader,
    jobs: JobsDep,
    status: str | None = None,
    after: str | None = None,
    like: AfterId = None,
) -> Response:
    """The newest jobs, and the form for another one; ``like`` fills it in as a job that there is."""
    if status is not None and status not in get_args(Status):
        raise Problem(422, "invalid", f"The status {status!r} is unknown; use one of {', '.join(get_args(Status))}.")
    form = forms.filled(jobs.get(principal.sees, like)) if like is not None else None
    return _jobs_page(request, principal, jobs, status=status, after=after, form=form, like=like)


@router.get("/ui/jobs")
@router.get("/ui/plan")
def go_to_list(_: auth.reader) -> Response:
    """Where the form is sent to, asked for by its address."""
    return RedirectResponse("/", 303)


@router.post("/ui/jobs")
async def submit_job(request: Request, principal: auth.writer, form: Form, jobs: JobsDep, feed: FeedDep) -> Response:
    """Submit what the form says, as the API does."""
    try:
        job = await api_jobs.submit(principal, forms.read(form), request, jobs, feed, Response())
    except Problem as problem:
        return await run_in_threadpool(_jobs_page, request, principal, jobs, form=form, problem=problem)
    return RedirectResponse(f"/ui/jobs/{job.id}", 303)


@router.post("/ui/plan")
async def plan_job(request: Request, principal: auth.writer, form: Form, jobs: JobsDep, settings: SettingsDep) -> Response:
    """The same page with what the job would need; nothing is queued."""
    problem = validation = None
    try:
        validation = await api_jobs.validate(principal, forms.read(form), request, settings)
    except Problem as found:
        problem = found
    return await run_in_threadpool(_jobs_page, request, principal, jobs, form=form, problem=problem, validation=validation)


def _jobs_page(
    request: Request,
    principal: Principal,
    jobs: Jobs,
    *,
    status: str | None = None,
    after: str | None = None,
    form: Mapping[str, str] | None = None,
    like: str | None = None,
    problem: Problem | None = None,
    validation: Validation | None = None,
) -> Response:
    rows, more = jobs.list(principal.sees, limit=PAGE_SIZE, after=after, status=status)
    query = {"status": status, "after": rows[-1].id} if more else {}
    example = {
        "curl": curl(_EXAMPLE, str(request.base_url), auth=jobs.settings.auth),
        "submit": "llmprune submit demo --method wanda --sparsity 0.5",
    }
    now = time.time()
    answer = render(
        request, "jobs.html", principal, status=problem.status if problem else 200, here="jobs",
        jobs=[_entry(row, now) for row in rows], now=now, statuses=get_args(Status), chosen=status, after=after,
        next="/?" + urlencode({name: value for name, value in query.items() if value}) if more else None,
        may_write=principal.may_write, fields=forms.FIELDS, first=forms.FIRST, groups=forms.GROUPS, form=form or {}, like=like,
        problem=problem, example=example, validation=validation, plan=_plan(validation),
    )  # fmt: skip
    answer.headers.update(problem.headers if problem else {})
    return answer


def _plan(validation: Validation | None) -> Plan | None:
    """None where none could be made, or the job's Python has another version of it."""
    try:
        return Plan.model_validate(validation.plan) if validation and validation.plan else None
    except (ValidationError, UserError):
        return None


def _entry(row: Row, now: float) -> dict[str, Any]:
    job = view(row)
    progress = job.progress if row.status in ("running", "cancelling") else None
    return {
        "row": row, "progress": progress, "stage": stage_label(progress.stage) if progress else None, "left": job.eta_s,
        "phases": live.phases(row), "elapsed": live.elapsed(row, now), "headline": headline(row.result) if row.result else None,
    }  # fmt: skip


@router.post("/ui/jobs/{job_id}/{verb}")
def change_job(principal: auth.writer, _: Form, job_id: JobId, verb: Verb, jobs: JobsDep) -> Response:
    """Cancel, resume, retry (from the failed phase), restart (retry from the start) or delete."""
    tenant = principal.sees
    match verb:
        case "cancel":
            jobs.cancel(tenant, job_id)
        case "resume":
            jobs.resume(tenant, job_id)
        case "retry" | "restart":
            jobs.retry(tenant, job_id, from_start=verb == "restart")
        case "delete":
            jobs.delete(tenant, job_id)
            return RedirectResponse("/", 303)
    return RedirectResponse(f"/ui/jobs/{job_id}", 303)


# Workers, the API's description, signing in ---------------------------------------------------------------------------


@router.get("/ui/workers")
def list_workers(request: Request, principal: auth.admin, jobs: JobsDep) -> Response:
    """All workers and what they do."""
    workers = [worker_view(row) for row in jobs.workers()]
    return render(request, "workers.html", principal, here="workers", workers=workers, now=time.time())


@router.get("/docs")
def show_docs(request: Request, principal: auth.reader) -> Response:
    """The API's description, drawn by Swagger UI."""
    return render(request, "docs.html", principal, here="docs", csp=_DOCS_CSP)


@router.get("/login")
def show_login(request: Request, engine: EngineDep, code: str | None = None) -> Response:
    """The form for a key; with a one-time code the session is opened at once."""
    if code is None:
        return render(request, "login.html", None, error=None)
    cookie = auth.redeem(engine, code)
    if cookie is None:
        error = "This login link was used or is too old; `llmprune keys link` prints a new one."
        return render(request, "login.html", None, status=401, error=error)
    return auth.with_session(RedirectResponse("/", 303), request, cookie)


@router.post("/login")
def log_in(request: Request, form: Form, engine: EngineDep) -> Response:
    """Open a session for a key."""
    cookie = auth.open_session(engine, form.get("key", ""))
    if cookie is None:
        return render(request, "login.html", None, status=401, error="This key is not valid here.")
    return auth.with_session(RedirectResponse("/", 303), request, cookie)


@router.post("/logout")
def log_out(request: Request, _: Form, engine: EngineDep) -> Response:
    """Forget the session."""
    auth.close_session(engine, request.cookies.get(auth.COOKIE, ""))
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(auth.COOKIE, path="/", httponly=True, samesite="strict")
    return answer
