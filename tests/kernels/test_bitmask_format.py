"""The bitmask format against numpy's packbits, golden bytes and every bit pattern. O out, I in, K chunks of 256 columns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmprune_kernels import _bits, bitmask
from llmprune_kernels.bitmask import Bitmask, pack, unpack

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
SHAPES = [(1, 1), (1, 8), (16, 256), (17, 260), (33, 7), (47, 513), (3, 1000)]
deterministic = settings(max_examples=60)


def same_bits(one: Tensor, other: Tensor) -> bool:
    word = WORDS[one.dtype]
    return one.dtype == other.dtype and torch.equal(one.cpu().view(word), other.cpu().view(word))


def random_weight(out_features: int, in_features: int, sparsity: float = 0.6) -> Tensor:
    generator = torch.Generator().manual_seed(out_features * in_features)
    weight_OI = torch.randn(out_features, in_features, generator=generator).bfloat16()
    return weight_OI.masked_fill_(torch.rand(out_features, in_features, generator=generator) < sparsity, 0)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Matrices of any bit patterns with many zeros of both signs, NaNs with payload and subnormals."""
    dtype = draw(st.sampled_from(list(WORDS)))
    top = 1 << 8 * dtype.itemsize - 1
    pattern = st.one_of(st.just(0), st.sampled_from([-top, top - 1, -1, 1]), st.integers(-top, top - 1))
    columns = draw(st.integers(1, 40))
    rows = draw(st.lists(st.lists(pattern, min_size=columns, max_size=columns), min_size=1, max_size=20))
    return torch.tensor(rows, dtype=WORDS[dtype]).view(dtype)


def test_golden_bytes() -> None:
    """The example of the README: 1 0 -2 0, 0 0 0 0.5, 0 NaN 3 0, 0 -0.0 0 0; -0.0 is stored."""
    row = [0x3F80, 0, -0x4000, 0, 0, 0, 0, 0x3F00, 0, 0x7FC0, 0x4040, 0, 0, -0x8000, 0, 0]
    packed = pack(torch.tensor([row], dtype=torch.int16).view(torch.bfloat16))
    assert packed.bits.numpy().tobytes().hex(" ") == "85 26"
    assert packed.values.view(torch.uint8).numpy().tobytes().hex(" ", 2) == "803f 00c0 003f c07f 4040 0080"
    assert packed.offsets.numpy().tobytes().hex(" ", 8) == "0000000000000000 0600000000000000"


