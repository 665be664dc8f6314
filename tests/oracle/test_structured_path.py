"""Local structured pruning against hand-solved cases, brute force and its own definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmprune.errors import FactorizationError
from llmprune.structured.path import Criterion, Level, columns_of, expectation, nested_path


def _row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def _square(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _random(num_out: int = 5, num_in: int = 12, num_tokens: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and a damped Gram matrix of correlated inputs, fp64."""
    generator = torch.Generator().manual_seed(seed)
    mixing_II = torch.eye(num_in) + 0.5 * torch.randn(num_in, num_in, generator=generator)
    x_TI = (torch.randn(num_tokens, num_in, generator=generator) @ mixing_II).double()
    gram_II = x_TI.T @ x_TI
    gram_II.diagonal().add_(0.01 * gram_II.diagonal().mean())
    return torch.randn(num_out, num_in, generator=generator).double(), gram_II


def _last(weight_OI: Tensor, hessian_II: Tensor, count: int, *, group_size: int = 1, chunk: int = 1,
          criterion: Criterion = "obs") -> Level:  # fmt: skip
    [level] = nested_path(
        weight_OI, hessian_II, group_size=group_size, counts=[count], chunk=chunk, criterion=criterion
    )  # fmt: skip
    return level


def _removed(level: Level, num_groups: int) -> set[int]:
    return set(range(num_groups)) - set(level.kept_G.tolist())


def _loss(weight_OI: Tensor, pruned_OI: Tensor, hessian_II: Tensor) -> float:
    change_OI = weight_OI - pruned_OI
    return float(((change_OI @ hessian_II) * change_OI).sum()) / 2


def _solved(weight_OI: Tensor, hessian_II: Tensor, kept: list[int]) -> Tensor:
    """The best weights on a support, by the normal equations."""
    best_OI = torch.zeros_like(weight_OI)
    if kept:
        best_OI[:, kept] = torch.linalg.solve(hessian_II[kept][:, kept], (weight_OI @ hessian_II)[:, kept].T).T
    return best_OI


def test_two_channels_by_hand() -> None:
    """The other takes over half of what went."""
    level = _last(_row(1, 1), _square((2, 1), (1, 2)), 1)
    assert len(level.kept_G) == 1  # either: they are alike
    assert level.weight_OK.item() == pytest.approx(1.5) and level.loss == pytest.approx(0.75)


def test_of_a_redundant_pair_one_stays() -> None:
    """Channels 0 and 1 are the same: one at a time the optimum is found, both at once the worst; the first-order term alone
    tells them apart at once.
    """
    hessian_II = _square((1.007, 1, 0), (1, 1.007, 0), (0, 0, 0.107))
    weight_OI = _row(1, 1, 1)
    level = _last(weight_OI, hessian_II, 2)
    assert _removed(level, 3) == {0, 2}
    assert level.weight_OK.item() == pytest.approx(1.993049, abs=1e-6) and level.loss == pytest.approx(0.0604757, abs=1e-7)
    at_once = _last(weight_OI, hessian_II, 2, chunk=2)
    assert _removed(at_once, 3) == {0, 1} and at_once.loss == pytest.approx(2.007)
    assert _removed(_last(weight_OI, hessian_II, 2, chunk=2, criterion="obs+g"), 3) == {0, 2}


@pytest.mark.parametrize(
    ("weight", "criterion", "first"),
    [
        ((-2, -2, 2), "obs", 0), ((-2, -2, 2), "obs+g", 1), ((-2, -2, 2), "obs+|g|", 1),
        ((1, -1, 3), "obs", 0), ((1, -1, 3), "obs+g", 0), ((1, -1, 3), "obs+|g|", 1),
    ],
)  # fmt: skip
def test_the_three_criteria_differ(weight: tuple[float, ...], criterion: Criterion, first: int) -> None:
    """Cases in which each of them takes another channel first."""
    hessian_II = _square((1, 0, -1), (0, 1, 0), (-1, 0, 2))
    assert _removed(_last(_row(*weight), hessian_II, 1, criterion=criterion), 3) == {first}


@pytest.mark.parametrize(
    ("kept", "loss", "weights"),
    [([1, 2], 2 / 3, (5 / 3, 2 / 3)), ([0, 2], 0.5, (1.5, 1.5)), ([1], 1.0, (2,)), ([2], 2.75, (1.5,))],
)
def test_group_removal_by_hand(kept: list[int], loss: float, weights: tuple[float, ...]) -> None:
    """Tridiagonal (1, 2, 1): losses and survivors of four supports, by the same solve the levels come from."""
    hessian_II = _square((2, 1, 0), (1, 2, 1), (0, 1, 2))
    best_OI = _solved(_row(1, 1, 1), hessian_II, kept)
    assert best_OI[0, kept].tolist() == pytest.approx(list(weights))
    assert _loss(_row(1, 1, 1), best_OI, hessian_II) == pytest.approx(loss)
    if kept == [0, 2]:
        assert _last(_row(1, 1, 1), hessian_II, 1).loss == pytest.approx(loss)


