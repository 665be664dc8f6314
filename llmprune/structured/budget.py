"""Budgets of structured pruning: how much goes, counted in integers, and which allocations of groups meet it.

Three budgets (Týr-the-Pruner, arXiv 2503.09657, has the first): ``kinds`` gives attention, FFN and experts a number of groups
each, which is met exactly; ``parameters`` is one for all modules, in weights and biases; ``latency`` one for all modules in
seconds, rounded to a thousandth of the cheapest group. What is shared by modules of unequal groups cannot be met exactly: at
least the target goes, and at most the cheapest step of the iteration more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

from llmprune.allocate.dp import minimize
from llmprune.allocate.evolution import Ladder, Levels
from llmprune.errors import ConfigError
from llmprune.structured.levels import Grouped, Trade, budget_of, centres, quantum_of, step_of, trade_of, trades_of

BudgetName = Literal["kinds", "parameters", "latency"]
MAX_UNITS = 1 << 17
"""Units that dynamic programming divides a shared budget into, at most."""
_LATENCY_PARTS = 1000


class Sized(Grouped, Protocol):
    """A module whose groups have parameters."""

    @property
    def name(self) -> str:
        """Path in the model."""

    @property
    def parameters_per_group(self) -> int:
        """What goes with one group."""


@dataclass(frozen=True)
class Budget:
    """How many groups go from modules, together.

    Attributes:
        modules: whom it is for.
        units: what one group of each module counts; 1 where every kind has a budget of its own.
        target: units that go from all of them together, exactly or at least.
        sparsity: the share they are of all units, as asked.
    """

    name: BudgetName
    modules: tuple[Sized, ...]
    units: tuple[int, ...]
    target: int
    sparsity: float

    @classmethod
    def of(
        cls, modules: Sequence[Sized], sparsity: float, name: BudgetName = "kinds", costs: Mapping[str, float] | None = None
    ) -> Budget:
        """The budget of removing this share of the modules' groups, parameters or seconds.

        Args:
            modules: at least one; those that are left whole are not among them, and count for nothing.
            costs: seconds of one group of each module by name, for ``latency`` and only for it.

        Raises:
            ConfigError: there is nothing to remove, no share of it is meant, or more than can go.
        """
        assert (costs is not None) == (name == "latency")
        if not modules:
            raise ConfigError("no module of this model can be pruned: every attention and FFN is left whole.")
        if not 0 <= sparsity <= 1:
            raise ConfigError(f"structured pruning removes a share between 0 and 1, got {sparsity}: all that can go is 1.")
        if name == "kinds":
            target = 0
            for indices in trades_of(modules).values():
                members = [modules[index] for index in indices]
                target += _possible(budget_of(members, sparsity), members, (1,) * len(members), sparsity)
            return cls(name, tuple(modules), (1,) * len(modules), target, sparsity)
        units = [module.parameters_per_group for module in modules] if costs is None else _quantised(modules, costs)
        total = sum(unit * module.num_groups for unit, module in zip(units, modules, strict=True))
        # repr: 0.3 means three tenths, not the float a little below them.
        target = _possible(math.ceil(Fraction(repr(float(sparsity))) * total), modules, units, sparsity)
        return cls(name, tuple(modules), tuple(units), target, sparsity)

    @property
    def shared(self) -> bool:
        """Whether attention and FFN have one budget."""
        return self.name != "kinds"

    def removed(self, counts: Sequence[int]) -> int:
        """Units that go with so many groups of each module."""
        return sum(count * unit for count, unit in zip(counts, self.units, strict=True))

    def bounds(self, iteration: int) -> tuple[int, int]:
        """The least and the most units that may go when the levels are this iteration's."""
        if not self.shared:
            return self.target, self.target
        steps = {trade: step_of(members, iteration) for trade, members in self._trades()}
        slack = min(unit * steps[trade_of(module)] for unit, module in zip(self.units, self.modules, strict=True) if unit)
        return self.target, self.target + slack

    def centre(self) -> list[int]:
        """Groups that go from each module where all give the same share."""
        return self.fit(centres(self.modules, self.sparsity), 1)

    def fit(self, counts: Sequence[int], iteration: int) -> list[int]:
        """These counts, moved into the bounds of an iteration by as few quanta as it takes: more goes where a quantum is
        cheapest, less where it is dearest, from the module that has lost the least, or the most, of itself.
        """
        counts, (low, high) = list(counts), self.bounds(iteration)
        if not self.shared:
            assert self.removed(counts) == self.target
            return counts
        quanta = {trade: quantum_of(members) for trade, members in self._trades()}
        steps = [quanta[trade_of(module)] for module in self.modules]
        total = self.removed(counts)

        def moves(sign: int) -> Iterator[tuple[int, float, int]]:
            """(units, sign of the share that has gone, module) of all moves of one quantum that way."""
            for index, (unit, step, module) in enumerate(zip(self.units, steps, self.modules, strict=True)):
                if unit and 0 <= counts[index] + sign * step <= module.max_removed:
                    yield unit * step, sign * counts[index] / module.num_groups, index

        while total < low:
            cost, _, index = min(moves(1))
            counts[index] += steps[index]
            total += cost
        while total > high:
            found = [move for move in moves(-1) if total - move[0] >= low]
            if not found:
                break
            cost = max(found)[0]
            index = min(move for move in found if move[0] == cost)[2]
            counts[index] -= steps[index]
            total -= cost
        return counts

    def ladder(self, levels: Sequence[Sequence[int]], start: Levels, iteration: int) -> Ladder:
        """What a search moves on.

        Args:
            levels: groups removed at each level of each module.
            start: levels that meet the budget.
        """
        low, high = self.bounds(iteration)
        counts = tuple(tuple((count * unit,) for count in own) for own, unit in zip(levels, self.units, strict=True))
        total = self.removed([own[level] for own, level in zip(levels, start, strict=True)])
        assert low <= total
        members = tuple((number,) for number in range(len(self.modules)))
        kinds = () if self.shared else tuple(trade_of(module) for module in self.modules)
        return Ladder(members, counts, start, low, max(high, total), kinds=kinds)

    def assign(
        self, levels: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], centre: Levels, iteration: int
    ) -> Levels:
        """The levels of the least sum of costs that meet the budget; exact dynamic programming, over each trade or over all.

        Args:
            levels: groups removed at each level of each module.
            costs: of each level of each module.
            centre: levels that meet the budget.
        """
        if self.shared:
            low, high = self.bounds(iteration)
            high = max(high, self.removed([own[level] for own, level in zip(levels, centre, strict=True)]))
            spent = [[count * unit for count in own] for own, unit in zip(levels, self.units, strict=True)]
            return least(spent, costs, low, high) or centre
        found = list(centre)
        for indices in trades_of(self.modules).values():
            total = sum(levels[index][centre[index]] for index in indices)
            best = least([levels[index] for index in indices], [costs[index] for index in indices], total, total)
            assert best is not None
            for index, level in zip(indices, best, strict=True):
                found[index] = level
        return tuple(found)

    def _trades(self) -> list[tuple[Trade, list[Sized]]]:
        return [(trade, [self.modules[index] for index in own]) for trade, own in trades_of(self.modules).items()]


