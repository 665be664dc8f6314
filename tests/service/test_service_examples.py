"""The service's guide is complete and right, and its examples run: over HTTP with the real library, and in plain SQL."""

from __future__ import annotations

import base64
import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmprune.cli import app, with_plugins
from llmprune_service.api.app import create_app
from llmprune_service.client import Client, ServiceError, SweepClient
from llmprune_service.database import make_engine
from llmprune_service.engine import Queue
from llmprune_service.jobs import Jobs
from llmprune_service.settings import Settings
from llmprune_service.webhooks import sign
from postgres_server import find_binaries

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SOURCES = sorted((ROOT / "service" / "llmprune_service").rglob("*.py"))
GUIDE = (ROOT / "docs" / "service.md").read_text()
METHODS = [
    (kind, name)
    for kind in (Client, SweepClient)
    for name, value in vars(kind).items()
    if inspect.isfunction(value) and not name.startswith("_")
]
COMMANDS = with_plugins().registered_commands[len(app.registered_commands) :]


@pytest.mark.parametrize("field", Settings.model_fields)
def test_every_setting_is_in_the_guide(field: str) -> None:
    """By the name of its variable."""
    assert f"| `LLMPRUNE_{field.upper()}` |" in GUIDE


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_every_method_of_the_client_is_in_the_guide(kind: type, name: str) -> None:
    """In the table, and with a docstring."""
    assert (f"`{name}`" if kind is Client else f"`sweeps.{name}`") in GUIDE
    assert getattr(kind, name).__doc__


def test_every_command_and_event_is_in_the_guide() -> None:
    """Commands by their whole name; events are those the code writes."""
    names = [str(command.name or (command.callback and command.callback.__name__)) for command in COMMANDS]
    assert {"serve", "worker", "submit", "submit-auto", "quickstart", "migrate", "hub-token"} == set(names)
    of_groups = (
        "jobs list",
        "jobs show",
        "jobs events",
        "jobs report",
        "jobs download",
        "jobs cancel",
        "sweeps submit",
        "sweeps list",
        "sweeps show",
        "sweeps extend",
        "keys create",
        "keys link",
    )
    for name in (*names, *of_groups):
        assert f"llmprune {name}" in GUIDE
    written = set(re.findall(r'"(job\.[a-z]+)"', "".join(file.read_text() for file in SOURCES))) - {"job.html"}
    assert len(written) == 14
    for event in written:
        assert f"`{event}`" in GUIDE


def test_every_route_is_in_the_guide(tmp_path: Path) -> None:
    """The paths of the OpenAPI document, by their last words."""
    paths = create_app(Settings(data_dir=tmp_path)).openapi()["paths"]
    assert len(paths) > 20
    for path in paths:
        last = path.removesuffix("/{name}").removesuffix("/{job_id}").removesuffix("/{key_id}").removesuffix("/{webhook_id}")
        last = last.removesuffix("/{sweep_id}")
        assert last.rpartition("/")[2] in GUIDE, path


def test_the_verification_of_the_guide_accepts_what_is_signed_and_nothing_else() -> None:
    """The snippet as it stands there, against the service's own signatures."""
    (snippet,) = re.findall(r"```python\n(import base64.*?)```", GUIDE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    secret, old = ("whsec_" + base64.b64encode(bytes([number] * 32)).decode() for number in (1, 2))
    headers = sign([old, secret], "msg_1", int(time.time()), b"{}")
    assert names["verify"](secret, headers, b"{}") and names["verify"](old, headers, b"{}")
    assert not names["verify"](secret, headers, b"{ }")
    assert not names["verify"]("whsec_" + base64.b64encode(b"x" * 32).decode(), headers, b"{}")
    assert not names["verify"](secret, sign([secret], "msg_1", int(time.time()) - 600, b"{}"), b"{}")


def test_submission_over_http(tmp_path: Path) -> None:
    """A service, its worker, a job of the library, and its checkpoint."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    environment = {**os.environ, "LLMPRUNE_URL": url, "LLMPRUNE_DATA_DIR": str(tmp_path / "data"), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "llmprune", "serve", "--port", url.rpartition(":")[2]]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as service:
        try:
            wait_for(url)
            example = [sys.executable, EXAMPLES / "submit_over_http.py"]
            done = subprocess.run(example, env=environment, capture_output=True, text=True, timeout=200)
        finally:
            service.send_signal(signal.SIGTERM)
    assert done.returncode == 0, done.stderr
    assert "block 5: 50%" in done.stdout
    assert "perplexity" in done.stdout
    folder = Path(done.stdout.rpartition("checkpoint in ")[2].strip())
    assert {"config.json", "model.safetensors", "report.html"} <= {file.name for file in folder.iterdir()}


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    with Client(url, "prn_none", patience=0) as client:
        while time.monotonic() < deadline:
            try:
                client.check()
                return
            except ServiceError:
                time.sleep(0.1)
    pytest.fail("the service did not start")


def test_submission_in_sql(postgres_url: str) -> None:
    """psql queues a job once, however often it is run, and sees what becomes of it."""
    binaries = find_binaries()
    assert binaries is not None
    command = [binaries / "psql", postgres_url, "-v", "ON_ERROR_STOP=1", "-f", EXAMPLES / "submit_from_psql.sql"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        assert "job.queued" in done.stdout
    engine = make_engine(postgres_url)
    queue = Queue(engine)
    (row,), more = Jobs(engine, queue, Settings()).list("default", metadata={"team": "nlp"})
    queued = queue.active([f"{row.id}.1"])
    queue.close()
    engine.dispose()
    assert (row.status, row.priority, row.config["num_samples"], more) == ("queued", 7, 16, False)
    assert queued == {f"{row.id}.1"}
