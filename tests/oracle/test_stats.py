"""Input statistics and their factor against fp64. I in features, T tokens, N samples, S sequence."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmprune.errors import FactorizationError
from llmprune.linalg import MAX_DAMPING, inverse_factor, spectrum
from llmprune.spec import Need
from llmprune.stats import LinearStats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float32).eps


def _inputs(tokens: int = 1500, columns: int = 24, seed: int = 0) -> Tensor:
    """Correlated inputs with one column a thousand times larger, as in trained models."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(tokens, columns, generator=generator) + 0.5 * torch.randn(tokens, 1, generator=generator)
    x_TI[:, 3] *= 1000
    return x_TI


def _collect(parts: list[Tensor], need: Need) -> LinearStats:
    stats = LinearStats(parts[0].shape[-1], need, "cpu")
    for part in parts:
        stats.update(part)
    return stats


def _no_worse_than_torch(ours: Tensor, naive: Tensor, ref64: Tensor) -> None:
    """|ours - ref64| <= 2 |torch - ref64| + tiny, relative to each entry's own scale."""
    scale = ref64.abs() + ref64.abs().max() * 1e-12
    ours_error = ((ours.double() - ref64).abs() / scale).max()
    naive_error = ((naive.double() - ref64).abs() / scale).max()
    assert ours_error <= 2 * naive_error + 8 * EPS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("need", [Need.NORM, Need.MEAN, Need.GRAM], ids=lambda need: need.name)
def test_sums_lose_no_more_than_torch(need: Need, dtype: torch.dtype) -> None:
    """Sums of squares and products are as near to fp64 as one plain fp32 sum, also from half-precision inputs."""
    x_TI = _inputs().to(dtype)
    stats = _collect([x_TI], need)
    x64_TI, x32_TI = x_TI.double(), x_TI.float()
    assert stats.sq_I.dtype == torch.float32
    _no_worse_than_torch(stats.sq_I, x32_TI.square().sum(0), x64_TI.square().sum(0))
    assert (stats.sum_I is not None) == (need >= Need.MEAN)
    if stats.sum_I is not None:
        # A sum may cancel, so its scale is that of the column.
        ours_error, naive_error = (sum_I.double() - x64_TI.sum(0) for sum_I in (stats.sum_I, x32_TI.sum(0)))
        scale_I = x64_TI.abs().sum(0)
        assert (ours_error.abs() / scale_I).max() <= 2 * (naive_error.abs() / scale_I).max() + 8 * EPS
    assert (stats.gram_II is not None) == (need == Need.GRAM)
    if stats.gram_II is not None:
        assert stats.gram_II.dtype == torch.float32
        naive_II, ref64_II = x32_TI.T @ x32_TI, x64_TI.T @ x64_TI
        # An off-diagonal sum may cancel, so its scale is that of the two columns.
        scale_II = ref64_II.diagonal().sqrt()[:, None] * ref64_II.diagonal().sqrt()
        ours_error = ((stats.gram_II.double() - ref64_II).abs() / scale_II).max()
        assert ours_error <= 2 * ((naive_II.double() - ref64_II).abs() / scale_II).max() + 8 * EPS


@pytest.mark.parametrize("split", [100_000, 2048], ids=["one update", "many updates"])
@pytest.mark.parametrize("need", [Need.NORM, Need.MEAN, Need.GRAM], ids=lambda need: need.name)
def test_long_texts_do_not_drift(need: Need, split: int) -> None:
    """A hundred thousand tokens, all at once or in many updates, lose little more than a short text."""
    x_TI = _inputs(tokens=100_000, columns=4)
    stats = _collect(list(x_TI.split(split)), need)
    ref64_I = x_TI.double().square().sum(0)
    assert ((stats.sq_I.double() - ref64_I).abs() / ref64_I).max() < 1e-5


@pytest.mark.parametrize("need", [Need.NORM, Need.MEAN, Need.GRAM], ids=lambda need: need.name)
def test_integer_inputs_are_summed_exactly(need: Need) -> None:
    """Small integers have sums that fp32 holds exactly, whatever the order of summation."""
    x_TI = torch.randint(-4, 5, (300, 10), generator=torch.Generator().manual_seed(0)).float()
    stats = _collect(list(x_TI.split(70)), need)
    torch.testing.assert_close(stats.sq_I.double(), x_TI.double().square().sum(0), rtol=4 * EPS, atol=0)
    if stats.gram_II is not None:
        assert torch.equal(stats.gram_II.double(), x_TI.double().T @ x_TI.double())


