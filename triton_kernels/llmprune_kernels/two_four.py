"""The canonical 2:4 format: of every four consecutive weights of a row two are stored, and one nibble says which.

O out features, I in features, G = I / 4 groups, R rows of one chunk.

``values`` [O, I/2] holds the two kept weights of each group in column order; ``meta`` uint8 [O, ceil(I/8)] holds one
nibble per group, ``i0 | i1 << 2`` with the columns i0 < i1 of the kept weights within the group. The even group of a
byte is its low nibble, the odd group its high nibble; where I / 4 is odd the last high nibble is 0. For 16-bit weights
that is 9 bits per weight instead of 16. Nothing here depends on a kernel: rows can be cut anywhere, columns at every
multiple of 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmprune_kernels._bits import (
    FLOATS,
    as_bits,
    check_dtype,
    check_same_device,
    check_weight,
    flags_to_bits,
    look_up,
    row_chunks,
)

PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""The kept columns of a group: every ascending pair."""

NIBBLES = tuple(first | second << 2 for first, second in PAIRS)
"""The metadata nibble of each pair: 4, 8, 12, 9, 13, 14. The other ten nibbles are errors."""

_TOO_MANY = 255


class TwoFour(NamedTuple):
    """A 2:4 weight in canonical order: ``values`` [O, I/2] and ``meta`` uint8 [O, ceil(I/8)]."""

    values: Tensor
    meta: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the dense weight."""
        return self.values.shape[0], 2 * self.values.shape[1]


def meta_bytes(in_features: int) -> int:
    """Bytes of metadata per row."""
    return -(-in_features // 8)


def pack(weight_OI: Tensor) -> TwoFour:
    """Pack a dense weight that has at most two non-zeros in every group of four; every kept bit pattern survives.

    A group stores all its non-zeros (NaN counts as one). A group with fewer than two fills up with its -0.0 entries,
    then with its lowest free columns. So the only weight that changes is a -0.0 beside two non-zeros, or a third -0.0:
    it comes back as +0.0, which is equal.

    Args:
        weight_OI: bf16, fp16 or fp32 [O, I] on any device, I divisible by 4.

    Raises:
        ValueError: not a matrix, empty, another dtype, I not divisible by 4, or a group with more than two non-zeros
            (the first one is named).
    """
    check_weight(weight_OI)
    num_rows, in_features = weight_OI.shape
    if in_features % 4:
        raise ValueError(
            f"2:4 needs in_features divisible by 4, got {in_features}. Keep this layer dense or store it as a bitmask."
        )
    weight_OI = weight_OI.detach()
    values_OI = weight_OI.new_empty(num_rows, in_features // 2)
    meta_OB = torch.empty(num_rows, meta_bytes(in_features), dtype=torch.uint8, device=weight_OI.device)
    nibble_of_key = torch.tensor(_NIBBLE_OF_KEY, dtype=torch.uint8, device=weight_OI.device)
    for rows in row_chunks(num_rows, in_features):
        bits_RG4 = as_bits(weight_OI[rows]).reshape(rows.stop - rows.start, -1, 4)
        nibble_RG = look_up(nibble_of_key, _group_keys(bits_RG4))
        if bool((nibble_RG == _TOO_MANY).any()):
            _raise_not_two_four(bits_RG4, nibble_RG, first_row=rows.start)
        as_bits(values_OI[rows]).copy_(bits_RG4.gather(-1, _slots(nibble_RG)).flatten(1))
        meta_OB[rows] = join_nibbles(nibble_RG)
    return TwoFour(values_OI, meta_OB)


def unpack(values: Tensor, meta: Tensor, *, check: bool = True) -> Tensor:
    """The dense weight [O, I] with exactly the stored bit patterns, and +0.0 elsewhere.

    Args:
        values: bf16, fp16 or fp32 [O, I/2]; int8 is moved just the same.
        meta: uint8 [O, ceil(I/8)] on the same device.
        check: look for nibbles that are not ascending; ``False`` where the metadata has been checked before.

    Raises:
        ValueError: dtypes or shapes that do not belong together, or (with ``check``) a bad nibble.
    """
    num_rows, in_features = check_parts(values, meta)
    if check:
        check_meta(meta, in_features)
    weight_OI = torch.zeros(num_rows, in_features, dtype=values.dtype, device=values.device)
    for rows in row_chunks(num_rows, in_features):
        bits_RG4 = as_bits(weight_OI[rows]).view(rows.stop - rows.start, -1, 4)
        slot_RG2 = _slots(split_nibbles(meta[rows], in_features // 4))
        bits_RG4.scatter_(-1, slot_RG2, as_bits(values[rows]).reshape(slot_RG2.shape))
    return weight_OI


def is_two_four(weight_OI: Tensor) -> bool:
    """Whether every group of four consecutive weights of every row has at most two non-zeros, so that ``pack`` works.

    Raises ValueError if this is not a weight matrix at all (see ``pack``).
    """
    check_weight(weight_OI)
    num_rows, in_features = weight_OI.shape
    if in_features % 4:
        return False
    nibble_of_key = torch.tensor(_NIBBLE_OF_KEY, dtype=torch.uint8, device=weight_OI.device)
    for rows in row_chunks(num_rows, in_features):
        bits_RG4 = as_bits(weight_OI[rows]).reshape(rows.stop - rows.start, -1, 4)
        if bool((look_up(nibble_of_key, _group_keys(bits_RG4)) == _TOO_MANY).any()):
            return False
    return True


def check_parts(values: Tensor, meta: Tensor) -> tuple[int, int]:
    """(O, I) of the packed weight. Raises ValueError where dtypes, shapes or devices do not belong together."""
    check_dtype(values, "values", (*FLOATS, torch.int8))
    check_dtype(meta, "meta", (torch.uint8,))
    check_same_device(values=values, meta=meta)
    if values.ndim != 2 or values.numel() == 0 or values.shape[1] % 2:
        raise ValueError(
            f"values must be [out_features, in_features / 2] with an even number of columns, got {list(values.shape)}. "
            "Pack the weight with two_four.pack."
        )
    num_rows, in_features = values.shape[0], 2 * values.shape[1]
    expected = [num_rows, meta_bytes(in_features)]
    if list(meta.shape) != expected:
        raise ValueError(
            f"meta must be {expected} for values of shape {list(values.shape)}, got {list(meta.shape)}. "
            "The two tensors do not belong to one weight: pack it again."
        )
    return num_rows, in_features


def check_meta(meta: Tensor, in_features: int) -> None:
    """Raise ValueError at the first nibble that is not one of the six ascending pairs.

    Args:
        meta: uint8 [O, ceil(I/8)].
        in_features: I; where I / 4 is odd the last high nibble is unused and must be 0.
    """
    is_valid = torch.zeros(256, dtype=torch.bool, device=meta.device)
    is_valid[[low | high << 4 for low in NIBBLES for high in NIBBLES]] = True
    full_OB, half_O = (meta, None) if in_features % 8 == 0 else (meta[:, :-1], meta[:, -1])
    good = all(bool(look_up(is_valid, full_OB[rows]).all()) for rows in row_chunks(meta.shape[0], in_features))
    if half_O is not None:
        good = good and bool(torch.isin(half_O, torch.tensor(NIBBLES, dtype=torch.uint8, device=meta.device)).all())
    if not good:
        _raise_bad_nibble(meta, in_features)


def split_nibbles(meta: Tensor, num_groups: int) -> Tensor:
    """One nibble per group: uint8 [R, ceil(G/2)] -> uint8 [R, G]."""
    return torch.stack((meta & 15, meta >> 4), dim=-1).flatten(1)[:, :num_groups]


def join_nibbles(nibble_RG: Tensor) -> Tensor:
    """Two groups per byte, the even one low: uint8 [R, G] -> uint8 [R, ceil(G/2)]."""
    meta = nibble_RG[:, 0::2].clone()
    odd = nibble_RG[:, 1::2]
    meta[:, : odd.shape[1]] |= odd << 4
    return meta


def _group_keys(bits_RG4: Tensor) -> Tensor:
    """uint8 [R, G]: low nibble, which weights are non-zero; high nibble, which are anything but +0.0."""
    magnitude = torch.iinfo(bits_RG4.dtype).max
    return flags_to_bits((bits_RG4 & magnitude) != 0) | flags_to_bits(bits_RG4 != 0) << 4


def _nibble_of_key(key: int) -> int:
    """The nibble for one value of ``_group_keys``: non-zeros first, then -0.0, then the lowest free columns."""
    non_zero = [column for column in range(4) if key >> column & 1]
    if len(non_zero) > 2:
        return _TOO_MANY
    by_rank = sorted(range(4), key=lambda column: (column not in non_zero, not key >> 4 + column & 1, column))
    first, second = sorted(by_rank[:2])
    return first | second << 2


_NIBBLE_OF_KEY = [_nibble_of_key(key) for key in range(256)]


def _slots(nibble_RG: Tensor) -> Tensor:
    """int64 [R, G, 2]: the two kept columns of every group."""
    return torch.stack((nibble_RG & 3, nibble_RG >> 2), dim=-1).long()


def _raise_not_two_four(bits_RG4: Tensor, nibble_RG: Tensor, *, first_row: int) -> None:
    """Name the first group with more than two non-zeros."""
    row, group = (nibble_RG == _TOO_MANY).nonzero()[0].tolist()
    count = int((bits_RG4[row, group] & torch.iinfo(bits_RG4.dtype).max != 0).sum())
    raise ValueError(
        f"not a 2:4 weight: row {first_row + row}, group {group} (columns {4 * group} to {4 * group + 3}) has {count} "
        "non-zeros, at most 2 are allowed. Prune the layer to 2:4 first, or store it as a bitmask."
    )


def _raise_bad_nibble(meta: Tensor, in_features: int) -> None:
    """Name the first nibble that is not ascending."""
    num_groups = in_features // 4
    nibble_OG = split_nibbles(meta, 2 * meta.shape[1])
    bad_OG = ~torch.isin(nibble_OG, torch.tensor(NIBBLES, dtype=torch.uint8, device=meta.device))
    bad_OG[:, num_groups:] = nibble_OG[:, num_groups:] != 0
    row, group = bad_OG.nonzero()[0].tolist()
    nibble = int(nibble_OG[row, group])
    if group >= num_groups:
        raise ValueError(
            f"corrupt 2:4 metadata: the unused high nibble of the last byte of row {row} is {nibble}, it must be 0. "
            "Fetch or pack the weight again."
        )
    raise ValueError(
        f"corrupt 2:4 metadata: row {row}, group {group} names columns {nibble & 3} and {nibble >> 2} (nibble {nibble}); "
        f"they must ascend (nibble one of {sorted(NIBBLES)}). Fetch or pack the weight again."
    )
