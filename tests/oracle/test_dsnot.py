"""DSnoT against a loop over rows and swaps written from the paper. O out, I in features, T tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmprune.masks import keep_mask
from llmprune.methods import METHODS, dsnot
from llmprune.spec import Need, Pattern, Scope, Target
from llmprune.stats import LinearStats


def _problem(rows: int = 12, columns: int = 40, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and inputs whose means are not zero: what DSnoT repairs."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(rows, columns, generator=generator)
    x_TI = torch.randn(tokens, columns, generator=generator) * torch.linspace(0.2, 2, columns)
    return weight_OI, x_TI + torch.randn(columns, generator=generator)


def _stats(x_TI: Tensor) -> LinearStats:
    stats = LinearStats(x_TI.shape[1], Need.MEAN, "cpu")
    stats.update(x_TI)
    return stats


def _by_hand(
    keep: list[bool], mean: list[float], spread: list[float], score: list[float], settled: float, width: int, cycles: int
) -> list[bool]:
    """One row, one swap after the other, in Python's floats."""
    keep = list(keep)
    columns = range(len(keep))
    error = sum(mean[j] for j in columns if not keep[j])
    best, best_error = list(keep), abs(error)
    for _ in range(cycles):
        if abs(error) <= settled:
            break
        sign = 1 if error > 0 else -1
        partners = {j // width for j in columns if keep[j] and sign * mean[j] < 0}
        growable = [j for j in columns if not keep[j] and sign * mean[j] > 0 and j // width in partners]
        if not growable:
            break
        grow = max(growable, key=lambda j: sign * mean[j] / spread[j])
        prunable = [j for j in columns if keep[j] and sign * mean[j] < 0 and j // width == grow // width]
        prune = min(prunable, key=lambda j: score[j])
        keep[grow], keep[prune] = True, False
        error += mean[prune] - mean[grow]
        if abs(error) < best_error:
            best, best_error = list(keep), abs(error)
    return best


@pytest.mark.parametrize("settled", [0.0, 0.3])
@pytest.mark.parametrize("cycles", [1, 7, 50])
@pytest.mark.parametrize(("pattern", "width"), [("unstructured", 40), ("2:4", 4), ("4:8", 8)])
def test_swaps_are_those_of_a_loop_in_fp64(pattern: str, width: int, cycles: int, settled: float) -> None:
    """Every row ends with the support that the loop finds, weight by weight; and something is swapped."""
    weight_OI, x_TI = (x.double() for x in _problem())
    mean_OI, spread_I = weight_OI * x_TI.mean(0), x_TI.var(0, correction=0)
    score_OI = weight_OI.abs() * x_TI.norm(dim=0)
    keep_OI = keep_mask(score_OI, Pattern.parse(pattern), 0.5, "row")
    settled_O = torch.full((len(weight_OI),), settled, dtype=torch.float64)
    before_OI = keep_OI.clone()
    ours_OI = dsnot.swap(
        keep_OI, mean_OI=mean_OI, spread_I=spread_I, score_OI=score_OI, settled_O=settled_O, width=width, cycles=cycles
    )
    assert torch.equal(keep_OI, before_OI)
    assert not torch.equal(ours_OI, keep_OI)
    for row, ours_I in enumerate(ours_OI):
        expected = _by_hand(
            keep_OI[row].tolist(), mean_OI[row].tolist(), spread_I.tolist(), score_OI[row].tolist(), settled, width, cycles
        )
        assert ours_I.tolist() == expected


@pytest.mark.parametrize(
    ("scope", "pattern"), [("row", "unstructured"), ("matrix", "unstructured"), ("block", "unstructured"), ("row", "2:4")]
)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("settled", [0.0, dsnot.SETTLED])
def test_mean_errors_never_grow_and_most_shrink(
    seed: int, scope: Scope, pattern: str, settled: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No output's mean error on the calibration inputs ends larger than Wanda's, and their sum falls: where every error is to
    be repaired, to less than half.
    """
    monkeypatch.setattr(dsnot, "SETTLED", settled)
    weight_OI, x_TI = _problem(16, 256, seed=seed)
    target = Target(Pattern.parse(pattern), 0.5, scope)
    keep_OI = dsnot.support(weight_OI, _stats(x_TI), target)
    wanda_OI = METHODS["wanda"].prune(weight_OI, _stats(x_TI), target, damping=0.01, generator=torch.Generator()) != 0
    assert torch.equal(keep_OI.sum(1), wanda_OI.sum(1))
    errors = [((weight_OI * ~mask_OI).double() @ x_TI.double().mean(0)).abs() for mask_OI in (keep_OI, wanda_OI)]
    assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-5).all()
    assert errors[0].sum() < errors[1].sum() * (0.9 if settled else 0.5)


def test_a_swap_by_hand() -> None:
    """Wanda prunes column 1, whose 0.9 the output then lacks on average. It can come back for column 2 alone, the only one
    with a negative share: that leaves -0.3 where the mean of that input is 0.3, and -1, no better, where it is 1.
    """
    weight_OI, target = torch.tensor([[3.0, 0.9, -1.0, 2.0]]), Target(Pattern(), 0.25, "row")
    for mean, expected in ((0.3, [True, True, False, True]), (1.0, [True, False, True, True])):
        x_TI = torch.tensor([1.0, 1.0, mean, 1.0]) + torch.tensor([[0.5, 0.5, 2.0, 0.5], [-0.5, -0.5, -2.0, -0.5]])
        wanda_OI = keep_mask(weight_OI.abs() * x_TI.norm(dim=0), target.pattern, 0.25, "row")
        assert wanda_OI.tolist() == [[True, False, True, True]]
        assert dsnot.support(weight_OI, _stats(x_TI), target).tolist() == [expected]


def test_inputs_without_a_mean_leave_wandas_support() -> None:
    """Where every input is symmetric about zero nothing is expected to be lost."""
    weight_OI, x_TI = _problem()
    x_TI = torch.cat([x_TI, -x_TI])
    target = Target(Pattern(), 0.5, "row")
    expected_OI = METHODS["wanda"].prune(weight_OI, _stats(x_TI), target, damping=0.01, generator=torch.Generator())
    assert torch.equal(dsnot.support(weight_OI, _stats(x_TI), target), expected_OI != 0)


def test_constant_inputs_are_grown_first() -> None:
    """An input that never varies restores its share of the output for certain; its variance of zero divides nothing."""
    weight_OI = torch.tensor([[0.1, 0.2, -2.0, 2.1, -2.2, 0.3]])
    x_TI = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) + 3
    x_TI[:, 1] = 3.0
    keep_OI = dsnot.support(weight_OI, _stats(x_TI), Target(Pattern(), 0.5, "row"))
    assert keep_OI.sum() == 3 and torch.isfinite(_stats(x_TI).variance_I).all()


def test_parts_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are refined one by one, however many are worked on at once."""
    weight_OI, x_TI = _problem()
    target = Target(Pattern(), 0.5, "row")
    whole_OI = dsnot.support(weight_OI, _stats(x_TI), target)
    monkeypatch.setattr(dsnot, "_PART", 5 * weight_OI.shape[1])
    assert torch.equal(dsnot.support(weight_OI, _stats(x_TI), target), whole_OI)
