"""iCBS against autograd, brute force and what must hold after every step. O out, I in features, T tokens, V variables."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

import llmprune
import tiny
from llmprune.anatomy.blocks import find_stack, probe
from llmprune.anatomy.sites import Site
from llmprune.engines import icbs
from llmprune.engines.candidates import SiteState, allocate_steps, pack_bits, unpack_bits
from llmprune.engines.curvature import exact_hessian, positive_factor
from llmprune.engines.gradients import can_gather, gather, mean_loss, sequence_losses
from llmprune.engines.icbs import Refinement, RefineSettings, RefineStep
from llmprune.errors import NonFiniteError
from llmprune.masks import keep_mask
from llmprune.solvers.problem import BlockProblem
from llmprune.solvers.solve import solve
from llmprune.spec import Pattern, Scope

QUICK: dict[str, Any] = {
    "num_epochs": 1, "steps_per_epoch": 16, "block_size": 64, "num_sequences": 6, "min_steps": 1, "batch_size": 6,
    "solver_options": {"num_restarts": 2, "num_temperatures": 12},
}  # fmt: skip


def _ids(num_sequences: int = 6, *, seed: int = 0) -> Tensor:
    ids = torch.tensor(tiny.train_tokenizer()(tiny.prose(2000, seed=11 + seed))["input_ids"])
    return ids[: num_sequences * 24].view(num_sequences, 24)


def _sites(model: PreTrainedModel) -> list[Site]:
    return [site for sites in probe(model, find_stack(model), _ids()[:1]).sites for site in sites]


def _pruned(
    model: PreTrainedModel, pattern: str = "unstructured", scope: Scope = "matrix"
) -> tuple[list[Site], dict[str, Tensor]]:
    """Sites of the model, pruned by magnitude to half, and their dense weights."""
    sites = _sites(model)
    dense = {site.name: site.weight_OI.clone() for site in sites}
    for site in sites:
        keep_OI = keep_mask(site.weight_OI.abs(), Pattern.parse(pattern), 0.5, scope)
        site.weight_OI.mul_(keep_OI)
    return sites, dense


def _linear(weight_OI: Tensor) -> Site:
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, dtype=weight_OI.dtype)
    linear.weight.data = weight_OI.clone()
    return Site("linear", linear, "weight")


def _state(dense_OI: Tensor, pruned_OI: Tensor, **options: Any) -> SiteState:
    return SiteState.of(_linear(dense_OI * ~pruned_OI), dense_OI, **options)


class _Quadratic:
    """1/2 |X W^T - Y|^2 / T: its curvature is exact, and a block's model of it is the loss itself."""

    def __init__(self, seed: int, shape: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_out, num_in = shape
        self.x_TI = torch.randn(7, num_in, generator=generator, dtype=torch.float64)
        self.y_TO = torch.randn(7, num_out, generator=generator, dtype=torch.float64)
        self.dense_OI = torch.randn(num_out, num_in, generator=generator, dtype=torch.float64)

    def loss(self, weight_OI: Tensor) -> float:
        return float(0.5 * (self.x_TI @ weight_OI.T - self.y_TO).square().sum() / len(self.x_TI))

    def problem(self, state: SiteState, index_V: Tensor) -> BlockProblem:
        weight_OI = state.site.weight_OI
        gradient_OI = (self.x_TI @ weight_OI.T - self.y_TO).T @ self.x_TI / len(self.x_TI)
        rows_V, columns_V = state.rows_and_columns(index_V)
        outputs = range(weight_OI.shape[0])
        factor_NV = torch.cat([self.x_TI[:, columns_V] * (rows_V == row) for row in outputs]) / len(self.x_TI) ** 0.5
        return BlockProblem.of_loss(
            self.dense_OI[rows_V, columns_V], state.pruned_W[index_V], gradient_OI[rows_V, columns_V], factor_NV
        )

    def score(self, state: SiteState) -> Tensor:
        weight_OI = state.site.weight_OI
        return (self.dense_OI * ((self.x_TI @ weight_OI.T - self.y_TO).T @ self.x_TI)).abs()


@pytest.mark.parametrize("seed", range(3))
def test_prediction_is_the_change_of_a_quadratic_loss(seed: int) -> None:
    """Exact curvature, no ridge: predicted and measured change agree to 1e-10, and the loss never rises."""
    toy = _Quadratic(seed, (3, 8))
    state = _state(toy.dense_OI, toy.dense_OI.abs() < toy.dense_OI.abs().median(), tabu=0.3, block_size=8)
    num_pruned, losses = int(state.pruned_W.sum()), [toy.loss(state.site.weight_OI)]
    for _ in range(10):
        index_V = state.select(toy.score(state), 4, 4)
        solution = solve(toy.problem(state, index_V), "exhaustive")
        state.write_(index_V, solution.pruned_V)
        state.tried(index_V)
        losses.append(toy.loss(state.site.weight_OI))
        assert losses[-1] - losses[-2] == pytest.approx(solution.change, abs=1e-10)
        assert int((state.site.weight_OI == 0).sum()) == num_pruned
    assert losses[-1] < losses[0]
    assert all(after <= before + 1e-12 for before, after in pairwise(losses))


def test_a_block_of_everything_is_solved_in_one_step() -> None:
    """On a quadratic loss, one step equals the best of all masks."""
    toy = _Quadratic(5, (2, 5))
    state = _state(toy.dense_OI, torch.arange(10).view(2, 5) % 2 == 0)
    index_V = state.select(toy.score(state), 5, 5)
    assert len(index_V) == 10
    state.write_(index_V, solve(toy.problem(state, index_V), "anneal").pruned_V)
    masks = [torch.ones(10).index_fill(0, torch.tensor(members), 0.0) for members in combinations(range(10), 5)]
    assert toy.loss(state.site.weight_OI) == pytest.approx(min(toy.loss(toy.dense_OI * mask.view(2, 5)) for mask in masks))


@pytest.mark.parametrize(("model_type", "batch_size"), [("llama", 1), ("llama", 4), ("gpt2", 4)])
def test_gradients_are_autograds(model_type: str, batch_size: int) -> None:
    """Mean and per-sequence gradients from inputs and output gradients equal autograd on each sequence, in fp64, also of
    transposed weights; no parameter is left with a gradient or another requires_grad.
    """
    model, ids_NS = tiny.make_model(model_type, dtype=torch.float64), _ids(5)
    sites = [site for site in _sites(model) if can_gather(site)]
    assert len(sites) > 7
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    gradients, loss = gather(model, sites, ids_NS, batch_size=batch_size, scale=64.0)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert loss == pytest.approx(mean_loss(model, ids_NS, batch_size=2))
    assert loss == pytest.approx(float(model(input_ids=ids_NS, labels=ids_NS).loss.detach()))
    expected: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    for ids_1S in ids_NS.split(1):
        model.zero_grad()
        sequence_losses(model, ids_1S).sum().backward()
        for site in sites:
            gradient = site.module.weight.grad
            expected[site.name].append((gradient.T if site.transposed else gradient).clone())
    generator = torch.Generator().manual_seed(0)
    for site in sites:
        each_NOI = torch.stack(expected[site.name])
        rows_V = torch.randint(site.shape[0], (40,), generator=generator)
        columns_V = torch.randint(site.shape[1], (40,), generator=generator)
        torch.testing.assert_close(gradients[site.name].total(), each_NOI.sum(0), rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(
            gradients[site.name].at(rows_V, columns_V), each_NOI[:, rows_V, columns_V], rtol=1e-9, atol=1e-14
        )


def test_nothing_is_kept_before_the_first_site() -> None:
    """A site of the last block: the graph of the backward pass begins there."""
    model = tiny.make_model()
    site = next(site for site in _sites(model) if site.name.endswith("1.mlp.down_proj"))
    seen: list[bool] = []
    handle = model.model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda _module, _args, output: seen.append(output.requires_grad)
    )
    gradients, _ = gather(model, [site], _ids(2), batch_size=2)
    handle.remove()
    assert seen == [False]
    assert gradients[site.name].num_sequences == 2


def test_selection_by_hand() -> None:
    """Largest of the pruned, smallest of the kept, ties by position; frozen and tabu ones stay out."""
    dense_OI = torch.ones(2, 5)
    pruned_OI = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 0, 0, 1]]).bool()
    score_OI = torch.tensor([[3.0, 5.0, 5.0, 1.0, 2.0], [2.0, 7.0, 2.0, 0.5, 5.0]])
    state = _state(dense_OI, pruned_OI)
    assert state.select(score_OI, 2, 3).tolist() == [1, 2, 4, 5, 8]
    state.fixed_W[1] = True
    assert state.select(score_OI, 2, 2).tolist() == [2, 9, 4, 8]
    state.capacity = 2
    state.tried(torch.tensor([9, 8]))
    assert state.select(score_OI, 2, 2).tolist() == [0, 2, 4, 5]
    assert state.select(score_OI, 5, 5).tolist() == [0, 2, 3, 9, 4, 5, 6, 7, 8]  # all that is free, tabu or not


