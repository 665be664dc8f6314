"""Supports against stable sorts and brute force. O out, I in features."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmprune.masks import COLUMN_BLOCK, block_counts, keep_highest, keep_mask
from llmprune.spec import Pattern, Scope, num_pruned

SCOPES: tuple[Scope, ...] = ("row", "matrix", "block")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

deterministic = settings(max_examples=30)
tied_score = st.one_of(st.integers(-3, 3).map(float), st.sampled_from([math.inf, -math.inf, -0.0]))


@st.composite
def score_matrices(draw: st.DrawFn, max_columns: int = 12, multiple_of: int = 1) -> list[list[float]]:
    """Small matrices with many ties, infinities and both zeros."""
    columns = multiple_of * draw(st.integers(1, max(1, max_columns // multiple_of)))
    return draw(st.lists(st.lists(tied_score, min_size=columns, max_size=columns), min_size=1, max_size=4))


def lowest_by_stable_sort(values: list[float], count: int) -> set[int]:
    """Positions of the ``count`` lowest; Python's sort is stable, so the earlier of equals comes first."""
    return set(sorted(range(len(values)), key=lambda i: values[i])[:count])


def reference(score_OI: list[list[float]], sparsity: float, scope: Scope) -> list[list[bool]]:
    """The definition of every scope, on lists."""
    rows, columns = len(score_OI), len(score_OI[0])
    share = Fraction(str(sparsity))

    def rounded(numel: int) -> int:
        return math.floor(numel * share + Fraction(1, 2))

    if scope == "row":
        sets = [([(r, c) for c in range(columns)], rounded(columns)) for r in range(rows)]
    else:
        width = COLUMN_BLOCK if scope == "block" else columns
        sets = []
        for start in range(0, columns, width):
            stop = min(start + width, columns)
            cells = [(r, c) for r in range(rows) for c in range(start, stop)]
            sets.append((cells, rounded(rows * stop) - rounded(rows * start)))
    keep = [[True] * columns for _ in range(rows)]
    for cells, count in sets:
        for i in lowest_by_stable_sort([score_OI[r][c] for r, c in cells], count):
            keep[cells[i][0]][cells[i][1]] = False
    return keep


@deterministic
@given(score_matrices(), st.integers(-1, 14))
def test_keep_highest_is_a_stable_sort(score_RC: list[list[float]], count: int) -> None:
    """The selection gives the support of a stable ascending sort, for every count and with many ties."""
    keep_RC = keep_highest(torch.tensor(score_RC), count)
    assert keep_RC.dtype == torch.bool
    for keep_C, score_C in zip(keep_RC.tolist(), score_RC, strict=True):
        lowest = lowest_by_stable_sort(score_C, max(count, 0))
        assert keep_C == [c not in lowest for c in range(len(score_C))]


@pytest.mark.parametrize("scope", SCOPES)
@deterministic
@given(score_OI=score_matrices(), sparsity=st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.7, 0.75, 0.85, 0.99, 1.0]))
def test_keep_mask_is_a_stable_sort(scope: Scope, score_OI: list[list[float]], sparsity: float) -> None:
    """Every scope gives the support of a stable sort within its comparison set."""
    keep_OI = keep_mask(torch.tensor(score_OI), Pattern(), sparsity, scope)
    assert keep_OI.tolist() == reference(score_OI, sparsity, scope)


