"""Kv groups and channels are found with all their rows and columns; what is not understood is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from families import FAMILIES, tiny_model
from llmprune.anatomy.blocks import find_stack
from llmprune.errors import UnsupportedModel
from llmprune.structured.slicing import Cut, slice_model_
from llmprune.structured.units import Units, find_units, select_units
from tiny import make_model

REFUSED = set(
    "bitnet cpmant ctrl deepseek_v4 doge falcon_mamba flex_olmo inkling2_text jetmoe mamba mamba2 minimax_m2 olmoe "
    "qwen4_exp_text rwkv xlnet zamba zamba2 zaya".split()
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


def test_query_heads_are_the_groups_of_one_key_value_head() -> None:
    """Keys and values stay, whether they have matrices of their own or share one with the queries."""
    units = _units("llama", num_key_value_heads=1)
    attention = units.modules[0]
    assert not units.left and (attention.num_groups, attention.group_size, attention.num_query_heads) == (4, 16, 1)
    [query] = attention.producers
    assert attention.multi_query and query.site.name.endswith("q_proj") and query.rows_GR.numel() == 64
    assert attention.parameters_per_group == 2 * 16 * 64
    for model_type, changes in (("phi3", {"num_key_value_heads": 1}), ("gpt_bigcode", {})):
        attention = _units(model_type, **changes).modules[0]
        [fused] = attention.producers
        assert fused.site.shape[0] == 96 and fused.rows_GR.tolist() == [list(range(i, i + 16)) for i in range(0, 64, 16)]


def test_one_head_is_left_whole() -> None:
    """It is said why, and the FFNs can still be pruned."""
    units = _units("llama", num_attention_heads=1, num_key_value_heads=1)
    assert {module.kind for module in units.modules} == {"ffn"} and len(units.modules) == 2
    assert set(units.left) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert "one head" in units.left["model.layers.0.self_attn"]


def test_rows_that_lie_head_by_head() -> None:
    """Those of a head, or of a kv group, lie together: gpt_neox, and falcon with two query heads a group; gpt2's do not."""
    [fused] = _units("gpt_neox").modules[0].producers
    assert fused.rows_GR[1].tolist() == list(range(48, 96))
    falcon = _units("falcon").modules[0]
    assert falcon.num_query_heads == 2 and falcon.producers[0].rows_GR[1].tolist() == list(range(64, 128))
    [transposed] = _units("gpt2").modules[0].producers
    assert transposed.rows_GR[1].tolist() == [*range(16, 32), *range(80, 96), *range(144, 160)]


def test_what_else_goes_with_a_head() -> None:
    """Attention sinks, gates of heads, and what a head makes of the latents; biases and counts by hand."""
    attention = _units("granite_swa").modules[0]
    assert attention.per_head == ("sinks",) and attention.parameters_per_group == 64 * (32 + 16 + 16 + 32) + 2
    attention = _units("laguna").modules[0]
    assert attention.producers[3].site.name.endswith("g_proj") and attention.producers[3].rows_GR.tolist() == [[0, 1], [2, 3]]
    attention = _units("minicpm3").modules[0]
    assert [part.site.name.rpartition(".")[2] for part in attention.producers] == ["q_b_proj", "kv_b_proj"]
    assert attention.num_groups == 4 and attention.parameters_per_group == 24 * 32 + 32 * 16 + 16 * 64


