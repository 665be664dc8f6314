"""One contract for every pruning method: registering in METHODS is enough to be held to it.

O out, I in features, T tokens.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

import llmprune.methods
from llmprune.errors import PatternError
from llmprune.methods import METHODS, Method
from llmprune.spec import Need, Pattern, Scope, Target
from llmprune.stats import LinearStats

SPARSITIES = (0.0, 0.3, 0.5, 0.75)
N_TO_M = ("2:4", "4:8", "1:4", "3:4")
SCOPES: tuple[Scope, ...] = get_args(Scope)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COLUMN_BLOCK = 128


def _targets(method: Method) -> list[Target]:
    unstructured = [Target(Pattern(), sparsity, scope) for sparsity in SPARSITIES for scope in SCOPES]
    patterns = [Pattern.parse(text) for text in N_TO_M]
    return unstructured + [Target(pattern, pattern.sparsity or 0, method.scope) for pattern in patterns]


def _name(target: Target) -> str:
    return str(target.pattern) if target.pattern.m else f"{target.sparsity:g}-{target.scope}"


METHOD_LIST = list(METHODS.values())
SUPPORT_ONLY = [method for method in METHOD_LIST if not method.updates_weights]
READS_INPUTS = [method for method in METHOD_LIST if method.needs > Need.NOTHING]


def _whole_rows(target: Target) -> bool:
    return target.pattern.m is None and target.scope != "block"


def _cases(methods: list[Method], where: Callable[[Target], bool] = lambda target: True) -> pytest.MarkDecorator:
    pairs = [(method, target) for method in methods for target in _targets(method) if where(target)]
    assert pairs
    return pytest.mark.parametrize(("method", "target"), pairs, ids=[f"{m.name}-{_name(t)}" for m, t in pairs])


every_case = _cases(METHOD_LIST)
reads_inputs_case = _cases(READS_INPUTS, lambda target: target.sparsity > 0)
support_only_case = _cases(SUPPORT_ONLY)
support_only_whole_rows_case = _cases(SUPPORT_ONLY, _whole_rows)
score_whole_rows_case = _cases([method for method in SUPPORT_ONLY if method.gives == "score"], _whole_rows)
every_method = pytest.mark.parametrize("method", METHOD_LIST, ids=lambda method: method.name)
every_scope = pytest.mark.parametrize("scope", SCOPES)


def _weight(rows: int = 12, columns: int = 136, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def _stats(
    method: Method,
    columns: int = 136,
    *,
    tokens: int = 400,
    dtype: torch.dtype = torch.float32,
    dead: tuple[int, ...] = (),
    scale: float = 1.0,
) -> LinearStats:
    """Correlated inputs of unequal scale; the columns in ``dead`` never see an activation."""
    generator = torch.Generator().manual_seed(7)
    x_TI = torch.randn(tokens, columns, generator=generator)
    x_TI = x_TI + 0.7 * torch.randn(tokens, 1, generator=generator)
    x_TI = x_TI * torch.linspace(0.3, 2.0, columns)[torch.randperm(columns, generator=generator)]
    x_TI[:, list(dead)] = 0
    stats = LinearStats(columns, method.needs, "cpu")
    stats.update((x_TI * scale).to(dtype))
    return stats


def _prune(method: Method, weight_OI: Tensor, stats: LinearStats, target: Target, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return method.prune(weight_OI, stats, target, damping=0.01, generator=generator)


@functools.cache
def _baseline(method: Method, target: Target) -> Tensor:
    """The result on the plain problem, to compare with; not to be written to."""
    return _prune(method, _weight(), _stats(method), target)


@functools.cache
def _is_random(method: Method) -> bool:
    """Whether the seed decides anything."""
    weight_OI, stats, target = _weight(), _stats(method), Target(Pattern(), 0.5, method.scope)
    return not torch.equal(_prune(method, weight_OI, stats, target, 1), _prune(method, weight_OI, stats, target, 2))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


def _rounded(numel: int, sparsity: float) -> int:
    return int(Decimal(str(sparsity)) * numel + Decimal("0.5"))


def _expected_counts(shape: torch.Size, target: Target) -> Tensor:
    """Zeros per comparison set, from the definition and not from the library."""
    rows, columns = shape
    if target.pattern.m is not None and target.pattern.n is not None:
        return torch.full((rows * columns // target.pattern.m,), target.pattern.m - target.pattern.n)
    if target.scope == "row":
        return torch.full((rows,), _rounded(columns, target.sparsity))
    if target.scope == "matrix":
        return torch.tensor([_rounded(rows * columns, target.sparsity)])
    edges = [min(edge, columns) for edge in range(0, columns + COLUMN_BLOCK, COLUMN_BLOCK)]
    upto = [_rounded(rows * edge, target.sparsity) for edge in edges]
    return torch.tensor(upto[1:]) - torch.tensor(upto[:-1])


def _counts(pruned_OI: Tensor, target: Target) -> Tensor:
    zeros_OI = (pruned_OI == 0).long()
    if target.pattern.m is not None:
        return zeros_OI.reshape(-1, target.pattern.m).sum(1)
    if target.scope == "row":
        return zeros_OI.sum(1)
    if target.scope == "matrix":
        return zeros_OI.sum().reshape(1)
    return torch.stack([part.sum() for part in zeros_OI.split(COLUMN_BLOCK, dim=1)])


def test_suite_sees_every_method() -> None:
    """Every file of the methods folder is a line of METHODS, and the suite has cases of each kind."""
    files = {path.stem for path in Path(llmprune.methods.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(METHODS)
    assert SUPPORT_ONLY and READS_INPUTS and len(METHOD_LIST) > len(SUPPORT_ONLY)
    assert all(name == method.name for name, method in METHODS.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@every_case
def test_exact_count_dtype_shape_and_device(method: Method, target: Target, dtype: torch.dtype) -> None:
    """Every comparison set holds exactly the asked zeros, in half precision's many ties too; the dtype is kept."""
    weight_OI = _weight(dtype=dtype)
    assert not (weight_OI == 0).any()
    pruned_OI = _prune(method, weight_OI, _stats(method, dtype=dtype), target)
    assert (pruned_OI.dtype, pruned_OI.shape, pruned_OI.device) == (dtype, weight_OI.shape, weight_OI.device)
    assert torch.isfinite(pruned_OI).all()
    assert _counts(pruned_OI, target).tolist() == _expected_counts(weight_OI.shape, target).tolist()
    # Sparse kernels have tripped over -0.0 (vllm#13198).
    assert not torch.signbit(pruned_OI[pruned_OI == 0]).any()


