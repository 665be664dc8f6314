"""Jobs that nothing disturbs, and what their owners may do with them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fleet import TABLES_OF_JOBS, Fleet, is_alive, light_request

from llmprune_service.problems import Problem


def test_a_job_runs_to_its_report(standing: Fleet) -> None:
    """A job goes through all phases, files its blocks, and leaves the checkpoint in the store."""
    job_id = standing.submit(num_blocks=3, latency=True)
    row = standing.wait(job_id)
    standing.check(job_id)
    phases = [event.data["phase"] for event in standing.events(job_id, "job.phase")]
    assert phases == ["resolve", "fetch", "prune", "evaluate", "benchmark", "package"]
    steps = ["resolve", "fetch", "prune", "package"]
    standing.until(lambda: standing.jobs.queue.steps(job_id, 1) == steps, f"the engine knows the steps {steps}")
    assert [event.data["block"] for event in standing.events(job_id, "job.block")] == [0, 1, 2]
    assert (row.attempt, row.recoveries, row.claim, row.worker) == (1, 0, None, None)
    assert row.result["sparsity"] == 0.5


def test_two_workers_do_each_of_ten_jobs_once(standing: Fleet) -> None:
    """No job is lost, none is done twice, and both workers take part."""
    job_ids = [standing.submit(num_blocks=2, seed=seed) for seed in range(10)]
    for job_id in job_ids:
        standing.wait(job_id)
        standing.check(job_id)
        assert len(standing.log(job_id, "start")) == 1
    assert len({event.data["worker"] for job_id in job_ids for event in standing.events(job_id, "job.running")}) == 2


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


def test_a_running_job_is_cancelled_in_mid_block_and_resumed(standing: Fleet) -> None:
    """Its process is gone within a second or so; resuming it goes on with the interrupted block."""
    job_id = standing.submit("hang-1-1", num_blocks=3)
    child = standing.begun(job_id, 1)
    asked = time.monotonic()
    assert standing.jobs.cancel("default", job_id).status == "cancelling"
    standing.wait(job_id, "cancelled")
    standing.until(lambda: not is_alive(child.pid), "the child is gone")
    seconds = time.monotonic() - asked
    print(f"cancelled in mid-block within {seconds:.2f} s")
    assert seconds < 15
    standing.check(job_id, "job.cancelled")
    standing.jobs.resume("default", job_id)
    standing.wait(job_id)
    standing.check(job_id, "job.cancelled", "job.succeeded")
    assert [line.block for line in standing.log(job_id, "begin")] == [0, 1, 1, 2]


def test_a_job_that_runs_too_long_fails(standing: Fleet) -> None:
    """timeout_s ends the process of a job; the worker goes on with the next."""
    job_id = standing.submit("hang-0", timeout_s=3)
    assert standing.wait(job_id, "failed").error["code"] == "timeout"
    assert not any(is_alive(line.pid) for line in standing.log(job_id))
    standing.check(job_id, "job.failed")
    standing.wait(standing.submit(num_blocks=1))


def test_a_retried_job_keeps_its_id_and_its_blocks(standing: Fleet) -> None:
    """Three crashes fail a job; retried, it goes on with the block that failed."""
    job_id = standing.submit("crash-2-3", num_blocks=3)
    standing.wait(job_id, "failed")
    assert standing.jobs.retry("default", job_id).id == job_id
    row = standing.wait(job_id)
    standing.check(job_id, "job.failed", "job.succeeded")
    assert row.run == 2
    assert [line.block for line in standing.log(job_id, "begin")] == [0, 1, 2]


def test_a_job_retried_from_the_start_forgets_its_blocks(standing: Fleet) -> None:
    """from_start does all blocks again."""
    job_id = standing.submit("crash-2-3", num_blocks=3)
    standing.wait(job_id, "failed")
    standing.jobs.retry("default", job_id, from_start=True)
    standing.wait(job_id)
    standing.check(job_id, "job.failed", "job.succeeded", once=False)
    assert standing.done(job_id) == [0, 1, 0, 1, 2]


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


def test_deleting_a_job_leaves_nothing(standing: Fleet) -> None:
    """Rows, runs of the engine, artifacts, the journal of a cancelled job: all gone; the idempotency key is free again."""
    request = light_request(metadata={"team": "a"})
    done = standing.jobs.submit("default", request, idempotency_key="deleted")[0].id
    standing.wait(done)
    stopped = standing.submit("hang-1")
    standing.begun(stopped, 1)
    with pytest.raises(Problem, match="running"):
        standing.jobs.delete("default", stopped)
    standing.jobs.cancel("default", stopped)
    standing.wait(stopped, "cancelled")
    standing.until(lambda: all(status == "SUCCESS" for _, status, _ in standing.runs(stopped)), "the worker has let go")
    assert list(standing.settings.data_dir.rglob(f"*{stopped}*"))
    for job_id in (done, stopped):
        standing.jobs.delete("default", job_id)
        assert [standing.count(table, job_id) for table in TABLES_OF_JOBS] == [0] * len(TABLES_OF_JOBS)
        assert standing.runs(job_id) == []
        assert not list(standing.settings.data_dir.rglob(f"*{job_id}*"))
        with pytest.raises(Problem, match="no such job"):
            standing.row(job_id)
    again, is_new = standing.jobs.submit("default", request, idempotency_key="deleted")
    assert is_new
    standing.wait(again.id)


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
    job_id = first.submit(num_blocks=4, seconds=0.4)
    first.until(
        lambda: any("record.json" in files for folder, _, files in os.walk(bucket) if folder.endswith("block-00001")),
        "two blocks are copied to the bucket",
    )
    first.holder(job_id).kill()
    second.start()
    second.wait(job_id)
    assert [line.block for line in second.log(job_id, "begin")] == [2, 3]
    second.check_events(job_id)
    second.check_result(job_id)
    # os.walk, as what is being deleted may go while it is looked at
    second.until(
        lambda: all("journal" not in folders for _, folders, _ in os.walk(bucket)), "the bucket keeps the result alone"
    )
    assert (first.settings.work_dir / job_id).exists()
    first.start()
    first.until(lambda: not (first.settings.work_dir / job_id).exists(), "the first host has cleaned up")
