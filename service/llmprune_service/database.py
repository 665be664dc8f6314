"""The database: one engine for our tables and the job engine's, chosen by one URL, and its migrations."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from dbos import DBOS
from sqlalchemy import event

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_MS = 30_000


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
        parsed, pool_pre_ping=True, pool_size=pool_size, max_overflow=pool_size, connect_args={"connect_timeout": 5}
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
    if is_sqlite(url):
        Path(sa.make_url(url).database or "").parent.mkdir(parents=True, exist_ok=True)
    engine = make_engine(url, pool_size=2)
    try:
        with engine.connect() as lock:
            if lock.dialect.name == "postgresql":  # SQLite's writers queue up by themselves
                lock.execute(sa.text("SELECT pg_advisory_lock(7236401)"))
            logging.getLogger("dbos").setLevel(logging.WARNING)
            DBOS.migrate(url)
            config = alembic_config(url)
            with engine.begin() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
    finally:
        engine.dispose()


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
