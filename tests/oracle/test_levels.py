"""Levels of structured pruning in integers: budgets to the group, even trades, and head counts that no step divides."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.structured.levels import (
    Kind,
    budget_of,
    centres,
    chunk_of,
    grid,
    quantum_of,
    step_of,
    trades_of,
)


@dataclass(frozen=True)
class Module:
    """What the levels look at."""

    kind: Kind
    num_groups: int
    group_size: int = 1
    multiple: int = 1
    needed: int = 0

    @property
    def max_removed(self) -> int:
        """All but those that have to stay."""
        return self.num_groups - self.needed


def _heads(number: int, num_modules: int = 4) -> list[Module]:
    return [Module("attention", number, 64)] * num_modules


def _ffns(width: int, num_modules: int = 4) -> list[Module]:
    return [Module("ffn", width)] * num_modules


@pytest.mark.parametrize(
    ("number", "steps"),
    [(32, [4, 2, 1, 1]), (28, [4, 2, 1, 1]), (14, [2, 1, 1, 1]), (8, [1, 1, 1, 1]), (2, [1, 1, 1, 1]), (1, [1, 1, 1, 1])],
)
def test_steps_of_heads(number: int, steps: list[int]) -> None:
    """An eighth, halved, and never less than one."""
    assert [step_of(_heads(number), iteration) for iteration in range(1, 5)] == steps


@pytest.mark.parametrize(
    ("width", "quantum", "steps"),
    [
        (14336, 32, [1792, 896, 448, 224]), (4864, 32, [608, 320, 160, 64]), (256, 32, [32, 32, 32, 32]),
        (128, 16, [16, 16, 16, 16]), (2730, 2, [342, 170, 86, 42]), (37, 1, [5, 2, 1, 1]), (4, 1, [1, 1, 1, 1]),
    ],
)  # fmt: skip
def test_steps_of_channels(width: int, quantum: int, steps: list[int]) -> None:
    """In multiples of 32 where the width allows, of the largest power of two that divides it elsewhere."""
    assert quantum_of(_ffns(width)) == quantum
    assert [step_of(_ffns(width), iteration) for iteration in range(1, 5)] == steps


def test_nine_levels_of_eighths() -> None:
    """A width that every step divides: from none to all in the first iteration, four a side later, cut off at none."""
    for centre in (16, 8):
        assert grid(_heads(32, 1), [centre], 1) == [(0, 4, 8, 12, 16, 20, 24, 28, 32)]
    assert grid(_heads(32, 1), [16], 3) == [tuple(range(12, 21))]
    assert grid(_heads(32, 1), [2], 3) == [tuple(range(7))]
    assert grid(_ffns(256, 1), [64], 1) == [tuple(range(0, 257, 32))]
    assert grid(_ffns(256, 1), [64], 2) == [tuple(range(0, 193, 32))]


def test_heads_that_no_step_divides() -> None:
    """28 heads at 25 %: the same step for all, so one up and one down is even; 14 at an eighth: whole heads that sum up."""
    modules = _heads(28)
    levels = grid(modules, centres(modules, 0.25), 1)
    assert levels == [(0, 3, 7, 11, 15, 19, 23, 27, 28)] * 4
    counts = centres(_heads(14, 8), 0.125)
    assert counts == [2, 2, 1, 2, 2, 2, 1, 2] and sum(counts) == 14
    assert sum(centres(_heads(2, 24), 0.25)) == 12 and set(centres(_heads(2, 24), 0.25)) == {0, 1}


@pytest.mark.parametrize(
    ("number", "sparsity", "budget"), [(20, 0.85, 17), (10, 0.3, 3), (12, 0.7, 8), (8, 0.0, 0), (8, 1.0, 8)]
)
def test_shares_are_decimal_numbers(number: int, sparsity: float, budget: int) -> None:
    """No group is lost to binary fractions: 0.85 of 20 is 17."""
    assert budget_of(_heads(number, 1), sparsity) == budget


def test_the_kinds_have_budgets_of_their_own() -> None:
    """And so have heads of another size; FFNs of two widths share a quantum that fits both."""
    modules = [*_heads(8, 2), *_ffns(256, 2), Module("attention", 4, 128), Module("ffn", 96)]
    assert list(trades_of(modules).values()) == [[0, 1], [2, 3, 5], [4]]
    counts = centres(modules, 0.5)
    assert counts[:2] == [4, 4] and counts[4] == 2
    assert sum(counts[index] for index in (2, 3, 5)) == 304 and quantum_of([modules[2], modules[5]]) == 8


MODULES = st.lists(
    st.one_of(
        st.builds(Module, st.just("attention"), st.integers(1, 40), st.sampled_from([64, 128])),
        st.builds(Module, st.just("ffn"), st.sampled_from([7, 64, 96, 128, 256, 2730, 4864])),
        st.builds(Module, st.just("experts"), st.sampled_from([8, 64, 160]), st.just(1), st.just(4)),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200)
@given(modules=MODULES, sparsity=st.floats(0, 1), iteration=st.integers(1, 5))
def test_budgets_are_exact_and_trades_even(modules: list[Module], sparsity: float, iteration: int) -> None:
    """Of every trade the centres sum up to the multiple of its quantum nearest to the target, each within a quantum of its
    share; levels rise by the trade's step but where they are cut off, and the centre is one of them.
    """
    counts = centres(modules, sparsity)
    levels = grid(modules, counts, iteration)
    for indices in trades_of(modules).values():
        members = [modules[index] for index in indices]
        total, quantum = sum(member.num_groups for member in members), quantum_of(members)
        budget = sum(counts[index] for index in indices)
        assert budget == budget_of(members, sparsity)
        assert abs(budget - Fraction(repr(sparsity)) * total) <= Fraction(quantum, 2)
        step = step_of(members, iteration)
        assert step % quantum == 0 and step >= quantum
        for index in indices:
            width, own = modules[index].num_groups, levels[index]
            assert abs(counts[index] - Fraction(budget * width, total)) <= quantum
            assert counts[index] in own and own[0] >= 0 and own[-1] <= width
            assert len(own) <= 9 if iteration > 1 else (own[0], own[-1]) == (0, width)
            assert all(count % quantum == 0 for count in own)
            for before, after in itertools.pairwise(own):
                assert after - before == step or (0 < after - before < step and (before == 0 or after == width))


def test_what_has_to_stay_is_given_by_others() -> None:
    """Of mixtures of 8, 4 and 8 experts of which two have to stay three quarters cannot go from each: the others give more."""
    mixtures = [Module("experts", 8, needed=2), Module("experts", 4, needed=3), Module("experts", 8, needed=2)]
    assert centres(mixtures, 0.6) == [5, 1, 6]
    assert centres(list(reversed(mixtures)), 0.6) == [5, 1, 6]
    assert [own[-1] for own in grid(mixtures, [5, 1, 6], 1)] == [6, 1, 6]
    assert sum(centres(mixtures, 0.9)) == 13
    grouped = [Module("experts", 16, multiple=4, needed=8)] * 2
    assert quantum_of(grouped) == 4 and centres(grouped, 0.4) == [8, 4]
    assert grid(grouped, [8, 4], 1) == [(0, 4, 8)] * 2


def test_chunks() -> None:
    """One head, sixteen channels, fewer of a narrow FFN."""
    assert [chunk_of(Module("ffn", width)) for width in (14336, 1024, 256, 37)] == [16, 16, 4, 1]
    assert chunk_of(Module("attention", 8, 128)) == 1
