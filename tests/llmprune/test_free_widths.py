"""Checkpoints whose layers have widths of their own: they load, with llmprune and without, as what lay in memory.

N sequences, S sequence, V vocabulary.
"""

from __future__ import annotations

import ast
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import llmprune
import tiny
from llmprune.anatomy.blocks import HIDDEN, find_stack
from llmprune.errors import CorruptCheckpoint, UnsafeModel, UnsupportedModel
from llmprune.io.checkpoint import save_weights
from llmprune.structured import modeling
from llmprune.structured.free import describe_free_
from llmprune.structured.modeling import FIELD, NoAttention, NoFFN, reshape_
from llmprune.structured.slicing import Cut, slice_
from llmprune.structured.units import find_units

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen2": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "qwen3": {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8},
    "phi3": {"num_key_value_heads": 4},
    "glm": {"num_key_value_heads": 4},
    "gemma": {"num_key_value_heads": 4},
    "starcoder2": {"num_key_value_heads": 4},
}


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shipped code is copied where the test is."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "transformers_modules").is_dir()])
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # packages of another test's folder


def _ids() -> Tensor:
    return torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    logits_NSV: Tensor = model(input_ids=_ids(), use_cache=False).logits
    return logits_NSV


@torch.no_grad()
def _stepwise(model: PreTrainedModel) -> Tensor:
    """Logits of five tokens at once and the others one by one on the cache."""
    outputs = model(input_ids=_ids()[:, :5], use_cache=True)
    parts = [outputs.logits]
    for position in range(5, 9):
        outputs = model(input_ids=_ids()[:, position : position + 1], past_key_values=outputs.past_key_values, use_cache=True)
        parts.append(outputs.logits)
    return torch.cat(parts, dim=1)


def _written(model: PreTrainedModel) -> Tensor:
    written: Tensor = model.generate(
        _ids(), attention_mask=torch.ones_like(_ids()), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
    )
    return written


