"""The search of an allocation, and the choice of patterns: optima by brute force, budgets to the weight, one result a seed."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.allocate import SiteFacts
from llmprune.allocate.budget import Budget
from llmprune.allocate.evolution import Ladder, Levels, Search, Stage, climb, mutate
from llmprune.allocate.mixed import MAX_MISS, SLACK, Menu
from llmprune.errors import ConfigError
from llmprune.spec import Scope

CURVES = [(0.0, 1, 4, 9, 16), (0.0, 2, 3, 5, 30), (0, 0.5, 6, 7, 8)]


def _ladder(start: Levels, num_rungs: int = 5, *, slack: int = 0) -> Ladder:
    """Groups of one site each, whose zeros are their level."""
    members = tuple((group,) for group in range(len(start)))
    counts = tuple(tuple((level,) for level in range(num_rungs)) for _ in start)
    return Ladder(members, counts, start, sum(start), sum(start) + slack)


def _separable(candidates: Sequence[Levels], _rng: random.Random | None) -> list[float]:
    return [float(sum(curve[level] for curve, level in zip(CURVES, one, strict=True))) for one in candidates]


def _run(search: Search, fitness: object = _separable) -> Levels:
    running = search.run(fitness)  # type: ignore[arg-type]
    while True:
        try:
            next(running)
        except StopIteration as stop:
            best: Levels = stop.value
            return best


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("start", "least"), [((2, 3, 2), 12.0), ((3, 3, 3), 17.0), ((1, 1, 1), 3.5)])
def test_the_search_finds_the_optimum(start: Levels, least: float, seed: int) -> None:
    """Three curves by hand, two of them not convex: greedy moves end at 14.5 and 21 for sums of 7 and 9."""
    search = Search(_ladder(start), 50, 8, seed)
    best = _run(search)
    assert sum(best) == sum(start)
    assert _separable([best], None) == [least] == [search.curve[-1][1]]
    assert search.curve[0] == (0, _separable([start], None)[0])


def test_the_curve_never_rises_and_a_seed_fixes_the_search() -> None:
    """Under a first stage that is noise; another seed goes another way."""

    def noisy(candidates: Sequence[Levels], rng: random.Random | None) -> list[float]:
        return _separable(candidates, None) if rng is None else [rng.random() for _ in candidates]

    def curve(seed: int) -> list[tuple[int, float]]:
        search = Search(_ladder((2, 3, 2)), 12, 16, seed)
        assert search.survivors == 2
        _run(search, noisy)
        return search.curve

    found = [curve(seed) for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1] and len({tuple(one) for one in found}) > 1
    for one in found:
        assert all(after[1] < before[1] and after[0] > before[0] for before, after in itertools.pairwise(one))


def test_a_generation_without_noise_keeps_the_best_of_all() -> None:
    """Of the offspring and the parent, however many stages they pass."""
    seen: dict[Levels, float] = {}

    def watched(candidates: Sequence[Levels], rng: random.Random | None) -> list[float]:
        found = _separable(candidates, rng)
        seen.update(zip(candidates, found, strict=True))
        return found

    search = Search(_ladder((3, 3, 3)), 1, 12, 0)
    best = _run(search, watched)
    assert len(seen) > 8 and _separable([best], None)[0] == min(seen.values())


THREE = (Stage(2048, 6), Stage(16384, 3), Stage(None, 1))


def test_every_stage_measures_what_is_left_on_tokens_of_its_own() -> None:
    """All, the best six of them by the first draw, the best three of those by the second, on the whole set at the end."""
    asked: list[tuple[list[Levels], int | None, list[float]]] = []

    def noisy(candidates: Sequence[Levels], rng: random.Random | None, num_tokens: int | None = None) -> list[float]:
        found = _separable(candidates, None) if rng is None else [rng.random() for _ in candidates]
        asked.append((list(candidates), num_tokens, found))
        assert (rng is None) == (num_tokens is None)
        return found

    search = Search(_ladder((2, 3, 2)), 1, 9, 0, THREE)
    assert search.survivors == 3
    best = _run(search, noisy)
    assert [(len(own), num_tokens) for own, num_tokens, _ in asked] == [(1, None), (9, 2048), (6, 16384), (3, None)]
    for (own, _, found), (after, _, _) in itertools.pairwise(asked[1:]):
        assert after == [one for _, one in sorted(zip(found, own, strict=True))][: len(after)]
    (last, _, found) = asked[-1]
    assert best == min(zip(found, last, strict=True))[1] and search.num_evaluated == 10


@pytest.mark.parametrize("stages", [(), THREE, (Stage(None, 1),)])
def test_stages_without_noise_keep_the_best_of_all(stages: tuple[Stage, ...]) -> None:
    """Of the offspring and the parent, in any number of stages."""
    seen: dict[Levels, float] = {}

    def watched(candidates: Sequence[Levels], rng: random.Random | None, _num_tokens: int | None = None) -> list[float]:
        seen.update(zip(candidates, _separable(candidates, rng), strict=True))
        return _separable(candidates, rng)

    best = _run(Search(_ladder((3, 3, 3)), 1, 12, 0, stages), watched)
    assert len(seen) > 8 and _separable([best], None)[0] == min(seen.values())


def test_nan_never_wins() -> None:
    """Neither a stage nor the search, as a candidate or at the start."""

    def holey(candidates: Sequence[Levels], _rng: random.Random | None, _num_tokens: int | None = None) -> list[float]:
        found = _separable(candidates, None)
        return [math.nan if 4 in one else divergence for one, divergence in zip(candidates, found, strict=True)]

    search = Search(_ladder((4, 3, 2)), 20, 8, 0, THREE)
    best = _run(search, holey)
    feasible = [one for one in itertools.product(range(4), repeat=3) if sum(one) == 9]
    assert best in feasible and _separable([best], None)[0] == min(_separable(feasible, None)) == search.best
    assert search.curve[0] == (0, math.inf) and search.curve[1][1] < math.inf


def _hash_noise(candidates: Sequence[Levels], rng: random.Random | None, num_tokens: int | None = None) -> list[float]:
    """Of the levels, and where tokens are drawn of the draw."""
    draw = rng.random() if rng is not None else 0.0
    return [random.Random(f"{one} {draw} {num_tokens}").random() / (1 + sum(one)) for one in candidates]


@pytest.mark.parametrize("stages", [(), THREE])
def test_a_search_stopped_after_any_generation_goes_on_as_if_it_were_not(stages: tuple[Stage, ...]) -> None:
    """Restored from JSON by a new search: the same candidates, curve, count and result, and the same state after each step."""

    def search() -> Search:
        return Search(_ladder((2, 3, 2, 1), slack=1), 9, 10, 5, stages, max_moves=4)

    whole, states = search(), []
    asked: list[list[Levels]] = []

    def watched(candidates: Sequence[Levels], rng: random.Random | None, num_tokens: int | None = None) -> list[float]:
        asked.append(list(candidates))
        return _hash_noise(candidates, rng, num_tokens)

    states.append((json.dumps(whole.snapshot()), 0))
    for number in whole.run(watched):
        assert number == len(states)
        states.append((json.dumps(whole.snapshot()), len(asked)))
    end, result = json.dumps(whole.snapshot()), (whole.parent, whole.best, whole.curve, whole.num_evaluated)
    assert len(states) == 10 and len(whole.curve) > 1 and end == states[-1][0]
    before = list(asked)
    for number, (state, num_asked) in enumerate(states):
        again = search()
        again.restore_(json.loads(state))
        asked.clear()
        after = [json.dumps(again.snapshot()) for _ in again.run(watched)]
        assert after == [one for one, _ in states[number + 1 :]] and asked == before[num_asked:]
        assert (again.parent, again.best, again.curve, again.num_evaluated) == result
        assert again.num_generations == 9 and json.dumps(again.snapshot()) == end


def test_a_search_that_found_nothing_more_is_restored_as_such() -> None:
    """Its last state is the one before it looked in vain."""
    both = Search(_ladder((1, 0), num_rungs=2), 50, 8, 0)
    running = both.run(_hash_noise)
    next(running)
    before = both.snapshot()
    assert list(running) == [] and both.snapshot() == before


@pytest.mark.parametrize(("max_moves", "shares"), [(3, (5, 3, 1)), (4, (7, 5, 3, 1))])
def test_the_number_of_moves(max_moves: int, shares: tuple[int, ...]) -> None:
    """The lesser of two dice: of sixteen 7, 5, 3 and 1 for up to four; seen where every move takes what none gives back."""
    ladder = Ladder(((0,),), (tuple((level,) for level in range(99)),), (0,), 0, 98)
    rng, seen = random.Random(0), Counter[int]()
    for _ in range(4000):
        moved = mutate(ladder, (49,), rng, max_moves)
        seen[abs(moved[0] - 49) if moved else 0] += 1
    assert max(seen) == max_moves == len(shares)
    # m moves of one rung up or down end m away in one of 2^(m-1) ways.
    assert seen[max_moves] / 4000 == pytest.approx(shares[-1] / sum(shares) / 2 ** (max_moves - 1), abs=0.02)


def _shared(rungs: Sequence[Sequence[int]], start: Levels, slack: int = 0) -> Ladder:
    """Groups whose levels are worth different numbers of parameters, in one budget."""
    members = tuple((group,) for group in range(len(rungs)))
    counts = tuple(tuple((count,) for count in own) for own in rungs)
    total = sum(own[level] for own, level in zip(rungs, start, strict=True))
    return Ladder(members, counts, start, total - slack, total + slack)


def _neighbours(ladder: Ladder, parent: Levels) -> set[Levels]:
    """By brute force: one group a rung one way, others any rungs the other way, none of which could be left out."""
    found = set()
    for one in itertools.product(*(range(len(rungs)) for rungs in ladder.zeros)):
        steps = [after - before for after, before in zip(one, parent, strict=True)]
        if not ladder.low <= ladder.total(one) <= ladder.high:
            continue
        for group, sign in ((group, step) for group, step in enumerate(steps) if abs(step) == 1):
            others = [other for other, step in enumerate(steps) if step and other != group]
            if any(steps[other] * sign > 0 for other in others):
                continue
            # The last repair is of some group, without which the sum is still out of bounds on the first one's side.
            before = [ladder.total(tuple(level - (number == other) * int(math.copysign(1, steps[number]))
                                         for number, level in enumerate(one))) for other in others]  # fmt: skip
            if not others or any(sum_ > ladder.high if sign > 0 else sum_ < ladder.low for sum_ in before):
                found.add(one)
    return found - {parent}


@pytest.mark.parametrize(
    ("rungs", "start", "slack"),
    [
        ([[98304 * n for n in range(3)]] * 2 + [[24576 * n for n in range(9)]] * 2, (1, 1, 4, 4), 0),
        ([[98304 * n for n in range(3)], [24576 * n for n in range(9)]], (1, 4), 0),
        ([[98304 * n for n in range(3)]] * 2 + [[24576 * n for n in range(4)]] * 3, (1, 1, 2, 1, 2), 0),
        ([[7 * n for n in range(3)], [3 * n for n in range(5)], [2 * n for n in range(5)]], (1, 2, 2), 0),
        ([[7 * n for n in range(3)], [3 * n for n in range(5)], [2 * n for n in range(5)]], (1, 2, 2), 1),
    ],
)
def test_one_move_reaches_every_neighbour_within_the_budget(rungs: list[list[int]], start: Levels, slack: int) -> None:
    """Where one group's level is worth several of another's: several rungs of one or of several others balance it."""
    ladder = _shared(rungs, start, slack)
    rng, seen = random.Random(0), set()
    for _ in range(3000):
        moved = mutate(ladder, start, rng, 1)
        assert moved is not None and ladder.low <= ladder.total(moved) <= ladder.high
        seen.add(moved)
    assert seen == _neighbours(ladder, start) and len(seen) > 1
    assert any(one[0] != start[0] and all(other == level for other, level in zip(one[2:-1], start[2:-1], strict=True))
               for one in seen)  # fmt: skip


def _of_two_kinds(start: Levels) -> Ladder:
    """Attention and FFN in turn, of five rungs."""
    plain = _ladder(start)
    return Ladder(plain.members, plain.counts, start, plain.low, plain.high, kinds=("attention", "ffn") * (len(start) // 2))


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_traded_between_kinds(seed: int) -> None:
    """Of a long walk every candidate has the sum of each kind it began with; both kinds move."""
    ladder, rng = _of_two_kinds((2, 1, 2, 1, 2, 4)), random.Random(seed)
    levels, seen = ladder.start, {ladder.start}
    for _ in range(200):
        levels = mutate(ladder, levels, rng) or levels
        assert sum(levels[0::2]) == 6 and sum(levels[1::2]) == 6 and all(0 <= level <= 4 for level in levels)
        seen.add(levels)
    assert len({one[0::2] for one in seen}) > 3 and len({one[1::2] for one in seen}) > 3


def test_one_of_each_kind_has_no_partner() -> None:
    """The search ends at once, though of one kind they could trade."""
    assert mutate(_of_two_kinds((2, 2)), (2, 2), random.Random(0)) is None
    assert mutate(_ladder((2, 2)), (2, 2), random.Random(0)) is not None


def test_a_search_with_nothing_to_try_ends() -> None:
    """One group cannot trade; two at opposite ends of short ladders have two states; no generations leave the start."""
    assert mutate(_ladder((2,)), (2,), random.Random(0)) is None
    search = Search(_ladder((2,), slack=0), 50, 8, 0)
    search.curve.clear()
    assert _run(search, lambda candidates, _rng: [1.0] * len(candidates)) == (2,) and search.num_generations == 0
    both = Search(_ladder((1, 0), num_rungs=2), 50, 8, 0)
    assert _run(both, lambda candidates, _rng: [float(one[0]) for one in candidates]) == (0, 1)
    assert both.num_generations == 1 and both.num_evaluated == 2
    none = Search(_ladder((2, 3, 2)), 0, 8, 0)
    assert _run(none) == (2, 3, 2) and len(none.curve) == 1


SHAPES = st.lists(st.tuples(st.integers(1, 48), st.integers(4, 200)), min_size=1, max_size=8)
SCOPES: tuple[Scope, ...] = ("row", "matrix", "block")


@settings(max_examples=80)
@given(shapes=SHAPES, sparsity=st.floats(0, 0.9), seed=st.integers(0, 99), scope=st.sampled_from(SCOPES))
def test_every_candidate_meets_the_budget(shapes: list[tuple[int, int]], sparsity: float, seed: int, scope: Scope) -> None:
    """To the weight, in each site's quanta and bounds, whatever the shapes; the ladder starts at the allocation it is given."""
    try:
        budget = Budget.of(shapes, sparsity, scope)
        counts = budget.apportion(budget.shift([sparsity] * len(shapes)))
    except ConfigError:
        return
    sites = [SiteFacts(f"site{index}", 0, shape, f"group{index // 2}" if shape == shapes[index - 1] else "")
             for index, shape in enumerate(shapes)]  # fmt: skip
    ladder = climb(sites, counts, budget)
    assert ladder.shares(ladder.start) == counts
    rng, levels = random.Random(seed), ladder.start
    for _ in range(6):
        levels = mutate(ladder, levels, rng) or levels
        shares = ladder.shares(levels)
        assert sum(shares) == budget.num_zeros
        for count, shape in zip(shares, shapes, strict=True):
            assert 0 <= count < shape[0] * shape[1] and (scope != "row" or count % shape[0] == 0)


