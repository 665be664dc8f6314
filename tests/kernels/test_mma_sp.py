"""The mma.sp decode kernels in Triton's interpreter against fp64, and the interpreter's PTX against two other sources."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import interpreter
import numpy as np
import pytest
import torch
from mma_sp_cases import CASES, Case, Result, two_four_weight
from numpy.typing import NDArray
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
SCRIPT = "mma_sp_cases.py"
MMA = "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{0}.{0}.f32 "
OPERANDS = "{{$0,$1,$2,$3}}, {{$8,$9,$10,$11}}, {{$12,$13,$14,$15}}, {{$4,$5,$6,$7}}, $16, 0x{0};"
CONSTRAINTS = "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r,r,r,r,r,r,r"


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64(case: Case, results: dict[str, Any]) -> None:
    """The kernel rounds an fp32 sum once, is no worse than torch, and has Inf and NaN where the dense product has them."""
    result = Result(**results[str(case)])
    assert result.same_nonfinite
    assert result.excess <= 0
    assert result.ours <= 2 * result.torchs + 1e-6


@needs_triton
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_int8_becomes_float_exactly(dtype: str, results: dict[str, Any]) -> None:
    """Each of the 256 bytes becomes the float of the same value, in its place."""
    assert results[f"expand {dtype}"] == [float(value) for value in range(-128, 128)]


def words_of(values: torch.Tensor) -> NDArray[np.uint32]:
    """Neighbouring 16-bit floats as 32-bit words."""
    return values.contiguous().view(torch.int32).numpy().view(np.uint32)


def multiply(
    dtype: str, a: NDArray[Any], b: NDArray[Any], c: NDArray[Any], metadata: NDArray[Any], selector: int
) -> NDArray[np.float32]:
    """One mma.sp of a warp through the shim; operands [32, 4]."""
    asm = MMA.format(dtype) + OPERANDS.format(selector)
    inputs = [c.astype(np.float32), a.view(np.int32), b.view(np.int32), metadata.view(np.int32)]
    return np.asarray(interpreter.evaluate(asm, CONSTRAINTS, inputs, 4)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("selector", [0, 1])
def test_shim_is_the_ptx_isa(dtype: torch.dtype, selector: int) -> None:
    """Fragments filled from the ISA's own formulas for each element give A B + C; lanes not selected hold other metadata."""
    generator = torch.Generator().manual_seed(selector)
    weight = two_four_weight(16, 32, generator).to(dtype)
    weight[0, :4] = torch.tensor([0, float("inf"), 0, 2.0])
    tokens = torch.randn(32, 8, generator=generator).to(dtype)
    sums = torch.randn(16, 8, generator=generator)
    a = torch.zeros(32, 8, dtype=dtype)
    b = torch.zeros(32, 8, dtype=dtype)
    c = np.zeros((32, 4), np.float32)
    metadata = np.full((32, 4), 0x44444444, np.uint32)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):  # a0 .. a7: row and first of four columns, of which the metadata picks two
            row = group if i in (0, 1, 4, 5) else group + 8
            first = thread * 4 + (0 if i < 4 else 16)
            kept = [int(k) for k in weight[row, first : first + 4].nonzero().flatten()]
            kept = sorted({*kept, *[k for k in range(4) if k not in kept][: 2 - len(kept)]})
            a[lane, i] = weight[row, first + kept[i % 2]]
            # metadata of 16 columns of a row: 4 bits per group; columns 0-15 in the selected pair's first lane
            holder = group * 4 + 2 * selector + (0 if i < 4 else 1)
            shift = (0 if row < 8 else 16) + 4 * thread
            metadata[holder, 0] &= np.uint32(~(15 << shift) & 0xFFFFFFFF)
            metadata[holder, 0] |= np.uint32((kept[0] | kept[1] << 2) << shift)
        for i in range(8):  # b0 .. b7
            b[lane, i] = tokens[thread * 2 + i % 2 + 8 * (i // 2), group]
        for i in range(4):  # c0 .. c3
            c[lane, i] = sums[group if i < 2 else group + 8, thread * 2 + i % 2]
    name = "bf16" if dtype == torch.bfloat16 else "f16"
    d = multiply(name, words_of(a), words_of(b), c, metadata, selector)
    expected = weight.double() @ tokens.double() + sums.double()
    for lane in range(32):
        for i in range(4):
            value = expected[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]
            assert d[lane, i] == pytest.approx(float(value), rel=1e-5, abs=1e-5)


def test_shim_reads_the_metadata_of_cutlass() -> None:
    """CUTLASS's reordered metadata (torch's port), a word per lane as stored: selector 0 is rows 0-15, 1 rows 16-31."""
    generator = torch.Generator().manual_seed(3)
    weight = two_four_weight(32, 32, generator).bfloat16()
    tokens = torch.randn(32, 8, generator=generator).bfloat16()
    values, reordered = sparse_semi_structured_from_dense_cutlass(weight)
    stored = reordered.as_strided((reordered.numel(),), (1,)).contiguous().view(torch.int32).numpy().view(np.uint32)
    metadata = np.full((32, 4), 0x44444444, np.uint32)
    metadata[:, 0] = stored
    lane, reg = np.arange(32)[:, None], np.arange(4)[None, :]
    b = words_of(tokens.T)[lane // 4, lane % 4 + 4 * reg]
    for selector in (0, 1):
        rows = 16 * selector + lane // 4 + 8 * (reg % 2)
        a = words_of(values)[rows, lane % 4 + 4 * (reg // 2)]
        d = multiply("bf16", a, b, np.zeros((32, 4)), metadata, selector)
        expected = (weight.double() @ tokens.double()).numpy()
        np.testing.assert_allclose(d, expected[16 * selector + lane // 4 + 8 * (reg // 2), lane % 4 * 2 + reg % 2], atol=1e-5)


def test_shim_refuses_what_silicon_leaves_undefined() -> None:
    """Metadata out of order, an input read after an output without early clobber, an unwritten register, unknown PTX."""
    zeros = np.zeros((32, 4), np.uint32)
    with pytest.raises(ValueError, match="ascending"):
        multiply("bf16", zeros, zeros, np.zeros((32, 4)), zeros, 0)
    operand = [np.zeros((32, 4), np.int32)]
    two = "=r,=r,=r,=r,r,r,r,r"
    with pytest.raises(ValueError, match="not early-clobber"):
        interpreter.evaluate("mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;", two, operand, 4)
    with pytest.raises(ValueError, match="before it is written"):
        interpreter.evaluate("{ .reg .b32 t; mov.b32 $0, t; }", "=r,r", [np.zeros((32,), np.int32)], 1)
    with pytest.raises(NotImplementedError, match=r"popc\.b32"):
        interpreter.evaluate("popc.b32 $0, $1;", "=r,r", [np.zeros((32,), np.int32)], 1)


def test_shim_computes_the_bit_instructions() -> None:
    """prmt takes bytes and replicates signs, lop3 follows its table, packed floats round once, to nearest even."""
    a = np.array([0x80FF7F01], np.uint32)
    out = "=r,r"
    for asm, expected in (
        ("prmt.b32 $0, $1, 0x43434343, 0x4140;", 0x437F4301),
        ("prmt.b32 $0, $1, $1, 0xBA98;", 0xFFFF0000),
        ("lop3.b32 $0, $1, 0x00FF00FF, 0x0F0F0F0F, 0x96;", 0x80FF7F01 ^ 0x00FF00FF ^ 0x0F0F0F0F),
        ("lop3.b32 $0, $1, 0x00FF00FF, 0x0F0F0F0F, 0xEA;", (0x80FF7F01 & 0x00FF00FF) | 0x0F0F0F0F),
        ("shr.u32 $0, $1, 0x8;", 0x0080FF7F),
        ("{ .reg .b32 t; mov.b32 t, 0x3F803F80; fma.rn.bf16x2 $0, t, 0x3F80BF80, 0x3B803B80; }", 0x3F80BF7F),
        ("{ .reg .b32 t; mov.b32 t, 0x64806401; sub.rn.f16x2 $0, t, 0x64806480; }", 0x0000D7F0),
    ):
        (word,) = interpreter.evaluate(asm, out, [a], 1)
        assert int(word.view(np.uint32)[0]) == expected, asm


def test_shim_rounds_to_bf16_like_torch() -> None:
    """Ties go to even, NaN stays NaN, and the largest numbers become Inf."""
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-7, 3.4e38, float("inf"), float("nan"), -0.0, 1e-45])
    bits = interpreter.to_bf16(values.numpy()).astype(np.uint16)
    ours = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(ours, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
