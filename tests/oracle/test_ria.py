"""RIA against a hand-computed example and the paper's loop. O out, I in features, T tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmprune.methods import METHODS, ria
from llmprune.spec import Need, Pattern, Scope, Target
from llmprune.stats import LinearStats


def _stats(x_TI: Tensor) -> LinearStats:
    stats = LinearStats(x_TI.shape[1], Need.NORM, "cpu")
    stats.update(x_TI)
    return stats


def _score(weight_OI: Tensor, x_TI: Tensor) -> Tensor:
    return ria.score(weight_OI, _stats(x_TI), generator=torch.Generator())


def _prune(weight_OI: Tensor, x_TI: Tensor, scope: Scope = "matrix") -> Tensor:
    target = Target(Pattern(), 0.5, scope)
    return METHODS["ria"].prune(weight_OI, _stats(x_TI), target, damping=0.01, generator=torch.Generator())


def test_score_by_hand() -> None:
    """Rows sum to 4 and 8, columns to 4 and 8, and the column norms are 4 and 9, whose roots are 2 and 3."""
    weight_OI = torch.tensor([[1.0, -3.0], [-3.0, 5.0]])
    x_TI = torch.tensor([[4.0, 0.0], [0.0, -9.0]])
    expected_OI = torch.tensor([[(1 / 4 + 1 / 4) * 2, (3 / 4 + 3 / 8) * 3], [(3 / 8 + 3 / 4) * 2, (5 / 8 + 5 / 8) * 3]])
    before_OI = weight_OI.clone()
    torch.testing.assert_close(_score(weight_OI, x_TI), expected_OI)
    assert torch.equal(weight_OI, before_OI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_score_is_the_papers_sum(dtype: torch.dtype) -> None:
    """Weight by weight, in fp64: its share of its row plus its share of its column, times the root of the norm."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(5, 7, generator=generator).to(dtype)
    x_TI = torch.randn(11, 7, generator=generator)
    w64_OI = weight_OI.double().abs()
    score_OI = _score(weight_OI, x_TI)
    for o in range(5):
        for i in range(7):
            share = w64_OI[o, i] / w64_OI[o].sum() + w64_OI[o, i] / w64_OI[:, i].sum()
            torch.testing.assert_close(score_OI[o, i].double(), share * x_TI[:, i].double().norm() ** 0.5, rtol=1e-5, atol=0)


def test_channels_are_not_pruned_whole() -> None:
    """A row and a column a thousand times smaller keep some of their weights, which magnitude prunes whole."""
    generator = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(16, 32, generator=generator)
    weight_OI[3] *= 1e-3
    weight_OI[:, 5] *= 1e-3
    kept_OI = _prune(weight_OI.clone(), torch.ones(1, 32)) != 0
    assert kept_OI.sum() == 256
    assert kept_OI[3].any() and kept_OI[:, 5].any()
    magnitude = Target(Pattern(), 0.5, "matrix")
    pruned_OI = METHODS["magnitude"].prune(
        weight_OI, _stats(torch.ones(1, 32)), magnitude, damping=0.01, generator=torch.Generator()
    )
    assert not pruned_OI[3].any() and not pruned_OI[:, 5].any()


def test_empty_rows_and_columns_score_zero() -> None:
    """A row and a column of zeros divide nothing by zero."""
    weight_OI = torch.ones(3, 4)
    weight_OI[1], weight_OI[:, 2] = 0, 0
    score_OI = _score(weight_OI, torch.ones(2, 4))
    assert torch.isfinite(score_OI).all()
    assert torch.equal(score_OI == 0, weight_OI == 0)
