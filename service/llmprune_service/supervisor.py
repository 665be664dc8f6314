"""The processes of one host: the API, and one worker a slot, kept alive; and how many slots there are."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import uvicorn

from llmprune_service.database import migrate
from llmprune_service.hardening import forbid_pickle
from llmprune_service.processes import end, signal_group, spawn
from llmprune_service.settings import Settings

log = logging.getLogger(__name__)
_DRAINED = 0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_TICK = 0.2


def serve(settings: Settings, *, workers: bool = True) -> None:
    """Run the API in this process and, beside it, a worker for every slot; returns when told to end."""
    from llmprune_service.api.app import create_app
    from llmprune_service.telemetry import configure_logging

    configure_logging(settings)
    forbid_pickle()
    prepare(settings)
    crew = Crew(settings) if workers else None
    config = uvicorn.Config(
        create_app(settings), host=settings.host, port=settings.port, log_config=None, access_log=False,
        timeout_graceful_shutdown=5, server_header=False, timeout_keep_alive=30,
    )  # fmt: skip
    if crew:
        crew.start()
    try:
        _Server(config).run()
    finally:
        if crew:
            crew.stop()


class _Server(uvicorn.Server):
    """Ends open event streams when it is told to end: their readers come back to the next process."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Streams first, then as usual."""
        self.config.app.state.feed.stop()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def work(settings: Settings, *, slot: int | None = None) -> None:
    """Run the workers of this host, or the one of a slot in this process; returns when told to end, or all are drained."""
    from llmprune_service.telemetry import configure_logging

    configure_logging(settings)
    prepare(settings)
    if slot is not None:
        from llmprune_service.worker import Worker

        Worker(settings, slot=slot, devices=devices(settings)[slot]).run()
        return
    crew = Crew(settings)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    crew.start()
    while not ending.wait(_TICK) and crew.is_alive:
        pass
    crew.stop()


def prepare(settings: Settings) -> None:
    """Directories and a database only this user can read, and the schema."""
    os.umask(0o077)
    for folder in (settings.data_dir, settings.work_dir, settings.hub_dir):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    migrate(settings.url)


def devices(settings: Settings) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each slot: a GPU each, or None for the CPU."""
    gpus = _gpus()
    if not gpus:
        return [None] * (settings.slots or 1)
    slots = settings.slots or len(gpus)
    return [gpus[slot % len(gpus)] for slot in range(slots)]


def _gpus() -> list[str]:
    """The cards nvidia-smi lists, or those CUDA_VISIBLE_DEVICES leaves of them; torch is not asked, it would be loaded."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


class Crew:
    """One worker process a slot; one that dies is started again, with a pause that grows while it keeps dying."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stop = threading.Event()
        # One thread a slot: the kernel ties a worker's life to the thread that started it.
        self._threads = [
            threading.Thread(target=self._keep, args=(slot,), daemon=True) for slot in range(len(devices(settings)))
        ]

    @property
    def is_alive(self) -> bool:
        """Whether any slot is still served."""
        return any(thread.is_alive() for thread in self._threads)

    def start(self) -> None:
        """Start all workers."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """SIGTERM to all; each is killed once its time to finish a block is over."""
        self._stop.set()
        for thread in self._threads:
            thread.join(self._settings.drain_seconds + 15)

    def _keep(self, slot: int) -> None:
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            began = time.monotonic()
            process = spawn(worker_command(slot), env=worker_environment(self._settings))
            while process.poll() is None and not self._stop.wait(_TICK):
                pass
            if self._stop.is_set():
                signal_group(process, signal.SIGTERM)
                end(process, seconds=self._settings.drain_seconds + 10)
                return
            if process.returncode == _DRAINED:
                log.info("worker drained", extra={"slot": slot})
                return
            log.warning("worker died", extra={"slot": slot, "exit_code": process.returncode})
            pause = _FIRST_PAUSE if time.monotonic() - began > _LONGEST_PAUSE else min(2 * pause, _LONGEST_PAUSE)
            self._stop.wait(pause)


def worker_command(slot: int) -> Sequence[str]:
    """The command line of one worker process."""
    return [sys.executable, "-P", "-m", "llmprune", "worker", "--slot", str(slot)]


def worker_environment(settings: Settings) -> dict[str, str]:
    """This environment, with the settings a command line may have changed."""
    changed = {"LLMPRUNE_DATA_DIR": str(settings.data_dir)}
    if settings.slots is not None:
        changed["LLMPRUNE_SLOTS"] = str(settings.slots)
    return {**os.environ, **changed}
