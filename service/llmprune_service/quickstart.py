"""``llmprune quickstart``: the whole way once: start the service, submit, watch, report, download, and leave it up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console

from llmprune_service import ports
from llmprune_service.cli import database, login_link
from llmprune_service.client import Client, ServiceError
from llmprune_service.follow import check_out, fetch, follow, require_success, show_report
from llmprune_service.processes import end, spawn
from llmprune_service.settings import Settings

_HOST = "127.0.0.1"
_READY_SECONDS = 120.0
_TAIL_LINES = 15
_console = Console(stderr=True, soft_wrap=True, highlight=False)


def main(fields: dict[str, Any], settings: Settings, *, out: Path | None, once: bool) -> None:
    """Prune by a service on this host, its own or one that runs already; all it started ends with it.

    Raises:
        JobEnded: the job failed or was cancelled.
    """
    if out is not None:
        check_out(out)
    signal.signal(signal.SIGTERM, _interrupt)
    with ExitStack() as stack:
        try:
            url, process = _find_or_start(settings, stack)
            _do(url, fields, out, settings)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        if process is not None and once:
            return
        print(f"In a browser {_link(url, settings)}", flush=True)
        if process is None:
            return
        _console.print(f"The service stays up at {url} - Ctrl-C stops it", markup=False)
        with suppress(KeyboardInterrupt):
            process.wait()
            _fail(settings, process)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _find_or_start(settings: Settings, stack: ExitStack) -> tuple[str, subprocess.Popen[bytes] | None]:
    """The URL of a ready service, and its process if it is ours."""
    url = f"http://{_HOST}:{settings.port}"
    if settings.port and _is_ours(url, settings):
        _console.print(f"Using the service at {url}", markup=False)
        return url, None
    if settings.port == 0 or not ports.is_free(_HOST, settings.port):
        port = ports.find_free(_HOST)
        if settings.port:
            _console.print(f"Port {settings.port} is taken: the service listens on {port}", markup=False)
        url = f"http://{_HOST}:{port}"
    with database(settings):
        pass  # its errors are said here, not in a log
    process = _start(settings, url)
    stack.callback(end, process, seconds=settings.drain_seconds + 20)
    with _console.status("Starting the service"):
        _wait_until_ready(settings, url, process)
    return url, process


def _key(settings: Settings) -> str | None:
    """This host's own key, rather than one of the environment that may be another service's."""
    return settings.key_file.read_text() if settings.key_file.exists() else None


def _is_ours(url: str, settings: Settings) -> bool:
    """Whether a service that knows this host's key answers there."""
    with Client(url, _key(settings), timeout=5, patience=0) as client:
        try:
            client.check()
            next(client.list(), None)
        except ServiceError:
            return False
    return True


def _start(settings: Settings, url: str) -> subprocess.Popen[bytes]:
    port = url.rpartition(":")[2]
    command = [sys.executable, "-P", "-m", "llmprune", "serve", "--host", _HOST, "--port", port]
    with _log_file(settings).open("wb") as log:
        return spawn(command, env=os.environ, stdout=log, stderr=log)


def _log_file(settings: Settings) -> Path:
    return settings.data_dir / "service.log"


def _wait_until_ready(settings: Settings, url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    with Client(url, timeout=5, patience=0) as client:
        while True:
            try:
                client.check()
                return
            except ServiceError:
                if process.poll() is not None or time.monotonic() > deadline:
                    _fail(settings, process)
            time.sleep(0.2)


def _fail(settings: Settings, process: subprocess.Popen[bytes]) -> NoReturn:
    """Show the end of the log, and raise ServiceError."""
    log = _log_file(settings)
    for line in log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]:
        _console.print(line, style="dim", markup=False)
    how = "did not get ready" if process.poll() is None else f"ended with exit code {process.returncode}"
    raise ServiceError(f"The service {how}; its log is {log}.")


def _do(url: str, fields: dict[str, Any], out: Path | None, settings: Settings) -> None:
    """The job, from its submission to its files."""
    with Client(url, _key(settings)) as client:
        job = client.submit(**fields)
        _console.print(f"Submitted {job.id}. To watch it in a browser: {_link(url, settings)}", markup=False)
        try:
            ended = follow(client, job.id)
        except KeyboardInterrupt:
            with suppress(ServiceError):
                client.cancel(job.id)
                _console.print(f"Cancelled. `llmprune jobs resume {job.id}` goes on with it.", markup=False)
            raise
        require_success(ended)
        if out is not None:
            fetch(client, job.id, out)
        show_report(client.report(job.id), out)
    if out is not None:
        print(f"Report page  {(out / 'report.html').resolve()}")


def _link(url: str, settings: Settings) -> str:
    """Into the pages, once and within ten minutes."""
    with database(settings) as engine:
        return login_link(engine, settings, url)
