"""The database goes away while a job runs, for longer than a heartbeat lives."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from fleet import TTL, Fleet


def test_a_running_job_outlives_an_outage(fleet: Fleet, database_away: Callable[[], AbstractContextManager[None]]) -> None:
    """Its child works on, its worker waits, and nobody takes it for dead afterwards."""
    fleet.start(2)
    job_id = fleet.submit(num_blocks=18, seconds=0.25)
    fleet.begun(job_id, 1)
    with database_away():
        time.sleep(2 * TTL)
    row = fleet.wait(job_id)
    fleet.check(job_id)
    assert (row.attempt, row.recoveries) == (1, 0)
    assert len(fleet.log(job_id, "start")) == 1
    fleet.wait(fleet.submit(num_blocks=1))


def test_a_worker_that_dies_in_an_outage_loses_nothing(
    fleet: Fleet, database_away: Callable[[], AbstractContextManager[None]]
) -> None:
    """What its child did meanwhile is found by the worker that takes over."""
    fleet.start(2)
    job_id = fleet.submit("hang-5-1", num_blocks=8, seconds=0.2)
    fleet.begun(job_id, 1)
    worker = fleet.holder(job_id)
    with database_away():
        fleet.begun(job_id, 5)
        worker.kill()
    row = fleet.wait(job_id)
    fleet.check(job_id)
    assert [line.block for line in fleet.log(job_id, "begin")] == [0, 1, 2, 3, 4, 5, 5, 6, 7]
    assert (row.attempt, row.recoveries) == (2, 1)


def test_a_result_that_nobody_told_of_is_found(fleet: Fleet, database_away: Callable[[], AbstractContextManager[None]]) -> None:
    """A child that ends in an outage, and whose worker dies then, has done its job: the next attempt takes its checkpoint."""
    fleet.start(2)
    job_id = fleet.submit(num_blocks=6, seconds=0.2)
    fleet.begun(job_id, 1)
    worker = fleet.holder(job_id)
    with database_away():
        fleet.until(lambda: fleet.log(job_id, "end"), "the child is done")
        worker.kill()
    row = fleet.wait(job_id)
    fleet.check(job_id)
    assert (row.attempt, row.recoveries) == (2, 1)
    assert [line.block for line in fleet.log(job_id, "begin")] == list(range(6))
