"""Wanda against hand-computed examples and the paper's loop. O out, I in features, T tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmprune.methods import METHODS, wanda
from llmprune.spec import Need, Pattern, Scope, Target
from llmprune.stats import LinearStats

# Column norms 5, 1, 10 and 2.
X_TI = torch.tensor([[3.0, 0.0, 6.0, 0.0], [4.0, 1.0, -8.0, -2.0]])
W_OI = torch.tensor([[1.0, -4.0, 0.3, 3.0], [-2.0, 3.0, 0.1, -6.0]])


def _stats(x_TI: Tensor) -> LinearStats:
    stats = LinearStats(x_TI.shape[1], Need.NORM, "cpu")
    stats.update(x_TI)
    return stats


def _prune(weight_OI: Tensor, x_TI: Tensor, scope: Scope | None = None, pattern: str = "unstructured") -> Tensor:
    target = Target(Pattern.parse(pattern), 0.5, scope or METHODS["wanda"].scope)
    return METHODS["wanda"].prune(weight_OI, _stats(x_TI), target, damping=0.01, generator=torch.Generator())


def test_score_by_hand() -> None:
    """The score of the 2x4 example is |W| times 5, 1, 10, 2."""
    score_OI = wanda.score(W_OI.clone(), _stats(X_TI), generator=torch.Generator())
    torch.testing.assert_close(score_OI, torch.tensor([[5.0, 4.0, 3.0, 6.0], [10.0, 3.0, 1.0, 12.0]]))


def test_score_leaves_its_weight_alone() -> None:
    """Scoring an fp32 weight, which needs no conversion, does not write to it."""
    weight_OI = W_OI.clone()
    wanda.score(weight_OI, _stats(X_TI), generator=torch.Generator())
    assert torch.equal(weight_OI, W_OI)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_support_by_hand(pattern: str) -> None:
    """Half of each row goes: a plain norm prunes columns 1 and 2; magnitude alone 0 and 2, a squared norm 1 and 3."""
    pruned_OI = _prune(W_OI.clone(), X_TI, pattern=pattern)
    assert torch.equal(pruned_OI, torch.tensor([[1.0, 0.0, 0.0, 3.0], [-2.0, 0.0, 0.0, -6.0]]))


def test_example_tells_the_wrong_scores_apart() -> None:
    """The three candidate scores prune three different pairs of row 0, so the example can detect each mistake."""
    norm_I = X_TI.norm(dim=0)
    lowest = [
        set(score_I.argsort()[:2].tolist()) for score_I in (W_OI[0].abs() * norm_I, W_OI[0].abs() * norm_I**2, W_OI[0].abs())
    ]
    assert lowest == [{1, 2}, {1, 3}, {0, 2}]


def test_outputs_are_compared_each_on_its_own() -> None:
    """A row a hundred times smaller loses as many weights as its neighbour by default, and all of them per matrix."""
    weight_OI = W_OI * torch.tensor([[100.0], [0.01]])
    assert (_prune(weight_OI.clone(), X_TI) == 0).sum(1).tolist() == [2, 2]
    assert (_prune(weight_OI.clone(), X_TI, "matrix") == 0).sum(1).tolist() == [0, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_row_scope_is_the_papers_loop(dtype: torch.dtype) -> None:
    """Row by row: stable sort of the scores, zero the first int(in * 0.5)."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(9, 130, generator=generator).to(dtype)
    x_TI = (torch.randn(64, 130, generator=generator) * torch.rand(130, generator=generator)).to(dtype)
    expected_OI = weight_OI.clone()
    norm_I = x_TI.float().square().sum(0).sqrt()
    for row_I in expected_OI:
        order_I = torch.sort(row_I.float().abs() * norm_I, stable=True).indices
        row_I[order_I[: int(130 * 0.5)]] = 0
    assert torch.equal(_prune(weight_OI, x_TI), expected_OI)


def test_number_of_sequences_does_not_matter() -> None:
    """Dividing the squared norms by any count, as the paper does by sequences, gives the same support."""
    generator = torch.Generator().manual_seed(1)
    weight_OI, x_TI = torch.randn(8, 64, generator=generator), torch.randn(50, 64, generator=generator)
    repeated_TI = x_TI.repeat(4, 1)
    assert torch.equal(_prune(weight_OI.clone(), x_TI), _prune(weight_OI.clone(), repeated_TI))


def test_order_of_tokens_does_not_matter() -> None:
    """Tokens are a set: the reversed text gives the same support."""
    generator = torch.Generator().manual_seed(2)
    weight_OI, x_TI = torch.randn(8, 64, generator=generator), torch.randn(50, 64, generator=generator)
    assert torch.equal(_prune(weight_OI.clone(), x_TI), _prune(weight_OI.clone(), x_TI.flip(0)))
