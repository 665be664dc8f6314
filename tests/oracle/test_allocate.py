"""Allocations against hand examples and brute force; budgets that are met to the weight, or refused."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.allocate import ALLOCATORS, SiteFacts
from llmprune.allocate.budget import Budget
from llmprune.allocate.dp import distortion, minimize, options_of
from llmprune.engines.survey import levels, pq_index
from llmprune.errors import ConfigError
from llmprune.masks import keep_mask
from llmprune.spec import Pattern, Scope

SCOPES: tuple[Scope, ...] = ("row", "matrix", "block")
SHAPES = st.lists(st.tuples(st.integers(1, 48), st.integers(2, 200)), min_size=1, max_size=9)


def _facts(shapes: list[tuple[int, int]], seed: int = 0) -> list[SiteFacts]:
    """Sites with random facts, two a block; errors grow like those of a real layer."""
    rng = torch.Generator().manual_seed(seed)
    steepness = (1 + 5 * torch.rand(len(shapes), generator=rng)).tolist()
    outliers = torch.rand(len(shapes), generator=rng).tolist()
    return [
        SiteFacts(
            f"site{index}", index // 2, shape, f"site{index}", int(outliers[index] * shape[0] * shape[1] * 0.1),
            0.9 * outliers[index], tuple((s, math.expm1(steepness[index] * s)) for s in levels(0.6)),
        )
        for index, shape in enumerate(shapes)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ALLOCATORS)
@settings(max_examples=20)
@given(shapes=SHAPES, sparsity=st.floats(0, 0.99), seed=st.integers(0, 99), scope=st.sampled_from(SCOPES))
def test_the_budget_is_met_to_the_unit(
    name: str, shapes: list[tuple[int, int]], sparsity: float, seed: int, scope: Scope
) -> None:
    """The zeros sum to the multiple of the unit nearest to the target; each site's count is in its quanta and bounds; an
    infeasible budget is refused and the sparsity it names is feasible.
    """
    sites = _facts(shapes, seed)
    try:
        counts = ALLOCATORS[name].allocate(sites, sparsity, scope)
    except ConfigError as error:
        closest = str(error).split("closest feasible one is ")[1].split(";")[0]
        if scope != "row":
            assert sparsity * sum(site.numel for site in sites) > sum(site.numel - 1 for site in sites) - 1
            ALLOCATORS["uniform"].allocate(sites, float(closest), scope)
        return
    unit = math.gcd(*(rows for rows, _ in shapes)) if scope == "row" else 1
    exact = Fraction(sparsity) * sum(site.numel for site in sites)
    assert abs(sum(counts.values()) - exact) <= Fraction(unit, 2) + Fraction(1, 10**6)
    assert sum(counts.values()) % unit == 0
    for site in sites:
        assert 0 <= counts[site.name] < site.numel
        assert scope != "row" or counts[site.name] % site.shape[0] == 0


@pytest.mark.parametrize("scope", SCOPES)
@settings(max_examples=40)
@given(shape=st.tuples(st.integers(1, 40), st.integers(2, 300)), part=st.floats(0, 0.999))
def test_a_count_survives_the_way_through_a_float(scope: Scope, shape: tuple[int, int], part: float) -> None:
    """A count of zeros divided by the weights is a sparsity from which the support has that very count."""
    rows, columns = shape
    count = int(part * columns) * rows if scope == "row" else int(part * rows * columns)
    score_OI = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    assert int((~keep_mask(score_OI, Pattern(), count / (rows * columns), scope)).sum()) == count


def test_what_cannot_be_met_names_the_closest() -> None:
    """Two matrices of two inputs lose at most every second weight under scope row."""
    with pytest.raises(ConfigError, match=r"sparsity 0\.9 cannot .* closest feasible one is 0\.5; .*--scope"):
        Budget.of([(4, 2), (8, 2)], 0.9, "row")
    with pytest.raises(ConfigError, match="closest feasible one is 0.75"):
        Budget.of([(2, 2), (2, 2)], 0.9, "matrix")
    assert Budget.of([(4, 2), (8, 2)], 0.5, "row").apportion([8.0, 4.0]) == [4, 8]  # at the bounds nothing is left to choose


def test_coarse_quanta_are_settled_with_the_fewest_moves() -> None:
    """Rows of 6 and 10: a rest of 2 takes two sixes and takes back one ten."""
    budget = Budget.of([(6, 50), (10, 50)], 0.5, "row")
    assert budget.num_zeros == 400
    counts = budget.apportion([147.0, 253.0])
    assert sum(counts) == 400 and counts[0] % 6 == 0 and counts[1] % 10 == 0
    assert abs(counts[0] - 147) <= 20


@settings(max_examples=60)
@given(
    groups=st.lists(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 50)), min_size=1, max_size=5), min_size=1, max_size=5),
    total=st.integers(0, 20),
)
def test_dynamic_programming_is_brute_force(groups: list[list[tuple[int, int]]], total: int) -> None:
    """Same least sum over all combinations, whatever the curves; no combination is an error."""
    sums = [
        sum(cost for _, cost in choice) for choice in itertools.product(*groups) if sum(units for units, _ in choice) == total
    ]
    options = [[(units, float(cost)) for units, cost in group] for group in groups]
    if not sums:
        with pytest.raises(ValueError, match="no options"):
            minimize(options, total)
        return
    chosen = minimize(options, total)
    assert sum(chosen) == total
    assert min(sums) == sum(
        min(cost for units, cost in group if units == one) for group, one in zip(groups, chosen, strict=True)
    )


@pytest.mark.parametrize(("total", "least"), [(3, 3.5), (5, 6.5), (7, 12.0), (9, 17.0)])
def test_dynamic_programming_where_greedy_fails(total: int, least: float) -> None:
    """Three curves by hand, of which two are not convex: greedy marginals end at 14.5 and 21 for 7 and 9."""
    curves = [(0.0, 1, 4, 9, 16), (0.0, 2, 3, 5, 30), (0, 0.5, 6, 7, 8)]
    chosen = minimize([list(enumerate(map(float, curve))) for curve in curves], total)
    assert sum(chosen) == total
    assert sum(curve[level] for curve, level in zip(curves, chosen, strict=True)) == least


def test_dynamic_programming_takes_nothing_and_everything() -> None:
    """Zero budget, whole budget, a single group."""
    curve = [(0, 0.0), (1, 5.0), (2, 6.0)]
    assert minimize([curve, curve], 0) == [0, 0]
    assert minimize([curve, curve], 4) == [2, 2]
    assert minimize([curve], 1) == [1]


def test_curves_go_through_their_points_and_never_fall() -> None:
    """Interpolated in the logarithm; a measured dip is levelled; every unit in between is an option."""
    curve = [(0.5, 1.0), (0.6, 4.0), (0.7, 3.0), (0.8, 9.0)]
    assert [distortion(curve, s) for s, _ in curve] == pytest.approx([1, 4, 4, 9])
    assert distortion(curve, 0.55) == pytest.approx(2.0)
    assert distortion(curve, 0.75) == pytest.approx(6.0)
    assert distortion(curve, 0.1) == 1.0 and distortion(curve, 0.9) == pytest.approx(9.0)
    options = options_of(curve, 100, 5.0)
    assert [units for units, _ in options] == [10, 11, 12, 13, 14, 15, 16]
    assert [cost for _, cost in options] == sorted(cost for _, cost in options)


def test_the_site_that_suffers_less_gives_more() -> None:
    """dp: a steep curve keeps more weights than a flat one of the same size, and equal curves share equally."""

    def site(name: str, scale: float) -> SiteFacts:
        return SiteFacts(name, 0, (64, 64), name, curve=tuple((s, scale * math.exp(6 * s)) for s in levels(0.6)))

    counts = ALLOCATORS["dp"].allocate([site("flat", 1.0), site("steep", 4.0)], 0.6, "matrix")
    assert counts["flat"] > counts["steep"]
    # Equal slopes: exp(6 s) = 4 exp(6 t) with s + t = 1.2.
    assert counts["flat"] / 4096 == pytest.approx(0.6 + math.log(4) / 12, abs=1e-2)
    equal = ALLOCATORS["dp"].allocate([site("one", 1.0), site("other", 1.0)], 0.6, "matrix")
    assert equal["one"] / 4096 == pytest.approx(0.6, abs=1e-2)


def test_owl_by_hand() -> None:
    """Outlier shares 0, 1/4 and 1/2 of equal blocks: densities are off the mean by -0.08, 0 and +0.08."""
    sites = [SiteFacts(f"b{block}", block, (100, 100), num_outliers=2500 * block) for block in range(3)]
    counts = ALLOCATORS["owl"].allocate(sites, 0.7, "matrix")
    assert [counts[site.name] for site in sites] == [7800, 7000, 6200]


def test_owl_weighs_blocks_by_their_size_and_keeps_within_bounds() -> None:
    """The mean is over weights; at 97 % the deviation is cut at the last weight; equal blocks are treated equally."""
    sites = [SiteFacts("small", 0, (10, 10), num_outliers=0), SiteFacts("large", 1, (30, 10), num_outliers=300)]
    counts = ALLOCATORS["owl"].allocate(sites, 0.5, "matrix")
    assert counts["small"] / 100 - counts["large"] / 300 == pytest.approx(0.16, abs=0.01)
    assert sum(counts.values()) == 200
    assert ALLOCATORS["owl"].allocate(sites, 0.97, "matrix") == {"small": 99, "large": 289}
    level = [SiteFacts(name, block, (10, 10), num_outliers=3) for block, name in enumerate("ab")]
    assert ALLOCATORS["owl"].allocate(level, 0.5, "matrix") == {"a": 50, "b": 50}


def test_erk_by_hand() -> None:
    """Densities in the ratio of (O + I) / (O I); the small matrix stays dense where its share would exceed it."""
    sites = [SiteFacts("square", 0, (100, 100)), SiteFacts("wide", 0, (100, 400))]
    counts = ALLOCATORS["erk"].allocate(sites, 0.8, "matrix")
    kept = {site.name: 1 - counts[site.name] / site.numel for site in sites}
    assert kept["square"] / kept["wide"] == pytest.approx(0.02 / 0.0125, rel=1e-3)
    tiny = [SiteFacts("tiny", 0, (4, 4)), SiteFacts("large", 0, (400, 400))]
    assert ALLOCATORS["erk"].allocate(tiny, 0.5, "matrix")["tiny"] == 0


def test_pq_index_by_hand() -> None:
    """0 where all scores are equal, 1 - sqrt(1/4) for one of four, 1 - 7 / (5 sqrt 2) for (3, 4)."""
    assert pq_index(torch.ones(5)) == pytest.approx(0, abs=1e-12)
    assert pq_index(torch.tensor([0.0, 0, 0, 2])) == pytest.approx(0.5)
    assert pq_index(torch.tensor([3.0, 4.0])) == pytest.approx(1 - 7 / (5 * math.sqrt(2))) == pytest.approx(0.0100505, abs=1e-6)
    assert pq_index(torch.zeros(3)) == 0
    gaussian = torch.randn(400, 400, generator=torch.Generator().manual_seed(0)).abs()
    assert pq_index(gaussian) == pytest.approx(1 - math.sqrt(2 / math.pi), abs=2e-3)


def test_pqi_follows_the_bound() -> None:
    """Densities in the ratio (1 - index)^2; what is more unequal is pruned more."""
    sites = [SiteFacts("even", 0, (100, 100), pq_index=0.0), SiteFacts("uneven", 0, (100, 100), pq_index=0.5)]
    counts = ALLOCATORS["pqi"].allocate(sites, 0.75, "matrix")
    assert counts == {"even": 6000, "uneven": 9000}


@pytest.mark.parametrize("name", ALLOCATORS)
def test_more_sparsity_takes_from_every_site(name: str) -> None:
    """A higher target leaves no site with fewer zeros, but for rounding."""
    sites = _facts([(40, 100), (20, 100), (40, 60), (100, 100)])
    before = ALLOCATORS[name].allocate(sites, 0.55, "matrix")
    after = ALLOCATORS[name].allocate(sites, 0.65, "matrix")
    assert sum(after.values()) - sum(before.values()) == round(0.1 * sum(site.numel for site in sites))
    assert all(after[site] >= before[site] - 8 for site in before)


def test_levels_surround_the_target() -> None:
    """Nine rising levels below 1 with the target among them; at 0 none lies below."""
    for sparsity in (0.05, 0.5, 0.6, 0.7, 0.95):
        found = levels(sparsity)
        assert len(found) == 9 and sparsity in found and found == sorted(found)
        assert found[0] >= 0 and found[-1] < 1
    assert levels(0.0)[0] == 0 and len(levels(0.0)) == 5
