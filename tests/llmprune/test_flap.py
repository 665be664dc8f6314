"""FLAP and magnitude against brute force on tiny models: explicit hooks, two-pass variance, sums by loops.

O out, I in features; T tokens; G groups.
"""

from __future__ import annotations

import copy
from collections.abc import Generator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Recording, Stack, find_stack, probe, record
from llmprune.engines.flap import structural_cuts
from llmprune.engines.layerwise import Walk
from llmprune.errors import ConfigError, NonFiniteError, UnsupportedModel
from llmprune.spec import Need
from llmprune.stats import LinearStats
from llmprune.structured.levels import centres
from llmprune.structured.scores import below_one_threshold, best, compensation, fluctuation_worth, magnitude_worth
from llmprune.structured.slicing import Cut, mask_, slice_model_
from llmprune.structured.units import Module, find_units
from llmprune.structured.widths import describe_, uniform_fields
from tiny import make_model

CPU = torch.device("cpu")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "no biases": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "biases everywhere": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "fused": ("phi3", {"num_key_value_heads": 4}),
}


def _ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 100, (4, 24), generator=torch.Generator().manual_seed(seed))


class Case:
    """A model in fp64 with what it was recorded on."""

    def __init__(self, name: str = "no biases", dtype: torch.dtype = torch.float64) -> None:
        model_type, changes = MODELS[name]
        self.model = make_model(model_type, dtype=dtype, **changes)
        self.stack: Stack = probe(self.model, find_stack(self.model), _ids()[:1])
        self.modules = find_units(self.model, self.stack).modules
        self.recording: Recording = record(self.model, self.stack, list(_ids().split(2)))
        assert len(self.modules) == 4

    def cuts(self, method: Any, **fields: Any) -> dict[str, Cut]:
        found = structural_cuts(method, self.stack, self.modules, self.recording, CPU, **fields)
        return drained(found, [1, 2] if method == "flap" else [])

    def inputs(self) -> dict[str, Tensor]:
        """What every consumer is given [T, I], by a hook in a forward of the whole model."""
        seen: dict[str, Tensor] = {}
        handles = [
            module.consumer.module.register_forward_pre_hook(
                lambda _module, args, name=module.name: seen.__setitem__(name, args[0].flatten(0, -2).clone())
            )
            for module in self.modules
        ]
        forward(self.model)
        for handle in handles:
            handle.remove()
        return seen

    def sizes(self, cuts: dict[str, Cut]) -> tuple[int, int]:
        """Parameters that go, and those of all groups."""
        gone = sum((one.num_groups - len(cuts[one.name].kept_G)) * one.parameters_per_group for one in self.modules)
        return gone, sum(one.num_groups * one.parameters_per_group for one in self.modules)


def drained(running: Generator[int, None, dict[str, Cut]], steps: list[int]) -> dict[str, Cut]:
    """What a generator returns, once it has yielded these."""
    seen = []
    while True:
        try:
            seen.append(next(running))
        except StopIteration as stop:
            assert seen == steps
            cuts: dict[str, Cut] = stop.value
            return cuts


