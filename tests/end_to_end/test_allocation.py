"""Allocations through the whole job: what is reached, what is reported, what is refused, and what a resumed run does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmprune
import tiny
from llmprune.allocate import ALLOCATORS
from llmprune.errors import ConfigError
from llmprune.events import BlockStarted, Progress, StageFinished, StageStarted
from llmprune.io.journal import Journal
from llmprune.report import Report
from llmprune.spec import PruneConfig

OTHERS = [name for name in ALLOCATORS if name != "uniform"]
STAGES = ["load", "calibration", "dense", "allocate", "prune", "pruned", "save"]


@pytest.fixture(scope="module")
def job(tiny_model_dir: Path, text_file: Path, eval_file: Path) -> dict[str, Any]:
    """A quick and offline job."""
    return {
        "model": str(tiny_model_dir),
        "calibration": str(text_file),
        "eval": str(eval_file),
        **tiny.QUICK,
        "evolution_generations": 3,
    }


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("allocation", OTHERS)
def test_targets_are_reached(job: dict[str, Any], allocation: str, method: str) -> None:
    """Every site has the very number of zeros it was given, and all together those of the target."""
    report = llmprune.prune(**job, method=method, sparsity=0.7, allocation=allocation)
    assert [stage.name for stage in report.stages] == STAGES[:-1]
    assert report.allocation is not None and report.allocation.name == allocation
    sites = [site for block in report.blocks for site in block.sites]
    assert len(sites) == 14
    assert {site.name: site.sparsity for site in sites} == report.allocation.sparsities
    assert all(site.target == site.sparsity for site in sites)
    assert sum(site.num_zeros for site in sites) == report.allocation.num_zeros
    unit = 1 if method != "wanda" else 32
    assert abs(report.allocation.num_zeros - 0.7 * report.allocation.numel) <= unit / 2
    assert report.sparsity == report.allocation.sparsity
    assert report.allocation.max_sparsity > report.allocation.min_sparsity


@pytest.mark.parametrize("allocation", OTHERS)
def test_experts(moe_model_dir: Path, job: dict[str, Any], allocation: str) -> None:
    """A mixture is shared too, and dp gives the experts of one parameter one sparsity, up to rounding."""
    report = llmprune.prune(**{**job, "model": str(moe_model_dir)}, sparsity=0.6, allocation=allocation, scope="matrix")
    assert report.allocation is not None and abs(report.sparsity - 0.6) < 1e-4
    if allocation == "dp":
        experts = [value for name, value in report.allocation.sparsities.items() if ".0.mlp.experts.down_proj." in name]
        assert len(experts) == 4 and max(experts) - min(experts) < 0.01


def test_uniform_is_what_it_was(job: dict[str, Any], tmp_path: Path) -> None:
    """Asked for or not: the same bytes, no stage, no allocation in the report; every site's target is the config's."""
    by_default = llmprune.prune(**job, out=tmp_path / "one", method="sparsegpt")
    asked = llmprune.prune(**job, out=tmp_path / "two", method="sparsegpt", allocation="uniform")
    assert asked.allocation is None and by_default.config == asked.config
    assert {site.target for block in asked.blocks for site in block.sites} == {0.5}
    assert "allocate" not in [stage.name for stage in asked.stages]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("allocation", OTHERS)
def test_a_resumed_run_prunes_to_the_same_counts(job: dict[str, Any], tmp_path: Path, allocation: str) -> None:
    """Stopped before, within and after the allocation: the same bytes as a run that went through; the survey is not
    repeated once it is recorded.
    """
    how = {**job, "allocation": allocation, "sparsity": 0.6}
    whole = llmprune.prune(**how, out=tmp_path / "whole")
    for number, stop in enumerate((
        lambda event: isinstance(event, StageStarted) and event.stage == "allocate",
        lambda event: isinstance(event, StageFinished) and event.stage == "allocate",
        lambda event: isinstance(event, BlockStarted) and event.block == 1,
    )):  # fmt: skip
        out = tmp_path / f"out{number}"
        run = llmprune.prune_iter(**how, out=out)
        assert any(stop(event) for event in run)
        run.close()  # type: ignore[attr-defined]
        recorded = Journal(tmp_path / f"out{number}.work").has("allocation")
        assert recorded == (number > 0)
        events = list(llmprune.prune_iter(**how, out=out, resume=True))
        steps = [event for event in events if isinstance(event, Progress) and event.stage == "allocate"]
        assert not (recorded and steps)
        started = next(event for event in events if isinstance(event, StageStarted) and event.stage == "allocate")
        assert started.resumed_at == (started.total if recorded else 0)
        report: Report = events[-1].report  # type: ignore[union-attr]
        assert report.resumed and report.allocation == whole.allocation
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_journal_of_another_allocation_is_refused(job: dict[str, Any], tmp_path: Path) -> None:
    """The allocation is part of what a run is."""
    run = llmprune.prune_iter(**job, out=tmp_path / "out", allocation="owl")
    assert any(isinstance(event, BlockStarted) and event.block == 1 for event in run)
    run.close()  # type: ignore[attr-defined]
    with pytest.raises(llmprune.errors.ResumeRefused, match=r"config\.allocation = 'owl', not 'erk'"):
        llmprune.prune(**job, out=tmp_path / "out", allocation="erk", resume=True)


def test_patterns_take_uniform_alone() -> None:
    """n:m fixes every site's sparsity: refused with the remedy, from the config alone."""
    with pytest.raises(ConfigError, match=r"2:4 fixes the sparsity .* Drop --allocation"):
        PruneConfig.build(pattern="2:4", allocation="owl")
    assert PruneConfig.build(pattern="2:4", allocation="uniform").sparsity == 0.5


def test_a_budget_that_cannot_be_met_is_refused_before_the_calibration(job: dict[str, Any]) -> None:
    """By the job and by the plan, naming the closest one that can."""
    how = {**job, "allocation": "owl", "sparsity": 0.995}
    with pytest.raises(ConfigError, match=r"closest feasible one is 0\.9\d+"):
        llmprune.plan(**how)
    started = []
    with pytest.raises(ConfigError, match=r"closest feasible one is 0\.9\d+"):
        started += [event.stage for event in llmprune.prune_iter(**how) if isinstance(event, StageStarted)]
    assert "calibration" not in started


@pytest.mark.parametrize("allocation", OTHERS)
def test_the_plan_foresees_the_stage(job: dict[str, Any], allocation: str) -> None:
    """Its time and memory; curves need more than scores."""
    plan = llmprune.plan(**job, allocation=allocation)
    stage = next(stage for stage in plan.stages if stage.name == "allocate")
    assert stage.peak_cpu_bytes > 0 and (stage.seconds > 0) == (allocation != "erk")
    assert "allocate" not in [stage.name for stage in llmprune.plan(**job).stages]


def test_command_line(cli: Callable[..., Any], job: dict[str, Any], tmp_path: Path) -> None:
    """The option reaches the config, the table shows the range, the page says how sparsity was shared."""
    outcome = cli(
        "prune", job["model"], "--out", tmp_path / "out", "--allocation", "owl", "--calibration", job["calibration"],
        "--no-eval", "--num-samples", 4, "--seq-len", 32, "--no-latency",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "owl, per matrix" in outcome.out and "Sharing sparsity: done" in outcome.err
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert report.config.allocation == "owl" and report.allocation is not None
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Sparsity shared" in page and "owl," in page and "--allocation owl" in page
    refused = cli("plan", job["model"], "--allocation", "owl", "--pattern", "2:4")
    assert refused.code == 2 and "Drop --allocation" in refused.err
