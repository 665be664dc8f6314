"""Safetensors files, tensor by tensor: no more than one tensor is ever in memory, whatever the file's size.

Written files have the order and the bytes that the safetensors library gives the same tensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from safetensors import safe_open
from torch import Tensor

from llmprune.io.headers import TensorHeader, bytes_of, read_header

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
_ORDER = (
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16",
    "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64",
)  # fmt: skip
"""Tensors lie in a file from the last of these dtypes to the first, so that each is aligned, and by name within a dtype."""
_COPIED_AT_ONCE = 1 << 24

Shape = tuple[int, ...]
Layout = Mapping[str, tuple[str, Shape]]
"""What a file is to hold: dtype code and shape by name."""


class TensorReader:
    """The tensors of the safetensors files of one model, by name; opens each file once.

    Raises CorruptCheckpoint, when made, for a file that is truncated or not safetensors.
    """

    def __init__(self, files: Iterable[Path], model: str) -> None:
        self.tensors: dict[str, TensorHeader] = {}
        self.file_of: dict[str, str] = {}
        self.metadata: dict[str, dict[str, str] | None] = {}
        self._streams: dict[str, BinaryIO] = {}
        self._begins: dict[str, int] = {}
        self._open = ExitStack()
        for file in files:
            tensors = read_header(file, model)
            self.tensors |= tensors
            self.file_of |= dict.fromkeys(tensors, file.name)
            self._begins[file.name] = file.stat().st_size - max((tensor.end for tensor in tensors.values()), default=0)
            self._streams[file.name] = self._open.enter_context(file.open("rb"))
            with safe_open(file, framework="pt") as opened:
                self.metadata[file.name] = opened.metadata()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        header = self.tensors[name]
        buffer = torch.empty(header.end - header.begin, dtype=torch.uint8)
        if len(buffer):
            self._at(name).readinto(buffer.numpy().data)  # type: ignore[attr-defined]
        return buffer.view(DTYPES[header.dtype]).view(header.shape)

    def copy(self, name: str, target: BinaryIO) -> None:
        """Append the bytes of one tensor, of whatever dtype, to an open file."""
        source, left = self._at(name), self.tensors[name].end - self.tensors[name].begin
        while left:
            left -= target.write(source.read(min(left, _COPIED_AT_ONCE)))

    def _at(self, name: str) -> BinaryIO:
        stream = self._streams[self.file_of[name]]
        stream.seek(self._begins[self.file_of[name]] + self.tensors[name].begin)
        return stream


class TensorWriter:
    """A safetensors file of which all sizes are known beforehand; its tensors may come in any order.

    Use it in a ``with`` block, which ends with every tensor written.
    """

    def __init__(self, file: Path, layout: Layout, metadata: Mapping[str, str] | None) -> None:
        self.file, self.layout = file, layout
        self._left = set(layout)
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._offsets: dict[str, int] = {}
        position = 0
        for name in sorted(layout, key=lambda name: (-_ORDER.index(layout[name][0]), name)):
            code, shape = layout[name]
            size = bytes_of(code, math.prod(shape))
            self._offsets[name] = position
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, position + size]}
            position += size
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        content += b" " * (-len(content) % 8)
        self._prefix = struct.pack("<Q", len(content)) + content
        self.num_bytes = len(self._prefix) + position

    def __enter__(self) -> Self:
        self._stream = self.file.open("wb")
        self._stream.write(self._prefix)
        self._stream.truncate(self.num_bytes)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()
        assert error is not None or not self._left, f"not written: {sorted(self._left)[:3]}"

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place."""
        code, shape = self.layout[name]
        assert (CODES[tensor.dtype], tuple(tensor.shape)) == (code, shape), name
        raw = tensor.detach().contiguous().flatten().view(torch.uint8)
        self.at(name).write(raw.numpy().data)

    def at(self, name: str) -> BinaryIO:
        """The open file at the place of one tensor, to whose bytes the caller copies."""
        self._left.discard(name)
        self._stream.seek(len(self._prefix) + self._offsets[name])
        return self._stream
