"""Gram matrices and their factorisations, with a check and a raised damping instead of a silent fallback.

O out, I in features, T tokens, P columns of one panel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.errors import FactorizationError

MAX_DAMPING = 1.0
_LEAF = 128  # rows of a triangle that is inverted by substitution
_MIN_PANEL, _MAX_PANELS = 256, 16
_EXACT_HALVES = (torch.float16, torch.bfloat16)
_PLAIN = (*_EXACT_HALVES, torch.float32, torch.float64)


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


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor inf, in one pass over it: its extremes are NaN where any number is."""
    if tensor.dtype not in _PLAIN or not tensor.numel():
        return bool(torch.isfinite(tensor).all())
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def panels(num_columns: int) -> list[tuple[int, int]]:
    """The columns in panels [start, stop) of at least 256, at most 16 of them.

    What is symmetric is computed from the first row to the end of each panel: 1/2 + 1/(2 x panels) of all entries.
    """
    width = max(_MIN_PANEL, -(-num_columns // _MAX_PANELS))
    return [(start, min(start + width, num_columns)) for start in range(0, num_columns, width)]


def add_gram_(gram_II: Tensor, x_TI: Tensor) -> None:
    """Add x^T x to the upper panels of ``gram_II`` (fp32); what is below them is left for :func:`mirror_`.

    ``x_TI`` may be of any float dtype. Products of two half-precision numbers are exact in fp32, and so a CUDA device may
    form and sum them on its tensor cores, without fp32 copies.
    """
    halves = x_TI.dtype in _EXACT_HALVES and x_TI.device.type == "cuda"
    if not halves:
        x_TI = x_TI.float()
    for start, stop in panels(len(gram_II)):
        left_PT, right_TP = x_TI[:, :stop].T, x_TI[:, start:stop]
        product = torch.mm(left_PT, right_TP, out_dtype=torch.float32) if halves else left_PT @ right_TP
        # Not addmm_: some BLAS then add token by token to the large total, and lose two digits on long texts.
        gram_II[:stop, start:stop] += product


def mirror_(gram_II: Tensor) -> None:
    """Copy the upper triangle over the lower one: exactly symmetric, whatever order the products were summed in."""
    for start, stop in panels(len(gram_II)):
        gram_II[start:stop, :start] = gram_II[:start, start:stop].T
        own_PP = gram_II[start:stop, start:stop]
        own_PP.copy_(own_PP.triu() + own_PP.triu(1).T)


def energy(weight_OI: Tensor, gram_II: Tensor) -> Tensor:
    """tr(W G W^T) = ||W X||_F^2 of a symmetric G, fp64 scalar: with half of the products, as each pair counts twice."""
    weight_OI = weight_OI.float()
    total = torch.zeros((), dtype=torch.float64, device=gram_II.device)
    for start, stop in panels(len(gram_II)):
        own_OP = weight_OI[:, start:stop]
        output_OP = own_OP @ gram_II[start:stop, start:stop]
        if start:
            output_OP += 2 * (weight_OI[:, :start] @ gram_II[:start, start:stop])
        total += output_OP.mul_(own_OP).sum(dtype=torch.float64)
    return total


def inverse_factor(gram_II: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular U [I, I] (fp32) with U^T U = (G + damping * mean(diag G) * Id)^-1, and the damping used.

    Inputs that were never active (zero diagonal) get the mean diagonal, so they stay decoupled at any scale. Computed in
    fp64 without forming the inverse: with A = R R^T, R upper, U = R^-1. Takes one fp64 matrix and a third of one. Where the
    factorisation fails the damping is raised tenfold, up to 1.0.

    Raises:
        FactorizationError: the matrix holds NaN or inf, or stays indefinite at damping 1.0.
    """
    for work_II, used in _damped_copies(gram_II, damping):
        if _invert_factor_(work_II):
            return work_II.to(gram_II.device, torch.float32), used
    raise AssertionError


def spectrum(gram_II: Tensor, damping: float) -> tuple[Spectrum, float]:
    """The eigendecomposition of the damped Gram matrix scaled to a unit diagonal, in fp64, and the damping used.

    Dead inputs and raised damping are as in :func:`inverse_factor`, and so are the errors.
    """
    damped_II, used = _damp(gram_II, damping)
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
    damped_II, used = _damp(gram_II, damping)
    return damped_II, used


def _invert_factor_(matrix_II: Tensor) -> bool:
    """Replace a symmetric A, of which the upper triangle is read, by the upper triangular U with U^T U = A^-1; False, with A
    spoilt, where it is not positive definite.

    By halves: with U_2 of the lower right A_22, X = A_12 U_2^T is the corner of R, U_1 comes of A_11 - X X^T, and the corner
    of U is -U_1 X U_2. Nearly all of it matrix products, which run faster than LAPACK's factorisation and substitution; of
    products with a triangle a quarter is left out. As stable (Higham 2002, chapter 14).
    """
    size = len(matrix_II)
    if size <= _LEAF:
        lower_II, info = torch.linalg.cholesky_ex(matrix_II.flip(0, 1))
        if int(info):
            return False
        eye_II = torch.eye(size, dtype=matrix_II.dtype, device=matrix_II.device)
        matrix_II.copy_(torch.linalg.solve_triangular(lower_II, eye_II, upper=False).flip(0, 1))
        return True
    half = size // 2
    first_II, corner_II, second_II = matrix_II[:half, :half], matrix_II[:half, half:], matrix_II[half:, half:]
    if not _invert_factor_(second_II):
        return False
    quarter, rest = half // 2, (size - half) // 2
    x_II = torch.empty_like(corner_II)
    torch.mm(corner_II, second_II[:rest].T, out=x_II[:, :rest])
    torch.mm(corner_II[:, rest:], second_II[rest:, rest:].T, out=x_II[:, rest:])
    first_II[:quarter].addmm_(x_II[:quarter], x_II.T, alpha=-1)
    first_II[quarter:, quarter:].addmm_(x_II[quarter:], x_II[quarter:].T, alpha=-1)
    if not _invert_factor_(first_II):
        return False
    torch.mm(x_II[:, :rest], second_II[:rest, :rest], out=corner_II[:, :rest])
    torch.mm(x_II, second_II[:, rest:], out=corner_II[:, rest:])
    torch.mm(first_II[:quarter], corner_II, out=x_II[:quarter])
    torch.mm(first_II[quarter:, quarter:], corner_II[quarter:], out=x_II[quarter:])
    torch.neg(x_II, out=corner_II)
    matrix_II[half:, :half] = 0
    return True


def _damp(gram_II: Tensor, damping: float) -> tuple[Tensor, float]:
    """The damped Gram matrix in fp64, and the damping that made it positive definite."""
    for damped_II, used in _damped_copies(gram_II, damping):
        if int(torch.linalg.cholesky_ex(damped_II).info) == 0:
            return damped_II, used
    raise AssertionError


def _damped_copies(gram_II: Tensor, damping: float) -> Iterator[tuple[Tensor, float]]:
    """Damped Gram matrices in fp64, in one memory, with the damping of each, which rises until the caller is content.

    Raises FactorizationError after the last.
    """
    assert damping > 0
    if not all_finite(gram_II):
        raise FactorizationError("the Gram matrix holds NaN or inf: the calibration activations overflowed.")
    # fp64 is not to be had on every backend (MPS): factorise on the CPU there.
    work = gram_II.device if gram_II.device.type in ("cpu", "cuda", "xpu") else torch.device("cpu")
    live_I = gram_II.diagonal().to(work, torch.float64, copy=True)
    scale = float(live_I.mean()) or 1.0
    live_I[live_I == 0] = scale
    damped_II = torch.empty(gram_II.shape, dtype=torch.float64, device=work)
    used = damping
    while True:
        damped_II.copy_(gram_II)
        damped_II.diagonal().copy_(live_I + used * scale)
        yield damped_II, used
        if used >= MAX_DAMPING:
            raise FactorizationError(f"the Gram matrix is not positive definite even with damping {used:g}.")
        used = min(used * 10, MAX_DAMPING)