@pytest.mark.parametrize("split", [[1500], [1, 1499], [700, 800], [0, 1500], [500, 0, 500, 500]], ids=str)
@pytest.mark.parametrize("need", list(Need), ids=lambda need: need.name)
def test_any_split_and_any_merge_is_one_pass(need: Need, split: list[int]) -> None:
    """Updates in any split, and shards merged in any order, give the sums of one pass."""
    x_TI = _inputs()
    whole = _collect([x_TI], need)
    parts = list(x_TI.split(split))
    shards = [_collect([part], need) for part in reversed(parts)]
    for shard in shards[1:]:
        shards[0].merge(shard)
    for stats in (_collect(parts, need), shards[0]):
        assert stats.num_tokens == whole.num_tokens == 1500
        torch.testing.assert_close(stats.sq_I, whole.sq_I, rtol=1e-5, atol=0)
        if whole.sum_I is not None:
            assert stats.sum_I is not None
            assert ((stats.sum_I - whole.sum_I).abs() / x_TI.abs().sum(0)).max() < 1e-5
        if whole.gram_II is not None:
            assert stats.gram_II is not None
            scale_II = whole.sq_I.sqrt()[:, None] * whole.sq_I.sqrt()
            assert ((stats.gram_II - whole.gram_II).abs() / scale_II).max() < 1e-5


def test_mean_and_variance_are_those_of_the_tokens() -> None:
    """Against fp64; an input that never varies keeps a variance that can be divided by, one that is dead has none."""
    x_TI = _inputs() + 0.5
    x_TI[:, 5], x_TI[:, 6] = 7.3, 0.0
    stats = _collect(list(x_TI.split(400)), Need.MEAN)
    varying = [column for column in range(24) if column not in (5, 6)]
    torch.testing.assert_close(stats.mean_I.double(), x_TI.double().mean(0), rtol=1e-4, atol=1e-5)
    expected_I = x_TI.double().var(0, correction=0)
    torch.testing.assert_close(stats.variance_I.double()[varying], expected_I[varying], rtol=1e-4, atol=0)
    assert 0 < stats.variance_I[5] < 1e-2 and stats.variance_I[6] == 0
    empty = LinearStats(3, Need.MEAN, "cpu")
    assert not empty.mean_I.any() and not empty.variance_I.any()


def test_merge_leaves_the_other_alone() -> None:
    """Merging reads the other shard and shares no memory with it."""
    one, other = _collect([_inputs(seed=1)], Need.GRAM), _collect([_inputs(seed=2)], Need.GRAM)
    assert one.gram_II is not None and other.gram_II is not None
    sq_I, gram_II = other.sq_I.clone(), other.gram_II.clone()
    one.merge(other)
    one.update(_inputs(seed=3))
    assert torch.equal(other.sq_I, sq_I) and torch.equal(other.gram_II, gram_II) and other.num_tokens == 1500


@pytest.mark.parametrize("need", list(Need), ids=lambda need: need.name)
def test_tokens_are_counted_over_all_leading_axes(need: Need) -> None:
    """[N, S, I], [T, I] and [I] hold N * S, T and 1 tokens; what the level does not need stays empty."""
    stats = LinearStats(6, need, "cpu")
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(*shape, 6, generator=generator) for shape in ((2, 5), (7,), ())]
    for batch in batches:
        stats.update(batch)
    assert stats.num_tokens == 10 + 7 + 1
    assert (stats.gram_II is not None) == (need == Need.GRAM)
    flat_TI = torch.cat([batch.reshape(-1, 6) for batch in batches])
    expected_I = flat_TI.square().sum(0) if need > Need.NOTHING else torch.zeros(6)
    torch.testing.assert_close(stats.sq_I, expected_I)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("need", [Need.NORM, Need.MEAN, Need.GRAM], ids=lambda need: need.name)
def test_inputs_are_read_only_and_carry_no_gradient(need: Need, dtype: torch.dtype) -> None:
    """Activations are left alone, and the sums keep no autograd graph alive."""
    x_TI = _inputs(tokens=20).clamp(-1000, 1000).to(dtype).requires_grad_()
    before_TI = x_TI.detach().clone()
    stats = _collect([x_TI], need)
    assert torch.equal(x_TI.detach(), before_TI)
    assert not stats.sq_I.requires_grad
    assert stats.gram_II is None or not stats.gram_II.requires_grad


def test_half_precision_sums_do_not_overflow() -> None:
    """fp16 activations of 3e4, whose squares fp16 cannot hold, are summed in fp32."""
    x_TI = torch.full((100, 2), 3e4, dtype=torch.float16)
    for need in (Need.NORM, Need.MEAN, Need.GRAM):
        torch.testing.assert_close(_collect([x_TI], need).sq_I, torch.full((2,), 100 * 3e4**2), rtol=1e-3, atol=0)