@deterministic
@given(weights())
def test_round_trip_is_exact_and_bits_are_those_of_numpy(weight_OI: Tensor) -> None:
    """Every pattern comes back; bits, values and offsets are what numpy makes of the same weight."""
    packed = pack(weight_OI)
    num_rows, in_features = weight_OI.shape
    assert same_bits(unpack(*packed, in_features), weight_OI)
    words = weight_OI.view(WORDS[weight_OI.dtype]).numpy()
    assert np.array_equal(packed.bits.numpy(), np.packbits(words != 0, axis=1, bitorder="little"))
    assert np.array_equal(packed.values.view(WORDS[weight_OI.dtype]).numpy(), words[words != 0])
    offsets = [int((words[: 16 * group] != 0).sum()) for group in range(-(-num_rows // 16) + 1)]
    assert packed.offsets.tolist() == offsets


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_patterns(dtype: torch.dtype, device: str) -> None:
    """Each of the 65536 patterns, NaN payloads and both zeros included."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(256, 256)
    weight_OI = every.view(dtype).to(device)
    packed = pack(weight_OI)
    assert len(packed.values) == (1 << 16) - 1
    assert same_bits(unpack(*packed, 256), weight_OI)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_of_rows_do_not_show(shape: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time gives the same bytes as all rows at once, both ways."""
    weight_OI = random_weight(*shape).to(device)
    whole = pack(weight_OI)
    monkeypatch.setattr(_bits, "CHUNK", 1)
    for part, other in zip(pack(weight_OI), whole, strict=True):
        assert torch.equal(part, other)
    assert same_bits(unpack(*whole, shape[1]), weight_OI)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_groups_are_self_contained(shape: tuple[int, int]) -> None:
    """The rows of one group unpack from their own slice of the values, as a file cut along rows needs."""
    weight_OI = random_weight(*shape)
    packed = pack(weight_OI)
    for group in range(len(packed.offsets) - 1):
        start, end = packed.offsets[group : group + 2].tolist()
        rows = slice(16 * group, 16 * group + 16)
        offsets = torch.tensor([0, end - start])
        assert same_bits(unpack(packed.bits[rows], packed.values[start:end], offsets, shape[1]), weight_OI[rows])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_starts_point_at_the_first_value_of_every_chunk(shape: tuple[int, int], device: str) -> None:
    """Non-zeros counted in every earlier row and in the earlier columns of the same row."""
    weight_OI = random_weight(*shape)
    starts_OK = bitmask.row_starts(pack(weight_OI.to(device)).bits)
    assert starts_OK.dtype == torch.int32
    assert starts_OK.shape == (shape[0], -(-shape[1] // 256))
    for row in range(shape[0]):
        for chunk, start in enumerate(starts_OK[row].tolist()):
            before = int((weight_OI[:row] != 0).sum()) + int((weight_OI[row, : 256 * chunk] != 0).sum())
            assert start == before


def test_more_values_than_int32_can_index_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """2**31 values or more are said so, not wrapped."""
    monkeypatch.setattr(bitmask, "_count", lambda bits: torch.full(bits.shape, 1 << 30, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"2\*\*31 - 1 values, this weight has 68719476736. Split it along rows"):
        bitmask.row_starts(torch.zeros(2, 32, dtype=torch.uint8))


def test_all_zero_and_all_kept() -> None:
    """No value at all, and no zero at all."""
    zeros = pack(torch.zeros(5, 9))
    assert len(zeros.values) == 0
    assert torch.equal(unpack(*zeros, 9), torch.zeros(5, 9))
    ones = pack(torch.ones(5, 9))
    assert ones.bits.tolist() == [[255, 1]] * 5
    assert torch.equal(unpack(*ones, 9), torch.ones(5, 9))


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_size_is_a_sixteenth_plus_the_density(sparsity: float) -> None:
    """Bytes against dense bf16, up to the offsets (8 bytes for 16 rows)."""
    weight_OI = random_weight(256, 4096, sparsity)
    density = float((weight_OI != 0).float().mean())
    ratio = sum(part.nbytes for part in pack(weight_OI)) / weight_OI.nbytes
    assert 1 / 16 + density < ratio < 1 / 16 + density + 1e-3


def test_non_contiguous_and_trainable_weights_are_packed_like_any_other() -> None:
    """Views and parameters need no preparation."""
    weight_OI = random_weight(20, 30)
    expected = pack(weight_OI)
    for view in (weight_OI.t().contiguous().t(), torch.nn.Parameter(weight_OI)):
        packed = pack(view)
        assert all(torch.equal(part, other) for part, other in zip(packed, expected, strict=True))
        assert not packed.values.requires_grad


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(8), r"got shape \[8\]"),
        (torch.zeros(0, 8), r"empty weight of shape \[0, 8\]"),
        (torch.zeros(2, 2, dtype=torch.float64), "dtype float64; allowed: bfloat16, float16, float32"),
    ],
)
def test_pack_refuses_what_it_cannot_hold(weight: Tensor, message: str) -> None:
    """Shapes and dtypes out of range say what was given and what is allowed."""
    with pytest.raises(ValueError, match=message):
        pack(weight)


def flip_first_bit(packed: Bitmask) -> Bitmask:
    bits = packed.bits.clone()
    bits[20, 0] ^= 1
    return packed._replace(bits=bits)


def set_beyond(packed: Bitmask) -> Bitmask:
    bits = packed.bits.clone()
    bits[3, -1] |= 0x10
    return packed._replace(bits=bits)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_first_bit, r"offsets\[2\] is \d+, but \d+ bits are set in the rows before 32"),
        (set_beyond, "row 3 has bits set beyond column 27"),
        (lambda p: p._replace(values=p.values[:-1]), r"\d+ bits are set, but values has shape"),
        (lambda p: p._replace(values=torch.cat((p.values, p.values[:1]))), "bits are set, but values has shape"),
        (lambda p: p._replace(values=p.values.view(1, -1)), r"values has shape \[1, "),
        (lambda p: p._replace(values=p.values.double()), "values has dtype float64"),
        (lambda p: p._replace(offsets=p.offsets + 1), r"offsets\[0\] is 1, but 0 bits"),
        (lambda p: p._replace(offsets=p.offsets[:-1]), r"offsets must be \[4\] for 33 rows .* got \[3\]"),
        (lambda p: p._replace(offsets=p.offsets.int()), "offsets has dtype int32; allowed: int64"),
        (lambda p: p._replace(bits=p.bits[:, :-1]), r"bits must be \[out_features, 4\] for 28 in_features, got \[33, 3\]"),
        (lambda p: p._replace(bits=p.bits.int()), "bits has dtype int32; allowed: uint8"),
        (lambda p: p._replace(values=p.values.to("meta")), "bits on cpu, values on meta"),
    ],
)
def test_corrupt_parts_are_refused(damage: Callable[[Bitmask], Bitmask], message: str) -> None:
    """A damaged file is an error that says where, never a wrong weight."""
    with pytest.raises(ValueError, match=message):
        unpack(*damage(pack(random_weight(33, 28))), 28)


def test_wrong_in_features_is_refused() -> None:
    """Too few, too many, none."""
    packed = pack(random_weight(33, 28, 0.1))
    for in_features in (0, 24, 25, 40):
        with pytest.raises(ValueError, match="bits"):
            unpack(*packed, in_features)
