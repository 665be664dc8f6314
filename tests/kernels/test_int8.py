"""int8 values with one scale per row against exact fractions. O out, I in."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune_kernels.int8 import dequantize, quantize

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
deterministic = settings(max_examples=100)


def test_golden_bytes() -> None:
    """A row whose scale is 0.5: ties go to the even step, the largest magnitude to 127."""
    values = torch.tensor([[63.5, -63.5, 0.25, 0.75, -0.25, -1.25, 0.0, 1.0]])
    quantized, scale = quantize(values.bfloat16())
    assert scale.numpy().tobytes().hex() == "0000003f"
    assert quantized.numpy().tobytes().hex(" ") == "7f 81 00 02 00 fe 00 02"


@deterministic
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=2, max_size=12))
def test_every_value_is_the_nearest_step(row: list[float]) -> None:
    """Within half a step, but for the fp32 rounding of scale and quotient; the largest magnitude is 127."""
    quantized, scale = quantize(torch.tensor([row]))
    step = Fraction(float(scale[0]))
    for value, code in zip(row, quantized[0].tolist(), strict=True):
        assert abs(Fraction(value) - code * step) <= step / 2 * (1 + Fraction(1, 10**4))
    if max(map(abs, row)) > 1e-30:
        assert int(quantized.abs().max()) == 127
        assert float(scale[0]) == pytest.approx(max(map(abs, row)) / 127)
    assert int(quantized.min()) >= -127


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantising_again_changes_nothing(dtype: torch.dtype, device: str) -> None:
    """The int8 values of what was dequantised are the same, for every dtype and device."""
    values = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    quantized, scale = quantize(values)
    again, scale_again = quantize(dequantize(quantized, scale))
    assert torch.equal(again, quantized)
    assert torch.allclose(scale_again, scale, rtol=1e-6)
    assert quantized.device == scale.device == values.device
    assert dequantize(quantized, scale, dtype).dtype == dtype
    assert float((dequantize(quantized, scale) - values.float()).norm() / values.float().norm()) < 0.01


def test_rows_of_zeros_and_of_subnormals() -> None:
    """Zeros get scale 1, of either sign; what is below the smallest normal step becomes zero, never a wild number."""
    quantized, scale = quantize(torch.tensor([[0.0, -0.0], [1e-40, -3e-39], [1e-36, -3e-36]]))
    assert scale.tolist()[0] == 1.0
    assert quantized.tolist()[:2] == [[0, 0], [0, 0]]
    assert scale[1] == torch.finfo(torch.float32).tiny
    assert quantized.tolist()[2] == [42, -127]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_are_refused(bad: float) -> None:
    """The first row that holds one is named."""
    values = torch.ones(4, 6)
    values[2, 5] = bad
    with pytest.raises(ValueError, match="cannot quantise row 2: it holds NaN or infinity"):
        quantize(values)


def test_bad_input() -> None:
    """Dtypes and shapes that do not belong together."""
    with pytest.raises(ValueError, match="dtype int8; allowed: bfloat16, float16, float32"):
        quantize(torch.ones(2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match="empty"):
        quantize(torch.ones(0, 2))
    quantized, scale = quantize(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"got \[3, 2\] and \[2\]"):
        dequantize(quantized, scale[:2])
    with pytest.raises(ValueError, match="scale has dtype bfloat16; allowed: float32"):
        dequantize(quantized, scale.bfloat16())
    with pytest.raises(ValueError, match="quantised values has dtype int32"):
        dequantize(quantized.int(), scale)
