"""What goes whole through the whole job: what is written, loaded, reported and refused, and what a resumed run does."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmprune
import tiny
from families import tiny_model
from forked import run
from llmprune.errors import ConfigError, UnsupportedModel
from llmprune.events import Event, Finished, Progress, StageStarted
from llmprune.io import journal
from llmprune.io.journal import Journal
from llmprune.report import Report
from llmprune.spec import Pattern
from llmprune.structured.units import Module
from llmprune.structuring import groups

TYR: dict[str, Any] = {"method": "tyr", "tyr_iterations": 2, "tyr_generations": 2, "tyr_offspring": 4}
IDS = torch.arange(24).view(2, 12) % tiny.VOCAB_SIZE


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, text_file: Path, eval_file: Path) -> dict[str, Any]:
    """A quick and offline job on a model of four kv groups and four blocks that has learnt the text."""
    model = tiny.make_model(num_hidden_layers=4, num_key_value_heads=4, num_attention_heads=4, intermediate_size=96)
    folder = tiny.save(tiny.train_(model, 40), tmp_path_factory.mktemp("models") / "wide")
    texts = {"calibration": str(text_file), "eval": str(eval_file)}
    return {"model": str(folder), **texts, **tiny.QUICK, "num_samples": 16}


@pytest.fixture(scope="module")
def pruned(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """A model with widths of its own for every layer, and its report."""
    out = tmp_path_factory.mktemp("out") / "widths_by_layer"  # a name that no other code of a checkpoint has
    return llmprune.prune(**job, **TYR, budget="parameters", sparsity=0.3, out=out), out


@pytest.fixture(scope="module")
def whole(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, bytes]:
    """An uninterrupted search: its report, and the weights it wrote."""
    out = tmp_path_factory.mktemp("out") / "whole"
    begun = time.perf_counter()
    report = llmprune.prune(**job, **TYR, sparsity=0.25, out=out)
    assert 0 < report.seconds < time.perf_counter() - begun
    return report, (out / "model.safetensors").read_bytes()


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def test_tyr_makes_a_smaller_model(pruned: tuple[Report, Path], job: dict[str, Any]) -> None:
    """Parameters are gone in fact and in the report; the search never got worse; quality was measured on the sliced model."""
    report, out = pruned
    structure = report.structure
    assert structure is not None and structure.structure == "structured" and not report.blocks
    dense, smaller = llmprune.load(job["model"]), llmprune.load(out)
    assert structure.num_parameters == smaller.num_parameters() < dense.num_parameters() == structure.num_parameters_dense
    assert structure.num_parameters_dense - structure.num_parameters == structure.num_removed
    assert 0.3 <= report.sparsity < 0.45 and structure.sparsity == report.sparsity
    assert len(structure.modules) == 8 and {module.unit for module in structure.modules} == {"kv group", "channel"}
    assert structure.kv_bytes is not None and structure.kv_bytes_dense is not None
    assert structure.kv_bytes <= structure.kv_bytes_dense == 4 * 2 * 4 * (dense.config.hidden_size)
    assert len(structure.iterations) == 2 and structure.settled is None
    for one in structure.iterations:
        values = [kl for _, kl in one.curve]
        assert values == sorted(values, reverse=True) and one.num_evaluated >= 1 and one.supernet_bytes > 0
    sizes = [point.num_parameters for point in structure.front]
    assert len(sizes) > 3 and max(sizes) == structure.num_parameters_dense and any(p.kl_measured for p in structure.front)
    assert [stage.name for stage in report.stages] == ["load", "calibration", "dense", "structure", "pruned", "save"]
    again = llmprune.evaluate(str(out), eval=report.config.eval, seq_len=32, max_eval_tokens=512, latency=False)
    assert again.quality[0].perplexity_pruned == pytest.approx(report.quality[0].perplexity_pruned, rel=1e-6)
    assert (report.quality[0].kl or 0) > 0


def test_widths_of_their_own_load_with_and_without_llmprune(pruned: tuple[Report, Path]) -> None:
    """By llmprune.load and, with the code in the checkpoint, by transformers; both compute the same."""
    _, out = pruned
    assert (out / "modeling_pruned.py").is_file()
    ours = llmprune.load(out)
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(_logits(ours), _logits(theirs.eval()))
    written = llmprune.generate(str(out), prompt="the model", max_new_tokens=4)
    assert written.generated.num_tokens >= 1


def test_a_sliced_checkpoint_is_a_model_like_any_other(
    pruned: tuple[Report, Path], job: dict[str, Any], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """It is planned, inspected, pruned to 2:4 on top, and sliced once more."""
    _, out = pruned
    assert cli("inspect", out).code == 0 and cli("plan", out, "--calibration", job["calibration"], "--no-eval").code == 0
    options = job | {"model": str(out)}
    sparse = llmprune.prune(**options, method="wanda", pattern="2:4", skip=("*.down_proj", "*.o_proj"), out=tmp_path / "sparse")
    assert sparse.sparsity == 0.5 and llmprune.load(tmp_path / "sparse").num_parameters() == llmprune.load(out).num_parameters()
    twice = llmprune.prune(**options, method="flap", sparsity=0.1, out=tmp_path / "twice")
    assert twice.structure is not None and twice.structure.num_parameters < twice.structure.num_parameters_dense
    assert torch.isfinite(_logits(llmprune.load(tmp_path / "twice"))).all()
    for asked, way_out in (({"pattern": "blocks"}, "first"), ({"method": "magnitude", "widths": "uniform"}, "--widths free")):
        with pytest.raises(UnsupportedModel, match=way_out):
            llmprune.prune(**options, **({"pattern": "structured"} | asked), out=tmp_path / "refused")


@pytest.mark.parametrize("method", ["tyr", "flap", "magnitude"])
def test_uniform_widths_are_an_ordinary_checkpoint(method: str, job: dict[str, Any], tmp_path: Path) -> None:
    """Stock transformers loads it without any code, and every layer has the config's widths."""
    more = {"tyr_preset": "fast"} if method == "tyr" else {}
    report = llmprune.prune(
        **job, method=method, pattern="structured", widths="uniform", sparsity=0.25, out=tmp_path / "out", **more
    )
    assert report.structure is not None and report.structure.stock and not list((tmp_path / "out").glob("*.py"))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config and config["intermediate_size"] < 96
    assert {layer.mlp.down_proj.in_features for layer in model.model.layers} == {config["intermediate_size"]}
    assert report.sparsity >= 0.25 and model.num_parameters() == report.structure.num_parameters


