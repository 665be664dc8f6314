"""The block problem and its solvers against hand-computed examples and brute force. N samples, V variables."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from llmprune.errors import ConfigError
from llmprune.solvers.anneal import _in_turn, anneal
from llmprune.solvers.greedy import swap_changes
from llmprune.solvers.problem import BlockProblem
from llmprune.solvers.solve import SOLVERS, solve

DOUBLE = torch.float64


def _set(pruned_V: Tensor) -> set[int]:
    return set(pruned_V.nonzero()[:, 0].tolist())


def _bools(size: int, *members: int) -> Tensor:
    return torch.tensor([position in members for position in range(size)])


def _random(
    size: int, num_samples: int, seed: int, *, num_pruned: int | None = None, groups: int | None = None
) -> BlockProblem:
    """A random block in a random state, fp64."""
    generator = torch.Generator().manual_seed(seed)
    count = size // 2 if num_pruned is None else num_pruned
    pruned_V = torch.zeros(size, dtype=torch.bool)
    pruned_V[torch.randperm(size, generator=generator)[:count]] = True
    return BlockProblem.of_loss(
        torch.randn(size, generator=generator, dtype=DOUBLE),
        pruned_V,
        0.3 * torch.randn(size, generator=generator, dtype=DOUBLE),
        torch.randn(num_samples, size, generator=generator, dtype=DOUBLE) / num_samples**0.5,
        multiplier=0.75,
        ridge=0.01,
        group_V=None if groups is None else torch.arange(size) % groups,
    )


def _brute(problem: BlockProblem) -> float:
    """The least energy over all choices with the same number per group, by an independent loop on dense Q."""
    dense_VV = problem.dense().double()
    index_V, pruned_G, _ = problem.groups()
    least = float("inf")
    for members in combinations(range(problem.num_variables), int(problem.pruned_V.sum())):
        x_V = torch.zeros(problem.num_variables, dtype=DOUBLE)
        x_V[list(members)] = 1
        if torch.equal(torch.bincount(index_V, weights=x_V, minlength=len(pruned_G)).long(), pruned_G):
            least = min(least, float(x_V @ dense_VV @ x_V) + problem.constant)
    return least


@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_that_cancel_are_pruned_together(solver: str) -> None:
    """One sample's gradient (1, -1, 0.5): pruning 0 and 1 costs nothing, which needs the negative entry of Q."""
    problem = BlockProblem.of_loss(torch.ones(3), _bools(3), torch.zeros(3), torch.tensor([[1.0, -1.0, 0.5]]))
    problem = replace(problem, pruned_V=_bools(3, 1, 2))  # the start fixes the number; the model is of the dense state
    solution = solve(problem, solver)
    assert _set(solution.pruned_V) == {0, 1}
    assert problem.energy(solution.pruned_V[None]).item() == 0
    assert problem.energy(problem.pruned_V[None]).item() == pytest.approx(0.125)
    assert sorted(problem.dense().diagonal().tolist()) == [0.125, 0.5, 0.5]  # by these alone 2 would go first


@pytest.mark.parametrize(
    ("multiplier", "diagonal", "constant", "changes"),
    [
        (1.0, (1.2, 1.5, 0.525), -1.5, (-0.3, 0.0, -0.975)),
        (0.75, (1.275, 1.0, 0.55), -1.0, (0.275, 0.0, -0.45)),
    ],
)
def test_the_model_depends_on_the_present_state(
    multiplier: float, diagonal: tuple[float, ...], constant: float, changes: tuple[float, ...]
) -> None:
    """With weight 1 pruned, gradient and shift enter the linear term, and staying put changes nothing."""
    problem = BlockProblem.of_loss(
        torch.ones(3), _bools(3, 1), torch.tensor([0.3, -2.0, 0.1]), torch.tensor([[1.0, -1.0, 0.5]]), multiplier=multiplier
    )
    torch.testing.assert_close(problem.dense().diagonal(), torch.tensor(diagonal))
    assert problem.constant == pytest.approx(constant)
    energies = problem.energy(torch.eye(3).bool())
    torch.testing.assert_close(energies, torch.tensor(changes, dtype=DOUBLE), atol=1e-6, rtol=0)
    assert _set(solve(problem, "exhaustive").pruned_V) == {2}


