"""RIA: relative importance and activations (Zhang et al. 2024, ICLR, "Plug-and-Play"). O out, I in features."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.stats import LinearStats


def score(weight_OI: Tensor, stats: LinearStats, *, generator: torch.Generator) -> Tensor:
    """(|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * ||x_j||_2^(1/2), fp32 [O, I]; compared within the matrix.

    Where a whole row or column is zero, its weights score zero.
    """
    weight_OI = weight_OI.float().abs()
    share_O1, share_I = (_inverse(weight_OI.sum(dim, keepdim=dim == 1)) for dim in (1, 0))
    return (weight_OI * share_O1 + weight_OI * share_I).mul_(stats.sq_I.sqrt().sqrt())


def _inverse(total: Tensor) -> Tensor:
    return total.reciprocal().where(total > 0, 0)
