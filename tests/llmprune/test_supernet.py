"""The supernet on tiny models: levels are those of the path, errors accumulate by their mean, and the model comes back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny
from families import tiny_model
from llmprune.anatomy.blocks import Recording, Stack, find_stack, probe, record
from llmprune.anatomy.sites import Site
from llmprune.engines import supernet
from llmprune.engines.layerwise import Walk
from llmprune.engines.supernet import (
    Supernet,
    level_bytes,
    module_levels,
    racks_of,
)
from llmprune.errors import FactorizationError, NonFiniteError, UnsupportedModel
from llmprune.spec import Need, PruneConfig
from llmprune.stats import LinearStats
from llmprune.structured.levels import centres, grid
from llmprune.structured.path import expectation
from llmprune.structured.units import Module, find_units
from llmprune.structuring.groups import settings_of
from supernet_case import CPU, ids, make_case


def _by_names(model: PreTrainedModel, stack: Stack, ends: tuple[str, str]) -> list[Module]:
    """Output projections by kv groups and down projections by channels, in families whose units cannot be sliced."""
    kv_groups = model.config.num_key_value_heads

    def module(index: int, site: Site) -> Module:
        if site.name.endswith(ends[0]):
            return Module(site.name, "attention", index, site, site.shape[1] // kv_groups, kv_groups, ())
        return Module(site.name, "ffn", index, site, 1, site.shape[1], ())

    return [module(index, site) for index, sites in enumerate(stack.sites) for site in sites if site.name.endswith(ends)]


def _gram(stack: Stack, hidden: Sequence[Tensor], calls: Recording, index: int, site: Site) -> LinearStats:
    """Of a site's inputs on these hidden states, by a hook."""
    stats = LinearStats(site.shape[1], Need.GRAM, CPU)
    handle = site.module.register_forward_pre_hook(lambda _module, args: stats.update(args[0]))
    for batch, hidden_NSH in enumerate(hidden):
        calls.calls[batch][index].run(stack.blocks[index], hidden_NSH)
    handle.remove()
    return stats


def test_levels_are_nested_and_their_columns_alone_are_stored() -> None:
    """Every level has as many groups as asked, among those of the one below; level 0 is the weight, bit for bit."""
    case = make_case()
    net = case.supernet()
    assert case.unchanged() and len(net.groups) == 4
    for number, rack in enumerate(net.groups):
        module, kept = rack.module, set(range(rack.module.num_groups))
        assert len(rack.counts) == (5 if module.kind == "attention" else 9) and rack.counts[0] == 0
        for rung, count in enumerate(rack.counts):
            kept_G, weight_OK = net.level(number, rung)
            assert len(kept_G) == module.num_groups - count and set(kept_G.tolist()) <= kept
            assert weight_OK.shape == (module.consumer.shape[0], len(kept_G) * module.group_size)
            kept = set(kept_G.tolist())
        assert torch.equal(net.level(number, 0)[1], module.consumer.weight_OI)
        losses = net.losses[number]
        assert losses[0] == 0 and losses[-1] == pytest.approx(1) and list(losses) == sorted(losses)
    stored = sum(len(shelf.whole) for shelf in net.shelves.values())
    assert 0 <= stored - level_bytes(net.groups) <= 16 * 2 * 36


def test_candidates_are_put_in_place_and_taken_back() -> None:
    """The columns of the groups that go are zero, the others the level's; what is not asked for stays dense."""
    case = make_case()
    net = case.supernet()
    for number, rack in enumerate(net.groups):
        site, size = rack.module.consumer, rack.module.group_size
        for rung in (len(rack.counts) - 1, 2, 0):
            net.hold_(number, rung)
            kept_G, weight_OK = net.level(number, rung)
            weight_OGC = site.weight_OI.unflatten(1, (-1, size))
            assert int((weight_OGC != 0).any(2).any(0).sum()) == len(kept_G) == rack.module.num_groups - rack.counts[rung]
            assert torch.equal(weight_OGC[:, kept_G].flatten(1), weight_OK)
        assert case.unchanged()
    for number in range(4):
        net.hold_(number, 1)
        assert not case.unchanged()
    net.restore_()
    assert case.unchanged()


