"""Evolutionary search of an allocation (Sieberling et al. 2024, arXiv 2410.14649, section 3): dp's result moved by whole rungs.

Every group of sites has a ladder of counts of zeros, the same number of zeros from rung to rung for all groups where their
shapes allow, so that one group up and another down conserves the budget to the weight. What a candidate is worth is not known
here: :mod:`llmprune.engines.evolution` measures it on the model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from llmprune.allocate.dp import groups_of, zeros

if TYPE_CHECKING:
    from llmprune.allocate import SiteFacts
    from llmprune.allocate.budget import Budget

__all__ = ["Ladder", "Levels", "Search", "climb", "mutate", "zeros"]

RUNGS_A_SIDE = 4
MAX_RUNGS = 2 * RUNGS_A_SIDE + 1
STEP = 0.02
"""Zeros from rung to rung, as a fraction of the mean group's weights, about."""
MAX_MOVES = 3
_MAX_REPAIRS = 8
_TRIES = 4

Levels = tuple[int, ...]
"""The rung of every group."""


@dataclass(frozen=True)
class Ladder:
    """What every group can become.

    Attributes:
        members: indices of the sites of each group.
        counts: zeros of each member, of each rung, of each group; rising with the rung.
        start: the rungs the search begins at.
        low, high: bounds of the zeros of all groups together; equal where the budget is met exactly.
        kinds: of each group; only those of one kind trade with each other. Empty: all do.
    """

    members: tuple[tuple[int, ...], ...]
    counts: tuple[tuple[tuple[int, ...], ...], ...]
    start: Levels
    low: int
    high: int
    kinds: tuple[Hashable, ...] = ()
    zeros: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        # Within bounds that are apart, a kind could lend to another what it has left.
        assert not self.kinds or (len(self.kinds) == len(self.members) and self.low == self.high)
        object.__setattr__(self, "zeros", tuple(tuple(map(sum, rungs)) for rungs in self.counts))

    def shares(self, levels: Levels) -> list[int]:
        """Zeros of every site."""
        found = {
            index: count
            for indices, rungs, level in zip(self.members, self.counts, levels, strict=True)
            for index, count in zip(indices, rungs[level], strict=True)
        }
        return [found[index] for index in range(len(found))]

    def total(self, levels: Levels) -> int:
        """Zeros of all groups together."""
        return sum(rungs[level] for rungs, level in zip(self.zeros, levels, strict=True))

    def trade(self, one: int, other: int) -> bool:
        """Whether what one of two groups gives up the other may take."""
        return not self.kinds or self.kinds[one] == self.kinds[other]


def climb(sites: Sequence[SiteFacts], counts: Sequence[int], budget: Budget) -> Ladder:
    """The ladder around an allocation of ``counts`` zeros per site: up to four rungs on each side of it.

    A rung is a multiple of what all groups can take a step of (for scope ``row`` a weight of every row), where one is no more
    than about two percent of the mean group; else each group's own, and only groups of equal steps trade with each other.
    """
    members = tuple(tuple(indices) for indices in groups_of(sites).values())
    quanta = [sum(budget.quanta[index] for index in indices) for indices in members]
    wanted = STEP * sum(budget.numels) / len(members)
    common = math.lcm(*quanta)
    ladders, start = [], []
    for indices, quantum in zip(members, quanta, strict=True):
        base = common if common <= 2 * wanted else quantum
        multiple = max(1, round(wanted / base)) * base // quantum
        steps = [multiple * budget.quanta[index] for index in indices]

        def rung(level: int, indices: Sequence[int] = indices, steps: Sequence[int] = steps) -> tuple[int, ...]:
            return tuple(counts[index] + level * step for index, step in zip(indices, steps, strict=True))

        def fits(level: int, indices: Sequence[int] = indices) -> bool:
            return all(0 <= count <= budget.limits[index] for count, index in zip(rung(level), indices, strict=True))

        levels = [level for level in range(-RUNGS_A_SIDE, RUNGS_A_SIDE + 1) if fits(level)]
        ladders.append(tuple(rung(level) for level in levels))
        start.append(levels.index(0))
    return Ladder(members, tuple(ladders), tuple(start), sum(counts), sum(counts))


