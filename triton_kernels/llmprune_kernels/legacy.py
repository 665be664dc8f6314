"""Reads the 2:4 checkpoints that compressed-tensors wrote before version 0.15, for which no current library has a loader.

O out features, I in features.

Its ``sparse-24-bitmask`` format stores three tensors for the Linear X: ``X.shape`` int64 [2, 1], ``X.compressed``
[O, I/2] (the kept weights in column order, as in ``two_four``) and ``X.bitmask`` uint8 [O, ceil(I/8)] (bit j of byte b is
column 8 b + j, exactly two bits per group of four, even where a kept weight is 0). So it turns into ``TwoFour`` with a
table of 16 nibbles and no dense copy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmprune_kernels._bits import check_dtype, check_same_device, look_up, row_chunks
from llmprune_kernels.two_four import PAIRS, TwoFour, check_parts, unpack

FORMAT = "sparse-24-bitmask"
"""The one legacy format that can be read."""

PARTS = ("shape", "compressed", "bitmask")
"""The tensors stored for one Linear, each named ``<module>.<part>``."""

_META_OF_MASK = {1 << first | 1 << second: first | second << 2 for first, second in PAIRS}


def check_format(name: str) -> None:
    """Raise ValueError unless ``name`` (``sparsity_config.format`` of a config.json) is a format that ``read`` knows."""
    if name == FORMAT:
        return
    if name == "marlin-24":
        raise ValueError(
            "marlin-24 checkpoints are not supported: their int4 or int8 weights are shuffled for one CUDA kernel and have "
            "no published way back. Start from the checkpoint that was quantised, or export it as dense safetensors."
        )
    raise ValueError(
        f"unknown sparse checkpoint format {name!r}; allowed: {FORMAT}. Decompress it with the compressed-tensors version "
        "that wrote it and load the dense checkpoint."
    )


def read(tensors: Mapping[str, Tensor], prefix: str) -> Tensor:
    """The dense weight [O, I] of one Linear, bit for bit as stored; arguments and errors as ``read_two_four``."""
    return unpack(*read_two_four(tensors, prefix), check=False)


def read_two_four(tensors: Mapping[str, Tensor], prefix: str) -> TwoFour:
    """The 2:4 weight of one Linear without a dense copy; it shares the memory of ``X.compressed``.

    Args:
        tensors: name -> tensor, with ``<prefix>.shape``, ``<prefix>.compressed`` (bf16, fp16 or fp32) and
            ``<prefix>.bitmask``.
        prefix: the module's name, as in ``model.layers.0.mlp.up_proj``.

    Raises:
        ValueError: a part is missing, dtypes or shapes disagree, or a group does not have exactly two bits.
    """
    shape, values, bitmask = (_part(tensors, prefix, part) for part in PARTS)
    check_dtype(bitmask, f"{prefix}.bitmask", (torch.uint8,))
    check_dtype(values, f"{prefix}.compressed")
    check_same_device(compressed=values, bitmask=bitmask)
    features = [int(number) for number in shape.flatten().tolist()]
    if values.ndim != 2 or features != [values.shape[0], 2 * values.shape[1]]:
        raise ValueError(
            f"{prefix}.shape says {features}, but {prefix}.compressed is {list(values.shape)}; it must be [out_features, "
            "in_features / 2]. The checkpoint is damaged: fetch it again."
        )
    in_features = features[1]
    if list(bitmask.shape) != [features[0], -(-in_features // 8)]:
        raise ValueError(
            f"{prefix}.bitmask is {list(bitmask.shape)}, must be {[features[0], -(-in_features // 8)]} for a weight "
            f"{features}. The checkpoint is damaged: fetch it again."
        )
    packed = TwoFour(values.detach(), _meta_of_bitmask(bitmask, prefix, in_features))
    check_parts(*packed)
    return packed


def _part(tensors: Mapping[str, Tensor], prefix: str, part: str) -> Tensor:
    name = f"{prefix}.{part}"
    if name not in tensors:
        wanted = ", ".join(f"{prefix}.{each}" for each in PARTS)
        raise ValueError(f"no tensor {name}: a {FORMAT} layer has {wanted}. Read all shards of the checkpoint.")
    return tensors[name]


def _meta_of_bitmask(bitmask: Tensor, prefix: str, in_features: int) -> Tensor:
    """Two bits per group -> two column numbers per group, byte by byte. ValueError names the first bad group."""
    table, half_table = [0] * 256, [0] * 256
    for low, low_meta in _META_OF_MASK.items():
        half_table[low] = low_meta
        for high, high_meta in _META_OF_MASK.items():
            table[low | high << 4] = low_meta | high_meta << 4
    meta = torch.empty_like(bitmask)
    meta_of_byte = torch.tensor(table, dtype=torch.uint8, device=bitmask.device)
    for rows in row_chunks(bitmask.shape[0], in_features):
        meta[rows] = look_up(meta_of_byte, bitmask[rows])
    if in_features % 8:  # the last byte has one group only
        meta[:, -1] = look_up(torch.tensor(half_table, dtype=torch.uint8, device=bitmask.device), bitmask[:, -1])
    if not bool((meta != 0).all()):  # no pair has nibble 0
        _raise_bad_group(bitmask, meta, prefix, in_features)
    return meta


def _raise_bad_group(bitmask: Tensor, meta: Tensor, prefix: str, in_features: int) -> None:
    """Name the first group that does not have exactly two bits, or has bits beyond the last column."""
    row, byte = (meta == 0).nonzero()[0].tolist()
    low, high = int(bitmask[row, byte]) & 15, int(bitmask[row, byte]) >> 4
    half, mask = (0, low) if low not in _META_OF_MASK else (1, high)
    group = 2 * byte + half
    wrong = f"has {mask.bit_count()} bits set, a 2:4 group has exactly 2"
    if 4 * group >= in_features:
        wrong = f"lies beyond the last column {in_features - 1} and must have no bits set"
    raise ValueError(
        f"{prefix}.bitmask: row {row}, group {group} {wrong}. The checkpoint is damaged, or is not 2:4: fetch it again."
    )
