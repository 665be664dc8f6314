"""2:4 weights without sparse tensor cores: multiply after expanding in registers, or expand to a dense weight.

O out features, I in features, G = I / 4 groups, T tokens. Nothing here is particular to one vendor, and all of it runs in
Triton's interpreter. `linear` reads 9/16 of the dense 16-bit bytes, but a warp spends eleven to fourteen instructions on 32
dense weights (counted for sm_90): predicted 6.5 to 11 us of issue for 4096 x 4096 on an H200, about the 10.2 us of a dense
cuBLAS call. On a GPU that has sparse tensor cores `mma_sp` is the kernel to use. `unpack` and `unpack_fragments`
serve many tokens, where the time of a dense multiplication dwarfs that of writing the weight out first.
"""

# Triton's functions are untyped.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _expand(first, second, nibble):
    """The four columns of each group from its two kept weights; integers or floats, of which only the bits are moved."""
    i0 = nibble & 3
    i1 = (nibble >> 2) & 3
    zero = tl.zeros_like(first)
    column0 = tl.where(i0 == 0, first, zero)
    column1 = tl.where(i0 == 1, first, tl.where(i1 == 1, second, zero))
    column2 = tl.where(i0 == 2, first, tl.where(i1 == 2, second, zero))
    column3 = tl.where(i1 == 3, second, zero)
    return column0, column1, column2, column3


@triton.jit
def _nibbles(meta_ptr, rows, first_byte, in_features, inside, BYTES: tl.constexpr):
    """Nibbles [R, 2 BYTES] of `rows` [R, 1] from byte `first_byte` on; 0 where there are none."""
    row_bytes = tl.cdiv(in_features, 8)
    byte = first_byte + tl.arange(0, BYTES)[None, :]
    meta = tl.load(meta_ptr + rows * row_bytes + byte, mask=inside & (byte < row_bytes), other=0)
    return tl.reshape(tl.join(meta & 15, meta >> 4), (meta.shape[0], 2 * BYTES))


