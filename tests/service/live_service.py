"""A real `llmprune serve` whose jobs are light, and what tests of it ask."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llmprune_service.client import Client, ServiceError


class Served(NamedTuple):
    """A running service."""

    url: str
    port: int
    environment: dict[str, str]


def make_environment(data_dir: Path, python: Path) -> dict[str, str]:
    """Settings of a service whose jobs cost next to nothing."""
    settings = {"data_dir": data_dir, "job_python": python, "poll_seconds": 0.1, "heartbeat_ttl": 5, "disk_floor_bytes": 0}
    return {f"LLMPRUNE_{name.upper()}": str(value) for name, value in settings.items()}


def start(*arguments: object, environment: dict[str, str]) -> subprocess.Popen[str]:
    """An llmprune process with pipes."""
    command = [sys.executable, "-m", "llmprune", *map(str, arguments)]
    return subprocess.Popen(
        command, env={**os.environ, "COLUMNS": "150", **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def processes_of(data_dir: Path) -> list[int]:
    """Processes, but for zombies, that run with this data directory: a service's web, workers and jobs."""
    marker, found = f"LLMPRUNE_DATA_DIR={data_dir}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def until(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """What the condition returns once that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    pytest.fail(f"not within {seconds} seconds: {what}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def is_ready(client: Client) -> bool:
    try:
        client.check()
    except ServiceError:
        return False
    return True
