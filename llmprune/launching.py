"""Starting a command in several processes on this machine, as ``--num-gpus`` does: torchrun's variables, without torch."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llmprune.errors import ConfigError
from llmprune.processes import LAUNCHED, LOST_EXIT_CODE, num_processes, several, what_ended

_GRACE_SECONDS = 15.0
"""How long the others have to end by themselves after one has; they notice when they next talk."""
_KILL_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1


def check_count(count: int | None) -> None:
    """Raise ConfigError where processes that are several already are asked to be another number."""
    if count is not None and several() and count != num_processes():
        raise ConfigError(
            f"--num-gpus starts processes itself, got --num-gpus {count} in one of {num_processes()}. Leave it out under "
            "accelerate launch or torchrun."
        )


def wanted(count: int | None) -> bool:
    """Whether this process is to start others."""
    return count is not None and count > 1 and not several()


def launch(arguments: Sequence[str], count: int) -> tuple[int, str | None]:
    """Run ``python -m llmprune`` with these arguments in ``count`` processes, of which the first has the terminal.

    When one ends by an error, all do. Returns the exit code, and which one died where none of them could say so.
    """
    environment = _environment(count)
    started: list[subprocess.Popen[bytes]] = []
    with _signals_handled():
        try:
            for number in range(count):
                started.append(_start(arguments, {**environment, "RANK": str(number), "LOCAL_RANK": str(number)}))
            ended = _wait(started)
        finally:
            _end(started)
    return _verdict(ended, count)


def _environment(count: int) -> dict[str, str]:
    names = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        LAUNCHED: str(count),
    }
    shared = {"OMP_NUM_THREADS": str(max(1, _num_cores() // count))}
    if any(name == "lo" for _, name in socket.if_nameindex()):
        shared["GLOO_SOCKET_IFNAME"] = "lo"  # the host's own name may lead nowhere
    return shared | os.environ | names


def _start(arguments: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    first = environment["RANK"] == "0"
    before = signal.signal(signal.SIGINT, signal.getsignal(signal.SIGINT) if first else signal.SIG_IGN)  # Ctrl-C is the first's
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "llmprune", *arguments],
            env=environment,
            stdin=None if first else subprocess.DEVNULL,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def _die_with_parent() -> None:
    """A launcher that is killed leaves nobody behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, int]]:
    """Number and exit code of the processes that ended by themselves, in their order."""
    ended: dict[int, int] = {}
    deadline = None
    while len(ended) < len(started) and (deadline is None or time.monotonic() < deadline):
        for number, process in enumerate(started):
            if number not in ended and (code := process.poll()) is not None:
                ended[number] = code
                if code and deadline is None:
                    deadline = time.monotonic() + _GRACE_SECONDS
        time.sleep(0.05)
    return list(ended.items())


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in started:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _KILL_SECONDS
    for process in started:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _verdict(ended: Sequence[tuple[int, int]], count: int) -> tuple[int, str | None]:
    failed = [(number, code) for number, code in ended if code not in (0, LOST_EXIT_CODE)]
    if not failed:
        return (1, None) if any(code for _, code in ended) else (0, None)
    number, code = failed[0]
    if code > 0 and (number == 0 or dict(ended).get(0) == code):
        return code, None  # the first has said why
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    return max(code, 1), what_ended(number, count, how)


@contextmanager
def _signals_handled() -> Iterator[None]:
    """Ctrl-C reaches the first process, which says what is kept: wait for it. SIGTERM ends all."""

    def stop(_number: int, _frame: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    def wait(_number: int, _frame: object) -> None:
        pass  # SIG_IGN would be inherited

    before = signal.signal(signal.SIGINT, wait), signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
