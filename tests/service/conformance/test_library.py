"""The real library under a real worker: the light child of the other tests stands in for nothing that is not so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet

import llmprune
import tiny
from llmprune_service.schemas import JobRequest, SweepRequest
from llmprune_service.sweeps import Sweeps

NUM_BLOCKS = 20


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A job on a random model of many blocks, all from local files."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, seed in (("calibration.txt", 1), ("evaluation.txt", 2)):
        (folder / name).write_text(tiny.prose(6000, seed=seed))
    model = tiny.save(tiny.make_model(num_hidden_layers=NUM_BLOCKS), folder / "model")
    return {
        "model": str(model), "method": "sparsegpt", "calibration": str(folder / "calibration.txt"), "num_samples": 64,
        "eval": [str(folder / "evaluation.txt")], "seq_len": 64, "batch_size": 16, "max_eval_tokens": 512, "latency": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def weights(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The checkpoint of the same job without a service."""
    out = tmp_path_factory.mktemp("direct") / "checkpoint"
    llmprune.prune(**config, out=out)
    return {file.name: file.read_bytes() for file in out.glob("*.safetensors")}


@pytest.fixture
def fleet(tmp_path: Path, sqlite_url: str, config: dict[str, Any]) -> Iterator[Fleet]:
    """A service whose jobs run the real library."""
    fleet = Fleet(tmp_path / "host", sqlite_url, job_python=sys.executable, model_roots=Path(config["model"]).parent)
    yield fleet
    fleet.close()


def test_a_job_is_the_library_s(fleet: Fleet, config: dict[str, Any], weights: dict[str, bytes]) -> None:
    """Same bytes as from `llmprune.prune`; phases, blocks and report are those of the library's events."""
    fleet.start()
    job_id = fleet.jobs.submit("default", JobRequest(**config))[0].id
    row = fleet.wait(job_id, seconds=120)
    _check(fleet, job_id, weights)
    phases = [event.data["phase"] for event in fleet.events(job_id, "job.phase")]
    assert phases == ["resolve", "fetch", "prune", "evaluate", "package"]
    blocks = fleet.jobs.blocks(None, job_id)
    assert all(block.sha256 and block.seconds > 0 and 0 < block.error < 1 and block.sparsity == 0.5 for block in blocks)
    report = fleet.jobs.report(None, job_id)
    assert report is not None and len(report["blocks"]) == NUM_BLOCKS and not report["resumed"]
    assert row.result["ratio"] > 0


def test_a_packed_job_is_benchmarked_and_its_checkpoint_is_smaller(
    fleet: Fleet, config: dict[str, Any], weights: dict[str, bytes]
) -> None:
    """`export` reaches the library, and its stage of measuring speed is the phase of that name."""
    fleet.start()
    few = {"num_samples": 4, "method": "magnitude", "pattern": "2:4", "export": "packed", "latency": True}
    job_id = fleet.jobs.submit("default", JobRequest(**(config | few)))[0].id
    fleet.wait(job_id, seconds=120)
    phases = [event.data["phase"] for event in fleet.events(job_id, "job.phase")]
    assert phases == ["resolve", "fetch", "prune", "evaluate", "benchmark", "package"]
    report = fleet.jobs.report(None, job_id)
    assert report is not None and report["packed"]["num_two_four"] > 0 and report["benchmark"]["dense"]
    assert report["checkpoint_bytes"] < 0.9 * sum(map(len, weights.values()))


def test_a_job_of_a_killed_worker_is_the_library_s_too(fleet: Fleet, config: dict[str, Any], weights: dict[str, bytes]) -> None:
    """kill -9 of the worker after the first blocks: another one goes on after them, and the bytes are the same."""
    fleet.start(2)
    job_id = fleet.jobs.submit("default", JobRequest(**config))[0].id
    fleet.until(lambda: fleet.jobs.blocks(None, job_id), "the first block is done", 120)
    fleet.holder(job_id).kill()
    row = fleet.wait(job_id, seconds=120)
    _check(fleet, job_id, weights)
    report = fleet.jobs.report(None, job_id)
    assert report is not None and (row.attempt, row.recoveries, report["resumed"]) == (2, 1, True)
    resumed_at = [event.data["done"] for event in fleet.events(job_id, "job.progress") if event.data["stage"] == "prune"]
    assert any(0 < done < NUM_BLOCKS for done in resumed_at)
    attempts = [block.attempt for block in fleet.jobs.blocks(None, job_id)]
    assert attempts == sorted(attempts) and set(attempts) == {1, 2}


def test_the_jobs_of_a_sweep_share_their_statistics(fleet: Fleet, config: dict[str, Any]) -> None:
    """The one that needs most is the first to run, and another one finds in the tenant's cache what it collected."""
    cheap = {"num_samples": 4, "batch_size": 4, "eval": []}
    base = {name: value for name, value in (config | cheap).items() if name != "method"}
    request = SweepRequest(base=base, methods=("wanda", "sparsegpt"))  # type: ignore[arg-type]
    points = {name: request.job(point) for name, point in request.jobs().items()}
    sweeps = Sweeps(fleet.jobs)
    row, _ = sweeps.submit("default", request, points, bytes_reserved=[0, 0])
    fleet.start()
    wanda, sparsegpt = (fleet.wait(job.id, seconds=120) for job in sweeps.points(None, row.id))
    assert (wanda.point, sparsegpt.point) == ("wanda-0.5", "sparsegpt-0.5")
    assert sparsegpt.finished_at < wanda.started_at
    for job, num_reused in ((sparsegpt, 0), (wanda, NUM_BLOCKS)):
        report = fleet.jobs.report(None, job.id)
        assert report is not None and [stage["num_reused"] for stage in report["statistics"]] == [num_reused]
        assert job.result["values"]["sparsity"] == pytest.approx(0.5)
    assert list((fleet.settings.cache_dir / "default").iterdir())


def _check(fleet: Fleet, job_id: str, weights: dict[str, bytes]) -> None:
    fleet.check_events(job_id)
    assert weights and {name: fleet.read(job_id, name) for name in weights} == weights
    assert [block.block for block in fleet.jobs.blocks(None, job_id)] == list(range(NUM_BLOCKS))
    assert [event.data["block"] for event in fleet.events(job_id, "job.block")] == list(range(NUM_BLOCKS))
    fleet.until(lambda: not (fleet.settings.work_dir / job_id).exists(), "the working directory is gone")
