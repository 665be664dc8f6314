"""Bad input: each mistake is one line with its remedy, exit code 2, and leaves nothing half-written."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import llmprune
import tiny
from llmprune import errors
from llmprune.errors import LlmpruneError, UserError
from llmprune.io import checkpoint, journal

Refused = Callable[..., str]

http = importlib.import_module(HTTPError.__module__.partition(".")[0])
"""httpx or its successor: the client of the installed hub library."""


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.fixture
def refused(cli: Callable[..., Any], text_file: Path, eval_file: Path, tmp_path: Path) -> Refused:
    """Prune through both doors: the same error class and message, one line, its exit code, nothing written."""
    how: dict[str, Any] = {"calibration": str(text_file), "eval": str(eval_file), **tiny.QUICK, "latency": None}

    def check(kind: type[LlmpruneError], model: object, *, out: Path | None = None, **overrides: Any) -> str:
        out = out or tmp_path / "result" / "out"
        before = snapshot(tmp_path)
        with pytest.raises(kind) as caught:
            llmprune.prune(str(model), out=out, **{**how, **overrides})
        assert type(caught.value) is kind
        assert snapshot(tmp_path) == before
        options = [part for name, value in {**how, **overrides}.items() for part in option(name, value)]
        outcome = cli("prune", model, "--out", out, *options)
        assert outcome.code == (2 if issubclass(kind, UserError) else 1)
        assert outcome.out == ""
        (line,) = [line for line in outcome.err.splitlines() if line.startswith("Error: ")]
        assert line == outcome.err.splitlines()[-1]
        assert line == f"Error: {' '.join(str(caught.value).split())}"
        assert snapshot(tmp_path) == before
        return str(caught.value)

    return check


def option(name: str, value: Any) -> Iterator[str]:
    """A config field as the command line writes it."""
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        yield flag
    elif isinstance(value, tuple):
        for item in value:
            yield from (flag, str(item))
    elif value is not None:
        yield from (flag, str(value))


def snapshot(directory: Path) -> dict[str, int]:
    """Every path below a directory and its time of change."""
    return {str(file): file.stat().st_mtime_ns for file in directory.rglob("*") if not file.is_dir()} | {
        str(file): 0 for file in directory.rglob("*") if file.is_dir()
    }


def change_json(file: Path, **changes: Any) -> None:
    """Replace keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the weights of a model directory after ``change`` has worked on them."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_unknown_model_offline(refused: Refused) -> None:
    """A hub name nobody can look up: says that the hub cannot be reached and what to check."""
    message = refused(errors.HubUnreachable, "nobody/no-such-model")
    assert "not a local directory and the hub cannot be reached" in message
    assert "HF_HUB_OFFLINE" in message


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "three/part/name", "spaced name", ""])
def test_what_is_neither_directory_nor_hub_id(refused: Refused, name: str) -> None:
    """A path that does not exist is not looked up on the hub."""
    assert "neither a directory nor a hub ID" in refused(errors.ModelNotFound, name)


def test_a_file_is_no_model(refused: Refused, model_dir: Path) -> None:
    """The weights file itself is given for the directory."""
    assert "neither a directory nor a hub ID" in refused(errors.ModelNotFound, model_dir / "model.safetensors")


def test_a_directory_without_config(refused: Refused, model_dir: Path) -> None:
    """A directory that is no model directory."""
    (model_dir / "config.json").unlink()
    assert "has no config.json" in refused(errors.ModelNotFound, model_dir)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """Let the hub library talk to a hub of this test: answers by the end of the URL, (status, error code or JSON)."""

    def serve(answers: dict[str, tuple[int, Any]]) -> None:
        def handle(request: Any) -> Any:
            found = [answer for end, answer in answers.items() if request.url.path.endswith(end)]
            status, content = found[0] if found else (404, "EntryNotFound")
            if isinstance(content, str):
                return http.Response(status, headers={"X-Error-Code": content})
            return http.Response(status, json=content)

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        huggingface_hub.set_client_factory(lambda: http.Client(transport=http.MockTransport(handle)))

    yield serve
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


FILES = [{"rfilename": "config.json"}, {"rfilename": "model.safetensors"}]
TREE = [{"type": "file", "path": file["rfilename"], "size": 2, "oid": "0" * 40} for file in FILES]
INFO = {"id": "a/b", "sha": "0" * 40, "siblings": FILES}