@pytest.mark.parametrize("shape", [(3, 259), (1, 37), (9, 1), (1, 1)], ids=str)
@every_scope
@every_method
def test_exact_count_on_awkward_shapes(method: Method, scope: Scope, shape: tuple[int, int]) -> None:
    """Odd widths, a single row and a single column round once per comparison set and stay finite."""
    weight_OI, stats = _weight(*shape), _stats(method, shape[1])
    for sparsity in (0.3, 0.85):
        target = Target(Pattern(), sparsity, scope)
        pruned_OI = _prune(method, weight_OI, stats, target)
        assert torch.isfinite(pruned_OI).all()
        assert _counts(pruned_OI, target).tolist() == _expected_counts(weight_OI.shape, target).tolist()


@pytest.mark.parametrize("num_groups", [1, 19])
@pytest.mark.parametrize("text", N_TO_M)
@every_method
def test_n_of_m_on_awkward_shapes(method: Method, text: str, num_groups: int) -> None:
    """A single group and widths that 128 does not divide keep exactly n of every m, also in a single row."""
    pattern = Pattern.parse(text)
    assert pattern.m is not None and pattern.sparsity is not None
    columns = num_groups * pattern.m
    target = Target(pattern, pattern.sparsity, method.scope)
    for rows in (1, 5):
        pruned_OI = _prune(method, _weight(rows, columns), _stats(method, columns), target)
        assert _counts(pruned_OI, target).tolist() == _expected_counts(pruned_OI.shape, target).tolist()


@support_only_case
def test_survivors_are_bit_equal(method: Method, target: Target) -> None:
    """A method that does not update weights leaves every survivor as it was, sign included."""
    weight_OI = _weight()
    assert (weight_OI < 0).any()
    dense_OI = weight_OI.clone()
    pruned_OI = _prune(method, weight_OI, _stats(method), target)
    kept_OI = pruned_OI != 0
    assert kept_OI.any()
    assert torch.equal(_bits(pruned_OI)[kept_OI], _bits(dense_OI)[kept_OI])


