"""A model that lost its groups computes what it does with zeros in their place, and its checkpoint is one of the stock class.

O out features, K columns kept; N sequences, S sequence, V vocabulary.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmprune.anatomy.blocks import find_stack
from llmprune.errors import UnsupportedModel
from llmprune.structured.slicing import (
    Cut,
    check_sliced,
    mask_,
    record_masked,
    slice_,
    slice_model_,
)
from llmprune.structured.units import Module, find_units
from llmprune.structured.widths import describe_, uniform_counts, uniform_fields
from tiny import make_model

# What each is there for is its name.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mha": ("llama", {"num_key_value_heads": 4}),
    "gqa, head_dim of its own": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "gqa of three": ("qwen3", {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8}),
    "mqa": ("llama", {"num_key_value_heads": 1}),
    "q, k, v biases": ("qwen2", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "biases everywhere": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "q, k norms": ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "tied embeddings": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "fused qkv and gate_up": ("phi3", {"num_key_value_heads": 4}),
    "fused gate_up": ("glm", {"num_key_value_heads": 4}),
    "no gate": ("starcoder2", {"num_key_value_heads": 4}),
    "sliding windows, norms on both sides": ("gemma3_text", {"num_key_value_heads": 4}),
    "transposed": ("gpt2", {}),
    "fused mqa": ("gpt_bigcode", {}),
    "fused head by head": ("gpt_neox", {}),
    "fused by kv group": ("falcon", {"num_attention_heads": 8, "num_kv_heads": 4}),
    "fused head by head, all by multi_query": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "latent": ("minicpm3", {}),
    "ffn in the block": ("opt", {}),
}  # fmt: skip
LOADABLE = list(CASES)[:12]
UNIFORM, FREE, EMPTY = "uniform", "free", "empty"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def _model(case: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model_type, changes = CASES[case]
    return make_model(model_type, dtype=dtype, **changes)


def _modules(model: PreTrainedModel) -> tuple[Module, ...]:
    return find_units(model, find_stack(model)).modules


def _kept(module: Module, widths: str) -> list[int]:
    groups = range(module.num_groups)
    if widths == UNIFORM:
        return list(groups[1::2])
    if widths == FREE:  # block 0 keeps fewer than block 1
        return [group for group in groups if group % 4 in ((2,) if module.block == 0 else (0, 2, 3))]
    return list(groups) if module.block else []  # nothing of block 0


def _cuts(modules: tuple[Module, ...], widths: str) -> dict[str, Cut]:
    """Groups kept, and weights for them that are not the dense ones."""
    generator = torch.Generator().manual_seed(7)
    cuts = {}
    for module in modules:
        kept_G = torch.tensor(_kept(module, widths), dtype=torch.int64)
        num_out, num_columns = module.consumer.shape[0], len(kept_G) * module.group_size
        cuts[module.name] = Cut(kept_G, 0.05 * torch.randn(num_out, num_columns, generator=generator))
    return cuts


def _counts(cuts: dict[str, Cut]) -> dict[str, int]:
    return {name: len(cut.kept_G) for name, cut in cuts.items()}


def _masked(model: PreTrainedModel, cuts: dict[str, Cut]) -> PreTrainedModel:
    twin = copy.deepcopy(model)
    for module in _modules(twin):
        mask_(module, cuts[module.name])
    return twin


def _sliced(model: PreTrainedModel, cuts: dict[str, Cut]) -> PreTrainedModel:
    twin = copy.deepcopy(model)
    for module in _modules(twin):
        slice_(twin, module, cuts[module.name])
    return twin


def _ids() -> Tensor:
    return torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(input_ids=_ids(), use_cache=False).logits
    return logits


@torch.no_grad()
def _stepwise(model: PreTrainedModel) -> Tensor:
    """Logits of the same tokens, five at once and then one by one on the cache."""
    outputs = model(input_ids=_ids()[:, :5], use_cache=True)
    parts = [outputs.logits]
    for position in range(5, 12):
        outputs = model(input_ids=_ids()[:, position : position + 1], past_key_values=outputs.past_key_values, use_cache=True)
        parts.append(outputs.logits)
    return torch.cat(parts, dim=1)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).double().norm() / theirs.double().norm())


@pytest.mark.parametrize(
    ("case", "widths", "dtype"),
    [(case, widths, torch.float64) for case in CASES for widths in (UNIFORM, FREE, EMPTY)]
    + [(case, FREE, torch.float32) for case in ("mha", "gqa of three", "mqa", "transposed")],
)
def test_sliced_computes_what_masked_does(case: str, widths: str, dtype: torch.dtype) -> None:
    """In one forward and step by step on the cache; and it is not what the dense model computes."""
    dense = _model(case, dtype)
    modules = _modules(dense)
    assert len(modules) == 4
    cuts = _cuts(modules, widths)
    masked, sliced = _masked(dense, cuts), _sliced(dense, cuts)
    expected = _logits(masked)
    assert _distance(_logits(dense), expected) > 1e-3
    assert _distance(_logits(sliced), expected) <= TOLERANCE[dtype]
    assert _distance(_stepwise(sliced), expected) <= TOLERANCE[dtype]
    check_sliced(sliced, record_masked(masked, _modules(masked), _ids()))


@pytest.mark.parametrize("widths", [UNIFORM, FREE, EMPTY])
@pytest.mark.parametrize("case", ["mqa", "sliding windows, norms on both sides"])
def test_generation_of_sliced_equals_that_of_masked(case: str, widths: str) -> None:
    """Greedy, on the cache generate makes, also where the first layer puts no keys into it."""
    dense = _model(case)
    cuts = _cuts(_modules(dense), widths)
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    written = [
        model.generate(_ids(), attention_mask=torch.ones_like(_ids()), **options)
        for model in (_masked(dense, cuts), _sliced(dense, cuts))
    ]
    assert written[0].shape == (2, 24) and torch.equal(*written)


@pytest.mark.parametrize("case", CASES)
def test_parameters_that_go_are_those_counted(case: str) -> None:
    """Groups that went times the parameters of one, to the last; and the Linears say what they hold."""
    dense = _model(case)
    modules = _modules(dense)
    cuts = _cuts(modules, FREE)
    sliced = _sliced(dense, cuts)
    gone = sum((module.num_groups - len(cuts[module.name].kept_G)) * module.parameters_per_group for module in modules)
    assert gone > 0 and sliced.num_parameters() == dense.num_parameters() - gone
    for linear in (module for module in sliced.modules() if isinstance(module, nn.Linear)):
        assert linear.weight.shape == (linear.out_features, linear.in_features) and linear.weight.is_contiguous()
        assert linear.bias is None or linear.bias.shape == (linear.out_features,)
    for transposed in (module for module in sliced.modules() if isinstance(module, Conv1D)):
        assert transposed.weight.shape == (transposed.nx, transposed.nf) and transposed.weight.is_contiguous()


@pytest.mark.parametrize("case", LOADABLE)
def test_uniform_widths_load_with_the_stock_class(case: str, tmp_path: Path) -> None:
    """Bit-equal logits after save and load, with the new weights in the file and no key of ours in the config."""
    model = _model(case, torch.float32)
    modules = _modules(model)
    cuts = _cuts(modules, UNIFORM)
    fields = uniform_fields(model, modules, _counts(cuts))
    keys = set(model.config.to_dict()) | {"head_dim"}
    slice_model_(model, modules, cuts, _ids())
    describe_(model, modules, fields)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and torch.equal(_logits(loaded), _logits(model))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["intermediate_size"] == 64 and set(saved) <= keys | {"architectures", "transformers_version", "dtype"}
    heads = (2, 1) if case == "mqa" else (2 * modules[0].num_query_heads, 2)
    assert (saved["num_attention_heads"], saved["num_key_value_heads"]) == heads and saved["head_dim"] == modules[0].head_dim
    for module in modules:
        stored_OK = loaded.get_submodule(module.consumer.name).weight
        weight_OK = cuts[module.name].weight_OK
        assert weight_OK is not None and torch.equal(stored_OK, weight_OK)


def test_widths_that_differ_have_no_config() -> None:
    """Refused with the names of two layers, before anything is cut; so is a module left with nothing."""
    model = _model("mha")
    modules = _modules(model)
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.self_attn .*layers\.1\.self_attn .*same widths"):
        uniform_fields(model, modules, _counts(_cuts(modules, FREE)))
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.self_attn is left with nothing"):
        uniform_fields(model, modules, _counts(_cuts(modules, EMPTY)))


def test_head_counts_a_config_refuses_are_known_beforehand() -> None:
    """Llama wants the heads to divide the hidden size, Qwen2 does not; the message says which numbers are taken."""
    llama, qwen2 = _model("mha"), _model("q, k, v biases")
    modules = _modules(llama)
    assert uniform_counts(llama, modules[0]) == (1, 2, 4)
    assert uniform_counts(qwen2, _modules(qwen2)[0]) == (1, 2, 3, 4)
    cuts = {module.name: Cut(torch.arange(3)) for module in modules if module.kind == "attention"}
    with pytest.raises(UnsupportedModel, match="Of 4 kv groups it takes 1, 2, 4"):
        uniform_fields(llama, modules, _counts(cuts))


@pytest.mark.parametrize(
    ("case", "weight"),
    [("helium", r"model\.layers\.0\.self_attn\.o_proj"), ("gpt2", r"transformer\.h\.0\.attn\.c_attn"),
     ("jamba", r"model\.layers\.2\.feed_forward\.experts\.gate_up_proj")],
)  # fmt: skip
def test_a_config_that_cannot_say_the_widths_is_noticed(case: str, weight: str) -> None:
    """Before anything is cut: output projections square whatever the heads, or experts of the FFNs' width."""
    model = make_model(case)
    modules = _modules(model)
    with pytest.raises(UnsupportedModel, match=rf"{weight}(\.weight)? is .* its config cannot say"):
        uniform_fields(model, modules, _counts(_cuts(modules, UNIFORM)))
    assert case == "jamba" or uniform_counts(model, modules[0]) == (modules[0].num_groups,)