@pytest.mark.parametrize(
    ("model_type", "name", "reason"),
    [
        ("olmo2", "layers.0.self_attn", "q_norm.weight"),  # normalises all heads together
        ("diffllama", "layers.0.self_attn", "lambda_q1"),  # heads in pairs
        ("bloom", "h.0.self_attention", "alibi"),  # a slope a head, which the model makes
        ("mpt", "blocks.0.attn", "position_bias"),
        ("codegen", "h.0.attn", "embed_positions"),  # rows of its one matrix in four parts
        ("qwen2_moe", "layers.1.mlp", "experts.gate_up_proj.0"),  # the shared expert too
        ("bamba", "layers.0.mamba", "in_proj"),
        ("gemma3n_text", "layers.0.self_attn", "keys and values of other layers"),
        ("gemma3n_text", "layers.0.mlp", "activation sparsity"),
        ("deepseek_v32", "layers.0.self_attn", "indexer"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_left_whole_by_name(model_type: str, name: str, reason: str) -> None:
    """Couplings of many kinds; never a guess. Nothing of such a module is in another."""
    model = tiny_model(model_type)
    units = find_units(model, find_stack(model))
    left = next(path for path in units.left if path.endswith(name))
    assert reason in units.left[left]
    assert not any(f"{module.name}.".startswith(f"{left}.") for module in units.modules)


@pytest.mark.parametrize(
    ("model_type", "weight"),
    [
        ("bitnet", "model.layers.0.self_attn.attn_sub_norm.weight"),
        ("mamba", "backbone.layers.0.mixer.in_proj"),
        ("olmoe", "model.layers.0.self_attn.q_norm.weight"),
        ("rwkv", "rwkv.blocks.0.attention.time_mix_key.0"),
        ("zamba", "model.layers.0.mamba.x_proj_weight.0"),
    ],
)
def test_a_model_of_which_nothing_is_understood_is_refused_by_name(model_type: str, weight: str) -> None:
    """The message names a weight."""
    model = tiny_model(model_type)
    with pytest.raises(UnsupportedModel) as caught:
        find_units(model, find_stack(model))
    assert f" {weight} " in str(caught.value)


@pytest.mark.parametrize("parameter", ["head_scale", "alibi"])
def test_an_unknown_tensor_in_an_attention_leaves_it_whole(parameter: str) -> None:
    """A parameter or a buffer nobody declared may depend on the heads."""
    model = make_model("llama")
    owner = model.get_submodule("model.layers.1.self_attn")
    if parameter == "head_scale":
        owner.head_scale = nn.Parameter(torch.ones(4))
    else:
        owner.register_buffer("alibi", torch.ones(4))
    units = find_units(model, find_stack(model))
    assert list(units.left) == ["model.layers.1.self_attn"] and len(units.modules) == 3
    assert f"model.layers.1.self_attn.{parameter} of shape [4]" in units.left["model.layers.1.self_attn"]


def test_a_module_of_other_heads_than_its_shapes_is_left_whole() -> None:
    """The head size is taken wrongly, then."""
    model = make_model("llama")
    model.get_submodule("model.layers.0.self_attn").num_heads = 8
    assert "counts other heads" in find_units(model, find_stack(model)).left["model.layers.0.self_attn"]


def test_a_weight_of_two_modules_leaves_both_whole() -> None:
    """Each would lose the other's rows."""
    model = make_model("llama")
    one, two = (model.get_submodule(f"model.layers.{index}.mlp.up_proj") for index in (0, 1))
    two.weight = one.weight
    left = find_units(model, find_stack(model)).left
    assert set(left) == {"model.layers.0.mlp", "model.layers.1.mlp"} and "shared" in left["model.layers.0.mlp"]


def test_globs_leave_modules_whole() -> None:
    """By the module's name or that of one of its matrices; the others are those found."""
    units = _units("llama")
    for glob, skipped in (
        ("*.0.mlp", 1),
        ("*.down_proj", 2),
        ("*.k_proj", 2),
        ("*.layers.1.*", 2),
        ("*mlp*", 2),
        ("nothing", 0),
    ):
        rest = select_units(units, [glob])
        assert len(rest.modules) == 4 - skipped == 4 - len(rest.left)
        assert all(glob in reason for reason in rest.left.values())
        assert set(rest.modules) <= set(units.modules)
    assert not select_units(units, ["*"]).modules and select_units(units, []) == units


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_is_sliced_right_or_refused(model_type: str) -> None:
    """No other error; every row and column of a module is in one group, or stays, and its masked self agrees with it sliced."""
    model = tiny_model(model_type)
    try:
        modules = find_units(model, find_stack(model)).modules
    except UnsupportedModel as error:
        assert "Choose another pattern" in str(error)
        assert model_type in REFUSED
        return
    assert model_type not in REFUSED
    for module in modules:
        assert module.num_groups * module.group_size == module.consumer.shape[1]
        for part in module.producers:
            rows = part.rows_GR.reshape(-1).tolist()
            assert len(set(rows)) == len(rows) <= part.site.shape[0] and min(rows) >= 0 and max(rows) < part.site.shape[0]
            assert len(part.rows_GR) == module.num_groups and (module.multi_query or len(rows) == part.site.shape[0])
    cuts = {module.name: Cut(torch.arange(module.block % 2, module.num_groups, 2)) for module in modules}
    slice_model_(model, modules, cuts, torch.arange(3, 35).view(2, 16))
    assert all(module.consumer.shape[1] == module.num_groups * module.group_size // 2 for module in modules)