def test_the_quadratic_form_is_the_taylor_model() -> None:
    """x^T Q x + c = gamma G.d + 1/2 d^T H d + lambda |d|^2 for any state and any x; for the present x it is 0."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        dense_V, gradient_V = torch.randn(2, 9, generator=generator, dtype=DOUBLE)
        factor_NV = torch.randn(4, 9, generator=generator, dtype=DOUBLE)
        pruned_V, x_V = torch.rand(2, 9, generator=generator) < 0.5
        problem = BlockProblem.of_loss(dense_V, pruned_V, gradient_V, factor_NV, multiplier=0.6, ridge=0.3)
        step_V = dense_V * (pruned_V.double() - x_V.double())
        curved = 0.5 * step_V @ (factor_NV.T @ factor_NV) @ step_V
        expected = 0.6 * gradient_V @ step_V + curved + 0.3 * step_V @ step_V
        x = x_V.double()
        assert float(x @ problem.dense() @ x) + problem.constant == pytest.approx(float(expected), abs=1e-12)
        assert problem.energy(x_V[None]).item() == pytest.approx(float(expected), abs=1e-12), seed
        assert problem.energy(pruned_V[None]).item() == pytest.approx(0, abs=1e-12)


def test_two_samples_by_hand() -> None:
    """Costs of all six pairs; curvature's diagonal alone would prune 0 and 3."""
    factor_NV = torch.tensor([[1.0, -1.0, 2.0, 0.0], [0.0, 1.0, -1.5, 1.0]]) / 2**0.5
    problem = BlockProblem.of_loss(torch.ones(4), _bools(4), torch.zeros(4), factor_NV)
    expected = {(0, 1): 0.25, (1, 2): 0.3125, (0, 3): 0.5, (2, 3): 1.0625, (1, 3): 1.25, (0, 2): 2.8125}
    for pair, cost in expected.items():
        assert problem.energy(_bools(4, *pair)[None]).item() == pytest.approx(cost)
    torch.testing.assert_close(problem.dense().diagonal(), torch.tensor([0.25, 0.5, 1.5625, 0.25]))
    for solver in SOLVERS:
        assert _set(solve(replace(problem, pruned_V=_bools(4, 0, 3)), solver).pruned_V) == {0, 1}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("groups", [None, 3])
def test_annealing_finds_the_optimum_of_small_blocks(seed: int, groups: int | None) -> None:
    """Up to 12 variables, any number pruned, with and without groups: as good as trying everything."""
    problem = _random(9 + seed % 4, 1 + seed % 5, seed, num_pruned=3 + seed % 4, groups=groups)
    least = _brute(problem)
    exact, annealed = solve(problem, "exhaustive"), solve(problem, "anneal", seed=seed)
    assert exact.change == pytest.approx(least, abs=1e-9)
    assert annealed.change == pytest.approx(least, abs=1e-9)
    assert annealed.pruned_V.sum() == problem.pruned_V.sum()


@pytest.mark.parametrize("solver", ["anneal", "greedy"])
@pytest.mark.parametrize("groups", [None, 50])
def test_no_solver_ends_above_its_start(solver: str, groups: int | None) -> None:
    """Blocks of 200 variables: every group keeps its count, the change is the energy's and not positive, and no single
    swap would help further.
    """
    for seed in range(3):
        problem = _random(200, 6, seed, groups=groups)
        solution = solve(problem, solver)
        assert solution.change < 0
        assert bool(problem.feasible(solution.pruned_V[None]))
        assert solution.change == pytest.approx(problem.energy(solution.pruned_V[None]).item(), abs=1e-9)
        assert solution.num_swaps == int((solution.pruned_V & ~problem.pruned_V).sum()) > 0
        index_V, _, _ = problem.groups()
        ones_K, zeros_L = solution.pruned_V.nonzero()[:, 0], (~solution.pruned_V).nonzero()[:, 0]
        keep_P, prune_P = ones_K.repeat_interleave(len(zeros_L)), zeros_L.repeat(len(ones_K))
        inside_P = index_V[keep_P] == index_V[prune_P]
        assert swap_changes(problem, solution.pruned_V, keep_P[inside_P], prune_P[inside_P]).min() > -1e-9
        again = solve(replace(problem, pruned_V=solution.pruned_V), solver)
        assert again.change <= 0