def test_channels_of_gpt2_load_with_the_stock_class(tmp_path: Path) -> None:
    """Its config has no number for them until some went; its heads stay."""
    model = _model("transposed", torch.float32)
    modules = [module for module in _modules(model) if module.kind == "ffn"]
    cuts = _cuts(tuple(modules), UNIFORM)
    fields = uniform_fields(model, _modules(model), _counts(cuts))
    slice_model_(model, modules, cuts, _ids())
    describe_(model, modules, fields)
    model.save_pretrained(tmp_path)
    assert fields == {"n_inner": 128} and model.config.n_head == 4
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), _logits(model))


def test_latent_heads_load_with_the_stock_class(tmp_path: Path) -> None:
    """Head counts go, the sizes of heads stay as they are."""
    model = _model("latent", torch.float32)
    modules = _modules(model)
    cuts = _cuts(modules, UNIFORM)
    fields = uniform_fields(model, modules, _counts(cuts))
    slice_model_(model, modules, cuts, _ids())
    describe_(model, modules, fields)
    model.save_pretrained(tmp_path)
    assert fields == {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), _logits(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_a_wrong_coupling_is_caught_by_name(kind: str, dtype: torch.dtype) -> None:
    """Rows in an order that is not the consumer's: the masked model knows nothing of rows, so the sliced one differs."""
    model = _model("gqa, head_dim of its own", dtype)
    right = copy.deepcopy(model)
    slice_model_(right, _modules(right), _cuts(_modules(right), UNIFORM), _ids())
    wrong = [
        replace(module, producers=(replace(module.producers[-1], rows_GR=module.producers[-1].rows_GR.flip(0)),
                                   *module.producers[:-1])) if module.kind == kind and module.block == 1 else module
        for module in _modules(model)
    ]  # fmt: skip
    cuts = _cuts(tuple(wrong), UNIFORM)
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.\w+ puts out values") as caught:
        slice_model_(model, wrong, cuts, _ids())
    assert ("self_attn" in str(caught.value)) == (kind == "attention")


def test_a_module_that_no_longer_runs_is_named() -> None:
    """Here its heads were cut and its head size changed."""
    model = _model("mha")
    modules = _modules(model)
    cuts = _cuts(modules, UNIFORM)
    reference = record_masked(_masked(model, cuts), modules, _ids())
    sliced = _sliced(model, cuts)
    sliced.get_submodule("model.layers.1.self_attn").head_dim = 48
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.self_attn does not run"):
        check_sliced(sliced, reference)


def test_a_module_that_is_not_called_cannot_be_checked() -> None:
    """Its block then goes round it."""
    model = _model("mha")
    modules = _modules(model)
    mlp = model.get_submodule("model.layers.1.mlp")
    model.get_submodule("model.layers.1").forward = lambda hidden_states, **_: (
        hidden_states + mlp.down_proj(mlp.act_fn(mlp.gate_proj(hidden_states)) * mlp.up_proj(hidden_states))
    )
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.\w+ is not called"):
        slice_model_(model, modules, _cuts(modules, UNIFORM), _ids())


def test_modules_without_a_cut_stay_as_they_are() -> None:
    """Only one FFN is cut; every other parameter is the same tensor."""
    model = _model("mha")
    modules = _modules(model)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    slice_model_(model, modules, {"model.layers.1.mlp": Cut(torch.arange(0, 128, 4))}, _ids())
    changed = {name for name, parameter in model.named_parameters() if parameter.data_ptr() != before[name]}
    assert changed == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_half_of_llama_3_1_8b() -> None:
    """By shapes alone: 4.54 billion parameters where kv heads go with their queries; 4.67 were they kept, as often reported."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    modules = _modules(model)
    assert len(modules) == 64 and model.num_parameters() == 8_030_261_248
    cuts = {module.name: Cut(torch.arange(module.num_groups // 2)) for module in modules}
    half = sum(module.num_groups // 2 * module.parameters_per_group for module in modules)
    kv_rows = sum(
        part.rows_GR.numel() // 2 * part.site.shape[1]
        for module in modules
        for part in module.producers
        if part.site.name.endswith(("k_proj", "v_proj"))
    )
    assert round((8_030_261_248 - half) / 1e9, 2) == 4.54
    assert round((8_030_261_248 - half + kv_rows) / 1e9, 2) == 4.67
    fields = uniform_fields(model, modules, _counts(cuts))
    for module in modules:
        slice_(model, module, cuts[module.name])
    describe_(model, modules, fields)
    assert model.num_parameters() == 8_030_261_248 - half and all(parameter.is_meta for parameter in model.parameters())
    assert fields == {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 7168}