@pytest.mark.parametrize("sequential", [False, True])
def test_errors_accumulate_by_the_mean_of_the_levels(sequential: bool) -> None:
    """Block 1 is pruned on what block 0 puts out with the mean weights, not on the dense model's: its levels are those of the
    path on the Gram matrix of such a forward, taken here by hand.
    """
    case = make_case()
    net = case.supernet(sequential=sequential)
    inputs = [hidden.detach() for hidden in case.calibration.hidden]
    with torch.no_grad():
        block = case.stack.blocks[0]
        dense = [case.calibration.calls[batch][0].run(block, hidden) for batch, hidden in enumerate(inputs)]
        without = {
            number: module_levels(
                rack.module.consumer.weight_OI, _gram(case.stack, dense, case.calibration, 1, rack.module.consumer),
                rack.module, rack.counts,
            )[0]
            for number, rack in enumerate(case.racks)
            if rack.block == 1
        }  # fmt: skip
        for index in range(2):
            gram = {
                rack.module.consumer.name: _gram(case.stack, inputs, case.calibration, index, rack.module.consumer)
                for rack in case.racks
                if rack.block == index
            }
            for number, rack in enumerate(case.racks):
                if rack.block != index:
                    continue
                module = rack.module
                if sequential and module.kind == "ffn":  # after the attention of its block has its mean weight
                    gram[module.consumer.name] = _gram(case.stack, inputs, case.calibration, index, module.consumer)
                levels, _ = module_levels(module.consumer.weight_OI, gram[module.consumer.name], module, rack.counts)
                for rung, level in enumerate(levels):
                    kept_G, weight_OK = net.level(number, rung)
                    assert torch.equal(kept_G, level.kept_G)
                    torch.testing.assert_close(weight_OK, level.weight_OK, rtol=1e-3, atol=1e-5)
                module.consumer.weight_OI.copy_(expectation(levels, module.num_groups, module.group_size))
            block = case.stack.blocks[index]
            inputs = [case.calibration.calls[batch][index].run(block, hidden) for batch, hidden in enumerate(inputs)]
            if not index:
                assert all(float((ours - theirs).abs().max()) > 1e-2 for ours, theirs in zip(inputs, dense, strict=True))
    assert len(without) == 2
    for number, levels in without.items():
        kept_G, weight_OK = net.level(number, 2)
        assert not torch.equal(kept_G, levels[2].kept_G) or not torch.allclose(weight_OK, levels[2].weight_OK, rtol=1e-2)


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_the_mean_weight_puts_out_the_mean_of_the_levels(kind: str) -> None:
    """In the live block: with one module's mean weight it puts out the average of what it does with each of its levels, by
    their shares of kept groups; an attention's through the residual alone.
    """
    case = make_case()
    net = case.supernet()
    number = next(number for number, rack in enumerate(net.groups) if rack.module.kind == kind)
    rack = net.groups[number]
    site, width = rack.module.consumer, rack.module.num_groups
    outputs: list[Tensor] = []
    handle = site.module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    call, hidden = case.calibration.calls[0][0], case.calibration.hidden[0]
    with torch.no_grad():
        mean_OI = torch.zeros(site.shape)
        shares = torch.tensor([width - count for count in rack.counts], dtype=torch.float32)
        shares /= shares.sum()
        for rung, share in enumerate(shares.tolist()):
            net.hold_(number, rung)
            mean_OI += share * site.weight_OI
            call.run(case.stack.blocks[0], hidden)
        site.weight_OI.copy_(mean_OI)
        call.run(case.stack.blocks[0], hidden)
        site.weight_OI.copy_(case.before[f"{site.name}.weight"])
    handle.remove()
    *of_levels, of_mean = outputs
    assert len(of_levels) == len(rack.counts)
    torch.testing.assert_close(of_mean, torch.einsum("e,ensh->nsh", shares, torch.stack(of_levels)), rtol=1e-4, atol=1e-5)


