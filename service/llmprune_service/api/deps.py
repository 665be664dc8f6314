"""What routes ask for: the parts of the application, and checked parameters."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, cast

import sqlalchemy as sa
from fastapi import Depends, Path, Query, Request
from pydantic import AfterValidator

from llmprune_service.api.feed import Feed
from llmprune_service.ids import JOB_ID, SWEEP_ID
from llmprune_service.jobs import Jobs
from llmprune_service.problems import not_found
from llmprune_service.settings import Settings
from llmprune_service.store import Store
from llmprune_service.sweeps import Sweeps


async def _jobs(request: Request) -> Jobs:
    return cast(Jobs, request.app.state.jobs)


async def _sweeps(request: Request) -> Sweeps:
    return Sweeps(request.app.state.jobs)


async def _engine(request: Request) -> sa.Engine:
    return cast(sa.Engine, request.app.state.engine)


async def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


async def _store(request: Request) -> Store:
    return cast(Store, request.app.state.store)


async def _feed(request: Request) -> Feed:
    return cast(Feed, request.app.state.feed)


async def _until_sent() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


def _job_id(value: str | None) -> str | None:
    """An id we did not make is not found, whatever it looks like."""
    if value is not None and not JOB_ID.fullmatch(value):
        raise not_found("job")
    return value


def _sweep_id(value: str | None) -> str | None:
    if value is not None and not SWEEP_ID.fullmatch(value):
        raise not_found("sweep")
    return value


def _file_name(value: str) -> str:
    """No file has a name that the database cannot even look for."""
    if "\x00" in value:
        raise not_found("artifact")
    return value


JobsDep = Annotated[Jobs, Depends(_jobs)]
SweepsDep = Annotated[Sweeps, Depends(_sweeps)]
EngineDep = Annotated[sa.Engine, Depends(_engine)]
SettingsDep = Annotated[Settings, Depends(_settings)]
StoreDep = Annotated[Store, Depends(_store)]
FeedDep = Annotated[Feed, Depends(_feed)]
# Closes what a route opened for its answer once the answer is sent, or the client is gone.
UntilSent = Annotated[AsyncExitStack, Depends(_until_sent)]

_ID_SCHEMA = {"pattern": f"^{JOB_ID.pattern}$"}
JobId = Annotated[str, AfterValidator(_job_id), Path(description="Id of the job.", json_schema_extra=_ID_SCHEMA)]
AfterId = Annotated[str | None, AfterValidator(_job_id), Query(description="`next` of the page before.")]
_SWEEP_SCHEMA = {"pattern": f"^{SWEEP_ID.pattern}$"}
SweepId = Annotated[str, AfterValidator(_sweep_id), Path(description="Id of the sweep.", json_schema_extra=_SWEEP_SCHEMA)]
AfterSweepId = Annotated[str | None, AfterValidator(_sweep_id), Query(description="`next` of the page before.")]
SweepFilter = Annotated[str | None, AfterValidator(_sweep_id), Query(description="Jobs of the sweep with this id.")]
FileName = Annotated[str, AfterValidator(_file_name), Path(description="As the list of files has it.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Entries of a page.")]
WaitSeconds = Annotated[float, Query(ge=0, le=60, description="Hold the answer for so many seconds at most.")]