def test_gram_is_symmetric_with_the_squares_on_its_diagonal() -> None:
    """The Gram matrix is symmetric to rounding, and sq is its diagonal exactly, so both agree on what is dead."""
    x_TI = _inputs()
    x_TI[:, 7] = 0
    stats = _collect(list(x_TI.split(400)), Need.GRAM)
    assert stats.gram_II is not None
    torch.testing.assert_close(stats.gram_II, stats.gram_II.T, rtol=1e-5, atol=1e-2)
    assert torch.equal(stats.sq_I, stats.gram_II.diagonal())
    assert (stats.sq_I == 0).nonzero().flatten().tolist() == [7]


def _inverse64(gram_II: Tensor, damping: float) -> Tensor:
    """(G + damping * mean(diag G) Id)^-1 in fp64; dead inputs get the mean as their diagonal."""
    work_II = gram_II.double().clone()
    mean = work_II.diagonal().mean()
    for j in range(len(work_II)):
        if work_II[j, j] == 0:
            work_II[j, j] = mean
        work_II[j, j] += damping * mean
    return torch.linalg.inv(work_II)


@pytest.mark.parametrize("columns", [1, 2, 17, 130])
@pytest.mark.parametrize("tokens", [3, 1500])
def test_factor_is_upper_triangular_and_squares_to_the_inverse(tokens: int, columns: int) -> None:
    """U is exactly upper triangular with a positive diagonal, and U^T U is the damped inverse, at any rank."""
    gram_II = _inputs(tokens, columns + 4)[:, 4:].double()
    gram_II = (gram_II.T @ gram_II).float()
    before_II = gram_II.clone()
    factor_II, used = inverse_factor(gram_II, 0.01)
    assert (factor_II.dtype, used) == (torch.float32, 0.01)
    assert torch.equal(factor_II, factor_II.triu())
    assert (factor_II.diagonal() > 0).all()
    assert torch.equal(gram_II, before_II)
    inverse64_II = _inverse64(gram_II, 0.01)
    reference_II = torch.linalg.cholesky(inverse64_II, upper=True)
    torch.testing.assert_close(factor_II.double().T @ factor_II.double(), inverse64_II, rtol=0, atol=_tiny(inverse64_II))
    torch.testing.assert_close(factor_II.double(), reference_II, rtol=0, atol=_tiny(reference_II))


def _tiny(reference: Tensor) -> float:
    """Rounding of the stored fp32 factor, which is all that may be lost: the work is fp64."""
    return 4 * EPS * float(reference.abs().max())


def test_factor_of_an_ill_conditioned_matrix_is_worked_in_fp64() -> None:
    """With condition number 1e7, where an fp32 inverse loses everything, only the final rounding is lost."""
    generator = torch.Generator().manual_seed(0)
    basis_II = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64)).Q
    gram_II = ((basis_II * torch.logspace(0, -9, 30, dtype=torch.float64)) @ basis_II.T).float()
    gram_II = (gram_II + gram_II.T) / 2
    factor_II, used = inverse_factor(gram_II, 1e-6)
    assert used == 1e-6
    reference_II = torch.linalg.cholesky(_inverse64(gram_II, 1e-6), upper=True)
    torch.testing.assert_close(factor_II.double(), reference_II, rtol=0, atol=_tiny(reference_II))


def test_dead_inputs_are_decoupled() -> None:
    """An input no token reached has only its diagonal in the factor, and the others' factor does not see it."""
    x_TI = _inputs(columns=12)
    x_TI[:, [0, 5, 11]] = 0
    stats = _collect([x_TI], Need.GRAM)
    assert stats.damping_used is None
    factor_II = stats.inverse_factor(0.01)
    assert stats.damping_used == 0.01
    assert torch.isfinite(factor_II).all()
    for j in (0, 5, 11):
        assert factor_II[j].count_nonzero() == factor_II[:, j].count_nonzero() == 1
        assert factor_II[j, j] > 0
    live = [j for j in range(12) if j not in (0, 5, 11)]
    assert stats.gram_II is not None
    reference_II = torch.linalg.cholesky(_inverse64(stats.gram_II, 0.01), upper=True)[live][:, live]
    torch.testing.assert_close(factor_II[live][:, live].double(), reference_II, rtol=0, atol=_tiny(reference_II))


def test_all_dead_inputs_give_a_diagonal_factor() -> None:
    """Without a single activation the factor is a multiple of the identity, not NaN."""
    factor_II, used = inverse_factor(torch.zeros(4, 4), 0.01)
    assert used == 0.01
    torch.testing.assert_close(factor_II, torch.eye(4) / 1.01**0.5)


def test_indefinite_matrix_raises_the_damping_and_says_so() -> None:
    """A negative eigenvalue takes more damping than was asked for; the damping returned is the one that was used."""
    gram_II = torch.tensor([[1.0, 1.05], [1.05, 1.0]])  # eigenvalues 2.05 and -0.05
    factor_II, used = inverse_factor(gram_II, 0.01)
    assert used == pytest.approx(0.1)
    torch.testing.assert_close(factor_II.double().T @ factor_II.double(), _inverse64(gram_II, used), rtol=1e-5, atol=0)