@pytest.mark.parametrize(
    "answers",
    [
        {"/api/models/a/b": (401, "GatedRepo")},
        {
            "/api/models/a/b": (200, INFO),
            "/revision/main": (200, INFO),
            f"/tree/{'0' * 40}": (200, TREE),
            "config.json": (403, "GatedRepo"),
            "model.safetensors": (403, "GatedRepo"),
        },
    ],
    ids=["at the model", "at its files"],
)
def test_gated_model(refused: Refused, hub: Callable[..., None], answers: dict[str, tuple[int, Any]]) -> None:
    """A licence must be accepted: says where and how."""
    hub(answers)
    message = refused(errors.GatedModel, "a/b")
    assert "accept its licence" in message and "HF_TOKEN" in message and "hf auth login" in message


def test_unknown_model_online(refused: Refused, hub: Callable[..., None]) -> None:
    """The hub does not know the name."""
    hub({"/api/models/a/b": (404, "RepoNotFound")})
    assert "the hub has no model 'a/b' (or it is private: set HF_TOKEN)" in refused(errors.ModelNotFound, "a/b")


def test_unknown_revision(refused: Refused, hub: Callable[..., None]) -> None:
    """The hub knows the model, not the revision."""
    hub({"/revision/v9": (404, "RevisionNotFound")})
    assert "no revision 'v9'" in refused(errors.ModelNotFound, "a/b", revision="v9")


def test_hub_model_with_pickles_only(refused: Refused, hub: Callable[..., None]) -> None:
    """Known from the hub's file list: nothing is downloaded."""
    hub({"/api/models/a/b": (200, {**INFO, "siblings": [FILES[0], {"rfilename": "pytorch_model.bin"}]})})
    assert "has pickle weights only (pytorch_model.bin)" in refused(errors.UnsafeModel, "a/b")


@pytest.mark.parametrize(
    "failure",
    [http.ConnectError("Name or service not known"), http.ReadTimeout("timed out"), ConnectionError("refused")],
    ids=lambda failure: type(failure).__name__,
)
def test_unreachable_hub(refused: Refused, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    """No network, in each of the ways the HTTP client says so."""

    def model_info(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", model_info)
    assert f"the hub cannot be reached ({failure})" in refused(errors.HubUnreachable, "a/b")


def test_pickle_only_directory(refused: Refused, model_dir: Path) -> None:
    """Pickles are refused, not loaded."""
    torch.save(load_file(model_dir / "model.safetensors"), model_dir / "pytorch_model.bin")
    (model_dir / "model.safetensors").unlink()
    message = refused(errors.UnsafeModel, model_dir)
    assert "pytorch_model.bin" in message and "Convert them to safetensors first" in message


def test_directory_without_weights(refused: Refused, model_dir: Path) -> None:
    """A config and a tokenizer are not a model."""
    (model_dir / "model.safetensors").unlink()
    assert "no safetensors weights" in refused(errors.ModelNotFound, model_dir)


_CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM

pathlib.Path(__file__).with_name("ran").touch()

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code_dir(model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model that ships its own modelling code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (model_dir / "modeling_own.py").write_text(_CODE)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change_json(model_dir / "config.json", model_type="own-llama", architectures=["OwnForCausalLM"], auto_map=auto_map)
    return model_dir


def test_remote_code_is_refused(refused: Refused, own_code_dir: Path, tmp_path: Path) -> None:
    """Without leave the code is not even copied, let alone run."""
    message = refused(errors.UnsafeModel, own_code_dir)
    assert "ships its own modelling code" in message and "--trust-remote-code" in message
    assert not (tmp_path / "modules").exists() and not (own_code_dir / "ran").exists()


@pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")
def test_remote_code_works_when_allowed(own_code_dir: Path, tmp_path: Path, text_file: Path, eval_file: Path) -> None:
    """With leave it prunes, and the checkpoint carries the code that loads it."""
    texts = {"calibration": str(text_file), "eval": str(eval_file), **tiny.QUICK}
    report = llmprune.prune(own_code_dir, out=tmp_path / "out", trust_remote_code=True, **texts)
    assert report.sparsity == 0.5 and report.model.model_type == "own-llama"
    assert (tmp_path / "out" / "modeling_own.py").read_text() == _CODE
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    again = llmprune.evaluate(
        tmp_path / "out", trust_remote_code=True, eval=str(eval_file), seq_len=32, max_eval_tokens=512, latency=False
    )
    assert again.quality[0].perplexity_pruned == report.quality[0].perplexity_pruned


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda data: data[:-1000], "bytes of tensors are described"),
        (lambda data: data[:100], "in a file of 100"),
        (lambda data: b"", "no header in 0 bytes"),
        (lambda data: b"<html>404</html>" * 99, "a header of "),
    ],
    ids=["truncated", "cut in the header", "empty", "a web page"],
)
def test_corrupt_safetensors(refused: Refused, model_dir: Path, content: Callable[[bytes], bytes], reason: str) -> None:
    """Seen in the headers, before anything is loaded; names the file."""
    file = model_dir / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    message = refused(errors.CorruptCheckpoint, model_dir)
    assert message.startswith("model.safetensors of ") and reason in message and "Download it again" in message


