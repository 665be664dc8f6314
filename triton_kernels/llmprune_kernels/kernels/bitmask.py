"""y = x W^T + b of an unstructured sparse weight in the bitmask format, for few tokens; and the dense copy for many.

O out features, I in features, T tokens; W warps of a CTA. A CTA computes 16 rows for `block_t` tokens. Each of its warps takes
256 columns of these rows at a time: a lane holds the mask byte of eight neighbouring columns of every row, so the stored
values of a byte lie side by side. Four rows share one 32-bit word per lane: one population count and one scan over the
warp say for all four how many values of the 256 columns lie before the lane's. Each weight is then loaded or left zero
(one predicated 16-bit load, whose neighbours are in L1), the tile goes through shared memory to the tensor cores, and the
warps add up at the end.

What it costs. Read per dense 16-bit weight: 1 bit of mask, 16 density bits of values, 0.125 bits of `row_starts`, so at most
1.75 times faster than dense at 50 % sparsity and 2.7 times at 70 %. Finding the values costs instructions whatever the
sparsity. Counted in the machine code for sm_90, instructions of a warp for 32 dense weights in the main loop (compiler of
Triton 3.6; 3.9 where it says so):

    this kernel, up to 8 tokens          9.4   (3.7: 9.6, 3.9: 10.3; 16 tokens: 11.1)
    of which finding and loading         4.5   LOP3 (bit and predicate), LDG, LEA.HI + IMAD.X (next address), half a CS2R
    the portable half of `_take`        13.5   bit tests become shift, mask and compare, addresses are made anew
    one token, FMA, assembly            11.2   (3.9) the tensor cores take 8 tokens for less
    one token, FMA, popc.b32            15.5   (3.9) the position of each weight from the bits below it
    one token, FMA, tl.cumsum           15.6   (3.9)

Walking over set bits instead of columns was not built: about nine instructions per stored weight, the lanes wait for the
fullest byte (five or six of eight bits at 70 % sparsity), and x is gathered from shared memory with bank conflicts.

Predicted, not measured: 4096 x 4096 weights are 524288 groups of 32, so 5.3 us of issue on an H200 (132 SMs, 1.75 GHz) at the
four instructions per clock of an SM, 8.9 us at 2.4; the memory time at 4.2 TB/s is 4.5 us at 50 % sparsity and 3.0 us at 70 %,
and a dense cuBLAS call takes about 10.2 us. A 16-bit load of a warp touches two to three cache lines; if L1 serves one line
per clock that is 4.5 to 7 us more that must overlap. So on an H200 this is somewhere between no gain and 1.3 times
dense, at any sparsity: choose it by the measured table only. Devices with less bandwidth per SM gain more.
"""

# Triton's functions are untyped, and their tuples grow at compile time.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
COLUMNS = 256

_ROWS = tl.constexpr(ROWS)
_COLUMNS = tl.constexpr(COLUMNS)


@triton.constexpr_function
def _byte_asm(row):
    """The eight columns of mask byte `row` in the word $4, whose values begin at address $5 -> four pairs of halves, $0-3.

    A bit is its own step to the next value: shifted to bit 1 it is the two bytes that a stored value takes.
    """
    lines = ["{", ".reg .pred kept;", ".reg .b32 bit, value<8>;", ".reg .b64 at, step;", "mov.b64 at, $5;"]
    for column in range(8):
        position = 8 * row + column
        lines += [
            f"and.b32 bit, $4, {1 << position};",
            "setp.ne.u32 kept, bit, 0;",
            f"mov.b32 value{column}, 0;",
            f"@kept ld.global.nc.u16 value{column}, [at];",
        ]
        if column < 7:
            lines += [
                f"shr.u32 bit, bit, {position - 1};" if position else "shl.b32 bit, bit, 1;",
                "cvt.u64.u32 step, bit;",
                "add.u64 at, at, step;",
            ]
    lines += [f"prmt.b32 ${pair}, value{2 * pair}, value{2 * pair + 1}, 0x5410;" for pair in range(4)]
    return "\n".join([*lines, "}"])


