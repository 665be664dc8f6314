"""iCBS through the whole job: what is reached, reported and refused, and what a resumed run does."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llmprune
import tiny
from llmprune import refining
from llmprune.errors import ConfigError, UnsupportedModel
from llmprune.events import BlockFinished, Event, Progress, StageFinished, StageStarted, Warned
from llmprune.io.journal import Journal
from llmprune.report import MAX_POINTS, Report
from llmprune.spec import PruneConfig

ICBS: dict[str, Any] = {"refine": "icbs", "icbs_block_size": 64, "icbs_passes": 12, "icbs_layers_per_step": 5}


@pytest.fixture(scope="module")
def job(trained_model_dir: Path, text_file: Path, eval_file: Path) -> dict[str, Any]:
    """A quick and offline job on a model that has something to lose."""
    texts = {"calibration": str(text_file), "eval": str(eval_file)}
    return {"model": str(trained_model_dir), **texts, **tiny.QUICK, "num_samples": 16}


def _weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_icbs_goes_below_wanda(job: dict[str, Any], tmp_path: Path) -> None:
    """Method icbs is Wanda's mask refined: as many zeros in every matrix, dense values kept, a lower loss and perplexity;
    the report round-trips and states the course.
    """
    wanda = llmprune.prune(**job, method="wanda", out=tmp_path / "wanda")
    report = llmprune.prune(**job, **(ICBS | {"method": "icbs"}), out=tmp_path / "icbs")
    assert (report.config.method, report.config.refine) == ("wanda", "icbs")
    assert report.config == PruneConfig.build(**job, **ICBS, method="wanda")
    assert [stage.name for stage in report.stages] == [
        "load", "calibration", "dense", "prune", "refine", "pruned", "save",
    ]  # fmt: skip
    refinement = report.refinement
    assert refinement is not None and wanda.refinement is None
    assert refinement.num_sites == report.num_sites == 14
    assert refinement.loss_after < refinement.loss_before
    assert all(after.loss <= before.loss for before, after in pairwise(refinement.points))
    assert refinement.points[-1].num_swaps > 0 and refinement.seconds > 0 and refinement.stopped
    assert (refinement.num_held_out, refinement.num_sequences, refinement.scope) == (2, 14, "matrix")
    assert report.quality[0].perplexity_pruned < wanda.quality[0].perplexity_pruned  # type: ignore[operator]
    assert [site.num_zeros for block in report.blocks for site in block.sites] == [
        site.num_zeros for block in wanda.blocks for site in block.sites
    ]
    refined, before, dense = _weights(tmp_path / "icbs"), _weights(tmp_path / "wanda"), _weights(Path(job["model"]))
    changed = 0
    for name, weight in refined.items():
        assert torch.equal(weight, torch.where(weight == 0, 0, dense[name]))
        assert int((weight == 0).sum()) == int((before[name] == 0).sum())
        changed += int(((weight == 0) != (before[name] == 0)).sum())
    assert changed > 0
    assert Report.model_validate_json((tmp_path / "icbs" / "report.json").read_text()) == report


@pytest.mark.parametrize("how", [{"pattern": "2:4"}, {"scope": "row"}, {"method": "magnitude"}, {"allocation": "owl"}], ids=str)
def test_counts_stay_where_they_belong(job: dict[str, Any], tmp_path: Path, how: dict[str, Any]) -> None:
    """2:4 groups and, if asked for, rows keep their numbers of zeros; otherwise matrices do."""
    how = {"sparsity": 0.7, **how} if "pattern" not in how else how
    llmprune.prune(**job, **how, out=tmp_path / "before")
    report = llmprune.prune(**job, **how, **ICBS, out=tmp_path / "after")
    assert report.refinement is not None and report.refinement.points[-1].num_swaps > 0
    before, after = _weights(tmp_path / "before"), _weights(tmp_path / "after")
    size = {"pattern": 4, "scope": None}
    key = list(how)[-1]
    assert report.refinement.scope == {"pattern": "2:4", "scope": "row"}.get(key, "matrix")
    names = [f"{site.name}.weight" for block in report.blocks for site in block.sites]
    assert len(names) == 14
    for name in names:
        width = (size[key] or after[name].shape[1]) if key in size else after[name].numel()
        assert torch.equal((before[name] == 0).view(-1, width).sum(1), (after[name] == 0).view(-1, width).sum(1))


def _stopped(run: Any, until: Callable[[Event], bool]) -> None:
    assert any(until(event) for event in run)
    run.close()


def _at_pass(number: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, Progress) and event.stage == "refine" and event.done == number


@pytest.mark.parametrize("reconstruct", [False, True])
def test_a_resumed_run_ends_with_the_same_bytes(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reconstruct: bool
) -> None:
    """Stopped within the refinement, with and without a record of it, after it, and while blocks are tuned."""
    how = {**job, **ICBS, "reconstruct": reconstruct, "reconstruct_steps": 6, "icbs_passes": 6}
    whole = llmprune.prune(**how, out=tmp_path / "whole")
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert whole.refinement is not None
    cases: list[tuple[Callable[[Event], bool], float, int]] = [
        (_at_pass(4), math.inf, 0),
        (_at_pass(4), -1.0, 3),
        (lambda event: isinstance(event, StageFinished) and event.stage == "refine", math.inf, 6),
    ]
    if reconstruct:
        cases.append((lambda event: isinstance(event, Progress) and event.stage == "reconstruct" and event.done == 1, 60.0, 6))
    for number, (moment, interval, done) in enumerate(cases):
        monkeypatch.setattr(refining, "SNAPSHOT_SECONDS", interval)
        out = tmp_path / f"out{number}"
        _stopped(llmprune.prune_iter(**how, out=out), moment)
        events = list(llmprune.prune_iter(**how, out=out, resume=True))
        started = {event.stage: event.resumed_at for event in events if isinstance(event, StageStarted)}
        assert started["refine"] == done
        assert started.get("reconstruct", 0) == (1 if number == 3 else 0)
        assert not any(isinstance(event, BlockFinished) for event in events)  # the walk is not repeated
        passes = [event.done for event in events if isinstance(event, Progress) and event.stage == "refine"]
        assert passes == list(range(done + 1 if done else 0, 7))
        report: Report = events[-1].report  # type: ignore[union-attr]
        assert report.resumed and report.refinement is not None
        ours, theirs = ([point.model_dump(exclude={"seconds"}) for point in item.points] for item in (
            report.refinement, whole.refinement
        ))  # fmt: skip
        assert ours == theirs
        assert (out / "model.safetensors").read_bytes() == expected
        assert not Journal(tmp_path / f"out{number}.work").exists


def test_kept_weights_are_tuned_on_the_refined_mask(job: dict[str, Any], tmp_path: Path) -> None:
    """With --reconstruct the zeros are those of the refinement alone, the kept weights are others, and blocks say so."""
    llmprune.prune(**job, **ICBS, out=tmp_path / "mask")
    report = llmprune.prune(**job, **ICBS, reconstruct=True, reconstruct_steps=20, out=tmp_path / "tuned")
    assert [stage.name for stage in report.stages][3:6] == ["prune", "refine", "reconstruct"]
    assert all(block.reconstruction and block.reconstruction.steps > 0 for block in report.blocks)
    assert any(not block.reconstruction.rolled_back for block in report.blocks if block.reconstruction)
    mask, tuned = _weights(tmp_path / "mask"), _weights(tmp_path / "tuned")
    assert all(torch.equal(mask[name] == 0, tuned[name] == 0) for name in mask)
    assert any(not torch.equal(mask[name], tuned[name]) for name in mask)
    assert report.sparsity == 0.5


def test_cancelled_it_leaves_a_valid_mask(trained_model_dir: Path, text_file: Path) -> None:
    """A model in memory, closed midway: every matrix has its number of zeros and dense values elsewhere."""
    model = tiny.train_(tiny.make_model(), num_steps=5)
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options = {**tiny.QUICK, **ICBS, "calibration": str(text_file), "eval": ()}
    run = llmprune.prune_iter(model, tokenizer=tiny.train_tokenizer(), **options)
    _stopped(run, _at_pass(3))
    pruned = [name for name in dense if "proj" in name]
    assert len(pruned) == 14
    for name in pruned:
        weight = model.get_parameter(name).detach()
        assert torch.equal(weight, torch.where(weight == 0, 0, dense[name]))
        assert int((weight == 0).sum()) == weight.numel() // 2


def test_the_papers_preset_keeps_every_step(job: dict[str, Any]) -> None:
    """One matrix a pass, no step undone; so many passes as asked for."""
    report = llmprune.prune(**{**job, **ICBS, "icbs_layers_per_step": None, "icbs_preset": "paper", "icbs_passes": 6})
    refinement = report.refinement
    assert refinement is not None and refinement.preset == "paper"
    assert (refinement.layers_per_step, refinement.solver, refinement.points[-1].num_blocks) == (1, "anneal", 6)
    assert refinement.points[-1].num_accepted == 6


def test_exact_curvature(job: dict[str, Any]) -> None:
    """Through a whole job, in small blocks."""
    changes = {**ICBS, "icbs_hessian": "exact", "icbs_block_size": 12, "icbs_passes": 3, "icbs_sequences": 2}
    report = llmprune.prune(**job, **changes)
    assert report.refinement is not None and report.refinement.hessian == "exact"
    assert report.refinement.loss_after <= report.refinement.loss_before
    with pytest.raises(ConfigError, match=r"more digits than float16 has\. Use --dtype float32"):
        llmprune.prune(**job, **changes, dtype="float16")


def test_blocks_larger_than_what_is_free_are_said_once(job: dict[str, Any]) -> None:
    """One warning names the first matrix and how many more; all that is free is tried."""
    run = llmprune.prune_iter(**job, **(ICBS | {"icbs_block_size": 4096, "icbs_passes": 2}))
    warnings = [event.message for event in run if isinstance(event, Warned)]
    assert len([message for message in warnings if "fewer weights are free than a block has (4096)" in message]) == 1


def test_experts_keep_the_masks_of_the_method(job: dict[str, Any], moe_model_dir: Path) -> None:
    """Fused experts are left as they are, with a warning; where nothing else is pruned the job is refused."""
    how = {**job, **ICBS, "model": str(moe_model_dir), "icbs_passes": 2}
    report = llmprune.prune(**how)
    assert report.refinement is not None and report.refinement.num_sites < report.num_sites
    assert any("keep the mask of the method" in message for message in report.warnings)
    with pytest.raises(UnsupportedModel, match=r"nothing to refine.* Drop --refine"):
        llmprune.prune(**how, skip=("*self_attn*",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "icbs", "refine": "none"}, r"method icbs is wanda with refine 'icbs'.*--method wanda"),
        ({"refine": "icbs", "num_samples": 1}, r"num_samples of at least 2, got 1\. Raise --num-samples"),
        ({"refine": "icbs", "num_samples": 8, "icbs_sequences": 8}, r"7 are there to learn from"),
        ({"refine": "icbs", "icbs_hessian": "exact", "icbs_block_size": 4096}, r"exact is for blocks of at most 1024 weights"),
        ({"refine": "icbs", "icbs_solver": "exhaustive", "icbs_block_size": 64}, r"exhaustive is for blocks of at most 22"),
        ({"refine": "ICBS"}, "refine"),
        ({"icbs_passes": 10}, r"icbs_passes says how a mask is refined, but none is\. Add --refine icbs"),
        ({"icbs_passes": 0}, "icbs_passes"),
        ({"icbs_hessian": "diagonal"}, "icbs_hessian"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(fields: dict[str, Any], message: str) -> None:
    """From the config alone."""
    with pytest.raises(ConfigError, match=message):
        PruneConfig.build(**fields)


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_methods_that_change_weights_are_refused(job: dict[str, Any], method: str) -> None:
    """By job and plan, before anything is read."""
    for run in (llmprune.prune, llmprune.plan):
        with pytest.raises(ConfigError, match=rf"{method} changes the kept ones\. Refine .*wanda.*--reconstruct"):
            run(**job, **ICBS, method=method)


def test_command_line(cli: Callable[..., Any], job: dict[str, Any], tmp_path: Path) -> None:
    """Options reach the config; console, page and model card tell the course; the page draws it."""
    outcome = cli(
        "prune", job["model"], "--out", tmp_path / "out", "--method", "icbs", "--calibration", job["calibration"], "--no-eval",
        "--num-samples", 16, "--seq-len", 32, "--no-latency", "--icbs-passes", 4, "--icbs-block-size", 64, "--icbs-solver",
        "greedy", "--icbs-layers-per-step", 3, "--icbs-sequences", 8, "--icbs-hessian", "fisher", "--icbs-preset", "default",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "Refining the mask: done" in outcome.err
    assert "Refined by icbs: held-out loss" in outcome.out
    page, card = ((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))
    assert "<h2>Refinement</h2>" in page and '<figure data-name="refinement">' in page and "--refine icbs" in page
    assert "- Refined by icbs: held-out loss" in card and " s\n" not in card
    refused = cli("plan", job["model"], "--method", "sparsegpt", "--refine", "icbs")
    assert refused.code == 2 and "changes the kept ones" in refused.err
    assert "icbs" in cli("methods").out


def test_a_long_course_is_thinned_out() -> None:
    """At most MAX_POINTS points, first and last among them, counts from the start."""
    history = [
        refining.RefineStep(
            3 * number, ("a",) * 3 if number else (), 2, -0.1, 1.0, 2.0 - number / 5000, True, 0.1, 0.5 * number
        )
        for number in range(3001)
    ]
    points = refining.points_of(history)
    assert 400 < len(points) <= MAX_POINTS
    assert (points[0].num_passes, points[0].num_accepted, points[-1].num_passes) == (0, 0, 3000)
    assert (points[-1].num_accepted, points[-1].num_blocks, points[-1].num_swaps) == (3000, 9000, 2 * 3001)


def test_the_plan_foresees_the_stages(job: dict[str, Any]) -> None:
    """Time and memory, the dense weights that are kept included; tuning comes after it."""
    plain, plan = llmprune.plan(**job), llmprune.plan(**job, **ICBS, reconstruct=True)
    assert [stage.name for stage in plan.stages] == ["load", "dense", "prune", "refine", "reconstruct", "pruned", "save"]
    refine = next(stage for stage in plan.stages if stage.name == "refine")
    assert refine.seconds > 0
    dense = next(stage for stage in plain.stages if stage.name == "dense")
    assert refine.peak_cpu_bytes > dense.peak_cpu_bytes
    assert "refine" not in [stage.name for stage in plain.stages]