@pytest.mark.parametrize("columns", [127, 128, 129, 300])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75])
@pytest.mark.parametrize("scope", SCOPES)
def test_keep_mask_around_the_block_width(scope: Scope, sparsity: float, columns: int) -> None:
    """Widths on both sides of 128 fall into the right blocks, with tied integer scores."""
    score_OI = torch.randint(0, 9, (3, columns), generator=torch.Generator().manual_seed(columns)).float()
    keep_OI = keep_mask(score_OI, Pattern(), sparsity, scope)
    assert keep_OI.tolist() == reference(score_OI.tolist(), sparsity, scope)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_keep_mask_in_every_dtype(scope: Scope, dtype: torch.dtype) -> None:
    """Half precision and integer scores give the same support as the same values in fp32."""
    score_OI = torch.randint(-20, 20, (4, 140), generator=torch.Generator().manual_seed(0))
    keep_OI = keep_mask(score_OI.to(dtype), Pattern(), 0.6, scope)
    assert keep_OI.tolist() == reference(score_OI.tolist(), 0.6, scope)
    two_of_four = Pattern.parse("2:4")
    expected_OI = keep_mask(score_OI.float(), two_of_four, 0.5, scope)
    assert torch.equal(keep_mask(score_OI.to(dtype), two_of_four, 0.5, scope), expected_OI)


@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "3:4", "4:8", "5:8"])
@deterministic
@given(data=st.data())
def test_n_of_m_is_a_stable_sort_of_every_group(text: str, data: st.DataObject) -> None:
    """n:m keeps the n highest of every group, the later one among equals."""
    pattern = Pattern.parse(text)
    assert pattern.n is not None and pattern.m is not None
    score_OI = data.draw(score_matrices(max_columns=24, multiple_of=pattern.m))
    keep_OI = keep_mask(torch.tensor(score_OI), pattern, 0.123, "row").tolist()
    for keep_I, score_I in zip(keep_OI, score_OI, strict=True):
        for start in range(0, len(score_I), pattern.m):
            lowest = lowest_by_stable_sort(score_I[start : start + pattern.m], pattern.m - pattern.n)
            assert keep_I[start : start + pattern.m] == [i not in lowest for i in range(pattern.m)]


