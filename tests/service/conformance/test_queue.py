"""Submitting, the order of the queue, and workers that leave it."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from fleet import Fleet, light_request

from llmprune_service import engine
from llmprune_service.problems import Problem
from llmprune_service.schemas import JobPatch


def test_one_key_makes_one_job(fleet: Fleet) -> None:
    """Eight submissions at the same moment with one idempotency key are one job, which one of them made."""
    with ThreadPoolExecutor(8) as threads:
        submit = lambda _: fleet.jobs.submit("default", light_request(), idempotency_key="key")
        results = list(threads.map(submit, range(8)))
    assert sorted(is_new for _, is_new in results) == [False] * 7 + [True]
    [job_id] = {row.id for row, _ in results}
    assert [row.id for row in fleet.jobs.list(None)[0]] == [job_id]
    assert len(fleet.runs(job_id)) == 1
    with pytest.raises(Problem) as caught:
        fleet.jobs.submit("default", light_request(seed=1), idempotency_key="key")
    assert (caught.value.status, caught.value.code) == (422, "idempotency-key-reused")
    assert fleet.jobs.submit("other", light_request(seed=1), idempotency_key="key")[1], "keys are the tenant's own"


def test_priority_goes_first(fleet: Fleet) -> None:
    """Jobs of priority 9 run before those of 0 that were queued earlier; equal ones in the order they came."""
    job_ids = [fleet.submit(num_blocks=1, seconds=0.01, priority=priority) for priority in (0, 0, 9, 9)]
    fleet.start()
    assert _order(fleet, job_ids) == [2, 3, 0, 1]


def test_a_queued_job_is_moved_by_its_priority(fleet: Fleet) -> None:
    """Raising the priority of a job that waits moves it forward; one that runs cannot be moved."""
    job_ids = [fleet.submit(num_blocks=1, seconds=0.01) for _ in range(3)]
    assert fleet.jobs.patch("default", job_ids[2], JobPatch(priority=9)).priority == 9
    assert fleet.jobs.patch("default", job_ids[0], JobPatch(priority=0, metadata={"team": "a"})).metadata == {"team": "a"}
    fleet.start()
    assert _order(fleet, job_ids) == [2, 1, 0]
    running = fleet.submit("hang-0")
    fleet.begun(running, 0)
    with pytest.raises(Problem, match="running"):
        fleet.jobs.patch("default", running, JobPatch(priority=9))


def test_a_drained_worker_finishes_its_job(fleet: Fleet) -> None:
    """It takes no other, says goodbye, and exits with 0."""
    [worker] = fleet.start()
    first, second = fleet.submit(num_blocks=4, seconds=0.2), fleet.submit(num_blocks=1)
    fleet.begun(first, 1)
    [row] = fleet.jobs.workers()
    assert fleet.jobs.drain(row.id).draining
    assert worker.wait() == 0
    assert fleet.row(first).status == "succeeded"
    fleet.check(first)
    assert (fleet.row(second).status, fleet.log(second), fleet.jobs.workers()) == ("queued", [], [])
    fleet.start()
    fleet.wait(second)
    fleet.check(second)


def test_sigterm_finishes_the_block(fleet: Fleet) -> None:
    """The worker ends after the block it is at, and another goes on: nothing is done twice, nobody counts as lost."""
    fleet.start(2)
    job_id = fleet.submit(num_blocks=4, seconds=0.3)
    fleet.begun(job_id, 1)
    worker = fleet.holder(job_id)
    worker.signal(signal.SIGTERM)
    assert worker.wait(5) == 0
    row = fleet.wait(job_id)
    fleet.check(job_id)
    assert (row.attempt, row.recoveries) == (2, 0)


def test_a_block_longer_than_the_grace_is_given_up(fleet: Fleet) -> None:
    """A worker that is told to end waits for a block no longer than drain_seconds."""
    worker = fleet.start(drain_seconds=0.5)[0]
    job_id = fleet.submit("hang-1")
    fleet.begun(job_id, 1)
    worker.signal(signal.SIGTERM)
    assert worker.wait(5) == 0
    row = fleet.row(job_id)
    assert (row.status, row.recoveries, fleet.done(job_id)) == ("running", 0, [0])
    fleet.start()
    fleet.begun(job_id, 1, times=2)
    assert fleet.row(job_id).attempt == 2


def test_jobs_survive_a_new_version_of_the_contract(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was queued and what ran under an older version goes on under the new one, where it was."""
    monkeypatch.setattr(engine, "VERSION", "0")
    running, queued = fleet.submit("hang-1-1", num_blocks=4), fleet.submit(num_blocks=1)
    monkeypatch.undo()
    [old] = fleet.start(version="0")
    fleet.begun(running, 1)
    old.kill()
    fleet.start()
    for job_id in (running, queued):
        fleet.wait(job_id)
        fleet.check(job_id)
    assert [line.block for line in fleet.log(running, "begin")] == [0, 1, 1, 2, 3]


def test_two_versions_do_not_fight_over_jobs(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """While workers of an older and a newer release run side by side, neither takes what the other one is doing."""
    fleet.start(version="0")
    fleet.start()
    newer = [fleet.submit(num_blocks=5, seconds=0.2) for _ in range(2)]
    monkeypatch.setattr(engine, "VERSION", "0")
    older = fleet.submit(num_blocks=5, seconds=0.2)
    for job_id in (*newer, older):
        row = fleet.wait(job_id)
        fleet.check(job_id)
        assert (row.run, row.attempt) == (1, 1)


def _order(fleet: Fleet, job_ids: list[str]) -> list[int]:
    """Positions of the jobs in the order they were begun, once all have succeeded."""
    begun = []
    for job_id in job_ids:
        fleet.wait(job_id)
        fleet.check(job_id)
        begun.append(fleet.log(job_id, "begin")[0].time)
    return sorted(range(len(job_ids)), key=begun.__getitem__)
