"""ALPS against its paper's loop in fp64, closed-form least squares, and every support of small problems.

O out, I in features, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from llmprune.linalg import spectrum
from llmprune.masks import keep_mask
from llmprune.methods import METHODS, alps
from llmprune.spec import Need, Pattern, Scope, Target
from llmprune.stats import LinearStats

DAMPING = 0.01
CASES: list[tuple[str, Scope]] = [("0.5", "matrix"), ("0.7", "row"), ("0.3", "block"), ("2:4", "matrix"), ("1:4", "matrix")]
case = pytest.mark.parametrize(("text", "scope"), CASES)


def _weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(100 + seed))


def _inputs(kind: str, tokens: int, columns: int) -> Tensor:
    """Inputs that share factors, follow each other, or have variances over four decades."""
    generator = torch.Generator().manual_seed(5)
    x_TI = torch.randn(tokens, columns, generator=generator)
    if kind == "factors":
        x_TI += torch.randn(tokens, columns // 4, generator=generator) @ torch.randn(columns // 4, columns, generator=generator)
        return x_TI * torch.exp(0.8 * torch.randn(columns, generator=generator))
    if kind == "chain":
        for j in range(1, columns):
            x_TI[:, j] = 0.9 * x_TI[:, j - 1] + 0.4 * x_TI[:, j]
        return x_TI
    assert kind == "decades"
    basis_II = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    return x_TI @ (basis_II * torch.logspace(0, -2, columns)) + 0.5 * torch.randn(tokens, 1, generator=generator)


def _stats(x_TI: Tensor) -> LinearStats:
    stats = LinearStats(x_TI.shape[1], Need.GRAM, "cpu")
    stats.update(x_TI)
    return stats


def _target(text: str, scope: Scope) -> Target:
    pattern = Pattern.parse(text) if ":" in text else Pattern()
    return Target(pattern, pattern.sparsity or float(text), scope)


def _prune(weight_OI: Tensor, stats: LinearStats, target: Target, method: str = "alps") -> Tensor:
    return METHODS[method].prune(weight_OI.clone(), stats, target, damping=DAMPING, generator=torch.Generator())


def _damped(stats: LinearStats) -> Tensor:
    """The damped Gram matrix in fp64; every column must be alive."""
    assert stats.gram_II is not None
    gram_II = stats.gram_II.double()
    gram_II = (gram_II + gram_II.T) / 2
    assert (gram_II.diagonal() > 0).all()
    return gram_II + DAMPING * gram_II.diagonal().mean() * torch.eye(len(gram_II), dtype=torch.float64)


def _loss(weight_OI: Tensor, other_OI: Tensor, damped_II: Tensor) -> float:
    delta_OI = weight_OI.double() - other_OI.double()
    return float((delta_OI @ damped_II * delta_OI).sum())


def _least_squares(weight_OI: Tensor, damped_II: Tensor, keep_OI: Tensor) -> Tensor:
    """The best weights on a fixed support, row by row: A_RR^-1 A_R: w."""
    best_OI = torch.zeros(weight_OI.shape, dtype=torch.float64)
    for o, keep_I in enumerate(keep_OI):
        right_R = damped_II[keep_I] @ weight_OI[o].double()
        best_OI[o, keep_I] = torch.linalg.solve(damped_II[keep_I][:, keep_I], right_R)
    return best_OI


def paper_loop(weight_OI: Tensor, damped_II: Tensor, target: Target) -> Tensor:
    """Algorithm 1 as written, in fp64: weights B, their sparse copy D and the unscaled multiplier V, each for itself."""
    scale_I = damped_II.diagonal().sqrt()
    unit_II = damped_II / scale_I / scale_I[:, None]
    dense_OI = weight_OI.double() * scale_I

    def project(score_OI: Tensor) -> Tensor:
        return keep_mask(score_OI.abs(), target.pattern, target.sparsity, target.scope)

    eye_II = torch.eye(len(unit_II), dtype=torch.float64)
    rho, quiet = 0.01, 0
    d_OI, v_OI, checked_OI = dense_OI, torch.zeros_like(dense_OI), project(dense_OI)
    for step in itertools.count(0):  # the first step only takes the projection of the dense weights
        b_OI = (dense_OI @ unit_II - v_OI + rho * d_OI) @ torch.linalg.inv(unit_II + rho * eye_II)
        keep_OI = project(b_OI + v_OI / rho)
        d_OI = (b_OI + v_OI / rho).where(keep_OI, 0)
        v_OI = v_OI + rho * (b_OI - d_OI)
        if step == 0 or step % 3:
            continue
        changed = int((keep_OI ^ checked_OI).sum()) / int(keep_OI.sum())
        checked_OI = keep_OI
        quiet = quiet + 1 if changed <= (3e-4 if step >= 30 else 0) else 0
        if quiet == 3:
            break
        rho *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
    return keep_OI


@case
@pytest.mark.parametrize("kind", ["factors", "chain", "decades"])
def test_support_is_the_papers_loop(kind: str, text: str, scope: Scope) -> None:
    """One matrix for both variables, in the eigenbasis and in fp32, walks where the paper's three matrices walk."""
    weight_OI, stats = _weight(6, 32), _stats(_inputs(kind, 200, 32))
    target = _target(text, scope)
    expected_OI = paper_loop(weight_OI, _damped(stats), target)
    assert 0 < expected_OI.sum() < weight_OI.numel()
    assert torch.equal(_prune(weight_OI, stats, target) != 0, expected_OI)