@pytest.mark.parametrize("method", ["flap", "magnitude"])
def test_baselines_keep_what_they_keep(method: str, job: dict[str, Any], tmp_path: Path) -> None:
    """Rows of what stays are rows of the dense model, and the model is smaller by what the report says."""
    report = llmprune.prune(**job, method=method, pattern="structured", sparsity=0.25, out=tmp_path / "out")
    assert report.structure is not None and report.structure.num_removed > 0
    before, after = llmprune.load(job["model"]).state_dict(), llmprune.load(tmp_path / "out").state_dict()
    for name, weight in after.items():
        if name.endswith("up_proj.weight"):
            assert {tuple(row.tolist()) for row in weight} <= {tuple(row.tolist()) for row in before[name]}


@pytest.mark.parametrize("method", ["block-qubo", "drop-one", "shortgpt"])
def test_blocks_go_whole(method: str, job: dict[str, Any], tmp_path: Path) -> None:
    """The others' weights are as they were, and the checkpoint is an ordinary one of fewer layers."""
    report = llmprune.prune(**job, pattern="blocks", method=method, sparsity=0.5, out=tmp_path / "out")
    structure = report.structure
    assert structure is not None and len(structure.blocks_removed) == 2 and len(structure.block_scores) == 4
    assert structure.choices[0].blocks == structure.blocks_removed and report.sparsity == 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    kept = [index for index in range(4) if index not in structure.blocks_removed]
    before, after = load_file(Path(job["model"]) / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for new, old in enumerate(kept):
        name = "mlp.down_proj.weight"
        assert torch.equal(after[f"model.layers.{new}.{name}"], before[f"model.layers.{old}.{name}"])
    assert math.isfinite(structure.choices[0].kl) and structure.kv_bytes == (structure.kv_bytes_dense or 0) // 2


@pytest.mark.parametrize("method", ["reap", "frequency"])
def test_experts_go_whole(method: str, moe_model_dir: Path, job: dict[str, Any], tmp_path: Path) -> None:
    """With their rows of the router; the checkpoint says how many there are."""
    options = job | {"model": str(moe_model_dir)}
    report = llmprune.prune(**options, method=method, sparsity=0.25, out=tmp_path / "out")
    assert report.config.pattern == "experts" and report.structure is not None
    assert [(module.unit, module.num_groups, module.num_kept) for module in report.structure.modules] == [("expert", 4, 3)] * 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_local_experts == 3 and model.num_parameters() == report.structure.num_parameters
    assert report.sparsity == 0.25


def test_tyr_takes_experts_out_too(moe_model_dir: Path, job: dict[str, Any], tmp_path: Path) -> None:
    """Of all mixtures alike, by the config; of some by the code in the checkpoint, with attention; or of none, and why."""
    options = job | {"model": str(moe_model_dir), "method": "tyr", "sparsity": 0.25}
    alike = llmprune.prune(**options, tyr_preset="local", skip=("*self_attn*",), out=tmp_path / "alike")
    assert alike.structure is not None and alike.structure.stock and alike.sparsity == 0.25
    assert [(one.unit, one.num_groups, one.num_kept) for one in alike.structure.modules] == [("expert", 4, 3)] * 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "alike")
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (3, 2)
    assert model.num_parameters() == alike.structure.num_parameters
    search = {"tyr_iterations": 1, "tyr_generations": 1, "tyr_offspring": 4}
    report = llmprune.prune(**options, **search, budget="parameters", out=tmp_path / "free")
    structure = report.structure
    assert structure is not None and {one.unit for one in structure.modules} == {"expert", "kv group"}
    assert 0.25 <= report.sparsity < 0.5 and "experts of 1" in structure.iterations[0].steps
    loaded = llmprune.load(tmp_path / "free")
    assert loaded.num_parameters() == structure.num_parameters == structure.num_parameters_dense - structure.num_removed
    plan = llmprune.plan(moe_model_dir, method="tyr", calibration=job["calibration"], eval=())
    assert plan.num_modules == len(structure.modules) == 4 and plan.num_pruned_weights == structure.num_removable
    for asked, why in ({"widths": "uniform"}, "--widths free"), ({"budget": "latency"}, "cost no time"):
        whole = llmprune.prune(**options | {"sparsity": 0.5}, tyr_preset="local", out=tmp_path / why, **asked)
        assert whole.structure is not None and why in whole.structure.left["model.layers.0.mlp.experts"]


