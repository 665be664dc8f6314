"""Experts in Týr's search: levels of a mixture are routers that never choose some, and in the end these are gone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmprune
import tiny
from llmprune.anatomy.blocks import find_stack
from llmprune.engines.reap import Tally, best_experts, expert_scores
from llmprune.engines.supernet import Supernet, racks_of
from llmprune.engines.tyr import Tyr
from llmprune.errors import ConfigError, UnsupportedModel
from llmprune.io.checkpoint import save_weights
from llmprune.structured.budget import Budget
from llmprune.structured.experts import Mixture, Muted, find_experts, least_experts, without
from llmprune.structured.free import describe_free_
from llmprune.structured.slicing import slice_model_
from llmprune.structured.units import find_units, keep_experts, select_units
from supernet_case import CPU, Case, ids

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_key_value_heads": 4},
    "qwen2_moe": {"num_experts": 6, "num_hidden_layers": 3},
    "deepseek_v3": {"n_routed_experts": 12, "n_group": 2, "topk_group": 1, "num_hidden_layers": 3},
}
"""Softmax over the chosen; shared experts and a dense block; groups, sigmoids, a correction bias and shared experts."""


def _model(model_type: str = "mixtral", **changes: Any) -> PreTrainedModel:
    model = tiny.make_model(model_type, **(FAMILIES[model_type] | changes))
    model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1, generator=generator)
    return model


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids(2), use_cache=False).logits
    return logits


def _mixtures(case: Case) -> list[int]:
    return [number for number, module in enumerate(case.modules) if isinstance(module, Mixture)]


def _filled(case: Case, racks: Any = None, **fields: Any) -> Supernet:
    net = Supernet(case.stack, racks or case.racks, **fields)
    for _ in net.fill(case.calibration, CPU):
        pass
    return net


def _uneven(net: Supernet) -> list[int]:
    """A rung of every module, of which mixtures lose different numbers."""
    return [min(1 + rack.block, len(rack.counts) - 1) for rack in net.groups]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_candidate_is_what_its_slices_are(model_type: str) -> None:
    """A model that holds some levels puts out what it does when these groups and experts are gone; held again it is dense,
    buffers too; a mixture holds its last level alone.
    """
    case = Case(_model(model_type), experts=True)
    dense, net = _logits(case.model), _filled(case)
    assert case.unchanged() and len(_mixtures(case)) == 2
    rungs = _uneven(net)
    for number, rung in enumerate(rungs):
        net.hold_(number, len(net.groups[number].counts) - 1)
        net.hold_(number, rung)
    candidate = _logits(case.model)
    net.restore_()
    assert case.unchanged() and torch.equal(_logits(case.model), dense)
    cuts = {case.modules[number].name: net.cut(number, rung) for number, rung in enumerate(rungs)}
    before = sum(parameter.numel() for parameter in case.model.parameters())
    gone = sum((part.num_groups - len(cuts[part.name].kept_G)) * part.parameters_per_group for part in case.modules)
    slice_model_(case.model, case.modules, cuts, ids()[:2])
    torch.testing.assert_close(_logits(case.model), candidate, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(candidate, dense, atol=1e-3)
    assert sum(parameter.numel() for parameter in case.model.parameters()) == before - gone
    left = find_experts(case.model, find_stack(case.model))
    assert [one.num_experts for one in left] == [len(cuts[case.modules[number].name].kept_G) for number in _mixtures(case)]
    assert len({one.num_experts for one in left}) == 2
    assert [one.top_k for one in left] == [case.modules[number].top_k for number in _mixtures(case)]


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("sequential", [False, True])
def test_experts_go_in_the_order_of_their_scores(model_type: str, sequential: bool) -> None:
    """Those of the dense model where nothing else is pruned, nested, as many of each group; losses rise from 0."""
    case = Case(_model(model_type), experts=True)
    mixtures = [case.modules[number] for number in _mixtures(case)]
    counts = [tuple(range(0, one.max_removed + 1, one.multiple)) for one in mixtures]
    net = _filled(case, racks_of(mixtures, counts, [0] * len(mixtures)), sequential=sequential)
    running = expert_scores(case.stack, mixtures, case.calibration, CPU)
    while True:
        try:
            next(running)
        except StopIteration as stop:
            scores = stop.value
            break
    for number, (mixture, score) in enumerate(zip(mixtures, scores, strict=True)):
        assert torch.equal(net.scores[number].saliency_E, score.saliency_E)
        kept = set(range(mixture.num_experts))
        for rung, count in enumerate(counts[number]):
            own = net.experts(number, rung)
            assert own == best_experts(score.saliency_E, mixture.num_experts - count, mixture.route_groups)
            assert own == net.cut(number, rung).kept_G.tolist() and set(own) <= kept
            kept = set(own)
        assert len(kept) == least_experts(mixture)
        assert (
            net.losses[number][0] == 0 and list(net.losses[number]) == sorted(net.losses[number]) and net.losses[number][-1] < 1
        )


def test_errors_accumulate_at_the_centre() -> None:
    """Block 1's experts are scored on what block 0 puts out without the experts of its centre."""
    case = Case(_model(), experts=True)
    mixtures = [case.modules[number] for number in _mixtures(case)]
    net = _filled(case, racks_of(mixtures, [(0, 1, 3, 4)] * 2, [3, 1]))
    others = _filled(case, racks_of(mixtures, [(0, 1, 3, 4)] * 2, [0, 1]))
    with without(case.model, mixtures[:1], [net.experts(0, 2)]), torch.no_grad():
        hidden = [
            case.calibration.calls[batch][0].run(case.stack.blocks[0], x) for batch, x in enumerate(case.calibration.hidden)
        ]
    tally = Tally(Muted(mixtures[1], case.model))
    with torch.no_grad():
        for batch, hidden_NSH in enumerate(hidden):
            case.calibration.calls[batch][1].run(case.stack.blocks[1], hidden_NSH)
    tally.handle.remove()
    score_E = tally.scores().saliency_E
    assert torch.equal(net.scores[1].saliency_E, score_E) and not torch.equal(others.scores[1].saliency_E, score_E)
    assert case.unchanged()