@pytest.mark.parametrize("warm", [False, True])
@case
def test_refinement_is_least_squares(text: str, scope: Scope, warm: bool) -> None:
    """Run to its end on any support, conjugate gradients give the closed form in fp64, from any start."""
    weight_OI, stats = _weight(6, 24), _stats(_inputs("chain", 200, 24))
    target = _target(text, scope)
    keep_OI = keep_mask(weight_OI.abs(), target.pattern, target.sparsity, target.scope)
    solved = stats.spectrum(DAMPING)
    start_OI = torch.randn(6, 24, generator=torch.Generator().manual_seed(1)) if warm else None
    dense_OI = weight_OI * solved.scale_I
    delta_OI = alps.refine(dense_OI, keep_OI, solved.unit_II, start_OI=start_OI, tolerance=0) / solved.scale_I
    best_OI = _least_squares(weight_OI, _damped(stats), keep_OI)
    assert (best_OI - weight_OI)[keep_OI].abs().max() > 0.1
    torch.testing.assert_close((weight_OI + delta_OI).double(), best_OI, rtol=0, atol=2e-5)


@case
@pytest.mark.parametrize("kind", ["factors", "chain", "decades"])
def test_weights_are_near_the_best_of_their_support(kind: str, text: str, scope: Scope) -> None:
    """Every row loses at least what least squares on its support loses, and in sum at most a thousandth more."""
    weight_OI, stats = _weight(12, 64), _stats(_inputs(kind, 400, 64))
    pruned_OI = _prune(weight_OI, stats, _target(text, scope))
    damped_II = _damped(stats)
    best = _loss(weight_OI, _least_squares(weight_OI, damped_II, pruned_OI != 0), damped_II)
    assert best > 0
    assert best * (1 - 1e-6) <= _loss(weight_OI, pruned_OI, damped_II) <= best * 1.001


def test_near_the_best_of_all_supports() -> None:
    """For single rows of eight, of which four stay: within a tenth of the best of all 70 supports, and mostly at it."""
    ours, best = [], []
    for seed in range(30):
        weight_OI, stats = _weight(1, 8, seed), _stats(_inputs("chain", 40, 8))
        damped_II = _damped(stats)
        losses = []
        for chosen in itertools.combinations(range(8), 4):
            keep_OI = torch.zeros(1, 8, dtype=torch.bool)
            keep_OI[0, list(chosen)] = True
            losses.append(_loss(weight_OI, _least_squares(weight_OI, damped_II, keep_OI), damped_II))
        best.append(min(losses))
        ours.append(_loss(weight_OI, _prune(weight_OI, stats, _target("0.5", "row")), damped_II))
    assert all(loss >= least * (1 - 1e-4) for loss, least in zip(ours, best, strict=True))
    assert sum(loss <= least * 1.001 for loss, least in zip(ours, best, strict=True)) > 15
    assert sum(ours) < 1.1 * sum(best)


@pytest.mark.parametrize("text", ["0.5", "0.7", "2:4", "4:8"])
@pytest.mark.parametrize("kind", ["factors", "chain"])
def test_loses_less_than_sparsegpt_and_wanda(kind: str, text: str) -> None:
    """On correlated inputs the loss is below SparseGPT's, and that one's below Wanda's, in any scope of theirs."""
    weight_OI, stats = _weight(32, 160), _stats(_inputs(kind, 640, 160))
    damped_II = _damped(stats)
    losses = {
        method: _loss(weight_OI, _prune(weight_OI, stats, _target(text, METHODS[method].scope), method), damped_II)
        for method in ("alps", "sparsegpt", "wanda")
    }
    assert losses["alps"] < 0.9 * losses["sparsegpt"] < losses["wanda"]


