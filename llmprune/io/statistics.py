"""The cache of statistics: what is measured on the dense model is kept for later jobs on the same model and calibration.

    ROOT/<sha256 of the fingerprint>/block-00000-gram.safetensors    sums of the inputs of one block's sites

ROOT is ``statistics`` in ~/.cache/llmprune, or in LLMPRUNE_CACHE. A record is written to a temporary file, synced and renamed:
it is whole or it is not there, and two jobs that write the same one write the same sums. Together the records take at most
LLMPRUNE_CACHE_GB (20; 0 turns the cache off): those go first that have not been used for longest.

A record serves whoever needs the same statistics or less, to the last bit (:class:`llmprune.stats.ServingStats`). Nothing that
goes wrong here fails a job: what cannot be read is collected again, what cannot be written is not kept, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ValidationError
from torch import Tensor

from llmprune._version import __version__
from llmprune.devices import device_name
from llmprune.engines.sharding import Shares
from llmprune.errors import ConfigError, CorruptCheckpoint
from llmprune.io.models import Source
from llmprune.io.tensors import CODES, TensorReader, TensorWriter
from llmprune.processes import is_first_here
from llmprune.report import StatisticsReport
from llmprune.spec import Need, PruneConfig
from llmprune.stats import LinearStats, ServingStats

DEFAULT_GIGABYTES = 20.0
_CONTENT, _DIGEST = "content", "sha256"
_LEFT_BY_A_KILLED_PROCESS = 3600.0  # seconds after which a temporary file is nobody's


class _Group(BaseModel):
    """Sites that read the same inputs, and how many tokens those were."""

    sites: list[str]
    num_tokens: int
    in_features: int


class _Content(BaseModel):
    """What a record says of itself, beside its tensors; ``sha256`` has the digest of each."""

    fingerprint: dict[str, Any]
    block: int
    need: Need
    collected: str
    groups: list[_Group]
    sha256: dict[str, str]


@dataclass(frozen=True)
class _Record:
    """One record, open: it can be read though another process may delete it."""

    content: _Content
    reader: TensorReader


class Statistics:
    """The records of one fingerprint as one stage of a job uses them.

    Attributes:
        need: the statistics that the stage wants.
        messages: what a user should be warned of.

    Args:
        shares: of several processes, each of which uses the cache of its machine, what this one does: a record is used where
            all of them find it, and written by the first one of each machine.
    """

    def __init__(
        self, fingerprint: Mapping[str, Any], need: Need, *, root: Path, max_bytes: int, shares: Shares | None = None
    ) -> None:
        self.fingerprint = json.loads(json.dumps(dict(fingerprint)))
        self.need, self.root, self.max_bytes = need, root, max_bytes
        key = hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()
        self.directory = root / key[:32]
        self.messages: list[str] = []
        self._records: dict[int, _Record] = {}
        self._reused: dict[int, str] = {}
        self._num_blocks = 0
        self._full = False
        self.shares = shares or Shares.alone()

    def open(self, num_blocks: int, start: int = 0) -> None:
        """Find the whole records of blocks ``start`` and later, and hold them against deletion."""
        self.close()
        self._num_blocks = num_blocks
        for index in range(start, num_blocks):
            for need in (need for need in Need if need >= self.need):
                if self._open(index, need):
                    break
        everywhere = set.intersection(*self.shares.together(lambda: set(self._records)))
        for index in set(self._records) - everywhere:
            self._records.pop(index).reader.__exit__(None, None, None)

    def close(self) -> None:
        """Let the records go."""
        for record in self._records.values():
            record.reader.__exit__(None, None, None)
        self._records = {}

    def complete(self, start: int = 0) -> bool:
        """Whether the records of blocks ``start`` and later are all there."""
        return all(index in self._records for index in range(start, self._num_blocks))

    def read(self, index: int, device: torch.device) -> dict[str, LinearStats] | None:
        """Statistics of a block's sites by name, those of one input the same object; None where there is no record."""
        record = self._records.get(index)
        if record is None:
            return None
        found: dict[str, LinearStats] = {}
        for number, group in enumerate(record.content.groups):
            stats = self._stats(record, number).at(self.need)
            for name in ("sq_I", "sum_I", "gram_II"):
                tensor = getattr(stats, name)
                setattr(stats, name, None if tensor is None else tensor.to(device))
            found |= dict.fromkeys(group.sites, stats)
        self._reused[index] = record.content.collected
        return found

    def write(self, index: int, collected: Mapping[str, LinearStats]) -> None:
        """Keep the statistics of a block's sites."""
        if self._full or not is_first_here():
            return
        groups: dict[int, tuple[LinearStats, list[str]]] = {}
        for name, stats in collected.items():
            groups.setdefault(id(stats), (stats, []))[1].append(name)
        tensors: dict[str, Tensor] = {}
        for number, (stats, _) in enumerate(groups.values()):
            assert isinstance(stats, ServingStats) and stats.need == self.need
            tensors |= {name: tensor.cpu() for name, tensor in _tensors(stats, number).items()}
        content = _Content(
            fingerprint=self.fingerprint,
            block=index,
            need=self.need,
            collected=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            groups=[
                _Group(sites=names, num_tokens=stats.num_tokens, in_features=len(stats.sq_I))
                for stats, names in groups.values()
            ],
            sha256={name: _digest(tensor) for name, tensor in tensors.items()},
        )
        try:
            self._write(self._file(index, self.need), content, tensors)
            for need in (need for need in Need if need < self.need):  # this record serves in their place
                self._file(index, need).unlink(missing_ok=True)
        except OSError as error:
            self._stop(f"{error.strerror or error}")

    def collected(self, index: int) -> str | None:
        """When the statistics of a block were collected, if they were read here."""
        return self._reused.get(index)

    def report(self, stage: str) -> StatisticsReport:
        """What the stage found here."""
        return StatisticsReport(
            stage=stage, num_blocks=self._num_blocks, num_reused=len(self._reused),
            collected=min(self._reused.values(), default=None),
        )  # fmt: skip

    def _file(self, index: int, need: Need) -> Path:
        return self.directory / f"block-{index:05d}-{need.name.lower()}.safetensors"

    def _open(self, index: int, need: Need) -> bool:
        file = self._file(index, need)
        try:
            with suppress(PermissionError):
                os.utime(file)  # used: others go first
            reader = TensorReader([file], file.name)
        except FileNotFoundError:
            return False
        except (OSError, CorruptCheckpoint):
            self._damaged(file)
            return False
        try:
            record = _Record(_content_of(reader, file), reader)
            if (record.content.fingerprint, record.content.block, record.content.need) != (self.fingerprint, index, need):
                raise ValueError("it is another block's")
            for number in range(len(record.content.groups)):
                self._stats(record, number, check=True)
        except (OSError, KeyError, ValueError, RuntimeError):
            reader.__exit__(None, None, None)
            self._damaged(file)
            return False
        self._records[index] = record
        return True

    def _damaged(self, file: Path) -> None:
        self.messages.append(f"{file} is damaged: its statistics are collected again.")

    def _stats(self, record: _Record, number: int, *, check: bool = False) -> ServingStats:
        """Those of one group; of what a record holds only that is read which this stage needs.

        Raises ValueError, with ``check``, for tensors that are not those that were written.
        """
        kept, need = record.content.need, self.need
        wanted = {"sq": kept < Need.GRAM and need > Need.NOTHING, "sum": need >= Need.MEAN, "gram": need >= Need.GRAM}
        wanted["squares"] = kept >= Need.GRAM and Need.NOTHING < need < Need.GRAM
        found = {name: record.reader.read(f"{number}.{name}") for name, is_wanted in wanted.items() if is_wanted}
        if check:
            for name, tensor in found.items():
                if _digest(tensor) != record.content.sha256[f"{number}.{name}"]:
                    raise ValueError(f"{number}.{name} is not what was written")
        group = record.content.groups[number]
        stats = ServingStats(group.in_features, Need.NOTHING, "cpu")
        stats.need, stats.num_tokens = kept, group.num_tokens
        stats.sum_I, stats.gram_II, stats.squares_I = found.get("sum"), found.get("gram"), found.get("squares")
        if stats.gram_II is not None:
            stats.sq_I = stats.gram_II.diagonal().clone()
        elif "sq" in found:
            stats.sq_I = found["sq"]
        return stats

    def _write(self, file: Path, content: _Content, tensors: Mapping[str, Tensor]) -> None:
        layout = {name: (CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
        text = content.model_dump_json()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".tmp-", dir=self.directory)
        os.close(descriptor)
        temporary = Path(name)
        try:
            metadata = {_CONTENT: text, _DIGEST: hashlib.sha256(text.encode()).hexdigest()}
            writer = TensorWriter(temporary, layout, metadata)
            if not self._make_room(writer.num_bytes):
                self._stop(f"they may take LLMPRUNE_CACHE_GB ({self.max_bytes / 1e9:g}) and half of the disk's free space")
                return
            with writer:
                for tensor_name, tensor in tensors.items():
                    writer.write(tensor_name, tensor)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)

    def _stop(self, why: str) -> None:
        """Keep nothing more in this stage."""
        self._full = True
        self.messages.append(f"the statistics of some blocks are not kept for later jobs in {self.root}: {why}.")

    def _make_room(self, num_bytes: int) -> bool:
        """Delete the least recently used records of other fingerprints until so many bytes fit; False where they cannot."""
        files: list[tuple[float, int, Path]] = []
        total = num_bytes
        for file in self.root.glob("*/*"):
            try:
                found = file.stat()
            except OSError:  # another process was faster
                continue
            if file.name.startswith(".tmp-"):
                if time.time() - found.st_mtime > _LEFT_BY_A_KILLED_PROCESS:
                    file.unlink(missing_ok=True)
                continue
            total += found.st_size
            if file.parent != self.directory:
                files.append((found.st_mtime, found.st_size, file))
        for _, size, file in sorted(files):
            if total <= self.max_bytes:
                break
            file.unlink(missing_ok=True)
            total -= size
            with suppress(OSError):  # the last one leaves an empty directory
                file.parent.rmdir()
        return total <= self.max_bytes and num_bytes <= shutil.disk_usage(self.directory).free / 2


