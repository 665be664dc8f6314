"""Fixtures of the service's tests: databases, and a fleet of workers whose jobs are light."""

from __future__ import annotations

import signal
import sqlite3
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import light_child
import psycopg
import pytest
from fleet import Fleet
from live_service import Served, free_port, is_ready, make_environment, processes_of, start, until
from pages_kit import Pages, serving

from llmprune_service.client import Client
from llmprune_service.database import migrate
from postgres_server import Postgres, find_binaries


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL of the tests' own."""
    if find_binaries() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    server = Postgres()
    with psycopg.connect(server.url(), autocommit=True) as connection:
        # Some tests crash the server, never the machine: a commit must reach the operating system, not the disk.
        connection.execute("ALTER ROLE tester SET synchronous_commit = on")
    yield server
    server.destroy()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A new SQLite database with the schema."""
    url = f"sqlite:///{tmp_path / 'llmprune.db'}"
    migrate(url)
    return url


@pytest.fixture(scope="session")
def used_postgres_url(postgres_server: Postgres) -> str:
    """The one database that tests use in turn: the thousand files of each new one take longer than most tests."""
    url = postgres_server.create("used")
    migrate(url)
    return url


@pytest.fixture
def postgres_url(used_postgres_url: str) -> str:
    """A PostgreSQL database with the schema, empty and left by all."""
    with psycopg.connect(used_postgres_url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'used' AND pid <> pg_backend_pid()"
        )
        tables = connection.execute(
            "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname IN ('public', 'dbos')"
            " AND tablename NOT IN ('alembic_version', 'dbos_migrations')"
        ).fetchall()
        connection.execute(f"TRUNCATE {', '.join(name for (name,) in tables)} RESTART IDENTITY".encode())
    return used_postgres_url


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A new database with the schema, of each kind."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def database_away(database_url: str, request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[None]]:
    """Take the database away for as long as a block lasts: PostgreSQL crashes, SQLite is locked by another process."""

    @contextmanager
    def sqlite() -> Iterator[None]:
        connection = sqlite3.connect(database_url.removeprefix("sqlite:///"), isolation_level=None, timeout=30)
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.rollback()
        connection.close()

    @contextmanager
    def postgres() -> Iterator[None]:
        server: Postgres = request.getfixturevalue("postgres_server")
        server.stop("immediate")
        yield
        server.start()

    return sqlite if database_url.startswith("sqlite") else postgres


@pytest.fixture(scope="session")
def light_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands in for the Python of the jobs: a second of theirs costs next to nothing."""
    script = tmp_path_factory.mktemp("python") / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{light_child.__file__}" "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def make_fleet(tmp_path: Path, database_url: str, light_python: Path) -> Iterator[Callable[..., Fleet]]:
    """Hosts of a service on each kind of database, by name; further arguments are settings."""
    with ExitStack() as stack:

        def make(name: str = "host", **environment: object) -> Fleet:
            fleet = Fleet(tmp_path / name, database_url, **{"job_python": light_python, **environment})
            stack.callback(fleet.close)
            return fleet

        yield make


@pytest.fixture(scope="module")
def sqlite_standing(tmp_path_factory: pytest.TempPathFactory, light_python: Path) -> Iterator[Fleet]:
    """Two workers on SQLite that the tests of a module share: those that disturb nobody."""
    folder = tmp_path_factory.mktemp("sqlite")
    url = f"sqlite:///{folder / 'llmprune.db'}"
    migrate(url)
    yield from _stand(folder, url, light_python)


@pytest.fixture(scope="module")
def postgres_standing(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres, light_python: Path
) -> Iterator[Fleet]:
    """Two workers on PostgreSQL, as above."""
    url = postgres_server.create(f"test_{uuid.uuid4().hex}")
    migrate(url)
    yield from _stand(tmp_path_factory.mktemp("postgres"), url, light_python)


@pytest.fixture(params=["sqlite", "postgres"])
def standing(request: pytest.FixtureRequest) -> Fleet:
    """Two idle workers on each kind of database, shared by the tests of a module."""
    fleet: Fleet = request.getfixturevalue(f"{request.param}_standing")
    return fleet


def _stand(folder: Path, url: str, python: Path) -> Iterator[Fleet]:
    fleet = Fleet(folder / "host", url, job_python=python)
    fleet.start(2)
    yield fleet
    fleet.close()


@pytest.fixture
def fleet(make_fleet: Callable[..., Fleet]) -> Fleet:
    """The one host most tests need, without workers yet."""
    return make_fleet()


@pytest.fixture
def pages(tmp_path: Path) -> Iterator[Pages]:
    """Without keys: everybody is the administrator."""
    with serving(tmp_path, allowed_hosts=("testserver",)) as found:
        yield found


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Pages]:
    """With keys, and nobody signed in."""
    with serving(tmp_path, auth=True, allowed_hosts=("testserver",)) as found:
        yield found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, light_python: Path) -> Iterator[Served]:
    """`llmprune serve` with one worker."""
    data_dir, port = tmp_path_factory.mktemp("served"), free_port()
    environment = make_environment(data_dir, light_python)
    process = start("serve", "--port", port, environment=environment)
    url = f"http://127.0.0.1:{port}"
    with Client(url, "prn_none", patience=0) as client:
        until(lambda: process.poll() is not None or is_ready(client), "the service is ready")
    yield Served(url, port, environment)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert processes_of(data_dir) == []
    assert f"Serving {url}" in errors and f"API key of the first start: {data_dir}/admin.key" in errors


@pytest.fixture
def here(served: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """Commands of this process find the service and its key."""
    for name, value in {**served.environment, "LLMPRUNE_URL": served.url, "COLUMNS": "150"}.items():
        monkeypatch.setenv(name, value)
    return served
