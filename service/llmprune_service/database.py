"""The database: one engine for our tables and the job engine's, chosen by one URL, and its migrations."""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from dbos import DBOS
from sqlalchemy import event

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_MS = 30_000
_LOCK = 7236401
# A process that stops in the middle of a transaction must not keep its locks: nobody could take its job over.
_OPTIONS = "-c idle_in_transaction_session_timeout=10s"


def make_engine(url: str, *, pool_size: int = 10) -> sa.Engine:
    """An engine for ``sqlite:///FILE`` or ``postgresql://...``; SQLite is put into write-ahead mode."""
    if is_sqlite(url):
        engine = sa.create_engine(
            url, connect_args={"timeout": _BUSY_MS / 1000, "check_same_thread": False}, pool_size=pool_size
        )
        event.listen(engine, "connect", _configure_sqlite)
        return engine
    parsed = sa.make_url(url).set(drivername="postgresql+psycopg")
    return sa.create_engine(
        parsed,
        pool_pre_ping=True,
        pool_size=pool_size,
        max_overflow=pool_size,
        connect_args={"connect_timeout": 5, "options": _OPTIONS},
    )


def is_sqlite(url: str) -> bool:
    """Whether the URL names a SQLite file."""
    return url.startswith("sqlite")


def _configure_sqlite(connection: Any, _: Any) -> None:
    # Writers take the lock when they begin: one that read first and then had to wait would be refused, not queued.
    connection.isolation_level = "IMMEDIATE"
    for pragma in ("journal_mode=WAL", f"busy_timeout={_BUSY_MS}", "foreign_keys=ON", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def now(bind: sa.Engine | sa.Connection) -> sa.ColumnElement[float]:
    """Unix seconds of the database's clock, so that the clocks of the hosts need not agree."""
    if bind.dialect.name == "sqlite":
        return sa.literal_column("((julianday('now') - 2440587.5) * 86400.0)", sa.Double)
    return sa.literal_column("(extract(epoch from clock_timestamp())::float8)", sa.Double)


def migrate(url: str) -> None:
    """Bring both schemas up to date: the job engine's, then ours. Safe to run from several processes."""
    logging.getLogger("dbos").setLevel(logging.WARNING)
    engine = make_engine(url, pool_size=2)
    try:
        with _alone(engine):
            DBOS.migrate(url)
            config = alembic_config(url)
            with engine.begin() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
    finally:
        engine.dispose()


@contextmanager
def _alone(engine: sa.Engine) -> Iterator[None]:
    """Keep other processes from migrating meanwhile."""
    if engine.dialect.name == "sqlite":  # one host: a file does
        file = Path(f"{engine.url.database}.lock")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        # Not pg_advisory_lock: who waits in it holds a snapshot, and CREATE INDEX CONCURRENTLY waits for that.
        while not connection.scalar(sa.text(f"SELECT pg_try_advisory_lock({_LOCK})")):
            time.sleep(0.1)
        yield


def alembic_config(url: str) -> Config:
    """Alembic's configuration without a file of its own."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def at_head(engine: sa.Engine) -> bool:
    """Whether our schema is the one this version needs."""
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    wanted = ScriptDirectory(str(_MIGRATIONS)).get_current_head()
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision() == wanted
