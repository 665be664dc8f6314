"""Timing with a clock that obeys: turns, budgets, quartiles, and a benchmark whose ratios are known beforehand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.measure.bandwidth import cache_bytes, copy_bandwidth
from llmprune.measure.timing import MIN_ROUNDS, Run, quartiles, seconds_of, take_turns

CPU = torch.device("cpu")


class Clock:
    """Stands still but for what the runs add."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, seconds: float, reset: float = 0.0) -> Run:
        """A run that takes so long, after a reset that takes so long."""

        def work() -> None:
            self.order.append(name)
            self.now += seconds

        def before() -> None:
            self.now += reset

        return Run(work, before)


def test_reset_is_not_timed() -> None:
    """Only the run itself counts."""
    clock = Clock()
    assert seconds_of(clock.run("a", 2.0, reset=5.0), CPU, clock) == 2.0
    assert clock.now == 7.0


def test_runs_take_turns_and_every_other_round_is_backwards() -> None:
    """a b, b a, a b ...: a machine that slows down steadily hits both alike."""
    clock = Clock()
    runs = [clock.run("a", 1.0), clock.run("b", 3.0)]
    times = take_turns(runs, repeats=4, seconds=1e9, limit=1e9, device=CPU, clock=clock)
    assert clock.order == list("abbaabba")
    assert times == [[1.0] * 4, [3.0] * 4]


@pytest.mark.parametrize(
    ("seconds", "limit", "rounds"), [(100, 100, 10), (4.5, 100, 5), (0, 100, MIN_ROUNDS), (0, 1.5, 2), (-1, -1, 1)]
)
def test_rounds_end_with_the_time(seconds: float, limit: float, rounds: int) -> None:
    """At most ``repeats``; beyond its own share three rounds; beyond everyone's limit the one that is under way."""
    clock = Clock()
    (times,) = take_turns([clock.run("a", 1.0)], repeats=10, seconds=seconds, limit=limit, device=CPU, clock=clock)
    assert len(times) == rounds


def test_quartiles_of_known_numbers() -> None:
    """Inclusive quartiles; of one number that number."""
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


@given(st.lists(st.floats(min_value=1e-6, max_value=1e6), min_size=1, max_size=30))
def test_quartiles_are_ordered_and_within_the_range(values: list[float]) -> None:
    """Never below the smallest or above the largest value."""
    low, median, high = quartiles(values)
    slack = 1e-9 * max(values)
    assert min(values) - slack <= low <= median + slack
    assert median <= high + slack
    assert high <= max(values) + slack


def test_copy_bandwidth_counts_both_ways() -> None:
    """Bytes read and written, over the median time."""
    ticks = iter(range(1000))
    assert copy_bandwidth(CPU, num_bytes=1 << 20, clock=lambda: float(next(ticks))) == pytest.approx(2 * (1 << 20) / 1e9)


def test_copy_bandwidth_for_real() -> None:
    """A plausible number comes out on this machine too."""
    assert 0.01 < copy_bandwidth(CPU, num_bytes=1 << 22) < 1e5
    assert cache_bytes(CPU) > 0