@every_case
def test_inputs_are_not_mutated_nor_shared(method: Method, target: Target) -> None:
    """Weight and statistics come out as they went in, and the result is new memory where a view would do."""
    one_column = [_weight(columns=1)] if target.pattern.m is None else []
    for weight_OI in [_weight(5, 24), _weight(5, 24).T.contiguous().T, _weight(1, 24), *one_column]:
        dense_OI, stats = weight_OI.clone(), _stats(method, weight_OI.shape[1], tokens=20)
        before = copy.deepcopy(stats)
        pruned_OI = _prune(method, weight_OI, stats, target)
        assert torch.equal(_bits(weight_OI), _bits(dense_OI))
        assert pruned_OI.untyped_storage().data_ptr() != weight_OI.untyped_storage().data_ptr()
        assert torch.equal(stats.sq_I, before.sq_I)
        for ours, theirs in ((stats.sum_I, before.sum_I), (stats.gram_II, before.gram_II)):
            assert (ours is None) == (theirs is None)
            assert ours is None or theirs is None or torch.equal(ours, theirs)


@every_case
def test_transposed_view_prunes_like_its_copy(method: Method, target: Target) -> None:
    """Strides do not change the result."""
    weight_OI, stats = _weight(), _stats(method)
    view_OI = weight_OI.T.contiguous().T
    assert not view_OI.is_contiguous()
    assert torch.equal(_prune(method, view_OI, stats, target), _baseline(method, target))


@every_case
def test_row_permutation_commutes(method: Method, target: Target) -> None:
    """Outputs do not know their position: permuting rows permutes the result."""
    if _is_random(method):
        pytest.skip("random scores belong to positions")
    weight_OI, stats = _weight(), _stats(method)
    order_O = torch.randperm(len(weight_OI), generator=torch.Generator().manual_seed(3))
    pruned_OI = _baseline(method, target)[order_O]
    permuted_OI = _prune(method, weight_OI[order_O], stats, target)
    assert torch.equal(permuted_OI == 0, pruned_OI == 0)
    torch.testing.assert_close(permuted_OI, pruned_OI, rtol=1e-5, atol=1e-5)


@support_only_whole_rows_case
def test_column_permutation_commutes_where_sets_hold_all_columns(method: Method, target: Target) -> None:
    """Without updates, weights compared over whole rows or the whole matrix do not know their column."""
    if _is_random(method):
        pytest.skip("random scores belong to positions")
    weight_OI, stats = _weight(), _stats(method)
    order_I = torch.randperm(weight_OI.shape[1], generator=torch.Generator().manual_seed(4))
    permuted = LinearStats(weight_OI.shape[1], method.needs, "cpu")
    permuted.num_tokens, permuted.sq_I = stats.num_tokens, stats.sq_I[order_I]
    permuted.sum_I = None if stats.sum_I is None else stats.sum_I[order_I]
    expected_OI = _baseline(method, target)[:, order_I]
    assert torch.equal(_prune(method, weight_OI[:, order_I], permuted, target), expected_OI)


@every_case
def test_scaling_the_weight_keeps_the_support(method: Method, target: Target) -> None:
    """W -> cW gives c times the result; c is a power of two, so every rounding scales along and equality is exact."""
    stats = _stats(method)
    assert torch.equal(_prune(method, _weight() * -8, stats, target), _baseline(method, target) * -8)


@reads_inputs_case
def test_scaling_the_inputs_changes_nothing(method: Method, target: Target) -> None:
    """X -> cX changes neither support nor weights: damping is relative to the Gram matrix."""
    scaled_OI = _prune(method, _weight(), _stats(method, scale=64), target)
    assert torch.equal(scaled_OI, _baseline(method, target))


@every_case
def test_pruning_twice_is_pruning_once(method: Method, target: Target) -> None:
    """What is zero is pruned first, so a second run finds nothing to do."""
    stats = _stats(method, dead=(5, 40, 41))
    once_OI = _prune(method, _weight(), stats, target)
    assert torch.equal(_prune(method, once_OI.clone(), stats, target, seed=1), once_OI)


@score_whole_rows_case
def test_supports_are_nested(method: Method, target: Target) -> None:
    """Where scores alone decide, what survives a higher sparsity survives a lower one."""
    weight_OI, stats = _weight(), _stats(method)
    lower_OI = _prune(method, weight_OI.clone(), stats, target) != 0
    higher_OI = _prune(method, weight_OI.clone(), stats, Target(target.pattern, target.sparsity + 0.1, target.scope)) != 0
    assert higher_OI.sum() < lower_OI.sum()
    assert not (higher_OI & ~lower_OI).any()