@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "3:4", "4:8"])
def test_n_of_m_keeps_the_best_of_all_subsets(text: str) -> None:
    """No other choice of n in a group keeps a larger sum of scores."""
    pattern = Pattern.parse(text)
    assert pattern.n is not None and pattern.m is not None
    score_OI = torch.randn(6, 3 * pattern.m, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    keep_OI = keep_mask(score_OI, pattern, 0.5, "row")
    for score_G, keep_G in zip(score_OI.reshape(-1, pattern.m), keep_OI.reshape(-1, pattern.m), strict=True):
        subsets = itertools.combinations(score_G.tolist(), pattern.n)
        assert int(keep_G.sum()) == pattern.n
        assert float(score_G[keep_G].sum()) == pytest.approx(max(map(sum, subsets)), abs=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [0.0, 1.0, math.inf, -math.inf])
def test_among_equals_the_earlier_goes_first(value: float, device: str) -> None:
    """All-equal scores are pruned by position, in row-major order of each comparison set, on every device."""
    score_OI = torch.full((2, 132), value, device=device)

    def pruned(pattern: Pattern, scope: Scope, sparsity: float) -> Tensor:
        return ~keep_mask(score_OI, pattern, sparsity, scope).cpu()

    row_OI = pruned(Pattern(), "row", 0.25)
    assert row_OI[:, :33].all() and not row_OI[:, 33:].any()
    matrix_OI = pruned(Pattern(), "matrix", 0.25)
    assert matrix_OI[0, :66].all() and int(matrix_OI.sum()) == 66
    block_OI = pruned(Pattern(), "block", 0.25)
    assert block_OI[0, :64].all() and block_OI[0, 128:130].all() and int(block_OI.sum()) == 66
    group_OI = pruned(Pattern.parse("1:4"), "row", 0.75).reshape(-1, 4)
    assert group_OI[:, :3].all() and not group_OI[:, 3].any()


@pytest.mark.skipif(len(DEVICES) == 1, reason="no GPU")
def test_gpu_and_cpu_choose_the_same_support() -> None:
    """The same scores give the same support on the CPU and on a GPU, ties and infinities included."""
    score_OI = torch.randint(-30, 30, (64, 1000), generator=torch.Generator().manual_seed(2)).float()
    score_OI[:, ::50], score_OI[:, 1::50] = math.inf, -math.inf
    for pattern, scope in itertools.product((Pattern(), Pattern(2, 4)), SCOPES):
        expected_OI = keep_mask(score_OI, pattern, 0.55, scope)
        assert torch.equal(keep_mask(score_OI.cuda(), pattern, 0.55, scope).cpu(), expected_OI)


@pytest.mark.parametrize("text", ["unstructured", "2:4"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_nan_scores_raise(scope: Scope, text: str, sparsity: float) -> None:
    """One NaN raises, for every pattern, scope and sparsity, before it could be ranked."""
    score_OI = torch.ones(4, 8)
    score_OI[2, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        keep_mask(score_OI, Pattern.parse(text), sparsity, scope)


def test_scores_are_not_mutated() -> None:
    """Ranking reads its scores and nothing more."""
    score_OI = torch.randn(4, 132, generator=torch.Generator().manual_seed(0))
    before_OI = score_OI.clone()
    for scope in SCOPES:
        keep_mask(score_OI, Pattern(), 0.5, scope)
        keep_mask(score_OI, Pattern.parse("2:4"), 0.5, scope)
    assert torch.equal(score_OI, before_OI)


def test_strided_scores_give_the_support_of_their_copy() -> None:
    """A transposed view of scores is ranked in the order of its indices, not of its memory."""
    score_OI = torch.randint(0, 5, (140, 12), generator=torch.Generator().manual_seed(0)).float().T
    assert not score_OI.is_contiguous()
    for scope, pattern in itertools.product(SCOPES, (Pattern(), Pattern(2, 4))):
        expected_OI = keep_mask(score_OI.contiguous(), pattern, 0.4, scope)
        assert torch.equal(keep_mask(score_OI, pattern, 0.4, scope), expected_OI)


@deterministic
@given(
    st.integers(1, 50),
    st.integers(1, 600),
    st.integers(0, 1000).map(lambda thousandths: thousandths / 1000),
    st.sampled_from([1, 4, 128]),
)
def test_block_counts_sum_exactly(num_rows: int, num_columns: int, sparsity: float, width: int) -> None:
    """Counts add up to the whole matrix's count, and each is within one weight of its own share."""
    counts = block_counts(num_rows, num_columns, sparsity=sparsity, width=width)
    sizes = [num_rows * (min(start + width, num_columns) - start) for start in range(0, num_columns, width)]
    assert len(counts) == len(sizes)
    assert sum(counts) == num_pruned(num_rows * num_columns, sparsity)
    for count, size in zip(counts, sizes, strict=True):
        assert 0 <= count <= size
        assert abs(count - size * Fraction(str(sparsity))) <= 1


@pytest.mark.parametrize(
    ("numel", "sparsity", "count"),
    [
        (12, 0.3, 4),
        (20, 0.85, 17),
        (10, 0.7, 7),
        (100, 0.29, 29),  # int(100 * 0.29) is 28
        (100, 0.57, 57),  # int(100 * 0.57) is 56
        (1000, 0.001, 1),
        (5, 0.5, 3),  # halves round up
        (3, 0.5, 2),
        (45, 0.7, 32),  # 0.7 * 45 is 31.499999999999996 in floats
        (0, 0.5, 0),
        (7, 0.0, 0),
        (7, 1.0, 7),
        (10**12, 0.1, 10**11),
        (3 * 10**17, 0.3, 9 * 10**16),  # beyond 2^53
        (10, 1e-7, 0),
    ],
)
def test_num_pruned_rounds_the_decimal_the_user_wrote(numel: int, sparsity: float, count: int) -> None:
    """Counts come from exact arithmetic on the decimal number, where floats fall one short."""
    assert num_pruned(numel, sparsity) == count


@deterministic
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_num_pruned_is_the_nearest_integer(numel: int, tenthousandths: int) -> None:
    """No other integer is nearer to sparsity * numel."""
    exact = Fraction(tenthousandths, 10_000) * numel
    assert abs(num_pruned(numel, tenthousandths / 10_000) - exact) <= Fraction(1, 2)