def test_groups_of_a_model_have_equal_steps() -> None:
    """Rows that share a factor: one step for all, near two percent of the mean group, with four rungs on each side."""
    shapes = [(256, 256), (128, 256), (512, 256), (256, 512)]
    budget = Budget.of(shapes, 0.5, "row")
    sites = [SiteFacts(str(index), 0, shape) for index, shape in enumerate(shapes)]
    ladder = climb(sites, budget.apportion(budget.shift([0.5] * 4)), budget)
    steps = {after - before for rungs in ladder.zeros for before, after in itertools.pairwise(rungs)}
    assert len(steps) == 1 and all(len(rungs) == 9 for rungs in ladder.zeros)
    assert 0.01 < steps.pop() / (sum(rows * columns for rows, columns in shapes) / 4) < 0.03
    moved = mutate(ladder, ladder.start, random.Random(0))
    assert moved is not None and moved != ladder.start and sum(moved) == sum(ladder.start)


PATTERNS = (0.0, 0.5, 0.75)


def _menu_sites(shapes: Sequence[tuple[int, int]], seed: int) -> list[SiteFacts]:
    rng = random.Random(seed)
    sites = []
    for index, shape in enumerate(shapes):
        choices = PATTERNS if shape[1] % 4 == 0 else (0.0,)
        costs = [0.0, *sorted(rng.random() for _ in choices[1:])]
        sites.append(SiteFacts(f"site{index}", 0, shape, curve=tuple(zip(choices, costs, strict=True))))
    return sites