@torch.no_grad()
def forward(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(input_ids=_ids(), use_cache=False).logits
    return logits


def worth_by_hand(module: Module, x_TI: Tensor) -> list[float]:
    """FLAP's worth of each group, a column at a time."""
    weight_OI = module.consumer.weight_OI
    columns = []
    for column in range(weight_OI.shape[1]):
        x_T = x_TI[:, column]
        variance = float((x_T - x_T.mean()).square().mean())
        worth = variance * float(weight_OI[:, column] @ weight_OI[:, column])
        columns.append(worth**2 if module.kind == "attention" else worth)
    column_I = torch.tensor(columns, dtype=torch.float64)
    standard_I = (column_I - column_I.mean()) / column_I.std()
    size = module.group_size
    return [float(standard_I[size * group : size * (group + 1)].mean()) for group in range(module.num_groups)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sparsity", [0.125, 0.25, 0.5])
def test_flap_is_its_formula(name: str, sparsity: float) -> None:
    """The groups that go, by a loop over all groups in the order of their worth; the model is as it was."""
    case = Case(name)
    before = copy.deepcopy(case.model.state_dict())
    inputs = case.inputs()
    cuts = case.cuts("flap", sparsity=sparsity)
    worths = {one.name: worth_by_hand(one, inputs[one.name]) for one in case.modules}
    order = sorted((worth, one.name, group) for one in case.modules for group, worth in enumerate(worths[one.name]))
    sizes = {one.name: one.parameters_per_group for one in case.modules}
    left = {one.name: set(range(one.num_groups)) for one in case.modules}
    gone, total = case.sizes(cuts)
    removed = last = 0
    for _, owner, group in order:
        if removed >= sparsity * total:
            break
        if len(left[owner]) > 1:
            left[owner].discard(group)
            removed += (last := sizes[owner])
    assert {name: set(cut.kept_G.tolist()) for name, cut in cuts.items()} == left
    assert gone == removed and 0 <= gone - sparsity * total < last
    assert len({len(cut.kept_G) for cut in cuts.values()}) > 2  # widths differ
    assert all(torch.equal(tensor, before[key]) for key, tensor in case.model.state_dict().items())


def test_variance_and_mean_in_batches_are_those_of_two_passes() -> None:
    """Inputs far from zero, to the rounding of fp32; the worth with it."""
    case = Case()
    module = case.modules[1]
    x_TI = torch.randn(3000, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_TI = x_TI * torch.linspace(0.1, 3, 128) + torch.linspace(-5, 5, 128)
    stats = LinearStats(128, Need.MEAN, CPU)
    for part_TI in x_TI.split(700):
        stats.update(part_TI)
    mean_I = x_TI.mean(0)
    torch.testing.assert_close(stats.mean_I.double(), mean_I, rtol=1e-5, atol=1e-6)
    two_pass_I = (x_TI - mean_I).square().mean(0)
    rounding_I = 1e-6 * x_TI.square().mean(0)
    assert bool(((stats.variance_I.double() - two_pass_I).abs() <= rounding_I).all())
    expected_G = torch.tensor(worth_by_hand(module, x_TI), dtype=torch.float64)
    torch.testing.assert_close(fluctuation_worth(module, stats), expected_G, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_compensation_keeps_the_mean_output(name: str) -> None:
    """Of each consumer on the calibration inputs, to the rounding of the fp32 means; without the bias it is far away."""
    case = Case(name)
    inputs = case.inputs()
    cuts = case.cuts("flap", sparsity=0.5)
    for module in case.modules:
        x_TI, linear = inputs[module.name], module.consumer.module
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            expected_O = linear(x_TI).mean(0)
            twin = copy.deepcopy(linear.bias)
            mask_(module, cuts[module.name])
            ours_O = linear(x_TI).mean(0)
            linear.bias = twin
            without_O = linear(x_TI).mean(0)
        error, other = ((found_O - expected_O).norm() / expected_O.norm() for found_O in (ours_O, without_O))
        assert error < 1e-6 and other > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_biases_are_made_where_they_may(name: str) -> None:
    """A consumer without one gains it with ``with_bias`` alone; one that has it is made use of either way. Nothing removed,
    nothing to make up for.
    """
    case = Case(name)
    own = name == "biases everywhere"
    given, stock = case.cuts("flap", sparsity=0.25), case.cuts("flap", sparsity=0.25, with_bias=False)
    for module in case.modules:
        assert torch.equal(given[module.name].kept_G, stock[module.name].kept_G)
        cut_away = len(given[module.name].kept_G) < module.num_groups
        assert (given[module.name].bias_O is not None) == cut_away
        assert (stock[module.name].bias_O is not None) == (cut_away and own)
    assert all(cut.bias_O is None for cut in case.cuts("flap", counts=[0, 0, 0, 0]).values())


@pytest.mark.parametrize("method", ["flap", "magnitude"])
def test_a_sliced_model_is_the_masked_one(method: str) -> None:
    """With the new biases: logits to 1e-10 in fp64, and not those of the dense model."""
    case = Case()
    cuts = case.cuts(method, sparsity=0.25)
    masked = copy.deepcopy(case.model)
    for module in find_units(masked, find_stack(masked)).modules:
        mask_(module, cuts[module.name])
    dense = forward(case.model)
    slice_model_(case.model, case.modules, cuts, _ids()[:1])
    ours, expected = forward(case.model), forward(masked)
    assert float((ours - expected).norm() / expected.norm()) < 1e-10 < float((dense - expected).norm() / expected.norm())
    biases = [module.consumer.module.bias is not None for module in case.modules]
    assert biases == [method == "flap" and cuts[module.name].bias_O is not None for module in case.modules]


def test_an_empty_module_puts_out_its_new_bias() -> None:
    """In both kinds: what stands in for it, as the masked one does."""
    case = Case()
    bias_O = torch.linspace(-1, 1, 64, dtype=torch.float64)
    cuts = {module.name: Cut(torch.arange(0), bias_O=bias_O) for module in case.modules[:2]}
    slice_model_(case.model, case.modules, cuts, _ids()[:1])
    hidden = torch.zeros(1, 3, 64, dtype=torch.float64)
    attention, ffn = (case.model.get_submodule(module.name) for module in case.modules[:2])
    assert torch.equal(attention(hidden)[0], bias_O.expand(1, 3, 64)) and torch.equal(ffn(hidden), bias_O.expand(1, 3, 64))


@pytest.mark.parametrize("with_bias", [False, True])
def test_given_widths_are_kept_and_fit_the_stock_class(with_bias: bool) -> None:
    """The same count of each kind in all layers, the least worth within a module; new biases are what no config can say."""
    case = Case()
    worths = {one.name: worth_by_hand(one, case.inputs()[one.name]) for one in case.modules}
    cuts = case.cuts("flap", counts=[2, 64, 2, 64], with_bias=with_bias)
    for module, kept in zip(case.modules, [2, 64, 2, 64], strict=True):
        worth = worths[module.name]
        expected = sorted(sorted(range(module.num_groups), key=worth.__getitem__)[-kept:])
        assert cuts[module.name].kept_G.tolist() == expected
    fields = uniform_fields(case.model, case.modules, {name: len(cut.kept_G) for name, cut in cuts.items()})
    slice_model_(case.model, case.modules, cuts, _ids()[:1])
    if with_bias:
        with pytest.raises(UnsupportedModel, match="bias"):
            describe_(case.model, case.modules, fields)
    else:
        describe_(case.model, case.modules, fields)


@pytest.mark.parametrize("name", MODELS)
def test_magnitude_is_the_norm_of_all_that_goes(name: str) -> None:
    """By zeroing a group in a copy and counting what is gone; the share of each module is that of the centres."""
    case = Case(name)
    cuts = case.cuts("magnitude", sparsity=0.25)
    counts = centres(case.modules, 0.25)
    for module, count in zip(case.modules, counts, strict=True):
        worth_G = magnitude_worth(module)
        for group in (0, module.num_groups - 1):
            gone = list(module.consumer.weight_OI[:, group * module.group_size : (group + 1) * module.group_size].flatten())
            for part in module.producers:
                for row in part.rows_GR[group].tolist():
                    gone += list(part.site.weight_OI[row])
                    if part.site.module.bias is not None:
                        gone.append(part.site.module.bias.detach()[row])
            assert len(gone) == module.parameters_per_group
            assert float(worth_G[group]) == pytest.approx(float(torch.stack(gone).square().mean().sqrt()))
        cut = cuts[module.name]
        assert len(cut.kept_G) == module.num_groups - count and cut.weight_OK is None and cut.bias_O is None
        order = sorted(range(module.num_groups), key=worth_G.tolist().__getitem__)
        assert cut.kept_G.tolist() == sorted(order[count:])


def test_one_threshold_counts_parameters_and_keeps_the_best() -> None:
    """On made-up worths: the attention's groups all lie below, and one of each stays; shares that none reach are refused."""
    case = Case()
    attention, ffn = case.modules[:2]
    worths = [torch.tensor([-4.0, -1.0, -3.0, -2.0]), torch.arange(128.0)]
    heads, channels = attention.parameters_per_group, ffn.parameters_per_group
    total = 4 * heads + 128 * channels

    def removed(needed: int) -> list[int]:
        return below_one_threshold([attention, ffn], worths, float(Fraction(needed, total)))

    assert below_one_threshold([attention, ffn], worths, 0.0) == [0, 0]
    assert removed(heads) == [1, 0] and removed(heads + 1) == [2, 0]
    assert removed(3 * heads + channels) == [3, 1] and removed(3 * heads + 10 * channels - 1) == [3, 10]
    assert removed(3 * heads + 127 * channels) == [3, 127]
    with pytest.raises(ConfigError, match="every module keeps a group"):
        removed(3 * heads + 127 * channels + 1)
    assert best(worths[0], 2).tolist() == [1, 3] and best(torch.ones(3), 1).tolist() == [1, 2]


def test_what_was_never_active_goes_for_nothing() -> None:
    """Channels of constant input go first, and the output's mean stays, as all of it is in the bias."""
    case = Case()
    module = case.modules[1]
    x_TI = torch.randn(500, 128, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x_TI[:, [5, 77]] = torch.tensor([0.0, 3.0], dtype=torch.float64)
    stats = LinearStats(128, Need.MEAN, CPU)
    stats.update(x_TI)
    kept_G = best(fluctuation_worth(module, stats), 2)
    assert set(range(128)) - set(kept_G.tolist()) == {5, 77}
    expected_O = 3 * module.consumer.weight_OI[:, 77]
    torch.testing.assert_close(compensation(module, stats, kept_G), expected_O, rtol=1e-6, atol=1e-9)


def test_what_cannot_be_scored_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations beyond fp32, and a module that no token reached."""
    case = Case()
    collect = Walk.collect

    def overflown(*args: Any, **fields: Any) -> dict[str, LinearStats]:
        found = collect(*args, **fields)
        next(iter(found.values())).sq_I[0] = float("inf")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "collect", overflown)
        with pytest.raises(NonFiniteError, match=r"layers\.0\.self_attn\.o_proj overflow"):
            case.cuts("flap", sparsity=0.25)
    monkeypatch.setattr(Walk, "collect", lambda *_args, **_fields: {})
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.self_attn\.o_proj is reached by no"):
        case.cuts("flap", sparsity=0.25)
