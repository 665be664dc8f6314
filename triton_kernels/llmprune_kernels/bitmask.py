"""The bitmask format for unstructured sparsity: one bit per weight says whether it is stored, then the stored weights.

O out features, I in features, K column chunks of 256, R rows of one chunk of work.

``bits`` uint8 [O, ceil(I/8)]: bit j of byte b is column 8 b + j; bits beyond I are 0. ``values`` [n]: the stored weights,
row by row in column order. ``offsets`` int64 [ceil(O/16) + 1]: rows 16 r to 16 r + 15 own ``values[offsets[r] :
offsets[r + 1]]``, so a file can be cut along rows without counting bits. A weight is stored unless all its bits are
zero, so -0.0 and every NaN come back exactly. For 16-bit weights: 1 + 16 density bits per weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmprune_kernels._bits import (
    as_bits,
    bits_to_flags,
    check_dtype,
    check_same_device,
    check_weight,
    flags_to_bits,
    look_up,
    row_chunks,
)

ROW_GROUP = 16
"""Rows that share one entry of ``offsets``."""

COLUMNS = 256
"""Columns of a chunk, for which ``row_starts`` says where its values begin."""

_COUNTS = [value.bit_count() for value in range(256)]


class Bitmask(NamedTuple):
    """A sparse weight: ``bits`` uint8 [O, ceil(I/8)], ``values`` [n], ``offsets`` int64 [ceil(O/16) + 1]."""

    bits: Tensor
    values: Tensor
    offsets: Tensor


def pack(weight_OI: Tensor) -> Bitmask:
    """Pack a dense weight of any sparsity; every bit pattern survives.

    Args:
        weight_OI: bf16, fp16 or fp32 [O, I] on any device.

    Raises:
        ValueError: not a matrix, empty, or another dtype.
    """
    check_weight(weight_OI)
    weight_OI = weight_OI.detach()
    num_rows, in_features = weight_OI.shape
    bits_OB = torch.empty(num_rows, -(-in_features // 8), dtype=torch.uint8, device=weight_OI.device)
    parts = []
    for rows in row_chunks(num_rows, in_features):
        stored_RI = as_bits(weight_OI[rows]) != 0
        parts.append(weight_OI[rows].masked_select(stored_RI))
        padded = torch.nn.functional.pad(stored_RI, (0, -in_features % 8))
        bits_OB[rows] = flags_to_bits(padded.view(padded.shape[0], -1, 8))
    return Bitmask(bits_OB, torch.cat(parts), row_group_offsets(bits_OB))


def unpack(bits: Tensor, values: Tensor, offsets: Tensor, in_features: int) -> Tensor:
    """The dense weight [O, in_features] with exactly the stored bit patterns, and +0.0 elsewhere.

    Args:
        bits: uint8 [O, ceil(I/8)].
        values: bf16, fp16 or fp32 [n] on the same device.
        offsets: int64 [ceil(O/16) + 1] on the same device.
        in_features: I.

    Raises:
        ValueError: dtypes, shapes or counts that do not belong together: bits beyond I, offsets that disagree with the
            bits, more or fewer values than bits.
    """
    check_parts(bits, values, offsets, in_features)
    return expand(bits, values, in_features)


def expand(bits: Tensor, values: Tensor, in_features: int) -> Tensor:
    """``unpack`` without its checks, for parts that have passed them."""
    num_rows = bits.shape[0]
    weight_OI = torch.zeros(num_rows, in_features, dtype=values.dtype, device=values.device)
    chunks = list(row_chunks(num_rows, in_features))
    ends = _count(bits).sum(1).cumsum(0)[[rows.stop - 1 for rows in chunks]].tolist()
    start = 0
    for rows, end in zip(chunks, ends, strict=True):
        stored_RI = bits_to_flags(bits[rows], in_features)
        as_bits(weight_OI[rows]).masked_scatter_(stored_RI, as_bits(values[start:end]))
        start = end
    return weight_OI


def row_starts(bits: Tensor) -> Tensor:
    """int32 [O, ceil(I/256)]: where in ``values`` each 256-column chunk of each row begins; kernels need it at run time.

    Raises ValueError where there are 2**31 values or more.
    """
    check_dtype(bits, "bits", (torch.uint8,))
    num_rows, row_bytes = bits.shape
    padded = torch.nn.functional.pad(bits, (0, -row_bytes % (COLUMNS // 8)))
    count = _count(padded).view(num_rows, -1, COLUMNS // 8).sum(-1).flatten()
    end = count.cumsum(0)
    if num_rows and int(end[-1]) >= 2**31:
        raise ValueError(f"bitmask kernels index up to 2**31 - 1 values, this weight has {int(end[-1])}. Split it along rows.")
    return (end - count).to(torch.int32).view(num_rows, -1)


def row_group_offsets(bits: Tensor) -> Tensor:
    """The ``offsets`` int64 [ceil(O/16) + 1] that belong to ``bits``."""
    count_O = torch.nn.functional.pad(_count(bits).sum(1), (0, -bits.shape[0] % ROW_GROUP))
    ends = count_O.view(-1, ROW_GROUP).sum(1).cumsum(0)
    return torch.nn.functional.pad(ends, (1, 0))


def check_parts(bits: Tensor, values: Tensor, offsets: Tensor, in_features: int) -> None:
    """Raise ValueError unless the three tensors are one weight with ``in_features`` columns."""
    expected = check_bits(bits, in_features)
    check_dtype(offsets, "offsets", (torch.int64,))
    check_same_device(bits=bits, values=values, offsets=offsets)
    if offsets.shape != expected.shape:
        raise ValueError(
            f"offsets must be [{len(expected)}] for {bits.shape[0]} rows (one per {ROW_GROUP} rows, and the end), "
            f"got {list(offsets.shape)}. Pack the weight again."
        )
    if not torch.equal(offsets, expected):
        entry = int((offsets != expected).nonzero()[0])
        raise ValueError(
            f"corrupt bitmask: offsets[{entry}] is {int(offsets[entry])}, but {int(expected[entry])} bits are set in the "
            f"rows before {ROW_GROUP * entry}. Fetch or pack the weight again."
        )
    check_values(values, int(expected[-1]))


def check_bits(bits: Tensor, in_features: int) -> Tensor:
    """The ``offsets`` that belong to ``bits``. Raises ValueError unless these are the bits of ``in_features`` columns."""
    check_dtype(bits, "bits", (torch.uint8,))
    row_bytes = -(-in_features // 8)
    if bits.ndim != 2 or bits.numel() == 0 or bits.shape[1] != row_bytes:
        raise ValueError(
            f"bits must be [out_features, {row_bytes}] for {in_features} in_features, got {list(bits.shape)}. "
            "Pass the in_features that the weight was packed with."
        )
    if in_features % 8:
        beyond_O = bits[:, -1] >> in_features % 8
        if bool(beyond_O.any()):
            raise ValueError(
                f"corrupt bitmask: row {int(beyond_O.nonzero()[0])} has bits set beyond column {in_features - 1}. "
                "Fetch or pack the weight again."
            )
    return row_group_offsets(bits)


def check_values(values: Tensor, num_stored: int) -> None:
    """Raise ValueError unless ``values`` holds one weight for each of the ``num_stored`` bits that are set."""
    check_dtype(values, "values")
    if values.ndim != 1 or len(values) != num_stored:
        raise ValueError(
            f"corrupt bitmask: {num_stored} bits are set, but values has shape {list(values.shape)}. "
            "Fetch or pack the weight again."
        )


def _count(bits: Tensor) -> Tensor:
    """Set bits of every byte, uint8."""
    table = torch.tensor(_COUNTS, dtype=torch.uint8, device=bits.device)
    return look_up(table, bits)