@pytest.mark.parametrize("budget", ["kinds", "parameters"])
def test_the_search_moves_experts_between_mixtures(budget: Any) -> None:
    """The budget is met, of experts too; the divergence is that of the masked model, and the model stays dense."""
    case = Case(_model(), experts=True)
    engine = case.tyr(0.3, budget)
    steps = list(engine.run())
    assert steps[-1].done == engine.total and case.unchanged()
    numbers = _mixtures(case)
    if budget == "kinds":
        assert sum(engine.counts[number] for number in numbers) == 4  # 0.3 of 12
    else:
        low, high = engine.budget.bounds(1)
        assert low <= engine.budget.removed(engine.counts) <= high
    assert all(0 <= engine.counts[number] <= 4 for number in numbers)
    assert [len(engine.cuts[case.modules[number].name].kept_G) for number in numbers] == [
        6 - engine.counts[number] for number in numbers
    ]
    assert engine.divergence == pytest.approx(case.kl(engine.cuts), rel=1e-4)
    assert case.unchanged() and engine.rounds[0].steps["experts of 1"] == 1


def test_a_stopped_search_goes_on_to_the_same_experts() -> None:
    """From what JSON gives back."""
    case = Case(_model(), experts=True)

    def found(engine: Tyr) -> dict[str, list[int]]:
        return {name: cut.kept_G.tolist() for name, cut in engine.cuts.items()}

    whole = case.tyr(0.4, generations=2, settle=False)
    states = [json.dumps(whole.snapshot()) for step in whole.run() if step.phase == "search"]
    engine = case.tyr(0.4, generations=2, settle=False)
    engine.restore_(json.loads(states[2]))
    list(engine.run())
    assert found(engine) == found(whole) and engine.divergence == whole.divergence