@reads_inputs_case
def test_dead_inputs_go_first(method: Method, target: Target) -> None:
    """Columns no token reached lose all their weights before any other column loses one."""
    dead = (5, 40, 77, 130)  # one at most of any n:m group; both column blocks have some
    weight_OI = _weight()
    weight_OI[:, list(dead)] *= 100
    pruned_OI = _prune(method, weight_OI, _stats(method, dead=dead), target)
    assert (pruned_OI[:, list(dead)] == 0).all()
    assert _counts(pruned_OI, target).tolist() == _expected_counts(weight_OI.shape, target).tolist()
    assert torch.isfinite(pruned_OI).all()


@reads_inputs_case
def test_more_dead_inputs_than_the_target_prunes_only_dead_ones(method: Method, target: Target) -> None:
    """Dead columns are pruned up to the target and never beyond it, and live ones are then left bit-equal."""
    live = list(range(0, 136, 8))
    dead = tuple(sorted(set(range(136)) - set(live)))
    weight_OI = _weight()
    dense_OI = weight_OI.clone()
    pruned_OI = _prune(method, weight_OI, _stats(method, dead=dead), target)
    assert torch.equal(pruned_OI[:, live], dense_OI[:, live])
    assert _counts(pruned_OI, target).tolist() == _expected_counts(weight_OI.shape, target).tolist()


@pytest.mark.parametrize("tokens", [0, 7])
@reads_inputs_case
def test_fewer_tokens_than_inputs_stays_finite(method: Method, target: Target, tokens: int) -> None:
    """A rank-deficient Gram matrix, and even an empty calibration, give a finite result with exact counts."""
    weight_OI = _weight()
    pruned_OI = _prune(method, weight_OI, _stats(method, tokens=tokens), target)
    assert torch.isfinite(pruned_OI).all()
    assert _counts(pruned_OI, target).tolist() == _expected_counts(weight_OI.shape, target).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@every_scope
@every_method
def test_zero_percent_is_bit_exact(method: Method, scope: Scope, dtype: torch.dtype) -> None:
    """At sparsity 0 every bit stays, the sign of zero and dead columns' weights included."""
    weight_OI = _weight(dtype=dtype)
    weight_OI[0, 0], weight_OI[1, 1] = -0.0, 0.0
    dense_OI = weight_OI.clone()
    pruned_OI = _prune(method, weight_OI, _stats(method, dead=(3, 4)), Target(Pattern(), 0.0, scope))
    assert torch.equal(_bits(pruned_OI), _bits(dense_OI))


@every_scope
@every_method
def test_hundred_percent_is_all_zeros(method: Method, scope: Scope) -> None:
    """At sparsity 1 nothing survives."""
    weight_OI = _weight()
    pruned_OI = _prune(method, weight_OI, _stats(method), Target(Pattern(), 1.0, scope))
    assert pruned_OI.shape == (12, 136)
    assert not pruned_OI.any()


@pytest.mark.parametrize("text", N_TO_M)
@every_method
def test_scope_does_not_matter_for_n_of_m(method: Method, text: str) -> None:
    """The comparison set of n:m is the group, whatever scope is asked for."""
    pattern = Pattern.parse(text)
    assert pattern.sparsity is not None
    results = [
        _prune(method, _weight(), _stats(method), Target(pattern, sparsity, scope))
        for scope, sparsity in zip(SCOPES, (pattern.sparsity, 0.1, 0.9), strict=True)
    ]
    assert all(torch.equal(result, results[0]) for result in results[1:])


@every_method
def test_same_seed_same_result(method: Method) -> None:
    """The generator handed in is the only source of randomness."""
    target = Target(Pattern(), 0.5, method.scope)
    torch.manual_seed(1)
    first_OI = _prune(method, _weight(), _stats(method), target)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(_prune(method, _weight(), _stats(method), target), first_OI)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("columns", [1, 10, 129])
@pytest.mark.parametrize("text", N_TO_M)
def test_indivisible_width_names_the_site_and_the_remedy(text: str, columns: int) -> None:
    """n:m on a width m does not divide says what, where, and two ways out, in one line."""
    pattern = Pattern.parse(text)
    with pytest.raises(PatternError) as caught:
        pattern.check(columns, "model.layers.3.mlp.down_proj")
    message = str(caught.value)
    for part in (text, str(columns), str(pattern.m), "model.layers.3.mlp.down_proj", "--skip '*.down_proj'"):
        assert part in message
    assert "\n" not in message


def test_divisible_width_passes() -> None:
    """Widths that m divides, and every unstructured width, pass the check."""
    for text in N_TO_M:
        Pattern.parse(text).check(136, "site")
    Pattern().check(7, "site")