def test_selection_in_groups_by_hand() -> None:
    """Pairs of one group whose scores differ most in favour of the pruned one; 2:4 groups of one row each."""
    dense_OI = torch.ones(3, 4)
    pruned_OI = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]]).bool()
    score_OI = torch.tensor([[9.0, 1.0, 8.0, 7.0], [5.0, 1.0, 4.0, 3.0], [0.0, 6.0, 2.0, 9.0]])
    state = _state(dense_OI, pruned_OI, group_size=4)
    assert state.select(score_OI, 1, 1).tolist() == [9, 8]  # 6 - 0
    assert state.select(score_OI, 3, 3).tolist() == [0, 4, 9, 3, 5, 8]  # then 5 - 1 and 9 - 7
    assert len(state.select(score_OI, 50, 50)) == 12


def test_frozen_and_tabu_counts() -> None:
    """Fractions of the pruned and the kept, to the nearest whole weight; zero freezes none; weights that are zero in the
    dense model never move; the tabu list is off where it would leave less than a block.
    """
    generator = torch.Generator().manual_seed(0)
    dense_OI = torch.randn(10, 20, generator=generator)
    pruned_OI = dense_OI.abs() < dense_OI.abs().median()
    state = _state(dense_OI, pruned_OI, score_OI=dense_OI.abs(), fix_pruned=0.42, fix_kept=0.35, tabu=0.4, block_size=20)
    fixed_W, score_W = state.fixed_W, dense_OI.abs().view(-1)
    assert (int((fixed_W & state.pruned_W).sum()), int((fixed_W & ~state.pruned_W).sum())) == (42, 35)
    assert score_W[fixed_W & state.pruned_W].max() <= score_W[~fixed_W & state.pruned_W].min()
    assert score_W[fixed_W & ~state.pruned_W].min() >= score_W[~fixed_W & ~state.pruned_W].max()
    assert state.capacity == round(0.4 * 123)
    options = {"score_OI": dense_OI.abs(), "tabu": 0.4}
    assert _state(dense_OI, pruned_OI, **options).num_free == 200
    assert _state(dense_OI, pruned_OI, **options, block_size=130).capacity == 0
    assert _state(dense_OI, pruned_OI, **options, fix_kept=0.001).num_free == 200
    dense_OI[0, :5] = 0
    assert _state(dense_OI, pruned_OI | (dense_OI == 0)).num_free == 195


