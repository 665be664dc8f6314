"""Repositories that ship code for what transformers has classes of its own for: those are used, the code never runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import llmprune
import tiny
from llmprune.errors import UnsafeModel

_CODE = """
import pathlib
import transformers

(pathlib.Path({where!r}) / __name__.rpartition(".")[2]).touch()

class OwnConfig(transformers.LlamaConfig): pass
class OwnForCausalLM(transformers.LlamaForCausalLM): pass
class OwnTokenizer(transformers.PreTrainedTokenizerFast): pass
"""
MODEL_MAP = {
    "AutoConfig": "modeling_own.OwnConfig",
    "AutoModel": "modeling_own.OwnForCausalLM",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}
TOKENIZER_MAPS = [
    {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    ["tokenization_own.OwnTokenizer", None],
    {"AutoTokenizer": ["other/repository--tokenization_own.OwnTokenizer", None]},
]


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where shipped code leaves a file for each module that is run: empty at the end, and nothing copied to be run."""
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the user whether to run it"))
    (tmp_path / "ran").mkdir()
    yield tmp_path / "ran"
    assert not list((tmp_path / "ran").iterdir())
    assert not modules.exists()


def change(file: Path, **changes: Any) -> None:
    """Replace keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path, ran: Path) -> Path:
    """The tiny Llama with modelling and tokenizer code of its own, which both configs refer to."""
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    for name in ("modeling_own.py", "tokenization_own.py"):
        (model / name).write_text(_CODE.format(where=str(ran)))
    change(model / "config.json", auto_map=MODEL_MAP, architectures=["OwnForCausalLM"])
    change(model / "tokenizer_config.json", auto_map=TOKENIZER_MAPS[0])
    return model


@pytest.fixture
def texts(text_file: Path, eval_file: Path) -> dict[str, Any]:
    return {"calibration": str(text_file), "eval": str(eval_file)}


@pytest.mark.parametrize("auto_map", TOKENIZER_MAPS, ids=["slow", "fast", "legacy", "elsewhere"])
def test_the_native_classes_prune_it(
    model_dir: Path, tiny_model_dir: Path, texts: dict[str, Any], tmp_path: Path, auto_map: Any
) -> None:
    """The result is, byte for byte, that of the same model without code; it does not refer to code and needs none."""
    change(model_dir / "tokenizer_config.json", auto_map=auto_map)
    report = llmprune.prune(model_dir, out=tmp_path / "own", **texts, **tiny.QUICK)
    plain = llmprune.prune(tiny_model_dir, out=tmp_path / "plain", **texts, **tiny.QUICK)
    assert report.sparsity == 0.5 and report.model.model_type == "llama"
    assert report.calibration == plain.calibration
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert not list((tmp_path / "own").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "own", trust_remote_code=False)) is LlamaForCausalLM
    assert AutoTokenizer.from_pretrained(tmp_path / "own", trust_remote_code=False)("the model")["input_ids"]


@pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")
def test_the_code_would_have_left_its_mark(model_dir: Path, ran: Path, tmp_path: Path) -> None:
    """With leave it runs, and the file is there: what the other tests find missing."""
    llmprune.fetch(model_dir, calibration="stdlib", eval=(), trust_remote_code=True)
    (ran / "modeling_own").unlink()
    shutil.rmtree(tmp_path / "modules")


@pytest.mark.parametrize("command", ["fetch", "plan", "inspect", "evaluate"])
def test_every_command_takes_the_native_classes(
    cli: Callable[..., Any], model_dir: Path, texts: dict[str, Any], command: str
) -> None:
    """None of them runs the code, asks for it, or fails over it."""
    options = {
        "fetch": ("--calibration", texts["calibration"], "--no-eval"),
        "plan": ("--calibration", texts["calibration"], "--no-eval", "--num-samples", 4, "--seq-len", 32),
        "inspect": (),
        "evaluate": ("--eval", texts["eval"], "--seq-len", 32, "--max-eval-tokens", 64, "--no-latency"),
    }
    outcome = cli(command, model_dir, *options[command], "--json")
    assert outcome.code == 0, outcome.err


def test_a_class_for_a_model_type_without_a_native_decoder_is_refused(model_dir: Path, texts: dict[str, Any]) -> None:
    """transformers knows the model_type, but no causal language model of it: only the shipped code is one."""
    change(model_dir / "config.json", model_type="clip")
    with pytest.raises(UnsafeModel, match="ships its own modelling code.*--trust-remote-code"):
        llmprune.prune(model_dir, **texts)


def test_an_unknown_model_type_is_refused(model_dir: Path, texts: dict[str, Any]) -> None:
    """Only the shipped code knows it."""
    change(model_dir / "config.json", model_type="own")
    with pytest.raises(UnsafeModel, match="ships its own modelling code.*--trust-remote-code"):
        llmprune.prune(model_dir, **texts)


def test_a_tokenizer_class_of_its_own_is_refused(model_dir: Path, texts: dict[str, Any]) -> None:
    """The model is native, the tokenizer is not."""
    change(model_dir / "tokenizer_config.json", tokenizer_class="OwnTokenizer")
    with pytest.raises(UnsafeModel, match="ships its own tokenizer code.*--trust-remote-code"):
        llmprune.prune(model_dir, **texts)
