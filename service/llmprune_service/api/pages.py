"""Pages for people: the jobs, one job live, the workers, signing in, the API's description. No inline script or style."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args
from urllib.parse import parse_qsl, urlencode

import sqlalchemy as sa
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.staticfiles import StaticFiles

from llmprune.errors import UserError
from llmprune.methods import METHODS, REFINED, STRUCTURAL
from llmprune_service import tables
from llmprune_service.api import auth
from llmprune_service.api import jobs as api_jobs
from llmprune_service.api.admin import worker_view
from llmprune_service.api.auth import Principal
from llmprune_service.api.deps import EngineDep, FeedDep, JobId, JobsDep
from llmprune_service.api.errors import pointer
from llmprune_service.api.html import FOLDER, PageRoute, render
from llmprune_service.api.page_text import commands, curl, headline, stage_label, target, tiles, verdict
from llmprune_service.jobs import Jobs, Row, view
from llmprune_service.problems import Problem
from llmprune_service.schemas import FINISHED, PHASES, JobRequest, Status

PAGE_SIZE = 50
LOG_SIZE = 100
_FIELDS = ("model", "method", "pattern", "sparsity", "calibration")
_OF_STRUCTURES = {name: method.summary for (_, name), method in STRUCTURAL.items() if name not in METHODS}
_METHODS = {**{method.name: method.summary for method in METHODS.values()}, **REFINED, **_OF_STRUCTURES}
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


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form of another page of ours that were filled in."""
    auth.check_origin(request, needed=True)
    body = (await request.body()).decode(errors="replace")
    return {name: value.strip() for name, value in parse_qsl(body) if value.strip()}


Form = Annotated[dict[str, str], Depends(_form)]


# Jobs -----------------------------------------------------------------------------------------------------------------


@router.get("/")
def list_jobs(
    request: Request, principal: auth.reader, jobs: JobsDep, status: str | None = None, after: str | None = None
) -> Response:
    """The newest jobs, and the form for another one."""
    if status is not None and status not in get_args(Status):
        raise Problem(422, "invalid", f"The status {status!r} is unknown; use one of {', '.join(get_args(Status))}.")
    return _jobs_page(request, principal, jobs, status=status, after=after)


@router.get("/ui/jobs")
def go_to_list(_: auth.reader) -> Response:
    """Where the form is sent to, asked for by its address."""
    return RedirectResponse("/", 303)


@router.post("/ui/jobs")
async def submit_job(request: Request, principal: auth.writer, form: Form, jobs: JobsDep, feed: FeedDep) -> Response:
    """Submit what the form says, as the API does."""
    try:
        body = _read_request(form)
        job = await api_jobs.submit(principal, body, request, jobs, feed, Response())
    except Problem as problem:
        return await run_in_threadpool(_jobs_page, request, principal, jobs, form=form, problem=problem)
    return RedirectResponse(f"/ui/jobs/{job.id}", 303)


def _read_request(form: Mapping[str, str]) -> JobRequest:
    """Raises Problem 422 with an entry for each field that is wrong."""
    try:
        return JobRequest.model_validate({name: form[name] for name in _FIELDS if name in form})
    except ValidationError as error:
        errors = [{"pointer": pointer(item["loc"]), "detail": item["msg"]} for item in error.errors()]
        raise Problem(422, "invalid", "Some fields cannot be used.", errors=errors) from None
    except UserError as error:
        raise Problem(422, "invalid", str(error)) from None


def _jobs_page(
    request: Request,
    principal: Principal,
    jobs: Jobs,
    *,
    status: str | None = None,
    after: str | None = None,
    form: Mapping[str, str] | None = None,
    problem: Problem | None = None,
) -> Response:
    rows, more = jobs.list(principal.sees, limit=PAGE_SIZE, after=after, status=status)
    query = {"status": status, "after": rows[-1].id} if more else {}
    example = {
        "curl": curl(_EXAMPLE, str(request.base_url), auth=jobs.settings.auth),
        "submit": "llmprune submit demo --method wanda --sparsity 0.5",
    }
    answer = render(
        request, "jobs.html", principal, status=problem.status if problem else 200, here="jobs",
        jobs=[_entry(row) for row in rows], now=time.time(), statuses=get_args(Status), chosen=status, after=after,
        next="/?" + urlencode({name: value for name, value in query.items() if value}) if more else None,
        may_write=_may_write(principal),
        methods=_METHODS.items(),
        form={name: (form or {}).get(name, "") for name in _FIELDS}, problem=problem, example=example,
    )  # fmt: skip
    answer.headers.update(problem.headers if problem else {})
    return answer


def _entry(row: Row) -> dict[str, Any]:
    progress = view(row).progress if row.status in ("running", "cancelling") else None
    return {"row": row, "progress": progress, "headline": headline(row.result) if row.result else None}


@router.get("/ui/jobs/{job_id}")
def show_job(request: Request, principal: auth.reader, job_id: JobId, jobs: JobsDep) -> Response:
    """One job: progress, result, files, events, and how to reproduce it."""
    tenant = principal.sees
    row = jobs.get(tenant, job_id)
    events = _newest_events(jobs, job_id)
    finished = row.status in FINISHED
    now = time.time()
    progress = view(row).progress
    elapsed = max(0.0, (row.finished_at or now) - row.started_at) if row.started_at else None
    return render(
        request, "job.html", principal, here="jobs", job=view(row), row=row, target=target(row), finished=finished, now=now,
        phases=_phases(row), stage=stage_label(progress.stage) if progress else None, events=events,
        num_blocks=next((event.data["num_blocks"] for event in events if event.type == "job.block"), None),
        elapsed=elapsed, may_write=_may_write(principal),
        blocks=jobs.blocks(tenant, job_id), artifacts=jobs.artifacts(tenant, job_id), verdict=verdict(row),
        tiles=tiles(row.result) if row.result else [], commands=commands(row, str(request.base_url), auth=jobs.settings.auth),
    )  # fmt: skip


def _newest_events(jobs: Jobs, job_id: str) -> Sequence[Row]:
    """Newest first, without the progress that the bar shows."""
    events = tables.events
    query = sa.select(events).where(events.c.job_id == job_id, events.c.type != "job.progress")
    with jobs.engine.connect() as connection:
        return connection.execute(query.order_by(events.c.seq.desc()).limit(LOG_SIZE)).all()


def _phases(row: Row) -> list[dict[str, str]]:
    """Each phase with its state: done, current, failed, stopped or waiting."""
    at = len(PHASES) if row.status == "succeeded" else PHASES.index(row.phase) if row.phase in PHASES else -1
    here = {"failed": "failed", "cancelled": "stopped", "queued": "waiting"}.get(row.status, "current")
    return [
        {"name": phase, "state": "done" if index < at else here if index == at else "waiting"}
        for index, phase in enumerate(PHASES)
    ]


def _may_write(principal: Principal) -> bool:
    return bool({"write", "admin"} & principal.scopes)


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
