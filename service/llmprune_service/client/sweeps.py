"""Sweeps over the REST API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx2

from llmprune.spec import PruneConfig
from llmprune.sweep_spec import AutoConfig, SweepConfig
from llmprune_service.client.transport import Transport, pages, parse
from llmprune_service.schemas import FINISHED, AutoRequest, AxisName, SweepExtension, SweepPoints, SweepRequest, SweepView

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0


class SweepClient:
    """Many jobs on one model; each is an ordinary job, which :class:`Client` looks at and steers."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def submit(self, config: SweepConfig | None = None, *, idempotency_key: str | None = None, **fields: Any) -> SweepView:
        """Queue a sweep: a config, axes and fields of its jobs by name, or both.

        Raises:
            ConfigError: the request makes no sense.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        body = sweep_body(config, fields)
        return parse(SweepView, self._transport.request("POST", "/v1/sweeps", retry=True, json=body, headers=headers).content)

    def get(self, sweep_id: str) -> SweepView:
        """One sweep."""
        return parse(SweepView, self._transport.request("GET", _sweep(sweep_id), retry=True).content)

    def list(self) -> Iterator[SweepView]:
        """All of them, newest first; pages are fetched as they are needed."""
        return pages(self._transport, SweepView, "/v1/sweeps")

    def wait(self, sweep_id: str, timeout: float | None = None) -> SweepView:
        """Return the sweep once all its jobs have ended; raises TimeoutError after ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = _FIRST_PAUSE
        while (sweep := self.get(sweep_id)).status not in FINISHED:
            left = pause if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{sweep_id} is still {sweep.status} after {timeout:g} seconds")
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)
        return sweep

    def extend(self, sweep_id: str, **axes: Sequence[str] | Sequence[float]) -> SweepExtension:
        """Add values of axes; those that are left out have the values they have. What is there already stays as it is."""
        body = {axis: list(values) for axis, values in axes.items()}
        return parse(SweepExtension, self._transport.request("POST", f"{_sweep(sweep_id)}/points", json=body).content)

    def points(self, sweep_id: str, *, x: AxisName | None = None, y: AxisName | None = None) -> SweepPoints:
        """What the jobs came to so far, and which are on the front of two axes."""
        return parse(SweepPoints, self._get(f"{_sweep(sweep_id)}/points", x, y).content)

    def csv(self, sweep_id: str, *, x: AxisName | None = None, y: AxisName | None = None) -> str:
        """The same as CSV, one line a point."""
        return self._get(f"{_sweep(sweep_id)}/points.csv", x, y).text

    def plot(self, sweep_id: str, *, x: AxisName | None = None, y: AxisName | None = None) -> str:
        """The same as an SVG."""
        return self._get(f"{_sweep(sweep_id)}/pareto.svg", x, y).text

    def cancel(self, sweep_id: str) -> SweepView:
        """Stop all its jobs that have not ended."""
        return self._post(sweep_id, "cancel", retry=True)

    def resume(self, sweep_id: str) -> SweepView:
        """Go on with its cancelled jobs."""
        return self._post(sweep_id, "resume")

    def retry(self, sweep_id: str) -> SweepView:
        """Try its failed jobs again, from what they have finished."""
        return self._post(sweep_id, "retry")

    def delete(self, sweep_id: str) -> None:
        """Delete it with its jobs and their files, once all have ended."""
        self._transport.request("DELETE", _sweep(sweep_id))

    def _get(self, path: str, x: AxisName | None, y: AxisName | None) -> httpx2.Response:
        params = {name: value for name, value in (("x", x), ("y", y)) if value is not None}
        return self._transport.request("GET", path, retry=True, params=params)

    def _post(self, sweep_id: str, verb: str, *, retry: bool = False) -> SweepView:
        return parse(SweepView, self._transport.request("POST", f"{_sweep(sweep_id)}/{verb}", retry=retry).content)


def sweep_body(config: SweepConfig | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are set, as JSON; those of a job are the base's. Raises ConfigError for what makes no sense."""
    base, own = _split(config, fields)
    return SweepRequest.build(base, **own).model_dump(mode="json", exclude_unset=True)


def auto_body(config: AutoConfig | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a search."""
    base, own = _split(config, fields)
    return AutoRequest.build(base, **own).model_dump(mode="json", exclude_unset=True)


def _split(config: SweepConfig | AutoConfig | None, fields: Mapping[str, Any]) -> tuple[PruneConfig, dict[str, Any]]:
    """The base, and what stands beside it."""
    of_jobs = {name: value for name, value in fields.items() if name in PruneConfig.model_fields}
    own = {name: value for name, value in fields.items() if name not in PruneConfig.model_fields}
    known = {} if config is None else {name: getattr(config, name) for name in config.model_fields_set - {"base"}}
    return PruneConfig.build(None if config is None else config.base, **of_jobs), known | own


def _sweep(sweep_id: str) -> str:
    return f"/v1/sweeps/{quote(sweep_id, safe='')}"
