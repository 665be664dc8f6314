"""Fragment order against the PTX instruction's own tables, golden words and torch's CUTLASS metadata. O out, I in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse import _semi_structured_conversions as cutlass

from llmprune_kernels import fragments, two_four
from llmprune_kernels.fragments import COLUMNS, ROWS, from_fragments, to_fragments
from llmprune_kernels.two_four import NIBBLES, TwoFour

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.bfloat16, torch.float16, torch.int8]
SHAPES = [(1, 4), (16, 256), (17, 260), (15, 252), (48, 1028), (64, 512), (100, 1000), (33, 24), (5, 2564)]
deterministic = settings(max_examples=30)


def random_packed(out_features: int, in_features: int, dtype: torch.dtype) -> TwoFour:
    """Any value bits under any valid metadata."""
    generator = torch.Generator().manual_seed(1000 * out_features + in_features)
    raw = torch.randint(0, 256, (out_features, in_features // 2 * dtype.itemsize), generator=generator, dtype=torch.uint8)
    nibble_OG = torch.tensor(NIBBLES, dtype=torch.uint8)[
        torch.randint(0, 6, (out_features, in_features // 4), generator=generator)
    ]
    return TwoFour(raw.view(dtype), two_four.join_nibbles(nibble_OG))


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.cpu().view(torch.uint8), other.cpu().view(torch.uint8))


def dense_by_the_instruction(values_frag: Tensor, meta_frag: Tensor, dtype: torch.dtype) -> Tensor:
    """What mma.sp m16n8k32 multiplies by, from its register tables: int64 bit patterns [16 B, 256 K].

    A lane's stored elements 0..7 are two per group: elements 0, 1, 4, 5 belong to row lane / 4, the others to the row 8
    below; elements 0..3 to columns 4 (lane mod 4) onwards, the others to 16 columns further right. The metadata word of
    a row pair and 16 columns comes from lane 4 (row mod 8) + 2 selector + half: 16 bits for each of its two rows.
    """
    blocks, chunks = values_frag.shape[:2]
    width = 8 * dtype.itemsize
    dense = torch.zeros(blocks, ROWS, chunks, COLUMNS, dtype=torch.int64)
    values, meta = (frag.cpu().long() & 0xFFFFFFFF for frag in (values_frag, meta_frag))
    index_BK = torch.meshgrid(torch.arange(blocks), torch.arange(chunks), indexing="ij")
    for step in range(8):
        for lane in range(32):
            for element in range(8):
                row = lane // 4 + (8 if element in (2, 3, 6, 7) else 0)
                group_column = 4 * (lane % 4) + (16 if element >= 4 else 0)
                if width == 16:
                    word_BK, shift = values[:, :, step, lane, element // 2], 16 * (element % 2)
                else:  # the eight int8 elements of a step fill two registers of a double step, in order
                    word_BK, shift = values[:, :, step // 2, lane, 2 * (step % 2) + element // 4], 8 * (element % 4)
                meta_lane = 4 * (row % 8) + 2 * (step % 2) + (1 if element >= 4 else 0)
                nibble_shift = 16 * (row // 8) + 4 * (lane % 4)
                nibble_BK = meta[:, :, meta_lane, step // 2] >> nibble_shift & 15
                column_BK = nibble_BK & 3 if element % 2 == 0 else nibble_BK >> 2
                pattern_BK = word_BK >> shift & (1 << width) - 1
                dense[index_BK[0], row, index_BK[1], 32 * step + group_column + column_BK] = pattern_BK
    return dense.view(blocks * ROWS, chunks * COLUMNS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (16, 256), (17, 260), (40, 516)], ids=str)
def test_the_instruction_sees_the_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Registers read by the rules of PTX give the dense weight, and zeros in the padding."""
    packed = random_packed(*shape, dtype)
    word = torch.int8 if dtype == torch.int8 else torch.int16
    expected = two_four.unpack(*packed).view(word).long() & (1 << 8 * dtype.itemsize) - 1
    dense = dense_by_the_instruction(*to_fragments(*packed), dtype)
    assert torch.equal(dense[: shape[0], : shape[1]], expected)
    assert int(expected.count_nonzero()) > 0
    assert not bool(dense[shape[0] :].any())
    assert not bool(dense[:, shape[1] :].any())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_way_back_is_exact(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """from_fragments gives the bytes that to_fragments took, for shapes that fill no block."""
    packed = random_packed(*shape, dtype)
    values_frag, meta_frag = to_fragments(packed.values.to(device), packed.meta.to(device))
    expected_shapes = fragments.fragment_shapes(*shape, dtype)
    assert (list(values_frag.shape), list(meta_frag.shape)) == expected_shapes
    assert values_frag.dtype == meta_frag.dtype == torch.int32
    assert values_frag.is_contiguous()
    assert meta_frag.is_contiguous()
    back = from_fragments(values_frag, meta_frag, *shape, dtype)
    assert same_bits(back.values, packed.values)
    assert same_bits(back.meta, packed.meta)
    assert back.values.is_contiguous()
    assert back.meta.is_contiguous()


@deterministic
@given(st.integers(1, 70), st.integers(1, 200), st.sampled_from(DTYPES))
def test_the_way_back_is_exact_for_any_shape(out_features: int, num_groups: int, dtype: torch.dtype) -> None:
    """As above, for shapes nobody thought of."""
    packed = random_packed(out_features, 4 * num_groups, dtype)
    back = from_fragments(*to_fragments(*packed), out_features, 4 * num_groups, dtype)
    assert same_bits(back.values, packed.values)
    assert same_bits(back.meta, packed.meta)


def test_golden_words() -> None:
    """The README's row: lanes 0 to 3 hold its four groups in register 0, its metadata is the low half of the first word."""
    values = torch.tensor([[0x3F80, -0x4000, 0, 0x3F00, 0x7FC0, 0x4040, 0, -0x8000]], dtype=torch.int16).view(torch.bfloat16)
    values_frag, meta_frag = to_fragments(values, torch.tensor([[0xC8, 0x49]], dtype=torch.uint8))
    words = [f"{word & 0xFFFFFFFF:08x}" for word in values_frag[0, 0, 0, :4, 0].tolist()]
    assert words == ["c0003f80", "3f000000", "40407fc0", "80000000"]
    assert f"{int(meta_frag[0, 0, 0, 0]):08x}" == "444449c8"
    assert int(values_frag.count_nonzero()) == 4
    assert int((meta_frag != 0x44444444).sum()) == 1


def test_golden_words_of_int8() -> None:
    """Row 0 in bytes 0 and 1, row 8 in bytes 2 and 3 of one register."""
    values = torch.zeros(9, 8, dtype=torch.int8)
    values[0], values[8] = torch.arange(1, 9), -torch.arange(1, 9)
    values_frag, _ = to_fragments(values, torch.full((9, 2), 0x44, dtype=torch.uint8))
    words = [f"{word & 0xFFFFFFFF:08x}" for word in values_frag[0, 0, 0, :4, 0].tolist()]
    assert words == ["feff0201", "fcfd0403", "fafb0605", "f8f90807"]
    assert int(values_frag.count_nonzero()) == 4


def test_metadata_words_are_those_of_cutlass() -> None:
    """The set of 32-bit words equals torch's, which hands them to the same instruction."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(64, 512, generator=generator).bfloat16()
    weight_OI.view(64, -1, 4).scatter_(2, torch.rand(64, 128, 4, generator=generator).argsort(-1)[..., :2], 0)
    _, meta_reordered = cutlass.sparse_semi_structured_from_dense_cutlass(weight_OI)
    storage = meta_reordered.as_strided((meta_reordered.numel(),), (1,))
    words = set(storage.view(torch.int32).tolist())
    assert len(words) > 1000
    assert set(to_fragments(*two_four.pack(weight_OI))[1].flatten().tolist()) == words


def test_any_memory_layout_is_accepted() -> None:
    """Transposed, sliced and misaligned inputs, and non-contiguous fragments."""
    packed = random_packed(20, 264, torch.bfloat16)
    expected = to_fragments(*packed)
    misaligned = torch.empty(20 * 132 + 1, dtype=torch.bfloat16)[1:].view(20, 132)
    misaligned.copy_(packed.values)
    for values in (misaligned, packed.values.t().contiguous().t()):
        assert torch.equal(to_fragments(values, packed.meta.t().contiguous().t())[0], expected[0])
    back = from_fragments(*(frag.transpose(0, 1).contiguous().transpose(0, 1) for frag in expected), 20, 264, torch.bfloat16)
    assert same_bits(back.values, packed.values)


def test_size_of_whole_blocks_is_that_of_the_canonical_format() -> None:
    """Nothing is added but padding."""
    packed = random_packed(64, 1024, torch.bfloat16)
    assert sum(part.nbytes for part in to_fragments(*packed)) == sum(part.nbytes for part in packed)


def test_fp32_and_bad_metadata_are_refused() -> None:
    """fp32 has no fragments; a bad nibble is found on the way in."""
    packed = random_packed(3, 12, torch.float32)
    with pytest.raises(ValueError, match="dtype float32; allowed: bfloat16, float16, int8"):
        to_fragments(*packed)
    packed = random_packed(3, 12, torch.float16)
    packed.meta[1, 0] = 0x45
    with pytest.raises(ValueError, match="row 1, group 0"):
        to_fragments(*packed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, m: from_fragments(v, m, 33, 300, torch.bfloat16), r"have shapes \[3, 2, 8, 32, 4\]"),
        (lambda v, m: from_fragments(v, m, 20, 300, torch.int8), r"\[2, 2, 4, 32, 4\]"),
        (lambda v, m: from_fragments(v, m, 20, 302, torch.bfloat16), "positive multiple of 4, got 20 and 302"),
        (lambda v, m: from_fragments(v, m, 0, 300, torch.bfloat16), "out_features >= 1"),
        (lambda v, m: from_fragments(v, m, 20, 300, torch.float32), "not float32"),
        (lambda v, m: from_fragments(v.long(), m, 20, 300, torch.bfloat16), "values fragments has dtype int64"),
        (lambda v, m: from_fragments(v, m.float(), 20, 300, torch.bfloat16), "meta fragments has dtype float32"),
    ],
)
def test_fragments_that_do_not_fit_are_refused(call: Callable[[Tensor, Tensor], TwoFour], message: str) -> None:
    """Shapes, dtypes and features that do not belong together."""
    with pytest.raises(ValueError, match=message):
        call(*to_fragments(*random_packed(20, 300, torch.bfloat16)))
