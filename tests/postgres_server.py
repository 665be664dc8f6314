"""A PostgreSQL server of the tests' own, from the distribution's package: started, stopped, killed, thrown away."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path


def find_binaries() -> Path | None:
    """The directory of initdb and postgres, or None where the package is not installed."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "postgres").exists() and (folder / "initdb").exists()), None)


class Postgres:
    """A server on a free port of 127.0.0.1 with a data directory of its own; durability is off unless asked for."""

    def __init__(self, *, durable: bool = False) -> None:
        binaries = find_binaries()
        assert binaries is not None
        self._bin = binaries
        self.folder = Path(tempfile.mkdtemp(prefix="llmprune-postgres-"))
        self._user = "postgres" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
        if os.getuid() == 0:  # the server refuses to run as root
            shutil.chown(self.folder, "postgres", "postgres")
        self._data = self.folder / "data"
        self._run("initdb", "-D", self._data, "-U", "tester", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c max_connections=200"
        if not durable:
            self._options += " -c fsync=off -c synchronous_commit=off -c full_page_writes=off"
        self.start()

    def url(self, database: str = "postgres") -> str:
        """A SQLAlchemy and libpq URL."""
        return f"postgresql://tester@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> str:
        """A new database; returns its URL."""
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "tester", database)
        return self.url(database)

    def start(self) -> None:
        """Start, and wait until it answers."""
        log = self.folder / "log.txt"
        self._run("pg_ctl", "-D", self._data, "-w", "-t", "60", "-l", log, "-o", self._options, "start")

    def stop(self, mode: str = "immediate") -> None:
        """Stop as after a crash, or ``fast``."""
        self._run("pg_ctl", "-D", self._data, "-w", "-t", "60", "-m", mode, "stop")

    def destroy(self) -> None:
        """Stop and delete everything."""
        if (self._data / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self._bin / program), *map(str, arguments)]
        if os.getuid() == 0:
            command = ["runuser", "-u", self._user, "--", *command]
        done = subprocess.run(command, cwd="/tmp", capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stdout}{done.stderr}")
