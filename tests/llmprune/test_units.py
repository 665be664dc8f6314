"""Kv groups and channels are found with all their rows and columns; what is not understood is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from families import FAMILIES, tiny_model
from llmprune.anatomy.blocks import find_stack
from llmprune.errors import UnsupportedModel
from llmprune.structured.slicing import Cut, slice_model_
from llmprune.structured.units import Units, find_units
from tiny import make_model

UNDERSTOOD = set(
    "llama mistral ministral3 qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 glm4 granite cohere2 starcoder2 smollm3 "
    "stablelm olmo nemotron exaone4 seed_oss".split()
)


def _units(model_type: str, **changes: object) -> Units:
    model = make_model(model_type, **changes)
    return find_units(model, find_stack(model))


def test_attention_and_ffn_of_every_block() -> None:
    """Grouped heads of a size of their own: rows and columns by hand."""
    units = _units("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    assert [module.name.removeprefix("model.layers.") for module in units.modules] == [
        "0.self_attn", "0.mlp", "1.self_attn", "1.mlp"]  # fmt: skip
    assert [module.block for module in units.modules] == [0, 0, 1, 1] and not units.left
    attention, ffn = units.modules[:2]
    assert (attention.num_groups, attention.group_size, attention.num_query_heads, attention.head_dim) == (2, 16, 2, 8)
    query, key, value = attention.producers
    assert query.site.name.endswith("q_proj") and query.rows_GR.tolist() == [list(range(16)), list(range(16, 32))]
    assert key.rows_GR.tolist() == value.rows_GR.tolist() == [list(range(8)), list(range(8, 16))]
    assert attention.parameters_per_group == 64 * (16 + 8 + 8 + 16)
    assert (ffn.num_groups, ffn.group_size, ffn.parameters_per_group) == (128, 1, 3 * 64)


def test_fused_matrices_give_their_rows_in_order() -> None:
    """Queries, keys and values one below the other, gate and up too."""
    attention, ffn = _units("phi3", num_attention_heads=4, num_key_value_heads=2).modules[:2]
    [fused] = attention.producers
    queries, keys, values = range(32), range(64, 80), range(96, 112)
    assert fused.rows_GR[0].tolist() == [*queries, *keys, *values] and fused.rows_GR.numel() == 128
    [gate_up] = ffn.producers
    assert gate_up.rows_GR[3].tolist() == [3, 131]


def test_biases_are_counted() -> None:
    """Those of rows that go; the output projection's stays."""
    attention, ffn = _units("llama", num_key_value_heads=4, attention_bias=True, mlp_bias=True).modules[:2]
    assert attention.parameters_per_group == 16 * (3 * 65 + 64) and ffn.parameters_per_group == 2 * 65 + 64


def test_one_key_value_head_is_left_whole() -> None:
    """It is said why, and the FFNs can still be pruned."""
    units = _units("llama", num_key_value_heads=1)
    assert {module.kind for module in units.modules} == {"ffn"} and len(units.modules) == 2
    assert set(units.left) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert "one key-value head" in units.left["model.layers.0.self_attn"]


@pytest.mark.parametrize(
    ("model_type", "weight"),
    [
        ("olmo2", "model.layers.0.self_attn.q_norm.weight"),  # normalises all heads together
        ("granite_swa", "model.layers.0.self_attn.sinks"),  # one number a head
        ("diffllama", "model.layers.0.self_attn.lambda_q1"),  # heads in pairs
        ("bitnet", "model.layers.0.self_attn.attn_sub_norm.weight"),
        ("laguna", "model.layers.0.self_attn.g_proj"),  # gates heads
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value"),  # fused head by head
        ("gpt2", "transformer.h.0.attn.c_attn"),  # transposed
        ("opt", "model.decoder.layers.0.fc1"),  # no module of its own
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj.0"),
        ("mamba", "backbone.layers.0.mixer.in_proj"),
        ("deepseek_v3", "model.layers.0.self_attn.q_a_proj"),  # latent
        ("gemma3n_text", "model.layers.0.self_attn.q_proj"),  # layers read each other's keys
        ("zamba", "model.layers.1.shared_transf.self_attn.q_proj"),  # used by more than one layer
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(model_type: str, weight: str) -> None:
    """Couplings of many kinds; never a guess."""
    model = tiny_model(model_type)
    with pytest.raises(UnsupportedModel) as caught:
        find_units(model, find_stack(model))
    assert f" {weight} " in str(caught.value)


@pytest.mark.parametrize("parameter", ["head_scale", "alibi"])
def test_an_unknown_tensor_in_an_attention_is_refused(parameter: str) -> None:
    """A parameter or a buffer nobody declared may depend on the heads."""
    model = make_model("llama")
    owner = model.get_submodule("model.layers.1.self_attn")
    if parameter == "head_scale":
        owner.head_scale = nn.Parameter(torch.ones(4))
    else:
        owner.register_buffer("alibi", torch.ones(4))
    with pytest.raises(UnsupportedModel, match=rf"model\.layers\.1\.self_attn\.{parameter} .*\[4\]"):
        find_units(model, find_stack(model))


def test_a_module_of_other_heads_than_its_shapes_is_refused() -> None:
    """The head size is taken wrongly, then."""
    model = make_model("llama")
    model.get_submodule("model.layers.0.self_attn").num_heads = 8
    with pytest.raises(UnsupportedModel, match="counts other heads"):
        find_units(model, find_stack(model))


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_is_sliced_right_or_refused(model_type: str) -> None:
    """No other error; every row and column of a module is in exactly one group, and its masked self agrees with it sliced."""
    model = tiny_model(model_type)
    try:
        modules = find_units(model, find_stack(model)).modules
    except UnsupportedModel as error:
        assert "Choose another pattern" in str(error)
        assert model_type not in UNDERSTOOD
        return
    assert modules
    for module in modules:
        assert module.num_groups * module.group_size == module.consumer.shape[1]
        for part in module.producers:
            assert part.rows_GR.reshape(-1).sort().values.equal(torch.arange(part.site.shape[0]))
            assert len(part.rows_GR) == module.num_groups
    cuts = {module.name: Cut(torch.arange(module.block % 2, module.num_groups, 2)) for module in modules}
    slice_model_(model, modules, cuts, torch.arange(3, 35).view(2, 16))
    assert all(module.consumer.shape[1] == module.num_groups * module.group_size // 2 for module in modules)
