"""The REST API as methods: each answers with the models of :mod:`llmprune_service.schemas`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, RootModel

from llmprune.report import Report
from llmprune.spec import PruneConfig
from llmprune.sweep_spec import AutoConfig, SweepConfig
from llmprune_service.client.download import download
from llmprune_service.client.sweeps import SweepClient, auto_body
from llmprune_service.client.transport import Patience, ServiceError, ServiceUnreachable, Transport, pages, parse
from llmprune_service.schemas import (
    FINISHED,
    ApiKeyRequest,
    ApiKeyView,
    ArtifactView,
    BlockView,
    EventView,
    JobRequest,
    JobView,
    SweepView,
    WorkerView,
)

DEFAULT_URL = "http://127.0.0.1:8000"
_TERMINAL = frozenset(f"job.{status}" for status in FINISHED)
_HOLD_SECONDS = 30.0
_SILENCE_SECONDS = 60.0  # a stream says something every 15 seconds
_SOON = 0.5
M = TypeVar("M", bound=BaseModel)


class Client:
    """A service at a URL. Use as ``with Client() as client``, or call :meth:`close`.

    Requests that may be repeated are, while the service does not answer or is too busy, for ``patience`` seconds; a
    submission is one of them, as it carries an Idempotency-Key. All methods raise :class:`ApiError` and
    :class:`ServiceUnreachable`.

    ``sweeps`` is what can be done with sweeps, see :class:`SweepClient`.

    Args:
        url: where the service listens.
        key: API key; else LLMPRUNE_API_KEY, else the key file of this host's data directory for a loopback URL.
        timeout: seconds to wait for an answer.
        patience: seconds to go on trying.
    """

    def __init__(
        self, url: str = DEFAULT_URL, key: str | None = None, *, timeout: float = 30.0, patience: float = 60.0
    ) -> None:
        self._transport = Transport(url, key, timeout=timeout, patience=patience)
        self.sweeps = SweepClient(self._transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._transport.close()

    @property
    def url(self) -> str:
        """Where the service listens."""
        return self._transport.url

    # Jobs -----------------------------------------------------------------------------------------------------------

    def submit(
        self, config: PruneConfig | JobRequest | None = None, *, idempotency_key: str | None = None, **fields: Any
    ) -> JobView:
        """Queue a job: a config, fields by name, or both. The same key with the same request is one job.

        Raises:
            ConfigError: the request makes no sense.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        body = request_body(config, fields)
        return parse(JobView, self._transport.request("POST", "/v1/jobs", retry=True, json=body, headers=headers).content)

    def sweep(self, config: SweepConfig | None = None, *, idempotency_key: str | None = None, **fields: Any) -> SweepView:
        """Queue a sweep: a config, axes and fields of its jobs by name, or both; as ``sweeps.submit``."""
        return self.sweeps.submit(config, idempotency_key=idempotency_key, **fields)

    def auto(self, config: AutoConfig | None = None, *, idempotency_key: str | None = None, **fields: Any) -> JobView:
        """Queue a search for the best model within a budget: a config, budgets and fields of its jobs by name, or both.

        It is one job. Where nothing meets the budget it fails with the code ``budget_not_met``.

        Raises:
            ConfigError: the request makes no sense.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        body = auto_body(config, fields)
        return parse(JobView, self._transport.request("POST", "/v1/auto", retry=True, json=body, headers=headers).content)

    def validate(self, config: PruneConfig | JobRequest | None = None, **fields: Any) -> dict[str, Any]:
        """What the service makes of a job, and what it would need; nothing is queued."""
        body = request_body(config, fields)
        return self._json("POST", "/v1/jobs:validate", retry=True, json=body)

    def get(self, job_id: str) -> JobView:
        """One job."""
        return self._get(JobView, _job(job_id))

    def list(
        self,
        *,
        status: str | None = None,
        model: str | None = None,
        method: str | None = None,
        sweep: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Iterator[JobView]:
        """Jobs that match, newest first; pages are fetched as they are needed."""
        filters = {"status": status, "model": model, "method": method, "sweep": sweep}
        filters |= {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        return self._pages(JobView, "/v1/jobs", **{name: value for name, value in filters.items() if value is not None})

    def wait(self, job_id: str, timeout: float | None = None) -> JobView:
        """Return the job once it has ended; raises TimeoutError after ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            asked = time.monotonic()
            hold = _HOLD_SECONDS if deadline is None else max(0.0, min(_HOLD_SECONDS, deadline - asked))
            path, params = _job(job_id), {"wait": f"{hold:.1f}"}
            answer = self._transport.request("GET", path, retry=True, hold_seconds=hold, params=params)
            job = parse(JobView, answer.content)
            if job.status in FINISHED:
                return job
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"{job_id} is still {job.status} after {timeout:g} seconds")
            time.sleep(max(0.0, asked + _SOON - time.monotonic()))  # an answer comes at every change

    def events(self, job_id: str, after: int = 0) -> Iterator[EventView]:
        """What happens to a job, as it happens, from the event after number ``after`` to the one that ends it.

        Broken connections are taken up again where they broke.
        """
        patience = Patience(self._transport.patience)
        while True:
            error: ServiceError = ServiceUnreachable(f"The service at {self.url} closed the stream; ask again later.")
            last = ""
            try:
                with self._stream(job_id, after) as response:
                    if response.status_code == httpx2.codes.NO_CONTENT:  # it has ended, and there is nothing more
                        return
                    for item in httpx2.EventSource(response):
                        event = parse(EventView, item.data)
                        patience.reset()
                        after, last = event.seq, event.type
                        yield event
            except ServiceError as broken:
                error = broken
            else:
                if last in _TERMINAL:
                    return
            patience.wait(error)

    def _stream(self, job_id: str, after: int) -> AbstractContextManager[httpx2.Response]:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store", "Last-Event-ID": str(after)}
        return self._transport.stream(f"{_job(job_id)}/events", headers=headers, silence_seconds=_SILENCE_SECONDS)

    def cancel(self, job_id: str) -> JobView:
        """Stop a job; what it has finished is kept for :meth:`resume`."""
        return parse(JobView, self._transport.request("POST", f"{_job(job_id)}/cancel", retry=True).content)

    def resume(self, job_id: str) -> JobView:
        """Go on with a cancelled job."""
        return parse(JobView, self._transport.request("POST", f"{_job(job_id)}/resume").content)

    def retry(self, job_id: str, *, from_start: bool = False) -> JobView:
        """Try a failed job again, from what it has finished or from the start."""
        params = {"from": "start"} if from_start else {}
        return parse(JobView, self._transport.request("POST", f"{_job(job_id)}/retry", params=params).content)

    def patch(self, job_id: str, *, priority: int | None = None, metadata: Mapping[str, str] | None = None) -> JobView:
        """Change the priority of a job that waits, or the metadata of any."""
        given = {"priority": priority, "metadata": metadata}
        body = {name: value for name, value in given.items() if value is not None}
        return parse(JobView, self._transport.request("PATCH", _job(job_id), json=body).content)

    def delete(self, job_id: str) -> None:
        """Delete a finished job with its files."""
        self._transport.request("DELETE", _job(job_id))

    # Results --------------------------------------------------------------------------------------------------------

    def report(self, job_id: str) -> Report:
        """The report of a job that succeeded."""
        return self._get(Report, f"{_job(job_id)}/report")

    def checkpoints(self, job_id: str) -> tuple[BlockView, ...]:
        """The blocks that are finished."""
        return tuple(self._pages(BlockView, f"{_job(job_id)}/checkpoints"))

    def artifacts(self, job_id: str) -> tuple[ArtifactView, ...]:
        """The files of the result."""
        return tuple(self._pages(ArtifactView, f"{_job(job_id)}/artifacts"))

    def download(self, job_id: str, directory: str | Path, *, progress: Callable[[int, int], None] | None = None) -> Path:
        """Fetch every file of the result into a directory, checked by sha256; returns the directory.

        What broke off is gone on with, also by another process: ``NAME.part`` becomes ``NAME`` once it is whole and
        right. ``progress`` is called with the bytes that are there and the bytes there are.

        Raises:
            OutputError: the directory holds other files of those names, or cannot be written.
            DiskFull: no space left.
        """
        artifacts = self.artifacts(job_id)
        return download(self._transport, f"{_job(job_id)}/artifacts", artifacts, Path(directory), progress or _ignore)

    # The service ----------------------------------------------------------------------------------------------------

    def methods(self) -> tuple[dict[str, Any], ...]:
        """The pruning methods, with the schemas of their parameters."""
        return tuple(self._json("GET", "/v1/methods", retry=True)["data"])

    def workers(self) -> tuple[WorkerView, ...]:
        """All workers; needs an admin key."""
        return tuple(self._pages(WorkerView, "/v1/workers"))

    def drain(self, worker_id: str) -> WorkerView:
        """Let a worker finish its job and take no other; needs an admin key."""
        return parse(WorkerView, self._transport.request("POST", f"/v1/workers/{_quoted(worker_id)}/drain", retry=True).content)

    def keys(self) -> tuple[ApiKeyView, ...]:
        """All API keys, without the keys themselves; needs an admin key."""
        return tuple(self._pages(ApiKeyView, "/v1/api-keys"))

    def create_key(self, request: ApiKeyRequest) -> ApiKeyView:
        """Make an API key; its ``key`` is in this answer and never again."""
        body = request.model_dump(mode="json", exclude_unset=True)
        return parse(ApiKeyView, self._transport.request("POST", "/v1/api-keys", json=body).content)

    def revoke_key(self, key_id: str) -> None:
        """Make an API key worthless at once."""
        self._transport.request("DELETE", f"/v1/api-keys/{_quoted(key_id)}")

    def check(self) -> None:
        """Ask once whether the service takes requests: ServiceUnreachable if nothing answers, ApiError 503 if not yet."""
        self._transport.request("GET", "/readyz")

    # Parts ----------------------------------------------------------------------------------------------------------

    def _get(self, model: type[M], path: str) -> M:
        return parse(model, self._transport.request("GET", path, retry=True).content)

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        return parse(_Object, self._transport.request(method, path, **options).content).root

    def _pages(self, model: type[M], path: str, **params: str) -> Iterator[M]:
        return pages(self._transport, model, path, **params)


class _Object(RootModel[dict[str, Any]]):
    """Any JSON object."""


def request_body(config: PruneConfig | JobRequest | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are set, as JSON; raises ConfigError for what makes no sense."""
    return JobRequest.build(config, **fields).model_dump(mode="json", exclude_unset=True)


def _job(job_id: str) -> str:
    return f"/v1/jobs/{_quoted(job_id)}"


def _quoted(identifier: str) -> str:
    return quote(identifier, safe="")


def _ignore(done: int, total: int) -> None:
    del done, total