MENU_SHAPES = st.lists(st.tuples(st.integers(1, 12), st.sampled_from([4, 8, 12, 20, 6])), min_size=1, max_size=6)


@settings(max_examples=150)
@given(shapes=MENU_SHAPES, sparsity=st.floats(0, 0.75), seed=st.integers(0, 999))
def test_patterns_are_chosen_as_by_brute_force(shapes: list[tuple[int, int]], sparsity: float, seed: int) -> None:
    """The closest sum not below the target, or one a little above it that distorts less; else refused, naming the closest
    feasible one, which is accepted.
    """
    sites = _menu_sites(shapes, seed)
    numel = sum(site.numel for site in sites)
    wanted = Fraction(repr(sparsity)) * numel
    totals = [
        (sum(round(level * site.numel) for site, (level, _) in zip(sites, one, strict=True)), sum(cost for _, cost in one))
        for one in itertools.product(*(site.curve for site in sites))
    ]
    above = [zeros for zeros, _ in totals if zeros >= wanted]
    unit = math.gcd(*(round(level * site.numel) for site in sites for level, _ in site.curve)) or 1
    if not above or min(above) - math.ceil(wanted / unit) * unit > MAX_MISS * numel:
        with pytest.raises(ConfigError, match="closest feasible one is") as refused:
            Menu.of(sites, sparsity)
        closest = float(str(refused.value).split("closest feasible one is ")[1].split(";")[0])
        assert min(abs(closest - zeros / numel) for zeros, _ in totals) < 1e-5
        return
    menu = Menu.of(sites, sparsity)
    assert menu.low == min(above) and menu.high <= max(menu.low, math.ceil(wanted / unit) * unit + SLACK * numel)
    ladder = menu.ladder(sites)
    cost = sum(site.curve[level][1] for site, level in zip(sites, ladder.start, strict=True))
    assert menu.low <= sum(ladder.shares(ladder.start)) <= menu.high
    assert cost == pytest.approx(min(cost for zeros, cost in totals if menu.low <= zeros <= menu.high))


def test_patterns_trade_two_for_one() -> None:
    """Two sites from 2:4 to 1:4 pay for one that becomes dense; every candidate stays within the bounds."""
    sites = _menu_sites([(8, 8)] * 5, 0)
    ladder = Menu.of(sites, 0.5).ladder(sites)
    rng, seen = random.Random(0), {ladder.start}
    levels = ladder.start
    for _ in range(60):
        levels = mutate(ladder, levels, rng) or levels
        seen.add(levels)
        assert ladder.low <= ladder.total(levels) <= ladder.high
    assert {tuple(sorted(one)) for one in seen} == {(1, 1, 1, 1, 1), (0, 1, 1, 2, 2)}


def test_shapes_without_a_common_factor_are_counted_coarsely() -> None:
    """Odd shapes: the sum is never below the target, and hardly above it."""
    sites = [
        SiteFacts(str(index), 0, (4099 + 2 * index, 4 * (1009 + index)), curve=((0.0, 0.0), (0.5, 1.0 + index), (0.75, 9.0)))
        for index in range(40)
    ]
    ladder = Menu.of(sites, 0.5).ladder(sites)
    achieved = ladder.total(ladder.start) / sum(site.numel for site in sites)
    assert 0.5 <= achieved < 0.502
