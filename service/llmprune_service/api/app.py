"""The application: parts opened and closed with it, and the routes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from sqlalchemy.exc import DBAPIError
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from llmprune import __version__
from llmprune_service import telemetry
from llmprune_service.api import (
    admin,
    artifacts,
    auth,
    catalog,
    compare_page,
    errors,
    events,
    health,
    job_page,
    jobs,
    openapi,
    pages,
    sweep_pages,
    sweeps,
)
from llmprune_service.api.feed import Feed
from llmprune_service.api.guard import Guard
from llmprune_service.api.limits import TokenBuckets
from llmprune_service.api.plan import Planner
from llmprune_service.database import make_engine
from llmprune_service.engine import Queue
from llmprune_service.ids import new_id
from llmprune_service.jobs import Jobs
from llmprune_service.leader import Leader
from llmprune_service.settings import Settings
from llmprune_service.store import Store

log = logging.getLogger(__name__)
_DESCRIPTION = (
    "Prunes Hugging Face language models after training, in jobs that survive crashes. "
    "Errors are `application/problem+json`; times are unix seconds; lists go on with `after=next`."
)
_TAGS = [
    {"name": "jobs", "description": "Submit, watch and steer."},
    {"name": "sweeps", "description": "Many jobs on one model, side by side."},
    {"name": "results", "description": "Reports, files, comparisons."},
    {"name": "webhooks", "description": "Be told instead of asking."},
    {"name": "workers", "description": "Who runs the jobs."},
    {"name": "keys", "description": "Who may."},
    {"name": "health", "description": "Probes and metrics."},
]


class App(FastAPI):
    """FastAPI with the guard around all of it: answers of the framework's own layers pass through it too."""

    def build_middleware_stack(self) -> ASGIApp:
        """The framework's layers inside the guard."""
        return Guard(super().build_middleware_stack(), self.state.settings)

    def openapi(self) -> dict[str, Any]:
        """The document, made once."""
        if not self.openapi_schema:
            self.openapi_schema = openapi.document(self)
        return self.openapi_schema


def create_app(settings: Settings) -> FastAPI:
    """The service's HTTP side; the database must have been migrated."""
    app = App(
        title="llmprune", version=__version__, description=_DESCRIPTION, openapi_tags=_TAGS, docs_url=None, redoc_url=None,
        lifespan=_lifespan, max_body_size=settings.max_body_bytes, telemetry=telemetry.tracing(),
    )  # fmt: skip
    app.state.settings = settings
    app.state.buckets = TokenBuckets(settings.max_submissions_per_minute)
    app.state.planner = Planner(settings)
    errors.install(app)
    for module in (jobs, sweeps, events, artifacts, catalog, admin, health, pages, job_page, compare_page, sweep_pages):
        app.include_router(module.router)
    pages.mount_static(app)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    state = app.state
    state.engine = make_engine(settings.url)
    state.queue = Queue(state.engine)
    state.jobs = Jobs(state.engine, state.queue, settings)
    state.store = Store(settings)
    state.credentials = auth.Credentials(state.engine)
    state.feed = Feed(state.engine, poll_seconds=settings.poll_seconds, max_streams=settings.max_streams)
    if settings.auth:
        await run_in_threadpool(_ensure_key, app)
    leader = Leader(state.jobs, settings, holder=new_id("web"))
    leader.start()
    poller = asyncio.create_task(state.feed.run())
    try:
        yield
    finally:
        poller.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await poller
        await run_in_threadpool(leader.stop)
        state.queue.close()
        state.engine.dispose()


def _ensure_key(app: FastAPI) -> None:
    try:
        auth.ensure_first_key(app.state.engine, app.state.settings)
    except DBAPIError:
        log.warning("the database is away or not migrated: whether there is an API key is unknown")
