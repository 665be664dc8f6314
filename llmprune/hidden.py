"""The hidden states between two blocks, batch by batch: on the device, in CPU memory, or in files.

A batch is read, carried through a block, and replaced, so its place is written over: of all states there is one copy.
N sequences of one batch, S sequence, H hidden.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor

Place = Literal["device", "cpu", "disk"]


class HiddenStates(Sequence[Tensor]):
    """Per batch a tensor [N, S, H] that can be replaced.

    What was read may lie in the place that the next assignment to its batch writes over: use it before, not after.

    Args:
        tensors: the batches so far.
        place: ``device`` leaves a tensor on the device it came from, and what replaces it goes there; ``cpu`` keeps all in CPU
            memory, page-locked where there is an accelerator to copy from; ``disk`` in a file a batch, memory-mapped to read.
        folder: the directory of the files, which are gone when this object is; None takes the system's temporary one.

    Raises:
        OSError: the disk is full. Files are written, not mapped, to that end: a full disk under a written map is a SIGBUS.
    """

    def __init__(self, tensors: Iterable[Tensor] = (), place: Place = "device", folder: Path | None = None) -> None:
        self.place = place
        self.folder = folder
        self._held: list[Tensor | _File] = []
        self._files: Path | None = None
        for tensor in tensors:
            self.append(tensor)

    def __len__(self) -> int:
        return len(self._held)

    @overload
    def __getitem__(self, batch: int) -> Tensor: ...
    @overload
    def __getitem__(self, batch: slice) -> list[Tensor]: ...
    def __getitem__(self, batch: int | slice) -> Tensor | list[Tensor]:
        if isinstance(batch, slice):
            return [self[number] for number in range(*batch.indices(len(self)))]
        held = self._held[batch]
        return held.read() if isinstance(held, _File) else held

    def __setitem__(self, batch: int, tensor: Tensor) -> None:
        held = self._held[batch]
        if isinstance(held, _File):
            held.write(tensor)
        elif self.place == "device":
            self._held[batch] = tensor.to(held.device)
        elif held.is_pinned() and (held.shape, held.dtype) == (tensor.shape, tensor.dtype):
            held.copy_(tensor)
        else:
            self._held[batch] = _in_cpu_memory(tensor)

    def append(self, tensor: Tensor) -> None:
        """One more batch."""
        if self.place == "disk":
            file = _File(self._directory() / f"{len(self):05d}")
            file.write(tensor)
            self._held.append(file)
        else:
            self._held.append(tensor if self.place == "device" else _in_cpu_memory(tensor))

    def copy(self) -> HiddenStates:
        """The same states in places of their own."""
        return HiddenStates(self, self.place, self.folder)

    def _directory(self) -> Path:
        if self._files is None:
            self._files = Path(tempfile.mkdtemp(prefix=".tmp-hidden-", dir=self.folder))
            weakref.finalize(self, shutil.rmtree, self._files, ignore_errors=True)
        return self._files


@dataclass
class _File:
    """One tensor's bytes. The file never shrinks: what was read from it may still be mapped."""

    path: Path
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    def write(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        with self.path.open("r+b" if self.path.exists() else "wb") as stream:
            stream.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)

    def read(self) -> Tensor:
        flat = torch.from_file(str(self.path), shared=False, size=math.prod(self.shape), dtype=self.dtype)
        return flat.view(self.shape)


def _in_cpu_memory(tensor: Tensor) -> Tensor:
    """The tensor on the CPU: itself, or a page-locked copy where there is an accelerator to copy from."""
    if not torch.accelerator.is_available():
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
