"""Functions that take turns, each in a thread of its own: one of them runs at a time, and the caller says which.

So a function can be left waiting in the middle of somebody else's code, such as the forward of a model, until others have come
as far. Nothing depends on time: what runs next is the caller's word alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Generic, TypeVar

A = TypeVar("A")
W = TypeVar("W")


class _Left(BaseException):
    """Nobody will let this function go on: what it holds is to be let go."""


class Turn(Generic[W, A]):
    """One function: ``work(wait)`` runs until it calls ``wait(what)``, which returns when it is its turn again."""

    def __init__(self, work: Callable[[Callable[[W], None]], A]) -> None:
        self._work = work
        self._thread = threading.Thread(target=self._run, name="llmprune-turn", daemon=True)
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._runs = self._ended = self._left = False
        self._waits_for: W | None = None
        self._result: list[A] = []
        self._error: BaseException | None = None

    def go_on(self) -> W | None:
        """Run it until it waits, and return what for; None where it has ended. What it raises is raised here."""
        self._runs = True
        if self._thread.ident is None:
            self._thread.start()
        elif not self._ended:
            self._go.release()
        self._stop()
        if self._error is not None:
            raise self._error
        return self._waits_for

    def take(self) -> A:
        """What it returned, which is let go here."""
        return self._result.pop()

    def leave(self) -> None:
        """End it where it waits."""
        if self._thread.ident is None:
            return
        if self._runs:  # an interrupt came while it was at work
            self._stop()
        if not self._ended:
            self._left = True
            self._go.release()
        self._thread.join()

    def _stop(self) -> None:
        if not self._ended:
            self._stopped.acquire()
        self._runs = False

    def _run(self) -> None:
        try:
            self._result.append(self._work(self._wait))
        except _Left:
            pass
        except BaseException as error:  # the caller's to handle
            self._error = error
        finally:
            self._waits_for, self._ended = None, True
            self._stopped.release()

    def _wait(self, what: W) -> None:
        self._waits_for = what
        self._stopped.release()
        self._go.acquire()
        if self._left:
            raise _Left


class Turns(Generic[W, A]):
    """Several of them; those that have not ended are left at the end of the ``with``."""

    def __init__(self, works: Sequence[Callable[[Callable[[W], None]], A]]) -> None:
        self._turns = [Turn(work) for work in works]

    def go_on(self) -> list[W | None]:
        """Let each in turn run until it waits: what for, None of those that have ended."""
        return [turn.go_on() for turn in self._turns]

    def take(self, number: int) -> A:
        """What one of them returned, which is let go here."""
        return self._turns[number].take()

    def __enter__(self) -> Turns[W, A]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for turn in self._turns:
            turn.leave()
