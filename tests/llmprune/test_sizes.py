"""Sizes of models as they lie in memory against closed forms and torch's own counts, and seconds of a group."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmprune.anatomy.blocks import find_stack
from llmprune.measure import modules as measured
from llmprune.measure.modules import ModuleSeconds, module_seconds, seconds_per_group, slope, widths_of
from llmprune.structured.sizes import kv_bytes_per_token, num_parameters
from llmprune.structured.slicing import Cut, slice_
from llmprune.structured.units import Module, find_units
from tiny import make_model


def _modules(model: PreTrainedModel) -> tuple[Module, ...]:
    return find_units(model, find_stack(model)).modules


def _sliced(model: PreTrainedModel, kept: dict[str, int]) -> PreTrainedModel:
    for module in _modules(model):
        if module.name in kept:
            slice_(model, module, Cut(torch.arange(kept[module.name])))
    return model


def test_parameters_count_once() -> None:
    """Tied embeddings are one tensor; what a cut takes out is its groups' parameters, also down to nothing."""
    tied, loose = (make_model(num_key_value_heads=4, tie_word_embeddings=tie) for tie in (True, False))
    assert num_parameters(loose) - num_parameters(tied) == 128 * 64
    before = num_parameters(tied)
    attention, ffn = _modules(tied)[:2]
    gone = 3 * attention.parameters_per_group + 128 * ffn.parameters_per_group
    assert num_parameters(_sliced(tied, {attention.name: 1, ffn.name: 0})) == before - gone > 0


