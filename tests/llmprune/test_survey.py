"""The survey of the dense model: it changes nothing, and its numbers are those of direct loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from families import tiny_model
from llmprune.anatomy.blocks import eager_experts, find_stack, probe, record
from llmprune.engines.layerwise import Walk
from llmprune.engines.survey import Survey, group_of
from llmprune.measure.quality import replay_tail
from llmprune.methods import METHODS
from llmprune.spec import Need, Pattern, PruneConfig, Target
from llmprune.stats import LinearStats


def _ids() -> Tensor:
    return torch.randint(3, 100, (6, 32), generator=torch.Generator().manual_seed(0))


def _survey(model: PreTrainedModel, needs: Any, num_probes: int = 0, **fields: Any) -> Survey:
    ids_NS = _ids()
    stack = probe(model, find_stack(model), ids_NS[:1])
    streams = record(model, stack, [ids_NS[:num_probes]]) if num_probes else None
    recording = record(model, stack, list(ids_NS.split(4)))
    survey = Survey(stack, recording, PruneConfig(**fields), torch.device("cpu"), needs, streams)
    with eager_experts(model), torch.no_grad():
        steps = list(survey.run())
        if num_probes:
            steps += survey.measure(
                lambda number, hidden_NSH: replay_tail(model, stack, ids_NS[number : number + 1], hidden_NSH)
            )
    assert [step.done for step in steps] == list(range(1, len(stack.blocks) + num_probes + 1))
    assert {step.total for step in steps} == {len(steps)}
    return survey


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss", "gemma3_text"])
@pytest.mark.parametrize("needs", ["scores", "curves"])
def test_a_survey_changes_nothing(family: str, needs: str) -> None:
    """Every weight is bit-equal afterwards, and every site has its facts."""
    model = tiny_model(family)
    before = _state(model)
    survey = _survey(model, needs, num_probes=2 if needs == "curves" else 0)
    assert [fact.name for fact in survey.facts] == [site.name for sites in survey.stack.sites for site in sites]
    assert len(survey.facts) > 3
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for fact in survey.facts:
        if needs == "curves":
            assert len(fact.curve) == 9 and all(cost >= 0 for _, cost in fact.curve)
        else:
            assert 0 <= fact.pq_index < 1 and 0 <= fact.num_outliers < fact.numel


@torch.no_grad()
def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """The dense input of every Linear of the blocks."""
    inputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda _module, args, _out, name=name: inputs.update({name: args[0].reshape(-1, args[0].shape[-1])})
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    ]
    model(input_ids=_ids(), use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs


def test_outliers_are_those_of_the_dense_blocks() -> None:
    """Wanda scores from plain hooks on the dense model, counted against five times the block's mean."""
    model = tiny_model("llama")
    survey = _survey(model, "scores")
    inputs = _inputs(model)
    found = 0
    for index, sites in enumerate(survey.stack.sites):
        scores = {site.name: site.weight_OI.abs() * (inputs[site.name].norm(dim=0) / 192**0.5) for site in sites}
        mean = torch.cat([score.flatten() for score in scores.values()]).mean()
        for fact in survey.facts:
            if fact.block == index:
                assert abs(fact.num_outliers - int((scores[fact.name] > 5 * mean).sum())) <= 1
                found += fact.num_outliers
    assert found > 0


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@torch.no_grad()
def test_curves_meet_the_divergence_of_one_pruned_site(method: str) -> None:
    """At the target a curve is KL(dense || model with that site alone pruned) on the probes, measured here by a whole
    forward; elsewhere it follows the error of the site's output.
    """
    model = tiny_model("llama")
    ids_NS, config = _ids(), PruneConfig(method=method)
    facts = {fact.name: fact for fact in _survey(model, "curves", num_probes=3, method=method).facts}
    inputs = _inputs(model)
    dense_NSV = F.log_softmax(model(input_ids=ids_NS[:3], use_cache=False).logits.float(), dim=-1)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"):
        weight_OI = model.get_submodule(name).weight
        before_OI = weight_OI.clone()
        stats = LinearStats(weight_OI.shape[1], Need.GRAM, "cpu")
        stats.update(inputs[name])
        target = config.target(METHODS[method].scope)
        weight_OI.copy_(METHODS[method].prune(weight_OI, stats, target, damping=0.01, generator=torch.Generator()))
        pruned_NSV = F.log_softmax(model(input_ids=ids_NS[:3], use_cache=False).logits.float(), dim=-1)
        weight_OI.copy_(before_OI)
        kl = F.kl_div(pruned_NSV, dense_NSV, log_target=True, reduction="none").sum(-1).mean()
        costs = dict(facts[name].curve)
        torch.testing.assert_close(costs[0.5], float(kl), rtol=2e-2, atol=1e-7)
        assert list(costs.values()) == sorted(costs.values()) and costs[max(costs)] > costs[0.5] > costs[min(costs)]


def test_the_walk_prunes_to_the_sparsities_it_is_given() -> None:
    """A target per site, the config's for the others; the report holds both."""
    model = tiny_model("llama")
    stack = probe(model, find_stack(model), _ids()[:1])
    name = "model.layers.1.mlp.down_proj"
    target = Target(Pattern(), 0.25, "row")
    walk = Walk(stack, record(model, stack, [_ids()]), PruneConfig(), torch.device("cpu"), {name: target})
    sites = {event.site.name: event.site for event in walk.run() if event.event == "site_pruned"}
    assert len(sites) == 14
    assert (sites[name].target, sites[name].sparsity) == (0.25, 0.25)
    assert {(site.target, site.sparsity) for other, site in sites.items() if other != name} == {(0.5, 0.5)}


def test_experts_of_a_parameter_are_one_group() -> None:
    """Groups of a fused mixture are its parameters; of a Llama every site is its own."""
    for family, per_block in (("mixtral", 6), ("llama", 7)):
        model = tiny_model(family)
        stack = probe(model, find_stack(model), _ids()[:1])
        assert len({group_of(site) for site in stack.sites[0]}) == per_block
