"""ALPS: support by ADMM, then least squares on it (Meng et al. 2024, arXiv 2406.07831, algorithms 1 and 2).

O out, I in features. With A the damped Gram matrix, the loss of W' is tr((W - W') A (W - W')^T). All work is done in
coordinates where A has a unit diagonal C: weights are multiplied by the root of A's diagonal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmprune.linalg import Spectrum
from llmprune.masks import keep_mask
from llmprune.spec import Target
from llmprune.stats import LinearStats

Choose = Callable[[Tensor], Tensor]

MAX_STEPS = 300
MAX_REFINEMENTS = 100
_FIRST_RHO = 0.01
_CHECK_EVERY = 3
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # support changed by more than this fraction: rho times that
_SETTLED = 3e-4  # of the support, after the first 30 steps
_QUIET_CHECKS = 3


def prune(weight_OI: Tensor, stats: LinearStats, target: Target, *, damping: float) -> Tensor:
    """Choose the support by ADMM and solve for the weights on it.

    Departures from the reference implementation: the eigendecomposition is shared by the sites that read one input; the
    split variable and its multiplier are one matrix (they live on either side of the support); rho starts at 0.01
    instead of 0.1 (a fifth less loss where the inputs are strongly correlated) and the search ends after three quiet
    checks instead of one; every row of the refinement has its own step length and starts at ADMM's weights; columns that
    no token ever reached are pruned first but not beyond the target; rows that lose nothing keep their bits; scopes
    ``row`` and ``block`` exist.

    Args:
        weight_OI: [O, I], any float dtype; computed in fp32, the eigendecomposition in fp64.
        stats: with the Gram matrix.
        target: pattern, sparsity, scope; ``matrix`` is the paper's.
        damping: fraction of the mean Gram diagonal added to it, 0.01 in the paper.
    """
    if target.pattern.m is None and target.sparsity == 0:
        return weight_OI.clone()

    alive_I = stats.sq_I > 0

    def choose(weight_OI: Tensor) -> Tensor:
        return keep_mask(weight_OI.abs().mul_(alive_I), target.pattern, target.sparsity, target.scope)

    live_OI = weight_OI.float().contiguous() * alive_I
    free_OI = choose(live_OI)
    if not live_OI.where(~free_OI, 0).any():  # zeros and dead columns are enough
        return weight_OI.where(free_OI, 0).contiguous()
    spectrum = stats.spectrum(damping)
    dense_OI = live_OI.mul_(spectrum.scale_I)
    keep_OI, start_OI = find_support(dense_OI, spectrum, choose)
    delta_OI = refine(dense_OI, keep_OI, spectrum.unit_II, start_OI=start_OI).div_(spectrum.scale_I)
    return (weight_OI.float() + delta_OI).to(weight_OI.dtype).where(keep_OI, 0).contiguous()


def find_support(dense_OI: Tensor, spectrum: Spectrum, choose: Choose) -> tuple[Tensor, Tensor]:
    """The support [O, I] that ADMM settles on, and the weights it had reached there (algorithm 1).

    ADMM splits the problem into weights B with the loss and D with the support, and U their scaled multiplier:
    B = W + rho (D - U - W) (C + rho)^-1; D = the chosen entries of B + U; U = the others. So V = B + U holds both, and
    D - U is V with the sign turned off the support. rho grows by how much the support still changes; the search ends
    when it has not changed for three checks.

    Args:
        dense_OI: weights in unit-diagonal coordinates, fp32; zero where nothing is lost.
        spectrum: of the damped Gram matrix.
        choose: weights to the support of the largest, by the target.
    """
    vectors_II = spectrum.vectors_II
    start_OI, v_OI, keep_OI = dense_OI, dense_OI.clone(), choose(dense_OI)
    rho, checked_OI, num_quiet, num_kept = _FIRST_RHO, keep_OI, 0, max(int(keep_OI.sum()), 1)
    for step in range(1, MAX_STEPS + 1):
        shrink_I = rho / (spectrum.values_I + rho)
        pull_OI = torch.where(keep_OI, v_OI, -v_OI).sub_(dense_OI)
        start_OI = torch.addmm(dense_OI, (pull_OI @ vectors_II).mul_(shrink_I), vectors_II.T)
        v_OI = v_OI.where(~keep_OI, 0).add_(start_OI)
        keep_OI = choose(v_OI)
        if step % _CHECK_EVERY:
            continue
        changed = int((keep_OI != checked_OI).sum()) / num_kept
        checked_OI = keep_OI
        num_quiet = 0 if changed > (_SETTLED if step >= 30 else 0) else num_quiet + 1
        if num_quiet == _QUIET_CHECKS:
            break
        growth = next((factor for bound, factor in _GROWTH if changed > bound), _GROWTH[-1][1])
        v_OI = v_OI.where(keep_OI, v_OI / growth)
        rho *= growth
    return keep_OI, start_OI


def refine(
    dense_OI: Tensor,
    keep_OI: Tensor,
    unit_II: Tensor,
    *,
    start_OI: Tensor | None = None,
    tolerance: float = 1e-6,
    max_steps: int = MAX_REFINEMENTS,
) -> Tensor:
    """The change of the weights [O, I] that loses least on a fixed support, by conjugate gradients (algorithm 2).

    Row by row min d C d^T over d that is -W off the support; the unit diagonal of C is the Jacobi preconditioner.
    Ends where one step lowers the loss by less than ``tolerance`` of what is left. Rows that lose nothing stay zero.
    """
    lost_OI = dense_OI.where(~keep_OI, 0)
    free_OI = keep_OI & lost_OI.any(1, keepdim=True)
    delta_OI = -lost_OI
    if start_OI is not None:
        delta_OI += (start_OI - dense_OI).where(free_OI, 0)
    product_OI = delta_OI @ unit_II
    loss = (delta_OI * product_OI).sum(dtype=torch.float64)
    residual_OI = product_OI.neg_().where(free_OI, 0)
    direction_OI = residual_OI.clone()
    norm_O1 = residual_OI.square().sum(1, keepdim=True)
    for _ in range(max_steps):
        product_OI = (direction_OI @ unit_II).where(free_OI, 0)
        curvature_O1 = (direction_OI * product_OI).sum(1, keepdim=True)
        length_O1 = (norm_O1 / curvature_O1).where(curvature_O1 > 0, 0)
        delta_OI.addcmul_(direction_OI, length_O1)
        residual_OI.addcmul_(product_OI, length_O1, value=-1)
        gain = (length_O1 * norm_O1).sum(dtype=torch.float64)
        loss -= gain
        if bool(gain <= tolerance * loss):
            break
        before_O1, norm_O1 = norm_O1, residual_OI.square().sum(1, keepdim=True)
        direction_OI.mul_((norm_O1 / before_O1).where(before_O1 > 0, 0)).add_(residual_OI)
    return delta_OI