def statistics_of(
    config: PruneConfig,
    source: Source,
    model: Any,
    need: Need,
    *,
    device: torch.device,
    tokens: str,
    seq_len: int,
    batch_size: int,
    streamed: bool,
    shares: Shares | None = None,
) -> Statistics | None:
    """The cache for statistics of this dense model on these ``tokens`` (their sha256); None where there is none.

    Everything that a sum's last bit depends on is part of the fingerprint.

    Raises ConfigError for a LLMPRUNE_CACHE_GB that is no number.
    """
    max_bytes = int(_max_gigabytes() * 1e9)
    try:
        root = Path(os.environ.get("LLMPRUNE_CACHE") or "~/.cache/llmprune").expanduser() / "statistics"
    except RuntimeError:  # a user without a home
        return None
    if not max_bytes:
        return None
    described = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_OF_THE_MODEL}
    fingerprint = {
        "revision": source.revision,
        "config": hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest(),
        "code": _code_of(source.path) if config.trust_remote_code else "",
        "tokens": tokens,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "dtype": str(model.dtype),
        "streamed": streamed,
        "skip": list(config.skip),
        "device": f"{device.type}: {device_name(device)}, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}",
        "matmul": torch.get_float32_matmul_precision(),
        "llmprune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if shares is not None:  # their sums round otherwise
        fingerprint["num_processes"] = shares.size
    return Statistics(fingerprint, need, root=root, max_bytes=max_bytes, shares=shares)


_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "use_cache")


