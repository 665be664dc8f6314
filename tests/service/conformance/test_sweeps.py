"""Sweeps on both databases: queued whole or not, by whoever asks at the same moment, and run by workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fleet import Fleet

from llmprune_service.jobs import Row
from llmprune_service.problems import Problem
from llmprune_service.schemas import SweepAxes, SweepRequest
from llmprune_service.sweeps import Sweeps

LIGHT = {"num_samples": 2, "damping": 0.01, "latency": False}


@pytest.fixture
def sweeps(fleet: Fleet) -> Sweeps:
    """The sweeps of a host without workers."""
    return Sweeps(fleet.jobs)


def submit(sweeps: Sweeps, *trouble: str, key: str | None = None, **fields: Any) -> tuple[Row, bool]:
    """Queue a sweep of light jobs, by default of two."""
    axes = fields or {"sparsities": (0.5, 0.6)}
    request = SweepRequest(base={**LIGHT, "skip": trouble}, **axes)  # type: ignore[arg-type]
    points = {name: request.job(config) for name, config in request.jobs().items()}
    return sweeps.submit("default", request, points, bytes_reserved=[10] * len(points), idempotency_key=key)


def extend(sweeps: Sweeps, row: Row, *sparsities: float) -> Any:
    """Add points."""
    request = SweepRequest.model_validate({**row.config, **row.fields, **SweepAxes(sparsities=sparsities).axes})
    points = {name: request.job(config) for name, config in request.jobs().items()}
    return sweeps.extend(row, request.config, points, 10)


def test_workers_run_the_points_in_their_order(fleet: Fleet, sweeps: Sweeps) -> None:
    """Each as a job of its own; the sweep has succeeded when all have."""
    row, _ = submit(sweeps, sparsities=(0.5, 0.6, 0.7))
    fleet.start()
    jobs = sweeps.points("default", row.id)
    begun = []
    for job in jobs:
        fleet.wait(job.id)
        fleet.check(job.id)
        begun.append(fleet.log(job.id, "begin")[0].time)
    assert begun == sorted(begun)
    (view,) = sweeps.views([row])
    assert (view.status, view.counts) == ("succeeded", {"succeeded": 3}) and view.finished_at is not None


def test_one_key_makes_one_sweep(fleet: Fleet, sweeps: Sweeps) -> None:
    """Eight submissions at the same moment are one sweep, whose jobs are queued once."""
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda _: submit(sweeps, key="key"), range(8)))
    assert Counter(is_new for _, is_new in results) == {False: 7, True: 1}
    (sweep_id,) = {row.id for row, _ in results}
    jobs, _ = fleet.jobs.list(None)
    assert {(job.sweep_id, len(fleet.runs(job.id))) for job in jobs} == {(sweep_id, 1)} and len(jobs) == 2


def test_a_refused_sweep_leaves_nothing(make_fleet: Callable[..., Fleet]) -> None:
    """Neither a row, nor a place in the queue, nor the key."""
    fleet = make_fleet(max_queued=2)
    sweeps = Sweeps(fleet.jobs)
    fleet.submit()
    with pytest.raises(Problem, match="2 are to come"):
        submit(sweeps, key="key")
    assert sweeps.list(None)[0] == [] and len(fleet.jobs.list(None)[0]) == 1
    assert len(fleet.jobs.queue._client.list_workflows()) == 1
    fleet.jobs.cancel(None, fleet.jobs.list(None)[0][0].id)
    assert submit(sweeps, key="key")[1]


def test_points_that_are_added_at_once_are_added_once(sweeps: Sweeps) -> None:
    """Of two requests that saw the same sweep one is refused, and sees more when it comes again."""
    row, _ = submit(sweeps)
    extension = extend(sweeps, row, 0.6, 0.7)
    assert (extension.added, extension.known) == (("wanda-0.7",), ("wanda-0.6",))
    with pytest.raises(Problem, match="meanwhile"):
        extend(sweeps, row, 0.7)
    assert extend(sweeps, sweeps.get(None, row.id), 0.7).added == ()
    assert [job.sweep_index for job in sweeps.points(None, row.id)] == [0, 1, 2]


def test_a_running_sweep_is_cancelled_and_deleted(fleet: Fleet, sweeps: Sweeps) -> None:
    """What waits is not begun, what runs is stopped; then all of it goes at once."""
    row, _ = submit(sweeps, "hang-0")
    fleet.start()
    first, second = (job.id for job in sweeps.points(None, row.id))
    fleet.begun(first, 0)
    with pytest.raises(Problem, match="have not ended"):
        sweeps.delete("default", row.id)
    sweeps.cancel("default", row.id)
    fleet.wait(first, "cancelled")
    assert fleet.row(second).status == "cancelled" and fleet.log(second) == []
    sweeps.delete("default", row.id)
    assert fleet.jobs.list(None)[0] == [] and fleet.runs(first) == []
    with pytest.raises(Problem, match="no such sweep"):
        sweeps.get("default", row.id)


def test_the_last_jobs_deleted_at_once_take_the_sweep_along(fleet: Fleet, sweeps: Sweeps) -> None:
    """Neither leaves it to the other."""
    row, _ = submit(sweeps, key="key")
    jobs = [job.id for job in sweeps.points(None, row.id)]
    for job_id in jobs:
        fleet.jobs.cancel(None, job_id)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda job_id: fleet.jobs.delete(None, job_id), jobs))
    assert sweeps.list(None)[0] == []
    assert submit(sweeps, key="key")[1]