def test_hopelessly_indefinite_matrix_raises() -> None:
    """What the highest damping cannot mend is an error that names it, and not an identity matrix."""
    with pytest.raises(FactorizationError, match=f"damping {MAX_DAMPING:g}"):
        inverse_factor(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), 0.01)


@pytest.mark.parametrize("columns", [1, 2, 17, 130])
@pytest.mark.parametrize("tokens", [3, 1500])
def test_spectrum_is_the_damped_matrix(tokens: int, columns: int) -> None:
    """S C S is the damped matrix up to one factor, C has a unit diagonal, and Q L Q^T is C, at any rank."""
    gram_II = _inputs(tokens, columns + 4)[:, 4:].double()
    gram_II = (gram_II.T @ gram_II).float()
    before_II = gram_II.clone()
    solved, used = spectrum(gram_II, 0.01)
    assert used == 0.01 and torch.equal(gram_II, before_II)
    damped_II = torch.linalg.inv(_inverse64(gram_II, 0.01))
    scaled_II = solved.scale_I[:, None].double() * solved.unit_II.double() * solved.scale_I.double()
    torch.testing.assert_close(scaled_II * damped_II.diagonal().mean(), damped_II, rtol=0, atol=_tiny(damped_II))
    assert torch.equal(solved.unit_II.diagonal(), torch.ones(columns))
    vectors_II = solved.vectors_II.double()
    eye_II = torch.eye(columns, dtype=torch.float64)
    torch.testing.assert_close(vectors_II.T @ vectors_II, eye_II, rtol=0, atol=1e-6)
    assert (solved.values_I >= 0).all()
    again_II = vectors_II * solved.values_I.double() @ vectors_II.T
    torch.testing.assert_close(again_II, solved.unit_II.double(), rtol=0, atol=1e-6 * float(solved.values_I[-1]))


def test_spectrum_raises_the_damping_as_the_factor_does() -> None:
    """Dead inputs are decoupled, indefinite matrices damped more, and hopeless ones refused."""
    solved, _ = spectrum(torch.diag(torch.tensor([4.0, 0.0, 1.0])), 0.01)
    assert torch.equal(solved.unit_II, torch.eye(3))
    assert spectrum(torch.tensor([[1.0, 1.05], [1.05, 1.0]]), 0.01)[1] == pytest.approx(0.1)
    with pytest.raises(FactorizationError, match=f"damping {MAX_DAMPING:g}"):
        spectrum(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), 0.01)


def test_one_factorisation_is_kept_at_a_time() -> None:
    """Asking for the other one computes it anew: a group of sites is pruned by one method."""
    stats = _collect([_inputs()], Need.GRAM)
    first, second = stats.spectrum(0.01), stats.spectrum(0.01)
    assert first is second
    assert stats.inverse_factor(0.01) is stats.inverse_factor(0.01)
    assert stats.spectrum(0.01) is not first


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 1)], ids=str)
def test_non_finite_matrix_raises(bad: float, place: tuple[int, int]) -> None:
    """NaN or inf anywhere raises at once, also below the diagonal that a factorisation may not read."""
    gram_II = torch.eye(3)
    gram_II[place] = bad
    with pytest.raises(FactorizationError, match="NaN or inf"):
        inverse_factor(gram_II, 0.01)


def test_activation_overflow_reaches_the_user() -> None:
    """A NaN activation is not averaged away: the factor of its statistics raises."""
    x_TI = _inputs(tokens=10)
    x_TI[4, 2] = torch.nan
    with pytest.raises(FactorizationError):
        _collect([x_TI], Need.GRAM).inverse_factor(0.01)


def test_factor_is_kept_until_the_sums_or_the_damping_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites that share an input share one factorisation; update, merge and another damping each start a new one."""
    calls = itertools.count(1)
    num_calls = 0

    def counted(gram_II: Tensor, damping: float) -> tuple[Tensor, float]:
        nonlocal num_calls
        num_calls = next(calls)
        return inverse_factor(gram_II, damping)

    monkeypatch.setattr("llmprune.stats.inverse_factor", counted)
    stats, more = _collect([_inputs()], Need.GRAM), _collect([_inputs(seed=1)], Need.GRAM)
    first_II = stats.inverse_factor(0.01)
    assert stats.inverse_factor(0.01) is first_II
    assert (num_calls, stats.damping_used) == (1, 0.01)
    stats.inverse_factor(0.1)
    assert (num_calls, stats.damping_used) == (2, 0.1)
    stats.update(_inputs(seed=2))
    second_II = stats.inverse_factor(0.1)
    assert num_calls == 3
    stats.merge(more)
    third_II = stats.inverse_factor(0.1)
    assert num_calls == 4
    assert not torch.equal(second_II, third_II)
