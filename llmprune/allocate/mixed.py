"""A pattern for every site: which of a few n:m patterns, or dense, so that the measured distortions sum to the least.

The sparsity of a curve's point says which pattern it is (:meth:`llmprune.spec.PruneConfig.choices`), so a choice is a
sparsity. U units of the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from llmprune.allocate.dp import groups_of, minimize
from llmprune.allocate.evolution import Ladder
from llmprune.errors import ConfigError

if TYPE_CHECKING:
    from llmprune.allocate import SiteFacts

MAX_MISS = 0.01
"""A target is refused where the closest sparsity above it is farther away than this."""
SLACK = 0.001
"""Sums that are above the target by up to this are as good as the closest one, and may distort less."""
_MAX_UNITS = 1 << 18


@dataclass(frozen=True)
class Menu:
    """What the groups of sites can choose from.

    Attributes:
        members: indices of the sites of each group.
        sparsities: of each group's choices, rising.
        zeros: of each group's choices, over all its members.
        low, high: the zeros of all groups together have to be within; ``low`` is the closest feasible sum not below the target.
    """

    members: tuple[tuple[int, ...], ...]
    sparsities: tuple[tuple[float, ...], ...]
    zeros: tuple[tuple[int, ...], ...]
    low: int
    high: int
    _unit: int

    @classmethod
    def of(cls, sites: Sequence[SiteFacts], sparsity: float) -> Menu:
        """The menu of sites whose curves' sparsities are their choices.

        Raises:
            ConfigError: no choice is at the target or at most one percent of the weights above it; names the closest one.
        """
        members = tuple(tuple(indices) for indices in groups_of(sites).values())
        sparsities = tuple(tuple(level for level, _ in sites[indices[0]].curve) for indices in members)
        zeros = tuple(
            tuple(sum(round(level * sites[index].numel) for index in indices) for level in levels)
            for indices, levels in zip(members, sparsities, strict=True)
        )
        numel = sum(site.numel for site in sites)
        unit = math.gcd(*(count for counts in zeros for count in counts)) or 1
        # Where shapes share no large factor, coarser units: whole ones, so that a sum can only be above what it counts.
        unit = max(unit, -(-sum(counts[-1] for counts in zeros) // _MAX_UNITS))
        wanted = math.ceil(Fraction(repr(float(sparsity))) * numel / unit)
        reachable = 1  # bit b: some choice has b units
        for counts in zeros:
            bits = 0
            for count in {count // unit for count in counts}:
                bits |= reachable << count
            reachable = bits
        above, below = reachable >> wanted, reachable & ((1 << wanted) - 1)
        least = wanted + (above & -above).bit_length() - 1 if above else None
        if least is None or (least - wanted) * unit > MAX_MISS * numel:
            near = [sum_ for sum_ in (least, below.bit_length() - 1 if below else None) if sum_ is not None]
            closest = min(near, key=lambda sum_: abs(sum_ - wanted)) * unit / numel
            raise ConfigError(
                f"pattern 'mixed' cannot reach sparsity {sparsity:g}: matrices take whole patterns, and those whose inputs no "
                f"pattern divides stay dense. The closest feasible one is {closest:.6g}; use it, or the unstructured pattern."
            )
        return cls(members, sparsities, zeros, least * unit, max(least * unit, int((wanted * unit) + SLACK * numel)), unit)

    def ladder(self, sites: Sequence[SiteFacts]) -> Ladder:
        """The choices as the rungs of a ladder, which starts at those with the least sum of distortions."""
        counts = tuple(
            tuple(tuple(round(level * sites[index].numel) for index in indices) for level in levels)
            for indices, levels in zip(self.members, self.sparsities, strict=True)
        )
        start = tuple(self.choose(sites))
        total = sum(counts[level] for counts, level in zip(self.zeros, start, strict=True))
        return Ladder(self.members, counts, start, self.low, max(self.high, total), repeats=False)

    def choose(self, sites: Sequence[SiteFacts]) -> list[int]:
        """The choice of each group with the least sum of distortions."""
        options = [
            [(count // self._unit, cost) for count, (_, cost) in zip(counts, sites[indices[0]].curve, strict=True)]
            for counts, indices in zip(self.zeros, self.members, strict=True)
        ]
        units = minimize(options, self.low // self._unit, self.high // self._unit)
        return [
            min((number for number, (count, _) in enumerate(group) if count == one), key=lambda number: group[number][1])
            for group, one in zip(options, units, strict=True)
        ]
