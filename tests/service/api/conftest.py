"""The application on a new SQLite database: in this process, or behind a real server where answers are streamed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import Server, Service
from starlette.testclient import TestClient

from llmprune_service.database import migrate
from llmprune_service.settings import Settings


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database with the schema, to be copied."""
    file = tmp_path_factory.mktemp("migrated") / "llmprune.db"
    migrate(f"sqlite:///{file}")
    return file


@pytest.fixture
def make_settings(tmp_path: Path, migrated: Path) -> Callable[..., Settings]:
    """Settings of a service with a new database; keyword arguments are fields."""

    def make(**fields: Any) -> Settings:
        defaults = {"data_dir": tmp_path / "data", "poll_seconds": 0.05, "disk_floor_bytes": 0, "heartbeat_ttl": 600}
        settings = Settings(**{**defaults, **fields})
        settings.data_dir.mkdir(exist_ok=True)
        if not (settings.data_dir / "llmprune.db").exists():
            shutil.copy(migrated, settings.data_dir / "llmprune.db")
        return settings

    return make


@pytest.fixture
def make_service(make_settings: Callable[..., Settings]) -> Iterator[Callable[..., Service]]:
    """Start the application in this process; keyword arguments are settings."""
    opened: list[TestClient] = []

    def make(**fields: Any) -> Service:
        service = Service(make_settings(**fields))
        opened.append(service.client.__enter__())
        return service

    yield make
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def service(make_service: Callable[..., Service]) -> Service:
    """The application with default settings, and the administrator's key."""
    return make_service()


@pytest.fixture
def make_server(make_settings: Callable[..., Settings]) -> Iterator[Callable[..., Server]]:
    """Start the application behind uvicorn; keyword arguments are settings."""
    started: list[Server] = []

    def make(**fields: Any) -> Server:
        started.append(Server(make_settings(**fields)))
        return started[-1]

    yield make
    for server in started:
        server.stop()


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    """The application behind uvicorn, with default settings."""
    return make_server()
