"""Submission without HTTP: a row in the jobs table and its place in the queue, in one transaction of the database."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmprune.errors import ConfigError
from llmprune.spec import PruneConfig
from llmprune_service.client.transport import ApiError, ServiceUnreachable
from llmprune_service.schemas import DEFAULT_PRIORITY, JobRequest, JobWebhook

if TYPE_CHECKING:
    import sqlalchemy as sa


def enqueue(
    database_url: str,
    config: PruneConfig | Mapping[str, Any] | None = None,
    *,
    priority: int = DEFAULT_PRIORITY,
    tenant: str = "default",
    idempotency_key: str | None = None,
    timeout_s: int | None = None,
    metadata: Mapping[str, str] | None = None,
    webhook: JobWebhook | None = None,
) -> str:
    """Queue a job in the service's database, ``sqlite:///FILE`` or ``postgresql://...``; returns its id.

    The worker checks the job again, by its own limits. Who may write the database may submit for any tenant.

    Raises:
        ConfigError: the request makes no sense, or the database is not one of llmprune's.
        ApiError: the queue refuses it: too many jobs, or the key was used for another request.
        ServiceUnreachable: the database does not answer.
    """
    from llmprune_service.engine import Queue
    from llmprune_service.jobs import Jobs
    from llmprune_service.problems import Problem
    from llmprune_service.settings import Settings

    own = {"priority": priority, "timeout_s": timeout_s, "metadata": metadata, "webhook": webhook}
    if isinstance(config, PruneConfig):
        request = JobRequest.build(config, **own)
    else:
        request = JobRequest.build(None, **(config or {}), **own)
    engine = _connect(database_url)
    try:
        queue = Queue(engine)
        row, _ = Jobs(engine, queue, Settings()).submit(tenant, cast(JobRequest, request), idempotency_key=idempotency_key)
        queue.close()
    except Problem as problem:
        raise ApiError(problem.status, problem.code, problem.detail, problem.errors) from None
    finally:
        engine.dispose()
    return str(row.id)


def _connect(url: str) -> sa.Engine:
    """An engine for a database that answers and has the tables of this version."""
    import sqlalchemy as sa

    from llmprune_service.database import at_head, is_sqlite, make_engine

    try:
        if is_sqlite(url) and not Path(sa.make_url(url).database or "").is_file():
            raise ConfigError(f"There is no database {url}; `llmprune migrate` makes it.")
        engine = make_engine(url, pool_size=1)
        name = engine.url.render_as_string(hide_password=True)
        if not at_head(engine):
            raise ConfigError(f"The database {name} has not the tables of this version; run `llmprune migrate`.")
    except sa.exc.ArgumentError:
        raise ConfigError("This is no database URL; give sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME.") from None
    except sa.exc.OperationalError:
        raise ServiceUnreachable(f"The database {name} does not answer. Check its URL.") from None
    return engine