def test_half_of_llama_3_1_8b() -> None:
    """By the shapes of one of its 32 layers: parameters, and bytes of a token's keys and values, whole and half."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    modules, outside = _modules(model), 2 * 128256 * 4096 + 4096
    assert 32 * (num_parameters(model) - outside) + outside == 8_030_261_248
    assert 32 * kv_bytes_per_token(model) == 32 * 8 * 128 * 2 * 2 == 131_072
    _sliced(model, {module.name: module.num_groups // 2 for module in modules})
    assert round((32 * (num_parameters(model) - outside) + outside) / 1e9, 2) == 4.54
    assert 32 * kv_bytes_per_token(model) == 65_536


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("llama", {"num_key_value_heads": 4}, 2 * 2 * 4 * 16 * 4),
        ("llama", {"num_key_value_heads": 1}, 2 * 2 * 1 * 16 * 4),
        ("gemma3_text", {}, 2 * 2 * 2 * 16 * 4),  # windows that are not full yet
        ("deepseek_v3", {}, 2 * (16 + 8) * 4),  # latents and the rotary part
        ("qwen3_next", {}, 2 * 2 * 16 * 4),  # one of two layers is linear
        ("gemma3n_text", {}, 2 * 2 * 2 * 16 * 4),  # the other layers read the same keys and values
        ("mamba", {}, 0),
        ("openai-gpt", {}, 0),
    ],
)
def test_a_token_takes_what_the_cache_holds(model_type: str, changes: dict[str, Any], expected: int) -> None:
    """Heads x size x keys and values x bytes, of fp32."""
    assert kv_bytes_per_token(make_model(model_type, **changes)) == expected


def test_a_layer_without_attention_takes_two_zeros() -> None:
    """And a sliced one the heads it has."""
    model = make_model(num_key_value_heads=4, dtype=torch.float64)
    _sliced(model, {"model.layers.0.self_attn": 0, "model.layers.1.self_attn": 3})
    assert kv_bytes_per_token(model) == 2 * 8 + 3 * 16 * 2 * 8


def test_the_slope_of_a_line_is_found() -> None:
    """Exactly, with an intercept, of any phase; one that falls or lies flat still costs something."""
    groups = (128, 96, 64)
    assert slope(groups, [0.5 + 3e-3 * count for count in groups]) == pytest.approx(3e-3)
    assert slope(groups, [1.0, 1.0, 1.0]) == slope(groups, [1.0, 1.1, 1.3]) == pytest.approx(1 / 128 / 100)
    assert slope((1,), [0.25]) == 0.25
    prefill, decode = ([share * 1e-6 * count + 1e-4 for count in groups] for share in (2, 5))
    assert ModuleSeconds(groups, tuple(prefill), tuple(decode)).per_group(512, 128) == pytest.approx((1024 + 640) * 1e-6)


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("llama", {"num_key_value_heads": 4}, ((4, 3, 2), (128, 96, 64))),
        ("llama", {"intermediate_size": 44}, ((2, 1), (44, 32, 24))),  # quanta of 4 channels
        ("phi3", {"num_key_value_heads": 4}, ((4, 3, 2), (128, 96, 64))),
        ("gemma3_text", {"num_key_value_heads": 4, "intermediate_size": 1}, ((4, 3, 2), (1,))),
    ],
)
def test_modules_are_timed_at_a_few_widths(model_type: str, changes: dict[str, Any], expected: Any) -> None:
    """On the machine at hand: finite and above zero; the model and its next forward are as they were."""
    model = make_model(model_type, **changes)
    modules = _modules(model)[:2]
    before, ids = copy.deepcopy(model.state_dict()), torch.arange(3, 13)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        for module, groups in zip(modules, expected, strict=True):
            assert widths_of(module) == groups
            found = module_seconds(model, module, prompt_tokens=80, repeats=3, seconds=0.05)
            assert found.groups == groups and len(found.prefill) == len(found.decode) == len(groups)
            assert all(0 < value < 1 for value in (*found.prefill, *found.decode, found.per_group(100, 10)))
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma3_text"])
def test_what_is_timed_is_the_module_of_a_sliced_model(model_type: str) -> None:
    """In both phases, every time anew: what it puts out in the dense model, and narrow, in one that was sliced."""
    model = make_model(model_type, num_key_value_heads=4)
    twin = _sliced(copy.deepcopy(model), {module.name: module.num_groups // 2 for module in _modules(model)[:1]})
    module, ids_1S = _modules(model)[0], torch.arange(3, 13)[None]
    for source, kept in ((model, 4), (twin, 2)):
        outputs: list[torch.Tensor] = []
        handle = source.get_submodule(module.name).register_forward_hook(lambda _module, _args, out: outputs.append(out[0]))
        cache = DynamicCache(config=source.config)
        with torch.no_grad():
            source(input_ids=ids_1S[:, :9], past_key_values=cache)
            source(input_ids=ids_1S[:, 9:], past_key_values=cache)
        handle.remove()
        owner, dense = model.get_submodule(module.name), DynamicCache(config=model.config)
        part = measured._narrow(owner, module, kept)
        with torch.no_grad():
            for expected, tokens in zip(outputs, (ids_1S[:, :9], ids_1S[:, 9:]), strict=True):
                call = measured._captured(owner, lambda tokens=tokens: model(input_ids=tokens, past_key_values=dense))
                run = measured._run(part, call, kept)
                for _ in range(2):
                    run.reset()
                    found: Any = run.run()
                    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)


def test_modules_of_one_shape_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And stand for each other; those of another width for themselves."""
    model = _sliced(make_model(num_key_value_heads=4), {"model.layers.1.mlp": 64})
    modules, timed = _modules(model), []

    def fake(_model: PreTrainedModel, module: Module, **fields: Any) -> ModuleSeconds:
        timed.append((module.name, fields["prompt_tokens"]))
        return ModuleSeconds((2, 1), (2.0 * module.num_groups, 1.0), (4.0, 1.0))

    monkeypatch.setattr(measured, "module_seconds", fake)
    found = seconds_per_group(model, modules, prompt_tokens=7, new_tokens=3)
    assert timed == [("model.layers.0.self_attn", 7), ("model.layers.0.mlp", 7), ("model.layers.1.mlp", 7)]
    assert list(found) == [module.name for module in modules]
    assert found["model.layers.0.self_attn"] == found["model.layers.1.self_attn"] == pytest.approx(7 * 7 + 3 * 3)
    assert found["model.layers.1.mlp"] == pytest.approx(7 * 127 + 9)
