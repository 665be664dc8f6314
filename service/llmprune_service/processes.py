"""Child processes that cannot outlive their parent, and their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

_KILL_AFTER = 5.0
_POLL = 0.05


def spawn(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    memory_bytes: int | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own; the kernel kills it when the calling THREAD's process dies.

    The calling thread must live as long as the child: the kernel watches the thread that started it.
    """
    launcher = [sys.executable, "-I", str(Path(__file__).with_name("child.py")), str(os.getpid()), str(memory_bytes or 0)]
    return subprocess.Popen(
        [*launcher, *command], env=dict(env), cwd=cwd, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
        start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[bytes], *, seconds: float = _KILL_AFTER) -> None:
    """SIGTERM to the group, SIGKILL after ``seconds``; returns when it is gone."""
    signal_group(process, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    signal_group(process, signal.SIGKILL)
    process.wait()


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal the child and everything it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def read_lines(stream: IO[bytes], handle: Callable[[bytes], None]) -> threading.Thread:
    """Hand every line of a pipe to ``handle`` on a thread, so that the child never waits for its reader."""

    def read() -> None:
        with suppress(ValueError):  # closed under us
            for line in stream:
                handle(line)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Look until it holds; False after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True
