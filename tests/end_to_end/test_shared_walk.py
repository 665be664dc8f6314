"""One walk of several processes: each has some of the sequences and some of the sites, and the result is that of one."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import forked
import llmprune
import tiny
from llmprune import refining
from llmprune.io.checkpoint import read_manifest

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)
Jobs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, text_file: Path, eval_file: Path) -> Jobs:
    """Jobs of every way to collect and to solve."""
    models = tmp_path_factory.mktemp("models")
    llama = tiny.save(tiny.make_model(), models / "llama")
    mixtral = tiny.save(tiny.make_model("mixtral"), models / "mixtral")
    quick = {"calibration": str(text_file), "eval": str(eval_file), **tiny.QUICK, "num_samples": 10, "device": "cpu"}
    evolved = {"allocation": "evolution", "evolution_generations": 2, "evolution_offspring": 4}
    tuned = {**quick, "reconstruct": True, "reconstruct_steps": 16, "reconstruct_lr": 0.005}
    return {
        "wanda": {"model": str(llama), "method": "wanda", "allocation": "owl", "sequential": "group", **quick},
        "2:4": {"model": str(llama), "method": "dsnot", "pattern": "2:4", "permute": True, **quick, "eval": ()},
        "dense": {"model": str(llama), "method": "sparsegpt", "sequential": "none", **quick, "eval": ()},
        "known": {"model": str(llama), "method": "ria", "sequential": "none", **quick, "eval": ()},
        "refined": {"model": str(llama), "method": "icbs", "icbs_passes": 2, "icbs_block_size": 64, **tuned, "eval": ()},
        "tuned": {"model": str(llama), "method": "sparsegpt", "reconstruct_rounds": 2, "batch_size": 3, **tuned, "eval": ()},
        "disk": {"model": str(llama), "method": "sparsegpt", "offload": "disk", "batch_size": 3, **evolved, **quick},
        "experts": {"model": str(mixtral), "method": "sparsegpt", "sequential": "group", **quick, "eval": ()},
    }


def prune_all(jobs: Jobs, folder: Path, **more: Any) -> None:
    """Each job, to a directory of its name; what they know of the dense model goes to a cache beside it."""
    os.environ["LLMPRUNE_CACHE"] = f"{folder}-cache"
    for name, job in jobs.items():
        llmprune.prune(**job, out=folder / name, **more)


@pytest.fixture(scope="module")
def alone(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LLMPRUNE_CACHE", "")  # set, and put back
        prune_all(jobs, folder)
    return folder


@pytest.fixture(scope="module")
def together(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes write."""
    return prune_together(2, jobs, tmp_path_factory.mktemp("together"))


def prune_together(size: int, jobs: Jobs, folder: Path) -> Path:
    """The jobs by several processes."""
    done = forked.run_several(size, folder / "store", partial(prune_all, jobs, folder / "out"))
    assert done == [0] * size, (folder / "store.0").read_text()
    return folder / "out"


def weights(folder: Path) -> dict[str, Tensor]:
    """All of a checkpoint."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_prune_as_one_does(
    size: int, jobs: Jobs, alone: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The same supports and, to rounding, the same weights; the report counts the tokens of all.

    Four processes do those jobs in which some of them have no sequence of a batch or of a step, or no token of an expert.
    """
    if size == 4:
        jobs = {name: jobs[name] for name in ("wanda", "refined", "tuned", "experts")}
    out = request.getfixturevalue("together") if size == 2 else prune_together(size, jobs, tmp_path)
    for name in jobs:
        ours, theirs = (weights(folder / name) for folder in (out, alone))
        rounding = (
            1e-3 if jobs[name].get("reconstruct") else 1e-4
        )  # Adam's steps are of about one size, however small the gradient
        assert ours.keys() == theirs.keys()
        for key, weight in ours.items():
            assert torch.equal(weight == 0, theirs[key] == 0), (name, key)
            assert (weight - theirs[key]).norm() <= rounding * theirs[key].norm(), (name, key)
        (_, report), (_, before) = (read_manifest(folder / name) or pytest.fail() for folder in (out, alone))
        assert report.walk == before.walk.replace("one-pass", "staged")
        tuned = [block.reconstruction for block in report.blocks if block.reconstruction]
        assert len(tuned) == (len(report.blocks) if name in ("refined", "tuned") else 0)
        for block, its_block in zip(tuned, (block.reconstruction for block in before.blocks), strict=False):
            assert its_block and block.steps == its_block.steps and block.error_after < block.error_before
            assert block.error_after == pytest.approx(its_block.error_after, rel=1e-3)
        assert (report.refinement is None) == (name != "refined")
        swaps = [[point.num_swaps for point in one.refinement.points] for one in (report, before) if one.refinement]
        assert not swaps or (swaps[0] == swaps[1] and swaps[0][-1] > 0)
        assert [one.num_reused for one in report.statistics] == [one.num_reused for one in before.statistics]
        assert name != "known" or [one.num_reused for one in report.statistics] == [len(report.blocks)]
        counts = [[site.num_tokens for block in one.blocks for site in block.sites] for one in (report, before)]
        assert counts[0] == counts[1] and counts[0]
        for mine, its in zip(report.quality, before.quality, strict=True):
            assert mine.perplexity_dense == pytest.approx(its.perplexity_dense, rel=1e-5)
            assert mine.perplexity_pruned == pytest.approx(its.perplexity_pruned, rel=1e-4)
            assert mine.kl == pytest.approx(its.kl, rel=1e-3) and mine.kl
            assert mine.top1_agreement == pytest.approx(its.top1_agreement, abs=0.01)
    assert sorted(file.name for file in out.iterdir()) == sorted(jobs)
    assert "disk" not in jobs or len(list((out / "disk").glob("*.safetensors"))) == 3  # two blocks and the rest


def _die_after_snapshots(name: str) -> None:
    """Record the state of a refinement after every pass, and die while writing this record."""
    refining.SNAPSHOT_SECONDS = 0.0
    forked.die_while_writing(name)


def test_a_refinement_and_its_tuning_go_on(jobs: Jobs, together: Path, tmp_path: Path) -> None:
    """The first killed between two passes, then another one between two tuned blocks: the bytes of a run left alone."""
    out = tmp_path / "out"
    work = partial(prune_all, {"refined": jobs["refined"]}, out, resume=True)
    for lost, record in enumerate(("refine-000002", "tuned-00001")):
        before = {rank: partial(_die_after_snapshots, record if rank == lost else "") for rank in range(2)}
        codes = forked.run_several(2, tmp_path / record, work, before=before)
        assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 1, (tmp_path / f"{record}.0").read_text()
        assert ("refine-000001", "tuned-00000")[lost] in [file.name for file in (out / "refined.work").iterdir()]
    assert forked.run_several(2, tmp_path / "last", work) == [0, 0], (tmp_path / "last.0").read_text()
    assert (out / "refined" / "model.safetensors").read_bytes() == (together / "refined" / "model.safetensors").read_bytes()
