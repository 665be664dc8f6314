"""Jobs that nothing disturbs, and what their owners may do with them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fleet import TABLES_OF_JOBS, Fleet, is_alive
from llmprune_service.problems import Problem


def test_a_job_runs_to_its_report(fleet: Fleet) -> None:
    """A job goes through all phases, files its blocks, and leaves the checkpoint in the store."""
    fleet.start()
    job_id = fleet.submit(num_blocks=3, latency=True)
    row = fleet.wait(job_id)
    fleet.check(job_id)
    phases = [event.data["phase"] for event in fleet.events(job_id, "job.phase")]
    assert phases == ["resolve", "fetch", "prune", "evaluate", "benchmark", "package"]
    assert fleet.jobs.queue.steps(job_id, 1) == ["resolve", "fetch", "prune", "package"]
    assert [event.data["block"] for event in fleet.events(job_id, "job.block")] == [0, 1, 2]
    assert (row.attempt, row.recoveries, row.claim, row.worker) == (1, 0, None, None)
    assert row.result["sparsity"] == 0.5


def test_two_workers_do_each_of_ten_jobs_once(fleet: Fleet) -> None:
    """No job is lost, none is done twice, and both workers take part."""
    fleet.start(2)
    job_ids = [fleet.submit(num_blocks=2, seed=seed) for seed in range(10)]
    for job_id in job_ids:
        fleet.wait(job_id)
        fleet.check(job_id)
        assert len(fleet.log(job_id, "start")) == 1
    assert len({event.data["worker"] for job_id in job_ids for event in fleet.events(job_id, "job.running")}) == 2


def test_a_queued_job_is_cancelled_at_once(fleet: Fleet) -> None:
    """It never runs; repeating the cancellation changes nothing; a resumed one runs."""
    cancelled, other = fleet.submit(), fleet.submit()
    for _ in range(2):
        assert fleet.jobs.cancel("default", cancelled).status == "cancelled"
    fleet.check(cancelled, "job.cancelled")
    fleet.start()
    fleet.wait(other)
    assert not fleet.log(cancelled)
    fleet.jobs.resume("default", cancelled)
    fleet.wait(cancelled)
    fleet.check(cancelled, "job.cancelled", "job.succeeded")
    with pytest.raises(Problem, match="succeeded"):
        fleet.jobs.cancel("default", cancelled)


def test_a_running_job_is_cancelled_in_mid_block_and_resumed(fleet: Fleet) -> None:
    """Its process is gone within a second or so; resuming it goes on with the interrupted block."""
    fleet.start()
    job_id = fleet.submit(num_blocks=3, seconds=1.0)
    child = fleet.begun(job_id, 1)
    asked = time.monotonic()
    assert fleet.jobs.cancel("default", job_id).status == "cancelling"
    fleet.wait(job_id, "cancelled")
    fleet.until(lambda: not is_alive(child.pid), "the child is gone")
    seconds = time.monotonic() - asked
    print(f"cancelled in mid-block within {seconds:.2f} s")
    assert seconds < 3
    fleet.check(job_id, "job.cancelled")
    fleet.jobs.resume("default", job_id)
    fleet.wait(job_id)
    fleet.check(job_id, "job.cancelled", "job.succeeded")
    assert [line.block for line in fleet.log(job_id, "begin")] == [0, 1, 1, 2]


def test_a_job_that_runs_too_long_fails(fleet: Fleet) -> None:
    """timeout_s ends the process of a job; the worker goes on with the next."""
    fleet.start()
    job_id = fleet.submit("hang-1", timeout_s=1)
    child = fleet.begun(job_id, 1)
    assert fleet.wait(job_id, "failed").error["code"] == "timeout"
    assert not is_alive(child.pid)
    fleet.check(job_id, "job.failed")
    fleet.wait(fleet.submit(num_blocks=1))


def test_a_retried_job_keeps_its_id_and_its_blocks(fleet: Fleet) -> None:
    """Three crashes fail a job; retried, it goes on with the block that failed."""
    fleet.start()
    job_id = fleet.submit("crash-2-3", num_blocks=3)
    fleet.wait(job_id, "failed")
    assert fleet.jobs.retry("default", job_id).id == job_id
    row = fleet.wait(job_id)
    fleet.check(job_id, "job.failed", "job.succeeded")
    assert row.run == 2
    assert [line.block for line in fleet.log(job_id, "begin")] == [0, 1, 2]


def test_a_job_retried_from_the_start_forgets_its_blocks(fleet: Fleet) -> None:
    """from_start does all blocks again."""
    fleet.start()
    job_id = fleet.submit("crash-2-3", num_blocks=3)
    fleet.wait(job_id, "failed")
    fleet.jobs.retry("default", job_id, from_start=True)
    fleet.wait(job_id)
    fleet.check(job_id, "job.failed", "job.succeeded", once=False)
    assert fleet.done(job_id) == [0, 1, 0, 1, 2]


def test_a_full_disk_fails_jobs_before_they_begin(fleet: Fleet) -> None:
    """Below the floor nothing runs; with room again, a retry does."""
    worker = fleet.start(disk_floor_bytes=10**18)[0]
    job_id = fleet.submit()
    assert fleet.wait(job_id, "failed").error["code"] == "disk_full"
    assert not fleet.log(job_id)
    worker.kill()
    fleet.start()
    fleet.jobs.retry("default", job_id)
    fleet.wait(job_id)
    fleet.check(job_id, "job.failed", "job.succeeded")


def test_deleting_a_job_leaves_nothing(fleet: Fleet) -> None:
    """Rows, runs of the engine, artifacts, the journal of a cancelled job: all gone; the idempotency key is free again."""
    fleet.start()
    done = fleet.submit(metadata={"team": "a"})
    fleet.wait(done)
    stopped = fleet.submit("hang-1")
    fleet.begun(stopped, 1)
    with pytest.raises(Problem, match="running"):
        fleet.jobs.delete("default", stopped)
    fleet.jobs.cancel("default", stopped)
    fleet.wait(stopped, "cancelled")
    fleet.until(lambda: all(status == "SUCCESS" for _, status, _ in fleet.runs(stopped)), "the worker has let go")
    assert list(fleet.settings.data_dir.rglob(f"*{stopped}*"))
    for job_id in (done, stopped):
        fleet.jobs.delete("default", job_id)
        assert [fleet.count(table, job_id) for table in TABLES_OF_JOBS] == [0] * len(TABLES_OF_JOBS)
        assert fleet.runs(job_id) == []
        assert not list(fleet.settings.data_dir.rglob(f"*{job_id}*"))
        with pytest.raises(Problem, match="no such job"):
            fleet.row(job_id)


def test_artifacts_go_to_the_store_the_url_names(make_fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    """LLMPRUNE_STORE_URL moves them out of the data directory."""
    fleet = make_fleet(store_url=f"file://{tmp_path / 'second'}")
    fleet.start()
    job_id = fleet.submit()
    fleet.wait(job_id)
    fleet.check(job_id)
    assert (tmp_path / "second" / "default" / job_id / "1" / "model.safetensors").is_file()
    assert not (fleet.settings.data_dir / "artifacts").exists()


def test_another_host_goes_on_from_a_shared_store(make_fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    """With a store that is no directory of one host, a job moves to a host that shares nothing else."""
    bucket = tmp_path / "bucket"
    first, second = (make_fleet(name, store_url=f"dir::file://{bucket}") for name in ("first", "second"))
    first.start()
    job_id = first.submit(num_blocks=4, seconds=0.5)
    copied = bucket / "default" / job_id / "journal" / "1" / "block-00001" / "record.json"
    first.until(copied.exists, "two blocks are copied to the bucket")
    first.holder(job_id).kill()
    second.start()
    second.wait(job_id)
    assert [line.block for line in second.log(job_id, "begin")] == [2, 3]
    second.check_events(job_id)
    second.check_result(job_id)
