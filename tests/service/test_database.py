"""The schema: migrations from several processes at once, and tables as the code sees them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from llmprune_service import tables
from llmprune_service.database import alembic_config, at_head, make_engine, migrate
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


def test_an_upgrade_keeps_what_is_there(tmp_path: Path) -> None:
    """A job of the first release, with all that belongs to it, is an ordinary job of this one."""
    url = f"sqlite:///{tmp_path / 'old.db'}"
    config = alembic_config(url)
    engine = make_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        old = sa.MetaData()
        old.reflect(connection, only=["jobs", "events"])
        job = {"id": "job_1", "tenant": "default", "status": "queued", "model": "demo", "method": "wanda", "sparsity": 0.5}
        more = {"pattern": "2:4", "config": {}, "priority": 5, "timeout_s": 60, "metadata": {}, "retries": {}}
        connection.execute(sa.insert(old.tables["jobs"]).values(**job, **more, created_at=1.0, updated_at=1.0))
        event = {"job_id": "job_1", "seq": 1, "type": "job.queued", "data": {}, "created_at": 1.0}
        connection.execute(sa.insert(old.tables["events"]).values(event))
    migrate(url)
    with engine.connect() as connection:
        (row,) = connection.execute(sa.select(tables.jobs)).all()
        assert (row.id, row.kind, row.sweep_id) == ("job_1", "prune", None)
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.events)) == 1
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