def test_tabu_is_first_in_first_out() -> None:
    """No more than the capacity, the oldest leave first."""
    state = _state(torch.ones(1, 9), torch.arange(9)[None] < 4, tabu=0.5, block_size=2)
    assert state.capacity == 4
    for block in ([0, 5], [1, 6], [2, 7]):
        state.tried(torch.tensor(block))
    assert state.tabu_F.tolist() == [1, 6, 2, 7]


def test_kept_weights_must_be_the_dense_ones() -> None:
    """A mask of changed weights is refused, by name."""
    with pytest.raises(ValueError, match="linear: kept weights differ"):
        SiteState.of(_linear(torch.tensor([[0.0, 2.0]])), torch.tensor([[1.0, 3.0]]))


@pytest.mark.parametrize(
    ("sizes", "num_steps", "min_steps", "expected"),
    [
        ((401408, 262144, 5120), 300, 1, [114, 110, 76]),
        ((401408, 262144, 5120), 3, 1, [1, 1, 1]),
        ((10**6, 10**6, 10), 30, 8, [11, 11, 8]),
        ((10**6,) * 4, 6, 10, [2, 2, 1, 1]),
        ((100, 100, 100), 2, 1, [1, 1, 0]),
    ],
)
def test_steps_go_by_the_logarithm_of_the_size(
    sizes: tuple[int, ...], num_steps: int, min_steps: int, expected: list[int]
) -> None:
    """The sum is exact; where the minimum cannot be met it is what can."""
    assert allocate_steps(sizes, num_steps, min_steps=min_steps) == expected


