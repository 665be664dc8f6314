"""The PyTorch references against dense fp64. O out, I in, T tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmprune_kernels import bitmask, fragments, int8, reference, two_four

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [(1, 4), (17, 260), (48, 512), (100, 1000)]
Linear = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def case(
    shape: tuple[int, int], dtype: torch.dtype, device: str, tokens: tuple[int, ...] = (5,)
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., I], a 2:4 weight [O, I] and a bias [O]."""
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(in_features)
    weight_OI = torch.randn(out_features, in_features, generator=generator)
    weight_OI.view(out_features, -1, 4).scatter_(
        2, torch.rand(out_features, in_features // 4, 4, generator=generator).argsort(-1)[..., :2], 0
    )
    x, bias = torch.randn(*tokens, in_features, generator=generator), torch.randn(out_features, generator=generator)
    return x.to(device, dtype), weight_OI.to(device, dtype), bias.to(device, dtype)


def canonical(x: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
    return reference.linear_24(x, *two_four.pack(weight_OI), bias)


def mma(x: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
    return reference.linear_24_mma(x, *fragments.to_fragments(*two_four.pack(weight_OI)), bias, weight_OI.shape[0])


def masked(x: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
    packed = bitmask.pack(weight_OI)
    return reference.linear_bitmask(x, packed.bits, packed.values, bitmask.row_starts(packed.bits), bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("linear", "dtype"),
    [(linear, dtype) for linear in (canonical, masked) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    + [(mma, torch.bfloat16), (mma, torch.float16)],
)
def test_a_packed_weight_multiplies_like_the_dense_one(
    linear: Linear, dtype: torch.dtype, shape: tuple[int, int], with_bias: bool, device: str
) -> None:
    """The very numbers of F.linear with the dense weight, for 16-bit and 32-bit inputs."""
    x, weight_OI, bias = case(shape, dtype, device)
    y = linear(x, weight_OI, bias if with_bias else None)
    assert y.dtype == dtype
    assert torch.equal(y, F.linear(x, weight_OI, bias if with_bias else None))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_loses_no_more_than_the_output_dtype(
    dtype: torch.dtype, shape: tuple[int, int], with_bias: bool, device: str
) -> None:
    """Against fp64 with the same int8 values: at most twice what rounding the exact result to x.dtype loses."""
    x, weight_OI, bias = case(shape, dtype, device)
    packed = two_four.pack(weight_OI)
    quantized, scale = int8.quantize(packed.values)
    frags = fragments.to_fragments(quantized, packed.meta)
    y = reference.linear_24_int8(x, *frags, scale, bias if with_bias else None, shape[0])
    exact = F.linear(x.double(), two_four.unpack(quantized, packed.meta).double() * scale.double()[:, None])
    if with_bias:
        exact = exact + bias.double()
    assert y.dtype == dtype
    tiny = 1e-5 * float(exact.abs().max())
    assert float((y.double() - exact).abs().max()) <= 2 * float((exact.to(dtype).double() - exact).abs().max()) + tiny
    dense = F.linear(x.double(), weight_OI.double(), bias.double() if with_bias else None)
    assert float((exact - dense).norm() / dense.norm()) < 0.02


@pytest.mark.parametrize("tokens", [(), (1,), (0,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("linear", [canonical, mma, masked])
def test_leading_dimensions_are_kept(linear: Linear, tokens: tuple[int, ...]) -> None:
    """A single vector, none at all, and batches."""
    x, weight_OI, bias = case((17, 260), torch.bfloat16, "cpu", tokens)
    y = linear(x, weight_OI, bias)
    assert y.shape == (*tokens, 17)
    assert torch.equal(y, F.linear(x, weight_OI, bias))


def test_bits_that_do_not_fit_are_refused() -> None:
    """row_starts of another weight, too few values, another number of columns."""
    x, weight_OI, _ = case((17, 260), torch.bfloat16, "cpu")
    packed = bitmask.pack(weight_OI)
    starts = bitmask.row_starts(packed.bits)
    with pytest.raises(ValueError, match="row_starts does not belong to these bits"):
        reference.linear_bitmask(x, packed.bits, packed.values, starts + 1)
    with pytest.raises(ValueError, match="bits are set, but values has shape"):
        reference.linear_bitmask(x, packed.bits, packed.values[:-1], starts)
    with pytest.raises(ValueError, match="for 256 in_features"):
        reference.linear_bitmask(x[:, :256], packed.bits, packed.values, starts)
