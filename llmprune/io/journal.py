"""The journal: a work directory with one record per finished step, so that a killed run goes on where it was.

    WORK/run.json                 the fingerprint: what the run is
    WORK/lock                     held while a process works on it
    WORK/dense/                   quality and speed of the dense model, its final hidden states
    WORK/refine-000012/           the newest state of a refinement: plain data, masks and tabu lists
    WORK/block-00000/             one record per pruned block, in order; tuned-00000 where it was tuned later:
        record.json               report, RNG state, sha256 of the other files
        weights.safetensors       the block's state dict; of a streamed model by the checkpoint's names: a shard of the result
        hidden-00000.safetensors  the next block's inputs, a file a batch (only the newest record keeps them)

A record is written to a temporary directory, synced, and renamed: it is whole or it is not there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.errors import JournalError, OutputError, ResumeRefused
from llmprune.report import BlockReport

_RUN = "run.json"
_LOCK = "lock"
_HIDDEN = "hidden-*.safetensors"
_WEIGHTS = "weights.safetensors"


class Journal:
    """One run's work directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock: IO[str] | None = None

    @property
    def exists(self) -> bool:
        """Whether an unfinished run left this directory."""
        return (self.directory / _RUN).is_file()

    def check(self, *, resume: bool) -> None:
        """Raise OutputError before any work where :meth:`open` would."""
        self._refuse_foreign()
        if self.directory.exists():
            self._acquire()
            try:
                self._refuse_unfinished(resume)
            finally:
                self.close()

    def open(self, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        """Create the directory, or go on with one of the same fingerprint.

        Raises:
            OutputError: it exists and ``resume`` is false, another process works on it, or it is something else.
            ResumeRefused: it belongs to another run; names the first field that differs.
        """
        self._refuse_foreign()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._acquire()
        self._refuse_unfinished(resume)
        fresh = json.loads(json.dumps(dict(fingerprint)))
        if self.exists:
            self._compare(self.recorded(), fresh)
        else:
            write_durably(self.directory / _RUN, json.dumps(fresh, indent=1).encode())
        for leftover in self.directory.glob(".tmp-*"):
            shutil.rmtree(leftover)

    def recorded(self) -> dict[str, Any]:
        """The fingerprint of the run that left this directory."""
        return self._read_json(self.directory / _RUN)

    def close(self) -> None:
        """Let go of the lock; the records stay."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        """Delete the work directory: the run is finished. Killed midway, it leaves no half of a journal under its name."""
        removed = self.directory.with_name(f".{self.directory.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        if self.directory.exists():
            self.directory.rename(removed)
        self.close()
        shutil.rmtree(removed, ignore_errors=True)

    def num_blocks(self, kind: str = "block") -> int:
        """Number of leading blocks with a whole record."""
        count = 0
        while self._block(count, kind).is_dir():
            count += 1
        return count

    def write_block(
        self,
        index: int,
        report: BlockReport,
        weights: Mapping[str, Tensor],
        hidden: Iterable[Tensor],
        rng: Tensor,
        kind: str = "block",
    ) -> str:
        """Record a pruned block, with the state of the RNG after it, and return the sha256 of its weights file.

        The previous record's hidden states are not needed any more then.
        """
        # A file a batch: writing one holds a second copy of it.
        files = {_HIDDEN.replace("*", f"{batch:05d}"): {"hidden": tensor} for batch, tensor in enumerate(hidden)}
        files[_WEIGHTS] = dict(weights)
        data = {
            "report": report.model_dump(),
            "rng": rng.numpy().tobytes().hex(),
            "num_zeros": sum(int((tensor == 0).sum()) for tensor in weights.values()),
        }
        digests = self.write(self._block(index, kind).name, data, files)
        if index:
            for file in self._block(index - 1, kind).glob(_HIDDEN):
                file.unlink(missing_ok=True)
        return digests[_WEIGHTS]

    def read_block(self, index: int, kind: str = "block") -> BlockReport:
        """Report of a recorded block whose weights are what was written."""
        return BlockReport.model_validate(self.read(self._block(index, kind).name, [_WEIGHTS])["report"])

    def num_zeros(self, index: int, kind: str = "block") -> int:
        """Zeros among all weights of a recorded block."""
        return int(self.read(self._block(index, kind).name, [])["num_zeros"])

    def weights_file(self, index: int, kind: str = "block") -> Path:
        """Where the weights of a recorded block are."""
        return self._block(index, kind) / _WEIGHTS

    def read_hidden(self, index: int, kind: str = "block") -> list[Tensor]:
        """The inputs of block ``index + 1``; also puts the RNG back where it was."""
        name = self._block(index, kind).name
        files = sorted(file for file in self.read(name, [])["sha256"] if fnmatchcase(file, _HIDDEN))
        data = self.read(name, files)
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(data["rng"]), dtype=torch.uint8))
        return [load_file(self.directory / name / file)["hidden"] for file in files]

    def write(self, name: str, data: Mapping[str, Any], files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
        """Record ``data`` and safetensors ``files`` under ``name``, whole or not at all; returns the files' sha256."""
        temporary = self.directory / f".tmp-{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        digests = {}
        for file, tensors in files.items():
            whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(whole, temporary / file, {"format": "pt"})
            digests[file] = sync_and_hash(temporary / file)
        write_durably(temporary / "record.json", json.dumps({**data, "sha256": digests}).encode())
        sync_directory(temporary)
        temporary.rename(self.directory / name)
        sync_directory(self.directory)
        return digests

    def read(self, name: str, files: list[str]) -> dict[str, Any]:
        """The data of a record whose ``files`` match their digests; raises JournalError where they do not."""
        folder = self.directory / name
        data = self._read_json(folder / "record.json")
        for file in files:
            if not (folder / file).is_file() or sha256(folder / file) != data["sha256"].get(file):
                raise self._damaged(folder / file)
        return data

    def tensors(self, name: str, file: str) -> dict[str, Tensor]:
        """The tensors of one file of a record, memory-mapped."""
        tensors: dict[str, Tensor] = load_file(self.directory / name / file)
        return tensors

    def has(self, name: str) -> bool:
        """Whether a record of that name is there."""
        return (self.directory / name).is_dir()

    def write_latest(self, kind: str, number: int, data: Mapping[str, Any], files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Record a state under ``kind`` and a number that grows; the one before goes when this one is whole."""
        name = f"{kind}-{number:06d}"
        if not self.has(name):
            self.write(name, data, files)
        for folder in self.directory.glob(f"{kind}-*"):
            if folder.name != name:
                shutil.rmtree(folder)

    def latest(self, kind: str) -> str | None:
        """Name of the newest state of that kind."""
        return max((folder.name for folder in self.directory.glob(f"{kind}-*")), default=None)

    def _block(self, index: int, kind: str) -> Path:
        return self.directory / f"{kind}-{index:05d}"

    def _acquire(self) -> None:
        self._lock = (self.directory / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise OutputError(f"another process works in {self.directory}; wait for it or choose another --out.") from None

    def _refuse_unfinished(self, resume: bool) -> None:
        if self.exists and not resume:
            raise OutputError(
                f"{self.directory} holds an unfinished run. Add --resume to go on with it, or delete it to start again."
            )

    def _refuse_foreign(self) -> None:
        """A finished run deletes its work directory: it must be its own."""
        if not self.directory.exists() or self.exists:
            return
        if not self.directory.is_dir() or any(file.name not in (_LOCK, f".{_RUN}.tmp") for file in self.directory.iterdir()):
            raise OutputError(
                f"{self.directory}, the work directory of this --out, holds something else; choose another --out."
            )

    def _read_json(self, file: Path) -> dict[str, Any]:
        try:
            data: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError):
            raise self._damaged(file) from None
        return data

    def _damaged(self, file: Path) -> JournalError:
        return JournalError(f"{file} is damaged or missing; delete {self.directory} and start again.")

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        if other := difference(before, now):
            raise ResumeRefused(
                f"{self.directory} belongs to a run with {other}. Resume with the same settings, or delete it to start again."
            )


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first field in which two runs differ, as ``field = this, not that``; None where there is none."""
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            return f"{key} = {before.get(key)!r}, not {now.get(key)!r}"
    return None


def write_durably(file: Path, content: bytes) -> None:
    """Write, sync, rename: the file is whole or it is not there."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(file)
    sync_directory(file.parent)


def sync_and_hash(file: Path) -> str:
    """Flush a file to disk and return its sha256."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    return sha256(file)


def sha256(file: Path) -> str:
    """Digest of a file's content, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_directory(directory: Path) -> None:
    """Make renames and new files of a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