def _run(model: PreTrainedModel, pattern: str = "unstructured", scope: Scope = "matrix", **changes: Any) -> list[RefineStep]:
    sites, dense = _pruned(model, pattern, scope)
    held_out_NS = _ids(changes.pop("num_held_out", 6), seed=1)
    settings = RefineSettings(**(QUICK | changes))
    refinement = Refinement.of(
        model, sites, dense, _ids(12), held_out_NS, settings, pattern=Pattern.parse(pattern), scope=scope
    )
    before = {name: (state.pruned_W.clone(), state.fixed_W.clone()) for name, state in refinement.states.items()}
    assert len(before) == len(sites)
    steps = []
    for step in refinement.run():
        steps.append(step)
        for site in sites:  # at every moment
            state, (pruned_W, fixed_W) = refinement.states[site.name], before[site.name]
            weight_OI = site.weight_OI
            zero_OI = weight_OI == 0
            assert torch.equal(weight_OI, torch.where(zero_OI, 0, dense[site.name]))
            assert torch.equal(zero_OI.reshape(-1), state.pruned_W)
            assert torch.equal(state.pruned_W[fixed_W], pruned_W[fixed_W])
            size = {"row": site.shape[1]}.get(scope, Pattern.parse(pattern).m or site.numel)
            assert torch.equal(state.pruned_W.view(-1, size).sum(1), pruned_W.view(-1, size).sum(1))
            assert len(state.tabu_F) <= state.capacity
    assert refinement.stopped
    return steps


@pytest.mark.parametrize(("pattern", "scope"), [("unstructured", "matrix"), ("unstructured", "row"), ("2:4", "row")])
@pytest.mark.parametrize("layers_per_step", [1, 5])
def test_a_run_lowers_the_loss_and_keeps_every_count(pattern: str, scope: Scope, layers_per_step: int) -> None:
    """On a model that has learnt: site, row and group counts, dense values and frozen weights hold after every step; the
    held-out loss never rises and ends lower.
    """
    model = tiny.train_(tiny.make_model(), num_steps=40)
    steps = _run(model, pattern, scope, layers_per_step=layers_per_step)
    losses = [step.held_out for step in steps]
    assert all(after <= before for before, after in pairwise(losses))
    assert losses[-1] < losses[0]
    assert steps[-1].step == 16
    assert sum(step.num_swaps for step in steps) > 0
    assert all(step.predicted <= 0 for step in steps)
    assert max(len(step.sites) for step in steps) == layers_per_step
    assert all(len(set(step.sites)) == len(step.sites) for step in steps)
    assert losses[-1] == pytest.approx(mean_loss(model, _ids(6, seed=1), batch_size=6))


def test_the_mask_of_a_job_is_refined(text_file: Path) -> None:
    """As the guide shows it: a model in memory, pruned by Wanda, refined on, with as many zeros as before."""
    model = tiny.train_(tiny.make_model(), num_steps=40)
    sites = _sites(model)
    dense = {site.name: site.weight_OI.clone() for site in sites}
    options = tiny.QUICK | {"calibration": str(text_file), "eval": ()}
    llmprune.prune(model, tokenizer=tiny.train_tokenizer(), method="wanda", sparsity=0.5, **options)
    zeros = [int((site.weight_OI == 0).sum()) for site in sites]
    settings = RefineSettings(**(QUICK | {"layers_per_step": 4}))
    steps = list(Refinement.of(model, sites, dense, _ids(12), _ids(6, seed=1), settings).run())
    assert steps[-1].held_out < steps[0].held_out
    assert [int((site.weight_OI == 0).sum()) for site in sites] == zeros


