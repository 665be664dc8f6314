"""Canonical 2:4 <-> the order in which the sparse tensor cores read a weight: pure permutations, exact both ways.

O out features, I in features, G = I / 4 groups; B row blocks of 16, K column chunks of 256.

A warp's ``mma.sp`` m16n8k32 takes its weights in registers, so the weights are stored in register order, and a lane's
load is one 128-bit word. Within row block b and column chunk k:

* ``values`` int32 [B, K, 8, 32, 4]: k-step s (32 columns), lane 4 g + t, register 2 half + hi holds the two kept 16-bit
  weights of row ``16 b + 8 hi + g``, group ``64 k + 8 s + 4 half + t``, the lower column in the low half.
* int8 ``values`` int32 [B, K, 4, 32, 4]: double step d (64 columns), lane 4 g + t, register 2 s + half holds four
  weights: bytes 0 and 1 are row g, bytes 2 and 3 row g + 8, of group ``64 k + 16 d + 8 s + 4 half + t``.
* ``meta`` int32 [B, K, 32, 4]: lane 4 g + 2 selector + half, register p holds the nibbles of k-step ``2 p + selector``,
  groups 4 half .. 4 half + 3: low 16 bits row g, high 16 bits row g + 8, lower groups in lower bits.

Rows are padded to 16 and columns to 256 with zero values and nibble 4 (columns 0 and 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune_kernels._bits import HALVES, as_bits, check_dtype, dtype_name
from llmprune_kernels.two_four import TwoFour, check_meta, check_parts, meta_bytes

ROWS = 16
"""Rows of one fragment."""

COLUMNS = 256
"""Columns of one chunk: eight k-steps, for which one 128-bit load brings all the metadata."""

_DTYPES = (*HALVES, torch.int8)
_FILL = 0x44
_BLOCK = (2, 8)  # hi, g
# axes: block 0, hi 1, g 2, chunk 3, step 4, half 5, t 6  ->  block, chunk, step, g, t, half, hi
_ORDER_16 = (0, 3, 4, 2, 6, 5, 1)
# axes: block 0, hi 1, g 2, chunk 3, double step 4, step 5, half 6, t 7  ->  block, chunk, double step, g, t, step, half, hi
_ORDER_8 = (0, 3, 4, 2, 7, 5, 6, 1)
# axes: block 0, hi 1, g 2, chunk 3, p 4, selector 5, half 6  ->  block, chunk, g, selector, half, p, hi
_ORDER_META = (0, 3, 2, 5, 6, 4, 1)


def fragment_shapes(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[list[int], list[int]]:
    """Shapes of the int32 ``values`` and ``meta`` fragments of a weight; ``dtype`` bf16, fp16 or int8."""
    blocks, chunks = -(-out_features // ROWS), -(-in_features // COLUMNS)
    steps = 4 if dtype == torch.int8 else 8
    return [blocks, chunks, steps, 32, 4], [blocks, chunks, 32, 4]


def to_fragments(values: Tensor, meta: Tensor, *, check: bool = True) -> tuple[Tensor, Tensor]:
    """Reorder a canonical 2:4 weight into fragments.

    Args:
        values: bf16, fp16 or int8 [O, I/2].
        meta: uint8 [O, ceil(I/8)] on the same device.
        check: as in ``two_four.unpack``.

    Returns:
        int32 ``values`` and ``meta`` in the shapes of ``fragment_shapes``; 9/16 of the dense bf16 bytes plus padding.

    Raises:
        ValueError: another dtype (fp32 has no sparse tensor core path here), shapes that do not belong together, or a
            bad nibble.
    """
    out_features, in_features = check_parts(values, meta)
    check_dtype(values, "values in fragment order", _DTYPES)
    if check:
        check_meta(meta, in_features)
    values_shape, meta_shape = fragment_shapes(out_features, in_features, values.dtype)
    padded = values.new_zeros(values_shape[0] * ROWS, values_shape[1] * COLUMNS // 2)
    padded[:out_features, : in_features // 2] = values.detach()
    values_frag = _permuted(_group_words(padded), values.dtype).view(torch.int32).view(values_shape)

    padded = meta.new_full((meta_shape[0] * ROWS, meta_shape[1] * COLUMNS // 8), _FILL)
    padded[:out_features, : meta.shape[1]] = meta
    if in_features % 8:
        padded[:out_features, meta.shape[1] - 1] |= _FILL & 0xF0
    meta_word = padded.view(torch.int16).view(-1, *_BLOCK, meta_shape[1], 4, 2, 2)
    meta_frag = meta_word.permute(_ORDER_META).contiguous().view(torch.int32).view(meta_shape)
    return values_frag, meta_frag


def from_fragments(values_frag: Tensor, meta_frag: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> TwoFour:
    """The canonical 2:4 weight [out_features, in_features] of fragments, bit for bit what ``to_fragments`` was given.

    Args:
        values_frag: int32 [B, K, 8, 32, 4], or [B, K, 4, 32, 4] for int8.
        meta_frag: int32 [B, K, 32, 4] on the same device.
        dtype: of the values: bf16, fp16 or int8.

    Raises:
        ValueError: shapes or dtypes that do not fit the features.
    """
    check_fragments(values_frag, meta_frag, out_features, in_features, dtype)
    chunks = values_frag.shape[1]
    word = torch.int16 if dtype == torch.int8 else torch.int32
    steps = (4, 2, 2, 4) if dtype == torch.int8 else (8, 2, 4)
    order = _ORDER_8 if dtype == torch.int8 else _ORDER_16
    axes = (values_frag.shape[0], *_BLOCK, chunks, *steps)
    permuted = values_frag.contiguous().view(word).view([axes[axis] for axis in order])
    dense = permuted.permute(_inverse(order)).reshape(values_frag.shape[0] * ROWS, -1).view(dtype)
    values = dense[:out_features, : in_features // 2].contiguous()

    axes = (meta_frag.shape[0], *_BLOCK, chunks, 4, 2, 2)
    permuted = meta_frag.contiguous().view(torch.int16).view([axes[axis] for axis in _ORDER_META])
    padded = permuted.permute(_inverse(_ORDER_META)).reshape(meta_frag.shape[0] * ROWS, -1).view(torch.uint8)
    meta = padded[:out_features, : meta_bytes(in_features)].clone(memory_format=torch.contiguous_format)
    if in_features % 8:
        meta[:, -1] &= 15
    return TwoFour(values, meta)


def check_fragments(values_frag: Tensor, meta_frag: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> None:
    """Raise ValueError unless the fragments have the dtype and shape of a weight [out_features, in_features]."""
    if dtype not in _DTYPES:
        raise ValueError(f"fragments hold bfloat16, float16 or int8 values, not {dtype_name(dtype)}. Use the canonical format.")
    if out_features < 1 or in_features < 4 or in_features % 4:
        raise ValueError(
            f"a 2:4 weight needs out_features >= 1 and in_features a positive multiple of 4, got {out_features} and "
            f"{in_features}. Pass the features of the weight that was packed."
        )
    check_dtype(values_frag, "values fragments", (torch.int32,))
    check_dtype(meta_frag, "meta fragments", (torch.int32,))
    expected = fragment_shapes(out_features, in_features, dtype)
    got = list(values_frag.shape), list(meta_frag.shape)
    if got != expected:
        raise ValueError(
            f"fragments of a {out_features} x {in_features} {dtype_name(dtype)} weight have shapes "
            f"{expected[0]} and {expected[1]}, got {got[0]} and {got[1]}. Make them with fragments.to_fragments."
        )


def _group_words(values: Tensor) -> Tensor:
    """One integer per group, the two kept weights side by side: [O, I/2] -> int32 [O, G], int16 for int8 values."""
    return as_bits(values).view(torch.int16 if values.dtype == torch.int8 else torch.int32)


def _permuted(word_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """Group words in fragment order, contiguous."""
    chunks = 4 * word_OG.shape[1] // COLUMNS
    if dtype == torch.int8:
        return word_OG.view(-1, *_BLOCK, chunks, 4, 2, 2, 4).permute(_ORDER_8).contiguous()
    return word_OG.view(-1, *_BLOCK, chunks, 8, 2, 4).permute(_ORDER_16).contiguous()


def _inverse(order: tuple[int, ...]) -> list[int]:
    return [order.index(axis) for axis in range(len(order))]
