"""The least sum of measured distortions under a budget of zeros, by exact dynamic programming in integer units
(after Xu et al. 2023, arXiv 2308.10438, section 3). U units of the budget, L options of a group.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llmprune.allocate import SiteFacts
    from llmprune.allocate.budget import Budget

NUM_UNITS = 8192
"""Units the weights of all sites are divided into, at least; the more groups, the more."""
_MIN_UNITS_A_GROUP = 32
_TINY = 1e-12

Option = tuple[int, float]
"""(units of zeros, distortion)."""


def zeros(sites: Sequence[SiteFacts], budget: Budget) -> list[float]:
    """Zeros per site; the sites of a group share one sparsity.

    Every whole number of units within a group's measured sparsities is an option; its distortion is read off the measured
    curve, whose logarithm is interpolated linearly. The units differ from the budget's own by less than a unit a group;
    that rest is shared by all sites.
    """
    groups = groups_of(sites)
    numels = [sum(sites[index].numel for index in members) for members in groups.values()]
    curves = [sites[members[0]].curve for members in groups.values()]
    unit = sum(numels) / max(NUM_UNITS, _MIN_UNITS_A_GROUP * len(groups))
    options = [options_of(curve, numel, unit) for curve, numel in zip(curves, numels, strict=True)]
    total = round(budget.num_zeros / unit)
    total = min(max(total, sum(one[0][0] for one in options)), sum(one[-1][0] for one in options))
    chosen = minimize(options, total)
    sparsities = [0.0] * len(sites)
    for members, numel, units in zip(groups.values(), numels, chosen, strict=True):
        for index in members:
            sparsities[index] = units * unit / numel
    return budget.shift(sparsities)


def groups_of(sites: Sequence[SiteFacts]) -> dict[str, list[int]]:
    """The indices of the sites of every group, in order."""
    groups: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        groups.setdefault(site.group or site.name, []).append(index)
    return groups


def options_of(curve: Sequence[tuple[float, float]], numel: int, unit: float) -> list[Option]:
    """Every whole number of units within the curve's sparsities, with its distortion; distortions never fall."""
    first, last = curve[0][0] * numel / unit, curve[-1][0] * numel / unit
    low = math.ceil(first - 1e-9)
    high = max(math.floor(last + 1e-9), low)
    return [(units, distortion(curve, units * unit / numel)) for units in range(low, high + 1)]


def distortion(curve: Sequence[tuple[float, float]], sparsity: float) -> float:
    """The curve at a sparsity: measured points joined by straight lines in the logarithm, after a running maximum."""
    xs = [x for x, _ in curve]
    ys: list[float] = []
    for _, y in curve:
        ys.append(max(y, ys[-1] if ys else 0.0))
    after = min(max(bisect.bisect_left(xs, sparsity), 1), len(xs) - 1)
    if len(xs) == 1 or sparsity <= xs[0]:
        return ys[0]
    if sparsity >= xs[-1]:
        return ys[-1]
    part = (sparsity - xs[after - 1]) / (xs[after] - xs[after - 1])
    before, behind = math.log(ys[after - 1] + _TINY), math.log(ys[after] + _TINY)
    return max(0.0, math.exp(before + part * (behind - before)) - _TINY)


def minimize(options: Sequence[Sequence[Option]], total: int, most: int | None = None) -> list[int]:
    """One option of every group, their units summing to ``total`` exactly (to ``total`` and up to ``most``), with the least
    sum of distortions.

    best_i[u] = min over options (v, d) of group i of best_(i-1)[u - v] + d: every combination is covered, whatever the
    shape of the curves. O(groups * units * options), each option a vector operation.

    Raises ValueError where no choice has such a sum.
    """
    lowest = [min(units for units, _ in group) for group in options]
    room = (total if most is None else most) - sum(lowest)
    small = torch.int8 if max(map(len, options), default=0) < 128 else torch.int32
    infinite = float("inf")
    if room < 0:
        raise ValueError("no options sum to the total")
    best_U = torch.full((room + 1,), infinite, dtype=torch.float64)
    best_U[0] = 0.0
    choices = []
    for group, low in zip(options, lowest, strict=True):
        next_U = torch.full_like(best_U, infinite)
        choice_U = torch.full((room + 1,), -1, dtype=small)
        for number, (units, cost) in enumerate(group):
            extra = units - low
            if extra > room:
                continue
            reached_U = best_U[: room + 1 - extra] + cost
            better_U = reached_U < next_U[extra:]
            next_U[extra:][better_U] = reached_U[better_U]
            choice_U[extra:][better_U] = number
        best_U = next_U
        choices.append(choice_U)
    least = max(total - sum(lowest), 0)
    room = least + int(best_U[least:].argmin())
    if not math.isfinite(float(best_U[room])):
        raise ValueError("no options sum to the total")
    chosen = []
    for group, low, choice_U in zip(reversed(options), reversed(lowest), reversed(choices), strict=True):
        units = group[int(choice_U[room])][0]
        chosen.append(units)
        room -= units - low
    return chosen[::-1]
