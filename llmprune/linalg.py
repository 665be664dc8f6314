"""Factorisations with a check and a raised damping instead of a silent fallback.

I in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.errors import FactorizationError

MAX_DAMPING = 1.0


def inverse_factor(gram_II: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular U [I, I] (fp32) with U^T U = (G + damping * mean(diag G) * Id)^-1, and the damping used.

    Inputs that were never active (zero diagonal) get the mean diagonal, so they stay decoupled at any scale. Computed in
    fp64 without forming the inverse: with J the exchange matrix and J A J = L L^T, U = J L^-1 J. Where the
    factorisation fails the damping is raised tenfold, up to 1.0.

    Raises:
        FactorizationError: the matrix holds NaN or inf, or stays indefinite at damping 1.0.
    """
    assert damping > 0
    if not torch.isfinite(gram_II).all():
        raise FactorizationError("the Gram matrix holds NaN or inf: the calibration activations overflowed.")
    # fp64 is not to be had on every backend (MPS): factorise on the CPU there.
    work = gram_II.device if gram_II.device.type in ("cpu", "cuda", "xpu") else torch.device("cpu")
    flipped_II = gram_II.to(work, torch.float64).flip(0, 1)
    diagonal_I = flipped_II.diagonal()
    dead_I = diagonal_I == 0
    scale = float(diagonal_I.mean()) or 1.0
    diagonal_I[dead_I] = scale
    used = damping
    while True:
        damped_II = flipped_II.clone()
        damped_II.diagonal().add_(used * scale)
        lower_II, info = torch.linalg.cholesky_ex(damped_II)
        if int(info) == 0:
            break
        if used >= MAX_DAMPING:
            raise FactorizationError(f"the Gram matrix is not positive definite even with damping {used:g}.")
        used = min(used * 10, MAX_DAMPING)
    eye_II = torch.eye(len(lower_II), dtype=lower_II.dtype, device=work)
    inverse_II = torch.linalg.solve_triangular(lower_II, eye_II, upper=False)
    return inverse_II.flip(0, 1).to(gram_II.device, torch.float32), used