def _assert_same(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    assert torch.equal(_logits(ours), _logits(theirs))
    assert torch.equal(_stepwise(ours), _stepwise(theirs))
    assert torch.equal(_written(ours), _written(theirs))


def _slice(model: PreTrainedModel, kept: Callable[[str, int, int], list[int]]) -> PreTrainedModel:
    """Keep the groups that ``kept`` names given kind, block and number of groups."""
    for module in find_units(model, find_stack(model)).modules:
        groups = kept(module.kind, module.block, module.num_groups)
        slice_(model, module, Cut(torch.tensor(groups, dtype=torch.int64)))
    return model


def _uneven(kind: str, block: int, number: int) -> list[int]:
    """No attention in block 0, no FFN in block 2, and widths that differ elsewhere."""
    if (kind, block) in (("attention", 0), ("ffn", 2)):
        return []
    return [group for group in range(number) if group % 4 in ((0, 2, 3) if block == 1 else (2,))]


def _sliced(model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    return _slice(tiny.make_model(model_type, **(FAMILIES[model_type] | {"num_hidden_layers": 3} | changes)), _uneven)


def _save(model: PreTrainedModel, folder: Path, *, source: Path | None = None, code: bool = False) -> Path:
    save_weights(model, folder, tokenizer=tiny.train_tokenizer(), source=source, code=code)
    return folder


def _with(folder: Path, **shapes: Any) -> Path:
    """Replace parts of the shapes in config.json."""
    content = json.loads((folder / "config.json").read_text())
    content[FIELD] |= shapes
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("model_type", FAMILIES)
def test_checkpoint_gives_back_what_lay_in_memory(model_type: str, tmp_path: Path) -> None:
    """In fp32 bit for bit, on a cache and without one; by llmprune no shipped code is run."""
    model = _sliced(model_type)
    num_parameters = model.num_parameters()
    assert num_parameters < tiny.make_model(model_type, **FAMILIES[model_type], num_hidden_layers=3).num_parameters()
    shapes = describe_free_(model)
    assert set(shapes["removed"].values()) == {"attention", "ffn"} and len(shapes["parameters"]) > 5
    folder = _save(model, tmp_path / "free")
    loaded = llmprune.load(folder, device="cpu")
    assert not (tmp_path / "modules").exists()
    assert type(loaded) is type(model) and loaded.num_parameters() == num_parameters
    _assert_same(loaded, model)
    plain = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(plain).stock_class is type(model) and plain.num_parameters() == num_parameters
    _assert_same(plain, model)
    assert AutoConfig.from_pretrained(folder).model_type == model_type


def test_loads_where_llmprune_is_not_installed(tmp_path: Path) -> None:
    """A fresh interpreter that cannot import llmprune puts out the same logits and writes the same tokens."""
    model = _sliced()
    describe_free_(model)
    folder = _save(model, tmp_path / "free")
    torch.save((_ids(), _logits(model), _written(model)), tmp_path / "expected.pt")
    code = f"""
import os
os.environ.update(HF_HUB_OFFLINE="1", HF_MODULES_CACHE={str(tmp_path / "elsewhere")!r})
import importlib.util
assert importlib.util.find_spec("llmprune") is None
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids, logits, written = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)
options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), written)
"""
    packages = [path for path in sys.path if path.endswith("site-packages")]
    # -S leaves out what an editable install adds.
    preface = f"import sys; sys.path += {packages!r}"
    subprocess.run([sys.executable, "-I", "-S", "-c", preface + code], check=True, cwd=tmp_path, timeout=120)


def test_shipped_code_needs_torch_and_transformers_alone() -> None:
    """It is copied into checkpoints as it is; and knows a hidden state by the names that blocks do."""
    nodes = list(ast.walk(ast.parse(Path(modeling.__file__).read_text())))
    found = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert {str(name).split(".")[0] for name in found} - set(sys.stdlib_module_names) == {"torch", "transformers"}
    assert modeling._HIDDEN == HIDDEN


@pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")
@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_stock_class_refuses_a_model_without_a_module(kind: str, tmp_path: Path) -> None:
    """Also where no matrix is of another shape: filling the module with random numbers would pass unseen."""
    model = _slice(tiny.make_model(), lambda *at: [] if at[:2] == (kind, 0) else list(range(at[2])))
    assert set(describe_free_(model)) == {"version", "removed"}
    folder = _save(model, tmp_path / "free")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)
    _assert_same(llmprune.load(folder, device="cpu"), model)


def test_biases_that_were_gained(tmp_path: Path) -> None:
    """On a consumer that had none, and on a module that is gone."""
    model = _sliced()
    bias_O = torch.linspace(-1, 1, model.config.hidden_size)
    layers = model.model.layers
    layers[1].mlp.down_proj.bias = nn.Parameter(bias_O.clone())
    layers[0].self_attn.bias = nn.Parameter(-bias_O)
    layers[2].mlp.bias = nn.Parameter(2 * bias_O)
    assert not torch.equal(_logits(model), _logits(_sliced()))
    shapes = describe_free_(model)
    assert shapes["parameters"]["model.layers.0.self_attn.bias"] == [64]
    folder = _save(model, tmp_path / "free")
    _assert_same(llmprune.load(folder, device="cpu"), model)
    _assert_same(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), model)


def test_matrices_of_no_columns(tmp_path: Path) -> None:
    """Where an FFN lies in the block itself its matrices stay, with nothing in them."""
    model = tiny.make_model("starcoder2")
    for layer in model.model.layers:
        layer.mlp.c_fc.weight, layer.mlp.c_fc.bias = nn.Parameter(torch.empty(0, 64)), nn.Parameter(torch.empty(0))
        layer.mlp.c_proj.weight = nn.Parameter(torch.empty(64, 0))
        layer.mlp.c_fc.out_features = layer.mlp.c_proj.in_features = 0
    describe_free_(model)
    _assert_same(llmprune.load(_save(model, tmp_path / "free"), device="cpu"), model)


def test_tensors_that_files_name_otherwise(tmp_path: Path) -> None:
    """transformers renames by the name of the class, which is kept."""
    model = tiny.make_model("gpt_neox")
    mlp = model.gpt_neox.layers[1].mlp
    mlp.dense_h_to_4h.weight, mlp.dense_h_to_4h.bias = (
        nn.Parameter(part[:48].clone()) for part in (mlp.dense_h_to_4h.weight, mlp.dense_h_to_4h.bias)
    )
    mlp.dense_4h_to_h.weight = nn.Parameter(mlp.dense_4h_to_h.weight[:, :48].clone())
    mlp.dense_h_to_4h.out_features = mlp.dense_4h_to_h.in_features = 48
    describe_free_(model)
    folder = _save(model, tmp_path / "free")
    assert "embed_out.weight" in load_file(folder / "model.safetensors") and "lm_head.weight" in model.state_dict()
    _assert_same(llmprune.load(folder, device="cpu"), model)
    _assert_same(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), model)