def test_the_change_of_a_swap_is_the_dense_one() -> None:
    """-alpha + beta - gamma of the low-rank form equals the difference of two dense energies, for every pair."""
    problem = _random(10, 3, 1)
    ones_K, zeros_L = problem.pruned_V.nonzero()[:, 0], (~problem.pruned_V).nonzero()[:, 0]
    keep_P, prune_P = ones_K.repeat_interleave(len(zeros_L)), zeros_L.repeat(len(ones_K))
    changes = swap_changes(problem, problem.pruned_V, keep_P, prune_P)
    assert len(changes) == 25
    for keep, prune, change in zip(keep_P, prune_P, changes, strict=True):
        swapped_V = problem.pruned_V.clone()
        swapped_V[keep], swapped_V[prune] = False, True
        assert problem.energy(swapped_V[None]).item() == pytest.approx(float(change), abs=1e-12)


def test_swaps_judged_together_are_those_judged_in_turn() -> None:
    """The fixed point equals the plain loop that adds each taken swap before judging the next."""
    generator = torch.Generator().manual_seed(0)
    step_RPN = torch.randn(5, 40, 3, generator=generator, dtype=DOUBLE)
    change_RP = torch.randn(5, 40, generator=generator, dtype=DOUBLE)
    allowed_RP = torch.rand(5, 40, generator=generator, dtype=DOUBLE)
    taken_RP = _in_turn(step_RPN, change_RP, allowed_RP)
    for restart in range(5):
        sum_N = torch.zeros(3, dtype=DOUBLE)
        for pair in range(40):
            take = bool(change_RP[restart, pair] + step_RPN[restart, pair] @ sum_N < allowed_RP[restart, pair])
            assert take == bool(taken_RP[restart, pair])
            sum_N += take * step_RPN[restart, pair]


@pytest.mark.parametrize("solver", SOLVERS)
def test_order_of_the_block_does_not_matter(solver: str) -> None:
    """Permuted variables give the permuted optimum."""
    problem = _random(11, 3, 4)
    order_V = torch.randperm(11, generator=torch.Generator().manual_seed(7))
    permuted = BlockProblem(
        problem.factor_NV[:, order_V], problem.linear_V[order_V], problem.pruned_V[order_V], constant=problem.constant
    )
    assert torch.equal(solve(permuted, solver).pruned_V, solve(problem, solver).pruned_V[order_V])


@pytest.mark.parametrize("solver", SOLVERS)
def test_scale_of_the_energy_does_not_matter(solver: str) -> None:
    """1024 times the energy gives the same choice and 1024 times the change."""
    problem = _random(12, 4, 2)
    scaled = replace(problem, factor_NV=32 * problem.factor_NV, linear_V=1024 * problem.linear_V)
    plain, large = solve(problem, solver), solve(scaled, solver)
    assert torch.equal(plain.pruned_V, large.pruned_V)
    assert large.change == pytest.approx(1024 * plain.change)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_large_ridge_holds_everything(solver: str) -> None:
    """With lambda large nothing moves; with no gradient and no curvature any lambda suffices, and without one weights
    that do nothing are pruned for those that do.
    """
    size, start_V = 8, _bools(8, 0, 2, 4)
    dense_V = torch.linspace(0.5, 1.5, size)
    gradient_V = torch.where(torch.arange(size) < 4, -torch.ones(size), torch.zeros(size))
    nothing_NV = torch.zeros(2, size)
    large = BlockProblem.of_loss(dense_V, start_V, 5 * gradient_V, torch.randn(2, size), ridge=1e6)
    assert torch.equal(solve(large, solver).pruned_V, start_V)
    silent = BlockProblem.of_loss(dense_V, start_V, torch.zeros(size), nothing_NV, ridge=1e-3)
    assert torch.equal(solve(silent, solver).pruned_V, start_V)
    free = BlockProblem.of_loss(dense_V, start_V, gradient_V, nothing_NV)
    assert _set(solve(free, solver).pruned_V) <= {4, 5, 6, 7}


