"""Probes and metrics."""

from __future__ import annotations

import shutil

import sqlalchemy as sa
from fastapi import APIRouter, Response

from llmprune_service import database
from llmprune_service.api import auth, metrics
from llmprune_service.api.deps import EngineDep, SettingsDep
from llmprune_service.api.openapi import ANY, problems
from llmprune_service.api.views import Alive, Ready
from llmprune_service.problems import Problem

router = APIRouter(tags=["health"])
_RETRY = {"Retry-After": "10"}


@router.get("/v2/health/live", include_in_schema=False)
@router.get("/health", include_in_schema=False)
@router.get("/healthz", summary="Liveness", responses=ANY)
async def live() -> Alive:
    """Of this process alone: the database is not asked. Needs no key."""
    return Alive()


@router.get("/v2/health/ready", include_in_schema=False)
@router.get("/readyz", summary="Readiness", responses=ANY)
def ready(engine: EngineDep, settings: SettingsDep) -> Ready:
    """The database answers, its schema is this version's, and the disk has room. Needs no key."""
    with engine.connect() as connection:
        connection.execute(sa.select(1))
    if not database.at_head(engine):
        raise Problem(503, "schema", "The database's schema is another version's; start `llmprune serve` once.", headers=_RETRY)
    if shutil.disk_usage(settings.data_dir).free < settings.disk_floor_bytes:
        raise Problem(503, "disk-full", "The disk of the data directory is nearly full.", headers=_RETRY)
    return Ready()


@router.get(
    "/metrics", summary="Prometheus metrics", response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **ANY, **problems(401, 403)},
)  # fmt: skip
def prometheus(_: auth.admin, engine: EngineDep, settings: SettingsDep) -> Response:
    """Of the whole service; needs an administrator's key."""
    return Response(metrics.render(engine, settings), media_type=metrics.MEDIA_TYPE)