def test_a_stopped_search_goes_on_to_the_same_bytes(whole: tuple[Report, bytes], job: dict[str, Any], tmp_path: Path) -> None:
    """Stopped at every generation in turn, and after the choice: the checkpoint is the uninterrupted run's."""
    options = {**job, **TYR, "sparsity": 0.25}
    uninterrupted, weights = whole

    def run(stop: Callable[[Event], bool], out: Path) -> Report | None:
        events = llmprune.prune_iter(**options, out=out, resume=True)
        for event in events:
            if isinstance(event, Finished):
                return event.report
            if stop(event):
                events.close()  # type: ignore[attr-defined]
                return None
        return None

    seen: set[int] = set()
    out = tmp_path / "resumed"

    def next_generation(event: Event) -> bool:
        if isinstance(event, Progress) and event.detail.startswith("search") and event.done not in seen:
            seen.add(event.done)
            return True
        return False

    report = None
    for _ in range(8):
        report = run(next_generation, out)
        if report:
            break
    assert report is not None and report.resumed and len(seen) >= 3
    assert report.structure is not None and uninterrupted.structure is not None
    assert [one.curve for one in report.structure.iterations] == [one.curve for one in uninterrupted.structure.iterations]
    assert (out / "model.safetensors").read_bytes() == weights
    late = tmp_path / "late"
    assert run(lambda event: isinstance(event, Progress) and event.stage == "pruned", late) is None
    assert (tmp_path / "late.work" / "structured").is_dir()
    assert run(lambda _: False, late) is not None
    assert (late / "model.safetensors").read_bytes() == weights


