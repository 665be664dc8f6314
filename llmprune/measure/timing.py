"""Timing that a noisy machine cannot bias: what is compared takes turns, medians and quartiles are kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Clock = Callable[[], float]
MIN_ROUNDS = 3
"""Rounds that are timed even where they take longer than their share of the time, if they keep within the limit."""


@dataclass(frozen=True)
class Run:
    """Something to time: ``reset`` brings back the state it starts from and is not timed."""

    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None


def seconds_of(run: Run, device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Wall time of one run, the device's work included."""
    run.reset()
    synchronize(device)
    begun = clock()
    run.run()
    synchronize(device)
    return clock() - begun


def take_turns(
    runs: Sequence[Run],
    *,
    repeats: int,
    seconds: float,
    limit: float,
    device: torch.device,
    clock: Clock = time.perf_counter,
) -> list[list[float]]:
    """Times of each run, warmed up by the caller, in rounds of one run each, every other round backwards.

    Stops after ``repeats`` rounds; after MIN_ROUNDS once ``seconds`` are over; after any once ``limit`` is.
    """
    times: list[list[float]] = [[] for _ in runs]
    begun = clock()
    for number in range(repeats):
        spent = clock() - begun
        if number and spent >= (seconds if number >= MIN_ROUNDS else limit):
            break
        order = range(len(runs)) if number % 2 == 0 else reversed(range(len(runs)))
        for index in order:
            times[index].append(seconds_of(runs[index], device, clock))
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile, all within the range of the values."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
