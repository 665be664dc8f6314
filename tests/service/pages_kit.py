"""The real application with SQLite for the tests of its pages, and jobs brought into any state as a worker does."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn
from fastapi.testclient import TestClient

from llmprune.report import Plan, Report
from llmprune.spec import PruneConfig
from llmprune_service.api.app import create_app
from llmprune_service.database import migrate
from llmprune_service.execution import Execution
from llmprune_service.jobs import Jobs, Row
from llmprune_service.schemas import PHASES, JobRequest
from llmprune_service.settings import Settings
from llmprune_service.store import Artifact
from reports import sample_report

OWN = "http://testserver"
EVIL = "<script>alert(1)</script>"
BROWSER = {"Accept": "text/html,*/*;q=0.8", "Origin": OWN}
SHA = hashlib.sha256(b"weights").hexdigest()
RESULT = {
    "sparsity": 0.5001, "verdict": "degraded", "seconds": 412.3, "checkpoint_bytes": 2 * 2**20, "dense_bytes": 3 * 2**20,
    "text": "wikitext2", "perplexity_dense": 16.21, "perplexity_pruned": 21.94, "ratio": 1.353, "kl": 0.2914,
    "top1_agreement": 0.742, "prefill_tokens_per_second": None, "decode_tokens_per_second": {"dense": 71.0, "pruned": 142.0},
}  # fmt: skip


class Pages:
    """The application with a browser-like client, and direct access to its jobs."""

    def __init__(self, client: TestClient, settings: Settings) -> None:
        self.client = client
        self.settings = settings
        self.state: Any = client.app.state  # type: ignore[attr-defined]
        self.jobs: Jobs = self.state.jobs

    def get(self, path: str, *, status: int = 200) -> str:
        """The text of a page."""
        answer = self.client.get(path)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"].startswith("text/html")
        return answer.text

    def post(self, path: str, **fields: str) -> Any:
        """What a form brings back, redirects not followed."""
        return self.client.post(path, data=fields, follow_redirects=False)

    def submit(self, tenant: str = "default", **fields: Any) -> Row:
        """A queued job; its model's name is not checked, as when it comes straight from the database."""
        return self.jobs.submit(tenant, JobRequest(**fields))[0]

    def job_in(self, status: str) -> Row:
        """A job with that status."""
        row = self.submit()
        if status == "cancelled":
            return self.jobs.cancel("default", row.id)
        if status == "queued":
            return row
        execution = begin(self.jobs, row)
        match status:
            case "cancelling":
                self.jobs.cancel("default", row.id)
            case "failed":
                execution.fail("out_of_memory", "The device is full. Lower batch_size.")
            case "succeeded":
                succeed(execution)
        return self.jobs.get("default", row.id)


def begin(jobs: Jobs, row: Row, *, num_blocks: int = 4) -> Execution:
    """Run a job up to the third block, as a worker does."""
    execution = Execution.claim(jobs, row.id, row.run, "worker_1")
    assert execution is not None
    for phase in PHASES[:3]:
        execution.enter(phase)
    for index in range(2):
        finish_block(execution, index, num_blocks)
    return execution


def finish_block(execution: Execution, index: int, num_blocks: int) -> None:
    """File a block."""
    facts = {"block": index, "name": f"model.layers.{index}", "sparsity": 0.5, "error": 0.01, "seconds": 1.5, "sha256": None}
    progress = {"stage": "prune", "done": index + 1, "total": num_blocks, "began": time.time() - 10, "resumed_at": 0}
    execution.note(progress=progress)
    execution.add_block(facts, num_blocks)


def succeed(execution: Execution, report: Report | None = None, **changes: Any) -> None:
    """End a job with a result, a report and two files."""
    for phase in PHASES[3:]:
        execution.enter(phase)
    files = [Artifact(name, 2048, SHA, "text/plain", f"default/x/1/{name}") for name in ("model.safetensors", "report.html")]
    execution.succeed(report or sample_report(), RESULT | changes, files)


def sample_plan(**changes: Any) -> dict[str, Any]:
    """What ``llmprune plan --json`` prints."""
    report = sample_report()
    fields: dict[str, Any] = {
        "config": PruneConfig(), "model": report.model, "num_sites": 28, "num_pruned_weights": 1_000_000, "walk": "two passes",
        "batch_size": 1, "seq_len": 512, "calibration_tokens": 65_536, "evaluation_tokens": 4096, "device": "cpu",
        "weights_place": "cpu", "stages": [{"name": "prune", "seconds": 90.0, "peak_cpu_bytes": 2**30, "peak_gpu_bytes": 0}],
        "peak_cpu_bytes": 3 * 2**30, "peak_gpu_bytes": 0, "free_cpu_bytes": 8 * 2**30, "free_gpu_bytes": 0,
        "disk_bytes": 2**30, "free_disk_bytes": 2**40, "download_bytes": 0, "seconds": 125.0,
    }  # fmt: skip
    return Plan.model_validate(fields | changes).model_dump(mode="json")


def new_settings(tmp_path: Path, **changes: Any) -> Settings:
    """Settings with a data directory whose database has the schema."""
    settings = Settings(**({"data_dir": tmp_path / "data", "auth": False, "poll_seconds": 0.1} | changes))
    settings.data_dir.mkdir()
    (settings.data_dir / "llmprune.db").write_bytes(_migrated())
    return settings


@cache
def _migrated() -> bytes:
    """An empty database with the schema: migrating takes longer than most tests."""
    with TemporaryDirectory() as folder:
        migrate(f"sqlite:///{folder}/llmprune.db")
        return Path(folder, "llmprune.db").read_bytes()


@contextmanager
def serving(tmp_path: Path, **changes: Any) -> Iterator[Pages]:
    """The application in this process."""
    settings = new_settings(tmp_path, **changes)
    with TestClient(create_app(settings), base_url=OWN, headers=BROWSER) as client:
        yield Pages(client, settings)


@contextmanager
def listening(tmp_path: Path, **changes: Any) -> Iterator[tuple[str, Any]]:
    """The service on a port: its address, and the application's state."""
    settings = new_settings(tmp_path, **changes)
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app.state
    finally:
        server.should_exit = True
        thread.join()


_VOID = {"meta", "link", "input", "br", "hr", "img"}


class Checker(HTMLParser):
    """Collects what a strict policy forbids, what is not closed, and what has no name."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.links += [found[name] or "" for name in ("href", "src", "action") if name in found]
        self.ids += [found["id"] or ""] if "id" in found else []
        if tag not in _VOID:
            self._open.append(tag)
        if tag == "style" or (tag == "script" and "src" not in found) or "style" in found or any(n[:2] == "on" for n in found):
            self.faults.append(f"inline: {tag} {found}")
        named = "label" in self._open or found.keys() & {"aria-label", "aria-labelledby", "hidden"}
        if tag in ("input", "select", "progress") and not named:
            self.faults.append(f"no label: {tag} {found}")

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"not nested: {tag}")

    def close(self) -> None:
        super().close()
        self.faults += [f"not closed: {tag}" for tag in self._open]
        self.faults += [f"twice: {name}" for name in {name for name in self.ids if self.ids.count(name) > 1}]
