"""Recovery: what is trained is what is merged, zeros and shapes stay, and the held-out loss falls."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

import llmprune
import tiny
from llmprune.anatomy.blocks import Stack, find_stack, probe
from llmprune.engines.recover import Trained, Zeros, _lora, _Objective, _schedule, make_accelerator, recomputed, recover_
from llmprune.errors import ConfigError, ModelNotFound, NonFiniteError, OutputError, TextTooShort
from llmprune.events import Progress, Recovered, Warned, parse_event
from llmprune.io.checkpoint import read_any_manifest
from llmprune.masks import keep_mask
from llmprune.recovery import recover_iter
from llmprune.recovery_spec import RecoverConfig
from llmprune.report import Recovery, RecoveryPoint
from llmprune.spec import Pattern
from two_four_weights import prune_

CPU = torch.device("cpu")
LORA = pytest.param("lora", marks=pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed"))
MODES = [LORA, "full"]
QUICK: dict[str, Any] = {
    "steps": 12, "num_samples": 16, "seq_len": 32, "batch_size": 4, "max_eval_tokens": 256, "device": "cpu", "rank": 4
}  # fmt: skip


def needs_peft() -> None:
    """Skip where it is not installed."""
    pytest.importorskip("peft", reason="peft is not installed: pip install 'llmprune[recover]'")


def ids(num: int = 16, seed: int = 0) -> Tensor:
    """Windows of the tiny language."""
    tokens = torch.tensor(tiny.train_tokenizer()(tiny.prose(1500, seed=seed))["input_ids"])
    return tokens[: num * 24].view(num, 24)


def stack_of(model: PreTrainedModel) -> Stack:
    return probe(model, find_stack(model), torch.arange(3, 19)[None])


def train(model: PreTrainedModel, teacher: PreTrainedModel | None = None, **fields: Any) -> tuple[list[Any], Trained]:
    """Recover in memory; all that was yielded, and what was returned."""
    config = RecoverConfig.build(model="tiny", **({"steps": 12, "batch_size": 4, "rank": 4} | fields))
    teach = None if teacher is None else lambda ids_NS: teacher(input_ids=ids_NS, use_cache=False).logits
    accelerator = make_accelerator(CPU, model.dtype, config)
    training = recover_(model, stack_of(model), ids(), ids(4, seed=5), teach, config, accelerator)
    events = []
    while True:
        try:
            events.append(next(training))
        except StopIteration as stop:
            return events, stop.value


def pruned(model: PreTrainedModel, pattern: str) -> PreTrainedModel:
    """A copy of it, pruned by magnitude."""
    model = copy.deepcopy(model)
    for sites in find_stack(model).sites:
        for site in sites:
            keep = keep_mask(site.weight_OI.abs(), Pattern.parse(pattern), 0.6, "matrix")
            site.weight_OI.mul_(keep)
    return model


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    """A tiny Llama that knows its language; read only."""
    return tiny.train_(tiny.make_model(), 60).requires_grad_(False)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "dbrx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_those_that_were_trained(model_type: str, dtype: torch.dtype) -> None:
    """Linear, transposed and expert matrices: same logits bit for bit, other weights, every zero where it was."""
    needs_peft()
    model = pruned(tiny.make_model(model_type, dtype=dtype), "unstructured")
    zeros, before = Zeros.of(model), copy.deepcopy(model)
    training = _lora(model, stack_of(model), RecoverConfig(model="tiny", rank=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in training.parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        trained = training.module(input_ids=ids(2), use_cache=False).logits
        training.finish()
        merged = model(input_ids=ids(2), use_cache=False).logits
        assert torch.equal(trained, merged)
        assert not torch.equal(merged, before(input_ids=ids(2)).logits)
    assert len(zeros.bits) >= 8
    zeros.check(model)
    for (name, one), (other, two) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert name == other and one.shape == two.shape and one.dtype == two.dtype
    changed = [site for sites in find_stack(model).sites for site in sites]
    originals = [site for sites in find_stack(before).sites for site in sites]
    assert all(not torch.equal(one.stored, two.stored) for one, two in zip(changed, originals, strict=True))


def test_an_update_is_the_masked_product() -> None:
    """W + (W != 0) * 2 B A, in fp64 from the adapters themselves."""
    needs_peft()
    model = pruned(tiny.make_model(), "unstructured")
    weight_OI = model.model.layers[0].mlp.up_proj.weight.detach().double()
    training = _lora(model, stack_of(model), RecoverConfig(model="tiny", rank=3))
    adapter = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        adapter.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
    a_RI, b_OR = adapter.lora_A["default"].weight.double(), adapter.lora_B["default"].weight.double()
    expected_OI = torch.where(weight_OI != 0, weight_OI + 2 * b_OR @ a_RI, 0.0)
    training.finish()
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.double(), expected_OI, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_held_out_divergence_falls_and_zeros_stay(dense: PreTrainedModel, mode: str, pattern: str) -> None:
    """From the teacher alone; the reported loss is the one of the weights that are left; the pattern holds."""
    model = pruned(dense, pattern)
    zeros = Zeros.of(model)
    events, trained = train(model, dense, mode=mode, steps=20)
    points = [event for event in events if isinstance(event, RecoveryPoint)]
    assert trained.points == tuple(points) and not trained.rolled_back
    assert [event for event in events if isinstance(event, int)] == list(range(1, 21))
    lowest = min(point.loss for point in points)
    assert lowest < 0.9 * points[0].loss
    with torch.no_grad():
        log_p, log_q = (F.log_softmax(one(input_ids=ids(4, seed=5)).logits[:, :-1], -1) for one in (dense, model))
    assert float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) == pytest.approx(lowest, rel=1e-4)
    zeros.check(model)
    if pattern == "2:4":
        for name, parameter in model.named_parameters():
            if "proj" in name:
                assert int((parameter == 0).unflatten(1, (-1, 4)).sum(-1).min()) >= 2
    assert not any(isinstance(module, nn.Module) and "Wrapper" in type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("mode", MODES)
def test_the_same_seed_trains_the_same_weights(dense: PreTrainedModel, mode: str) -> None:
    """And another one others."""
    trained = []
    for seed in (0, 0, 1):
        trained.append(pruned(dense, "unstructured"))
        train(trained[-1], dense, mode=mode, seed=seed, steps=4)
    one, two, three = (model.model.layers[0].mlp.up_proj.weight for model in trained)
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_forwards_that_make_a_step_are_as_one_large_batch(dense: PreTrainedModel) -> None:
    """Two of four sequences, and one of eight."""
    trained = []
    for batch_size, accumulate in ((4, 2), (8, 1)):
        trained.append(pruned(dense, "unstructured"))
        train(trained[-1], dense, mode="full", steps=2, batch_size=batch_size, accumulate=accumulate)
    one, two = (model.model.layers[0].mlp.up_proj.weight for model in trained)
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_rate_that_only_harms_is_rolled_back(dense: PreTrainedModel, mode: str) -> None:
    """A student that is its teacher cannot get better: its weights come back bit for bit."""
    model = copy.deepcopy(dense)
    _, trained = train(model, dense, mode=mode, steps=3)
    assert trained.rolled_back and len(trained.points) == 4
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), dense.parameters(), strict=True))


def test_a_loss_that_is_not_finite_stops(dense: PreTrainedModel) -> None:
    """With the remedy; and before any step where the checkpoint itself is broken."""
    with pytest.raises(ConfigError, match=r"not finite any more in step \d.*Lower --lr"):
        train(pruned(dense, "unstructured"), dense, mode="full", lr=1e30)
    broken = copy.deepcopy(dense)
    broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="before any training"):
        train(broken, dense, mode="full")


def test_full_training_of_half_precision_comes_back_in_it(dense: PreTrainedModel) -> None:
    """It is held in fp32 meanwhile; zeros survive the way back."""
    model = pruned(dense, "unstructured").to(torch.bfloat16)
    zeros = Zeros.of(model)
    _, trained = train(model, dense, mode="full", steps=6)
    assert not trained.rolled_back
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    zeros.check(model)
    with pytest.raises(AssertionError, match="lost zeros"):
        zeros.check(dense)


def test_the_loss_is_the_weighted_sum_however_it_is_cut(dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition in fp64; in parts it has the same value and the same gradient."""
    student = pruned(dense, "unstructured").requires_grad_(True)
    batch_NS = ids(3)
    teach = lambda ids_NS: dense(input_ids=ids_NS).logits
    log_p, log_q = (F.log_softmax(one(input_ids=batch_NS).logits[:, :-1].double(), -1) for one in (dense, student))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    entropy = -log_q.gather(-1, batch_NS[:, 1:, None]).mean()
    losses, gradients = [], []
    for budget in (1 << 25, 1000):
        monkeypatch.setattr("llmprune.engines.recover._LOSS_BUDGET", budget)
        student.zero_grad()
        loss = _Objective(teach, 0.7, CPU)(student, batch_NS)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(student.model.layers[1].mlp.up_proj.weight.grad.clone())
    assert float(losses[0]) == pytest.approx(float((0.7 * kl + 0.3 * entropy).detach()), rel=1e-5)
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_activations_computed_again_change_nothing(dense: PreTrainedModel) -> None:
    """The gradient is the same, the blocks ran twice, and are as they were afterwards."""
    student, calls = pruned(dense, "unstructured").requires_grad_(True), []
    stack, objective = stack_of(student), _Objective(None, 0.0, CPU)
    student.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for device in (CPU, torch.device("meta")):  # any that is not the CPU
        student.zero_grad()
        with recomputed(stack, device):
            objective(student, ids(2)).backward()
        gradients.append(student.model.layers[0].mlp.up_proj.weight.grad.clone())
    assert len(calls) == 1 + 2
    assert torch.equal(*gradients)
    assert "forward" not in vars(student.model.layers[0])


