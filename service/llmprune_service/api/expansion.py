"""A sweep's submission as jobs: each checked as if it had come alone, with errors that point into the sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmprune.sweep_spec import AXES, FIELD_OF, SweepConfig
from llmprune_service import policy
from llmprune_service.api.admission import bytes_needed, check_disk, pointing_into, resolve
from llmprune_service.jobs import Row
from llmprune_service.schemas import JobRequest, SweepAxes, SweepRequest
from llmprune_service.settings import Settings
from llmprune_service.sweeps import check_number

_SPARE = 10
"""Combinations of values may be so many times the points there may be: some are no job, or the same one."""


@dataclass(frozen=True)
class Expansion:
    """The jobs of a sweep by the names of its points, the commit they read, and the disk space they need."""

    points: Mapping[str, JobRequest]
    revision: str | None
    bytes_first: int
    bytes_each: int


def expand(request: SweepRequest, tenant: str, settings: Settings, *, revision: str | None = None) -> Expansion:
    """What a submission asks for, of the model's commit ``revision`` where that is fixed.

    Raises:
        Problem: 422 for too many points and for what this service does not do, 503 hub-unreachable, 507 disk-full.
        ConfigError: no point makes sense, or a value of an axis is in none.
    """
    most = math.prod(len(getattr(request, axis)) or 1 for axis in AXES)
    if most > _SPARE * settings.max_sweep_points:
        check_number(most, settings)
    jobs = {name: request.job(config) for name, config in request.jobs(max_points=most).items()}
    check_number(len(jobs), settings)
    policy.check_all(request, jobs.values(), settings)
    first = next(iter(jobs.values()))
    with pointing_into(request):
        resolved = resolve(first.model_copy(update={"revision": revision or first.revision}), tenant, settings)
    bytes_first, bytes_each = bytes_needed(resolved), bytes_needed(resolved, there=True)
    check_disk(settings, bytes_first + bytes_each * (len(jobs) - 1))
    return Expansion(jobs, resolved.revision, bytes_first, bytes_each)


def extended(row: Row, axes: SweepAxes) -> tuple[SweepRequest, SweepConfig]:
    """What further values ask for, and what the sweep is asked for with them."""
    config = SweepConfig.model_validate(row.config)
    given = {axis: values for axis, values in axes.axes.items() if values}
    union = {axis: tuple(dict.fromkeys((*_values(config, axis), *values))) for axis, values in given.items()}
    asked = SweepRequest.model_validate({**row.config, **row.fields, **given})
    return asked, SweepConfig.model_validate({**row.config, **union})


def _values(config: SweepConfig, axis: str) -> tuple[Any, ...]:
    """The values an axis has: where it was not given, the one of the base."""
    of_base = getattr(config.base, FIELD_OF[axis])
    values: tuple[Any, ...] = getattr(config, axis)
    return values or (() if of_base is None else (of_base,))
