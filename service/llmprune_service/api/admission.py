"""Whether a submission is taken: what it asks for, who may have the model, and the room it needs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import anyio
from fastapi import Header

from llmprune_service import hub, policy
from llmprune_service.problems import Problem
from llmprune_service.schemas import AutoRequest, JobRequest, SweepRequest
from llmprune_service.settings import Settings
from llmprune_service.tokens import hub_token

# Hub requests may take seconds each: they must not occupy the threads that serve everything else.
submitting = anyio.CapacityLimiter(16)

IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$", description="Repeating it makes no second one."),
]


def resolve(body: JobRequest, tenant: str, settings: Settings) -> hub.Resolved:
    """Check what a tenant asks for, and pin the model's commit."""
    policy.check(body, settings)
    hub.check_texts((body.calibration_source(), *body.eval_sources()), settings)
    return hub.resolve(body.model, body.revision, token=hub_token(settings, tenant), settings=settings)


def resolve_auto(body: AutoRequest, tenant: str, settings: Settings) -> hub.Resolved:
    """The same for a search: each kind of job that it may try."""
    policy.check_auto(body, settings)
    with pointing_into(body):
        return resolve(body.jobs()[0], tenant, settings)


@contextmanager
def pointing_into(request: SweepRequest | AutoRequest) -> Iterator[None]:
    """Problems of a job as those of the request that it is made from."""
    try:
        yield
    except Problem as problem:
        errors = [{**error, "pointer": policy.pointer_into(request, error["pointer"])} for error in problem.errors]
        raise Problem(problem.status, problem.code, problem.detail, errors=errors, headers=problem.headers) from None


def bytes_needed(resolved: hub.Resolved, *, there: bool = False, checkpoints: int = 1) -> int:
    """The download (a model on this disk, or one that another job brings, is ``there``), finished blocks, and checkpoints."""
    return resolved.weights_bytes * (checkpoints + (1 if there or resolved.revision is None else 2))


def check_disk(settings: Settings, needed: int) -> None:
    """Raise Problem 507 where the jobs cannot be held; whether a worker on another host can, that one finds out."""
    free = shutil.disk_usage(settings.data_dir).free - settings.disk_floor_bytes
    if free < (needed if settings.database_url is None else 0):
        raise Problem(
            507, "disk-full", f"This needs {needed / 1e9:.1f} GB of disk, {max(free, 0) / 1e9:.1f} GB are to be had. Delete "
            "finished jobs, or try again later.", headers={"Retry-After": "300"},
        )  # fmt: skip