def test_annealing_is_the_same_for_the_same_seed() -> None:
    """The seed decides everything."""
    problem = _random(200, 8, 3)
    assert torch.equal(anneal(problem, num_restarts=3, seed=5), anneal(problem, num_restarts=3, seed=5))


def test_dense_and_penalised_forms_are_the_problem() -> None:
    """Other solvers get the same energies; the penalty is 0 exactly on choices that keep every group's count."""
    problem = _random(8, 3, 0, groups=2)
    plain_VV = problem.dense()
    dense_VV, constant = problem.penalised(100.0)
    for number in range(256):
        x_V = torch.tensor([number >> bit & 1 for bit in range(8)]).bool()
        x = x_V.double()
        energy = problem.energy(x_V[None]).item()
        assert float(x @ plain_VV @ x) + problem.constant == pytest.approx(energy)
        penalty = float(x @ dense_VV @ x) + constant - energy
        assert penalty == pytest.approx(0, abs=1e-9) if bool(problem.feasible(x_V[None])) else penalty >= 100 - 1e-9


def test_any_function_may_solve() -> None:
    """An answer from outside counts only if it keeps the counts, and only if it is better."""
    problem = _random(10, 3, 5)
    best_V = solve(problem, "exhaustive").pruned_V
    assert torch.equal(solve(problem, lambda _: best_V).pruned_V, best_V)
    energies = {int(i): problem.energy(problem.pruned_V.roll(int(i))[None]).item() for i in range(10)}
    worse_V = problem.pruned_V.roll(max(energies, key=lambda shift: energies[shift]))
    assert torch.equal(solve(problem, lambda _: worse_V).pruned_V, problem.pruned_V)
    with pytest.raises(ValueError, match="how many"):
        solve(problem, lambda _: torch.ones(10, dtype=torch.bool))
    with pytest.raises(ValueError, match="use one of anneal, greedy, exhaustive"):
        solve(problem, "annealing")
    with pytest.raises(ValueError, match="too many to try"):
        solve(_random(60, 2, 0), "exhaustive")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("count", [0, 6])
def test_nothing_to_swap(solver: str, count: int) -> None:
    """All pruned or none pruned: the answer is the start."""
    problem = _random(6, 2, 0, num_pruned=count)
    assert solve(problem, solver).num_swaps == 0


def _grouped_problem() -> BlockProblem:
    generator = torch.Generator().manual_seed(4)
    factor_NV, linear_V = torch.randn(3, 8, generator=generator).double(), torch.randn(8, generator=generator).double()
    pruned_V = torch.tensor([True, False, True, False, False, True, False, False])
    return BlockProblem(factor_NV, linear_V, pruned_V, torch.arange(8) // 4, constant=0.5)


def test_a_safe_penalty_keeps_every_constraint() -> None:
    """Of all 256 choices the least penalised one is the best that keeps the sums."""
    problem = _grouped_problem()
    q_VV, constant = problem.penalised(problem.safe_penalty())
    choices_RV = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 8)
    energy_R = ((choices_RV @ q_VV) * choices_RV).sum(1) + constant
    best_V = choices_RV[energy_R.argmin()].bool()
    assert bool(problem.feasible(best_V[None]))
    assert torch.equal(best_V, solve(problem, "exhaustive").pruned_V)
    assert float(energy_R.min()) == pytest.approx(float(problem.energy(best_V[None])))


def test_dimod_reads_the_problem() -> None:
    """The same energies in its own model, and its exact solver finds our answer."""
    dimod = pytest.importorskip("dimod", reason="the optional package dimod is not installed")
    problem = _grouped_problem()
    model = problem.to_bqm()
    answer = solve(problem, "exhaustive")
    energy = float(problem.energy(answer.pruned_V[None]))
    assert model.energy({i: int(pruned) for i, pruned in enumerate(answer.pruned_V)}) == pytest.approx(energy)
    best = dimod.ExactSolver().sample(model).first
    assert best.energy == pytest.approx(energy)
    assert [bool(best.sample[i]) for i in range(8)] == answer.pruned_V.tolist()


def test_without_dimod_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optional package: what to install."""
    monkeypatch.setitem(sys.modules, "dimod", None)
    with pytest.raises(ConfigError, match="pip install dimod"):
        _grouped_problem().to_bqm()
