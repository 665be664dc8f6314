"""Failures of a job's process, each with its own rule."""

from __future__ import annotations

import json

from fleet import Fleet


def test_a_job_may_crash_twice(standing: Fleet) -> None:
    """The third process goes on where the first two died."""
    job_id = standing.submit("crash-2-2", num_blocks=3)
    standing.wait(job_id)
    standing.check(job_id)
    assert len(standing.log(job_id, "start")) == 3


def test_a_third_crash_fails_the_job(standing: Fleet) -> None:
    """A job that crashes wherever it is started is not started for ever."""
    job_id = standing.submit("crash-1")
    assert standing.wait(job_id, "failed").error["code"] == "killed"
    standing.check(job_id, "job.failed")
    assert len(standing.log(job_id, "start")) == 3
    assert len(standing.events(job_id, "job.retrying")) == 2


def test_what_a_process_said_before_it_crashed_is_logged(standing: Fleet) -> None:
    """In the log of its worker, with the id of the job."""
    job_id = standing.submit("crash-1")
    standing.wait(job_id, "failed")
    lines = [json.loads(line) for worker in standing.workers for line in worker.log.read_text().splitlines()]
    words = [line["last_words"] for line in lines if line["level"] == "error" and line["job"] == job_id]
    assert words == ["no way on at block 1"] * 3


def test_out_of_memory_is_tried_with_half_the_batch(standing: Fleet) -> None:
    """Once, with half as many sequences a forward as there were."""
    job_id = standing.submit("oom", num_blocks=4)
    row = standing.wait(job_id)
    standing.check(job_id)
    assert (row.batch_size, row.retries) == (2, {"out_of_memory": 1})
    assert len(standing.log(job_id, "start")) == 2


def test_half_of_the_batch_the_library_chose_itself(standing: Fleet) -> None:
    """The default is what memory has room for, far below the number of sequences: half of that one is smaller."""
    job_id = standing.submit("oom-6", num_blocks=16, seconds=0.01)
    row = standing.wait(job_id)
    standing.check(job_id)
    assert row.batch_size == 3


def test_out_of_memory_is_not_tried_a_third_time(standing: Fleet) -> None:
    """A job that does not fit either way fails with what the library said."""
    job_id = standing.submit("oom-always")
    error = standing.wait(job_id, "failed").error
    assert error["code"] == "out_of_memory" and "batch of 2" in error["message"]
    standing.check(job_id, "job.failed")
    assert len(standing.log(job_id, "start")) == 2


def test_what_the_user_must_mend_is_not_tried_again(standing: Fleet) -> None:
    """The submitter's mistake fails the job at once."""
    job_id = standing.submit("gated")
    assert standing.wait(job_id, "failed").error["code"] == "gated_model"
    standing.check(job_id, "job.failed")
    assert len(standing.log(job_id, "start")) == 1
    assert not standing.events(job_id, "job.retrying")


def test_the_network_is_tried_again(standing: Fleet) -> None:
    """After a pause, and said so."""
    job_id = standing.submit("network-1")
    standing.wait(job_id)
    standing.check(job_id)
    [retrying] = standing.events(job_id, "job.retrying")
    assert retrying.data["code"] == "hub_unreachable"
    first, second = standing.log(job_id, "start")
    assert second.time - first.time >= retrying.data["seconds"] >= 1
