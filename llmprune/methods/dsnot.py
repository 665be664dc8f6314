"""DSnoT: Wanda's support, refined without training (Zhang et al. 2023, arXiv 2310.08915, algorithm 1).

O out, I in features, R rows still at work, G groups of columns that trade weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.masks import COLUMN_BLOCK, keep_mask
from llmprune.spec import Target
from llmprune.stats import LinearStats

MAX_CYCLES = 50
SETTLED = 0.1
"""Share of an output's root mean square at which its mean error is left alone."""
_PART = 2**22  # weights worked on at once


def support(weight_OI: Tensor, stats: LinearStats, target: Target) -> Tensor:
    """Which weights survive, bool [O, I]: counts are those of Wanda's support in every comparison set.

    The mean error of output i is e_i, the sum of c_ij = W_ij mean(x_j) over its pruned weights. While it is large, each cycle
    grows the pruned weight that lowers |e_i| at the highest |c_ij| / var(x_j), and prunes the kept weight of the least Wanda
    score among those that lower |e_i| further, in the same n:m group or column block where counts are kept per group.

    Departures from the reference implementation: every output ends with the best support it had, so |e_i| never grows;
    |e_i| is large above 0.1 of the output's root mean square (that of uncorrelated inputs), where it is compared with 0.1 in
    the sum over a sample's tokens, which means zero: repairing small mean errors costs more by the weights it gives up than it
    gains; all sites are refined, not those of the attention alone.

    Args:
        weight_OI: [O, I], any float dtype; computed in fp32, the errors in fp64.
        stats: with the sums of the inputs.
        target: pattern, sparsity, scope; ``row`` is the paper's.
    """
    keep_OI = keep_mask(weight_OI.float().abs().mul_(stats.sq_I.sqrt()), target.pattern, target.sparsity, target.scope)
    width = target.pattern.m or (COLUMN_BLOCK if target.scope == "block" else weight_OI.shape[1])
    rows = max(1, _PART // max(weight_OI.shape[1], 1))
    for part_OI, kept_OI in zip(weight_OI.split(rows), keep_OI.split(rows), strict=True):
        part_OI = part_OI.float()
        mean_square_I = stats.sq_I / max(stats.num_tokens, 1)
        kept_OI.copy_(
            swap(
                kept_OI,
                mean_OI=part_OI * stats.mean_I,
                spread_I=stats.variance_I,
                score_OI=part_OI.abs() * mean_square_I.sqrt(),
                settled_O=SETTLED * (part_OI.square() @ mean_square_I).sqrt(),
                width=width,
            )
        )
    return keep_OI


def swap(
    keep_OI: Tensor,
    *,
    mean_OI: Tensor,
    spread_I: Tensor,
    score_OI: Tensor,
    settled_O: Tensor,
    width: int,
    cycles: int = MAX_CYCLES,
) -> Tensor:
    """The support after at most ``cycles`` swaps a row, the best that each row had.

    Args:
        keep_OI: support to start from.
        mean_OI: mean contribution of each weight to its output, c_ij.
        spread_I: variance of the inputs; positive wherever c_ij is not zero.
        score_OI: which kept weights are worth the least.
        settled_O: |e_i| at which a row is left as it is.
        width: columns in which a weight may take another's place.
    """
    keep_OI, start_OI = keep_OI.clone(), keep_OI
    error_O = mean_OI.where(~keep_OI, 0).sum(1, dtype=torch.float64)
    best_O, best_cycle_O = error_O.abs(), torch.zeros_like(error_O, dtype=torch.long)
    rows_R = (best_O > settled_O).nonzero().squeeze(1)
    swaps = []
    for cycle in range(1, cycles + 1):
        if not len(rows_R):
            break
        lowers_RI = mean_OI[rows_R] * error_O[rows_R].sign()[:, None]
        grow_R, prune_R, found_R = _choose(keep_OI[rows_R], lowers_RI, spread_I, score_OI[rows_R], width)
        rows_R, grow_R, prune_R = rows_R[found_R], grow_R[found_R], prune_R[found_R]
        keep_OI[rows_R, grow_R], keep_OI[rows_R, prune_R] = True, False
        error_O[rows_R] += mean_OI[rows_R, prune_R].double() - mean_OI[rows_R, grow_R].double()
        swaps.append((rows_R, grow_R, prune_R))
        left_O = error_O.abs()
        best_cycle_O = torch.where(left_O < best_O, cycle, best_cycle_O)
        best_O = torch.minimum(left_O, best_O)
        rows_R = rows_R[left_O[rows_R] > settled_O[rows_R]]
    best_OI = start_OI.clone()
    for cycle, (rows_R, grow_R, prune_R) in enumerate(swaps, start=1):
        useful_R = cycle <= best_cycle_O[rows_R]
        best_OI[rows_R[useful_R], grow_R[useful_R]] = True
        best_OI[rows_R[useful_R], prune_R[useful_R]] = False
    return best_OI


def _choose(
    keep_RI: Tensor, lowers_RI: Tensor, spread_I: Tensor, score_RI: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns to grow and to prune in each row, and whether there are two: ``lowers_RI`` > 0 where growing lowers |e|."""
    may_prune_RI = keep_RI & (lowers_RI < 0)
    columns = keep_RI.shape[1]
    padded_RI = F.pad(may_prune_RI, (0, -columns % width))
    partner_RI = padded_RI.unflatten(1, (-1, width)).any(2).repeat_interleave(width, dim=1)[:, :columns]
    value_RI = (lowers_RI / spread_I).where(~keep_RI & (lowers_RI > 0) & partner_RI, 0)
    value_R, grow_R = value_RI.max(1)
    group_I = torch.arange(columns, device=keep_RI.device) // width
    may_prune_RI &= group_I == group_I[grow_R][:, None]
    prune_R = score_RI.where(may_prune_RI, torch.inf).argmin(1)
    return grow_R, prune_R, value_R > 0
