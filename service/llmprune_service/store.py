"""Where results lie: a directory, or any object store fsspec knows by URL (s3://, gs://, ...).

    TENANT/JOB/ATTEMPT/NAME              files of a finished checkpoint
    TENANT/JOB/journal/GENERATION/...    finished blocks of an unfinished job, on a store that several hosts share

An attempt writes under its own number, so that a worker that was thought dead cannot touch what another one wrote.
"""

from __future__ import annotations

import json
import mimetypes
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from llmprune_service.settings import Settings

_CHUNK = 1 << 20
_TYPES = {
    ".safetensors": "application/octet-stream",
    ".json": "application/json",
    ".md": "text/markdown",
    ".jinja": "text/plain",
}


@dataclass(frozen=True)
class Artifact:
    """A stored file; ``path`` is relative to the store."""

    name: str
    bytes: int
    sha256: str
    media_type: str
    path: str


class Store:
    """The artifact store of the service."""

    def __init__(self, settings: Settings) -> None:
        url = settings.store_url or str(settings.data_dir / "artifacts")
        self._fs, root = fsspec.url_to_fs(url)
        self._root = str(root).rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether files lie in a directory of this host (or one mounted on all of them)."""
        return isinstance(self._fs, LocalFileSystem)

    def put(self, folder: Path, digests: dict[str, str], *, tenant: str, job_id: str, attempt: int) -> list[Artifact]:
        """Store the files of a finished checkpoint, named with their sha256 in ``digests``."""
        artifacts = []
        for name, digest in sorted(digests.items()):
            path = f"{tenant}/{job_id}/{attempt}/{name}"
            self._put_file(folder / name, path)
            media_type = _TYPES.get(Path(name).suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
            artifacts.append(Artifact(name, (folder / name).stat().st_size, digest, media_type, path))
        return artifacts

    def open(self, path: str) -> IO[bytes]:
        """A stored file for reading; seekable. Raises FileNotFoundError."""
        opened: IO[bytes] = self._fs.open(self._at(path), "rb", block_size=_CHUNK)
        return opened

    def local_path(self, path: str) -> Path | None:
        """The file itself where the store is a directory, else None."""
        return Path(self._at(path)) if self.is_local else None

    def delete(self, tenant: str, job_id: str) -> None:
        """Delete everything of a job; what is not there is fine."""
        self._remove(f"{tenant}/{job_id}")

    def drop_journal(self, tenant: str, job_id: str) -> None:
        """Delete the finished blocks of a job that needs them no more."""
        self._remove(f"{tenant}/{job_id}/journal")

    def push_record(self, record: Path, *, tenant: str, job_id: str, generation: int, whole: bool = False) -> bool:
        """Copy a finished record of a journal; its ``record.json`` last, so that one that has it is there.

        Its owner may meanwhile delete files of it that a later record makes needless, or all of it once the job is done;
        then, with ``whole``, the answer is False and the record does not count.
        """
        base = f"{tenant}/{job_id}/journal/{generation}/{record.name}"
        if record.is_file():
            self._put_file(record, base)
            return True
        index = record / "record.json"
        names = json.loads(index.read_text())["sha256"] if index.is_file() else {}
        for name in (*names, index.name):
            try:
                self._put_file(record / name, f"{base}/{name}")
            except FileNotFoundError:
                if whole:
                    return False
        return bool(names)

    def drop_from_record(self, record: str, pattern: str, *, tenant: str, job_id: str, generation: int) -> None:
        """Delete files of a record that are not needed any more."""
        for file in self._fs.glob(self._at(f"{tenant}/{job_id}/journal/{generation}/{record}/{pattern}")):
            self._fs.rm(file)

    def pull_journal(self, target: Path, *, tenant: str, job_id: str, generation: int) -> None:
        """Copy the whole records of a journal that ``target`` lacks."""
        base = self._at(f"{tenant}/{job_id}/journal/{generation}")
        if not self._fs.exists(base):
            return
        target.mkdir(parents=True, exist_ok=True)
        for entry in self._fs.ls(base, detail=True):
            name = PurePosixPath(entry["name"]).name
            if (target / name).exists():
                continue
            if entry["type"] == "file":
                self._fs.get_file(entry["name"], str(target / name))
            elif self._fs.exists(f"{base}/{name}/record.json"):
                temporary = target / f".tmp-{name}"
                self._fs.get(f"{base}/{name}", str(temporary), recursive=True)
                temporary.rename(target / name)

    def size(self, tenant: str, job_id: str) -> int:
        """Bytes stored for a job."""
        target = self._at(f"{tenant}/{job_id}")
        return int(self._fs.du(target)) if self._fs.exists(target) else 0

    def _remove(self, path: str) -> None:
        target = self._at(path)
        if self._fs.exists(target):
            self._fs.rm(target, recursive=True)

    def _put_file(self, file: Path, path: str) -> None:
        """One file, whole or not there; a link where store and file share a file system."""
        target = self._at(path)
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        if not self.is_local:
            self._fs.put_file(str(file), target)
            return
        temporary = Path(f"{target}.part")
        temporary.unlink(missing_ok=True)
        link_or_copy(file, temporary)
        temporary.replace(target)

    def _at(self, path: str) -> str:
        parts = PurePosixPath(path).parts
        if not parts or ".." in parts or path.startswith("/"):
            raise ValueError(f"{path!r} is no path in the store")
        return f"{self._root}/{path}"


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a synced copy on another file system; the files of journals and checkpoints never change."""
    try:
        os.link(source, target)
    except OSError:
        with source.open("rb") as reader, target.open("wb") as writer:
            shutil.copyfileobj(reader, writer, _CHUNK)
            writer.flush()
            os.fsync(writer.fileno())


def files_below(folder: Path) -> Iterator[Path]:
    """All regular files of a tree."""
    return (file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def size_of(folder: Path) -> int:
    """Bytes of a tree; files that go away meanwhile count as nothing."""
    total = 0
    for file in files_below(folder):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


def remove_tree(folder: Path) -> None:
    """Delete a tree, or nothing."""
    shutil.rmtree(folder, ignore_errors=True)