def test_the_same_seed_gives_the_same_mask() -> None:
    """Bit-equal weights and losses twice; another seed differs."""
    weights = []
    for seed in (0, 0, 1):
        model = tiny.make_model()
        losses = [step.held_out for step in _run(model, seed=seed, steps_per_epoch=6)]
        weights.append((losses, torch.cat([site.weight_OI.reshape(-1) for site in _sites(model)])))
    assert weights[0][0] == weights[1][0]
    assert torch.equal(weights[0][1], weights[1][1])
    assert not torch.equal(weights[0][1], weights[2][1])


def test_a_step_that_does_harm_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every step raises the held-out loss, the mask ends as it began, and a plateau ends the run."""
    losses = iter(float(number) for number in range(1, 100))
    monkeypatch.setattr(icbs, "mean_loss", lambda *_args, **_kwargs: next(losses))
    model, untouched = tiny.make_model(), tiny.make_model()
    steps = _run(model, patience=4, layers_per_step=2)
    sites, _ = _pruned(untouched)
    assert [step.accepted for step in steps] == [True, False, False, False, False]
    assert {step.held_out for step in steps} == {1.0}
    assert [step.ridge for step in steps[1:]] == [0.001, 0.004, 0.016, 0.064]
    assert len(sites) == 14
    for ours, theirs in zip(_sites(model), sites, strict=True):
        assert torch.equal(ours.weight_OI, theirs.weight_OI)


def test_a_step_that_does_harm_is_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a larger ridge, of the same gradients, until it does none or the retries are used up."""
    losses, passes = iter([1.0, 3.0, 2.0, 0.5, *[9.0] * 9]), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(args)
        return gather(*args, **kwargs)

    monkeypatch.setattr(icbs, "mean_loss", lambda *_args, **_kwargs: next(losses))
    monkeypatch.setattr(icbs, "gather", counted)
    steps = _run(tiny.make_model(), retries=2, num_epochs=1, steps_per_epoch=2)
    assert [step.accepted for step in steps] == [True, True, False]
    assert [step.held_out for step in steps] == [1.0, 0.5, 0.5]
    assert steps[1].ridge == 0.016 and steps[1].num_swaps > 0 and steps[1].predicted < 0
    assert steps[2].num_swaps == 0 and len(passes) == 2


def test_without_held_out_text_every_step_stays() -> None:
    """As in the paper: no test of the true loss."""
    steps = _run(tiny.make_model(), num_held_out=0, steps_per_epoch=4)
    assert [step.accepted for step in steps] == [True] * 5
    assert all(step.held_out != step.held_out for step in steps)  # NaN: not measured
    assert sum(step.num_swaps for step in steps) > 0


def test_gradients_that_overflow_end_in_an_error() -> None:
    """The loss's scale is halved as long as that may help; then the site is named."""
    model = tiny.make_model()
    model.lm_head.weight.data[5] = torch.inf
    with pytest.raises(NonFiniteError, match="gradients hold NaN or inf"):
        _run(model, num_held_out=0)


