"""What llmprune must reach beside llm-compressor, and whether it does: computed from the results alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.quality_bars import Bar, Check
from benchmarks.quality_results import NOISE, Estimate

Results = dict[str, Any]
Cell = dict[str, Any]

PEER = "llm-compressor"
OURS = "llmprune"
FROM_DISK = f"{OURS}, from disk"
ONE_PASS = f"{OURS}, one-pass"
DENSE = f"{OURS}, dense statistics, from disk"
WALKS = (OURS, FROM_DISK, ONE_PASS, DENSE)
TIME_AT_MOST, MEMORY_AT_MOST = 0.5, 0.6
WHOLE = ("import", "load", "prune", "save")
PRUNING = ("prune",)


@dataclass(frozen=True)
class Cost:
    """Of one contestant in one cell, over its runs: each a median, its least and its greatest.

    ``peak`` is the largest resident set of the process, ``above`` how far that lies above what was resident when the libraries
    had been imported.
    """

    wall: tuple[float, float, float]
    cpu: tuple[float, float, float]
    peak: tuple[float, float, float]
    above: tuple[float, float, float]

    @classmethod
    def of(cls, runs: list[dict[str, Any]], phases: tuple[str, ...]) -> Cost:
        """Summed over phases; peaks are the largest of them."""
        total = lambda key: _spread([sum(run[phase][key] for phase in phases) for run in runs])
        peak = _spread([max(run[phase]["peak_bytes"] for phase in phases) for run in runs])
        above = _spread([max(run[phase]["peak_bytes"] for phase in phases) - run["import"]["end_bytes"] for run in runs])
        return cls(total("seconds"), total("cpu_seconds"), peak, above)


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def cells(results: Results, *, is_trained: bool | None = None, contestant: str = PEER) -> Iterator[tuple[str, str, str, Cell]]:
    """Model, method, target and what was found, in the order measured; of trained or of random models alone if asked, and of
    those that a contestant took part in.
    """
    for key, cell in results["cells"].items():
        model, method, target = key.split("/")
        if is_trained in (None, results["models"][model]["is_trained"]) and contestant in cell["contestants"]:
            yield model, method, target, cell


def ratio(cell: Cell, name: str, phases: tuple[str, ...], what: Callable[[Cost], tuple[float, float, float]]) -> float:
    """Of the medians of a contestant and of the peer."""
    ours, theirs = (what(Cost.of(cell["contestants"][who]["runs"], phases))[0] for who in (name, PEER))
    return ours / theirs


def change(cell: Cell, name: str, key: str) -> Estimate:
    """How much larger a contestant's loss (``losses``) or divergence (``kls``) is than the peer's, window by window."""
    ours, theirs = (cell["contestants"][who]["quality"][key] for who in (name, PEER))
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return Estimate(statistics.fmean(differences), error)


def bars(results: Results) -> list[Bar]:
    """All bars. Time and memory are of the random models, which are large enough for them; losses are of all."""
    found = []
    for name in WALKS:
        found += [
            Bar(f"{name}: wall time of the pruning at most {TIME_AT_MOST} x {PEER}'s.", _times(results, name, PRUNING)),
            Bar(f"{name}: peak memory of the process at most {MEMORY_AT_MOST} x {PEER}'s.", _peaks(results, name)),
            Bar(f"{name}: perplexity no worse than {PEER}'s.", _losses(results, name)),
        ]
    return [bar for bar in found if bar.checks]


def _times(results: Results, name: str, phases: tuple[str, ...]) -> tuple[Check, ...]:
    checks = []
    for model, method, target, cell in cells(results, is_trained=False, contestant=name):
        wall, cpu = ratio(cell, name, phases, lambda cost: cost.wall), ratio(cell, name, phases, lambda cost: cost.cpu)
        found = f"wall x {wall:.2f}, processor x {cpu:.2f}"
        checks.append(Check(f"{model}, {method}, {target}", found, max(wall, cpu) <= TIME_AT_MOST))
    return tuple(checks)


def _peaks(results: Results, name: str) -> tuple[Check, ...]:
    checks = []
    for model, method, target, cell in cells(results, is_trained=False, contestant=name):
        peak, above = ratio(cell, name, WHOLE, lambda cost: cost.peak), ratio(cell, name, WHOLE, lambda cost: cost.above)
        found = f"x {peak:.2f}; above the imported libraries x {above:.2f}"
        checks.append(Check(f"{model}, {method}, {target}", found, peak <= MEMORY_AT_MOST))
    return tuple(checks)


def _losses(results: Results, name: str) -> tuple[Check, ...]:
    checks = []
    for model, method, target, cell in cells(results, contestant=name):
        is_trained = results["models"][model]["is_trained"]
        found = change(cell, name, "losses" if is_trained else "kls")
        text = f"{found.mean:+.5f} ± {found.error:.5f} nats" + ("" if is_trained else " of KL, as weights are random")
        checks.append(Check(f"{model}, {method}, {target}", text, not found.is_above_zero))
    return tuple(checks)


NOTE = f"No worse is: not larger by more than {NOISE:g} standard errors of the mean difference on the same windows."
