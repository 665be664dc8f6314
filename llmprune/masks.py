"""Scores in, support out: the only code that decides which weights survive.

O out features, I in features. Counts are exact and ties are resolved by position (the earlier weight goes first), so
the same scores give the same support on every device.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from llmprune.spec import Pattern, Scope, num_pruned

COLUMN_BLOCK = 128
"""Width of a column block, as in SparseGPT's reference implementation."""


def keep_mask(score_OI: Tensor, pattern: Pattern, sparsity: float, scope: Scope) -> Tensor:
    """Boolean [O, I], True where the weight survives: the lowest scores of every comparison set are pruned.

    Args:
        score_OI: importance, any real dtype; NaN raises ValueError.
        pattern: unstructured, or n:m along I (then ``sparsity`` and ``scope`` do not matter: the set is the n:m group).
        sparsity: fraction in [0, 1] pruned in every set, to the nearest whole weight.
        scope: ``row`` compares within an output, ``matrix`` within the site, ``block`` within 128 consecutive columns
            of all rows.
    """
    if torch.isnan(score_OI).any():
        raise ValueError("scores hold NaN")
    if score_OI.numel() == 0:
        return torch.ones_like(score_OI, dtype=torch.bool)
    assert not pattern.mixed, "a site of a mixed job has a pattern of its own"
    if pattern.m is not None and pattern.n is not None:
        return _keep_n_of_m(score_OI, pattern.n, pattern.m)
    if scope == "row":
        return keep_highest(score_OI, num_pruned(score_OI.shape[1], sparsity))
    if scope == "matrix":
        flat = score_OI.reshape(1, -1)
        return keep_highest(flat, num_pruned(flat.numel(), sparsity)).view(score_OI.shape)
    parts = [
        keep_highest(part.reshape(1, -1), count).view(part.shape)
        for part, count in zip(
            score_OI.split(COLUMN_BLOCK, dim=1), block_counts(*score_OI.shape, sparsity=sparsity), strict=True
        )
    ]
    return torch.cat(parts, dim=1)


def block_counts(num_rows: int, num_columns: int, *, sparsity: float, width: int = COLUMN_BLOCK) -> list[int]:
    """How many weights to prune in each column block so that the total is exact: differences of rounded prefixes."""
    edges = [*range(0, num_columns, width), num_columns]
    prefix = [num_pruned(num_rows * edge, sparsity) for edge in edges]
    return [after - before for before, after in pairwise(prefix)]


def keep_highest(score_RC: Tensor, count: int) -> Tensor:
    """Boolean [R, C], False at exactly the ``count`` lowest of every row; among equals the earlier column goes first.

    A selection (O(C)) instead of a stable sort (O(C log C)); the result is the same.
    """
    if count <= 0:
        return torch.ones_like(score_RC, dtype=torch.bool)
    if count >= score_RC.shape[1]:
        return torch.zeros_like(score_RC, dtype=torch.bool)
    threshold_R1 = score_RC.kthvalue(count, dim=1, keepdim=True).values
    keep_RC = score_RC > threshold_R1
    tied_RC = score_RC == threshold_R1
    spare_R1 = (~keep_RC).sum(1, keepdim=True) - count
    if bool((spare_R1 > 0).any()):
        rank_RC = tied_RC.cumsum(1)
        keep_RC |= tied_RC & (rank_RC > tied_RC.sum(1, keepdim=True) - spare_R1)
    return keep_RC


def _keep_n_of_m(score_OI: Tensor, n: int, m: int) -> Tensor:
    """Keep the n highest of every m consecutive inputs, by counting in how many duels each weight loses."""
    assert score_OI.shape[1] % m == 0, "n:m must divide the inputs; Pattern.check says so to the user"
    group_OGM = score_OI.reshape(score_OI.shape[0], -1, m)
    lanes = group_OGM.unbind(-1)
    keep = []
    for j, lane in enumerate(lanes):
        num_below = torch.zeros_like(lane, dtype=torch.int16)
        for i, other in enumerate(lanes):
            if i != j:
                num_below += (other <= lane) if i < j else (other < lane)
        keep.append(num_below >= m - n)
    return torch.stack(keep, dim=-1).view(score_OI.shape)
