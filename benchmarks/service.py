"""What the benchmarks of the service share: a service of their own, whose processes can be killed, and jobs for it.

BENCH_JOBS, BENCH_SECONDS, BENCH_QUEUED, BENCH_READERS and BENCH_MIB make a run smaller; its numbers are then not recorded.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import sqlalchemy as sa
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from llmprune.io.models import BUNDLED_PATH
from llmprune_service import processes
from llmprune_service.client import Client, ServiceError
from llmprune_service.database import make_engine
from llmprune_service.engine import Queue
from llmprune_service.jobs import Jobs
from llmprune_service.settings import Settings

SMALLER = ("BENCH_JOBS", "BENCH_SECONDS", "BENCH_QUEUED", "BENCH_READERS", "BENCH_MIB")
TENANT = "default"
UNLIMITED = 10**9
_RESTART_AFTER = 1.0  # so that one that cannot start (its database is away) does not spin
_WORDS = ("the", "model", "of", "a", "small", "sparse", "network", "prunes", "its", "weight", "and", "then", "keeps", "what")
_ROOT = Path(__file__).parent.parent


def number(name: str, default: int) -> int:
    """A size that the environment may change."""
    return int(os.environ.get(name, default))


def host() -> dict[str, Any]:
    """Where the numbers are from."""
    memory = round(psutil.virtual_memory().total / 2**30)
    return {"cores": os.cpu_count(), "memory_gib": memory, "system": platform.system(), "python": platform.python_version()}


def say_where(result: dict[str, Any]) -> str:
    """One line about the host, for below a table."""
    where = result["host"]
    return f"{where['cores']} cores, {where['memory_gib']} GiB, {where['system']}; clients and service on the same host."


def make_inputs(folder: Path, **layers: int) -> None:
    """A directory a service may read: ``text.txt``, and a Llama of random weights of so many layers by each name."""
    folder.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    rng = random.Random(0)
    (folder / "text.txt").write_text("\n".join(" ".join(rng.choices(_WORDS, k=12)) for _ in range(4000)))
    for name, num_layers in layers.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "llama", vocab_size=2048, hidden_size=64, intermediate_size=176, num_hidden_layers=num_layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
        for file in BUNDLED_PATH.glob("tokenizer*"):
            shutil.copy(file, folder / name)


def job(inputs: Path, model: str, **fields: Any) -> dict[str, Any]:
    """The body of a submission: a job of a few seconds, nearly all of them the start of Python and torch."""
    where = {"model": str(inputs / model), "calibration": str(inputs / "text.txt"), "device": "cpu"}
    return {**where, "eval": [], "latency": False, "prompt": [], "num_samples": 32, "seq_len": 64, **fields}


def quiet_environment() -> dict[str, str]:
    """This environment without settings of another service, offline, one thread a process, no accelerator."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLMPRUNE_")}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that ``percent`` of them are below."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Look until it holds; raises TimeoutError naming ``what``."""
    if not processes.wait_until(condition, seconds):
        raise TimeoutError(f"{what} took longer than {seconds:g} seconds")


