"""Processes that die or stop, each at the worst moment."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from fleet import TTL, Fleet, is_alive, light_request

from llmprune_service.database import make_engine
from llmprune_service.engine import Queue
from llmprune_service.jobs import Jobs
from llmprune_service.settings import Settings


def test_a_killed_worker_s_job_goes_on_with_another(fleet: Fleet) -> None:
    """kill -9 in mid-block: its child dies with it, and a peer begins that very block within two lifetimes of a heartbeat."""
    fleet.start(2)
    job_id = fleet.submit("hang-1-1", num_blocks=4)
    child = fleet.begun(job_id, 1)
    holder, killed = fleet.holder(job_id), time.time()
    holder.kill()
    fleet.until(lambda: not is_alive(child.pid), "the child is gone", 1)
    print(f"orphan gone after {time.time() - killed:.3f} s")
    again = fleet.begun(job_id, 1, times=2)
    print(f"taken over after {again.time - killed:.1f} s")
    assert again.time - killed < 3 * TTL
    row = fleet.wait(job_id)
    fleet.check(job_id)
    assert [line.block for line in fleet.log(job_id, "begin")] == [0, 1, 1, 2, 3]
    assert (row.attempt, row.recoveries, len(fleet.events(job_id, "job.recovered"))) == (2, 1, 1)


def test_a_killed_child_is_started_again(fleet: Fleet) -> None:
    """kill -9 of a job's process: the same worker starts another, which goes on with the interrupted block."""
    fleet.start(2)
    job_id = fleet.submit("hang-1-1", num_blocks=3)
    os.kill(fleet.begun(job_id, 1).pid, signal.SIGKILL)
    row = fleet.wait(job_id)
    fleet.check(job_id)
    assert [line.block for line in fleet.log(job_id, "begin")] == [0, 1, 1, 2]
    assert (row.attempt, row.recoveries, row.retries) == (1, 0, {"killed": 1})
    assert [event.data["code"] for event in fleet.events(job_id, "job.retrying")] == ["killed"]


def test_a_job_outlives_who_submitted_it(fleet: Fleet) -> None:
    """kill -9 of the process right after it submitted: the job runs."""
    assert fleet.elsewhere(_submit_and_die) == -signal.SIGKILL
    [row] = fleet.jobs.list("default")[0]
    fleet.start()
    fleet.wait(row.id)
    fleet.check(row.id)


def test_half_a_submission_is_none(fleet: Fleet) -> None:
    """kill -9 within the submission: nothing is there, and the same key submits anew."""
    assert fleet.elsewhere(_die_submitting) == -signal.SIGKILL
    assert fleet.jobs.list("default")[0] == []
    row, is_new = fleet.jobs.submit("default", light_request(), idempotency_key="key")
    assert is_new
    fleet.start()
    fleet.wait(row.id)
    fleet.check(row.id)


def test_a_frozen_worker_does_no_harm_when_it_wakes(fleet: Fleet) -> None:
    """SIGSTOP, takeover, SIGCONT: the first worker writes nothing any more, ends its child, and is fit for the next job."""
    fleet.start(2)
    job_id = fleet.submit("hang-14-1", num_blocks=17, seconds=0.2)
    child = fleet.begun(job_id, 1)
    frozen = fleet.holder(job_id)
    fleet.freeze(frozen)
    fleet.until(lambda: fleet.row(job_id).attempt == 2, "a peer takes over")
    peer = fleet.row(job_id).worker
    fleet.until(lambda: [line for line in fleet.log(job_id, "done") if line.attempt == "1-2"], "the peer does a block")
    assert is_alive(child.pid), "the child of the frozen worker was to go on all the time"
    frozen.signal(signal.SIGCONT)
    fleet.until(lambda: not is_alive(child.pid), "the frozen worker's child is gone")
    fleet.wait(job_id)
    fleet.check(job_id, once=False)
    assert [event.data["attempt"] for event in fleet.events(job_id, "job.running")] == [1, 2]
    assert [event.data["block"] for event in fleet.events(job_id, "job.block")] == list(range(17))
    attempts = [block.attempt for block in fleet.jobs.blocks(None, job_id)]
    assert attempts == sorted(attempts) and attempts[-1] == 2
    fleet.until(lambda: fleet.runs(job_id) == [(f"{job_id}.1", "SUCCESS", peer)], "the engine has it as the peer's success")
    assert [folder.name for folder in (fleet.settings.data_dir / "artifacts" / "default" / job_id).iterdir()] == ["2"]
    for worker in fleet.workers:
        if worker is not frozen:
            worker.kill()
    fleet.wait(fleet.submit(num_blocks=1))


def test_a_job_that_kills_its_workers_is_given_up(fleet: Fleet) -> None:
    """After max_recoveries it fails instead of killing the rest of the fleet."""
    fleet.start(3, max_recoveries=1)
    job_id = fleet.submit("hang-0")
    for times in (1, 2):
        child = fleet.begun(job_id, 0, times)
        fleet.holder(job_id).kill()
        fleet.until(lambda: not is_alive(child.pid), "the child is gone, though it says nothing that would tell it", 1)
    row = fleet.wait(job_id, "failed")
    assert (row.error["code"], row.recoveries) == ("worker_lost", 1)
    fleet.check(job_id, "job.failed")
    fleet.until(lambda: [status for _, status, _ in fleet.runs(job_id)] == ["CANCELLED"], "the run is over")
    fleet.wait(fleet.submit(num_blocks=1))


def _submit_and_die(settings: Settings) -> None:
    _jobs(settings).submit("default", light_request())
    os.kill(os.getpid(), signal.SIGKILL)


def _die_submitting(settings: Settings) -> None:
    jobs = _jobs(settings)

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    jobs.queue.enqueue = die  # type: ignore[assignment,method-assign]
    jobs.submit("default", light_request(), idempotency_key="key")


def _jobs(settings: Settings) -> Jobs:
    engine = make_engine(settings.url)
    return Jobs(engine, Queue(engine), settings)
