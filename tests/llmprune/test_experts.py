"""Expert pruning: scores against every expert run on every token, removal against routers that choose among the kept alone."""

from __future__ import annotations

import math
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny
from families import tiny_model
from llmprune.anatomy.blocks import find_stack, probe, record
from llmprune.engines.reap import ExpertScores, best_experts, expert_scores
from llmprune.errors import NonFiniteError, UnsupportedModel
from llmprune.structured import experts
from llmprune.structured.experts import Mixture, find_experts, least_experts, remove_experts_

T = TypeVar("T")
SOFTMAX = {"mixtral": True, "qwen2_moe": False, "qwen3_moe": False, "olmoe": False}
"""Families that take the softmax of their logits, and whether the chosen ones' gates are made to sum to 1."""


def _ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(seed))


def _drain(steps: Generator[int, None, T]) -> tuple[list[int], T]:
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as stop:
            return seen, stop.value


def _mixtures(model: PreTrainedModel) -> tuple[Mixture, ...]:
    return find_experts(model, find_stack(model))


def _scores(model: PreTrainedModel) -> tuple[ExpertScores, ...]:
    stack = probe(model, find_stack(model), _ids()[:1])
    recording = record(model, stack, list(_ids().split(2)))
    seen, scores = _drain(expert_scores(stack, find_experts(model, stack), recording, torch.device("cpu")))
    assert seen == list(range(1, len(stack.blocks) + 1))
    return scores


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=_ids(), use_cache=False).logits
    return logits


def _gates(logits_TE: Tensor, top_k: int, normalised: bool) -> tuple[Tensor, Tensor]:
    gate_TK, index_TK = logits_TE.double().softmax(-1).topk(top_k)
    return gate_TK / gate_TK.sum(-1, keepdim=True) if normalised else gate_TK, index_TK


@torch.no_grad()
@pytest.mark.parametrize("model_type", SOFTMAX)
def test_scores_are_those_of_every_expert_run_on_every_token(model_type: str) -> None:
    """From the router's weights and the experts' matrices alone, in fp64: the mean of gate times norm over routed tokens."""
    model = tiny_model(model_type)
    mixtures, scores = _mixtures(model), _scores(model)
    assert len(scores) == len(mixtures) > 0
    for mixture, score in zip(mixtures, scores, strict=True):
        given: list[Tensor] = []
        router, holder = model.get_submodule(mixture.router), model.get_submodule(mixture.experts)
        hook = router.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
        _logits(model)
        hook.remove()
        x_TH = given[0].reshape(-1, 64).double()
        gate_TK, index_TK = _gates(x_TH @ router.weight.double().T, mixture.top_k, SOFTMAX[model_type])
        assert int(score.count_E.sum()) == index_TK.numel()
        for expert in range(mixture.num_experts):
            gate, up = (x_TH @ holder.gate_up_proj[expert].double().T).chunk(2, -1)
            norm_T = (F.silu(gate) * up @ holder.down_proj[expert].double().T).norm(dim=-1)
            chosen_TK = index_TK == expert
            worth = float((gate_TK * chosen_TK).sum(-1) @ norm_T) / int(chosen_TK.sum())
            assert int(score.count_E[expert]) == int(chosen_TK.sum())
            assert math.isclose(float(score.saliency_E[expert]), worth, rel_tol=1e-5)


def test_an_expert_never_chosen_is_worth_nothing_and_one_that_breaks_is_named() -> None:
    """A router that avoids an expert gives it score and count 0; NaN weights raise."""
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[2] = -1e4
    scores = _scores(model)
    assert float(scores[0].saliency_E[2]) == int(scores[0].count_E[2]) == 0
    assert float(scores[0].saliency_E[[0, 1, 3]].min()) > 0
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1] = math.nan
    with pytest.raises(NonFiniteError, match=r"expert 1 of model.layers.0.mlp.experts"):
        _scores(model)


def test_the_best_experts_are_taken_from_every_group() -> None:
    """Over all, or equally many of each half; of equals the first; indices rise."""
    score_E = torch.tensor([1.0, 5.0, 2.0, 0.0, 9.0, 8.0, 7.0, 7.0])
    assert best_experts(score_E, 4) == [4, 5, 6, 7]
    assert best_experts(score_E, 4, num_groups=2) == [1, 2, 4, 5]
    assert best_experts(torch.ones(4), 2) == [0, 1]
    with pytest.raises(ValueError, match="multiple of 2"):
        best_experts(score_E, 3, num_groups=2)


