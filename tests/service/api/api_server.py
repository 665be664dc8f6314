"""The application under test, and jobs in any state without a worker."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from functools import cached_property
from typing import Any

import httpx2
import sqlalchemy as sa
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from llmprune_service import tables
from llmprune_service.api import auth
from llmprune_service.api.app import create_app
from llmprune_service.execution import Execution
from llmprune_service.jobs import Jobs
from llmprune_service.schemas import ApiKeyRequest, JobRequest
from llmprune_service.settings import Settings
from llmprune_service.store import Artifact
from reports import sample_report

HOST = "127.0.0.1"
PROBLEM = "application/problem+json"
JOB = {"sparsity": 0.5, "num_samples": 8}
_PATIENCE = 20.0


class Parts:
    """What both ways of running the application share: its parts, keys, and jobs moved by hand."""

    app: FastAPI

    @property
    def settings(self) -> Settings:
        settings: Settings = self.app.state.settings
        return settings

    @property
    def jobs(self) -> Jobs:
        jobs: Jobs = self.app.state.jobs
        return jobs

    @property
    def engine(self) -> sa.Engine:
        return self.jobs.engine

    @cached_property
    def headers(self) -> dict[str, str]:
        """The first key's."""
        return bearer(self.settings.key_file.read_text().strip())

    def key(self, *scopes: str, tenant: str = "default", expires_in_s: int | None = None) -> str:
        """A new key."""
        request = ApiKeyRequest(name="test", tenant=tenant, scopes=scopes, expires_in_s=expires_in_s)  # type: ignore[arg-type]
        key = auth.create_key(self.engine, request).key
        assert key is not None
        return key

    def submit(self, tenant: str = "default", **fields: Any) -> str:
        """Queue a job past HTTP; returns its id."""
        row, created = self.jobs.submit(tenant, JobRequest(**{**JOB, **fields}))
        assert created
        return str(row.id)

    def claim(self, job_id: str) -> Execution:
        """Run a job as a worker would."""
        execution = Execution.claim(self.jobs, job_id, self.jobs.get(None, job_id).run, "worker_1")
        assert execution is not None
        return execution

    def run(self, job_id: str, num_blocks: int = 3) -> Execution:
        """Claim a job and say a few things about it."""
        execution = self.claim(job_id)
        execution.enter("prune")
        for block in range(num_blocks):
            name = f"model.layers.{block}"
            facts = {"block": block, "name": name, "sparsity": 0.5, "error": 0.1, "seconds": 1.0, "sha256": "0" * 64}
            execution.add_block(facts, num_blocks)
        return execution

    def succeed(self, job_id: str, files: dict[str, bytes] | None = None, **result: Any) -> None:
        """Run a job to its end, with these files as its result."""
        artifacts = []
        for name, content in (files or {"config.json": b"{}"}).items():
            path = f"default/{job_id}/1/{name}"
            target = self.settings.data_dir / "artifacts" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            media_type = "text/html" if name.endswith(".html") else "application/octet-stream"
            artifacts.append(Artifact(name, len(content), hashlib.sha256(content).hexdigest(), media_type, path))
        facts = {
            "sparsity": 0.5, "perplexity_dense": 20.0, "perplexity_pruned": 21.0, "ratio": 1.05, "text": "wikitext2",
            "checkpoint_bytes": 10, "dense_bytes": 20, "decode_tokens_per_second": None, "prefill_tokens_per_second": None,
        }  # fmt: skip
        report = sample_report(out="/srv/secret/path")
        self.run(job_id).succeed(report, {**facts, **result}, artifacts)

    def column(self, job_id: str, **values: Any) -> None:
        """Change columns of a job behind everybody's back."""
        with self.engine.begin() as connection:
            connection.execute(sa.update(tables.jobs).where(tables.jobs.c.id == job_id).values(values))


class Service(Parts):
    """The application in this process; ``client`` has no key, ``get`` and its like send the administrator's."""

    def __init__(self, settings: Settings) -> None:
        self.app = create_app(settings)
        self.client = TestClient(self.app, base_url=f"http://{HOST}", raise_server_exceptions=False)

    def request(self, method: str, path: str, key: str | None = None, **arguments: Any) -> httpx2.Response:
        headers = (bearer(key) if key else self.headers if self.settings.auth else {}) | arguments.pop("headers", {})
        return self.client.request(method, path, headers=headers, **arguments)

    def get(self, path: str, **arguments: Any) -> httpx2.Response:
        return self.request("GET", path, **arguments)

    def post(self, path: str, **arguments: Any) -> httpx2.Response:
        return self.request("POST", path, **arguments)


class Server(Parts):
    """The application behind uvicorn on a free port, in a thread."""

    def __init__(self, settings: Settings) -> None:
        self.app = create_app(settings)
        config = uvicorn.Config(
            self.app, host=HOST, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=5, lifespan="on"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started, "the server did not start")
        self.url = f"http://{HOST}:{self._server.servers[0].sockets[0].getsockname()[1]}"
        self.client = httpx2.Client(base_url=self.url, headers=self.headers, timeout=_PATIENCE)

    def stop(self) -> None:
        self.client.close()
        self.app.state.feed.stop()
        self._server.should_exit = True
        self._thread.join(_PATIENCE)
        assert not self._thread.is_alive(), "the server did not end"


def bearer(key: str) -> dict[str, str]:
    """The header of a key."""
    return {"Authorization": f"Bearer {key}"}


def problem(response: httpx2.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """The problem document of an answer, checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    document: dict[str, Any] = response.json()
    assert document["status"] == status
    assert document["type"].startswith("urn:llmprune:problem:")
    assert document["instance"] == f"urn:llmprune:request:{response.headers['x-request-id']}"
    assert code is None or document["type"] == f"urn:llmprune:problem:{code}", document
    return document


def pointers(response: httpx2.Response, status: int = 422) -> dict[str, str]:
    """Detail by pointer (or parameter) of a problem document."""
    errors = problem(response, status)["errors"]
    return {error.get("pointer", error.get("parameter")): error["detail"] for error in errors}


def read_events(response: httpx2.Response) -> list[tuple[int, str, dict[str, Any]]]:
    """Id, type and data of every event of a stream, to its end."""
    return [(int(event.id), event.event, json.loads(event.data)) for event in httpx2.EventSource(response)]


def wait_for(condition: Any, message: str, seconds: float = _PATIENCE) -> None:
    """Look until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.01)