def test_pruning_what_was_pruned_before(tmp_path: Path) -> None:
    """Loaded either way, sliced once more and saved, it is again what lay in memory."""
    first = _sliced()
    describe_free_(first)
    folder = _save(first, tmp_path / "first")
    for loaded in (llmprune.load(folder, device="cpu"), AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)):
        second = _slice(loaded, lambda kind, block, number: list(range(0, number, 2)))
        assert second.num_parameters() < first.num_parameters()
        describe_free_(second)
        again = _save(second, tmp_path / "second")
        _assert_same(llmprune.load(again, device="cpu"), second)
        _assert_same(AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True), second)


def test_a_whole_model_needs_no_list(tmp_path: Path) -> None:
    """Its checkpoint is one of the stock class, and a list that was there before goes."""
    model = tiny.make_model()
    setattr(model.config, FIELD, {"version": 1})
    assert describe_free_(model) == {}
    folder = _save(model, tmp_path / "whole")
    assert not list(folder.glob("*.py")) and not {FIELD, "auto_map"} & json.loads((folder / "config.json").read_text()).keys()
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is LlamaForCausalLM


@pytest.fixture
def free_dir(tmp_path: Path) -> Path:
    """A checkpoint of free widths."""
    model = _sliced()
    describe_free_(model)
    return _save(model, tmp_path / "free")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parameters": {"model.layers.0.mlp.up_proj.weight": [-4, 64]}}, "greater than or equal to 0"),
        ({"parameters": {"model.layers.0.mlp.up_proj.weight": "all"}}, "valid list"),
        ({"parameters": {"model.layers.0.mlp.up_proj.weight": [10**9, 64]}}, "cannot be brought to"),
        ({"parameters": {"model.layers.0.mlp.up_proj.weight": [64]}}, "cannot be brought to"),
        ({"parameters": {"model.layers.0.mlp.up_proj.bias": [10**9]}}, "at most 64"),
        ({"parameters": {"model.layers.0.mlp.up_proj.other": [4]}}, "no parameter"),
        ({"parameters": {"model.layers.9.mlp.up_proj.weight": [4, 4]}}, "no module"),
        ({"removed": {"model.layers.9": "ffn"}}, "no module"),
        ({"removed": {"model.layers.0.mlp": "everything"}}, "'attention' or 'ffn'"),
        ({"numbers": {"model.layers.1.self_attn": {"forward": 3}}}, "cannot be 3"),
        ({"numbers": {"model.layers.1.self_attn": {"layer_idx": 10**9}}}, "cannot be"),
        ({"numbers": {"model.layers.1.self_attn": {"training": 0}}}, "cannot be"),
        ({"configs": {"model.layers.1.self_attn": {"num_attention_heads": 900}}}, "cannot be"),
        ({"configs": {"model.layers.1.mlp.up_proj": {"num_attention_heads": 1}}}, "no config"),
    ],
    ids=str,
)  # fmt: skip
def test_damaged_lists_are_refused(changes: dict[str, Any], reason: str, free_dir: Path) -> None:
    """Before any memory is asked for; the message says what is wrong."""
    with pytest.raises(CorruptCheckpoint, match=FIELD) as caught:
        llmprune.load(_with(free_dir, **changes), device="cpu")
    assert reason in str(caught.value)


def test_lists_of_other_kinds_and_versions(free_dir: Path) -> None:
    """A list that is none is damaged, one of a later version asks for a later llmprune; and the weights must fit."""
    with pytest.raises(UnsupportedModel, match="version 2; .* Update llmprune"):
        llmprune.load(_with(free_dir, version=2), device="cpu")
    shapes = json.loads((free_dir / "config.json").read_text())[FIELD]["parameters"]
    with pytest.raises(CorruptCheckpoint, match=r"holds model.layers.1.mlp.up_proj.weight of shape \[96, 64\]"):
        llmprune.load(
            _with(free_dir, version=1, parameters=shapes | {"model.layers.1.mlp.up_proj.weight": [90, 64]}), device="cpu"
        )
    content = json.loads((free_dir / "config.json").read_text())
    (free_dir / "config.json").write_text(json.dumps(content | {FIELD: [1, 2]}))
    with pytest.raises(CorruptCheckpoint, match="valid dictionary"):
        llmprune.load(free_dir, device="cpu")


