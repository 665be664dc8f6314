"""Channel permutation of whole models: the dense function stays, the pattern keeps more, and nothing is trusted unseen.

T tokens, I input channels, N sequences, S sequence.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import tiny_model
from llmprune.anatomy.blocks import eager_experts, find_stack, probe, record
from llmprune.anatomy.sites import find_sites
from llmprune.engines.layerwise import Walk
from llmprune.engines.permute import permutation_messages, permute_
from llmprune.errors import ConfigError
from llmprune.events import BlockFinished
from llmprune.report import BlockReport, Permutation
from llmprune.spec import Need, Pattern, PruneConfig
from llmprune.stats import LinearStats

# What each is there for: grouped heads; biases of queries, keys and values; transposed fused weights; biases and no gate; fused
# heads in turn; one key-value head of all queries; fused with groups; gate and up as one; norms on both sides; shared experts.
FAMILIES = {
    "llama": {"o_proj", "down_proj"}, "qwen2": {"o_proj", "down_proj"}, "gpt2": {"c_proj"}, "opt": {"out_proj", "fc2"},
    "gpt_neox": {"dense", "dense_4h_to_h"}, "gpt_bigcode": {"c_proj"}, "falcon": {"dense", "dense_4h_to_h"},
    "phi3": {"o_proj", "down_proj"}, "gemma2": {"o_proj", "down_proj"}, "qwen2_moe": {"o_proj", "down_proj"},
}  # fmt: skip


def _ids(num_sequences: int = 4, seq_len: int = 16) -> Tensor:
    return torch.randint(3, 100, (num_sequences, seq_len), generator=torch.Generator().manual_seed(0))


def _walk(model: PreTrainedModel, batch_size: int = 4, **fields: Any) -> Walk:
    stack = probe(model, find_stack(model), _ids(1))
    recording = record(model, stack, list(_ids().split(batch_size)))
    config = PruneConfig(**{"method": "wanda", "pattern": "2:4", "permute": True, **fields})
    return Walk(stack, recording, config, torch.device("cpu"))


@torch.no_grad()
def _permute(model: PreTrainedModel) -> list[Permutation]:
    """Permute every block and prune none."""
    walk, reports = _walk(model), []
    with eager_experts(model):
        for index, block in enumerate(walk.stack.blocks):
            reports += walk._permute(index, block, walk.stack.sites[index])
            walk.advance(index, block)
    return reports


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    with eager_experts(model):  # the others take no fp64
        logits: Tensor = model(input_ids=_ids(), use_cache=False).logits
    return logits


def _spread_(model: PreTrainedModel) -> PreTrainedModel:
    """Give channels the unequal scales that trained models have, and every vector values of its own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(torch.randn(parameter.shape[0], 1, generator=generator).exp())
            else:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_function_stays(family: str) -> None:
    """In fp64 the logits of the permuted dense model are the original's to 1e-11, and every fold keeps more of the score."""
    model = _spread_(tiny_model(family, dtype=torch.float64))
    before, logits = {name: p.clone() for name, p in model.named_parameters()}, _logits(model)
    reports = _permute(model)
    moved = [report for report in reports if report.reason is None]
    assert {report.site.rpartition(".")[2] for report in moved} == FAMILIES[family]
    for report in moved:
        assert report.kept_before is not None and report.kept_after is not None
        assert 0.5 <= report.kept_before < report.kept_after < 1
    assert (_logits(model) - logits).norm() <= 1e-11 * logits.norm()
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(changed) >= 2 * len(moved)
    for name in changed:
        assert torch.equal(model.get_parameter(name).flatten().sort().values, before[name].flatten().sort().values)


@pytest.mark.parametrize("family", ["mixtral", "gemma3n_text", "bitnet"])
def test_what_does_not_hold_is_left_alone(family: str) -> None:
    """Experts in one parameter, blocks that share keys and values, and projections behind a norm keep every bit, and say so."""
    model = _spread_(tiny_model(family))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    reports = _permute(model)
    kept = [report for report in reports if report.reason]
    assert kept and all(report.kept_after is None for report in kept)
    moved = {report.site for report in reports if not report.reason}
    for name, parameter in model.named_parameters():
        if not moved or any(report.site in name for report in kept) or "norm" in name:
            assert torch.equal(parameter, before[name]), name
    (message,) = permutation_messages([BlockReport(index=0, name="0", seconds=0, sites=(), permutations=tuple(reports))])
    assert all(str(report.reason) in message for report in kept)


class _Leaky(nn.Module):
    """An MLP with the names of a common one, whose inner channels are also used in order."""

    def __init__(self, leak: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)
        self.leak = leak

    def forward(self, x: Tensor) -> Tensor:
        inner = self.fc1(x)
        return x + self.fc2(inner.relu()) + self.leak * inner


