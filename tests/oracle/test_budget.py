"""Budgets of structured pruning against brute force: met to the unit or from above, within a step; refused where none is."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.errors import ConfigError, UnsupportedModel
from llmprune.structured import budget as budget_module
from llmprune.structured.budget import Budget, least
from llmprune.structured.levels import Kind, grid, quantum_of, step_of, trades_of
from llmprune.structured.uniform import Widths, closest, shortfall, uniform_widths

TOY = ((0, 1, 4, 9, 16), (0, 2, 3, 5, 30), (0, 0.5, 6, 7, 8))


@dataclass(frozen=True)
class Module:
    """What budgets look at."""

    kind: Kind
    num_groups: int
    parameters_per_group: int
    group_size: int = 1
    name: str = "m"
    multiple: int = 1
    needed: int = 0

    @property
    def max_removed(self) -> int:
        """All but those that have to stay."""
        return self.num_groups - self.needed


def _layers(
    number: int, *, kv_groups: int = 8, channels: int = 256, per_group: int = 640, per_channel: int = 24
) -> list[Module]:
    """Attention and FFN of so many layers."""
    return [
        module
        for index in range(number)
        for module in (
            Module("attention", kv_groups, per_group, 64, f"{index}.attn"),
            Module("ffn", channels, per_channel, 1, f"{index}.mlp"),
        )
    ]


def _brute(spent: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], low: int, high: int) -> float:
    return min(
        (
            sum(own[level] for own, level in zip(costs, levels, strict=True))
            for levels in itertools.product(*(range(len(own)) for own in spent))
            if low <= sum(own[level] for own, level in zip(spent, levels, strict=True)) <= high
        ),
        default=math.inf,
    )


@pytest.mark.parametrize(("total", "cost"), [(0, 0.0), (3, 3.5), (5, 6.5), (7, 12.0), (9, 17.0), (12, 54.0)])
def test_separable_toy(total: int, cost: float) -> None:
    """Three modules of five levels; the greedy choice would pay 14.5 for seven and 21 for nine."""
    levels = least([range(5)] * 3, TOY, total, total)
    assert levels is not None and sum(levels) == total
    assert sum(own[level] for own, level in zip(TOY, levels, strict=True)) == cost
    assert least([range(5)] * 3, TOY, 13, 20) is None


@pytest.mark.parametrize("max_units", [1 << 17, 300])
@pytest.mark.parametrize("seed", range(8))
def test_least_is_brute_force(seed: int, max_units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units without a common divisor, within bounds; counted coarsely too what is chosen is within them, and no worse than what
    bounds narrower by the rounding allow.
    """
    monkeypatch.setattr(budget_module, "MAX_UNITS", max_units)
    rng = random.Random(seed)
    steps = [rng.choice([97, 101, 640]) for _ in range(4)]
    spent = [[step * number for number in range(6)] for step in steps]
    costs = [sorted(rng.random() for _ in range(6)) for _ in range(4)]
    low = rng.randrange(sum(own[-1] for own in spent) // 2)
    high = low + 101
    levels = least(spent, costs, low, high)
    assert levels is not None
    assert low <= sum(own[level] for own, level in zip(spent, levels, strict=True)) <= high
    found = sum(own[level] for own, level in zip(costs, levels, strict=True))
    slack = 0 if max_units > 300 else 4 * (sum(own[-1] for own in spent) // max_units + 1)
    assert _brute(spent, costs, low, high) - 1e-12 <= found <= _brute(spent, costs, low + slack, high - slack) + 1e-12


MODULES = st.lists(
    st.one_of(
        st.builds(Module, st.just("attention"), st.integers(1, 12), st.sampled_from([640, 1001]), st.sampled_from([64, 128])),
        st.builds(Module, st.just("ffn"), st.sampled_from([64, 96, 256, 512]), st.sampled_from([24, 25, 96])),
    ),
    min_size=1,
    max_size=6,
)  # fmt: skip


@settings(max_examples=40)
@given(modules=MODULES, sparsity=st.floats(0, 1), iteration=st.integers(1, 4))
def test_shared_budgets_are_met_from_above(modules: list[Module], sparsity: float, iteration: int) -> None:
    """At the centre and after it is fitted to a later iteration no less than the share goes, in whole quanta, and without the
    quantum that went last it would be less, or more than a step were left; what dynamic programming assigns is within the same
    bounds.
    """
    budget = Budget.of(modules, sparsity, "parameters")
    share = Fraction(repr(sparsity)) * sum(module.num_groups * module.parameters_per_group for module in modules)
    assert budget.target == math.ceil(share)
    counts = budget.fit(budget.centre(), iteration)
    low, high = budget.bounds(iteration)
    for indices in trades_of(modules).values():
        quantum = quantum_of([modules[index] for index in indices])
        assert all(counts[index] % quantum == 0 and 0 <= counts[index] <= modules[index].num_groups for index in indices)
    removed = sum(count * module.parameters_per_group for count, module in zip(counts, modules, strict=True))
    assert removed == budget.removed(counts) >= low == budget.target
    if removed > high:
        for indices in trades_of(modules).values():
            quantum = quantum_of([modules[index] for index in indices])
            assert all(removed - quantum * modules[index].parameters_per_group < low for index in indices if counts[index])
    levels = grid(modules, counts, iteration)
    centre = tuple(own.index(count) for own, count in zip(levels, counts, strict=True))
    rng = random.Random(0)
    found = budget.assign(levels, [sorted(rng.random() for _ in own) for own in levels], centre, iteration)
    assert low <= budget.removed([own[level] for own, level in zip(levels, found, strict=True)]) <= max(high, removed)


def test_bounds_are_a_step_apart() -> None:
    """The cheapest step of the iteration; and none where kinds have budgets of their own."""
    modules = _layers(4)
    budget = Budget.of(modules, 0.25, "parameters")
    assert budget.target == (8 * 640 + 256 * 24) * 4 // 4
    for iteration in (1, 2):
        step = min(step_of(modules[:1], iteration) * 640, step_of(modules[1:2], iteration) * 24)
        assert budget.bounds(iteration) == (budget.target, budget.target + step) and step == 640
    kinds = Budget.of(modules, 0.25)
    assert kinds.bounds(1) == (kinds.target, kinds.target) == (4 * 2 + 4 * 64,) * 2 and not kinds.shared


@pytest.mark.parametrize("name", ["kinds", "parameters"])
def test_assigning_is_brute_force(name: Any) -> None:
    """Two layers, all choices tried; kinds keep their sums, and what is shared is within its bounds."""
    modules = _layers(2, kv_groups=4, channels=64)
    budget = Budget.of(modules, 0.5, name)
    counts = budget.centre()
    levels = grid(modules, counts, 1)
    rng = random.Random(1)
    costs = [sorted(rng.random() for _ in own) for own in levels]
    found = budget.assign(levels, costs, tuple(own.index(count) for own, count in zip(levels, counts, strict=True)), 1)
    if name == "parameters":
        spent = [[count * module.parameters_per_group for count in own] for own, module in zip(levels, modules, strict=True)]
        best = _brute(spent, costs, *budget.bounds(1))
    else:
        totals = [counts[one] + counts[one + 2] for one in (0, 1)]
        best = sum(_brute(levels[one::2], costs[one::2], total, total) for one, total in enumerate(totals))
    assert sum(own[level] for own, level in zip(costs, found, strict=True)) == pytest.approx(best)


def test_fitting_moves_as_little_as_it_takes() -> None:
    """Too little: the cheapest quantum goes; too much: the dearest that may stay comes back, from who has lost most."""
    modules = _layers(2)
    budget = Budget.of(modules, 0.25, "parameters")
    assert budget.centre() == [2, 64, 2, 64] == budget.fit([2, 64, 2, 64], 1)
    assert budget.fit([1, 64, 2, 64], 1) == [2, 64, 2, 64]
    assert budget.fit([3, 64, 3, 96], 1) == [3, 32, 3, 64] and budget.fit([3, 64, 2, 64], 2) == [3, 64, 2, 64]


def test_seconds_are_quantised_to_a_thousandth_of_the_cheapest() -> None:
    """Modules that cost nothing never help to meet the budget, and costs without sense are refused."""
    modules = _layers(2, channels=64)
    costs = {"0.attn": 3e-4, "0.mlp": 1e-5, "1.attn": 3e-4, "1.mlp": 0.0}
    budget = Budget.of(modules, 0.5, "latency", costs)
    assert budget.units == (30000, 1000, 30000, 0) and budget.target == (2 * 8 * 30000 + 64 * 1000) // 2
    counts = budget.centre()
    assert budget.target <= budget.removed(counts) <= budget.bounds(1)[1]
    with pytest.raises(ConfigError, match="seconds"):
        Budget.of(modules, 0.5, "latency", dict.fromkeys(costs, 0.0))
    with pytest.raises(ConfigError, match="seconds"):
        Budget.of(modules, 0.5, "latency", {**costs, "0.attn": math.nan})


def test_what_cannot_be_removed_is_refused() -> None:
    """No modules, and shares that are none; with modules missing the share is of those there are."""
    with pytest.raises(ConfigError, match="left whole"):
        Budget.of([], 0.25)
    with pytest.raises(ConfigError, match=r"got 1\.5: all that can go is 1"):
        Budget.of(_layers(2), 1.5)
    ffns = _layers(4)[1::2]
    for name in ("kinds", "parameters"):
        budget = Budget.of(ffns, 0.25, name)  # type: ignore[arg-type]
        assert budget.centre() == [64] * 4 and budget.target == 4 * 64 * (24 if budget.shared else 1)


@pytest.mark.parametrize("sparsity", [0.125, 0.25, 0.4, 0.7])
def test_uniform_pairs_are_the_closest_from_above(sparsity: float) -> None:
    """By brute force over all widths of 64 (here 32) channels: for every number of kv groups the widest FFN that is enough."""
    modules = _layers(3, channels=256, per_channel=20)
    budget = Budget.of(modules, sparsity, "parameters")
    pairs = uniform_widths(budget, range(1, 9))
    enough = {
        (heads, channels)
        for heads in range(1, 9)
        for channels in range(32, 257, 32)
        if 3 * ((8 - heads) * 640 + (256 - channels) * 20) >= budget.target
    }
    widest = {(heads, max(channels for own, channels in enough if own == heads)) for heads in {heads for heads, _ in enough}}
    alone = max((heads for heads, channels in widest if channels == 256), default=0)
    assert {(pair.kv_groups, pair.channels) for pair in pairs} == {
        (heads, channels) for heads, channels in widest if heads >= alone
    }
    for pair in pairs:
        assert budget.removed(pair.removed(modules)) >= budget.target


def test_uniform_pairs_of_what_the_config_takes() -> None:
    """32 heads of a hidden size of 4096 divide it as 1, 2, 4, 8 groups of 4: a quarter cannot be taken from attention."""
    modules = _layers(2, channels=4864)
    kinds = uniform_widths(Budget.of(modules, 0.25), (1, 2, 4, 8))
    assert len(kinds) == 1 and kinds[0].kv_groups == 8 and kinds[0].channels is not None and kinds[0].channels % 64 == 0
    told = shortfall(kinds[0], modules, 0.25)
    assert told == (
        "attention keeps 8 of 8 kv groups, more than 0.75 of them; the FFN makes up for it with "
        f"{kinds[0].channels} of 4864 channels left."
    )
    (exact,) = uniform_widths(Budget.of(modules, 0.25), range(1, 9))
    assert exact == Widths(6, 3648) and shortfall(exact, modules, 0.25) is None
    pairs = uniform_widths(Budget.of(modules, 0.5, "parameters"), (1, 2, 4, 8))
    assert [pair.kv_groups for pair in pairs] == [1, 2, 4, 8] and closest(pairs, modules, 0.5).kv_groups == 4


def test_uniform_widths_of_one_kind_only() -> None:
    """Attention left whole, and no FFN."""
    modules = _layers(2)
    assert uniform_widths(Budget.of(modules[1::2], 0.25), ()) == [Widths(None, 192)]
    assert uniform_widths(Budget.of(modules[::2], 0.25, "parameters"), range(1, 9)) == [Widths(6, None)]
    assert closest([Widths(None, 192)], modules[1::2], 0.25) == Widths(None, 192)
    (nearest,) = uniform_widths(Budget.of(modules[::2], 0.3), range(1, 9))  # 5 of 16 groups go, and two layers alike give 4
    assert nearest == Widths(6, None)
    assert shortfall(nearest, modules[::2], 0.3) == "attention keeps 6 of 8 kv groups, more than 0.7 of them."
    with pytest.raises(ConfigError, match=r"0 is the most, with 8 kv groups left"):  # 1 of 16: none of two layers alike
        uniform_widths(Budget.of(modules[::2], 0.06), range(1, 9))
    with pytest.raises(ConfigError, match=r"0\.875 is the most, with 1 kv groups left"):
        uniform_widths(Budget.of(modules[::2], 0.95, "parameters"), range(1, 9))


def test_uniform_widths_that_do_not_exist() -> None:
    """A layer cannot be emptied, and says how much can go; layers that differ cannot be made alike."""
    modules = _layers(2)
    with pytest.raises(ConfigError, match=r"0\.95 cannot go .* 0\.875 is the most, with 1 kv groups and 32 channels"):
        uniform_widths(Budget.of(modules, 0.95, "parameters"), range(1, 9))
    with pytest.raises(UnsupportedModel, match=r"other has 128 groups and 0\.mlp 256"):
        uniform_widths(Budget.of([*modules, Module("ffn", 128, 24, 1, "other")], 0.25), range(1, 9))
