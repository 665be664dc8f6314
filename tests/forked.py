"""Processes of the tests, forked from one server that has imported what they need: a second or more less for each."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmprune.events import Event, parse_event

Moment = Callable[[Event], bool]

PROCESSES = multiprocessing.get_context("forkserver")
# One list for all: there is one server, and who sets the list last before it starts decides what it holds.
PROCESSES.set_forkserver_preload(["llmprune.api", "llmprune.cli", "llmprune_service.worker"])


def command(argv: list[str], before: Callable[[], None] | None = None) -> None:
    """The command line, in silence, after ``before``."""
    from llmprune.cli import main

    gc.freeze()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    if before:
        before()
    sys.argv = ["llmprune", *argv]
    main()


def run(
    argv: list[str], until: Moment | None = None, *, delay: float = 0, before: Callable[[], None] | None = None
) -> tuple[int, list[Event]]:
    """Run a job in a process, SIGKILLed ``delay`` seconds after the event that ``until`` knows: exit code and events.

    ``before`` is called in the process, for what it is to meet.
    """
    log = Path(argv[argv.index("--events") + 1])
    log.unlink(missing_ok=True)
    log.touch()
    process = PROCESSES.Process(target=command, args=(argv, before))
    process.start()
    if until:
        with log.open() as stream:
            line = ""
            while process.is_alive() and not (line.endswith("\n") and until(parse_event(line))):
                line = ("" if line.endswith("\n") else line) + stream.readline()
                time.sleep(0 if line.endswith("\n") else 0.002)
        time.sleep(delay)
        process.kill()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode, [parse_event(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


def one_of(rank: int, size: int, store: str, work: Callable[[], None], before: Callable[[], None] | None) -> None:
    """Do the work as one of several processes that share a store, with what it says in a file beside that."""
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in names.items()}, GLOO_SOCKET_IFNAME="lo")
    gc.freeze()
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    with Path(f"{store}.{rank}").open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if before:
        before()
    work()


def run_several(
    size: int,
    store: Path,
    work: Callable[[], None],
    *,
    before: Mapping[int, Callable[[], None]] = MappingProxyType({}),
    seconds: float = 300,
) -> list[int | None]:
    """The work in several processes, some of which do something ``before``; their exit codes, None for one without an end."""
    started = [
        PROCESSES.Process(target=one_of, args=(rank, size, str(store), work, before.get(rank)), daemon=True)
        for rank in range(size)
    ]
    for process in started:
        process.start()
    deadline = time.monotonic() + seconds
    for process in started:
        process.join(max(deadline - time.monotonic(), 0))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes


def die_while_writing(name: str) -> None:
    """Have this process killed when the files of a record of this name are there, and the record is not."""
    from llmprune.io import journal

    inner = journal.write_durably

    def write(file: Path, content: bytes) -> None:
        if file.parent.name == f".tmp-{name}":
            os.kill(os.getpid(), signal.SIGKILL)
        inner(file, content)

    journal.write_durably = write


def at(kind: type, **fields: Any) -> Moment:
    """The moment of an event of this kind with these fields."""
    return lambda event: isinstance(event, kind) and all(getattr(event, name) == value for name, value in fields.items())
