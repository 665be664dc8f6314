"""The main job through the Python API: what lands in memory, on disk and in the report."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmprune
import tiny
from llmprune.efforts import EFFORTS
from llmprune.errors import ConfigError, UnsupportedModel
from llmprune.events import (
    BlockFinished,
    BlockStarted,
    Finished,
    Progress,
    SitePruned,
    StageFinished,
    StageStarted,
    parse_event,
)
from llmprune.methods import METHODS
from llmprune.report import Report
from llmprune.spec import Need

SITES_PER_BLOCK = 7
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Texts = dict[str, Any]


@pytest.fixture(scope="session")
def texts(text_file: Path, eval_file: Path) -> Texts:
    """Overrides that make a job quick and offline."""
    return {"calibration": str(text_file), "eval": str(eval_file), **tiny.QUICK}


@pytest.fixture(scope="module")
def written(tiny_model_dir: Path, texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A checkpoint pruned by Wanda to 50 %, and its report."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    return out, llmprune.prune(tiny_model_dir, method="wanda", sparsity=0.5, out=out, **texts)


def sites_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The prunable weights of a saved Llama."""
    return {name: tensor for name, tensor in tensors.items() if name.split(".")[-2] in LEAVES}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_every_method_hits_its_target_exactly(
    tiny_model_dir: Path, texts: Texts, tmp_path: Path, method: str, pattern: str
) -> None:
    """All fourteen sites end at exactly one half of zeros, in the report and in the file."""
    report = llmprune.prune(tiny_model_dir, method=method, pattern=pattern, out=tmp_path / "out", **texts)
    assert report.num_sites == 2 * SITES_PER_BLOCK
    assert report.sparsity == 0.5
    saved = sites_of(weights(tmp_path / "out"))
    assert len(saved) == 2 * SITES_PER_BLOCK
    for block in report.blocks:
        for site in block.sites:
            zeros = saved[f"{site.name}.weight"] == 0
            assert site.num_zeros == int(zeros.sum()) == site.numel // 2
            assert site.sparsity == 0.5
            assert site.fallback is None
            assert (site.output_error is not None) == (METHODS[method].needs >= Need.GRAM)
            if pattern == "2:4":
                assert (zeros.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    (quality,) = report.quality
    assert quality.kl is not None and quality.kl > 0
    assert quality.perplexity_dense is not None and quality.perplexity_pruned is not None
    assert quality.top1_agreement is not None and 0 < quality.top1_agreement < 1
    assert quality.text.seq_len == 32 and quality.text.num_sequences == 16


def test_odd_sparsity_is_the_nearest_count(tiny_model_dir: Path, texts: Texts) -> None:
    """37.1 % of a row of 64 or 128 is 24 or 47 zeros, in every row."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    llmprune.prune(model, tokenizer=tiny.train_tokenizer(), method="wanda", sparsity=0.371, **texts)
    counts = {site.shape[1]: {int(n) for n in (site == 0).sum(1)} for site in sites_of(model.state_dict()).values()}
    assert counts == {64: {24}, 128: {47}}


def test_sparsity_zero_changes_nothing(tiny_model_dir: Path, texts: Texts, tmp_path: Path) -> None:
    """At sparsity 0 the weights are the same bits and the divergence is exactly zero."""
    report = llmprune.prune(tiny_model_dir, method="wanda", sparsity=0.0, out=tmp_path / "out", **texts)
    assert report.num_sites == 2 * SITES_PER_BLOCK
    (quality,) = report.quality
    assert (quality.kl, quality.ratio, quality.top1_agreement) == (0.0, 1.0, 1.0)
    before, after = weights(tiny_model_dir), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_report_says_what_was_done(written: tuple[Path, Report], texts: Texts, tiny_model_dir: Path) -> None:
    """Config, model, texts, stages and verdict of a finished job."""
    out, report = written
    assert report.config == llmprune.PruneConfig(model=str(tiny_model_dir), method="wanda", sparsity=0.5, **texts)
    assert report.out == str(out)
    assert (report.model.model_type, report.model.dtype, report.model.num_blocks) == ("llama", "float32", 2)
    assert report.model.num_prunable == sum(site.numel for block in report.blocks for site in block.sites) == 2 * 36864
    digest = hashlib.sha256((tiny_model_dir / "model.safetensors").read_bytes())
    assert report.model.revision == hashlib.sha256(b"model.safetensors" + digest.digest()).hexdigest()
    assert report.calibration is not None and report.calibration.num_tokens == 4 * 32
    assert all(site.num_tokens == 4 * 32 for block in report.blocks for site in block.sites)
    assert (report.scope, report.walk, report.resumed, report.latency) == ("row", "two-pass", False, None)
    assert [stage.name for stage in report.stages] == ["load", "calibration", "dense", "prune", "pruned", "save"]
    assert all(stage.peak_cpu_bytes for stage in report.stages)
    assert report.verdict.status == "good"
    assert report.checkpoint_bytes == (out / "model.safetensors").stat().st_size
    zeros = sum(int((tensor == 0).sum()) for tensor in weights(out).values())
    assert report.num_zeros_model == zeros


def test_output_holds_a_whole_checkpoint_and_nothing_else(written: tuple[Path, Report]) -> None:
    """The expected files, no work directory, no temporary directory."""
    out, _ = written
    assert {file.name for file in out.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "llmprune.json", "model.safetensors", "report.html",
        "report.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert [file.name for file in out.parent.iterdir()] == ["out"]


def test_report_json_parses_back_to_the_report(written: tuple[Path, Report]) -> None:
    """report.json and the manifest hold the very report the call returned."""
    out, report = written
    manifest = json.loads((out / "llmprune.json").read_text())
    assert Report.model_validate_json((out / "report.json").read_text()) == report
    assert Report.model_validate(manifest["report"]) == report
    assert manifest["schema_version"] == report.schema_version
    assert manifest["fingerprint"]["tokens"] == report.calibration.sha256  # type: ignore[union-attr]
    assert manifest["fingerprint"]["revision"] == report.model.revision


def test_manifest_digests_match_the_files(written: tuple[Path, Report]) -> None:
    """Every file but the manifest itself is listed with its sha256."""
    out, _ = written
    digests = json.loads((out / "llmprune.json").read_text())["sha256"]
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.iterdir()}
    assert digests.keys() == files.keys() - {"llmprune.json"}
    assert all(files[name] == digest for name, digest in digests.items())


def test_what_pruning_leaves_alone_is_copied(written: tuple[Path, Report], tiny_model_dir: Path) -> None:
    """Tokenizer and generation config are byte for byte the source's; config.json has the source's keys and values."""
    out, _ = written
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tiny_model_dir / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((tiny_model_dir / "config.json").read_text())
    before, after = weights(tiny_model_dir), weights(out)
    kept = [name for name in before if name not in sites_of(before)]
    assert len(kept) == 7  # embedding, head, final norm, two norms a block
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_zeros_are_positive_and_survivors_are_bit_equal(written: tuple[Path, Report], tiny_model_dir: Path) -> None:
    """No -0.0 among the zeros; Wanda changes no other weight."""
    out, _ = written
    before, after = sites_of(weights(tiny_model_dir)), sites_of(weights(out))
    assert any(bool((tensor < 0).any()) for tensor in before.values())
    for name, tensor in after.items():
        zeros = tensor == 0
        assert zeros.any() and not torch.signbit(tensor[zeros]).any()
        assert torch.equal(tensor[~zeros], before[name][~zeros])


def test_weights_are_readable_as_the_umask_says(written: tuple[Path, Report]) -> None:
    """safetensors writes 0600 files; a checkpoint has one mode for all."""
    out, _ = written
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1


def test_same_job_gives_the_same_bytes(written: tuple[Path, Report], tiny_model_dir: Path, texts: Texts) -> None:
    """Weights and model card of a second run are byte-identical."""
    out, _ = written
    again = out.parent.parent / "again" / "deeper" / "out"
    llmprune.prune(str(tiny_model_dir), out=str(again), method="wanda", sparsity=0.5, **texts)
    for name in ("model.safetensors", "README.md", "config.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_evaluate_confirms_the_report(written: tuple[Path, Report], tiny_model_dir: Path, texts: Texts) -> None:
    """The checkpoint, loaded from disk, has exactly the perplexity and divergence that the report states."""
    out, report = written
    how = {name: value for name, value in texts.items() if name not in ("calibration", "num_samples")}
    alone = llmprune.evaluate(out, **how)
    assert alone.quality[0].perplexity_pruned == report.quality[0].perplexity_pruned
    assert alone.quality[0].kl is None and alone.against is None
    (both,) = llmprune.evaluate(out, against=tiny_model_dir, **how).quality
    expected = report.quality[0]
    assert both.text == expected.text
    for name in ("perplexity_dense", "perplexity_pruned", "kl", "top1_agreement"):
        assert getattr(both, name) == getattr(expected, name)


_LOGITS = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
logits = {}
for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        logits[directory] = model(input_ids=torch.arange(48).view(2, 24)).logits.contiguous()
save_file(logits, sys.argv[1])
"""


def test_a_new_process_loads_the_evaluated_model(moe_model_dir: Path, texts: Texts, tmp_path: Path) -> None:
    """AutoModelForCausalLM in a fresh interpreter gives bit for bit the logits of the model pruned in memory."""
    cases: list[tuple[PreTrainedModel, dict[str, Any]]] = [
        (tiny.make_model(), {"method": "sparsegpt", "sparsity": 0.6}),
        (tiny.make_model(dtype=torch.bfloat16, tie_word_embeddings=True), {"method": "wanda", "pattern": "2:4"}),
        (AutoModelForCausalLM.from_pretrained(moe_model_dir), {"method": "wanda"}),
    ]
    expected = {}
    for number, (model, asked) in enumerate(cases):
        out = tmp_path / f"out{number}"
        report = llmprune.prune(model, out=out, tokenizer=tiny.train_tokenizer(), **{**texts, **asked})
        assert report.sparsity == pytest.approx(report.config.sparsity, abs=1e-3)
        with torch.no_grad():
            expected[str(out)] = model(input_ids=torch.arange(48).view(2, 24)).logits
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    file = tmp_path / "logits.safetensors"
    subprocess.run([sys.executable, "-c", _LOGITS, str(file), *expected], check=True, env=environment, capture_output=True)
    found = load_file(file)
    assert len(found) == 3
    for name, logits in expected.items():
        assert logits.dtype == found[name].dtype
        assert torch.equal(logits, found[name])


def test_model_in_memory_is_pruned_in_place(
    written: tuple[Path, Report], tiny_model_dir: Path, texts: Texts, tmp_path: Path
) -> None:
    """A module in memory ends with the weights that the directory's checkpoint has, and is written the same."""
    out, _ = written
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    report = llmprune.prune(
        model, method="wanda", sparsity=0.5, tokenizer=tiny.train_tokenizer(), out=tmp_path / "out", **texts
    )
    assert report.model.revision == "in memory" and report.num_sites == 2 * SITES_PER_BLOCK
    saved = weights(out)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert not (tmp_path / "out.work").exists()


def test_model_in_memory_needs_its_tokenizer_and_no_journal(tiny_model_dir: Path, texts: Texts) -> None:
    """No tokenizer, --resume, or a module that is no transformers model: refused before anything is touched."""
    model = tiny.make_model()
    with pytest.raises(ConfigError, match="tokenizer=AutoTokenizer"):
        llmprune.prune(model, **texts)
    with pytest.raises(ConfigError, match="cannot be resumed"):
        llmprune.prune(model, tokenizer=tiny.train_tokenizer(), resume=True, **texts)
    with pytest.raises(UnsupportedModel, match="Linear is not a transformers"):
        llmprune.prune(torch.nn.Linear(2, 2), tokenizer=tiny.train_tokenizer(), **texts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_of_the_checkpoint_is_kept(texts: Texts, tmp_path: Path, dtype: torch.dtype) -> None:
    """A checkpoint is pruned and written in its own dtype."""
    source = tiny.save(tiny.make_model(dtype=dtype), tmp_path / "in")
    report = llmprune.prune(source, out=tmp_path / "out", method="sparsegpt", **texts)
    assert report.model.dtype == str(dtype).removeprefix("torch.")
    saved = weights(tmp_path / "out")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    assert all(int((tensor == 0).sum()) == tensor.numel() // 2 for tensor in sites_of(saved).values())


def test_dtype_can_be_asked_for(tiny_model_dir: Path, texts: Texts, tmp_path: Path) -> None:
    """--dtype converts, and config.json says so."""
    report = llmprune.prune(tiny_model_dir, out=tmp_path / "out", dtype="bfloat16", **texts)
    assert report.model.dtype == "bfloat16"
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tied_embeddings_stay_tied(texts: Texts, tmp_path: Path) -> None:
    """A tied head is not written a second time and is still the embedding after loading."""
    source = tiny.save(tiny.make_model(tie_word_embeddings=True), tmp_path / "in")
    report = llmprune.prune(source, out=tmp_path / "out", **texts)
    assert report.sparsity == 0.5
    assert weights(source).keys() == weights(tmp_path / "out").keys()
    assert "lm_head.weight" not in weights(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert report.num_zeros_model == sum(int((parameter == 0).sum()) for parameter in model.parameters())


def test_experts_are_pruned_one_by_one(moe_model_dir: Path, texts: Texts, tmp_path: Path) -> None:
    """Each expert of a fused parameter is a site of its own with its own count of tokens; routers stay dense."""
    report = llmprune.prune(moe_model_dir, out=tmp_path / "out", method="wanda", **texts)
    sites = [site for block in report.blocks for site in block.sites]
    experts = [site for site in sites if ".experts." in site.name]
    assert len(sites) == 2 * (4 + 2 * 4)
    assert len(experts) == 2 * 2 * 4
    assert report.sparsity == 0.5
    assert sum(site.num_tokens for site in experts if "gate_up" in site.name) == 2 * 2 * 4 * 32
    assert all("router" not in site.name and ".gate." not in site.name for site in sites)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    routers = [parameter for name, parameter in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2 and all((router != 0).all() for router in routers)


def test_events_come_in_order_and_survive_json(tiny_model_dir: Path, texts: Texts, tmp_path: Path) -> None:
    """Stages in order, blocks inside the prune stage, sites inside their block, Finished last; JSON lines parse back."""
    events = list(llmprune.prune_iter(tiny_model_dir, out=tmp_path / "out", **texts))
    assert all(parse_event(event.model_dump_json()) == event for event in events)
    started = [event.stage for event in events if isinstance(event, StageStarted)]
    finished = [event.stage for event in events if isinstance(event, StageFinished)]
    assert started == finished == ["load", "calibration", "dense", "prune", "pruned", "save"]
    inside = None
    for event in events[:-1]:
        if isinstance(event, StageStarted):
            assert inside is None
            inside = event.stage
        elif isinstance(event, StageFinished):
            assert event.stage == inside
            inside = None
        elif isinstance(event, Progress):
            assert event.stage == inside and 0 < event.done <= event.total
        else:
            assert inside == "prune"
    kinds = [type(event) for event in events if isinstance(event, BlockStarted | SitePruned | BlockFinished)]
    assert kinds == [BlockStarted, *[SitePruned] * SITES_PER_BLOCK, BlockFinished] * 2
    assert isinstance(events[-1], Finished)
    assert events[-1].report.out == str(tmp_path / "out")


@pytest.mark.parametrize("stop", ["dense", "prune", "pruned", "save"])
def test_closing_the_generator_leaves_no_output(tiny_model_dir: Path, texts: Texts, tmp_path: Path, stop: str) -> None:
    """A cancelled job leaves neither the checkpoint nor a temporary directory, only its journal."""
    run = llmprune.prune_iter(tiny_model_dir, out=tmp_path / "out", **texts)
    for event in run:
        if isinstance(event, Progress | BlockFinished) and getattr(event, "stage", "prune") == stop:
            break
    run.close()  # type: ignore[attr-defined]
    assert [file.name for file in tmp_path.iterdir()] == ["out.work"]
    report = llmprune.prune(tiny_model_dir, out=tmp_path / "out", resume=True, **texts)
    assert report.resumed and report.sparsity == 0.5
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_no_out_writes_nothing(tiny_model_dir: Path, texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``out`` the job only measures."""
    monkeypatch.chdir(tmp_path)
    report = llmprune.prune(tiny_model_dir, **texts)
    assert report.sparsity == 0.5 and report.out is None and report.checkpoint_bytes is None
    assert not list(tmp_path.iterdir())


def test_skipped_sites_stay_dense(tiny_model_dir: Path, texts: Texts, tmp_path: Path) -> None:
    """Globs take sites out; the others hit the target."""
    skip = ("*.down_proj", "model.layers.0.*")
    report = llmprune.prune(tiny_model_dir, out=tmp_path / "out", skip=skip, **texts)
    assert [len(block.sites) for block in report.blocks] == [0, SITES_PER_BLOCK - 1]
    assert report.sparsity == 0.5
    before, after = weights(tiny_model_dir), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{site.name}.weight" for site in report.blocks[1].sites}
    with pytest.raises(UnsupportedModel, match="nothing to prune"):
        llmprune.prune(tiny_model_dir, skip="*", **texts)


def masks(source: Path, texts: Texts, **overrides: Any) -> tuple[Report, dict[str, torch.Tensor]]:
    """The report of a job and the support it leaves."""
    model = AutoModelForCausalLM.from_pretrained(source)
    report = llmprune.prune(model, tokenizer=tiny.train_tokenizer(), **{**texts, "eval": (), **overrides})
    return report, {name: tensor != 0 for name, tensor in sites_of(model.state_dict()).items()}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_one_pass_and_staged_walks_agree(
    tiny_model_dir: Path, texts: Texts, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that wait for one another, or are run anew for every group where there is no room to wait: one support."""
    whole, one_pass = masks(tiny_model_dir, texts, method=method, sequential="group")
    parts, paused = masks(tiny_model_dir, texts, method=method, sequential="group", batch_size=1)
    monkeypatch.setattr("llmprune.memory.can_pause", lambda *_, **__: False)
    anew, staged = masks(tiny_model_dir, texts, method=method, sequential="group", batch_size=1)
    assert (whole.walk, parts.walk, anew.walk) == ("one-pass", "one-pass", "staged")
    assert len(one_pass) == 2 * SITES_PER_BLOCK
    assert all(torch.equal(one_pass[name], paused[name]) and torch.equal(one_pass[name], staged[name]) for name in one_pass)


def test_sequential_block_prunes_on_dense_inputs(tiny_model_dir: Path, texts: Texts) -> None:
    """``block`` sees a block's dense activations, ``group`` those of its pruned parts: q_proj agrees, down_proj differs."""
    by_group, group = masks(tiny_model_dir, texts, method="wanda", sequential="group")
    by_block, block = masks(tiny_model_dir, texts, method="wanda", sequential="block")
    assert (by_group.walk, by_block.walk) == ("one-pass", "two-pass")
    assert by_group.sparsity == by_block.sparsity == 0.5
    first = "model.layers.0"
    assert torch.equal(group[f"{first}.self_attn.q_proj.weight"], block[f"{first}.self_attn.q_proj.weight"])
    assert not torch.equal(group[f"{first}.mlp.down_proj.weight"], block[f"{first}.mlp.down_proj.weight"])


def test_synthetic_calibration_needs_no_text(tiny_model_dir: Path, texts: Texts) -> None:
    """The model samples its own calibration tokens; the seed decides them."""
    first = llmprune.prune(tiny_model_dir, **{**texts, "calibration": "synthetic"})
    again = llmprune.prune(tiny_model_dir, **{**texts, "calibration": "synthetic"})
    other = llmprune.prune(tiny_model_dir, **{**texts, "calibration": "synthetic", "seed": 1})
    assert first.sparsity == 0.5
    assert first.calibration is not None and first.calibration.source == "synthetic"
    assert first.calibration == again.calibration and first.calibration != other.calibration


def test_several_texts_and_none(tiny_model_dir: Path, texts: Texts, text_file: Path, eval_file: Path) -> None:
    """Every text is measured; a text that also calibrated is pointed out; no text means no verdict."""
    report = llmprune.prune(tiny_model_dir, **{**texts, "eval": (str(eval_file), str(text_file))})
    assert [quality.text.source for quality in report.quality] == [str(eval_file), str(text_file)]
    assert all(quality.kl and quality.kl > 0 for quality in report.quality)
    assert any("serves for calibration and evaluation" in warning for warning in report.warnings)
    unmeasured = llmprune.prune(tiny_model_dir, **{**texts, "eval": ()})
    assert unmeasured.quality == () and unmeasured.verdict.status == "unmeasured"


def test_broken_model_is_called_broken(trained_model_dir: Path, texts: Texts, tmp_path: Path) -> None:
    """A perplexity above twice the dense one is said plainly in the report and on both pages."""
    report = llmprune.prune(trained_model_dir, method="magnitude", sparsity=0.95, out=tmp_path / "out", **texts)
    ratio = report.quality[0].ratio
    assert ratio is not None and ratio > 2
    assert report.verdict.status == "broken" and "Broken" in report.verdict.text
    for page in ("README.md", "report.html"):
        assert "Broken" in (tmp_path / "out" / page).read_text()


def test_latency_is_measured_dense_and_pruned(tiny_model_dir: Path, texts: Texts) -> None:
    """Prefill and decode, before and after, with the note that zeros in dense tensors bring no speed."""
    report = llmprune.prune(tiny_model_dir, **{**texts, "latency": True})
    assert report.latency is not None and report.latency.note
    phases = [speed.phase for speed in report.latency.dense]
    assert phases == [speed.phase for speed in report.latency.pruned] == ["prefill", "decode"]
    assert all(speed.tokens_per_second > 0 for speed in (*report.latency.dense, *report.latency.pruned))


def test_inspect_shows_the_pruned_checkpoint(written: tuple[Path, Report]) -> None:
    """Sites, shared inputs and existing zeros of a checkpoint."""
    out, _ = written
    inspection = llmprune.inspect(out)
    assert inspection.stack == "model.layers" and not inspection.tied_embeddings
    assert [len(sites) for sites in inspection.blocks] == [SITES_PER_BLOCK] * 2
    assert all(site.num_zeros == site.shape[0] * site.shape[1] // 2 for sites in inspection.blocks for site in sites)
    groups = [site.input_group for site in inspection.blocks[0]]
    assert groups[0] == groups[1] == groups[2] and groups[4] == groups[5] and len(set(groups)) == 4
    assert set(inspection.not_pruned) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_plan_agrees_with_the_job(written: tuple[Path, Report], tiny_model_dir: Path, texts: Texts, tmp_path: Path) -> None:
    """What the plan says of sites, tokens and walk is what the job then does."""
    _, report = written
    plan = llmprune.plan(tiny_model_dir, method="wanda", out=tmp_path / "out", **texts)
    assert plan.fits and plan.num_sites == report.num_sites
    assert plan.num_pruned_weights == report.model.num_prunable
    assert (plan.model.num_parameters, plan.model.dtype) == (report.model.num_parameters, report.model.dtype)
    assert (plan.walk, plan.seq_len, plan.calibration_tokens) == ("two-pass", 32, 4 * 32)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not (Path(llmprune.__file__).parent / "demo_model" / "model.safetensors").is_file(), reason="not trained")
def test_bundled_demo_model_prunes(tmp_path: Path) -> None:
    """The default of everything: demo model, standard library text."""
    report = llmprune.prune("demo", out=tmp_path / "out", **{**tiny.QUICK, "seq_len": 64})
    assert report.sparsity == 0.5 and report.model.name == "demo"
    assert report.calibration is not None and report.calibration.source == "stdlib"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_overrides_and_config_are_one(tiny_model_dir: Path, texts: Texts) -> None:
    """A PruneConfig and the same fields by name are the same job."""
    config = llmprune.PruneConfig(model=str(tiny_model_dir), method="magnitude", **texts)
    report: Report = llmprune.prune(config=config, sparsity=0.25)
    assert report.config == config.model_copy(update={"sparsity": 0.25})
    assert report.sparsity == 0.25


def test_public_functions_are_no_submodules() -> None:
    """Importing a submodule binds its name in the package: a public function of that name would be gone."""
    functions = [name for name in llmprune.__all__ if callable(getattr(llmprune, name)) and name.islower()]
    known = "benchmark compare convert evaluate export_report fetch generate inspect load plan prune prune_iter read_report"
    assert sorted(functions) == ["auto", "auto_iter", *known.split(), "recover", "recover_iter", "sweep", "sweep_iter"]
    assert all(importlib.util.find_spec(f"llmprune.{name}") is None for name in functions)
    assert set(llmprune.__all__) <= set(dir(llmprune))
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = llmprune.prun


@pytest.mark.parametrize(("method", "warned"), [("sparsegpt", True), ("alps", True), ("wanda", False)])
def test_too_few_tokens_for_a_gram_matrix(tiny_model_dir: Path, texts: Texts, method: str, warned: bool) -> None:
    """Fewer tokens than a site has inputs: methods that invert their products warn, with the remedy, and go on."""
    report = llmprune.prune(tiny_model_dir, **{**texts, "num_samples": 1, "seq_len": 16}, method=method)
    messages = [message for message in report.warnings if "16 calibration tokens are fewer than" in message]
    assert len(messages) == warned
    assert all("--num-samples" in message and "lacks rank" in message for message in messages)


@pytest.mark.parametrize("effort", EFFORTS)
def test_efforts(tiny_model_dir: Path, texts: Texts, effort: str) -> None:
    """Each runs through, and the report shows what it set."""
    report = llmprune.prune(tiny_model_dir, **{**texts, "num_samples": 4, "batch_size": 1}, effort=effort, reconstruct_steps=4)
    assert report.config.effort == effort
    assert report.config.method == EFFORTS[effort].fields["method"]
    assert all(bool(block.reconstruction) == (effort != "fast") for block in report.blocks)


def test_permuted_models_pack(tiny_model_dir: Path, texts: Texts, tmp_path: Path) -> None:
    """Channels in another order are consecutive in what is written: every matrix packs, and loads as what was measured."""
    out = tmp_path / "out"
    report = llmprune.prune(tiny_model_dir, out=out, pattern="2:4", permute=True, export="packed", **texts)
    moved = [permutation for block in report.blocks for permutation in block.permutations if not permutation.reason]
    assert moved and any(permutation.kept_after > permutation.kept_before for permutation in moved)
    assert report.packed is not None and report.packed.num_sites == report.num_sites
    again = llmprune.evaluate(out, **{name: texts[name] for name in ("eval", "seq_len", "max_eval_tokens", "latency")})
    assert again.quality[0].perplexity_pruned == pytest.approx(report.quality[0].perplexity_pruned, rel=1e-4)