@triton.jit(do_not_specialize=["num_tokens"])
def linear_kernel(
    x_ptr, values_ptr, meta_ptr, bias_ptr, y_ptr, num_tokens, out_features, in_features,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """One CTA of y: BLOCK_O rows, BLOCK_T tokens. UP: multiply in fp32, as the interpreter cannot multiply bf16."""
    rows = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O))[:, None]
    tokens = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T))[None, :]
    row_inside = rows < out_features
    token_inside = tokens < num_tokens
    wide_rows = rows.to(tl.int64)
    x_ptr += tokens.to(tl.int64) * in_features
    values_ptr += wide_rows * (in_features // 2)
    sums = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    for start in range(0, in_features, BLOCK_I):
        slot = start // 2 + tl.arange(0, BLOCK_I // 2)[None, :]
        values = tl.load(values_ptr + slot, mask=row_inside & (slot < in_features // 2), other=0)
        nibble = _nibbles(meta_ptr, wide_rows, start // 8, in_features, row_inside, BLOCK_I // 8)
        first, second = tl.split(tl.reshape(values, (BLOCK_O, BLOCK_I // 4, 2)))
        column0, column1, column2, column3 = _expand(first, second, nibble)
        w = tl.reshape(tl.join(tl.join(column0, column2), tl.join(column1, column3)), (BLOCK_O, BLOCK_I))
        column = (start + tl.arange(0, BLOCK_I))[:, None]
        x = tl.load(x_ptr + column, mask=token_inside & (column < in_features), other=0)
        if UP:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        sums = tl.dot(w, x, sums, input_precision="ieee")
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + rows, mask=row_inside, other=0).to(tl.float32)
    y_ptr += tokens.to(tl.int64) * out_features
    tl.store(y_ptr + rows, sums.to(y_ptr.dtype.element_ty), mask=row_inside & token_inside)


@triton.jit
def unpack_kernel(
    values_ptr, meta_ptr, weight_ptr, out_features, in_features,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """One CTA of the dense weight, from canonical order: BLOCK_O rows, BLOCK_I columns; the weights are integers here."""
    rows = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O))[:, None]
    start = tl.program_id(1) * BLOCK_I
    inside = rows < out_features
    rows = rows.to(tl.int64)
    slot = start // 2 + tl.arange(0, BLOCK_I // 2)[None, :]
    values = tl.load(values_ptr + rows * (in_features // 2) + slot, mask=inside & (slot < in_features // 2), other=0)
    first, second = tl.split(tl.reshape(values, (BLOCK_O, BLOCK_I // 4, 2)))
    nibble = _nibbles(meta_ptr, rows, start // 8, in_features, inside, BLOCK_I // 8)
    column0, column1, column2, column3 = _expand(first, second, nibble)
    w = tl.reshape(tl.join(tl.join(column0, column2), tl.join(column1, column3)), (BLOCK_O, BLOCK_I))
    column = start + tl.arange(0, BLOCK_I)[None, :]
    tl.store(weight_ptr + rows * in_features + column, w, mask=inside & (column < in_features))


@triton.jit
def unpack_fragments_kernel(values_ptr, meta_ptr, weight_ptr, out_features, in_features):
    """One CTA of the dense weight, from fragment order: 16 rows, 256 columns, two 16-bit weights to a word.

    The axes are those of `llmprune_kernels.fragments`: k-step s = 2 p + selector, g, t, half, hi. The fragments are read as
    they lie; the compiler transposes them through shared memory, so that the rows are written in order.
    """
    block = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    word = tl.reshape(tl.load(values_ptr + block * 1024 + tl.arange(0, 1024)), (8, 8, 4, 2, 2))  # s, g, t, half, hi
    word = tl.reshape(tl.permute(word, (4, 1, 0, 3, 2)), (16, 64))  # hi g, s half t
    meta = tl.reshape(tl.load(meta_ptr + block * 128 + tl.arange(0, 128)), (8, 2, 2, 4))  # g, selector, half, p
    meta = tl.reshape(tl.permute(meta, (0, 3, 1, 2)), (8, 16))  # g, s half
    meta = tl.reshape(tl.permute(tl.join(meta, meta >> 16), (2, 0, 1)), (16, 16))  # hi g, s half
    shift = 4 * tl.arange(0, 4)[None, None, :]
    nibble = tl.reshape(meta[:, :, None] >> shift, (16, 64)) & 15  # hi g, s half t
    column0, column1, column2, column3 = _expand(word & 0xFFFF, (word >> 16) & 0xFFFF, nibble)
    pairs = tl.reshape(tl.join(column0 | (column1 << 16), column2 | (column3 << 16)), (16, 128))
    rows = (tl.program_id(0) * 16 + tl.arange(0, 16))[:, None]
    pair = tl.program_id(1) * 128 + tl.arange(0, 128)[None, :]
    mask = (rows < out_features) & (pair < in_features // 2)
    tl.store(weight_ptr + rows.to(tl.int64) * (in_features // 2) + pair, pairs, mask=mask)


def linear(
    x_TI: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    *,
    block_t: int = 16,
    block_o: int = 64,
    block_i: int = 128,
    num_warps: int = 4,
) -> Tensor:
    """x W^T + b with a canonical 2:4 weight, fp32 sums (fp32 inputs are multiplied in fp32, not in TF32).

    Args:
        x_TI: bf16, fp16 or fp32 [T, I], contiguous; I a multiple of 4.
        values: [O, I/2], of the dtype of x.
        meta: uint8 [O, ceil(I/8)].
        bias: [O] of any float dtype, or None.
        block_t: tokens per CTA; at least 8, like all of these a power of two.
        block_o: rows per CTA, at least 16; at most 32 in fp32.
        block_i: columns at a time, at least 16; at most 64 in fp32.
        num_warps: warps per CTA.

    Returns:
        [T, O] in the dtype of x. Pruned weights are zeros: one that meets an Inf or NaN of x gives NaN, as in a dense layer.
    """
    num_tokens, in_features = x_TI.shape
    out_features = values.shape[0]
    y_TO = x_TI.new_empty(num_tokens, out_features)
    if not num_tokens:
        return y_TO
    if x_TI.dtype == torch.float32:
        # from 64 rows on, Triton 3.6 multiplies in TF32 on sm_100, whatever input_precision says; wider tiles spill
        block_o, block_i = min(block_o, 32), min(block_i, 64)
    linear_kernel[(triton.cdiv(out_features, block_o), triton.cdiv(num_tokens, block_t))](
        x_TI,
        values,
        meta,
        bias,
        y_TO,
        num_tokens,
        out_features,
        in_features,
        BLOCK_T=block_t,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        UP=not x_TI.is_cuda,
        num_warps=num_warps,
    )
    return y_TO


def unpack(values: Tensor, meta: Tensor, out: Tensor | None = None) -> Tensor:
    """The dense weight [O, I] of a canonical 2:4 weight, bit for bit.

    Reads 9/16 of the weight's bytes (fp32: 17/32) and writes the weight. 16 bits, 4096 x 4096: 18.9 + 33.6 MB, so 12.5 us at
    4.2 TB/s (predicted).

    Args:
        values: bf16, fp16 or fp32 [O, I/2].
        meta: uint8 [O, ceil(I/8)]; trusted to be ascending.
        out: where to write, [O, I] contiguous in the dtype of `values`; None allocates.
    """
    out_features, in_features = values.shape[0], 2 * values.shape[1]
    if out is None:
        out = values.new_empty(out_features, in_features)
    word = torch.int32 if values.element_size() == 4 else torch.int16
    block_o, block_i = 8, 512
    unpack_kernel[(triton.cdiv(out_features, block_o), triton.cdiv(in_features, block_i))](
        values.view(word), meta, out.view(word), out_features, in_features, BLOCK_O=block_o, BLOCK_I=block_i, num_warps=4
    )
    return out


def unpack_fragments(
    values_frag: Tensor, meta_frag: Tensor, out_features: int, in_features: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The dense weight [O, I] of a 16-bit 2:4 weight in fragment order, bit for bit.

    Reads 9/16 of the padded weight's bytes and writes the weight: the same time as `unpack`.

    Args:
        values_frag: int32 [ceil(O/16), ceil(I/256), 8, 32, 4].
        meta_frag: int32 [ceil(O/16), ceil(I/256), 32, 4].
        out_features: O.
        in_features: I.
        dtype: bf16 or fp16, what the words hold.
        out: where to write, [O, I] contiguous in that dtype; None allocates.
    """
    if out is None:
        out = values_frag.new_empty(out_features, in_features, dtype=dtype)
    unpack_fragments_kernel[tuple(values_frag.shape[:2])](
        values_frag, meta_frag, out.view(torch.int32), out_features, in_features, num_warps=4
    )
    return out
