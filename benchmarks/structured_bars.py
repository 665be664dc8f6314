"""What structured pruning must reach, and whether it does: computed from the results of the cells and of the timing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.quality_bars import Bar, Check
from benchmarks.quality_results import Result, Results
from benchmarks.structured_variants import RIVALS, SHARES, STANDARD

Row = dict[str, Any]
MOST_OF_SAVING = 0.8
"""Of the share of the blocks' parameters that went, so much of the time has to go too."""
LARGE = 10_000_000
"""Parameters of blocks from which on matrix products take nearly all of the time on a CPU."""
NEAR = 1.1
"""A search that lost so many times as much as what it is held against has to be no better."""
COST_WITHIN = 2.0
"""A factor by which seconds may be off what the plan's formula says, on a machine that does other things as well."""


@dataclass(frozen=True)
class Ratio:
    """One cut of a model at one point, over the dense model: of time, of the blocks' parameters, and of all parameters."""

    row: Row
    dense: Row

    @property
    def time(self) -> float:
        """Of medians."""
        return float(self.row["seconds"] / self.dense["seconds"])

    @property
    def blocks(self) -> float:
        """Of the blocks' parameters."""
        return float(self.row["block_parameters"] / self.dense["block_parameters"])

    @property
    def whole(self) -> float:
        """Of all parameters, the embedding and the head among them."""
        return float(self.row["num_parameters"] / self.dense["num_parameters"])

    @property
    def point(self) -> str:
        """In words."""
        row = self.row
        return f"decode at batch {row['batch_size']}" if row["phase"] == "decode" else f"prefill of {row['num_tokens']} tokens"


def ratios(timing: dict[str, Any]) -> list[Ratio]:
    """Of all cuts that were timed."""
    rows: list[Row] = timing.get("rows", [])
    key = lambda row: (row["model"], row["phase"], row["batch_size"], row["num_tokens"])
    dense = {key(row): row for row in rows if row["cut"] == "dense"}
    return [Ratio(row, dense[key(row)]) for row in rows if row["cut"] != "dense"]


def bars(results: Results, timing: dict[str, Any]) -> list[Bar]:
    """All bars, over the models that have results."""
    return [
        Bar(
            f"{STANDARD} beats {', '.join(RIVALS)} in KL and in perplexity with at least as many parameters removed.",
            tuple(_beats(results, model, share, rival) for model in results.models for share in SHARES for rival in RIVALS),
        ),
        Bar(
            "The best KL of every search falls and never rises on its fixed tokens; the KL beside it is of text it never saw.",
            tuple(_falls(results, model, share) for model in results.models for share in SHARES),
        ),
        Bar(
            f"On a CPU the time of a sliced model falls by {MOST_OF_SAVING:.0%} or more of the share of the blocks' parameters "
            f"that went, where blocks have {LARGE / 1e6:.0f} million or more.",
            tuple(_is_faster(ratio) for ratio in ratios(timing) if ratio.dense["block_parameters"] >= LARGE),
        ),
        Bar(
            f"A generation takes what the plan's formula says within a factor of {COST_WITHIN:g}, and the first supernet has "
            "its bytes.",
            tuple(_costs(results, model, share) for model in results.models for share in SHARES),
        ),
    ]


def removed(found: Result) -> float:
    """The share of the parameters of what can be taken out that is gone."""
    return float(found["structure"]["num_removed"] / found["structure"]["num_removable"])


def _beats(results: Results, model: str, share: str, rival: str) -> Check:
    where = f"{model}, {share}: {STANDARD} against {rival}"
    two = results.measured(model, rival, share)
    known = [found for target in results.grid.targets if (found := results.measured(model, STANDARD, target))]
    enough = [found for found in known if two and removed(found) >= removed(two)]
    if two is None or not enough or results.get(model, STANDARD, share) is None:
        return Check(where, "not measured", None)
    one = min(enough, key=removed)  # another one than was asked for where the rival rounded up
    text = (
        f"KL {one['kl']:.4f} against {two['kl']:.4f}, perplexity {one['perplexity']:.2f} against {two['perplexity']:.2f}, "
        f"removed {removed(one):.2%} against {removed(two):.2%}"
    )
    is_better = one["kl"] < two["kl"] and one["perplexity"] < two["perplexity"]
    return Check(where, text, True if is_better else None if removed(one) > NEAR * removed(two) else False)


def curves(found: Result) -> Iterator[list[float]]:
    """The best KL of every iteration's search, from its start on."""
    for iteration in found["structure"]["iterations"]:
        yield [kl for _, kl in iteration["curve"]]


def _falls(results: Results, model: str, share: str) -> Check:
    where = f"{model}, {share}"
    found = results.measured(model, STANDARD, share)
    if found is None:
        return Check(where, "not measured", None)
    own = list(curves(found))
    steps = ", then ".join(f"{curve[0]:.4f} to {curve[-1]:.4f} in {len(curve) - 1} falls" for curve in own)
    never_rises = all(late < early for curve in own for early, late in pairwise(curve))
    ends_lower = min(curve[-1] for curve in own) < own[0][0]
    return Check(where, f"{steps}; on other text {found['kl']:.4f}", never_rises and ends_lower)


def _is_faster(ratio: Ratio) -> Check:
    where = f"{ratio.row['model']}, {ratio.row['cut']}: {ratio.point}"
    text = f"time x {ratio.time:.2f}, parameters of the blocks x {ratio.blocks:.2f}"
    return Check(where, text, 1 - ratio.time >= MOST_OF_SAVING * (1 - ratio.blocks))


def cost(found: Result) -> tuple[float, float, list[float]] | None:
    """Seconds of a generation in which there was a processor, the mean of all iterations; what the formula says; and bytes of
    every supernet over those that the plan has. None where nothing was searched.
    """
    iterations, plan = found["structure"]["iterations"], found["plan"]
    seconds = [(one["generation_seconds"], one["num_generations"]) for one in iterations if one["generation_seconds"]]
    number = sum(count for _, count in seconds)
    if not number or not plan:
        return None
    bytes_found = [one["supernet_bytes"] for one in iterations]
    ratio = [one / other for one, other in zip(bytes_found, plan["supernet_bytes"], strict=True)]
    mean = found["busy"] * sum(each * count for each, count in seconds) / number
    return mean, plan["generation_tokens"] * plan["forward_seconds"], ratio


def _costs(results: Results, model: str, share: str) -> Check:
    where = f"{model}, {share}"
    found = results.measured(model, STANDARD, share)
    known = cost(found) if found else None
    if known is None:
        return Check(where, "not measured", None)
    seconds, planned, ratio = known
    text = f"{seconds:.1f} s against {planned:.1f} s (x {seconds / planned:.2f}); bytes x " + ", ".join(
        f"{x:.2f}" for x in ratio
    )
    return Check(where, text, 1 / COST_WITHIN <= seconds / planned <= COST_WITHIN and ratio[0] == 1)
