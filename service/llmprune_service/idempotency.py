"""Idempotency-Keys: what a request made before. A key is its tenant's own, and belongs to one request."""

from __future__ import annotations

import hashlib

import sqlalchemy as sa
from pydantic import BaseModel

from llmprune_service.database import now
from llmprune_service.problems import Problem
from llmprune_service.schemas import JobRequest
from llmprune_service.tables import idempotency_keys as keys


def remember(connection: sa.Connection, tenant: str, request: BaseModel, key: str | None, made: str) -> None:
    """Note what a key makes, before anything else: so a repeated request waits here for the one before it.

    Raises:
        IntegrityError: the key made something already.
    """
    if key is not None:
        values = {"tenant": tenant, "key": key, "fingerprint": _fingerprint(request), "job_id": made}
        connection.execute(sa.insert(keys).values(**values, created_at=now(connection)))


def made_by(engine: sa.Engine, tenant: str, request: BaseModel, key: str | None) -> str | None:
    """Id of what this key made before, or None; raises Problem 422 if that was for another request."""
    with engine.connect() as connection:
        used = connection.execute(sa.select(keys).where(keys.c.tenant == tenant, keys.c.key == key)).first()
    if used is None:
        return None
    if used.fingerprint != _fingerprint(request):
        raise Problem(
            422, "idempotency-key-reused", "This Idempotency-Key came with another request. Use a new key for a new one."
        )
    return str(used.job_id)


def forget(connection: sa.Connection, tenant: str, made: str) -> None:
    """Forget the keys of what is deleted."""
    connection.execute(sa.delete(keys).where(keys.c.tenant == tenant, keys.c.job_id == made))


def _fingerprint(request: BaseModel) -> str:
    kind = "" if isinstance(request, JobRequest) else type(request).__name__
    return hashlib.sha256((kind + request.model_dump_json(exclude_unset=True)).encode()).hexdigest()