def test_what_a_list_cannot_say_is_refused() -> None:
    """A matrix that grew, a module that the class does not have, a class that no checkpoint can reach."""
    model = tiny.make_model()
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 200, bias=False)
    with pytest.raises(UnsupportedModel, match=r"up_proj.weight of shape \[128, 64\] cannot be brought to \[200, 64\]"):
        describe_free_(model)
    model = _sliced()
    model.model.layers[1].extra = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModel, match="no module model.layers.1.extra"):
        describe_free_(model)
    model = _sliced()
    model.model.layers[1].mlp.splits = [96, 96]
    with pytest.raises(UnsupportedModel, match=r"splits of model.layers.1.mlp is \[96, 96\] in memory and None"):
        describe_free_(model)
    model = _sliced()
    model.__class__ = type("OwnForCausalLM", (LlamaForCausalLM,), {"__module__": __name__})
    with pytest.raises(UnsupportedModel, match="OwnForCausalLM is neither"):
        describe_free_(model)
    assert not hasattr(model.config, FIELD)


def test_reshaping_in_memory_keeps_initialized_weights() -> None:
    """A model made from the config alone has no number that was never set."""
    model = _sliced()
    fresh = tiny.make_model(**FAMILIES["llama"], num_hidden_layers=3)
    twin = copy.deepcopy(fresh)
    reshape_(fresh, describe_free_(model))
    assert isinstance(fresh.model.layers[0].self_attn, NoAttention) and isinstance(fresh.model.layers[2].mlp, NoFFN)
    ours, theirs = fresh.model.layers[1].mlp.down_proj.weight, twin.model.layers[1].mlp.down_proj.weight
    assert ours.shape == (64, 96) and torch.equal(ours, theirs[:, :96]) and ours.is_contiguous()


def test_commands_take_it(free_dir: Path, tmp_path: Path, text_file: Path, eval_file: Path) -> None:
    """Plan, inspect, prune, evaluate, pack and unpack: all see the widths as they are."""
    texts = {"calibration": str(text_file), "eval": str(eval_file), **tiny.QUICK}
    expected = llmprune.load(free_dir, device="cpu")
    num_parameters = expected.num_parameters()
    assert expected.config.tie_word_embeddings
    assert llmprune.plan(free_dir, out=tmp_path / "sparse", **texts).model.num_parameters == num_parameters
    found = llmprune.inspect(free_dir)
    assert found.model.num_parameters == num_parameters
    report = llmprune.prune(free_dir, out=tmp_path / "sparse", method="magnitude", sparsity=0.7, **texts)
    assert report.model.num_parameters == num_parameters
    sparse = llmprune.load(tmp_path / "sparse", device="cpu")
    assert not torch.equal(_logits(sparse), _logits(expected))
    again = llmprune.evaluate(tmp_path / "sparse", eval=str(eval_file), seq_len=32, max_eval_tokens=512, latency=False)
    assert again.quality[0].perplexity_pruned == report.quality[0].perplexity_pruned
    _assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", trust_remote_code=True), sparse)
    llmprune.convert(tmp_path / "sparse", to="packed", out=tmp_path / "packed")
    _assert_same(llmprune.load(tmp_path / "packed", device="cpu", packed=False), sparse)
    llmprune.convert(tmp_path / "packed", to="dense", out=tmp_path / "dense")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("sparse", "dense"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


_CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-free-llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.act_fn = nn.ReLU()
"""


def test_model_with_code_of_its_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Its class comes from the code it ships, which is copied; both need leave."""
    own = tiny.save(tiny.make_model(), tmp_path / "own")
    content = json.loads((own / "config.json").read_text()) | {"model_type": "own-free-llama"}
    content["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (own / "config.json").write_text(json.dumps(content))
    (own / "modeling_own.py").write_text(_CODE)
    model = _slice(llmprune.load(own, device="cpu", trust_remote_code=True), _uneven)
    describe_free_(model)
    folder = _save(model, tmp_path / "free", source=own, code=True)
    with pytest.raises(UnsafeModel):
        llmprune.load(folder, device="cpu")
    loaded = llmprune.load(folder, device="cpu", trust_remote_code=True)
    assert type(loaded).stock_class.__module__.endswith(".modeling_own") and type(loaded.model.layers[1].mlp.act_fn) is nn.ReLU
    _assert_same(loaded, model)
    with pytest.raises(CorruptCheckpoint, match="no module model.layers.9"):
        llmprune.load(_with(folder, removed={"model.layers.9": "ffn"}), device="cpu", trust_remote_code=True)
