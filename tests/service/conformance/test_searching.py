"""Searches within a budget, on both databases: one job, whatever it tries, and what it has tried is not tried again."""

from __future__ import annotations

import json
from typing import Any

from fleet import Fleet

from llmprune_service.schemas import AutoRequest


def submit(fleet: Fleet, *trouble: str, num_trials: int = 3, seconds: float = 0.02, **fields: Any) -> str:
    """Queue a light search."""
    base = {"num_samples": num_trials, "damping": seconds, "skip": trouble, "latency": False}
    request = AutoRequest(**{"base": base, "max_kl": 0.1, **fields})
    return str(fleet.jobs.submit("default", request)[0].id)


def test_a_search_is_one_job(standing: Fleet) -> None:
    """Its events say what it tries; its result is the best model, with the search beside the checkpoint."""
    job_id = submit(standing)
    row = standing.wait(job_id)
    standing.check_events(job_id)
    assert (row.kind, row.method, row.phase) == ("auto", "auto", "package")
    tried = [event.data for event in standing.events(job_id, "job.point")]
    assert [(point["index"], point["name"], point["reused"]) for point in tried] == [
        (0, "wanda-0.0", False), (1, "wanda-0.1", False), (2, "wanda-0.2", False),
    ]  # fmt: skip
    assert tried[0]["values"] == {"sparsity": 0.5, "perplexity": "inf"}
    assert row.result["search"] == {
        "text": "wanda-0.1 is the sparsest within the budget.", "objective": "sparsity", "binding": [], "num_trials": 3,
    }  # fmt: skip
    files = {artifact.name for artifact in standing.jobs.artifacts(None, job_id)}
    assert files == {"model.safetensors", "report.json", "llmprune.json", "auto.json", "auto.html"}
    assert len(json.loads(standing.read(job_id, "auto.json"))["trials"]) == 3
    assert standing.jobs.report(None, job_id) is not None
    assert standing.done(job_id) == [0, 1, 2] and standing.jobs.blocks(None, job_id) == []
    standing.until(lambda: not (standing.settings.work_dir / job_id).exists(), "the working directory is gone")


def test_what_was_tried_outlives_the_process(standing: Fleet) -> None:
    """It crashes in the third trial, and is started again."""
    job_id = submit(standing, "crash-2-1")
    standing.wait(job_id)
    standing.check_events(job_id)
    assert standing.done(job_id) == [0, 1, 2]
    assert [event.data["reused"] for event in standing.events(job_id, "job.point")][-3:] == [True, True, False]


def test_what_was_tried_outlives_the_worker(fleet: Fleet) -> None:
    """Another attempt finds it, in a directory of its own."""
    (worker,) = fleet.start()
    job_id = submit(fleet, "hang-1-1")
    fleet.begun(job_id, 1)
    worker.kill()
    fleet.start()
    row = fleet.wait(job_id)
    assert (row.attempt, fleet.done(job_id)) == (2, [0, 1, 2])


def test_a_budget_that_nothing_meets_fails_the_job(standing: Fleet) -> None:
    """At once, with how close it came, and with all that was tried."""
    job_id = submit(standing, "unmet")
    row = standing.wait(job_id, "failed")
    standing.check_events(job_id, "job.failed")
    assert row.error == {"code": "budget_not_met", "message": "Nothing met the budget; the nearest is wanda-0.1."}
    assert {artifact.name for artifact in standing.jobs.artifacts(None, job_id)} == {"auto.json", "auto.html"}
    assert json.loads(standing.read(job_id, "auto.json"))["best"] is None
    assert len(standing.log(job_id, "start")) == 1


def test_a_search_is_cancelled(standing: Fleet) -> None:
    """In the middle of a trial; resumed, it goes on after the last one."""
    job_id = submit(standing, "hang-1-1")
    standing.begun(job_id, 1)
    standing.jobs.cancel(None, job_id)
    standing.wait(job_id, "cancelled")
    standing.jobs.resume(None, job_id)
    standing.wait(job_id)
    assert standing.done(job_id) == [0, 1, 2]


def test_a_search_from_the_database_is_checked_again(standing: Fleet) -> None:
    """By the worker, as any job."""
    job_id = submit(standing, methods=("wonder",))
    assert "base" not in (error := standing.wait(job_id, "failed").error)["message"]
    assert error["code"] == "invalid_config" and "wonder" in error["message"]
