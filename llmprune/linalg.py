"""Factorisations with a check and a raised damping instead of a silent fallback.

I in features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.errors import FactorizationError

MAX_DAMPING = 1.0


@dataclass(frozen=True)
class Spectrum:
    """A damped Gram matrix A = S C S: S diagonal, C with unit diagonal and its eigenvectors, C = Q diag(L) Q^T.

    Attributes:
        scale_I: diagonal of S over its root mean square, fp32 [I]; every entry positive.
        unit_II: C, fp32 [I, I].
        vectors_II: Q, one eigenvector a column, fp32 [I, I].
        values_I: L, ascending and not negative, fp32 [I].
    """

    scale_I: Tensor
    unit_II: Tensor
    vectors_II: Tensor
    values_I: Tensor


def inverse_factor(gram_II: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular U [I, I] (fp32) with U^T U = (G + damping * mean(diag G) * Id)^-1, and the damping used.

    Inputs that were never active (zero diagonal) get the mean diagonal, so they stay decoupled at any scale. Computed in
    fp64 without forming the inverse: with J the exchange matrix and J A J = L L^T, U = J L^-1 J. Where the
    factorisation fails the damping is raised tenfold, up to 1.0.

    Raises:
        FactorizationError: the matrix holds NaN or inf, or stays indefinite at damping 1.0.
    """
    _, lower_II, used = _damp(gram_II.flip(0, 1), damping)
    eye_II = torch.eye(len(lower_II), dtype=lower_II.dtype, device=lower_II.device)
    inverse_II = torch.linalg.solve_triangular(lower_II, eye_II, upper=False)
    return inverse_II.flip(0, 1).to(gram_II.device, torch.float32), used


def spectrum(gram_II: Tensor, damping: float) -> tuple[Spectrum, float]:
    """The eigendecomposition of the damped Gram matrix scaled to a unit diagonal, in fp64, and the damping used.

    Dead inputs and raised damping are as in :func:`inverse_factor`, and so are the errors.
    """
    damped_II, _, used = _damp(gram_II, damping)
    scale_I = damped_II.diagonal().sqrt()
    damped_II /= scale_I[:, None]
    damped_II /= scale_I
    damped_II.diagonal().fill_(1)
    values_I, vectors_II = torch.linalg.eigh(damped_II)
    scale_I = scale_I / scale_I.square().mean().sqrt()
    parts = (scale_I, damped_II, vectors_II, values_I.clamp_min(0))
    return Spectrum(*(part.to(gram_II.device, torch.float32) for part in parts)), used


def damped(gram_II: Tensor, damping: float) -> tuple[Tensor, float]:
    """The damped Gram matrix itself, fp64 [I, I], and the damping used.

    Dead inputs and raised damping are as in :func:`inverse_factor`, and so are the errors. It lies on the CPU where the
    device has no fp64.
    """
    damped_II, _, used = _damp(gram_II, damping)
    return damped_II, used


def _damp(gram_II: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """The damped Gram matrix in fp64, its lower Cholesky factor, and the damping that made it positive definite."""
    assert damping > 0
    if not torch.isfinite(gram_II).all():
        raise FactorizationError("the Gram matrix holds NaN or inf: the calibration activations overflowed.")
    # fp64 is not to be had on every backend (MPS): factorise on the CPU there.
    work = gram_II.device if gram_II.device.type in ("cpu", "cuda", "xpu") else torch.device("cpu")
    live_II = gram_II.to(work, torch.float64, copy=True)
    diagonal_I = live_II.diagonal()
    dead_I = diagonal_I == 0
    scale = float(diagonal_I.mean()) or 1.0
    diagonal_I[dead_I] = scale
    used = damping
    while True:
        damped_II = live_II.clone()
        damped_II.diagonal().add_(used * scale)
        lower_II, info = torch.linalg.cholesky_ex(damped_II)
        if int(info) == 0:
            return damped_II, lower_II, used
        if used >= MAX_DAMPING:
            raise FactorizationError(f"the Gram matrix is not positive definite even with damping {used:g}.")
        used = min(used * 10, MAX_DAMPING)
