"""The walk against independent loops written with plain hooks, and what it must never do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import tiny_model
from llmprune.anatomy.blocks import eager_experts, find_stack, probe, record
from llmprune.engines import layerwise
from llmprune.engines.layerwise import Walk
from llmprune.errors import NonFiniteError
from llmprune.events import BlockFinished, BlockStarted, SitePruned, Warned
from llmprune.methods import METHODS
from llmprune.spec import Need, PruneConfig
from llmprune.stats import LinearStats

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def _ids(num_sequences: int = 6, seq_len: int = 32) -> Tensor:
    return torch.randint(3, 100, (num_sequences, seq_len), generator=torch.Generator().manual_seed(0))


def _walk(
    model: PreTrainedModel, ids_NS: Tensor, batch_size: int | None = None, *, pausing: bool = True, **fields: Any
) -> list[Any]:
    stack = probe(model, find_stack(model), ids_NS[:1])
    recording = record(model, stack, list(ids_NS.split(batch_size or len(ids_NS))))
    with eager_experts(model):
        return list(Walk(stack, recording, PruneConfig(**fields), torch.device("cpu"), pausing=pausing).run())


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.dim() > 1}


def _num_differing_zeros(first: PreTrainedModel, second: PreTrainedModel) -> int:
    ours, theirs = _weights(first), _weights(second)
    assert any((weight == 0).any() for weight in ours.values())
    return sum(int(((ours[name] == 0) != (theirs[name] == 0)).sum()) for name in ours)


@torch.no_grad()
def _reference(model: PreTrainedModel, ids_NS: Tensor, prune: Callable[[Tensor, Tensor], Tensor], *, by_group: bool) -> None:
    """The papers' loop, written as they do: hooks on Linears, the whole model run again for each group of each block."""
    for block in model.model.layers:
        linears = {name.rsplit(".", 1)[-1]: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        for group in GROUPS if by_group else [sum(GROUPS, ())]:
            inputs: dict[str, Tensor] = {}
            handles = [
                linears[leaf].register_forward_hook(
                    lambda _module, args, _output, leaf=leaf: inputs.update({leaf: args[0].reshape(-1, args[0].shape[-1])})
                )
                for leaf in group
            ]
            model(input_ids=ids_NS, use_cache=False)
            for handle in handles:
                handle.remove()
            for leaf in group:
                linears[leaf].weight.copy_(prune(linears[leaf].weight, inputs[leaf]))


def _wanda(weight_OI: Tensor, x_TI: Tensor) -> Tensor:
    score_OI = weight_OI.abs() * x_TI.norm(dim=0)
    order_OI = torch.sort(score_OI, dim=1, stable=True).indices[:, : weight_OI.shape[1] // 2]
    return weight_OI.scatter(1, order_OI, 0.0)


def _sparsegpt(weight_OI: Tensor, x_TI: Tensor) -> Tensor:
    stats = LinearStats(x_TI.shape[1], Need.GRAM, "cpu")
    stats.update(x_TI)
    target = PruneConfig(method="sparsegpt").target("block")
    return METHODS["sparsegpt"].prune(weight_OI, stats, target, damping=0.01, generator=torch.Generator())


@pytest.mark.parametrize("by_group", [True, False], ids=["group", "block"])
@pytest.mark.parametrize(("method", "prune"), [("wanda", _wanda), ("sparsegpt", _sparsegpt)])
def test_walk_equals_the_papers_loop(method: str, prune: Any, by_group: bool) -> None:
    """Supports and weights are those of a loop that runs the whole model again before each group (or block)."""
    ours, reference = tiny_model("llama"), tiny_model("llama")
    _walk(ours, _ids(), method=method, sequential="group" if by_group else "block")
    _reference(reference, _ids(), prune, by_group=by_group)
    assert _num_differing_zeros(ours, reference) == 0
    for name, weight in _weights(ours).items():
        torch.testing.assert_close(weight, _weights(reference)[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize(("method", "prune"), [("wanda", _wanda), ("sparsegpt", _sparsegpt)])
@torch.no_grad()
def test_dense_walk_prunes_on_the_dense_model(method: str, prune: Any, batch_size: int | None) -> None:
    """Every site as one forward of the whole dense model feeds it, none of which is pruned yet."""
    ours, reference = tiny_model("llama"), tiny_model("llama")
    _walk(ours, _ids(), batch_size, method=method, sequential="none")
    inputs: dict[nn.Module, Tensor] = {}
    linears = [module for module in reference.model.layers.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        linear.register_forward_hook(lambda module, args, _: inputs.update({module: args[0].reshape(-1, args[0].shape[-1])}))
    reference(input_ids=_ids(), use_cache=False)
    assert len(linears) == 7 * len(reference.model.layers)
    for linear in linears:
        linear.weight.copy_(prune(linear.weight, inputs[linear]))
    assert _num_differing_zeros(ours, reference) == 0
    for name, weight in _weights(ours).items():
        torch.testing.assert_close(weight, _weights(reference)[name], rtol=1e-3, atol=1e-5)


def test_group_and_block_differ() -> None:
    """The two modes see different inputs from the second group on: error propagation is on."""
    one, other = tiny_model("llama"), tiny_model("llama")
    _walk(one, _ids(), sequential="group")
    _walk(other, _ids(), sequential="block")
    first = one.model.layers[0]
    assert torch.equal(first.self_attn.q_proj.weight, other.model.layers[0].self_attn.q_proj.weight)
    assert not torch.equal(first.mlp.down_proj.weight, other.model.layers[0].mlp.down_proj.weight)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("sequential", ["group", "block"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral", "gpt_oss"])
def test_batches_do_not_change_the_support(family: str, sequential: str, method: str) -> None:
    """One batch and batches of two (that wait for one another, or go on once more for every group) prune the same weights.

    SparseGPT's scores follow from sums over tokens, whose rounding depends on the batches: near-ties may fall either way.
    """
    one, other = tiny_model(family), tiny_model(family)
    _walk(one, _ids(), None, method=method, sequential=sequential)
    _walk(other, _ids(), 2, method=method, sequential=sequential)
    num_weights = sum(weight.numel() for weight in _weights(one).values())
    assert _num_differing_zeros(one, other) <= (2e-3 * num_weights if method == "sparsegpt" else 0)
    if sequential == "group":
        staged = tiny_model(family)
        _walk(staged, _ids(), 2, method=method, sequential=sequential, pausing=False)
        assert all(torch.equal(weight, _weights(staged)[name]) for name, weight in _weights(other).items())


def test_sites_of_one_input_share_one_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven Linears of a Llama block make four Gram matrices and four factorisations."""
    updates, factors = [], []
    update, factor = LinearStats.update, layerwise.LinearStats.inverse_factor
    monkeypatch.setattr(LinearStats, "update", lambda self, x: (updates.append(id(self)), update(self, x))[1])
    monkeypatch.setattr("llmprune.stats.inverse_factor", _counting(factors))
    assert factor is LinearStats.inverse_factor
    model = tiny_model("llama")
    _walk(model, _ids(), method="sparsegpt")
    num_blocks = len(model.model.layers)
    assert len(updates) == 4 * num_blocks
    assert len(factors) == 4 * num_blocks


def _counting(calls: list[Tensor]) -> Callable[[Tensor, float], tuple[Tensor, float]]:
    from llmprune.linalg import inverse_factor

    def count(gram_II: Tensor, damping: float) -> tuple[Tensor, float]:
        calls.append(gram_II)
        return inverse_factor(gram_II, damping)

    return count


def test_one_pass_runs_each_block_once() -> None:
    """The walk in one pass calls every block once, as does the dense one; two-pass twice, the first time not to its end, but
    for the last one, whose outputs nobody reads.
    """
    for sequential, batch_size, first, last in (("group", 6, 1, 1), ("group", 2, 3, 3), ("block", 6, 2, 1), ("none", 6, 1, 1)):
        model = tiny_model("llama")
        ids_NS = _ids()
        stack = probe(model, find_stack(model), ids_NS[:1])
        recording = record(model, stack, list(ids_NS.split(batch_size)))
        calls: list[int] = []
        for index, block in enumerate(stack.blocks):
            block.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
        for _ in Walk(stack, recording, PruneConfig(sequential=sequential), torch.device("cpu")).run():
            pass
        final = len(stack.blocks) - 1
        assert Counter(calls) == {index: last if index == final else first for index in range(final + 1)}


def test_first_of_two_passes_ends_at_its_last_input() -> None:
    """What the last site makes of its input is needed once the site is pruned, and not before: its product is computed once."""
    model, ids_NS = tiny_model("llama"), _ids(4)
    calls: Counter[str] = Counter()
    for leaf in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        module = model.model.layers[0].get_submodule(leaf)
        module.register_forward_hook(lambda _module, _args, _output, leaf=leaf: calls.update([leaf]))
    stack = probe(model, find_stack(model), ids_NS[:1])
    recording = record(model, stack, list(ids_NS.split(2)))
    calls.clear()
    with eager_experts(model):
        list(Walk(stack, recording, PruneConfig(method="wanda"), torch.device("cpu")).run())
    assert calls == {"self_attn.q_proj": 4, "mlp.up_proj": 4, "mlp.down_proj": 2}


def test_starved_expert_falls_back_and_is_named() -> None:
    """An expert that too few tokens reach is pruned by magnitude, with a warning and its token count in the report."""
    model = tiny_model("mixtral")
    events = _walk(model, _ids(1, 8), method="wanda")  # 8 tokens to 2 of 4 experts each
    sites = {event.site.name: event.site for event in events if isinstance(event, SitePruned)}
    warned = " ".join(event.message for event in events if isinstance(event, Warned))
    starved = [site for name, site in sites.items() if "layers.0" in name and "experts" in name and site.fallback]
    assert len(starved) == 2 * model.config.num_local_experts
    for site in starved:
        assert site.num_tokens < layerwise.MIN_EXPERT_TOKENS
        assert site.num_zeros == site.numel // 2
        assert site.name in warned


def test_expert_statistics_are_those_of_its_own_tokens() -> None:
    """Token counts of the experts of a block add up to tokens times experts per token."""
    model = tiny_model("mixtral")
    events = _walk(model, _ids(), method="wanda")
    counts = [
        event.site.num_tokens for event in events
        if isinstance(event, SitePruned) and "layers.0.mlp.experts.down_proj" in event.site.name
    ]  # fmt: skip
    assert len(counts) == model.config.num_local_experts
    assert sum(counts) == _ids().numel() * model.config.num_experts_per_tok


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "dbrx"])
def test_transposed_storage_is_pruned_along_its_inputs(family: str) -> None:
    """n:m groups lie along the inputs, whichever way round the parameter is stored."""
    model = tiny_model(family)
    stack = probe(model, find_stack(model), _ids()[:1])
    transposed = [site for sites in stack.sites for site in sites if site.transposed]
    assert transposed
    _walk(model, _ids(), method="wanda", pattern="2:4")
    for site in transposed:
        zeros_OG = (site.weight_OI == 0).reshape(site.shape[0], -1, 4).sum(-1)
        assert bool((zeros_OG == 2).all()), site.name


def test_nan_names_the_block() -> None:
    """NaN in a block's weights stops the walk with that block's name."""
    model = tiny_model("llama")
    ids_NS = _ids()
    stack = probe(model, find_stack(model), ids_NS[:1])
    recording = record(model, stack, [ids_NS])
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1"):
        list(Walk(stack, recording, PruneConfig(method="magnitude"), torch.device("cpu")).run())


def test_events_come_in_order_and_the_generator_can_be_closed() -> None:
    """Blocks start, prune their sites and finish in turn; a closed walk leaves later blocks dense."""
    model = tiny_model("llama")
    ids_NS = _ids()
    stack = probe(model, find_stack(model), ids_NS[:1])
    walk = Walk(stack, record(model, stack, [ids_NS]), PruneConfig(method="wanda"), torch.device("cpu"))
    events = walk.run()
    kinds = []
    for event in events:
        kinds.append(type(event))
        if isinstance(event, BlockFinished):
            break
    events.close()  # type: ignore[attr-defined]
    assert kinds == [BlockStarted, *[SitePruned] * 7, BlockFinished]
    assert (model.model.layers[0].mlp.up_proj.weight == 0).any()
    assert not (model.model.layers[1].mlp.up_proj.weight == 0).any()


def test_random_pruning_depends_on_seed_and_site_alone() -> None:
    """The same seed gives the same support; another seed another; two sites of one shape differ."""
    first, again, other = (tiny_model("llama") for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        _walk(model, _ids(), method="random", seed=seed)
    assert _num_differing_zeros(first, again) == 0
    assert _num_differing_zeros(first, other) > 0
    keys = [layer.self_attn.k_proj.weight == 0 for layer in first.model.layers]
    assert not torch.equal(keys[0], keys[1])
