"""The levels of every module, in whole groups: how many go at the centre, and how far apart the levels around it are.

Everything is counted in integers (Týr-the-Pruner, arXiv 2503.09657, section 3.3, has fractions: an eighth of 28 heads is no
number of heads, and 3 heads against 4 are no even trade). Modules whose groups are worth the same trade with each other: those
of one kind and group size. They share one quantum and one step, so one of them a level up and another a level down leaves the
number of groups as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, Protocol

Kind = Literal["attention", "ffn", "experts"]
LEVELS_A_SIDE = 4
"""From the second iteration on."""
STEPS_A_WIDTH = 8
"""Steps of the first iteration in a whole module; every iteration halves them."""
CHANNELS = 32
"""FFN channels go in multiples of so many, where the width allows."""
CHUNKS_A_WIDTH = 64
MAX_CHUNK = 16


class Grouped(Protocol):
    """A module of which whole groups go."""

    @property
    def kind(self) -> Kind:
        """What it is a part of."""

    @property
    def group_size(self) -> int:
        """Input columns of a group."""

    @property
    def num_groups(self) -> int:
        """How many groups it has."""

    @property
    def multiple(self) -> int:
        """Groups go in multiples of so many, 1 where nothing ties them."""

    @property
    def max_removed(self) -> int:
        """How many of them can go at most."""


Trade = tuple[Kind, int]
"""Kind and group size: modules that have both in common trade groups."""


def trade_of(module: Grouped) -> Trade:
    """Whom the module trades with."""
    return module.kind, module.group_size


def trades_of(modules: Sequence[Grouped]) -> dict[Trade, list[int]]:
    """The indices of the modules of every trade, in order."""
    found: dict[Trade, list[int]] = {}
    for index, module in enumerate(modules):
        found.setdefault(trade_of(module), []).append(index)
    return found


def quantum_of(modules: Sequence[Grouped], channels: int = CHANNELS) -> int:
    """Groups that go at once at least, in all modules of one trade: 1 of attention; one expert, or one of every group that
    tokens choose among; of an FFN the largest power of two up to ``channels`` that divides every width and is no more than an
    eighth of it (1 where none is).

    Args:
        channels: a power of two.
    """
    if modules[0].kind != "ffn":
        return math.lcm(*(module.multiple for module in modules))
    quantum = channels
    while quantum > 1 and any(module.num_groups % quantum or STEPS_A_WIDTH * quantum > module.num_groups for module in modules):
        quantum //= 2
    return quantum


def step_of(modules: Sequence[Grouped], iteration: int) -> int:
    """Groups from one level to the next, the same for all modules of one trade: an eighth of their mean width in the first
    iteration, half as much in each that follows, to the nearest multiple of the quantum (halves up), and at least one.

    Args:
        iteration: from 1.
    """
    assert iteration >= 1
    quantum = quantum_of(modules)
    width = sum(module.num_groups for module in modules)
    parts = len(modules) * (STEPS_A_WIDTH << iteration - 1) * quantum
    return quantum * max(1, (2 * width + parts) // (2 * parts))


def budget_of(modules: Sequence[Grouped], sparsity: float) -> int:
    """Groups that go from all modules of one trade together: the multiple of the quantum nearest to this share of them."""
    assert 0 <= sparsity <= 1
    quantum = quantum_of(modules)
    total = sum(module.num_groups for module in modules)
    # repr: 0.3 means three tenths, not the float a little below them.
    return quantum * _nearest(Fraction(repr(float(sparsity))) * total / quantum)


def centres(modules: Sequence[Grouped], sparsity: float) -> list[int]:
    """Groups that go from each module at first: this share of each, in whole quanta, so that those of a trade sum up to its
    budget exactly; the remainders are spread over the depth. What a module cannot give the others do, the first that can.
    """
    counts = [0] * len(modules)
    for indices in trades_of(modules).values():
        members = [modules[index] for index in indices]
        quantum = quantum_of(members)
        budget = min(budget_of(members, sparsity), sum(member.max_removed for member in members))
        total, seen, given = sum(member.num_groups for member in members), 0, 0
        for index, member in zip(indices, members, strict=True):
            seen += member.num_groups
            until = quantum * _nearest(Fraction(budget * seen, total * quantum))
            counts[index], given = until - given, until
        owed = 0
        for index in (*indices, *indices):  # a second time for what the last ones could not give
            wanted = counts[index] + owed
            counts[index] = min(wanted, modules[index].max_removed)
            owed = wanted - counts[index]
        assert given == budget and not owed and all(counts[index] >= 0 for index in indices)
    return counts


def grid(modules: Sequence[Grouped], counts: Sequence[int], iteration: int) -> list[tuple[int, ...]]:
    """The numbers of groups to remove at every level of each module, rising: the centre ``counts`` and steps on each side of
    it, the last of them cut off at none and at all of the groups that can go.

    In the first iteration the steps, an eighth wide, go from none to all of the groups whatever the centre; the levels beyond
    the paper's four above it hold few columns, and without them nothing is known of sparser models. Later four a side.
    """
    assert len(counts) == len(modules)
    levels: list[tuple[int, ...]] = [()] * len(modules)
    for indices in trades_of(modules).values():
        step = step_of([modules[index] for index in indices], iteration)
        for index in indices:
            width, most, centre = modules[index].num_groups, modules[index].max_removed, counts[index]
            assert 0 <= centre <= most
            reach = -(-width // step) if iteration == 1 else LEVELS_A_SIDE
            around = (centre + number * step for number in range(-reach, reach + 1))
            levels[index] = tuple(sorted({min(max(count, 0), most) for count in around}))
    return levels


def chunk_of(module: Grouped) -> int:
    """Groups that go between two updates on the way to a level: 1 of attention, up to 16 channels of an FFN."""
    return 1 if module.kind == "attention" else min(MAX_CHUNK, max(1, module.num_groups // CHUNKS_A_WIDTH))


def _nearest(value: Fraction) -> int:
    """The nearest integer, halves up."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)
