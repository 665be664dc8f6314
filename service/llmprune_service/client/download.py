"""Files of a result, over connections that break: gone on with where they broke, checked, and whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO
from urllib.parse import quote

from llmprune.errors import DiskFull, OutputError
from llmprune_service.client.transport import Patience, ServiceError, ServiceUnreachable, Transport
from llmprune_service.schemas import ArtifactView

_SILENCE_SECONDS = 60.0
# A name comes from the service: it must not lead out of the directory, on any system.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")


def download(
    transport: Transport, path: str, artifacts: Sequence[ArtifactView], directory: Path, progress: Callable[[int, int], None]
) -> Path:
    """Fetch the artifacts below ``path`` of the API into a directory, made if it is not there; returns it."""
    for artifact in artifacts:
        if not _NAME.fullmatch(artifact.name):
            raise ServiceError(f"The service names a file {artifact.name!r}, which is refused as a file name.")
    total = sum(artifact.bytes for artifact in artifacts)
    with _file_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        before = 0
        for artifact in artifacts:
            file = _File(transport, f"{path}/{quote(artifact.name)}", artifact, directory)
            file.fetch(partial(_advance, progress, before, total))
            before += artifact.bytes
        progress(total, total)
    return directory


def _advance(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


@dataclass(frozen=True)
class _File:
    """One file on its way."""

    transport: Transport
    path: str
    artifact: ArtifactView
    directory: Path

    def fetch(self, report: Callable[[int], None]) -> None:
        """Make sure it is there. A partial file that turns out wrong, of another job say, is begun anew once."""
        target = self.directory / self.artifact.name
        part = self.directory / f"{self.artifact.name}.part"
        if target.exists():
            self._check(target)
            return
        found_part = part.exists()
        if self._fill(part, report) != self.artifact.sha256:
            part.unlink()
            if not found_part or self._fill(part, report) != self.artifact.sha256:
                part.unlink(missing_ok=True)
                raise ServiceError(f"{self.artifact.name} did not arrive as its sha256 says. Download it again.")
        part.replace(target)

    def _check(self, target: Path) -> None:
        if target.stat().st_size == self.artifact.bytes:
            with target.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == self.artifact.sha256:
                    return
        raise OutputError(f"{target} is there and is another file. Choose another directory, or remove it.")

    def _fill(self, part: Path, report: Callable[[int], None]) -> str:
        """Append what is missing, as often as the connection breaks; returns the sha256 of the whole."""
        patience = Patience(self.transport.patience)
        with part.open("a+b") as file:
            if file.tell() > self.artifact.bytes:
                file.truncate(0)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256")
            done = file.tell()
            while done < self.artifact.bytes:
                try:
                    for chunk in self._chunks(done):
                        file.write(chunk)
                        digest.update(chunk)
                        done += len(chunk)
                        patience.reset()
                        report(done)
                    error: ServiceError = ServiceUnreachable(f"{self.artifact.name} broke off; try again.")
                except ServiceError as broken:
                    error = broken
                if done < self.artifact.bytes:
                    patience.wait(error)
            _sync(file)
        return digest.hexdigest()

    def _chunks(self, start: int) -> Iterator[bytes]:
        """The bytes from ``start`` on, never more than there should be."""
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-"}
        left = self.artifact.bytes - start
        with self.transport.stream(self.path, headers=headers, silence_seconds=_SILENCE_SECONDS) as response:
            skip = 0 if response.status_code == 206 else start  # something on the way does not know ranges
            for chunk in response.iter_raw():
                if not left:  # more than was announced; else it is read to its end, so that the connection can be used again
                    return
                fresh = chunk[skip : skip + left]
                skip = max(0, skip - len(chunk))
                left -= len(fresh)
                if fresh:
                    yield fresh


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _file_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"No space left for {directory}. Make room, then go on with the same command.") from None
        raise OutputError(f"{directory} cannot be written ({error.strerror}). Choose another directory.") from None
