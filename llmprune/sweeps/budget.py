"""What is held against a budget: measured quantities, which bounds they break, and by how much. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from llmprune.io.render import number, percent, size, small, times
from llmprune.report import Quality, Report
from llmprune.speed import MIN_CLEAR, Speed, overlap, point_of
from llmprune.sweep_spec import SpeedOf

QUANTITIES = {
    "max_perplexity_increase": "perplexity_increase",
    "max_kl": "kl",
    "min_speedup": "speedup",
    "max_size": "size",
}
"""What each budget bounds."""
QUALITY = ("max_perplexity_increase", "max_kl")
LABELS = {"perplexity_increase": "perplexity", "kl": "KL", "speedup": "speed", "size": "size"}


def measured_of(report: Report, speed_of: SpeedOf) -> dict[str, float]:
    """The quantities of a job: quality of the worst text, bytes of the weights, and speed as far as it is beyond doubt."""
    values = {key: max(found) for key, found in _of_texts(report.quality).items()}
    if report.checkpoint_bytes is not None:
        values["size"] = float(report.checkpoint_bytes)
    speedup = _speedup(report, speed_of)
    return values if speedup is None else {**values, "speedup": speedup}


def unseen_of(whole: Report, part: Report) -> dict[str, float]:
    """The quality on the windows of ``whole`` that are not those of ``part``, the same weights measured on the first windows
    alone: means over tokens, so that one is the other's rest. Empty where there are no others.
    """
    rests = []
    for all_of_it, first in zip(whole.quality, part.quality, strict=True):
        total, seen = all_of_it.text.num_sequences, first.text.num_sequences
        if total <= seen:
            return {}
        rests.append(_rest(all_of_it, first, total, seen))
    return {key: max(found) for key, found in _of_texts(rests).items()}


def _rest(whole: Quality, first: Quality, total: int, seen: int) -> Quality:
    def mean(one: float, other: float) -> float:
        return (total * one - seen * other) / (total - seen)

    def perplexity(one: float | None, other: float | None) -> float | None:
        if one is None or other is None:
            return None
        return math.exp(mean(math.log(one), math.log(other))) if math.isfinite(one) and math.isfinite(other) else math.inf

    return whole.model_copy(
        update={
            "perplexity_dense": perplexity(whole.perplexity_dense, first.perplexity_dense),
            "perplexity_pruned": perplexity(whole.perplexity_pruned, first.perplexity_pruned),
            "kl": None if whole.kl is None or first.kl is None else mean(whole.kl, first.kl),
        }
    )


def _of_texts(quality: Sequence[Quality]) -> dict[str, list[float]]:
    """Perplexity increases and KLs; what is not a number is infinite."""
    found = {
        "perplexity_increase": [item.ratio - 1 for item in quality if item.ratio is not None],
        "kl": [item.kl for item in quality if item.kl is not None],
    }
    return {key: [math.inf if math.isnan(value) else value for value in values] for key, values in found.items() if values}


def _speedup(report: Report, phase: SpeedOf) -> float | None:
    """Measured on this device: of the packed model where it was benchmarked, else of smaller matrices. 1 for what is within the
    spread of the runs, and for zeros in dense tensors, whose arithmetic is the same.
    """
    pairs: list[tuple[Speed, Speed]]
    if report.benchmark:
        pairs = [(pair.dense, pair.packed) for pair in report.benchmark.pairs]
    elif report.latency:
        others = {point_of(speed): speed for speed in report.latency.dense}
        pairs = [(others[point_of(one)], one) for one in report.latency.pruned if point_of(one) in others]
    else:
        return None
    of_phase = [pair for pair in pairs if pair[1].phase == phase]
    if not of_phase:
        return None
    if not report.benchmark and not report.structure:
        return 1.0
    dense, pruned = min(of_phase, key=lambda pair: (pair[1].batch_size, -pair[1].num_tokens))
    return pruned.tokens_per_second / dense.tokens_per_second if _clear(dense, pruned) else 1.0


def _clear(dense: Speed, pruned: Speed) -> bool:
    return min(dense.repeats, pruned.repeats) >= MIN_CLEAR and not overlap(dense, pruned)


def missed(budgets: Mapping[str, float], values: Mapping[str, float]) -> tuple[str, ...]:
    """The budgets that are broken; what was not measured breaks its own."""
    return tuple(name for name, bound in budgets.items() if not _meets(name, bound, values.get(QUANTITIES[name], math.nan)))


def _meets(name: str, bound: float, value: float) -> bool:
    return value >= bound if name.startswith("min_") else value <= bound


def excess(budgets: Mapping[str, float], values: Mapping[str, float]) -> float:
    """How far from the budget: the largest of the quantities' shares of their bounds, at most 1 where all are met."""
    shares = [0.0]
    for name, bound in budgets.items():
        value = values.get(QUANTITIES[name], math.nan)
        if not math.isfinite(value):
            return math.inf
        over, under = (bound, value) if name.startswith("min_") else (value, bound)
        shares.append(over / under if under > 0 else (math.inf if over > under else 0.0))
    return max(shares)


def in_words(budgets: Mapping[str, float], values: Mapping[str, float]) -> str:
    """Each bounded quantity beside its bound: ``perplexity +4.81 % (at most +5.00 %)``."""
    return ", ".join(
        f"{LABELS[QUANTITIES[name]]} {quantity_text(name, values.get(QUANTITIES[name]))} "
        f"({'at least' if name.startswith('min_') else 'at most'} {quantity_text(name, bound)})"
        for name, bound in budgets.items()
    )


def quantity_text(budget: str, value: float | None) -> str:
    """What a budget bounds, with its unit."""
    if value is None or not math.isfinite(value):
        return number(value)
    match QUANTITIES[budget]:
        case "perplexity_increase":
            return f"{'+' if value >= 0 else ''}{percent(value)}"
        case "kl":
            return small(value)
        case "speedup":
            return times(value)
    return size(round(value))


def option(name: str) -> str:
    """A budget as it is given on the command line."""
    return f"--{name.replace('_', '-')}"