@torch.no_grad()
@pytest.mark.parametrize(("leak", "holds"), [(0.0, True), (0.01, False)])
def test_a_use_beside_the_product_is_noticed(leak: float, holds: bool) -> None:
    """A hundredth of the inner channels added to the output is enough to leave them in place."""
    torch.manual_seed(0)
    block, x_TI = _Leaky(leak), torch.randn(50, 16)
    sites = find_sites(block, "b")
    stats = {}
    for site, inputs in zip(sites, (x_TI, block.fc1(x_TI).relu()), strict=True):
        stats[site.name] = LinearStats(16, Need.NORM, "cpu")
        stats[site.name].update(inputs)
    before, weight_OI = block(x_TI), block.fc1.weight.clone()
    patterns = {site.name: Pattern(2, 4) for site in sites}
    (report,) = permute_(
        block, "b", sites, sites, stats, lambda: block(x_TI), patterns, generator=torch.Generator().manual_seed(0)
    )
    assert report.site == "b.fc2" and (report.reason is None) == holds
    assert torch.equal(block.fc1.weight, weight_OI) != holds
    torch.testing.assert_close(block(x_TI), before)


def test_heads_that_m_does_not_divide_stay() -> None:
    """Groups of 32 span two heads of 16: the output projection keeps its order, the MLP does not."""
    model = tiny_model("llama")
    walk = _walk(model, pattern="8:32")
    with torch.no_grad():
        reports = walk._permute(0, walk.stack.blocks[0], walk.stack.sites[0])
    assert [report.reason is None for report in reports] == [False, True]
    assert "8:32 does not divide its heads of 16" in str(reports[0].reason)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize(("sequential", "batch_size"), [("group", 4), ("group", 2), ("block", 2)])
def test_every_walk_permutes_first(method: str, sequential: str, batch_size: int) -> None:
    """One-pass, staged and two-pass: every group keeps two, each block reports its folds, and other weights survive."""
    kept = []
    for permute in (False, True):
        model = _spread_(tiny_model("llama"))
        walk = _walk(model, batch_size, method=method, sequential=sequential, permute=permute)
        blocks = [event.report for event in walk.run() if isinstance(event, BlockFinished)]
        assert [len(block.permutations) for block in blocks] == [2 * permute] * 2
        for block in blocks:
            for site in block.sites:
                assert site.num_zeros == site.numel // 2
        down_OI = model.model.layers[1].mlp.down_proj.weight
        assert ((down_OI.view(len(down_OI), -1, 4) != 0).sum(2) == 2).all()
        kept.append(down_OI.abs().sum(dtype=torch.float64))
    assert kept[0] != kept[1]


def test_skipped_sites_are_not_permuted_for_themselves() -> None:
    """A projection that is not pruned needs no order; the rows that feed another one move all the same."""
    model = _spread_(tiny_model("llama"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    walk = _walk(model, skip=("*.o_proj", "*.up_proj"))
    blocks = [event.report for event in walk.run() if isinstance(event, BlockFinished)]
    assert [item.site.rpartition(".")[2] for block in blocks for item in block.permutations] == ["down_proj"] * 2
    layer = model.model.layers[0]
    assert torch.equal(layer.self_attn.o_proj.weight, before["model.layers.0.self_attn.o_proj.weight"])
    assert not torch.equal(layer.mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])


def test_messages() -> None:
    """Nothing to say where all moved; a remark where nothing was there to move; each reason once, with an example."""

    def block(*permutations: Permutation) -> BlockReport:
        return BlockReport(index=0, name="b", seconds=0, sites=(), permutations=permutations)

    moved = Permutation(site="a", kept_before=0.7, kept_after=0.8)
    assert permutation_messages([block(moved)]) == []
    (message,) = permutation_messages(
        [block(moved, Permutation(site="x.0", reason="one")), block(Permutation(site="x.1", reason="one"))]
    )
    assert "one (x.0)" in message and "x.1" not in message
    (message,) = permutation_messages([block()])
    assert "nothing was reordered" in message


def test_unstructured_is_refused() -> None:
    """There are no groups to fill: the message has both ways out."""
    with pytest.raises(ConfigError, match=r"Drop --permute, or choose a pattern such as --pattern 2:4"):
        PruneConfig.build(permute=True)


def test_folds_that_share_a_producer_are_undone_exactly() -> None:
    """Latent attention suggests several folds of one matrix, none of which holds: every bit is as before."""
    model = _spread_(tiny_model("deepseek_v3"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    moved = {report.site.rpartition(".")[0] for report in _permute(model) if report.reason is None}
    assert moved and not any("self_attn" in parent for parent in moved)
    for name, parameter in model.named_parameters():
        if "self_attn" in name:
            assert torch.equal(parameter, before[name]), name
