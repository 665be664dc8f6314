"""The schema: migrations from several processes at once, and tables as the code sees them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from llmprune_service import tables
from llmprune_service.database import at_head, make_engine, migrate
from postgres_server import Postgres


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_several_processes_migrate_an_empty_database_at_once(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Web and workers start together; a second time changes nothing."""
    if kind == "sqlite":
        url = f"sqlite:///{tmp_path / 'deep' / 'new.db'}"
    else:
        server: Postgres = request.getfixturevalue("postgres_server")
        url = server.create("migrated_at_once")
    code = f"from llmprune_service.database import migrate; migrate({url!r})"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0, 0, 0, 0]
    migrate(url)
    engine = make_engine(url)
    assert at_head(engine)
    engine.dispose()


def test_the_migrations_make_the_tables_the_code_sees(database_url: str) -> None:
    """On both databases: no column, index or constraint differs."""
    engine = make_engine(database_url)
    with engine.connect() as connection:
        ours = set(tables.metadata.tables)
        context = MigrationContext.configure(
            connection,
            opts={"include_object": lambda item, name, kind, *_: kind != "table" or name in ours, "compare_type": True},
        )
        assert compare_metadata(context, tables.metadata) == []
        assert ours <= set(sa.inspect(connection).get_table_names())
    engine.dispose()


def test_sqlite_is_durable_and_waits_its_turn(sqlite_url: str) -> None:
    """Write-ahead log, a sync at each commit, and foreign keys that are obeyed."""
    engine = make_engine(sqlite_url)
    with engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    engine.dispose()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