@pytest.mark.parametrize("model_type", FAMILIES)
def test_numbers_of_experts_by_layer_are_saved_and_loaded(model_type: str, tmp_path: Path) -> None:
    """By llmprune and by transformers with the code in the checkpoint, to the same logits; without it a shape does not fit."""
    case = Case(_model(model_type), experts=True)
    net = _filled(case)
    cuts = {
        part.name: net.cut(number, rung) for number, (part, rung) in enumerate(zip(case.modules, _uneven(net), strict=True))
    }
    net.restore_()
    slice_model_(case.model, case.modules, cuts, ids()[:2])
    shapes = describe_free_(case.model)
    numbers = [len(cuts[case.modules[number].name].kept_G) for number in _mixtures(case)]
    paths = [case.modules[number].router for number in _mixtures(case)]
    assert [shapes["parameters"][f"{path}.weight"][0] for path in paths] == numbers
    save_weights(case.model, tmp_path / "free", tokenizer=tiny.train_tokenizer(), source=None, code=False)
    ours = llmprune.load(tmp_path / "free", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "free", trust_remote_code=True).eval()
    for loaded in (ours, theirs):
        loaded.set_experts_implementation("eager")
        torch.testing.assert_close(_logits(loaded), _logits(case.model), atol=1e-6, rtol=1e-6)
        mixtures = find_experts(loaded, find_stack(loaded))
        assert [one.num_experts for one in mixtures] == numbers
        for one, number in zip(mixtures, numbers, strict=True):
            modules = [loaded.get_submodule(path) for path in (one.owner, one.router, one.experts)]
            remembered = [getattr(module, "num_experts", getattr(module, "n_routed_experts", number)) for module in modules]
            assert remembered == [number] * 3
        again = loaded(input_ids=ids()[:1, :4], use_cache=True)
        assert torch.isfinite(loaded(input_ids=ids()[:1, 4:5], past_key_values=again.past_key_values).logits).all()
    with pytest.raises((RuntimeError, ValueError)):
        type(case.model).from_pretrained(tmp_path / "free")


def test_budgets_know_what_a_token_needs() -> None:
    """A share that leaves fewer experts than are chosen is refused; one budget for all takes the rest from other modules."""
    case = Case(_model(), experts=True)
    with pytest.raises(ConfigError, match="'\\*experts\\*'"):
        Budget.of(case.modules, 0.9, "kinds")
    counts = Budget.of(case.modules, 0.68, "parameters").centre()
    assert [counts[number] for number in _mixtures(case)] == [4, 4]
    with pytest.raises(ConfigError, match="At most 0.7 can"):
        Budget.of(case.modules, 0.95, "parameters")


def test_what_cannot_lose_experts_says_why() -> None:
    """Skipped ones, kept ones, those shared by two blocks, those not understood; what stands beside them is named."""
    model = _model("qwen2_moe")
    stack = find_stack(model)
    units = find_units(model, stack, experts=True)
    assert [part.kind for part in units.parts] == ["attention", "ffn", "attention", "experts", "attention", "experts"]
    assert "shared_expert.up_proj" in units.left["model.layers.1.mlp"]
    assert not find_units(model, stack).mixtures
    skipped = select_units(units, ["*layers.1.*experts*"])
    assert [one.block for one in skipped.mixtures] == [2] and "skipped" in skipped.left["model.layers.1.mlp.experts"]
    assert keep_experts(units, "so").left["model.layers.2.mlp.experts"] == "so"
    model.model.layers[2].mlp.experts = model.model.layers[1].mlp.experts
    assert "is shared" in find_units(model, stack, experts=True).left["model.layers.1"]
    dbrx = tiny.make_model("dbrx")
    left = find_units(dbrx, find_stack(dbrx), experts=True).left
    assert "cannot lose experts" in left["transformer.blocks.0"]


def test_a_router_that_goes_its_own_way_is_refused_at_once() -> None:
    """One that makes its logits without a linear map is not muted, and chooses what it should not."""
    case = Case(_model(), experts=True)
    router = case.model.get_submodule("model.layers.0.mlp.gate")

    def forward(hidden: Tensor) -> Any:
        logits = hidden.reshape(-1, 64) @ router.weight.T
        gate, index = logits.softmax(-1).topk(2)
        return logits, gate / gate.sum(-1, keepdim=True), index

    router.forward = forward
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.gate chooses experts"):
        _filled(case)
    assert case.unchanged()
