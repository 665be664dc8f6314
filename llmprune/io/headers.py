"""The header of a safetensors file, checked down to the last byte before any library trusts the file. Torch-free.

    8 bytes    N, the header's length: unsigned, little-endian
    N bytes    a JSON object: name -> {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, and "__metadata__"
    the rest   the tensors' bytes, which the offsets count from here, one after the other

Stricter than the format, which allows headers of 100 MB and the same name twice: what passes here opens everywhere.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llmprune.errors import CorruptCheckpoint, one_line

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 64  # torch's own limit
MAX_NUMEL = 2**56  # a byte count stays below 2**63, also where a dimension of 0 makes it 0
_METADATA = "__metadata__"
_SURROGATE = re.compile("[\ud800-\udfff]")
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "C64": 64, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as a header describes it; its bytes are ``begin`` to ``end`` of what follows the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def bytes_of(dtype: str, numel: int) -> int:
    """Bytes of so many elements."""
    return numel * _BITS[dtype] // 8


def read_header(file: Path, model: str) -> dict[str, TensorHeader]:
    """The tensors of a file of ``model`` by name; at most MAX_HEADER_BYTES are read, whatever the file declares.

    Raises:
        CorruptCheckpoint: it is truncated, or its header does not describe its bytes exactly.
    """
    try:
        content, num_bytes = _read(file)
        tensors = _tensors(content)
        _check_ranges(tensors, num_bytes)
    except (ValueError, RecursionError, OSError) as error:
        raise CorruptCheckpoint(
            f"{file.name} of {model!r} is truncated or not safetensors ({one_line(error)}). Download it again."
        ) from None
    return tensors


def _read(file: Path) -> tuple[dict[str, Any], int]:
    """The header's JSON object, and the number of bytes behind it."""
    if not file.is_file():  # opening a pipe would wait for its writer
        raise ValueError("it is not a file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ValueError(f"no header in {size} bytes")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}; at most {MAX_HEADER_BYTES} are allowed")
        header = stream.read(length)
    if not header.startswith(b"{"):
        raise ValueError("the header is no JSON object")
    content: dict[str, Any] = json.loads(
        header.decode(), object_pairs_hook=_object, parse_int=_count, parse_float=_refuse, parse_constant=_refuse
    )
    return content, size - 8 - length


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in the header")
    return found


def _count(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 18:
        _refuse(digits)
    return int(digits)


def _refuse(number: str) -> NoReturn:
    raise ValueError(f"{number[:20]} is no size or offset")


def _tensors(content: dict[str, Any]) -> dict[str, TensorHeader]:
    metadata = content.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata, *metadata.values()))):
        raise ValueError(f"{_METADATA} holds something else than text")
    if len(content) > MAX_TENSORS:
        raise ValueError(f"{len(content)} tensors; at most {MAX_TENSORS} are allowed")
    return {name: _tensor(name, entry) for name, entry in content.items()}


def _tensor(name: str, entry: Any) -> TensorHeader:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if len(entry) == 3 and _is_text(name):
            pass
        case _:
            raise ValueError(f"{name[:80]!r} has no dtype, shape and data_offsets, or more than these")
    if dtype not in _BITS:
        raise ValueError(f"{name[:80]!r} is of the unknown dtype {dtype[:20]!r}")
    if len(shape) > MAX_DIMENSIONS or not all(type(number) is int for number in (*shape, begin, end)):
        raise ValueError(f"{name[:80]!r} has a shape or offsets that are no sizes")
    if math.prod(size or 1 for size in shape) > MAX_NUMEL:
        raise ValueError(f"{name[:80]!r} has more than {MAX_NUMEL} elements")
    tensor = TensorHeader(dtype, tuple(shape), begin, end)
    if tensor.numel * _BITS[dtype] != (end - begin) * 8:
        raise ValueError(f"{name[:80]!r} takes other than its {end - begin} bytes")
    return tensor


def _is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold: Python's json lets half a surrogate pair pass."""
    return isinstance(value, str) and not _SURROGATE.search(value)


def _check_ranges(tensors: dict[str, TensorHeader], num_bytes: int) -> None:
    """Every byte behind the header belongs to exactly one tensor."""
    position = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != position:
            raise ValueError(f"a tensor begins at byte {tensor.begin}, the one before it ends at {position}")
        position = tensor.end
    if position != num_bytes:
        raise ValueError(f"{position} bytes of tensors are described, {num_bytes} are there")
