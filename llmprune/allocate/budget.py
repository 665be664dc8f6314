"""The budget of zeros: how many exactly, in which units, and how real-valued wishes become whole counts.

A site can hold only multiples of its quantum: one weight where scores compete in the matrix or in a block of columns, one
weight of every row (``out_features`` zeros) where they compete in the row. The unit of the budget is the greatest common
divisor of the quanta, and the budget the multiple of the unit nearest to sparsity times weights: exact to the weight for
``matrix`` and ``block``, to the unit for ``row``. No site (for ``row``, no row) loses its last weight.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from llmprune.errors import ConfigError
from llmprune.spec import Scope

_STEPS = 200  # of a bisection: more than a double has bits
_MAX_TABLE = 1 << 22  # units x sites of the exact search that settles budgets at the bounds


@dataclass(frozen=True)
class Budget:
    """How many zeros there are to share, and what each site can take.

    Attributes:
        sparsity: the target over all sites.
        numels: weights per site.
        quanta: zeros of a site come in multiples of this.
        caps: the most quanta a site can take.
        num_zeros: zeros over all sites.
    """

    sparsity: float
    numels: tuple[int, ...]
    quanta: tuple[int, ...]
    caps: tuple[int, ...]
    num_zeros: int

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, int]], sparsity: float, scope: Scope) -> Budget:
        """The budget of sites of these shapes (out, in).

        Raises:
            ConfigError: more zeros than all sites can take.
        """
        numels = tuple(rows * columns for rows, columns in shapes)
        by_row = scope == "row"
        quanta = tuple(rows if by_row else 1 for rows, _ in shapes)
        caps = tuple(max(0, (columns if by_row else rows * columns) - 1) for rows, columns in shapes)
        unit = math.gcd(*quanta) or 1
        wanted = Fraction(repr(float(sparsity))) * sum(numels)
        num_zeros = unit * math.floor(wanted / unit + Fraction(1, 2))
        most = sum(quantum * cap for quantum, cap in zip(quanta, caps, strict=True))
        if num_zeros > most:
            raise _infeasible(sparsity, most, sum(numels), by_row=by_row)
        return cls(sparsity, numels, quanta, caps, num_zeros)

    @property
    def limits(self) -> tuple[int, ...]:
        """The most zeros of each site."""
        return tuple(quantum * cap for quantum, cap in zip(self.quanta, self.caps, strict=True))

    def shift(self, sparsities: Sequence[float]) -> list[float]:
        """Zeros per site with all sparsities moved by one amount, kept within their bounds, so that the sum is the budget."""
        return self._solve(lambda amount: [one + amount for one in sparsities], -2.0, 2.0)

    def scale(self, densities: Sequence[float]) -> list[float]:
        """Zeros per site with all densities times one factor, at most 1, so that the sum is the budget."""
        positive = [density for density in densities if density > 0]
        if not positive:
            return self.shift([0.0] * len(densities))
        # From where every density is 1 down to where none is left; zeros rise as the logarithm falls.
        high, low = -math.log(min(positive)) + 1, -math.log(max(positive)) - 60
        return self._solve(lambda power: [1 - math.exp(-power) * density for density in densities], -high, -low)

    def _solve(self, sparsities: Callable[[float], list[float]], low: float, high: float) -> list[float]:
        """Bisect the parameter with which the zeros, a rising function of it, are the budget."""

        def zeros(value: float) -> list[float]:
            return [
                min(max(sparsity * numel, 0.0), float(limit))
                for sparsity, numel, limit in zip(sparsities(value), self.numels, self.limits, strict=True)
            ]

        for _ in range(_STEPS):
            middle = (low + high) / 2
            if math.fsum(zeros(middle)) < self.num_zeros:
                low = middle
            else:
                high = middle
        return zeros(high)

    def apportion(self, wishes: Sequence[float]) -> list[int]:
        """Whole counts near the wished zeros, in each site's quanta, whose sum is exactly the budget.

        Each site is rounded with what the ones before it are owed, coarse quanta first, so that what is left at the end is
        less than the finest; that rest is made of the fewest single quanta.

        Raises:
            ConfigError: no counts within the bounds have that sum; names the closest sum that some have.
        """
        counts = [0] * len(wishes)
        owed = 0.0
        for site in sorted(range(len(wishes)), key=lambda site: -self.quanta[site]):
            wish = wishes[site] + owed
            counts[site] = min(max(round(wish / self.quanta[site]), 0), self.caps[site])
            owed = wish - counts[site] * self.quanta[site]
        rest = self.num_zeros - sum(count * quantum for count, quantum in zip(counts, self.quanta, strict=True))
        if rest and not self._settle_(counts, wishes, rest):
            counts = self._exact()
        return [count * quantum for count, quantum in zip(counts, self.quanta, strict=True)]

    def _settle_(self, counts: list[int], wishes: Sequence[float], rest: int) -> bool:
        """Change ``counts`` so that they hold ``rest`` more zeros; False where the bounds are in the way."""
        for step in _moves(sorted(set(self.quanta)), rest):
            sign = 1 if step > 0 else -1
            free = [
                site
                for site, quantum in enumerate(self.quanta)
                if quantum == abs(step) and 0 <= counts[site] + sign <= self.caps[site]
            ]
            if not free:
                return False
            site = max(free, key=lambda site: sign * (wishes[site] - counts[site] * self.quanta[site]) / self.numels[site])
            counts[site] += sign
        return sum(count * quantum for count, quantum in zip(counts, self.quanta, strict=True)) == self.num_zeros

    def _exact(self) -> list[int]:
        """Any counts whose sum is the budget: a subset sum by bit sets, for budgets at the bounds of coarse quanta."""
        unit = math.gcd(*self.quanta)
        top = sum(self.limits) // unit
        if top * len(self.quanta) > _MAX_TABLE * 64:
            raise _infeasible(self.sparsity, self.num_zeros - unit, sum(self.numels), by_row=True)
        reachable = [1]  # bit b of entry i: the first i sites can hold b units
        for quantum, cap in zip(self.quanta, self.caps, strict=True):
            bits = reachable[-1]
            left, chunk = cap, 1
            while left:
                take = min(chunk, left)
                bits |= bits << (take * quantum // unit)
                left, chunk = left - take, chunk * 2
            reachable.append(bits)
        wanted = self.num_zeros // unit
        if not reachable[-1] >> wanted & 1:
            near = min((sum_ for sum_ in range(top + 1) if reachable[-1] >> sum_ & 1), key=lambda sum_: abs(sum_ - wanted))
            raise _infeasible(self.sparsity, near * unit, sum(self.numels), by_row=True)
        counts = [0] * len(self.quanta)
        for site in reversed(range(len(counts))):
            step = self.quanta[site] // unit
            counts[site] = next(
                count
                for count in range(self.caps[site] + 1)
                if wanted >= count * step and reachable[site] >> (wanted - count * step) & 1
            )
            wanted -= counts[site] * step
        return counts


def _moves(quanta: Sequence[int], rest: int) -> list[int]:
    """The fewest quanta, added or taken away, that sum to ``rest``, a multiple of their greatest common divisor."""
    steps = [sign * quantum for quantum in quanta for sign in (1, -1)]
    bound = abs(rest) + 2 * max(quanta)
    came_by = {0: 0}
    queue = deque([0])
    while queue and rest not in came_by:
        at = queue.popleft()
        for step in steps:
            if abs(at + step) <= bound and at + step not in came_by:
                came_by[at + step] = step
                queue.append(at + step)
    moves = []
    while rest:
        moves.append(came_by[rest])
        rest -= came_by[rest]
    return moves


def _infeasible(sparsity: float, closest: int, numel: int, *, by_row: bool) -> ConfigError:
    what = "row of every matrix" if by_row else "matrix"
    return ConfigError(
        f"sparsity {sparsity:g} cannot be met exactly: each {what} keeps at least one weight, and zeros come in whole weights. "
        f"The closest feasible one is {closest / numel:.6g}; use it, another --scope, or --allocation uniform."
    )