@triton.jit
def _take(values_ptr, mask, start, ROW: tl.constexpr, ASM: tl.constexpr):
    """Byte ROW of the words `mask` [N] as weights [N, 8]; the values of each byte begin at index `start` [N]."""
    if ASM:
        at = (values_ptr + start).to(tl.int64, bitcast=True)
        pair01, pair23, pair45, pair67 = tl.inline_asm_elementwise(
            _byte_asm(ROW), "=&r,=&r,=&r,=&r,r,l", [mask, at], (tl.int32, tl.int32, tl.int32, tl.int32), True, 1
        )
        pairs = tl.reshape(tl.join(tl.join(pair01, pair45), tl.join(pair23, pair67)), (mask.shape[0], 4))
        low = pairs.to(tl.int16).to(values_ptr.dtype.element_ty, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(values_ptr.dtype.element_ty, bitcast=True)
        return tl.reshape(tl.join(low, high), (mask.shape[0], 8))
    # nibble j of `before` counts the bits below bit j: a byte spread to nibbles, times ones, sums all lower nibbles
    byte = (mask >> (8 * ROW)) & 255
    spread = (byte | (byte << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    spread = (spread | (spread << 3)) & 0x11111111
    column = tl.arange(0, 8)[None, :]
    before = ((spread * 0x11111110)[:, None] >> (4 * column)) & 15
    kept = (byte[:, None] >> column) & 1
    return tl.load(values_ptr + (start[:, None] + before), mask=kept != 0, other=0)


@triton.jit
def _count_bits(word):
    """Set bits of each byte of the words, in the byte."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return (word + (word >> 4)) & 0x0F0F0F0F


@triton.jit
def _decode(
    bits_ptr, values_ptr, starts_ptr, row, byte, out_features, row_bytes, row_chunks,
    NUM_WARPS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Dense tile [W, 16, 256] of rows `row` .. `row` + 15 and the columns of the mask bytes `byte` [32 W].

    Rows beyond the matrix repeat the last one; bytes beyond it are zero. A case without these checks, for widths that need
    none, made ptxas hoist so many loads that it spilled.
    """
    near = tl.minimum(byte, row_bytes - 1)
    tile = ()
    for four in tl.static_range(4):
        mask = tl.zeros((NUM_WARPS * 32,), tl.int32)
        starts = ()
        for i in tl.static_range(4):
            r = tl.minimum(row + 4 * four + i, out_features - 1).to(tl.int64)
            mask |= tl.load(bits_ptr + r * row_bytes + near).to(tl.int32) << (8 * i)
            starts += (tl.load(starts_ptr + r * row_chunks + near // 32),)
        mask = tl.where(byte < row_bytes, mask, 0)
        count = _count_bits(mask)
        # 256 kept columns overflow the last lane's byte into the next row's, and subtracting its own count takes it back
        scan = tl.cumsum(tl.reshape(count, (NUM_WARPS, 32)), axis=1)
        before = tl.reshape(scan, (NUM_WARPS * 32,)) - count
        rows = ()
        for i in tl.static_range(4):
            rows += (_take(values_ptr, mask, starts[i] + ((before >> (8 * i)) & 255), i, ASM),)
        tile += (tl.join(tl.join(rows[0], rows[2]), tl.join(rows[1], rows[3])),)
    joined = tl.join(tl.join(tile[0], tile[2]), tl.join(tile[1], tile[3]))  # [lanes, 8, 2, 2, 2, 2]: row bits 1, 0, 3, 2 (of 4)
    ordered = tl.permute(tl.reshape(joined, (NUM_WARPS, 32, 8, 4, 4)), (0, 4, 3, 1, 2))
    return tl.reshape(ordered, (NUM_WARPS, _ROWS, _COLUMNS))


@triton.jit(do_not_specialize=["num_tokens"])
def linear_kernel(
    x_ptr, bits_ptr, values_ptr, starts_ptr, bias_ptr, y_ptr, num_tokens, out_features, in_features,
    BLOCK_T: tl.constexpr, NUM_WARPS: tl.constexpr, ASM: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """One CTA of y: 16 rows, BLOCK_T tokens. UP: multiply in fp32, as the interpreter cannot multiply bf16."""
    row = tl.program_id(0) * _ROWS
    first_token = tl.program_id(1) * BLOCK_T
    token = tl.arange(0, BLOCK_T)
    row_bytes = tl.cdiv(in_features, 8)
    row_chunks = tl.cdiv(in_features, _COLUMNS)
    x_ptr += first_token.to(tl.int64) * in_features
    inside = first_token + token < num_tokens
    sums = tl.zeros((NUM_WARPS, _ROWS, BLOCK_T), tl.float32)
    for first in range(0, row_bytes, NUM_WARPS * 32):
        byte = first + tl.arange(0, NUM_WARPS * 32)
        w = _decode(bits_ptr, values_ptr, starts_ptr, row, byte, out_features, row_bytes, row_chunks, NUM_WARPS, ASM)
        column = first * 8 + tl.arange(0, NUM_WARPS)[:, None] * _COLUMNS + tl.arange(0, _COLUMNS)[None, :]
        mask = inside[None, None, :] & (column < in_features)[:, :, None]
        x = tl.load(x_ptr + token[None, None, :] * in_features + column[:, :, None], mask=mask, other=0)
        if UP:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        sums = tl.dot(w, x, sums, input_precision="ieee")
    y = tl.sum(sums, axis=0)
    rows = row + tl.arange(0, _ROWS)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows, mask=rows < out_features, other=0).to(tl.float32)[:, None]
    y_ptr += first_token.to(tl.int64) * out_features
    mask = inside[None, :] & (rows < out_features)[:, None]
    tl.store(y_ptr + token[None, :] * out_features + rows[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def unpack_kernel(
    bits_ptr, values_ptr, starts_ptr, weight_ptr, out_features, in_features,
    NUM_WARPS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One CTA of the dense weight: 16 rows, 256 NUM_WARPS columns; the weights are integers here, only their bits matter."""
    row = tl.program_id(0) * _ROWS
    first = tl.program_id(1) * NUM_WARPS * 32
    byte = first + tl.arange(0, NUM_WARPS * 32)
    row_bytes = tl.cdiv(in_features, 8)
    row_chunks = tl.cdiv(in_features, _COLUMNS)
    w = _decode(bits_ptr, values_ptr, starts_ptr, row, byte, out_features, row_bytes, row_chunks, NUM_WARPS, ASM)
    rows = (row + tl.arange(0, _ROWS))[None, :, None]
    column = first * 8 + tl.arange(0, NUM_WARPS)[:, None, None] * _COLUMNS + tl.arange(0, _COLUMNS)[None, None, :]
    mask = (rows < out_features) & (column < in_features)
    tl.store(weight_ptr + rows.to(tl.int64) * in_features + column, w, mask=mask)


def linear(
    x_TI: Tensor,
    bits: Tensor,
    values: Tensor,
    row_starts: Tensor,
    bias: Tensor | None,
    *,
    block_t: int | None = None,
    num_warps: int = 4,
) -> Tensor:
    """x W^T + b with a bitmask weight, fp32 sums.

    fp32 weights go through `unpack` and a dense multiplication: their tile does not fit the registers.

    Args:
        x_TI: [T, I], contiguous.
        bits: uint8 [O, ceil(I/8)].
        values: [n], of the dtype of x.
        row_starts: int32 [O, ceil(I/256)] of `llmprune_kernels.bitmask.row_starts`; trusted, a wrong one reads anywhere.
        bias: [O] of any float dtype, or None.
        block_t: tokens per CTA, 8 or 16 (None: the smaller that suffices); more tokens take more CTAs, which decode again.
        num_warps: warps per CTA, among which the columns of a row are divided; a power of two.

    Returns:
        [T, O] in the dtype of x. Pruned weights are zeros: one that meets an Inf or NaN of x gives NaN, as in a dense layer.
    """
    num_tokens, in_features = x_TI.shape
    if x_TI.dtype == torch.float32:
        bias = bias if bias is None else bias.to(x_TI.dtype)
        return F.linear(x_TI, unpack(bits, values, row_starts, in_features), bias)
    y_TO = x_TI.new_empty(num_tokens, bits.shape[0])
    if not num_tokens:
        return y_TO
    block_t = block_t or (8 if num_tokens <= 8 else 16)
    linear_kernel[(triton.cdiv(bits.shape[0], ROWS), triton.cdiv(num_tokens, block_t))](
        x_TI,
        bits,
        values,
        row_starts,
        bias,
        y_TO,
        num_tokens,
        bits.shape[0],
        in_features,
        BLOCK_T=block_t,
        UP=not x_TI.is_cuda,
        **_options(x_TI, num_warps),
    )
    return y_TO


def unpack(bits: Tensor, values: Tensor, row_starts: Tensor, in_features: int, out: Tensor | None = None) -> Tensor:
    """The dense weight [O, I], bit for bit.

    Reads 1/8 byte and density times the weight's bytes per dense weight, writes the weight: at 50 % sparsity and 16 bits 52 MB
    for 4096 x 4096, 12.5 us at 4.2 TB/s (predicted).

    Args:
        bits: uint8 [O, ceil(I/8)].
        values: bf16, fp16 or fp32 [n].
        row_starts: int32 [O, ceil(I/256)]; trusted.
        in_features: I.
        out: where to write, [O, I] contiguous in the dtype of `values`; None allocates.
    """
    if out is None:
        out = values.new_empty(bits.shape[0], in_features)
    word = torch.int32 if values.element_size() == 4 else torch.int16
    num_warps = 4
    grid = triton.cdiv(bits.shape[0], ROWS), triton.cdiv(in_features, COLUMNS * num_warps)
    unpack_kernel[grid](
        bits,
        values.view(word),
        row_starts,
        out.view(word),
        bits.shape[0],
        in_features,
        **_options(values, num_warps),
    )
    return out


def _options(weights: Tensor, num_warps: int) -> dict[str, Any]:
    """The assembly where it runs: 16-bit weights on an NVIDIA device."""
    asm = weights.is_cuda and torch.version.hip is None and weights.element_size() == 2
    return {"NUM_WARPS": num_warps, "ASM": asm, "num_warps": num_warps}