def test_in_memory_and_on_disk_are_the_same(tmp_path: Path) -> None:
    """Files, mapped; bit-equal levels, and nothing left of the shelves in memory."""
    case = make_case()
    memory, disk = case.supernet(), case.supernet(directory=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block0", "block1"]
    assert memory.losses == disk.losses
    for number, rack in enumerate(case.racks):
        for rung in range(len(rack.counts)):
            for ours, theirs in zip(memory.level(number, rung), disk.level(number, rung), strict=True):
                assert torch.equal(ours, theirs)


def test_the_model_is_dense_after_an_error_and_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised while block 1 runs with its mean weights; and whenever the generator hands over."""
    case = make_case()
    net = Supernet(case.stack, case.racks)
    advance, held = Walk.advance, []

    def fail(self: Walk, index: int, block: nn.Module) -> None:
        held.append(not case.unchanged())
        if index == 1:
            raise RuntimeError("broken")
        advance(self, index, block)

    monkeypatch.setattr(Walk, "advance", fail)
    with pytest.raises(RuntimeError, match="broken"):
        for _ in net.fill(case.calibration, CPU):
            assert case.unchanged()
    assert held == [True, True] and case.unchanged()


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_other_families(family: str) -> None:
    """A transposed Conv1D, and blocks whose arguments differ; the dense weights come back."""
    model = tiny_model(family)
    stack = probe(model, find_stack(model), ids()[:1])
    ends = ("attn.c_proj", "mlp.c_proj") if family == "gpt2" else ("o_proj", "down_proj")
    if family == "gpt2":
        model.config.num_key_value_heads = model.config.n_head
    modules = _by_names(model, stack, ends)
    assert len(modules) == 2 * len(stack.blocks)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    net = Supernet(stack, racks_of(modules, grid(modules, centres(modules, 0.5), 1)))
    assert len(list(net.fill(record(model, stack, [ids()]), CPU))) == len(stack.blocks)
    for number, rack in enumerate(net.groups):
        net.hold_(number, len(rack.counts) - 1)
        removed = rack.counts[-1] * rack.module.group_size
        assert int((rack.module.consumer.weight_OI == 0).all(0).sum()) == removed > 0
    net.restore_()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_dead_inputs_go_first_and_keep_their_weights() -> None:
    """Two channels that were never active: first to go; where one stays, it is as it was. Fewer tokens than inputs."""
    model = tiny.make_model(intermediate_size=64)
    stack = probe(model, find_stack(model), ids()[:1])
    module = find_units(model, stack).modules[1]
    x_TI = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    x_TI[:, [3, 40]] = 0
    stats = LinearStats(64, Need.GRAM, CPU)
    stats.update(x_TI)
    levels, whole = module_levels(module.consumer.weight_OI, stats, module, [0, 1, 2, 8])
    assert torch.equal(levels[0].weight_OK, module.consumer.weight_OI)
    gone = set(range(64)) - set(levels[1].kept_G.tolist())
    assert gone < {3, 40} and set(range(64)) - set(levels[2].kept_G.tolist()) == {3, 40}
    (stays,) = {3, 40} - gone
    column = levels[1].kept_G.tolist().index(stays)
    assert torch.equal(levels[1].weight_OK[:, column], module.consumer.weight_OI[:, stays])
    assert levels[2].loss == pytest.approx(0, abs=1e-9 * whole) and 0 < levels[3].loss < whole
    assert all(bool(torch.isfinite(level.weight_OK).all()) for level in levels)


def test_damping_is_as_asked() -> None:
    """The levels of a supernet are those of its damping, which is a hundredth by default."""
    weights = [make_case().supernet(**fields).level(1, 2)[1].clone() for fields in ({}, {"damping": 0.01}, {"damping": 0.5})]
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2])
    assert settings_of(PruneConfig.build(method="tyr", damping=0.5)).damping == 0.5


def test_what_cannot_be_solved_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations beyond fp32, a matrix that is not positive definite, and a module that no token reached."""
    case = make_case()
    stats = LinearStats(128, Need.GRAM, CPU)
    stats.sq_I[3] = float("inf")
    with pytest.raises(NonFiniteError, match="overflow"):
        module_levels(case.modules[1].consumer.weight_OI, stats, case.modules[1], [0])

    def indefinite(gram_II: Tensor, damping: float) -> tuple[Tensor, float]:
        return -torch.eye(len(gram_II), dtype=torch.float64), damping

    with monkeypatch.context() as patch:
        patch.setattr(supernet, "damped", indefinite)
        with pytest.raises(FactorizationError, match=r"layers\.0\.self_attn\.o_proj: the damped .* Raise --damping"):
            case.supernet()
    monkeypatch.setattr(Walk, "collect", lambda *_args, **_fields: {})
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.self_attn\.o_proj is reached by no"):
        case.supernet()
    assert case.unchanged()


def test_a_candidate_is_what_a_whole_forward_says() -> None:
    """Its divergence on the model is that of a masked copy; the dense model's is 0."""
    case = make_case()
    net = case.supernet()
    measure = case.fitness(net)
    candidates = [(2, 3, 1, 4), (2, 3, 3, 2), (0, 0, 0, 0)]
    found = measure(candidates, None)
    net.restore_()
    for candidate, divergence in zip(candidates, found, strict=True):
        for number, rung in enumerate(candidate):
            net.hold_(number, rung)
        assert divergence == pytest.approx(case.kl(), rel=1e-4, abs=1e-7)
    assert found[0] != found[1] and found[0] > found[2] == pytest.approx(0, abs=1e-9)
