"""Processes of the tests, forked from one server that has imported what they need: a second or more less for each."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
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


def at(kind: type, **fields: Any) -> Moment:
    """The moment of an event of this kind with these fields."""
    return lambda event: isinstance(event, kind) and all(getattr(event, name) == value for name, value in fields.items())