class Service:
    """An API and workers, each a process of its own in ``folder``; who dies is started again by :meth:`keep`."""

    def __init__(self, folder: Path, inputs: Path, *, num_workers: int, database_url: str | None, **fields: Any) -> None:
        self.folder = folder
        self.is_kept = False  # for who wants to read its logs
        self.num_workers = num_workers
        own: dict[str, Any] = {
            "data_dir": folder / "data", "port": _free_port(), "slots": max(1, num_workers), "model_roots": str(inputs),
            "heartbeat_ttl": 5.0, "drain_seconds": 5.0, "max_queued": UNLIMITED, "max_submissions_per_minute": UNLIMITED,
            "max_streams": UNLIMITED, "log_format": "json",
        } | ({"database_url": database_url} if database_url else {}) | fields  # fmt: skip
        self.settings = Settings(**own)
        self._environment = quiet_environment() | {f"LLMPRUNE_{name.upper()}": str(value) for name, value in own.items()}
        self._commands = {"api": ["serve", "--no-worker"]}
        self._commands |= {f"worker-{slot}": ["worker", "--slot", str(slot)] for slot in range(num_workers)}
        self._started: dict[str, float] = {}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        """Where the API listens."""
        return f"http://127.0.0.1:{self.settings.port}"

    @property
    def key(self) -> str:
        """The key the first start wrote."""
        return self.settings.key_file.read_text().strip()

    @property
    def workers(self) -> list[str]:
        """Names of the workers' processes."""
        return [name for name in self._commands if name != "api"]

    @cached_property
    def engine(self) -> sa.Engine:
        """The benchmark's own connections to the service's database."""
        return make_engine(self.settings.url)

    @cached_property
    def jobs(self) -> Jobs:
        """The jobs, looked at without the API."""
        return Jobs(self.engine, Queue(self.engine), self.settings)

    def client(self, **options: Any) -> Client:
        """A client with the first key."""
        return Client(self.url, self.key, **options)

    def keep(self) -> None:
        """Start whoever is not running. From one thread only: the kernel ties the processes to it."""
        for name, command in self._commands.items():
            process = self.running.get(name)
            due = time.monotonic() - self._started.get(name, -_RESTART_AFTER) >= _RESTART_AFTER
            if due and (process is None or process.poll() is not None):
                self._started[name] = time.monotonic()
                with (self.folder / f"{name}.log").open("ab") as log:
                    whole = [sys.executable, "-P", "-m", "llmprune", *command]
                    self.running[name] = processes.spawn(whole, env=self._environment, cwd=self.folder, stdout=log, stderr=log)

    def start(self, seconds: float = 120) -> None:
        """Start everything; returns when the API answers and every worker has said that it is there."""

        def is_up() -> bool:
            self.keep()
            if not self.settings.key_file.exists():
                return False
            try:
                with self.client(patience=0) as client:
                    return len(client.workers()) >= self.num_workers
            except ServiceError:
                return False

        try:
            until(is_up, seconds, f"The start of the service, whose logs are in {self.folder},")
        except TimeoutError:
            self.is_kept = True
            raise

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to one process alone; one that is dead gets none."""
        self.running[name].send_signal(number)

    def process(self, name: str) -> psutil.Process:
        """A process, to be looked at."""
        return psutil.Process(self.running[name].pid)

    def strangers(self) -> list[psutil.Process]:
        """Processes of this service that are none of those started here: jobs."""
        ours = {process.pid for process in self.running.values()}
        found = []
        for process in psutil.process_iter(["environ"]):
            values = (process.info["environ"] or {}).values()
            if process.pid not in ours and any(value.startswith(str(self.settings.data_dir)) for value in values):
                found.append(process)
        return found

    def close(self) -> None:
        """End everything that was started here."""
        for process in self.running.values():
            processes.signal_group(process, signal.SIGCONT)
            processes.signal_group(process, signal.SIGTERM)
        for process in self.running.values():
            processes.end(process, seconds=15)
        for stranger in self.strangers():
            stranger.kill()
        if "engine" in self.__dict__:
            self.engine.dispose()


@contextmanager
def serving(kind: str, inputs: Path, *, num_workers: int, **fields: Any) -> Iterator[tuple[Service, Any]]:
    """A service on a new ``sqlite`` or ``postgresql`` database, and the PostgreSQL server or None; deleted afterwards."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="llmprune-bench-"))
        server = None
        if kind == "postgresql":
            server = _postgres().Postgres(durable=True)
            stack.callback(server.destroy)
        service = Service(folder, inputs, num_workers=num_workers, database_url=server.url() if server else None, **fields)
        stack.callback(lambda: None if service.is_kept else shutil.rmtree(folder, ignore_errors=True))
        stack.callback(service.close)
        service.start()
        yield service, server


def databases() -> list[str]:
    """SQLite, and PostgreSQL where it is installed."""
    return ["sqlite", "postgresql"] if _postgres().find_binaries() else ["sqlite"]


def _postgres() -> ModuleType:
    """The server of the tests."""
    name = "postgres_server"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _ROOT / "tests" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
