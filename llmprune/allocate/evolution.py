"""Evolutionary search of an allocation (Sieberling et al. 2024, arXiv 2410.14649, section 3): dp's result moved by whole rungs.

Every group of sites has a ladder of counts of zeros, the same number of zeros from rung to rung for all groups where their
shapes allow, so that one group up and another down conserves the budget to the weight. What a candidate is worth is not known
here: :mod:`llmprune.engines.evolution` measures it on the model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from llmprune.allocate.dp import groups_of, zeros

if TYPE_CHECKING:
    from llmprune.allocate import SiteFacts
    from llmprune.allocate.budget import Budget

__all__ = ["Ladder", "Levels", "Search", "Stage", "climb", "mutate", "zeros"]

RUNGS_A_SIDE = 4
MAX_RUNGS = 2 * RUNGS_A_SIDE + 1
STEP = 0.02
"""Zeros from rung to rung, as a fraction of the mean group's weights, about."""
MAX_MOVES = 3
_MAX_REPAIRS = 8
_TRIES = 4
_REPAIR_TRIES = 8

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
        repeats: whether a move may take a group several rungs, as where one group's rung is worth many of another's.
    """

    members: tuple[tuple[int, ...], ...]
    counts: tuple[tuple[tuple[int, ...], ...], ...]
    start: Levels
    low: int
    high: int
    kinds: tuple[Hashable, ...] = ()
    repeats: bool = True
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
    return Ladder(members, tuple(ladders), tuple(start), sum(counts), sum(counts), repeats=False)


def mutate(ladder: Ladder, parent: Levels, rng: random.Random, max_moves: int = MAX_MOVES) -> Levels | None:
    """The parent after min(U{1..max_moves}, U{1..max_moves}) moves, each of one group by a rung and of others the other way
    until the sum of the zeros is within bounds again; None where no move exists, or the moves undo each other.
    """
    levels = list(parent)
    for _ in range(min(rng.randint(1, max_moves), rng.randint(1, max_moves))):
        if not _move_(ladder, levels, rng):
            break
    return tuple(levels) if tuple(levels) != parent else None


def _move_(ladder: Ladder, levels: list[int], rng: random.Random) -> bool:
    """One move in place; False where there is none."""
    first_moves = [
        (group, sign) for group, level in enumerate(levels) for sign in (1, -1) if 0 <= level + sign < len(ladder.zeros[group])
    ]
    rng.shuffle(first_moves)
    for group, sign in first_moves:
        for _ in range(_REPAIR_TRIES if ladder.repeats else 1):
            moved = _moved(ladder, levels, group, sign, rng)
            if moved is not None:
                levels[:] = moved
                return True
    return False


def _moved(ladder: Ladder, levels: Sequence[int], group: int, sign: int, rng: random.Random) -> list[int] | None:
    """The levels after one group's rung and random ones of others against it; None where they end in no allowed sum."""
    moved, num_repairs = list(levels), 0
    moved[group] += sign
    sum_ = ladder.total(tuple(moved))
    while not ladder.low <= sum_ <= ladder.high:
        back = -1 if sum_ > ladder.high else 1
        repairs = [
            (other, sum_ + _change(ladder, moved, other, back))
            for other, level in enumerate(moved)
            if other != group and 0 <= level + back < len(ladder.zeros[other]) and ladder.trade(group, other)
            and (ladder.repeats or level == levels[other])
        ]  # fmt: skip
        repairs = [(other, after) for other, after in repairs if (after >= ladder.low if back < 0 else after <= ladder.high)]
        if not repairs or (num_repairs == _MAX_REPAIRS and not ladder.repeats):
            return None
        other, sum_ = rng.choice(repairs)
        moved[other] += back
        num_repairs += 1
    return moved


def _change(ladder: Ladder, levels: Sequence[int], group: int, sign: int) -> int:
    rungs = ladder.zeros[group]
    return rungs[levels[group] + sign] - rungs[levels[group]]


class Fitness(Protocol):
    """Divergences of candidates, all on one set of tokens: drawn by ``rng``, or the same whole one always."""

    def __call__(self, candidates: Sequence[Levels], rng: random.Random | None, num_tokens: int | None = None) -> list[float]:
        """In nats; ``rng`` None asks for the whole set. The draw is the same for any candidates, of ``num_tokens`` tokens, or
        without that of as many as the fitness likes.
        """


@dataclass(frozen=True)
class Stage:
    """One measurement of a generation's candidates, on tokens they share.

    Attributes:
        num_tokens: how many are drawn; None leaves it to the fitness. The last stage draws none: it has the whole fixed set.
        survivors: the best so many go on; after the last one the best alone, where it beats the parent.
    """

    num_tokens: int | None
    survivors: int