def _die_writing() -> None:
    """SIGKILL this process when the second state of a search is written and not yet in its place."""
    sync = journal.sync_directory

    def stop(directory: Path) -> None:
        if directory.name.startswith(".tmp-structure-") and any(directory.parent.glob("structure-*")):
            os.kill(os.getpid(), signal.SIGKILL)
        sync(directory)

    journal.sync_directory = stop


def _die_tidying() -> None:
    """SIGKILL this process when the second state of a search is in its place and the first one is still there."""
    sync = journal.sync_directory

    def stop(directory: Path) -> None:
        sync(directory)
        if len(list(directory.glob("structure-*"))) > 1:
            os.kill(os.getpid(), signal.SIGKILL)

    journal.sync_directory = stop


@pytest.mark.parametrize("die", [None, _die_writing, _die_tidying], ids=["generation", "write", "tidy"])
def test_a_killed_search_goes_on_to_the_same_bytes(
    die: Callable[[], None] | None, whole: tuple[Report, bytes], job: dict[str, Any], tmp_path: Path
) -> None:
    """A process of the command line, SIGKILLed at a generation of the search and while its state is written, and resumed."""
    _, weights = whole
    out, work = tmp_path / "out", Journal(tmp_path / "out.work")
    options = {**{name: value for name, value in job.items() if name not in ("model", "latency")}, **TYR, "sparsity": 0.25}
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    events = ["--events", str(tmp_path / "events.jsonl")]
    argv = ["prune", job["model"], "--out", str(out), "--no-latency", "--no-prompt", "--resume", *given, *events]
    rng = random.Random(2)
    number, delay = rng.randrange(1, 4), rng.choice([0, 0.002])

    def generation(event: Event) -> bool:
        nonlocal number
        number -= isinstance(event, Progress) and event.stage == "structure" and event.detail.startswith("search")
        return number == 0

    code, _ = run(argv, None if die else generation, delay=delay, before=die)
    assert code == -signal.SIGKILL and not out.exists() and not work.has("structured")
    states = sorted(folder.name for folder in work.directory.glob("structure-*"))
    assert len(states) == (2 if die is _die_tidying else 1)
    assert bool(list(work.directory.glob(".tmp-structure-*"))) == (die is _die_writing) or die is None
    before = work.read(states[-1], [])
    code, seen = run(argv)
    assert code == 0 and isinstance(seen[-1], Finished) and seen[-1].report.resumed
    (begun,) = [event for event in seen if isinstance(event, StageStarted) and event.stage == "structure"]
    assert begun.resumed_at == before["done"] > 0
    assert (out / "model.safetensors").read_bytes() == weights
    assert sorted(file.name for file in tmp_path.iterdir()) == ["events.jsonl", "out"]