def test_the_rate_rises_and_falls() -> None:
    """Never zero, highest once, and short runs begin at the top."""
    rates = [_schedule(step, 100) for step in range(1, 101)]
    assert rates[4] == max(rates) == 1 and rates[0] == 0.2
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.01
    assert _schedule(1, 1) == 1


# On disk -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned_dir(trained_model_dir: Path, text_file: Path, eval_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a report, half of it zeros; read only."""
    out = tmp_path_factory.mktemp("recover") / "pruned"
    llmprune.prune(
        trained_model_dir, out=out, method="magnitude", sparsity=0.6, calibration=str(text_file), eval=(str(eval_file),),
        **tiny.QUICK,
    )  # fmt: skip
    return out


def test_a_checkpoint_is_recovered_from_the_command_line(
    cli: Callable[..., Any], pruned_dir: Path, trained_model_dir: Path, tmp_path: Path
) -> None:
    """Teacher, text and evaluation come from its report; JSON, events, files, and what the new report says."""
    needs_peft()
    out, log = tmp_path / "out", tmp_path / "events.jsonl"
    options = ["--steps", 12, "--num-samples", 16, "--batch-size", 4, "--rank", 4, "--device", "cpu"]
    outcome = cli("recover", pruned_dir, "--out", out, *options, "--json", "--events", log)
    assert outcome.code == 0, outcome.err
    recovery = Recovery.model_validate_json(outcome.out)
    assert recovery.teacher == str(trained_model_dir) and recovery.text.seq_len == 32
    assert recovery.loss_after < recovery.loss_before and not recovery.rolled_back
    assert recovery.sparsity_before == recovery.sparsity_after == pytest.approx(0.6, abs=0.01)
    (before,), (after,) = recovery.quality_before, recovery.quality_after
    assert before.perplexity_pruned and after.perplexity_pruned and after.kl and before.kl
    assert after.perplexity_pruned < before.perplexity_pruned and after.kl < before.kl
    assert before.perplexity_dense == after.perplexity_dense
    events = [parse_event(line) for line in log.read_text().splitlines()]
    assert isinstance(events[-1], Recovered) and events[-1].recovery == recovery
    assert [event.done for event in events if isinstance(event, Progress) and event.stage == "recover"] == list(range(1, 13))
    assert Recovery.model_validate_json((out / "recovery.json").read_text()) == recovery
    manifest = read_any_manifest(out)
    assert manifest is not None
    fingerprint, report = manifest
    assert report.recovery == recovery and report.quality == recovery.quality_after and not fingerprint
    assert "then trained" in (out / "README.md").read_text() and "Recovered" in (out / "report.html").read_text()
    one, two = (llmprune.load(folder, device="cpu") for folder in (pruned_dir, out))
    Zeros.of(one).check(two)
    assert not list(tmp_path.glob(".*"))


