"""Symmetric products and triangular inverses, over several panels, against fp64. O out, I in features, T tokens."""

from __future__ import annotations

import pytest
import torch

from llmprune.linalg import add_gram_, energy, inverse_factor, mirror_, panels

SIZES = (1, 7, 255, 256, 257, 300, 700)  # one panel, a whole one, a narrow last one, several
EPS = torch.finfo(torch.float32).eps


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [*SIZES, 4096, 14336, 53248])
def test_panels_cover_every_column_once(size: int) -> None:
    """In order, at most 16, and none narrow but the last."""
    found = panels(size)
    assert [column for panel in found for column in range(*panel)] == list(range(size))
    assert len(found) <= 16 and all(stop - start >= 256 for start, stop in found[:-1])


@pytest.mark.parametrize("size", SIZES)
def test_gram_of_panels_is_symmetric_and_as_exact_as_torch(size: int) -> None:
    """Bit-equal to its transpose, and not further from fp64 than twice the plain product; it adds to what is there."""
    x_TI, before_TI = _random(500, size), _random(3, size, seed=1)
    gram_II = before_TI.T @ before_TI
    gram_II = gram_II.triu() + gram_II.triu(1).T
    before_II = gram_II.double()
    add_gram_(gram_II, x_TI)
    mirror_(gram_II)
    assert torch.equal(gram_II, gram_II.T)
    wanted_II = before_II + x_TI.double().T @ x_TI.double()
    plain_II = before_II.float() + x_TI.T @ x_TI
    scale_II = wanted_II.diagonal().sqrt()[:, None] * wanted_II.diagonal().sqrt()
    ours, theirs = (((found.double() - wanted_II) / scale_II).abs().max() for found in (gram_II, plain_II))
    assert ours <= 2 * theirs + 4 * EPS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="products of half precision are summed in fp32 on CUDA alone")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gram_of_halves_on_tensor_cores_is_as_exact_as_fp32(dtype: torch.dtype) -> None:
    """Their products are exact in fp32, and so are not further from fp64 than a few roundings of the sum."""
    x_TI = _random(4096, 700).to(dtype)
    gram_II = torch.zeros(700, 700, device="cuda")
    add_gram_(gram_II, x_TI.cuda())
    mirror_(gram_II)
    wanted_II = x_TI.double().T @ x_TI.double()
    scale_II = wanted_II.diagonal().sqrt()[:, None] * wanted_II.diagonal().sqrt()
    assert ((gram_II.cpu().double() - wanted_II) / scale_II).abs().max() < 32 * EPS


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_energy_is_that_of_the_outputs(size: int, dtype: torch.dtype) -> None:
    """||W X||^2 from the Gram matrix, against the outputs in fp64; the weight is not changed."""
    x_TI, weight_OI = _random(400, size), _random(9, size, seed=2).to(dtype)
    before_OI = weight_OI.clone()
    gram_II = x_TI.T @ x_TI
    found = energy(weight_OI, gram_II)
    wanted = (weight_OI.double() @ x_TI.double().T).square().sum()
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    assert torch.equal(weight_OI, before_OI)


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 300, 515])
def test_factor_inverts_at_every_size(size: int) -> None:
    """U^T U times the damped matrix is the identity, U is an upper triangle: around the size where halving begins."""
    x_TI = _random(2 * size + 8, size).double()
    gram_II = (x_TI.T @ x_TI).float()
    factor_II, used = inverse_factor(gram_II, 0.01)
    damped_II = gram_II.double() + used * gram_II.double().diagonal().mean() * torch.eye(size)
    inverse_II = torch.linalg.inv(damped_II)
    found_II = factor_II.double().T @ factor_II.double()
    assert torch.equal(factor_II, factor_II.triu())
    assert (found_II - inverse_II).abs().max() <= 1e-5 * inverse_II.abs().max()
