"""Best-swap descent: the local search of the Combinatorial Brain Surgeon (Yu et al. 2022, arXiv 2203.04466).

V variables, N samples, K pruned candidates, L kept candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.solvers.problem import BlockProblem

NUM_CANDIDATES = 64


def greedy(problem: BlockProblem, *, max_swaps: int = 100_000) -> Tensor:
    """From the present choice, swap the best pair until no swap lowers the energy; bool [V].

    Keeping i and pruning j instead changes the energy by -alpha_i + beta_j - gamma_ij, where u = B x,
    alpha_i = l_i + b_i . u - 1/2 ||b_i||^2, beta_j = l_j + b_j . u + 1/2 ||b_j||^2 and gamma_ij = b_i . b_j. The pairs of
    the 64 largest alpha with the 64 smallest beta are looked at first; only where none of them helps, all pairs are. The
    result can be improved by no single swap.
    """
    pruned_V = problem.pruned_V.clone()
    index_V, _, _ = problem.groups()
    output_N = problem.factor_NV @ pruned_V.to(problem.linear_V.dtype)
    tolerance = _resolution(problem)
    for _ in range(max_swaps):
        alpha_V, beta_V = _gains(problem, output_N)
        ones_K, zeros_L = pruned_V.nonzero()[:, 0], (~pruned_V).nonzero()[:, 0]
        if not len(ones_K) or not len(zeros_L):
            break
        near_K = ones_K[alpha_V[ones_K].topk(min(NUM_CANDIDATES, len(ones_K))).indices]
        near_L = zeros_L[(-beta_V[zeros_L]).topk(min(NUM_CANDIDATES, len(zeros_L))).indices]
        change, i, j = _best_pair(problem, index_V, alpha_V, beta_V, near_K, near_L)
        if change >= -tolerance:
            change, i, j = _best_pair(problem, index_V, alpha_V, beta_V, ones_K, zeros_L)
        if change >= -tolerance:
            break
        pruned_V[i], pruned_V[j] = False, True
        output_N = problem.factor_NV @ pruned_V.to(problem.linear_V.dtype)
    return pruned_V


def swap_changes(problem: BlockProblem, pruned_V: Tensor, keep_P: Tensor, prune_P: Tensor) -> Tensor:
    """Energy change [P] of each swap alone: ``keep_P`` (pruned now) is kept and ``prune_P`` (kept now) is pruned."""
    output_N = problem.factor_NV @ pruned_V.to(problem.linear_V.dtype)
    alpha_V, beta_V = _gains(problem, output_N)
    gamma_P = (problem.factor_NV[:, keep_P] * problem.factor_NV[:, prune_P]).sum(0)
    return beta_V[prune_P] - alpha_V[keep_P] - gamma_P


def _gains(problem: BlockProblem, output_N: Tensor) -> tuple[Tensor, Tensor]:
    slope_V = problem.linear_V + output_N @ problem.factor_NV
    own_V = 0.5 * problem.factor_NV.square().sum(0)
    return slope_V - own_V, slope_V + own_V


def _best_pair(
    problem: BlockProblem, index_V: Tensor, alpha_V: Tensor, beta_V: Tensor, ones_K: Tensor, zeros_L: Tensor
) -> tuple[float, Tensor, Tensor]:
    change_KL = beta_V[zeros_L] - alpha_V[ones_K, None] - problem.factor_NV[:, ones_K].T @ problem.factor_NV[:, zeros_L]
    change_KL = change_KL.where(index_V[ones_K, None] == index_V[zeros_L], torch.inf)
    first = int(change_KL.argmin())
    row, column = divmod(first, len(zeros_L))
    return float(change_KL[row, column]), ones_K[row], zeros_L[column]


def _resolution(problem: BlockProblem) -> float:
    """What rounding alone may make of a swap that changes nothing."""
    scale = float(problem.linear_V.abs().max() + problem.factor_NV.square().sum(0).max()) if problem.num_variables else 0.0
    return 8 * torch.finfo(problem.linear_V.dtype).eps * scale