def _max_gigabytes() -> float:
    given = os.environ.get("LLMPRUNE_CACHE_GB") or str(DEFAULT_GIGABYTES)
    try:
        gigabytes = float(given)
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes < math.inf:
        raise ConfigError(f"LLMPRUNE_CACHE_GB must be a number of gigabytes, 0 for no cache, got {given!r}.")
    return gigabytes


def _code_of(path: Path) -> str:
    """Digest of the modelling code that comes with a model."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.py")):
        digest.update(f"{file.relative_to(path)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _tensors(stats: ServingStats, number: int) -> dict[str, Tensor]:
    """What is kept of one group: the diagonal of a Gram matrix is in it."""
    if stats.need == Need.NOTHING:
        return {}
    found = {"sum": stats.sum_I, "gram": stats.gram_II, "squares": stats.squares_I}
    if stats.gram_II is None:
        found["sq"] = stats.sq_I
    return {f"{number}.{name}": tensor for name, tensor in found.items() if tensor is not None}


def _content_of(reader: TensorReader, file: Path) -> _Content:
    """What the record says of itself; raises ValueError where that is not what was written."""
    metadata = reader.metadata[file.name] or {}
    text = metadata[_CONTENT]
    if hashlib.sha256(text.encode()).hexdigest() != metadata[_DIGEST]:
        raise ValueError("its description is damaged")
    try:
        return _Content.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(str(error)) from None


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