def test_a_recovery_is_drawn(cli: Callable[..., Any], pruned_dir: Path, tmp_path: Path) -> None:
    """As a table on stdout, without a teacher in full mode."""
    options = ["--steps", 2, "--num-samples", 8, "--device", "cpu", "--mode", "full", "--teacher", "none"]
    outcome = cli("recover", pruned_dir, "--out", tmp_path / "out", *options)
    assert outcome.code == 0, outcome.err
    assert "Held-out loss" in outcome.out and "Sparsity 60" in outcome.out and "Teacher none" in outcome.out


def test_a_sliced_checkpoint_without_a_report_keeps_its_shapes(text_file: Path, tmp_path: Path) -> None:
    """Nothing names its teacher, which is said; the files are plain."""
    needs_peft()
    sliced = tiny.save(tiny.make_model(intermediate_size=96, num_key_value_heads=1, num_attention_heads=2), tmp_path / "sliced")
    events = list(recover_iter(sliced, out=tmp_path / "out", data=str(text_file), eval=(), **QUICK))
    assert any(isinstance(event, Warned) and "names its dense model" in event.message for event in events)
    assert isinstance(events[-1], Recovered)
    recovery = events[-1].recovery
    assert recovery.loss_after < recovery.loss_before and recovery.num_zeros_after == 0 and recovery.teacher is None
    loaded = llmprune.load(tmp_path / "out", device="cpu")
    assert loaded.config.intermediate_size == 96
    assert not (tmp_path / "out" / "llmprune.json").exists()