def test_missing_shard(refused: Refused, model_dir: Path) -> None:
    """The index names a file that is not there."""
    tensors = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:9]}, model_dir / "model-00001-of-00002.safetensors", {"format": "pt"})
    shards = {name: f"model-0000{1 + (number >= 9)}-of-00002.safetensors" for number, name in enumerate(names)}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    message = refused(errors.CorruptCheckpoint, model_dir)
    assert "lacks 1 weight shards, e.g. model-00002-of-00002.safetensors" in message


def test_missing_tensor(refused: Refused, model_dir: Path) -> None:
    """A weights file that is whole but lacks a tensor would leave the model partly random."""
    change_weights(model_dir, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    message = refused(errors.CorruptCheckpoint, model_dir)
    assert "lacks 1 tensors its config calls for, e.g. model.layers.1.mlp.up_proj.weight" in message


def test_tensor_of_another_shape(refused: Refused, model_dir: Path) -> None:
    """Config and weights do not belong together; names a tensor and both shapes."""
    change_json(model_dir / "config.json", intermediate_size=96)
    message = refused(errors.CorruptCheckpoint, model_dir)
    assert "mlp.down_proj.weight of shape [64, 128] where its config calls for [64, 96]" in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_json(refused: Refused, model_dir: Path, name: str, content: str) -> None:
    """A cut-off config or index."""
    (model_dir / name).write_text(content)
    assert f"{name} of '{model_dir}' is not" in refused(errors.CorruptCheckpoint, model_dir)


@pytest.mark.parametrize(
    "changes", [{"model_type": ["llama"]}, {"auto_map": 5}, {"architectures": {}}, {"quantization_config": "gptq"}], ids=str
)
def test_config_of_wrong_types(refused: Refused, model_dir: Path, changes: dict[str, Any]) -> None:
    """JSON, but not what transformers writes: names the field."""
    change_json(model_dir / "config.json", **changes)
    message = refused(errors.CorruptCheckpoint, model_dir)
    assert message.startswith("config.json of ") and f"is not in order ({next(iter(changes))}: " in message


@pytest.mark.parametrize("weight_map", [[], {"lm_head.weight": 1}, {"lm_head.weight": "../model.safetensors"}], ids=str)
def test_index_of_wrong_types(refused: Refused, model_dir: Path, weight_map: Any) -> None:
    """An index that maps no names to files, or to one outside the directory."""
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = refused(errors.CorruptCheckpoint, model_dir)
    assert "is not in order (weight_map" in message or "e.g. ../model.safetensors" in message


@pytest.mark.parametrize("changes", [{"hidden_size": "sixty-four"}, {"num_attention_heads": 5}], ids=str)
def test_config_that_describes_no_model(refused: Refused, model_dir: Path, changes: dict[str, Any]) -> None:
    """Values no model can be built with; the message quotes the reason on its one line."""
    change_json(model_dir / "config.json", **changes)
    assert "describes no model (" in refused(errors.CorruptCheckpoint, model_dir)


def test_quantized_checkpoint(refused: Refused, model_dir: Path) -> None:
    """Packed integers are not weights to prune."""
    change_json(model_dir / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "is quantized (gptq)" in refused(errors.UnsupportedModel, model_dir)


def test_no_tokenizer(refused: Refused, model_dir: Path) -> None:
    """Text cannot be read without one."""
    for file in model_dir.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer that loads" in refused(errors.ModelNotFound, model_dir)


def test_masked_language_model(refused: Refused, tmp_path: Path) -> None:
    """BERT as it is trained: an encoder, though transformers could convert it."""
    config = AutoConfig.for_model(
        "bert", vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    tiny.save(AutoModelForMaskedLM.from_config(config), tmp_path / "bert")
    message = refused(errors.UnsupportedModel, tmp_path / "bert")
    assert "['BertForMaskedLM'], not a causal language model" in message


def test_encoder_decoder(refused: Refused, tmp_path: Path) -> None:
    """T5."""
    config = AutoConfig.for_model("t5", vocab_size=128, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16)
    tiny.save(AutoModelForSeq2SeqLM.from_config(config), tmp_path / "t5")
    assert "['T5ForConditionalGeneration'], not a causal" in refused(errors.UnsupportedModel, tmp_path / "t5")


def test_unknown_model_type(refused: Refused, model_dir: Path) -> None:
    """An architecture newer than the installed transformers."""
    change_json(model_dir / "config.json", model_type="llama-from-the-future")
    message = refused(errors.UnsupportedModel, model_dir)
    assert "does not know model_type 'llama-from-the-future'" in message and "Update transformers" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_weights_names_the_block(refused: Refused, model_dir: Path, value: float) -> None:
    """One bad weight stops the job before it begins, with the block's name."""
    change_weights(model_dir, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].__setitem__(4, value))
    message = refused(errors.NonFiniteError, model_dir)
    assert message.startswith("model.layers.1: its weight mlp.up_proj.weight holds NaN or inf")


@pytest.mark.parametrize(
    "walk", [{"sequential": "group"}, {"sequential": "group", "batch_size": 1}, {}], ids=["one batch", "batches", "two-pass"]
)
def test_overflow_in_a_block_names_it(refused: Refused, model_dir: Path, tmp_path: Path, walk: dict[str, Any]) -> None:
    """Finite weights, infinite outputs: stops at that block, and leaves no journal that another config may not use."""

    def blow_up(tensors: dict[str, torch.Tensor]) -> None:
        for leaf in ("gate_proj", "up_proj"):
            tensors[f"model.layers.1.mlp.{leaf}.weight"] *= 1e30

    change_weights(model_dir, blow_up)
    message = refused(errors.NonFiniteError, model_dir, out=tmp_path / "out", **walk)
    assert "model.layers.1" in message and "--dtype float32" in message


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_its_range(refused: Refused, model_dir: Path, sparsity: float) -> None:
    """[0, 1): what is allowed and what was given."""
    message = refused(errors.ConfigError, model_dir, sparsity=sparsity)
    assert message.startswith("sparsity: Input should be") and message.endswith(f"got {sparsity}")


@pytest.mark.parametrize("pattern", ["2:5", "3:6", "1:7"])
def test_indivisible_pattern_names_the_site(refused: Refused, model_dir: Path, pattern: str) -> None:
    """n:m whose m does not divide the inputs: names the site and the flag that skips it."""
    message = refused(errors.PatternError, model_dir, pattern=pattern)
    assert "in_features divisible by" in message and "got 64 (model.layers.0.self_attn.q_proj)" in message
    assert "--skip '*.q_proj'" in message


def test_indivisible_pattern_can_be_skipped(tmp_path: Path, text_file: Path) -> None:
    """The remedy the message names works: without down_proj, of 132 inputs, 8:16 is possible."""
    source = tiny.save(tiny.make_model(intermediate_size=132), tmp_path / "odd")
    how = {"pattern": "8:16", "calibration": str(text_file), "eval": (), **tiny.QUICK}
    with pytest.raises(
        errors.PatternError, match=r"got 132 \(model\.layers\.0\.mlp\.down_proj\)\. Skip it with --skip '\*\.down_proj'"
    ):
        llmprune.prune(source, **how)
    report = llmprune.prune(source, skip="*.down_proj", **how)
    assert report.num_sites == 12 and report.sparsity == 0.5


def test_unknown_method(refused: Refused, model_dir: Path) -> None:
    """A misspelt method is guessed."""
    assert "Did you mean 'wanda'?" in refused(errors.ConfigError, model_dir, method="wnada")


@pytest.mark.parametrize(("device", "reason"), [("gpu", "is not a device name"), ("cuda:99", "is not on this machine")])
def test_wrong_device(refused: Refused, model_dir: Path, device: str, reason: str) -> None:
    """No such device, or none of that kind here."""
    message = refused(errors.ConfigError, model_dir, device=device)
    assert repr(device) in message and reason in message


@pytest.mark.parametrize("field", ["calibration", "eval"])
def test_unknown_text(refused: Refused, model_dir: Path, field: str) -> None:
    """A misspelt text is guessed, before the model is loaded."""
    message = refused(errors.TextError, model_dir, **{field: "wikitext"})
    assert "Did you mean 'wikitext2'?" in message


def test_unreachable_text(refused: Refused, model_dir: Path) -> None:
    """A hub text while offline: says what to do instead."""
    assert "c4" in refused(errors.TextUnreachable, model_dir, calibration="c4").lower()


@pytest.mark.parametrize("field", ["calibration", "eval"])
def test_text_too_short(refused: Refused, model_dir: Path, tmp_path: Path, field: str) -> None:
    """Says how many tokens it found and how many are needed."""
    file = tmp_path / "short.txt"
    file.write_text(tiny.prose(20))
    found = len(tiny.train_tokenizer()(file.read_text())["input_ids"])
    message = refused(errors.TextTooShort, model_dir, **{field: str(file)})
    assert f"{found + (field == 'calibration')} tokens" in message  # the stream of documents adds an end token to each
    assert ("128" if field == "calibration" else "32") in message and "--seq-len" in message


def test_out_is_the_input(refused: Refused, model_dir: Path) -> None:
    """The model would be overwritten."""
    assert "is the input model itself or lies inside it" in refused(errors.OutputError, model_dir, out=model_dir)
    detour = model_dir / ".." / model_dir.name
    assert "is the input model itself" in refused(errors.OutputError, model_dir, out=detour)


def test_out_inside_the_input(refused: Refused, model_dir: Path) -> None:
    """The checkpoint would become part of the model."""
    assert "lies inside it" in refused(errors.OutputError, model_dir, out=model_dir / "pruned")


def test_out_is_the_input_behind_a_link(refused: Refused, model_dir: Path, tmp_path: Path) -> None:
    """The same, by way of a symbolic link."""
    (tmp_path / "link").symlink_to(model_dir)
    assert "is the input model itself" in refused(errors.OutputError, model_dir, out=tmp_path / "link")


def test_out_is_not_empty(refused: Refused, model_dir: Path, tmp_path: Path) -> None:
    """Nothing is overwritten."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("the only copy")
    assert "is not empty" in refused(errors.OutputError, model_dir, out=tmp_path / "full")


def test_out_is_a_file(refused: Refused, model_dir: Path, tmp_path: Path) -> None:
    """A file is in the way, at the end of the path or inside it."""
    (tmp_path / "file").write_text("")
    assert "already exists" in refused(errors.OutputError, model_dir, out=tmp_path / "file")
    assert "is not a directory" in refused(errors.OutputError, model_dir, out=tmp_path / "file" / "out")


def test_out_is_the_current_directory(
    refused: Refused, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory one stands in cannot be renamed into place."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "has no name of its own" in refused(errors.OutputError, model_dir, out=Path())
    assert "has no name of its own" in refused(errors.OutputError, model_dir, out=Path("sub/.."))


def test_empty_out_is_used(model_dir: Path, tmp_path: Path, text_file: Path) -> None:
    """An empty directory is not in the way."""
    (tmp_path / "empty").mkdir()
    llmprune.prune(model_dir, out=tmp_path / "empty", calibration=str(text_file), eval=(), **tiny.QUICK)
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_work_directory_of_something_else(refused: Refused, model_dir: Path, tmp_path: Path) -> None:
    """out.work is deleted at the end of a run: it must be the run's own."""
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.txt").write_text("the only copy")
    assert "holds something else" in refused(errors.OutputError, model_dir, out=tmp_path / "out")


def test_disk_too_small_is_known_before_work(refused: Refused, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free space is compared with what checkpoint and journal need."""
    usage = shutil.disk_usage(model_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    message = refused(errors.DiskFull, model_dir)
    assert "has 0.00 GB free" in message and "choose another --out" in message


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_while_writing(
    model_dir: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """No space for the checkpoint: the temporary directory goes, the journal stays, and --resume finishes the job."""
    how: dict[str, Any] = {"out": tmp_path / "out", "calibration": str(text_file), "eval": (), **tiny.QUICK}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "render_html", fail)
        with pytest.raises(errors.DiskFull, match=r"no space left.*--resume"):
            llmprune.prune(model_dir, **how)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "out.work"]
    with monkeypatch.context() as patch:
        patch.setattr(journal, "write_durably", fail)
        patch.setattr(checkpoint, "write_durably", fail)
        with pytest.raises(errors.DiskFull):
            llmprune.prune(model_dir, resume=True, **how)
    report = llmprune.prune(model_dir, resume=True, **how)
    assert report.resumed and report.sparsity == 0.5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("room", [0, 20 * 1024, 100 * 1024])
def test_a_disk_that_is_really_full(small_disk: Path, model_dir: Path, text_file: Path, room: int) -> None:
    """A journal that outgrows the disk between the files of a block's record or in the middle of one: DiskFull, no output, the
    block before stays; with room again, --resume finishes.
    """
    how: dict[str, Any] = {"out": small_disk / "out", "calibration": str(text_file), "eval": (), **tiny.QUICK}
    ballast = small_disk / "ballast"
    run = llmprune.prune_iter(model_dir, **how)
    with pytest.raises(errors.DiskFull, match="no space left"):
        for event in run:
            if event.event == "block_finished":
                ballast.write_bytes(b"0" * (shutil.disk_usage(small_disk).free // 4096 * 4096 - room))
    assert sorted(file.name for file in small_disk.iterdir()) == ["ballast", "out.work"]
    assert journal.Journal(small_disk / "out.work").num_blocks() == 1
    ballast.unlink()
    events = list(llmprune.prune_iter(model_dir, resume=True, **how))
    assert [event.block for event in events if event.event == "block_started"] == [1]
    report = events[-1].report  # type: ignore[union-attr]
    assert report.resumed and report.sparsity == 0.5
    assert [file.name for file in small_disk.iterdir()] == ["out"]


def test_a_mount_point_is_no_out(small_disk: Path, refused: Refused, model_dir: Path) -> None:
    """The checkpoint is renamed into place, which a mounted directory (a container's volume) does not allow."""
    assert f"such as {small_disk / 'pruned'}" in refused(errors.OutputError, model_dir, out=small_disk)


def test_against_needs_the_same_vocabulary(
    cli: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path, eval_file: Path
) -> None:
    """A divergence between different vocabularies has no meaning; says both sizes."""
    other = tiny.save(tiny.make_model(vocab_size=130), tmp_path / "other")
    outcome = cli("evaluate", tiny_model_dir, "--against", other, "--eval", eval_file, "--seq-len", 32, "--no-latency")
    assert (outcome.code, outcome.out) == (2, "")
    assert "has 128 tokens and" in outcome.err and "130: --against needs the same vocabulary" in outcome.err


@pytest.mark.parametrize("command", ["plan", "inspect", "evaluate"])
def test_other_commands_refuse_alike(cli: Callable[..., Any], model_dir: Path, eval_file: Path, command: str) -> None:
    """The same line for the same mistake, whichever command sees it."""
    options = () if command == "inspect" else ("--eval", eval_file)
    (model_dir / "model.safetensors").write_bytes(b"")
    for model, message in ((model_dir, "truncated or not safetensors"), ("no/such", "the hub cannot be reached")):
        outcome = cli(command, model, *options)
        assert (outcome.code, outcome.out) == (2, "")
        (line,) = [line for line in outcome.err.splitlines() if line.startswith("Error: ")]
        assert message in line


@pytest.mark.parametrize("source", ["synthetic", "no-such-text"])
def test_evaluate_refuses_texts_that_cannot_judge(cli: Callable[..., Any], tiny_model_dir: Path, source: str) -> None:
    """Text the model sampled itself, and text nobody knows."""
    outcome = cli("evaluate", tiny_model_dir, "--eval", source)
    assert outcome.code == 2 and source in outcome.err


def test_every_error_has_its_exit_code() -> None:
    """The tree: what the user can mend is 2, what we must is 1."""
    tree = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LlmpruneError)]
    assert len(tree) > 15
    assert all(kind.exit_code == (2 if issubclass(kind, UserError) else 1) for kind in tree)
    assert all(kind.__name__ in str(errors.__doc__) for kind in tree)