def _choose_among(model: PreTrainedModel, mixture: Mixture, kept: list[int], normalised: bool) -> None:
    """Have the router of a dense model see the logits of the kept experts alone."""

    def choose(_module: nn.Module, _args: Any, output: Any) -> Any:
        gate_TK, index_TK = _gates(output[0][:, kept], mixture.top_k, normalised)
        return output[0], gate_TK.to(output[0].dtype), torch.tensor(kept)[index_TK]

    model.get_submodule(mixture.router).register_forward_hook(choose)


@pytest.mark.parametrize("model_type", SOFTMAX)
def test_what_is_left_chooses_among_the_kept(model_type: str, tmp_path: Path) -> None:
    """The model puts out what it does when its routers know of no others, says so in its config, and loads as it is."""
    twin, model = tiny_model(model_type), tiny_model(model_type)
    mixtures = _mixtures(model)
    assert mixtures
    kept = [[0, 2, 3], [1, 2, 3]][: len(mixtures)]
    dense = _logits(twin)
    for mixture, one in zip(mixtures, kept, strict=True):
        _choose_among(twin, mixture, one, SOFTMAX[model_type])
    remove_experts_(model, mixtures, kept, _ids()[:1])
    torch.testing.assert_close(_logits(model), _logits(twin), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(_logits(model), dense, atol=1e-4)
    assert [mixture.num_experts for mixture in _mixtures(model)] == [3] * len(mixtures)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(_logits(loaded), _logits(model), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v2", "ernie4_5_moe", "phimoe", "afmoe", "gemma4_text", "glm4_moe"])
def test_other_routers_pass_the_check_too(model_type: str) -> None:
    """Biases, correction biases, scales, shared experts and dense blocks: parameters shrink by the experts' and rows'."""
    model = tiny_model(model_type)
    mixtures = _mixtures(model)
    before = sum(parameter.numel() for parameter in model.parameters())
    gone = sum(
        parameter.numel() // 4
        for mixture in mixtures
        for path, parameter in model.named_parameters()
        if path in dict(mixture.entries)
    )
    remove_experts_(model, mixtures, [[0, 1, 3]] * len(mixtures), _ids()[:2])
    assert gone > 0
    assert sum(parameter.numel() for parameter in model.parameters()) == before - gone


def test_groups_stay_equal() -> None:
    """Of two groups as many go from each, or the choice is refused; what is left chooses among both."""
    model = tiny.make_model("deepseek_v3", n_routed_experts=8, n_group=2)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    mixtures = _mixtures(model)
    assert [(one.num_experts, one.route_groups, least_experts(one)) for one in mixtures] == [(8, 2, 4)] * len(mixtures)
    with pytest.raises(UnsupportedModel, match="equally many in each of 2"):
        remove_experts_(model, mixtures, [[0, 1, 2, 3, 4, 5]] * len(mixtures), _ids())
    remove_experts_(model, mixtures, [[0, 1, 3, 4, 6, 7]] * len(mixtures), _ids())
    assert model.config.n_routed_experts == 6


def test_too_few_and_unequal_numbers_are_refused() -> None:
    """As many experts stay as are chosen for a token, and equally many in every block."""
    model = tiny_model("mixtral")
    mixtures = _mixtures(model)
    with pytest.raises(UnsupportedModel, match="At most 2 of 4 can go"):
        remove_experts_(model, mixtures, [[0]] * 2, _ids())
    with pytest.raises(UnsupportedModel, match="Keep equally many"):
        remove_experts_(model, mixtures, [[0, 1, 2], [0, 1]], _ids())


@pytest.mark.parametrize("model_type", ["llama", "dbrx", "jetmoe", "longcat_flash", "zaya", "deepseek_v4"])
def test_mixtures_that_are_not_understood_are_refused(model_type: str) -> None:
    """By the name of the module, or for want of any."""
    match = "has no experts" if model_type == "llama" else r"layers|blocks.*cannot lose experts"
    with pytest.raises(UnsupportedModel, match=match):
        _mixtures(tiny_model(model_type))


def test_a_wrong_slice_is_found_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts in another order than their router's rows: refused by the check, and the model is as it was."""
    model = tiny_model("mixtral")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected = _logits(model)
    right = experts._slice
    monkeypatch.setattr(
        experts, "_slice", lambda tensor, axis, kept: right(tensor, axis, kept[::-1] if tensor.dim() == 3 else kept)
    )
    with pytest.raises(UnsupportedModel, match="how it chooses is not understood"):
        remove_experts_(model, _mixtures(model), [[0, 1, 3]] * 2, _ids())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(_logits(model), expected)
    assert model.config.num_local_experts == 4
