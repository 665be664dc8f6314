"""What every format shares: weights as bit patterns, flags as bits, and loops over rows that bound the temporaries.

O out features, I in features, R rows of one chunk, G groups, N flags of a group.
All multi-byte values are little-endian, as PyTorch's are on every machine that runs these kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
"""Weight dtypes that tensor cores multiply."""

FLOATS = (*HALVES, torch.float32)
"""Weight dtypes that every format can hold."""

CHUNK = 1 << 22
"""Weights handled at once: temporaries stay below ~20 bytes times this (80 MiB), whatever the matrix."""

_WORD = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def as_bits(tensor: Tensor) -> Tensor:
    """The bit patterns of a tensor as integers of the same width; shares its memory."""
    return tensor.detach().view(_WORD[tensor.element_size()])


def row_chunks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices of consecutive rows that hold about ``CHUNK`` weights each."""
    step = max(1, CHUNK // max(1, num_columns))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def flags_to_bits(flag_RGN: Tensor) -> Tensor:
    """Pack N <= 8 flags (bool) into uint8 [R, G]; flag j becomes bit j."""
    flag, *rest = flag_RGN.view(torch.uint8).unbind(-1)
    bits_RG = flag.clone()
    for position, flag in enumerate(rest, start=1):
        bits_RG |= flag << position
    return bits_RG


def bits_to_flags(bits_RB: Tensor, num_flags: int) -> Tensor:
    """The first ``num_flags`` bits of every row of bytes as bool [R, num_flags]; bit j of byte b is flag 8b + j."""
    shift_8 = torch.arange(8, dtype=torch.uint8, device=bits_RB.device)
    flag_RB8 = (bits_RB.unsqueeze(-1) >> shift_8) & 1
    return flag_RB8.view(torch.bool).flatten(1)[:, :num_flags]


def look_up(table: Tensor, key: Tensor) -> Tensor:
    """``table[key]`` for uint8 keys of any shape."""
    return table.index_select(0, key.reshape(-1).to(torch.int32)).view(key.shape)


def check_weight(weight_OI: Tensor) -> None:
    """Raise ValueError unless this is a non-empty matrix of a floating dtype that the formats can hold."""
    if weight_OI.ndim != 2:
        raise ValueError(
            f"expected a weight matrix [out_features, in_features], got shape {list(weight_OI.shape)}. "
            "Reshape it to two dimensions first."
        )
    if weight_OI.numel() == 0:
        raise ValueError(f"cannot pack an empty weight of shape {list(weight_OI.shape)}. Both dimensions must be at least 1.")
    check_dtype(weight_OI, "weight")


def check_dtype(tensor: Tensor, name: str, allowed: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Raise ValueError unless ``tensor`` has one of the ``allowed`` dtypes."""
    if tensor.dtype not in allowed:
        names = ", ".join(map(dtype_name, allowed))
        raise ValueError(f"{name} has dtype {dtype_name(tensor.dtype)}; allowed: {names}. Convert it with .to() first.")


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def check_same_device(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors lie on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"tensors on different devices: {listed}. Move them to one device with .to() first.")
