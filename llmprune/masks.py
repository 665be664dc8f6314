"""Scores in, support out: the only code that decides which weights survive.

O out features, I in features. Counts are exact and ties are resolved by position (the earlier weight goes first), so
the same scores give the same support on every device.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
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
    threshold_R1 = _kth_lowest(score_RC, count)
    keep_RC = score_RC > threshold_R1
    if int(keep_RC.count_nonzero()) < keep_RC.shape[0] * (keep_RC.shape[1] - count):  # rows in which more are tied than go
        tied_RC = score_RC == threshold_R1
        spare_R1 = (~keep_RC).sum(1, keepdim=True) - count
        rank_RC = tied_RC.cumsum(1)
        keep_RC |= tied_RC & (rank_RC > tied_RC.sum(1, keepdim=True) - spare_R1)
    return keep_RC


def _kth_lowest(score_RC: Tensor, count: int) -> Tensor:
    """The ``count``-th lowest of every row [R, 1]."""
    if score_RC.device.type != "cpu" or score_RC.dtype not in (torch.float32, torch.float64):
        return score_RC.kthvalue(count, dim=1, keepdim=True).values
    # numpy's selection takes two fifths of kthvalue's time, which carries positions along; rows are shared out as there.
    parts = score_RC.detach().tensor_split(max(1, min(torch.get_num_threads(), len(score_RC))))

    def select(part_RC: Tensor) -> Tensor:
        return torch.from_numpy(np.partition(part_RC.numpy(), count - 1, axis=1)[:, count - 1 : count].copy())

    if len(parts) == 1:
        return select(score_RC.detach())
    with ThreadPoolExecutor(len(parts)) as pool:
        return torch.cat(list(pool.map(select, parts)))


def _keep_n_of_m(score_OI: Tensor, n: int, m: int) -> Tensor:
    """Keep the n highest of every m consecutive inputs."""
    assert score_OI.shape[1] % m == 0, "n:m must divide the inputs; Pattern.check says so to the user"
    lanes_mOG = score_OI.reshape(score_OI.shape[0], -1, m).movedim(-1, 0).contiguous()
    return keep_n_of_lanes(lanes_mOG, n).movedim(0, -1).reshape(score_OI.shape)


def keep_n_of_lanes(score_mX: Tensor, n: int) -> Tensor:
    """Boolean [m, ...], True for the n highest of m scores [m, ...], by counting in how many duels each loses; among equals the
    earlier one goes first.
    """
    m = len(score_mX)
    # A weight loses to none of those before it until its duels say otherwise.
    num_below_mX = torch.arange(m, dtype=torch.int8, device=score_mX.device).view(m, *[1] * (score_mX.dim() - 1))
    num_below_mX = num_below_mX.expand(score_mX.shape).clone()
    lanes, below = score_mX.unbind(), num_below_mX.unbind()
    for j in range(m):
        for i in range(j):
            later_is_lower = (lanes[j] < lanes[i]).view(torch.int8)
            below[i].add_(later_is_lower)
            below[j].sub_(later_is_lower)
    return num_below_mX >= m - n
