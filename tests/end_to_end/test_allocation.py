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
from llmprune.methods import alps
from llmprune.packing import unpack_
from llmprune.report import Report
from llmprune.spec import Pattern, PruneConfig

OTHERS = [name for name in ALLOCATORS if name != "uniform"]
STAGES = ["load", "calibration", "dense", "allocate", "prune", "pruned", "save"]


@pytest.fixture(scope="module")
def job(tiny_model_dir: Path, text_file: Path, eval_file: Path) -> dict[str, Any]:
    """A quick and offline job."""
    quick = {**tiny.QUICK, "evolution_generations": 3}
    return {"model": str(tiny_model_dir), "calibration": str(text_file), "eval": str(eval_file), **quick}


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


def test_command_line_of_a_search(cli: Callable[..., Any], job: dict[str, Any], tmp_path: Path) -> None:
    """The search's own options reach it; table and page show what it found."""
    outcome = cli(
        "prune", job["model"], "--out", tmp_path / "out", "--allocation", "evolution", "--evolution-generations", 4,
        "--evolution-offspring", 6, "--calibration", job["calibration"], "--no-eval", "--num-samples", 4, "--seq-len", 32,
        "--no-latency",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert report.allocation is not None and report.allocation.search is not None
    search = report.allocation.search
    assert search.generations == 4 and 1 < search.num_evaluated <= 25 and search.kl_end <= search.kl_start
    assert "KL of the allocation" in outcome.out and "Sharing sparsity: done" in outcome.err
    page = (tmp_path / "out" / "report.html").read_text()
    assert "KL of the allocation" in page and "after 4 generations" in page and "--evolution-generations 4" in page
    refused = cli("plan", job["model"], "--evolution-offspring", 0)
    assert refused.code == 2 and "evolution_offspring" in refused.err


def test_no_generations_is_dp(job: dict[str, Any]) -> None:
    """The search starts at dp's result: without generations it is that."""
    by_dp = llmprune.prune(**job, sparsity=0.6, allocation="dp")
    start = llmprune.prune(**{**job, "evolution_generations": 0}, sparsity=0.6, allocation="evolution")
    assert by_dp.allocation is not None and start.allocation is not None
    assert start.allocation.sparsities == by_dp.allocation.sparsities and start.allocation.search is None


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("allocation", ["dp", "evolution"])
@pytest.mark.parametrize("export", ["dense", "packed"])
def test_mixed_patterns(job: dict[str, Any], tmp_path: Path, allocation: str, method: str, export: str) -> None:
    """Every site has a pattern of its own, which its weights follow; the mean is the target; packed 2:4 carries what is
    exported packed, and the checkpoint loads with those weights.
    """
    how = {**job, "method": method, "pattern": "mixed", "sparsity": 0.55, "allocation": allocation, "export": export}
    report = llmprune.prune(**how, out=tmp_path / "out")
    assert report.allocation is not None
    patterns = report.allocation.patterns
    assert len(patterns) == 14 and len(set(patterns.values())) > 1
    assert set(patterns.values()) <= ({"dense", "2:4", "1:4"} if export == "packed" else {"dense", "4:8", "1:4"})
    assert 0.55 <= report.sparsity == report.allocation.sparsity < 0.56
    model: Any = llmprune.load(tmp_path / "out")
    unpack_(model)
    sites = [site for block in report.blocks for site in block.sites]
    assert len(sites) == 14
    for site in sites:
        assert site.pattern == patterns[site.name] and site.target == site.sparsity
        weight_OI = model.get_submodule(site.name).weight
        assert int((weight_OI == 0).sum()) == site.num_zeros
        if site.pattern == "dense":
            assert site.num_zeros == 0
            continue
        pattern = Pattern.parse(str(site.pattern))
        kept = (weight_OI != 0).view(len(weight_OI), -1, pattern.m).sum(-1)
        assert set(kept.unique().tolist()) == {pattern.n}


def test_a_resumed_mixed_run_is_the_same(job: dict[str, Any], tmp_path: Path) -> None:
    """Stopped between two blocks: the same bytes as a run that went through."""
    how = {**job, "pattern": "mixed", "sparsity": 0.5, "allocation": "dp"}
    whole = llmprune.prune(**how, out=tmp_path / "whole")
    run = llmprune.prune_iter(**how, out=tmp_path / "out")
    assert any(isinstance(event, BlockStarted) and event.block == 1 for event in run)
    run.close()  # type: ignore[attr-defined]
    resumed = llmprune.prune(**how, out=tmp_path / "out", resume=True)
    assert resumed.resumed and resumed.allocation == whole.allocation
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_sites_that_no_pattern_divides_stay_dense(text_file: Path) -> None:
    """And the others make up for it, or the target is refused naming the closest feasible one."""
    model = tiny.make_model(intermediate_size=66)  # inputs of down_proj
    how = {"calibration": str(text_file), "eval": (), **tiny.QUICK, "pattern": "mixed", "allocation": "dp"}
    with pytest.raises(ConfigError, match=r"closest feasible one is 0\.\d+; use it") as refused:
        llmprune.prune(model, tokenizer=tiny.train_tokenizer(), **how, sparsity=0.74)
    most = float(str(refused.value).split("closest feasible one is ")[1].split(";")[0])
    assert 0.5 < most < 0.74
    report = llmprune.prune(model, tokenizer=tiny.train_tokenizer(), **how, sparsity=0.5)
    assert report.allocation is not None and 0.5 <= report.sparsity < 0.51
    down = {site.pattern for block in report.blocks for site in block.sites if site.name.endswith("down_proj")}
    assert down == {"dense"}


def test_mixed_needs_measured_costs() -> None:
    """Refused with the remedy, from the config alone; a sparsity beyond 1:4 too."""
    for allocation in ("uniform", "owl"):
        with pytest.raises(ConfigError, match="Use --allocation dp or evolution"):
            PruneConfig.build(pattern="mixed", allocation=allocation)
    with pytest.raises(ConfigError, match=r"cannot reach sparsity 0\.8.*closest feasible one is 0\.75"):
        PruneConfig.build(pattern="mixed", allocation="dp", sparsity=0.8)
    assert PruneConfig.build(pattern="mixed", allocation="dp").sparsity == 0.5
    assert PruneConfig.build(PruneConfig(pattern="2:4"), pattern="mixed", allocation="dp", sparsity=0.6).sparsity == 0.6


def test_command_line_of_mixed_patterns(cli: Callable[..., Any], job: dict[str, Any], tmp_path: Path) -> None:
    """The table says how many sites have each pattern, and the plan foresees the job."""
    quick = ["--num-samples", 4, "--seq-len", 32, "--calibration", job["calibration"]]
    options = ["--pattern", "mixed", "--allocation", "dp", *quick]
    outcome = cli("prune", job["model"], "--out", tmp_path / "out", *options, "--no-eval", "--no-latency")
    assert outcome.code == 0, outcome.err
    assert "mixed, target 50 %" in " ".join(outcome.out.split()) and "4:8" in outcome.out  # the title may be broken into lines
    assert "Patterns" in (tmp_path / "out" / "report.html").read_text()
    assert cli("plan", job["model"], *options).code == 0


def test_curves_of_a_slow_method_are_measured_by_another(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """alps is surveyed by sparsegpt: it solves every site once, in the walk."""
    solved = []
    prune = alps.prune
    monkeypatch.setattr(alps, "prune", lambda *args, **kwargs: solved.append(1) or prune(*args, **kwargs))
    report = llmprune.prune(**job, method="alps", sparsity=0.6, allocation="dp")
    assert len(solved) == 14 and report.allocation is not None
    stand_in = llmprune.prune(**job, method="sparsegpt", scope="matrix", sparsity=0.6, allocation="dp")
    assert stand_in.allocation is not None and stand_in.allocation.sparsities == report.allocation.sparsities
