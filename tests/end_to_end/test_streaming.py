"""Jobs that leave the weights on disk: the same result as in memory, whatever happens on the way."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmprune
import llmprune.evaluation
import tiny
from forked import at, run
from llmprune.errors import ConfigError, CorruptCheckpoint, NonFiniteError, UnsupportedModel
from llmprune.events import BlockFinished, BlockStarted, Evaluated, Event, Finished
from llmprune.io import streaming
from llmprune.io.models import Source
from llmprune.io.shards import Shards

NUM_BLOCKS = 4


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four blocks in several shards."""
    folder = tmp_path_factory.mktemp("models") / "four"
    model = tiny.make_model(num_hidden_layers=NUM_BLOCKS, tie_word_embeddings=True)
    model.save_pretrained(folder, max_shard_size=200_000)
    tiny.train_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def job(text_file: Path, eval_file: Path) -> dict[str, Any]:
    """Overrides that make a job quick and offline."""
    return {"calibration": str(text_file), "eval": (str(eval_file),), **tiny.QUICK}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, to the bit."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "wanda", "batch_size": 2},
        {"method": "sparsegpt", "pattern": "2:4", "export": "packed"},
        {"method": "sparsegpt", "reconstruct": True, "reconstruct_steps": 4},
        {"method": "wanda", "allocation": "dp", "permute": False},
        {"method": "wanda", "pattern": "2:4", "permute": True, "sequential": "block"},
    ],
    ids=["staged", "packed", "reconstruct", "dp", "permute"],
)
def test_from_disk_as_in_memory(asked: dict[str, Any], model_dir: Path, job: dict[str, Any], tmp_path: Path) -> None:
    """The same tensors, quality and zeros; the blocks are shards of the result, which loads."""
    reports = {}
    for offload in ("cpu", "disk"):
        reports[offload] = llmprune.prune(model_dir, out=tmp_path / offload, offload=offload, **job, **asked)
    assert same(tmp_path / "cpu", tmp_path / "disk")
    cpu, disk = reports["cpu"], reports["disk"]
    assert (disk.num_zeros_model, disk.sparsity) == (cpu.num_zeros_model, cpu.sparsity) and cpu.num_zeros_model > 0
    assert disk.quality[0].perplexity_pruned == pytest.approx(cpu.quality[0].perplexity_pruned, rel=1e-6)
    assert disk.quality[0].kl == pytest.approx(cpu.quality[0].kl, rel=1e-4)
    assert len(list((tmp_path / "disk").glob("model-*.safetensors"))) == NUM_BLOCKS + 1
    assert not (tmp_path / "disk.work").exists()
    index = json.loads((tmp_path / "disk" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(tmp_path / "disk").keys()
    llmprune.load(tmp_path / "disk")


def test_experts_from_disk(moe_model_dir: Path, job: dict[str, Any], tmp_path: Path) -> None:
    """Fused experts are stored one by one."""
    for offload in ("cpu", "disk"):
        llmprune.prune(moe_model_dir, out=tmp_path / offload, offload=offload, method="wanda", **job)
    assert same(tmp_path / "cpu", tmp_path / "disk")


@pytest.mark.parametrize("moment", [at(BlockStarted, block=2), at(BlockFinished, block=0)], ids=["started", "finished"])
def test_killed_and_resumed(moment: Callable[[Event], bool], model_dir: Path, job: dict[str, Any], tmp_path: Path) -> None:
    """Blocks that were recorded are read from their records: the result is the one of a run that was left alone."""
    llmprune.prune(model_dir, out=tmp_path / "whole", offload="disk", method="sparsegpt", **job)
    argv = ["prune", str(model_dir), "--method", "sparsegpt", "--offload", "disk", "--out", str(tmp_path / "out")]
    argv += ["--calibration", job["calibration"], "--eval", job["eval"][0], "--num-samples", "4", "--seq-len", "32"]
    argv += ["--max-eval-tokens", "512", "--no-latency", "--no-prompt", "--events", str(tmp_path / "events")]
    code, _ = run(argv, moment)
    assert code == -9 and (tmp_path / "out.work" / "block-00000").is_dir()
    code, events = run([*argv, "--resume"])
    assert code == 0 and isinstance(events[-1], Finished) and events[-1].report.resumed
    assert same(tmp_path / "whole", tmp_path / "out")


def test_memory_decides(model_dir: Path, job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself a model stays on disk where it does not fit; a run that began so goes on so."""
    streamed: list[bool] = []

    def load(*arguments: Any) -> Any:
        streamed.append(True)
        return streaming.load_streamed(*arguments)

    monkeypatch.setattr("llmprune.job.loading.load_streamed", load)
    llmprune.prune(model_dir, out=tmp_path / "roomy", **job)
    assert not streamed
    with monkeypatch.context() as scarce:
        scarce.setattr("llmprune.job.loading.free_bytes", lambda device: 200_000)
        events = llmprune.prune_iter(model_dir, out=tmp_path / "out", batch_size=1, **job)
        assert any(isinstance(event, BlockFinished) for event in events)
        del events  # cancelled
    assert len(streamed) == 1
    llmprune.prune(model_dir, out=tmp_path / "out", resume=True, batch_size=1, **job)
    assert len(streamed) == 2


def test_weights_are_as_large_as_the_dtype_they_will_have(tmp_path: Path) -> None:
    """Half-precision files that are loaded in fp32 take twice their size."""
    folder = tiny.save(tiny.make_model(dtype=torch.bfloat16), tmp_path / "model")
    source = Source("tiny", folder, "revision")
    numel = sum(tensor.numel() for tensor in tensors(folder).values())
    sizes = [source.bytes_in(dtype) - (source.dense_bytes - 2 * numel) for dtype in ("auto", "bfloat16", "float32")]
    assert sizes == [2 * numel, 2 * numel, 4 * numel]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"method": "tyr"}, "takes the model apart"),
        ({"refine": "icbs"}, "refines the mask"),
        ({"calibration": "synthetic"}, "writes its own calibration text"),
        ({"out": None}, "without a checkpoint"),
    ],
)
def test_what_needs_the_whole_model_says_so(
    asked: dict[str, Any], why: str, model_dir: Path, job: dict[str, Any], tmp_path: Path
) -> None:
    """With the remedy, and before anything is loaded."""
    with pytest.raises(ConfigError, match=f"{why}.*Use --o"):
        llmprune.prune(model_dir, offload="disk", **job | {"out": tmp_path / "out"} | asked)


@pytest.mark.parametrize("change", ["touch", "delete"])
def test_a_shard_that_changes_during_the_run(change: str, model_dir: Path, job: dict[str, Any], tmp_path: Path) -> None:
    """Is noticed before anything of it is used; the remedy is told."""
    folder = tmp_path / "model"
    tiny.save(tiny.make_model(num_hidden_layers=NUM_BLOCKS), folder)
    events = llmprune.prune_iter(folder, out=tmp_path / "out", offload="disk", **job)
    assert any(isinstance(event, BlockFinished) for event in events)
    file = folder / "model.safetensors"
    if change == "touch":
        os.utime(file, ns=(1, 1))
    else:
        file.unlink()
    what = "changed" if change == "touch" else "disappeared"
    with pytest.raises(CorruptCheckpoint, match=rf"model\.safetensors of .* {what} during the run"):
        list(events)


def test_a_damaged_block_is_named(job: dict[str, Any], tmp_path: Path) -> None:
    """NaN in the weights is found when the block is first read."""
    folder = tiny.save(tiny.make_model(), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1: its weight mlp\.up_proj\.weight holds NaN"):
        llmprune.prune(folder, out=tmp_path / "out", offload="disk", **job)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match=r"lacks 1 tensors .*model\.layers\.1\.mlp\.up_proj\.weight"):
        llmprune.prune(folder, out=tmp_path / "out", offload="disk", **job)


def test_threads_read_and_write(model_dir: Path, job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next block is read, and the last one written, beside the one that is being pruned."""
    readers: set[str] = set()
    read = Shards.read

    def watched(self: Shards, *arguments: Any, **options: Any) -> Any:
        readers.add(threading.current_thread().name)
        return read(self, *arguments, **options)

    monkeypatch.setattr(Shards, "read", watched)
    events = list(llmprune.prune_iter(model_dir, out=tmp_path / "out", offload="disk", **job))
    assert any(name.startswith("llmprune-read") for name in readers)
    kinds = [(type(event), event.block) for event in events if isinstance(event, (BlockStarted, BlockFinished))]
    assert kinds.index((BlockStarted, 1)) < kinds.index((BlockFinished, 0))
    assert [block for kind, block in kinds if kind is BlockFinished] == list(range(NUM_BLOCKS))


def test_evaluation_from_disk(model_dir: Path, moe_model_dir: Path, job: dict[str, Any]) -> None:
    """The same numbers, against another model too; neither is ever whole in memory, and speed is not told."""
    texts = {"eval": job["eval"], "seq_len": 32, "max_eval_tokens": 512}
    whole = llmprune.evaluate(model_dir, against=moe_model_dir, **texts, latency=False)
    for event in llmprune.evaluation.evaluate_iter(model_dir, against=moe_model_dir, **texts, offload="disk"):
        if isinstance(event, Evaluated):
            streamed = event.evaluation
    assert streamed.latency is None
    (one,), (other,) = whole.quality, streamed.quality
    for name in ("perplexity_dense", "perplexity_pruned", "kl", "top1_agreement"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-5), name


def test_a_packed_checkpoint_is_not_streamed(tiny_model_dir: Path, job: dict[str, Any], tmp_path: Path) -> None:
    """It says so, with the remedy."""
    llmprune.prune(tiny_model_dir, out=tmp_path / "packed", pattern="2:4", export="packed", **job)
    with pytest.raises(UnsupportedModel, match=r"cannot be streamed from disk: .* packed.*Use --offload cpu"):
        llmprune.evaluate(tmp_path / "packed", eval=job["eval"], seq_len=32, offload="disk")