def mutate(ladder: Ladder, parent: Levels, rng: random.Random) -> Levels | None:
    """The parent after min(U{1..3}, U{1..3}) moves, each of one group by a rung and of others the other way until the sum
    of the zeros is within bounds again; None where no move exists, or the moves undo each other.
    """
    levels = list(parent)
    for _ in range(min(rng.randint(1, MAX_MOVES), rng.randint(1, MAX_MOVES))):
        if not _move_(ladder, levels, rng):
            break
    return tuple(levels) if tuple(levels) != parent else None


def _move_(ladder: Ladder, levels: list[int], rng: random.Random) -> bool:
    """One move in place; False where there is none."""
    first_moves = [
        (group, sign) for group, level in enumerate(levels) for sign in (1, -1) if 0 <= level + sign < len(ladder.zeros[group])
    ]
    rng.shuffle(first_moves)
    total = ladder.total(tuple(levels))
    for group, sign in first_moves:
        moved, sum_ = {group: levels[group] + sign}, total + _change(ladder, levels, group, sign)
        for _ in range(_MAX_REPAIRS):
            if ladder.low <= sum_ <= ladder.high:
                break
            back = -1 if sum_ > ladder.high else 1
            repairs = [
                (other, sum_ + _change(ladder, levels, other, back))
                for other, level in enumerate(levels)
                if other not in moved and 0 <= level + back < len(ladder.zeros[other]) and ladder.trade(group, other)
            ]
            repairs = [
                (other, after) for other, after in repairs if (after >= ladder.low if back < 0 else after <= ladder.high)
            ]
            if not repairs:
                break
            other, sum_ = rng.choice(repairs)
            moved[other] = levels[other] + back
        if ladder.low <= sum_ <= ladder.high:
            for other, level in moved.items():
                levels[other] = level
            return True
    return False


def _change(ladder: Ladder, levels: Sequence[int], group: int, sign: int) -> int:
    rungs = ladder.zeros[group]
    return rungs[levels[group] + sign] - rungs[levels[group]]


class Fitness(Protocol):
    """Divergences of candidates, all on one set of tokens: a small one drawn by ``rng``, or the same whole one always."""

    def __call__(self, candidates: Sequence[Levels], rng: random.Random | None) -> list[float]:
        """In nats; ``rng`` None asks for the whole set."""


@dataclass
class Search:
    """A (1 + lambda) search with elitism: the parent gives way only to a better candidate, so the curve never rises.

    Departures from the paper: the last stage measures on one fixed set of tokens, so that the parent need not be measured
    again and the end is never worse than the start; what was measured there once is not a candidate again; two stages.

    Attributes:
        generations: how many.
        offspring: candidates a generation, all different.
        survivors: how many of them are measured on the whole set.
        seed: of every random choice.
    """

    ladder: Ladder
    generations: int
    offspring: int
    seed: int
    num_evaluated: int = 0
    num_generations: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def survivors(self) -> int:
        """An eighth of the offspring, as in the paper."""
        return max(1, self.offspring // 8)

    def run(self, fitness: Fitness) -> Generator[int, None, Levels]:
        """Search; yields the number of generations done, ends early where nothing is left to try, returns the best."""
        rng = random.Random(self.seed)
        parent = self.ladder.start
        (best,) = fitness([parent], None)
        known = {parent}
        self.curve.append((0, best))
        self.num_evaluated = 1
        for generation in range(1, self.generations + 1):
            candidates = self._candidates(parent, known, rng)
            if not candidates:
                break
            self.num_generations = generation
            self.num_evaluated += len(candidates)
            if len(candidates) > self.survivors:
                rough = fitness(candidates, rng)
                order = sorted(range(len(candidates)), key=lambda number: rough[number])
                candidates = [candidates[number] for number in order[: self.survivors]]
            known.update(candidates)
            for candidate, divergence in zip(candidates, fitness(candidates, None), strict=True):
                if divergence < best:
                    parent, best = candidate, divergence
            if best < self.curve[-1][1]:
                self.curve.append((generation, best))
            yield generation
        return parent

    def _candidates(self, parent: Levels, known: set[Levels], rng: random.Random) -> list[Levels]:
        found: dict[Levels, None] = {}
        for _ in range(_TRIES * self.offspring):
            candidate = mutate(self.ladder, parent, rng)
            if candidate is not None and candidate not in known:
                found[candidate] = None
            if len(found) == self.offspring:
                break
        return list(found)