@dataclass
class Search:
    """A (1 + lambda) search with elitism: the parent gives way only to a better candidate, so the curve never rises.

    Departures from the papers: the last stage measures on one fixed set of tokens, so that the parent need not be measured
    again and the end is never worse than the start; what was measured there once is not a candidate again.

    Attributes:
        generations: how many.
        offspring: candidates a generation, all different.
        seed: of every random choice.
        stages: of a generation's selection, the last one on the whole fixed set; empty: one before it, of as many tokens as
            the fitness likes, that keeps an eighth of the offspring.
        max_moves: 3 as EvoPress has it, 4 as Týr-the-Pruner (see :func:`mutate`).
        parent: the best levels so far.
        best: their divergence, in nats.
        curve: (generation, best divergence) where it fell.
    """

    ladder: Ladder
    generations: int
    offspring: int
    seed: int
    stages: tuple[Stage, ...] = ()
    max_moves: int = MAX_MOVES
    num_evaluated: int = 0
    num_generations: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)
    parent: Levels = field(init=False)
    best: float = field(init=False, default=math.inf)

    def __post_init__(self) -> None:
        self.stages = self.stages or (Stage(None, max(1, self.offspring // 8)), Stage(None, 1))
        assert self.stages[-1].num_tokens is None and all(stage.survivors >= 1 for stage in self.stages)
        self.parent = self.ladder.start
        self._known: set[Levels] = set()
        self._rng = random.Random(self.seed)

    @property
    def survivors(self) -> int:
        """Candidates a generation measured on the whole set, at most."""
        return min([self.offspring, *(stage.survivors for stage in self.stages[:-1])])

    def run(self, fitness: Fitness) -> Generator[int, None, Levels]:
        """Search; yields the number of generations done, ends early where nothing is left to try, returns the best."""
        if not self._known:
            self.best = _ranked(fitness([self.parent], None))[0]
            self._known = {self.parent}
            self.curve.append((0, self.best))
            self.num_evaluated = 1
        for generation in range(self.num_generations + 1, self.generations + 1):
            before = self._rng.getstate()
            candidates = self._candidates()
            if not candidates:
                self._rng.setstate(before)  # as if never tried, for a snapshot taken now
                break
            self._select_(candidates, fitness)
            self.num_generations = generation
            if self.best < self.curve[-1][1]:
                self.curve.append((generation, self.best))
            yield generation
        return self.parent

    def snapshot(self) -> dict[str, Any]:
        """What :meth:`restore_` needs, as JSON has it; before :meth:`run` or after any of its yields."""
        version, numbers, gauss = self._rng.getstate()
        return {
            "parent": list(self.parent), "best": self.best, "generation": self.num_generations,
            "curve": [list(point) for point in self.curve], "num_evaluated": self.num_evaluated,
            "known": sorted(list(levels) for levels in self._known), "rng": [version, list(numbers), gauss],
        }  # fmt: skip

    def restore_(self, state: Mapping[str, Any]) -> None:
        """Before :meth:`run`, of a search with the same settings: go on from a snapshot, exactly as if never stopped."""
        self.parent, self.best = tuple(state["parent"]), state["best"]
        self.num_generations, self.num_evaluated = state["generation"], state["num_evaluated"]
        self.curve[:] = [(generation, divergence) for generation, divergence in state["curve"]]
        self._known = {tuple(levels) for levels in state["known"]}
        version, numbers, gauss = state["rng"]
        self._rng.setstate((version, tuple(numbers), gauss))

    def _select_(self, candidates: list[Levels], fitness: Fitness) -> None:
        """The stages of one generation; the parent gives way where the best of the last one is better."""
        self.num_evaluated += len(candidates)
        for stage in self.stages[:-1]:
            if len(candidates) > stage.survivors:
                draw = () if stage.num_tokens is None else (stage.num_tokens,)
                rough = _ranked(fitness(candidates, self._rng, *draw))
                order = sorted(range(len(candidates)), key=lambda number: rough[number])
                candidates = [candidates[number] for number in order[: stage.survivors]]
        self._known.update(candidates)
        for candidate, divergence in zip(candidates, _ranked(fitness(candidates, None)), strict=True):
            if divergence < self.best:
                self.parent, self.best = candidate, divergence

    def _candidates(self) -> list[Levels]:
        found: dict[Levels, None] = {}
        for _ in range(_TRIES * self.offspring):
            candidate = mutate(self.ladder, self.parent, self._rng, self.max_moves)
            if candidate is not None and candidate not in self._known:
                found[candidate] = None
            if len(found) == self.offspring:
                break
        return list(found)


def _ranked(divergences: Sequence[float]) -> list[float]:
    """NaN is worse than anything."""
    return [math.inf if math.isnan(divergence) else divergence for divergence in divergences]
