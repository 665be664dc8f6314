"""A large artifact over connections that keep breaking: whole, right, and no more memory than for a small one.

Client and API are processes of their own; a proxy between them cuts every connection after some hundred MiB, in the
middle of a packet. The limits, each measured alone on the same disk in the same run: reading the file, its sha256, and
writing it durably, which are all part of a download.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from benchmarks.service import TENANT, Service, host, number, quiet_environment, say_where, serving
from llmprune_service import tables
from llmprune_service.schemas import JobRequest
from llmprune_service.store import Store

_BLOCK = 64 * 2**20
_CHUNK = 1 << 20
_CUTS = (1 / 15, 2 / 15)  # of the file: 205 to 410 MiB of 3 GiB
_MAX_GROWTH = 64 * 2**20
_SAMPLE_SECONDS = 0.02
_DEADLINE = 1200
_NAME = "model.safetensors"
_DOWNLOAD = """
import sys
from llmprune_service.client import Client
url, key, job_id, target = sys.argv[1:]
with Client(url, key) as client:
    client.get(job_id)
    print("idle", flush=True)
    sys.stdin.readline()
    client.download(job_id, target)
"""


def run(console: Console) -> dict[str, Any]:
    """Make the file, download it through the proxy, and compare."""
    size = number("BENCH_MIB", 3072) * 2**20
    with tempfile.TemporaryDirectory(prefix="llmprune-bench-inputs-") as folder:
        free = shutil.disk_usage(folder).free
        if free < 3 * size:
            needed = f"{free / 2**30:.1f} GiB are free and {3 * size / 2**30:.1f} are needed"
            raise SystemExit(f"{needed} in {folder}; choose a directory on another disk with TMPDIR.")
        source = Path(folder) / _NAME
        limits, digest = make_file(source, size)
        with serving("sqlite", Path(folder), num_workers=0, disk_floor_bytes=1) as (service, _):
            job_id = offer(service, source, digest)
            source.unlink()  # the store has its own link
            facts = download(service, job_id, size, digest)
    result = {"bytes": size, "host": host(), **limits, **facts}
    result["wrong"] = [
        complaint
        for complaint, is_so in {
            "the file that arrived is another one": not facts["is_right"],
            "no connection was cut": facts["cuts"] == 0,
            "the API took more than 64 MiB more memory": facts["api_growth_bytes"] > _MAX_GROWTH,
            "the client took more than 64 MiB more memory": facts["client_growth_bytes"] > _MAX_GROWTH,
        }.items()
        if is_so
    ]
    _print(console, result)
    return result


def make_file(path: Path, size: int) -> tuple[dict[str, float], str]:
    """A file no two blocks of which are the same; how fast it is written, read and digested; and its sha256."""
    block = bytearray(random.Random(0).randbytes(min(_BLOCK, size)))
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for index in range(size // len(block)):
            block[:8] = struct.pack("<Q", index)
            file.write(block)
        file.write(block[: size % len(block)])
        os.fsync(file.fileno())
    written = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(_CHUNK):
            pass
    read = time.perf_counter()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    digested = time.perf_counter()
    return {"write_seconds": written - began, "read_seconds": read - written, "digest_seconds": digested - read}, digest


def offer(service: Service, source: Path, digest: str) -> str:
    """A job that has succeeded, with the file as its only artifact; returns its id."""
    row, _ = service.jobs.submit(TENANT, JobRequest())
    (artifact,) = Store(service.settings).put(source.parent, {source.name: digest}, tenant=TENANT, job_id=row.id, attempt=1)
    with service.engine.begin() as connection:
        connection.execute(sa.insert(tables.artifacts).values(job_id=row.id, **vars(artifact)))
        connection.execute(sa.update(tables.jobs).where(tables.jobs.c.id == row.id).values(status="succeeded"))
    return str(row.id)


def download(service: Service, job_id: str, size: int, digest: str) -> dict[str, Any]:
    """Run the client through the proxy, and watch the memory of both ends."""
    target = service.folder / "downloaded"
    proxy = Proxy(service.settings.port, size)
    command = [sys.executable, "-c", _DOWNLOAD, f"http://127.0.0.1:{proxy.port}", service.key, job_id, str(target)]
    client = subprocess.Popen(command, env=quiet_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert client.stdin is not None and client.stdout is not None
        assert client.stdout.readline() == b"idle\n"
        proxy.cutting = True
        idle = [_rss(service.running["api"].pid), _rss(client.pid)]
        peak, began = list(idle), time.perf_counter()
        client.stdin.write(b"\n")
        client.stdin.close()
        while client.poll() is None:
            if time.perf_counter() - began > _DEADLINE:
                raise TimeoutError(f"The download took longer than {_DEADLINE} seconds")
            now = [_rss(service.running["api"].pid), _rss(client.pid)]
            peak = [max(pair) for pair in zip(peak, now, strict=True)]
            time.sleep(_SAMPLE_SECONDS)
        seconds = time.perf_counter() - began
    finally:
        client.kill()
        client.wait()
        proxy.close()
    with (target / _NAME).open("rb") as file:
        is_right = client.returncode == 0 and hashlib.file_digest(file, "sha256").hexdigest() == digest
    return {
        "seconds": seconds, "cuts": proxy.cuts, "connections": proxy.connections, "is_right": is_right,
        "api_idle_bytes": idle[0], "api_growth_bytes": peak[0] - idle[0],
        "client_idle_bytes": idle[1], "client_growth_bytes": peak[1] - idle[1],
    }  # fmt: skip


class Proxy:
    """Passes connections on to a port, and once ``cutting`` resets each after a random part of the file."""

    def __init__(self, target: int, size: int) -> None:
        self.cutting = False
        self.cuts = 0
        self.connections = 0
        self._target = target
        self._size = size
        self._rng = random.Random(0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self.connections += 1
                allowed = int(self._size * self._rng.uniform(*_CUTS))
                threading.Thread(target=self._pass, args=(client, server), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, allowed), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, allowed: int | None = None) -> None:
        """One direction, until either end is done or as much as is allowed has passed."""
        buffer, passed = memoryview(bytearray(_CHUNK)), 0
        with suppress(OSError):
            while count := source.recv_into(buffer):
                passed += count
                if self.cutting and allowed is not None and passed > allowed:
                    self.cuts += 1
                    break
                sink.sendall(buffer[:count])
        for end in (source, sink):
            with suppress(OSError):  # no lingering: what is on its way is lost, as when a cable is pulled
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def _rss(pid: int) -> int:
    with suppress(psutil.NoSuchProcess):
        return int(psutil.Process(pid).memory_info().rss)
    return 0


def table_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured, in words."""
    mib, slowest = result["bytes"] / 2**20, max(result[f"{name}_seconds"] for name in ("read", "digest", "write"))
    return [
        ("size", f"{mib:.0f} MiB"),
        ("connections cut, and resumed", str(result["cuts"])),
        ("sha256", "right" if result["is_right"] else "WRONG"),
        ("download", f"{mib / result['seconds']:.0f} MiB/s"),
        ("  limit: reading the file alone", f"{mib / result['read_seconds']:.0f} MiB/s"),
        ("  limit: its sha256 alone", f"{mib / result['digest_seconds']:.0f} MiB/s"),
        ("  limit: writing it durably alone", f"{mib / result['write_seconds']:.0f} MiB/s"),
        ("  of the lowest limit", f"{slowest / result['seconds']:.0%}"),
        ("API memory, idle", f"{result['api_idle_bytes'] / 2**20:.0f} MiB"),
        ("  peak growth (limit 64 MiB)", f"{result['api_growth_bytes'] / 2**20:.1f} MiB"),
        ("client memory, idle", f"{result['client_idle_bytes'] / 2**20:.0f} MiB"),
        ("  peak growth (limit 64 MiB)", f"{result['client_growth_bytes'] / 2**20:.1f} MiB"),
    ]


def _print(console: Console, result: dict[str, Any]) -> None:
    table = Table("a download that keeps breaking off", "", title="A large artifact")
    for row in table_rows(result):
        table.add_row(*row)
    console.print(table)
    console.print(say_where(result))
    for complaint in result["wrong"]:
        console.print(f"WRONG  {complaint}", style="red", markup=False)