def least(spent: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], low: int, high: int) -> Levels | None:
    """One level of every module, their units summing up to ``low`` at least and ``high`` at most, with the least sum of costs.

    Sums are counted in the greatest common divisor of all units: exact. Where that makes more than 131,072 of the total, each
    level is rounded to the nearest unit of such a part, and the best sum is taken whose true total is within the bounds.
    Returns None where there is none.
    """
    total = sum(max(own) for own in spent)
    unit = max(math.gcd(*(number for own in spent for number in own)), 1)
    exact = total // unit <= MAX_UNITS
    if not exact:
        unit = -(-total // MAX_UNITS)
    options, level_of = [], []
    for own, cost in zip(spent, costs, strict=True):
        best: dict[int, int] = {}  # of levels that round alike, the one of least cost
        for level, number in enumerate(own):
            rounded = (number + unit // 2) // unit
            if rounded not in best or cost[level] < cost[best[rounded]]:
                best[rounded] = level
        level_of.append(best)
        options.append([(rounded, cost[level]) for rounded, level in best.items()])
    first, last = -(-low // unit), high // unit
    # Rounding moves a sum by half a unit a module at the very most.
    shifts = [0] if exact else sorted(range(-len(spent), len(spent) + 1), key=lambda shift: (abs(shift), shift))
    for shift in shifts:
        try:
            chosen = minimize(options, first + shift, max(first, last) + shift)
        except ValueError:
            continue
        levels = tuple(best[units] for best, units in zip(level_of, chosen, strict=True))
        if low <= sum(own[level] for own, level in zip(spent, levels, strict=True)) <= high:
            return levels
    return None


def _possible(target: int, modules: Sequence[Sized], units: Sequence[int], sparsity: float) -> int:
    """The target, if so many units of the modules can go."""
    most = sum(unit * module.max_removed for unit, module in zip(units, modules, strict=True))
    if target <= most:
        return target
    total = sum(unit * module.num_groups for unit, module in zip(units, modules, strict=True))
    kinds = " and ".join(dict.fromkeys(module.kind for module in modules))
    raise ConfigError(
        f"a share of {sparsity:g} of {kinds} is more than can go: a mixture keeps as many experts as a token needs. At most "
        f"{most / total:.3g} can. Lower --sparsity, or leave the experts whole with --skip '*experts*'."
    )


def _quantised(modules: Sequence[Sized], costs: Mapping[str, float]) -> list[int]:
    own = [costs[module.name] for module in modules]
    if not all(math.isfinite(cost) and cost >= 0 for cost in own) or not any(own):
        raise ConfigError("the seconds of the modules' groups must be numbers from 0, and not all of them 0.")
    cheapest = min(cost for cost in own if cost)
    return [round(_LATENCY_PARTS * cost / cheapest) for cost in own]