def test_what_was_pruned_in_memory_has_no_teacher(dense: PreTrainedModel, text_file: Path, tmp_path: Path) -> None:
    """The report names no model then: the bundled one is not taken for it."""
    settings = tiny.QUICK | {"calibration": str(text_file), "eval": ()}
    llmprune.prune(
        copy.deepcopy(dense), tokenizer=tiny.train_tokenizer(), out=tmp_path / "pruned", method="magnitude", **settings
    )
    recovery = llmprune.recover(tmp_path / "pruned", out=tmp_path / "out", mode="full", **(QUICK | {"steps": 2}))
    assert recovery.teacher is None and "names its dense model" in recovery.warnings[0]


def test_refusals(pruned_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in one line with its remedy, and nothing written."""
    out = tmp_path / "out"

    def refused(error: type[Exception], match: str, model: Path = pruned_dir, out: Path = out, **fields: Any) -> None:
        with pytest.raises(error, match=match):
            llmprune.recover(model, out=out, **({"mode": "full"} | QUICK | fields))
        assert not list(tmp_path.glob("*out*"))

    (tmp_path / "empty").mkdir()
    other = tiny.save(tiny.make_model(vocab_size=160), tmp_path / "other")
    (tmp_path / "short.txt").write_text("the model")
    refused(ModelNotFound, "no config.json", model=tmp_path / "empty")
    refused(OutputError, "not empty", out=tmp_path / "other")
    refused(OutputError, "is the input", out=pruned_dir / "inside")
    refused(ConfigError, "rank", rank=0)
    refused(ConfigError, "num_samples", num_samples=1)
    refused(TextTooShort, "token", data=str(tmp_path / "short.txt"))
    refused(ConfigError, r"160 tokens and .* 128", teacher=str(other))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    first, second = list(tokenizer["model"]["vocab"])[40:42]
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(ConfigError, "which 2 are others", teacher=str(other))
    refused(ModelNotFound, "neither a directory", teacher="./not/there")
    sparse = tiny.make_model()
    prune_(sparse, None)
    packed = llmprune.convert(tiny.save(sparse, tmp_path / "sparse"), to="packed").out
    refused(ConfigError, "convert .* --to dense", model=Path(packed))
    monkeypatch.setattr("llmprune.engines.adapters.find_spec", lambda _name: None)
    refused(ConfigError, r"pip install 'llmprune\[recover\]'", mode="lora")


def test_closing_leaves_nothing_behind(pruned_dir: Path, tmp_path: Path) -> None:
    """Cancelled in the middle of training."""
    run = recover_iter(pruned_dir, out=tmp_path / "out", mode="full", **QUICK)
    for event in run:
        if isinstance(event, Progress) and event.stage == "recover":
            break
    run.close()  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", RecoverConfig.model_fields)
def test_every_field_describes_itself(option: str) -> None:
    """Its description is the help of the command line."""
    assert RecoverConfig.model_fields[option].description
