"""Canonical 2:4 against definitions on lists, golden bytes and torch's CUTLASS converters. O out, I in, G groups of 4."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse import _semi_structured_conversions as cutlass

from llmprune_kernels import _bits, bitmask, fragments, two_four
from llmprune_kernels.two_four import NIBBLES, PAIRS, TwoFour, pack, unpack

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
deterministic = settings(max_examples=60)


def num_bits(dtype: torch.dtype) -> int:
    return 8 * dtype.itemsize


def from_bits(rows: list[list[int]], dtype: torch.dtype) -> Tensor:
    """A matrix with these unsigned bit patterns."""
    width = num_bits(dtype)
    signed = [[pattern - (pattern >> width - 1 << width) for pattern in row] for row in rows]
    return torch.tensor(signed, dtype=WORDS[dtype]).view(dtype)


def to_bits(tensor: Tensor) -> list[list[int]]:
    """The unsigned bit patterns of a matrix."""
    mask = (1 << 8 * tensor.element_size()) - 1
    return [[int(word) & mask for word in row] for row in tensor.cpu().view(WORDS[tensor.dtype]).tolist()]


def bit_equal(one: Tensor, other: Tensor) -> bool:
    word = WORDS[one.dtype]
    return one.dtype == other.dtype and torch.equal(one.cpu().view(word), other.cpu().view(word))


def patterns(dtype: torch.dtype) -> st.SearchStrategy[int]:
    """Any bit pattern, and often one of the awkward ones: both zeros, infinities, NaNs with payload, subnormals."""
    width = num_bits(dtype)
    infinity = 0x7C00 if dtype == torch.float16 else 0x7F80 << width - 16
    sign = 1 << width - 1
    awkward = [0, sign, 1, sign | 1, infinity, sign | infinity, infinity | 1, sign | infinity | 5, sign - 1, 2 * sign - 1]
    return st.one_of(st.sampled_from(awkward), st.integers(0, 2 * sign - 1))


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.dtype, list[list[int]]]:
    """Bit patterns of 2:4 weights: any two entries of a group, the others zeros of either sign."""
    dtype = draw(st.sampled_from(list(WORDS)))
    zeros = st.sampled_from([0, 0, 1 << num_bits(dtype) - 1])
    num_rows, num_groups = draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def group() -> list[int]:
        entries = [draw(zeros) for _ in range(4)]
        for column in draw(st.sampled_from(PAIRS)):
            entries[column] = draw(patterns(dtype))
        return entries

    return dtype, [[pattern for _ in range(num_groups) for pattern in group()] for _ in range(num_rows)]


@st.composite
def packed_weights(draw: st.DrawFn) -> TwoFour:
    """Everything the format can express: any values under any valid metadata."""
    dtype = draw(st.sampled_from(list(WORDS)))
    num_rows, num_groups = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    values = [[draw(patterns(dtype)) for _ in range(2 * num_groups)] for _ in range(num_rows)]
    nibbles = [[draw(st.sampled_from(NIBBLES)) for _ in range(num_groups)] for _ in range(num_rows)]
    return TwoFour(from_bits(values, dtype), two_four.join_nibbles(torch.tensor(nibbles, dtype=torch.uint8)))


def group_by_definition(entries: list[int], sign: int) -> tuple[list[int], int]:
    """Kept patterns and nibble of one group: non-zeros, then -0.0, then the lowest free columns."""
    non_zero = [column for column in range(4) if entries[column] & ~sign]
    negative_zero = [column for column in range(4) if entries[column] == sign]
    plain = [column for column in range(4) if entries[column] == 0]
    first, second = sorted((non_zero + negative_zero + plain)[:2])
    return [entries[first], entries[second]], first | second << 2


def random_two_four(num_rows: int, in_features: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random weights with exactly two non-zeros in every group."""
    generator = torch.Generator().manual_seed(num_rows + in_features)
    score_OG4 = torch.rand(num_rows, in_features // 4, 4, generator=generator)
    weight_OG4 = torch.randn(num_rows, in_features // 4, 4, generator=generator).abs() + 0.1
    return weight_OG4.masked_fill_(score_OG4 < score_OG4.sort(-1).values[..., 2:3], 0).flatten(1).to(dtype)


def test_golden_bytes() -> None:
    """The example of the README, byte by byte: 1 0 -2 0, 0 0 0 0.5, 0 NaN 3 0, 0 -0.0 0 0."""
    row = [0x3F80, 0, 0xC000, 0, 0, 0, 0, 0x3F00, 0, 0x7FC0, 0x4040, 0, 0, 0x8000, 0, 0]
    packed = pack(from_bits([row], torch.bfloat16))
    assert packed.values.view(torch.uint8).numpy().tobytes().hex(" ", 4) == "803f00c0 0000003f c07f4040 00000080"
    assert packed.meta.numpy().tobytes().hex(" ") == "c8 49"
    assert packed.shape == (1, 16)


def test_the_readme_shows_these_bytes() -> None:
    """The examples in the README are what the code writes, in all formats."""
    readme = (Path(__file__).parents[2] / "triton_kernels" / "README.md").read_text()
    row = [0x3F80, 0, 0xC000, 0, 0, 0, 0, 0x3F00, 0, 0x7FC0, 0x4040, 0, 0, 0x8000, 0, 0]
    weight_OI = from_bits([row], torch.bfloat16)
    packed, mask = pack(weight_OI), bitmask.pack(weight_OI)
    values_frag, meta_frag = fragments.to_fragments(*packed)

    def shown(tensor: Tensor) -> str:
        return tensor.view(torch.uint8).numpy().tobytes().hex(" ")

    groups = " | ".join(shown(packed.values[0, start : start + 2]) for start in range(0, 8, 2))
    assert f"values  {groups}" in readme
    assert f"meta    {shown(packed.meta)}" in readme
    assert f"bits    {shown(mask.bits)}\nvalues  {shown(mask.values)}\noffsets 0, 6\n" in readme
    assert mask.offsets.tolist() == [0, 6]
    words = [f"`{word & 0xFFFFFFFF:08x}`" for word in (*values_frag[0, 0, 0, :4, 0].tolist(), int(meta_frag[0, 0, 0, 0]))]
    assert all(word in readme for word in words)
    nibbles = " | ".join(f"`{nibble:x}`" for nibble in NIBBLES)
    assert f"| nibble | {nibbles} |" in readme


def test_golden_bytes_of_fp16_fp32_and_an_odd_number_of_groups() -> None:
    """One group of 0 0 7 -inf: nibble e in the low half of the only byte, 0 in the high half."""
    for dtype, golden in ((torch.float16, "0047 00fc"), (torch.float32, "0000e040 000080ff")):
        packed = pack(torch.tensor([[0, 0, 7, -torch.inf]], dtype=dtype))
        assert packed.values.view(torch.uint8).numpy().tobytes().hex(" ", dtype.itemsize) == golden
        assert packed.meta.tolist() == [[0x0E]]


@deterministic
@given(weights())
def test_pack_follows_the_definition(case: tuple[torch.dtype, list[list[int]]]) -> None:
    """Every group keeps the entries that the definition names, in ascending columns, bit for bit."""
    dtype, rows = case
    packed = pack(from_bits(rows, dtype))
    for row, values, nibbles in zip(
        rows, to_bits(packed.values), two_four.split_nibbles(packed.meta, len(rows[0]) // 4).tolist(), strict=True
    ):
        expected = [group_by_definition(row[start : start + 4], 1 << num_bits(dtype) - 1) for start in range(0, len(row), 4)]
        assert values == [pattern for kept, _ in expected for pattern in kept]
        assert nibbles == [nibble for _, nibble in expected]
    two_four.check_meta(packed.meta, len(rows[0]))


@deterministic
@given(weights())
def test_round_trip_is_exact_up_to_surplus_negative_zeros(case: tuple[torch.dtype, list[list[int]]]) -> None:
    """Dense weights come back bit for bit; only a -0.0 without a free slot becomes +0.0."""
    dtype, rows = case
    sign = 1 << num_bits(dtype) - 1
    back = to_bits(unpack(*pack(from_bits(rows, dtype))))
    for row, row_back in zip(rows, back, strict=True):
        for column, (before, after) in enumerate(zip(row, row_back, strict=True)):
            group = row[column // 4 * 4 : column // 4 * 4 + 4]
            if before != after:
                assert (before, after) == (sign, 0)
                assert sum(entry != 0 for entry in group) > 2, "a slot was free"


@deterministic
@given(packed_weights())
def test_whatever_the_format_can_express_survives(packed: TwoFour) -> None:
    """unpack puts every value where its nibble says; packing again keeps the bits, and is the same from then on."""
    dense = to_bits(unpack(*packed))
    expected = [[0] * (2 * len(row)) for row in to_bits(packed.values)]
    nibbles = two_four.split_nibbles(packed.meta, packed.shape[1] // 4).tolist()
    for row, row_values, row_nibbles in zip(expected, to_bits(packed.values), nibbles, strict=True):
        for group, nibble in enumerate(row_nibbles):
            row[4 * group + (nibble & 3)] = row_values[2 * group]
            row[4 * group + (nibble >> 2)] = row_values[2 * group + 1]
    assert dense == expected

    once = pack(unpack(*packed))
    assert bit_equal(unpack(*once), unpack(*packed))
    twice = pack(unpack(*once))
    assert bit_equal(twice.values, once.values)
    assert torch.equal(twice.meta, once.meta)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_patterns_in_every_pair_of_columns(dtype: torch.dtype, device: str) -> None:
    """Each of the 65536 patterns beside its complement, in each of the six places."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(-1, 1)
    for first, second in PAIRS:
        bits = torch.zeros(1 << 16, 4, dtype=torch.int16)
        bits[:, first], bits[:, second] = every[:, 0], ~every[:, 0]
        weight_OI = bits.view(dtype).to(device)
        assert bit_equal(unpack(*pack(weight_OI)), weight_OI)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 4), (3, 12), (17, 8), (5, 1028), (33, 260)])
def test_chunks_of_rows_do_not_show(shape: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time gives the same bytes as all rows at once."""
    weight_OI = random_two_four(*shape).to(device)
    whole = pack(weight_OI)
    assert int((weight_OI != 0).sum()) == weight_OI.numel() // 2
    monkeypatch.setattr(_bits, "CHUNK", 1)
    parts = pack(weight_OI)
    assert bit_equal(parts.values, whole.values)
    assert torch.equal(parts.meta, whole.meta)
    assert bit_equal(unpack(*parts), weight_OI)


def test_size_is_nine_sixteenths_of_bf16() -> None:
    """1/2 for the values and 1/16 for the metadata."""
    weight_OI = random_two_four(64, 1024)
    assert sum(part.nbytes for part in pack(weight_OI)) / weight_OI.nbytes == 0.5625


def test_non_contiguous_and_trainable_weights_are_packed_like_any_other() -> None:
    """Views, columns of a wider matrix and parameters need no preparation, and are left alone."""
    weight_OI = random_two_four(8, 24)
    expected = pack(weight_OI)
    wide = torch.full((8, 32), 7.0, dtype=torch.bfloat16)
    wide[:, 3:27] = weight_OI
    for view in (wide[:, 3:27], weight_OI.t().contiguous().t(), torch.nn.Parameter(weight_OI)):
        packed = pack(view)
        assert bit_equal(packed.values, expected.values)
        assert torch.equal(packed.meta, expected.meta)
        assert not packed.values.requires_grad
    assert bit_equal(unpack(wide[:, 3:15].t().contiguous().t(), expected.meta), unpack(wide[:, 3:15], expected.meta))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_and_metadata_words_are_those_of_torch(dtype: torch.dtype) -> None:
    """torch's CUTLASS converter stores the same values and, at its own offsets, our bytes read as 16-bit words."""
    weight_OI = random_two_four(64, 512, dtype)
    packed = pack(weight_OI)
    values, meta_reordered = cutlass.sparse_semi_structured_from_dense_cutlass(weight_OI)
    assert bit_equal(packed.values, values)
    assert torch.equal(reordered(packed.meta.view(torch.int16)), meta_reordered)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_unpacks_our_metadata(dtype: torch.dtype) -> None:
    """torch's way back to dense, from our parts, gives our weight, sparser groups and non-finite values included."""
    weight_OI = random_two_four(64, 512, dtype)
    weight_OI[:, ::3] = 0
    weight_OI[weight_OI > 2] = torch.inf
    weight_OI[weight_OI < 0.2] = torch.where(weight_OI[weight_OI < 0.2] > 0, torch.nan, 0.0).to(dtype)
    assert bool(weight_OI.isnan().any())
    packed = pack(weight_OI)
    dense = cutlass.sparse_semi_structured_to_dense_cutlass(packed.values, reordered(packed.meta.view(torch.int16)))
    assert bit_equal(dense, weight_OI)


def reordered(meta_OW: Tensor) -> Tensor:
    """Metadata words at the offsets of CUTLASS, as torch computes them."""
    offsets = cutlass._calculate_meta_reordering_scatter_offsets(*meta_OW.shape, meta_OW.dtype, meta_OW.device)
    return torch.empty_like(meta_OW).view(-1).scatter_(0, offsets, meta_OW.reshape(-1)).view(meta_OW.shape)


def test_is_two_four() -> None:
    """True where pack works; two NaNs beside zeros are fine, three non-zeros or 10 columns are not."""
    weight_OI = random_two_four(5, 32)
    assert two_four.is_two_four(weight_OI)
    assert two_four.is_two_four(torch.tensor([[torch.nan, -0.0, torch.nan, -0.0]]))
    assert not two_four.is_two_four(torch.zeros(2, 10))
    weight_OI[4, 28:31] = 1
    assert not two_four.is_two_four(weight_OI)


def test_the_first_group_that_is_not_two_four_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row, group, columns and count, whatever the chunks; NaN and subnormals count as non-zeros."""
    weight_OI = random_two_four(6, 32)
    weight_OI[5, :4] = 1
    weight_OI[4, 20:24] = torch.tensor([torch.nan, 1, 1e-40, -0.0])
    for chunk in (1 << 22, 1):
        monkeypatch.setattr(_bits, "CHUNK", chunk)
        with pytest.raises(ValueError, match=r"row 4, group 5 \(columns 20 to 23\) has 3 non-zeros, at most 2 .* bitmask"):
            pack(weight_OI)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda: torch.zeros(4, 10), "divisible by 4, got 10"),
        (lambda: torch.zeros(8), r"got shape \[8\]"),
        (lambda: torch.zeros(2, 4, 4), r"got shape \[2, 4, 4\]"),
        (lambda: torch.zeros(0, 8), r"empty weight of shape \[0, 8\]"),
        (lambda: torch.zeros(8, 0), r"empty weight of shape \[8, 0\]"),
        (lambda: torch.zeros(4, 8, dtype=torch.float64), "dtype float64; allowed: bfloat16, float16, float32"),
        (lambda: torch.zeros(4, 8, dtype=torch.int8), "dtype int8"),
    ],
)
def test_pack_refuses_what_it_cannot_hold(weight: Callable[[], Tensor], message: str) -> None:
    """Shapes and dtypes out of range say what was given and what is allowed."""
    with pytest.raises(ValueError, match=message):
        pack(weight())


@pytest.mark.parametrize("nibble", sorted(set(range(16)) - set(NIBBLES)))
@pytest.mark.parametrize("group", [0, 3, 6])
def test_every_nibble_that_does_not_ascend_is_named(nibble: int, group: int) -> None:
    """All ten bad nibbles, low, high and last, in unpack and in check_meta; check=False trusts the caller."""
    packed = pack(random_two_four(3, 28))
    packed.meta[1, group // 2] &= 0x0F if group % 2 else 0xF0
    packed.meta[1, group // 2] |= nibble << 4 * (group % 2)
    message = rf"row 1, group {group} names columns {nibble & 3} and {nibble >> 2} \(nibble {nibble}\)"
    with pytest.raises(ValueError, match=message):
        unpack(*packed)
    with pytest.raises(ValueError, match=message):
        two_four.check_meta(packed.meta, 28)
    unpack(*packed, check=False)


def test_the_unused_nibble_must_be_zero() -> None:
    """Bits beyond the last group are an error, not ignored."""
    packed = pack(random_two_four(3, 12))
    packed.meta[2, -1] |= 0x40
    with pytest.raises(ValueError, match="unused high nibble of the last byte of row 2 is 4, it must be 0"):
        unpack(*packed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda values, meta: (values[:, :-1], meta), "even number of columns"),
        (lambda values, meta: (values[:, :-2], meta), r"meta must be \[3, 3\]"),
        (lambda values, meta: (values[:2], meta), r"meta must be \[2, 4\] .* got \[3, 4\]"),
        (lambda values, meta: (values, meta.view(torch.int8)), "meta has dtype int8; allowed: uint8"),
        (lambda values, meta: (values.double(), meta), "values has dtype float64"),
        (lambda values, meta: (values[0], meta), "values must be"),
        (lambda values, meta: (values[:0], meta[:0]), "values must be"),
        (lambda values, meta: (values, meta.to("meta")), "values on cpu, meta on meta"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    damage: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], message: str
) -> None:
    """Wrong shapes, dtypes and devices of packed parts."""
    with pytest.raises(ValueError, match=message):
        unpack(*damage(*pack(random_two_four(3, 28))))


def test_nibbles_are_the_ascending_pairs() -> None:
    """The six nibbles of the README's table."""
    assert tuple(itertools.combinations(range(4), 2)) == PAIRS
    assert NIBBLES == (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)
