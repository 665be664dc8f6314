"""Tensors of safetensors shards, read by name when wanted: nothing stays mapped, and a file that changed is noticed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmprune.errors import CorruptCheckpoint
from llmprune.io.headers import TensorHeader, read_header

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class _Shard:
    """One file: where its tensors' bytes begin, and what it was when its header was read."""

    file: Path
    begin: int
    identity: tuple[int, int, int]


class Shards:
    """The tensors of some files of a model. Reads are plain ones, so that neither the address space nor the resident set holds
    a file: pages of a mapped one would count as the process's own.
    """

    def __init__(self, model: str, files: Sequence[Path]) -> None:
        self.model = model
        self._tensors: dict[str, tuple[_Shard, TensorHeader]] = {}
        for file in files:
            headers = read_header(file, model)
            with file.open("rb") as stream:
                begin = 8 + int.from_bytes(stream.read(8), "little")
                shard = _Shard(file, begin, _identity(stream.fileno()))
            self._tensors |= {name: (shard, header) for name, header in headers.items()}

    @property
    def headers(self) -> Mapping[str, TensorHeader]:
        """Every tensor's header by name."""
        return {name: header for name, (_, header) in self._tensors.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating-point tensor: what transformers takes where the config names none."""
        dtypes = (_DTYPES[header.dtype] for _, header in self._tensors.values() if header.dtype in _DTYPES)
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    @property
    def readable(self) -> bool:
        """Whether every tensor has a dtype of torch's own."""
        return all(header.dtype in _DTYPES for _, header in self._tensors.values())

    def read(self, names: Iterable[str], *, pinned: bool = False) -> dict[str, Tensor]:
        """Tensors by name, in CPU memory of their own; ``pinned`` where they are to go on to an accelerator.

        Raises:
            CorruptCheckpoint: a file is gone, or another one than it was.
        """
        by_shard: dict[_Shard, list[str]] = {}
        for name in names:
            by_shard.setdefault(self._tensors[name][0], []).append(name)
        found: dict[str, Tensor] = {}
        for shard, members in by_shard.items():
            try:
                with shard.file.open("rb", buffering=0) as stream:
                    if _identity(stream.fileno()) != shard.identity:
                        raise self._changed(shard.file, "changed")
                    for name in members:
                        found[name] = self._read(stream.fileno(), shard, self._tensors[name][1], pinned)
            except FileNotFoundError:
                raise self._changed(shard.file, "disappeared") from None
        return found

    def _read(self, descriptor: int, shard: _Shard, header: TensorHeader, pinned: bool) -> Tensor:
        bytes_B = torch.empty(header.end - header.begin, dtype=torch.uint8, pin_memory=pinned)
        rest = memoryview(bytes_B.numpy())  # type: ignore[arg-type]
        position = shard.begin + header.begin
        while len(rest):
            count = os.preadv(descriptor, [rest], position)
            if not count:
                raise self._changed(shard.file, "was cut short")
            rest, position = rest[count:], position + count
        return bytes_B.view(_DTYPES[header.dtype]).reshape(header.shape)

    def _changed(self, file: Path, what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            f"{file.name} of {self.model!r} {what} during the run; what was pruned so far belongs to the file as it was. "
            "Put it back and go on with --resume, or delete the work directory and start again."
        )


def _identity(descriptor: int) -> tuple[int, int, int]:
    found = os.fstat(descriptor)
    return found.st_ino, found.st_size, found.st_mtime_ns