def test_the_paper_is_the_default() -> None:
    """Block 4096 with 2048 pruned, 10 x 300 steps of 16 sequences, gamma 0.75, lambda 0.001, tabu 0.40, frozen 0.42 and
    0.35.
    """
    settings = RefineSettings()
    assert (settings.block_size, settings.pruned_of_block, settings.num_sequences) == (4096, 2048, 16)
    assert settings.max_blocks(num_sites=224) == settings.passes(num_sites=224) == 3000
    assert (settings.multiplier, settings.ridge) == (0.75, 0.001)
    assert (settings.tabu, settings.fix_pruned, settings.fix_kept) == (0.40, 0.42, 0.35)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_exact_hessian_is_autograds(model_type: str) -> None:
    """By chosen weights of one site, in fp64, in batches, also of transposed weights; the model is left as it was."""
    model, ids_NS = tiny.make_model(model_type, dtype=torch.float64), _ids(3)
    site = next(site for site in _sites(model) if site.name.rpartition(".")[2] in ("down_proj", "c_fc"))
    before_OI = site.weight_OI.clone()
    generator = torch.Generator().manual_seed(0)
    flat_V = torch.randperm(site.numel, generator=generator)[:9]
    rows_V, columns_V = flat_V // site.shape[1], flat_V % site.shape[1]
    name = f"{site.name}.weight"

    def loss(entries_V: Tensor) -> Tensor:
        weight_OI = before_OI.index_put((rows_V, columns_V), entries_V)
        changed = {name: weight_OI.T if site.transposed else weight_OI}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return sequence_losses(lambda **kwargs: functional_call(model, changed, (), kwargs), ids_NS).mean()

    expected_VV = torch.autograd.functional.hessian(loss, before_OI[rows_V, columns_V])
    hessian_VV = exact_hessian(model, site, ids_NS, rows_V, columns_V, batch_size=2)
    assert float(hessian_VV.abs().max()) > 0
    scale = float(expected_VV.abs().max())  # norms and rotary embeddings are fp32 in any model
    assert float((hessian_VV - expected_VV).abs().max()) <= 1e-5 * scale
    assert torch.equal(site.weight_OI, before_OI)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_an_indefinite_hessian_makes_the_very_same_problem() -> None:
    """The shift that gives it a factor is taken off the ridge: energies of all choices are the second-order model's."""
    generator = torch.Generator().manual_seed(3)
    half_VV = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    hessian_VV = half_VV + half_VV.T
    assert float(torch.linalg.eigvalsh(hessian_VV)[0]) < -0.5
    dense_V, gradient_V = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    pruned_V = torch.tensor([True, False, True, False, True, False])
    factor_VV, shift = positive_factor(hessian_VV)
    torch.testing.assert_close(factor_VV.T @ factor_VV, hessian_VV + shift * torch.eye(6, dtype=torch.float64))
    problem = BlockProblem.of_loss(dense_V, pruned_V, gradient_V, factor_VV, multiplier=0.75, ridge=0.01 - shift / 2)
    choices_RV = torch.cartesian_prod(*[torch.tensor([False, True])] * 6)
    for choice_V, energy in zip(choices_RV, problem.energy(choices_RV), strict=True):
        step_V = dense_V * (pruned_V.double() - choice_V.double())
        expected = 0.75 * gradient_V @ step_V + 0.5 * step_V @ hessian_VV @ step_V + 0.01 * step_V @ step_V
        assert float(energy) == pytest.approx(float(expected), abs=1e-10)


def test_a_snapshot_goes_on_to_the_same_end() -> None:
    """Taken midway through JSON, restored in another refinement of the same start: the same steps and weights."""

    def begun() -> tuple[PreTrainedModel, Refinement]:
        model = tiny.train_(tiny.make_model(), num_steps=20)
        sites, dense = _pruned(model)
        settings = RefineSettings(**(QUICK | {"num_epochs": 2, "layers_per_step": 3, "num_sequences": 5}))
        return model, Refinement.of(model, sites, dense, _ids(12), _ids(6, seed=1), settings)

    whole, first = begun()
    data, tensors = {}, {}
    for _ in first.run():
        if len(first.history) == 4:
            data, tensors = first.snapshot()
            data = json.loads(json.dumps(data))
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    assert first.history[-1].step == 32
    resumed, second = begun()
    second.restore_(data, tensors)
    assert len(second.history) == 4
    steps = list(second.run())
    assert len(steps) == len(first.history) - 4
    assert [replace(step, seconds=0.0) for step in steps] == [replace(step, seconds=0.0) for step in first.history[4:]]
    assert second.stopped == first.stopped
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("count", [1, 8, 13])
def test_masks_are_packed_bit_by_bit(count: int) -> None:
    """The first weight in the highest bit; what is packed comes back."""
    flag_W = torch.arange(count) % 3 == 0
    bits = pack_bits(flag_W)
    assert len(bits) == -(-count // 8) and int(bits[0]) >= 128
    assert torch.equal(unpack_bits(bits, count), flag_W)
