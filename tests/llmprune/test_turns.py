"""Functions that take turns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest

from llmprune.turns import Turns

Wait = Callable[[str], None]


def test_each_runs_to_its_next_wait_in_order() -> None:
    """One at a time, in the order of the list, whatever each has left to do; results are theirs."""
    seen: list[tuple[int, int]] = []

    def work(number: int, wait: Wait) -> int:
        for step in range(number + 1):
            seen.append((number, step))
            wait(f"{number}.{step}")
        return 10 * number

    with Turns([partial(work, number) for number in range(3)]) as turns:
        assert turns.go_on() == ["0.0", "1.0", "2.0"]
        assert turns.go_on() == [None, "1.1", "2.1"]
        assert turns.go_on() == [None, None, "2.2"]
        assert turns.go_on() == [None, None, None]
        assert [turns.take(number) for number in range(3)] == [0, 10, 20]
    assert seen == [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1), (2, 2)]


def test_an_error_is_raised_where_it_went_on_and_the_others_are_left() -> None:
    """Those that wait unwind; no thread remains."""
    unwound = []

    def work(number: int, wait: Wait) -> None:
        try:
            wait("first")
            if number == 1:
                raise KeyError("second")
            wait("third")
        finally:
            unwound.append(number)

    before = threading.active_count()
    with Turns([partial(work, number) for number in range(3)]) as turns:
        turns.go_on()
        with pytest.raises(KeyError, match="second"):
            turns.go_on()
    assert sorted(unwound) == [0, 1, 2] and threading.active_count() == before


def test_what_never_began_is_left_too() -> None:
    """Nothing to end."""
    with Turns([lambda wait: wait("x")]):
        pass