def _site_inputs(model_dir: object) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight and inputs of every Linear of a model's blocks on a line of its language."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    seen: dict[str, Tensor] = {}
    linears = {name: module for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, module in linears.items():
        module.register_forward_hook(lambda _module, args, _output, name=name: seen.update({name: args[0].flatten(0, 1)}))
    ids = tiny.train_tokenizer()(tiny.prose(600, seed=3), return_tensors="pt").input_ids[:, : 64 * 8]
    with torch.no_grad():
        model(input_ids=ids.view(-1, 64))
    for name, module in linears.items():
        yield name, module.weight.detach(), seen[name]


@pytest.mark.parametrize("text", ["0.5", "0.7", "2:4"])
def test_loses_least_on_every_site_of_a_trained_model(trained_model_dir: object, text: str) -> None:
    """Site by site of a trained model: ALPS below SparseGPT below Wanda; Wanda's counts are rounded row by row."""
    num_sites = 0
    for name, weight_OI, x_TI in _site_inputs(trained_model_dir):
        stats = _stats(x_TI)
        damped_II = _damped(stats)
        pruned = {m: _prune(weight_OI, stats, _target(text, METHODS[m].scope), m) for m in ("alps", "sparsegpt", "wanda")}
        num_zeros = {m: int((pruned_OI == 0).sum()) for m, pruned_OI in pruned.items()}
        assert num_zeros["alps"] == num_zeros["sparsegpt"] >= num_zeros["wanda"] - len(weight_OI)
        ours, theirs, wandas = (_loss(weight_OI, pruned_OI, damped_II) for pruned_OI in pruned.values())
        assert ours <= theirs <= wandas, name
        num_sites += 1
    assert num_sites >= 14


def test_identity_gram_is_nearly_magnitude() -> None:
    """Uncorrelated inputs of equal norm leave nothing to make up for: survivors stay, and magnitude is hardly better."""
    weight_OI, stats = _weight(6, 40), _stats(torch.eye(40))
    pruned_OI = _prune(weight_OI, stats, _target("0.5", "matrix"))
    torch.testing.assert_close(pruned_OI, weight_OI.where(pruned_OI != 0, 0), rtol=0, atol=1e-6)
    best = (weight_OI - _prune(weight_OI, stats, _target("0.5", "matrix"), "magnitude")).square().sum()
    assert best <= (weight_OI - pruned_OI).square().sum() <= 1.02 * best


def test_rows_that_lose_nothing_keep_their_bits() -> None:
    """With scores compared over the whole matrix, a row of large weights stays as it is while the others move."""
    weight_OI, stats = _weight(6, 40), _stats(_inputs("chain", 200, 40))
    weight_OI[2] = weight_OI[2].sign() * (100 + weight_OI[2].abs())
    pruned_OI = _prune(weight_OI, stats, _target("0.5", "matrix"))
    assert torch.equal(pruned_OI[2], weight_OI[2])
    assert not torch.isclose(pruned_OI, weight_OI)[pruned_OI != 0].view(-1)[:40].all()


def test_dead_column_goes_and_couples_to_nothing() -> None:
    """A dead column is pruned however large, and its weights do not change the others'."""
    x_TI = _inputs("chain", 200, 40)
    x_TI[:, 33] = 0
    weight_OI, other_OI = _weight(6, 40), _weight(6, 40)
    other_OI[:, 33] = 1000
    pruned_OI = _prune(weight_OI, _stats(x_TI), _target("0.5", "matrix"))
    assert not pruned_OI[:, 33].any() and int((pruned_OI == 0).sum()) == 120
    assert torch.equal(_prune(other_OI, _stats(x_TI), _target("0.5", "matrix")), pruned_OI)


def test_indefinite_gram_takes_more_damping_and_says_so() -> None:
    """A Gram matrix that rounding made indefinite is damped more, as SparseGPT's is, and the statistics say by how much."""
    stats = _stats(torch.eye(4))
    stats.gram_II = torch.eye(4) + 1.05 * torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.0]])
    pruned_OI = _prune(_weight(3, 4), stats, _target("0.5", "row"))
    assert torch.isfinite(pruned_OI).all() and int((pruned_OI == 0).sum()) == 6
    assert stats.damping_used == pytest.approx(0.1)


def test_sites_that_share_an_input_share_the_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning q, k and v from one group's statistics decomposes once; another damping does it again."""
    dampings: list[float] = []
    monkeypatch.setattr("llmprune.stats.spectrum", lambda gram, damping: (dampings.append(damping), spectrum(gram, damping))[1])
    stats = _stats(_inputs("chain", 200, 24))
    for seed, text in enumerate(("0.5", "0.7", "2:4")):
        _prune(_weight(6, 24, seed), stats, _target(text, "matrix"))
    assert dampings == [DAMPING]
    METHODS["alps"].prune(_weight(6, 24), stats, _target("0.5", "row"), damping=0.1, generator=torch.Generator())
    assert dampings == [DAMPING, 0.1]