def test_a_head_is_worth_what_its_block_is() -> None:
    """Not the mean of its channels: the block says that head 1 goes, and at what loss."""
    hessian_II = _square((2, 0, 1, 0), (0, 2, 0, 0), (1, 0, 3, 0), (0, 0, 0, 1))
    level = _last(_row(1, 1, 1, 1), hessian_II, 1, group_size=2)
    assert level.kept_G.tolist() == [0] and level.loss == pytest.approx(7 / 4)


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("group_size", [1, 3])
def test_updates_equal_the_solution_on_the_support(chunk: int, group_size: int) -> None:
    """However many go at once, the survivors are the least squares on what is left, and any other weights lose more."""
    weight_OI, hessian_II = _random()
    counts = [1, 2, 3]
    levels = nested_path(weight_OI, hessian_II, group_size=group_size, counts=counts, chunk=chunk)
    for level in levels:
        kept = columns_of(level.kept_G, group_size).tolist()
        best_OI = _solved(weight_OI, hessian_II, kept)
        torch.testing.assert_close(level.weight_OK, best_OI[:, kept], rtol=1e-10, atol=1e-10)
        assert level.loss == pytest.approx(_loss(weight_OI, best_OI, hessian_II), rel=1e-9)
        other_OI = best_OI.clone()
        other_OI[:, kept] += 0.01 * torch.randn(len(other_OI), len(kept), generator=torch.Generator().manual_seed(1)).double()
        assert _loss(weight_OI, other_OI, hessian_II) > level.loss


@pytest.mark.parametrize("seed", range(5))
def test_the_first_group_is_the_best_one(seed: int) -> None:
    """By brute force; of several, no better than all combinations."""
    weight_OI, hessian_II = _random(seed=seed)

    def best(count: int) -> float:
        supports = itertools.combinations(range(4), 4 - count)
        return min(
            _loss(weight_OI, _solved(weight_OI, hessian_II, [3 * g + c for g in kept for c in range(3)]), hessian_II)
            for kept in supports
        )

    assert _last(weight_OI, hessian_II, 1, group_size=3).loss == pytest.approx(best(1))
    assert _last(weight_OI, hessian_II, 2, group_size=3).loss >= best(2) * (1 - 1e-9)


def test_uncorrelated_inputs_go_by_their_size() -> None:
    """A diagonal Hessian: one at a time, all at once and weight times diagonal are the same, and nothing is updated."""
    weight_OI, _ = _random()
    hessian_II = torch.diag(torch.linspace(0.5, 3, 12, dtype=torch.float64))
    by_size = ((weight_OI.square().sum(0) * hessian_II.diagonal()).argsort()[:6]).tolist()
    for chunk in (1, 6):
        level = _last(weight_OI, hessian_II, 6, chunk=chunk)
        assert _removed(level, 12) == set(by_size)
        torch.testing.assert_close(level.weight_OK, weight_OI[:, level.kept_G])


@pytest.mark.parametrize("criterion", ["obs", "obs+g", "obs+|g|"])
def test_levels_are_nested_exact_and_rising(criterion: Criterion) -> None:
    """From bit-exact to nothing; what is asked between two counts does not change what is at them."""
    weight_OI, hessian_II = _random()
    weight_OI = weight_OI.bfloat16()
    counts = [0, 3, 6, 8, 12]
    levels = nested_path(weight_OI, hessian_II, group_size=1, counts=counts, criterion=criterion)
    assert [len(level.kept_G) for level in levels] == [12 - count for count in counts]
    assert torch.equal(levels[0].weight_OK, weight_OI) and levels[0].loss == 0
    assert levels[-1].weight_OK.shape == (5, 0)
    for before, after in itertools.pairwise(levels):
        assert set(after.kept_G.tolist()) < set(before.kept_G.tolist()) and after.loss > before.loss
        assert after.weight_OK.dtype == torch.bfloat16
    [alone] = nested_path(weight_OI, hessian_II, group_size=1, counts=[8], criterion=criterion)
    assert torch.equal(alone.kept_G, levels[3].kept_G) and torch.equal(alone.weight_OK, levels[3].weight_OK)


def test_scale_order_and_basis_do_not_matter() -> None:
    """Of the inputs' scale, of the order of the channels, of an orthogonal change of the outputs."""
    weight_OI, hessian_II = _random()
    level = _last(weight_OI, hessian_II, 5, criterion="obs+|g|")
    scaled = _last(weight_OI, 49 * hessian_II, 5, criterion="obs+|g|")
    assert torch.equal(scaled.kept_G, level.kept_G)
    torch.testing.assert_close(scaled.weight_OK, level.weight_OK)
    order_I = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    permuted = _last(weight_OI[:, order_I], hessian_II[order_I][:, order_I], 5, criterion="obs+|g|")
    assert sorted(order_I[permuted.kept_G].tolist()) == level.kept_G.tolist()
    turn_OO = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(4)).double()).Q
    turned = _last(turn_OO @ weight_OI, hessian_II, 5, criterion="obs+|g|")
    assert torch.equal(turned.kept_G, level.kept_G)
    torch.testing.assert_close(turned.weight_OK, turn_OO @ level.weight_OK)


def test_the_mean_weight_puts_out_the_mean() -> None:
    """Levels weighted by what stays of them: (8 - e) / 36 for nine of them, a mean sparsity of 7/24."""
    weight_OI, hessian_II = _random(num_in=16)
    levels = nested_path(weight_OI, hessian_II, group_size=2, counts=list(range(9)))
    mean_OI = expectation(levels, 8, 2)
    x_TI = torch.randn(7, 16, generator=torch.Generator().manual_seed(5)).double()
    by_hand_TO = sum(
        (8 - number) / 36 * (x_TI[:, columns_of(level.kept_G, 2)] @ level.weight_OK.T) for number, level in enumerate(levels)
    )
    torch.testing.assert_close(x_TI @ mean_OI.T, by_hand_TO)
    assert sum((8 - e) / 36 * e / 8 for e in range(9)) == pytest.approx(7 / 24)


def test_an_indefinite_matrix_is_refused() -> None:
    """Nothing is inverted silently wrong."""
    with pytest.raises(FactorizationError, match="positive definite"):
        _last(_row(1, 1), _square((1, 2), (2, 1)), 1)