@pytest.mark.parametrize("widths", ["free", "uniform"])
def test_a_budget_of_seconds(widths: str, job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is in the report and on its page, the share of it is gone, and a resumed run does not measure again."""
    measured: list[dict[str, float]] = []
    measure = groups.seconds_per_group

    def count(model: PreTrainedModel, modules: Sequence[Module]) -> dict[str, float]:
        measured.append(measure(model, modules, prompt_tokens=16, repeats=3, seconds=0.02))
        return measured[-1]

    monkeypatch.setattr(groups, "seconds_per_group", count)
    options = {**job, **TYR, "widths": widths, "budget": "latency", "sparsity": 0.3, "out": tmp_path / "out"}
    events = llmprune.prune_iter(**options)
    assert any(isinstance(event, Progress) and event.stage == "structure" for event in events)
    events.close()  # type: ignore[attr-defined]
    (costs,) = measured
    name = Journal(tmp_path / "out.work").latest("structure")
    assert name == "structure-000000" and Journal(tmp_path / "out.work").read(name, [])["costs"] == costs
    report = llmprune.prune(**options, resume=True)
    structure = report.structure
    assert len(measured) == 1 and report.resumed and structure is not None
    for unit, part in (("kv group", "self_attn"), ("channel", "mlp")):
        own = [seconds for module, seconds in costs.items() if module.endswith(part)]
        assert structure.group_seconds[unit] == pytest.approx(sum(own) / 4) and min(own) > 0  # type: ignore[index]
    gone = sum(costs[module.name] * (module.num_groups - module.num_kept) for module in structure.modules)
    total = sum(costs[module.name] * module.num_groups for module in structure.modules)
    # Seconds are rounded to a thousandth of the cheapest group.
    assert gone / total == pytest.approx(structure.sparsity_of_seconds) and 0.299 < gone / total < 1
    assert llmprune.load(tmp_path / "out").num_parameters() == structure.num_parameters < structure.num_parameters_dense
    assert "all groups&#39; time taken out" in (tmp_path / "out" / "report.html").read_text()


def test_a_model_in_memory_gets_smaller_in_place(job: dict[str, Any]) -> None:
    """The object that was given."""
    model = llmprune.load(job["model"])
    before = model.num_parameters()
    options = {name: value for name, value in job.items() if name != "model"}
    report = llmprune.prune(model, tokenizer=tiny.train_tokenizer(), method="magnitude", pattern="structured", **options)
    assert report.structure is not None and model.num_parameters() == report.structure.num_parameters < before


@pytest.mark.parametrize("asked", [{}, {"tyr_preset": "fast", "widths": "uniform"}, {"method": "flap"}, {"pattern": "blocks"}])
def test_plan_knows_what_a_search_takes(asked: dict[str, Any], job: dict[str, Any]) -> None:
    """A stage with seconds and memory; more generations take longer."""
    options = {name: value for name, value in job.items() if name != "latency"}
    plan = llmprune.plan(**options, **({"pattern": "structured", "sparsity": 0.25} | asked))
    (stage,) = [stage for stage in plan.stages if stage.name == "structure"]
    assert stage.seconds > 0 and stage.peak_cpu_bytes > 0 and plan.walk == "none"
    if not asked:
        paper = llmprune.plan(**options, method="tyr", tyr_preset="paper", sparsity=0.25)
        (more,) = [stage for stage in paper.stages if stage.name == "structure"]
        assert more.seconds > stage.seconds


def test_plan_counts_modules(job: dict[str, Any], cli: Callable[..., Any]) -> None:
    """Of structured pruning what can go from the modules; what is skipped is left whole."""
    options = {name: value for name, value in job.items() if name != "latency"}
    plan = llmprune.plan(**options, pattern="structured", method="magnitude", skip=("*.0.self_attn.*",))
    model = llmprune.load(job["model"])
    names = [
        name for name, _ in model.named_parameters() if "_proj" in name and not name.startswith("model.layers.0.self_attn")
    ]
    assert (plan.num_modules, plan.num_sites, list(plan.left)) == (7, len(names), ["model.layers.0.self_attn"])
    assert plan.num_pruned_weights == sum(model.get_parameter(name).numel() for name in names)
    shown = cli("plan", job["model"], "--pattern", "structured", "--calibration", job["calibration"], "--no-eval").out
    assert "28 matrices of 8 modules" in shown and "Left whole" not in shown


@pytest.mark.parametrize(
    ("model_type", "words", "left"),
    [
        ("olmo2", "only FFNs are sliced, no attention: 2 modules are left whole, e.g. model.layers.0.self_attn: ", "self_attn"),
        ("mixtral", "only attention is sliced, no FFN: 2 modules are left whole, e.g. model.layers.0.", "mlp"),
    ],
    ids=["attention", "ffn"],
)
def test_what_is_left_whole_is_told(
    model_type: str, words: str, left: str, job: dict[str, Any], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """One warning with the number and a reason, by the job and in the plan; none of what --skip names."""
    folder = tiny.save(tiny_model(model_type), tmp_path / "model")
    options = {**job, "model": str(folder), "method": "magnitude", "pattern": "structured", "sparsity": 0.25, "eval": ()}
    report = llmprune.prune(**options)
    (warning,) = [message for message in report.warnings if "left whole" in message]
    assert warning.startswith(words) and report.structure is not None and len(report.structure.left) == 2
    asked = ("--method", "magnitude", "--pattern", "structured", "--calibration", job["calibration"], "--no-eval")
    plan = cli("plan", folder, *asked)
    assert "Left whole" in plan.out and "2 modules, e.g. model.layers.0" in plan.out
    skipped = llmprune.prune(**options, skip=(f"*.{left}",))
    assert not any("left whole" in message for message in skipped.warnings)


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"method": "tyr", "sparsity": 0.99, "widths": "uniform"}, ConfigError, ("0.99", "--sparsity")),
        ({"method": "tyr", "sparsity": 0.99}, ConfigError, ("0.99", "all groups", "--sparsity")),
        (
            {"method": "tyr", "widths": "uniform", "skip": ("model.layers.0.*",)},
            UnsupportedModel,
            ("layers.0", "--widths free"),
        ),
        ({"method": "flap", "sparsity": 0.99}, ConfigError, ("0.99",)),
        ({"method": "tyr", "skip": ("*",)}, UnsupportedModel, ("--skip", "all 8 modules")),
        ({"pattern": "blocks", "sparsity": 0.05}, ConfigError, ("0.05", "4 blocks", "1 to 3")),
        ({"pattern": "blocks", "sparsity": 0.95}, ConfigError, ("0.95", "1 to 3")),
        ({"pattern": "experts"}, UnsupportedModel, ("no experts",)),
    ],
)
def test_what_cannot_go_is_refused(
    asked: dict[str, Any], error: type[Exception], words: tuple[str, ...], job: dict[str, Any], tmp_path: Path
) -> None:
    """Before anything is measured, and by the plan, with what can."""
    for ask in (llmprune.prune, llmprune.plan):
        with pytest.raises(error) as caught:
            ask(**job | {"out": tmp_path / "out"} if ask is llmprune.prune else job, **asked)
        assert all(word in str(caught.value) for word in words)
    assert not list(tmp_path.iterdir())


def test_every_structure_is_in_the_command_line(job: dict[str, Any], tmp_path: Path, cli: Callable[..., Any]) -> None:
    """--json prints the report; --help teaches the options."""
    outcome = cli(
        "prune", job["model"], "--out", tmp_path / "out", "--method", "magnitude", "--pattern", "structured", "--calibration",
        job["calibration"], "--no-eval", "--num-samples", 4, "--seq-len", 32, "--no-latency", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    report = Report.model_validate_json(outcome.out)
    assert report.structure is not None and Pattern.parse(report.config.pattern).structure == "structured"
    assert "--tyr-preset" in cli("prune", "--help").out
    listed = json.loads(cli("methods", "--json").out)["structural"]
    assert {"tyr", "flap", "reap", "block-qubo"} <= {method["name"] for method in listed}
