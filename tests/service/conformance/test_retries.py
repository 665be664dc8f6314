"""Failures of a job's process, each with its own rule."""

from __future__ import annotations

from fleet import Fleet


def test_a_job_may_crash_twice(fleet: Fleet) -> None:
    """The third process goes on where the first two died."""
    fleet.start()
    job_id = fleet.submit("crash-2-2", num_blocks=3)
    fleet.wait(job_id)
    fleet.check(job_id)
    assert len(fleet.log(job_id, "start")) == 3


def test_a_third_crash_fails_the_job(fleet: Fleet) -> None:
    """A job that crashes wherever it is started is not started for ever."""
    fleet.start()
    job_id = fleet.submit("crash-1")
    assert fleet.wait(job_id, "failed").error["code"] == "killed"
    fleet.check(job_id, "job.failed")
    assert len(fleet.log(job_id, "start")) == 3
    assert len(fleet.events(job_id, "job.retrying")) == 2


def test_out_of_memory_is_tried_with_half_the_batch(fleet: Fleet) -> None:
    """Once, with half as many sequences a forward as there were."""
    fleet.start()
    job_id = fleet.submit("oom", num_blocks=4)
    row = fleet.wait(job_id)
    fleet.check(job_id)
    assert (row.batch_size, row.retries) == (2, {"out_of_memory": 1})
    assert len(fleet.log(job_id, "start")) == 2


def test_out_of_memory_is_not_tried_a_third_time(fleet: Fleet) -> None:
    """A job that does not fit either way fails with what the library said."""
    fleet.start()
    job_id = fleet.submit("oom-always")
    error = fleet.wait(job_id, "failed").error
    assert error["code"] == "out_of_memory" and "batch of 2" in error["message"]
    fleet.check(job_id, "job.failed")
    assert len(fleet.log(job_id, "start")) == 2


def test_what_the_user_must_mend_is_not_tried_again(fleet: Fleet) -> None:
    """The submitter's mistake fails the job at once."""
    fleet.start()
    job_id = fleet.submit("gated")
    assert fleet.wait(job_id, "failed").error["code"] == "gated_model"
    fleet.check(job_id, "job.failed")
    assert len(fleet.log(job_id, "start")) == 1
    assert not fleet.events(job_id, "job.retrying")


def test_the_network_is_tried_again(fleet: Fleet) -> None:
    """After a pause, and said so."""
    fleet.start()
    job_id = fleet.submit("network-1")
    fleet.wait(job_id)
    fleet.check(job_id)
    [retrying] = fleet.events(job_id, "job.retrying")
    assert retrying.data["code"] == "hub_unreachable"
    first, second = fleet.log(job_id, "start")
    assert second.time - first.time >= retrying.data["seconds"] >= 1
