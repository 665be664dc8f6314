"""Block reconstruction: against closed-form least squares on the support, and what it must never do."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import tiny_model
from llmprune.anatomy.blocks import eager_experts, find_stack, probe, record
from llmprune.anatomy.sites import Site
from llmprune.engines.layerwise import Walk
from llmprune.engines.reconstruct import PATIENCE, RATE_FALLS, num_held_out, reconstruct_
from llmprune.errors import ConfigError
from llmprune.events import BlockFinished, Progress, SitePruned, Warned
from llmprune.memory import tuning_activation_bytes, tuning_state_bytes
from llmprune.report import BlockReport, Reconstruction
from llmprune.spec import PruneConfig, num_pruned

FAMILIES = ["llama", "gpt2", "mixtral", "gpt_oss", "dbrx", "mamba", "qwen3_next", "gemma3n_text"]


class Linear(nn.Module):
    """A block that is one product: reconstructing it is masked least squares."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI.clone())
        self.bias = nn.Parameter(torch.zeros(len(weight_OI), dtype=weight_OI.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


def _problem(dtype: torch.dtype = torch.float32) -> tuple[Linear, list[Tensor], list[Tensor]]:
    """A linear block pruned to half, inputs of correlated features in eight batches, and the dense outputs."""
    generator = torch.Generator().manual_seed(0)
    dense_OI = torch.randn(6, 16, generator=generator)
    mixing_II = torch.eye(16) + 0.4 * torch.randn(16, 16, generator=generator)
    inputs = [torch.randn(4, 32, 16, generator=generator) @ mixing_II for _ in range(8)]
    keep_OI = dense_OI.abs() > dense_OI.abs().median(1, keepdim=True).values
    block = Linear(torch.where(keep_OI, dense_OI, 0.0).to(dtype))
    return block, [x.to(dtype) for x in inputs], [x @ dense_OI.T for x in inputs]


def _tune(block: Linear, inputs: Sequence[Tensor], targets: Sequence[Tensor], **settings: Any) -> Reconstruction:
    given: dict[str, Any] = {"steps": 600, "lr": 0.1, "generator": torch.Generator().manual_seed(0)} | settings
    tuning = reconstruct_(
        block, [Site("blocks.0", block, "weight")], lambda run, batch: run(inputs[batch]), targets, **given
    )  # fmt: skip
    while True:
        try:
            next(tuning)
        except StopIteration as stop:
            return stop.value


@torch.no_grad()
def test_a_linear_block_becomes_the_least_squares_solution() -> None:
    """Tuned weights are those of the normal equations, row by row on the row's support."""
    block, inputs, targets = _problem()
    keep_OI = block.weight != 0
    x_TI = torch.cat(inputs[: len(inputs) - num_held_out(len(inputs))]).reshape(-1, 16).double()
    y_TO = torch.cat(targets[: len(targets) - num_held_out(len(targets))]).reshape(-1, 6).double()
    report = _tune(block, inputs, targets)
    assert not report.rolled_back
    for row, keep_I in enumerate(keep_OI):
        solution = torch.linalg.lstsq(x_TI[:, keep_I], y_TO[:, row : row + 1]).solution[:, 0]
        start = torch.linalg.vector_norm(solution)
        assert torch.linalg.vector_norm(block.weight[row, keep_I].double() - solution) < 0.05 * start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reported_errors_are_those_of_the_stored_weights(dtype: torch.dtype) -> None:
    """Before and after, on the last batches, with the weights cast as they are stored; zeros are the same zeros, +0.0."""
    block, inputs, targets = _problem(dtype)
    zeros_OI = block.weight == 0
    bias_O = block.bias.detach().clone()

    @torch.no_grad()
    def error() -> float:
        last = slice(len(inputs) - num_held_out(len(inputs)), None)
        output, target = torch.cat([block(x) for x in inputs[last]]).float(), torch.cat(targets[last])
        return float((output - target).square().sum() / target.square().sum())

    before = error()
    report = _tune(block, inputs, targets, steps=100)
    assert report.error_before == pytest.approx(before, rel=1e-5)
    assert report.error_after == pytest.approx(error(), rel=1e-5)
    assert report.error_after < 0.8 * report.error_before
    assert bool((block.weight[zeros_OI] == 0).all()) and zeros_OI.any()
    assert not torch.signbit(block.weight[block.weight == 0]).any()
    assert torch.equal(block.bias, bias_O)
    assert block.weight.grad is None and block.bias.grad is None


@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_a_rate_that_diverges_is_rolled_back(lr: float) -> None:
    """Nothing better was found, or NaN: the weights are the ones that came in, bit for bit, and the report says so."""
    block, inputs, targets = _problem()
    before_OI = block.weight.detach().clone()
    report = _tune(block, inputs, targets, lr=lr, steps=120)
    assert report.rolled_back
    assert report.error_after == report.error_before
    assert report.steps <= 10 * PATIENCE * len(RATE_FALLS)
    assert torch.equal(block.weight, before_OI)


def test_closing_leaves_the_block_as_it_was() -> None:
    """Cancelling midway stores nothing."""
    block, inputs, targets = _problem()
    before_OI = block.weight.detach().clone()
    tuning = reconstruct_(
        block, [Site("blocks.0", block, "weight")], lambda run, batch: run(inputs[batch]), targets, steps=100, lr=0.1,
        generator=torch.Generator(),
    )  # fmt: skip
    assert list(itertools.islice(tuning, 40)) == list(range(1, 41))
    tuning.close()
    assert torch.equal(block.weight, before_OI)


def test_what_is_exact_is_left_alone() -> None:
    """A block without error takes no step."""
    block, inputs, _ = _problem()
    report = _tune(block, inputs, [block(x).detach() for x in inputs])
    assert report.error_before == report.error_after == 0
    assert report.steps == 0 and not report.rolled_back


def _ids(num_sequences: int = 16) -> Tensor:
    return torch.randint(3, 100, (num_sequences, 16), generator=torch.Generator().manual_seed(0))


def _walk(model: PreTrainedModel, **fields: Any) -> list[Any]:
    stack = probe(model, find_stack(model), _ids()[:1])
    recording = record(model, stack, list(_ids().split(2)))
    settings = {"reconstruct": True, "reconstruct_steps": 12} | fields
    with eager_experts(model):
        return list(Walk(stack, recording, PruneConfig(**settings), torch.device("cpu")).run())


def _blocks(events: list[Any]) -> list[BlockReport]:
    return [event.report for event in events if isinstance(event, BlockFinished)]


def _parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    """Every block's held-out error falls, exact counts and everything but the sites' kept weights stay as they were."""
    dense = _parameters(tiny_model(family))
    model = tiny_model(family)
    events = _walk(model, scope="matrix")
    reports = _blocks(events)
    assert len(reports) == len(find_stack(model).blocks) > 1
    for report in reports:
        assert report.reconstruction is not None
        assert report.reconstruction.error_after < report.reconstruction.error_before
        assert not report.reconstruction.rolled_back
    assert not any(isinstance(event, Warned) and "rolled back" in event.message for event in events)
    for event in events:
        if isinstance(event, SitePruned):
            assert event.site.num_zeros == num_pruned(event.site.numel, 0.5), event.site.name
    stack = probe(model, find_stack(model), _ids()[:1])
    sites = {id(getattr(site.module, site.parameter)) for block in stack.sites for site in block}
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name
        if id(parameter) not in sites:
            assert torch.equal(parameter, dense[name]), name


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("fields", [{"pattern": "2:4"}, {"sparsity": 0.6}, {"sparsity": 0.6, "sequential": "group"}], ids=str)
def test_supports_do_not_depend_on_it_in_the_first_block(method: str, fields: dict[str, Any]) -> None:
    """The same zeros as without, whatever the method and pattern, and other kept weights."""
    plain, tuned = tiny_model("llama"), tiny_model("llama")
    _walk(plain, method=method, reconstruct=False, **fields)
    _walk(tuned, method=method, **fields)
    ours, theirs = tuned.model.layers[0].state_dict(), plain.model.layers[0].state_dict()
    moved = 0
    for name, weight in ours.items():
        assert torch.equal(weight == 0, theirs[name] == 0), name
        moved += int((weight != theirs[name]).sum())
    assert moved > 1000


@pytest.mark.parametrize(
    ("pattern", "sparsity", "expected"),
    [
        ("unstructured", 0.8, [0.8 * 19 / 27, 0.8 * 26 / 27, 0.8]),
        ("2:4", 0.5, [0.25, 0.25, 0.5]),
        ("1:4", 0.75, [0.5, 0.5, 0.75]),
        ("3:4", 0.25, [0.0, 0.0, 0.25]),
    ],
)
def test_rounds_rise_to_the_target(pattern: str, sparsity: float, expected: list[float]) -> None:
    """As the cubic, in whole weights for n:m, and the last round is the target to the bit."""
    target = PruneConfig.build(pattern=pattern, sparsity=sparsity).target("row")
    rounds = [target.eased(number / 3) for number in (1, 2, 3)]
    assert [one.sparsity for one in rounds] == pytest.approx(expected)
    assert rounds[-1] == target


@pytest.mark.parametrize(("family", "method"), [("mixtral", "wanda"), ("gpt_oss", "sparsegpt"), ("llama", "alps")])
@pytest.mark.parametrize("fields", [{"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "3:4"}], ids=str)
def test_rounds_end_at_exact_counts(family: str, method: str, fields: dict[str, Any]) -> None:
    """Whatever the method chose in the rounds before, and steps and rounds are in the report."""
    model = tiny_model(family)
    events = _walk(model, method=method, scope="matrix", reconstruct_rounds=3, **fields)
    wanted = PruneConfig.build(**fields).sparsity
    for event in events:
        if isinstance(event, SitePruned):
            assert event.site.num_zeros == num_pruned(event.site.numel, wanted), event.site.name
            assert event.site.output_error is None
    for report in _blocks(events):
        assert report.reconstruction is not None and report.reconstruction.rounds == 3
        assert report.reconstruction.error_after <= report.reconstruction.error_before


def test_rounds_find_another_support() -> None:
    """Kept weights are tuned before the rest is chosen: the support is not that of one round, and the error is lower."""
    once, thrice = tiny_model("llama"), tiny_model("llama")
    [first, *_] = _blocks(_walk(once, sparsity=0.7, reconstruct_steps=60))
    [other, *_] = _blocks(_walk(thrice, sparsity=0.7, reconstruct_steps=60, reconstruct_rounds=3))
    assert not torch.equal(once.model.layers[0].mlp.up_proj.weight == 0, thrice.model.layers[0].mlp.up_proj.weight == 0)
    assert first.reconstruction and other.reconstruction
    assert other.reconstruction.error_after < first.reconstruction.error_after


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    """16-bit weights are tuned in fp32 and stay 16-bit; n:m groups stay whole and zeros positive."""
    model = tiny_model(family, dtype=dtype)
    reports = _blocks(_walk(model, pattern="2:4"))
    stack = probe(model, find_stack(model), _ids()[:1])
    assert all(report.reconstruction.error_after < report.reconstruction.error_before for report in reports)  # type: ignore[union-attr]
    for site in itertools.chain(*stack.sites):
        assert site.stored.dtype == dtype
        zeros_OG = (site.weight_OI == 0).reshape(site.shape[0], -1, 4).sum(-1)
        assert bool((zeros_OG >= 2).all()), site.name
        assert not torch.signbit(site.stored[site.stored == 0]).any()


def test_skipped_sites_do_not_move() -> None:
    """Neither a Linear that is skipped nor one expert of a fused parameter."""
    model = tiny_model("mixtral")
    dense = _parameters(model)
    _walk(model, skip=("*.q_proj", "*.down_proj.1"))
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            assert torch.equal(parameter, dense[name])
        if name.endswith("down_proj"):
            assert torch.equal(parameter[1], dense[name][1])
            assert not torch.equal(parameter[2], dense[name][2])


def test_a_block_without_sites_is_not_reconstructed() -> None:
    """Skipped whole, it has no report of it, and the next block is tuned all the same."""
    first, second = _blocks(_walk(tiny_model("llama"), skip="model.layers.0.*"))
    assert first.reconstruction is None and first.sites == ()
    assert second.reconstruction is not None and second.reconstruction.steps > 0


def test_nothing_to_gain_is_no_warning() -> None:
    """At 0 % every block puts out what it did."""
    events = _walk(tiny_model("llama"), sparsity=0.0)
    assert [report.reconstruction.steps for report in _blocks(events) if report.reconstruction] == [0, 0]
    assert not any(isinstance(event, Warned) for event in events)


def test_the_seed_alone_decides() -> None:
    """Two runs give the same bytes, wherever torch's own generator stands; another seed gives others."""
    models = [tiny_model("llama") for _ in range(3)]
    for position, (model, seed) in enumerate(zip(models, (1, 1, 2), strict=True)):
        torch.manual_seed(position)
        _walk(model, seed=seed)
    first, same, other = map(_parameters, models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_absurd_rate_warns_by_block_and_changes_nothing() -> None:
    """The walk's weights are those without reconstruction, and one warning a block names the remedy."""
    plain, absurd = tiny_model("llama"), tiny_model("llama")
    _walk(plain, reconstruct=False)
    events = _walk(absurd, reconstruct_lr=1e4)
    warnings = [event.message for event in events if isinstance(event, Warned)]
    assert len(warnings) == len(_blocks(events)) == 2
    assert all("rolled back" in message and "--reconstruct-lr" in message for message in warnings)
    ours, theirs = _parameters(absurd), _parameters(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_progress_moves_within_a_block() -> None:
    """Steps are told every ten, under the stage and the block they belong to."""
    all_events = _walk(tiny_model("llama"), reconstruct_steps=30)
    events = [event for event in all_events if isinstance(event, Progress)]
    steps = [report.reconstruction.steps for report in _blocks(all_events) if report.reconstruction]
    assert len(steps) == 2 and min(steps) >= 10
    expected = [
        (block, f"model.layers.{block}: reconstruction {done}/30")
        for block in (0, 1)
        for done in range(10, steps[block] + 1, 10)
    ]
    assert [(event.done, event.detail) for event in events] == expected
    assert all((event.stage, event.total) == ("prune", 2) for event in events)


def test_a_walk_goes_on_after_some_blocks_with_the_same_bytes() -> None:
    """The dense model's hidden states are found again by running its own blocks."""
    whole, parts = tiny_model("llama"), tiny_model("llama")
    _walk(whole)
    stack = probe(parts, find_stack(parts), _ids()[:1])
    dense = copy.deepcopy(parts.model.layers[0].state_dict())
    config = PruneConfig(reconstruct=True, reconstruct_steps=12)
    first = Walk(stack, record(parts, stack, list(_ids().split(2))), config, torch.device("cpu"))
    next(event for event in first.run() if isinstance(event, BlockFinished))
    pruned = copy.deepcopy(parts.model.layers[0].state_dict())
    second = Walk(stack, record(parts, stack, list(_ids().split(2))), config, torch.device("cpu"))
    parts.model.layers[0].load_state_dict(dense)
    second.replay(1, dense=True)
    parts.model.layers[0].load_state_dict(pruned)
    second.hidden = first.hidden
    list(second.run(1))
    ours, theirs = _parameters(parts), _parameters(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("fields", [{"num_samples": 1}, {"num_samples": 8, "batch_size": 8}])
def test_one_batch_is_refused(fields: dict[str, Any]) -> None:
    """There would be nothing to hold out; without reconstruction the same is fine."""
    assert PruneConfig.build(**fields)
    with pytest.raises(ConfigError, match="--batch-size"):
        PruneConfig.build(reconstruct=True, **fields)


def test_reports_without_it_still_load() -> None:
    """The field has a default: a report of an earlier version is read."""
    report = BlockReport.model_validate({"index": 0, "name": "blocks.0", "seconds": 1.0, "sites": []})
    assert report.reconstruction is None


def test_memory_grows_with_what_is_tuned() -> None:
    """More tokens and more weights need more; the state is at least four fp32 copies."""
    sites = find_stack(tiny_model("llama")).sites[0]
    numel = sum(site.numel for site in sites)
    assert tuning_state_bytes(sites, 2) > 16 * numel
    one = tuning_activation_bytes(sites, num_tokens=100, hidden_size=64, itemsize=4)
    assert tuning_activation_bytes(sites, num_tokens=200, hidden_size=64, itemsize=4) == 2 * one > 0
