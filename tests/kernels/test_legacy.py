"""Old sparse-24-bitmask checkpoints, written here with numpy alone. O out, I in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from llmprune_kernels import _bits, legacy, two_four

PREFIX = "model.layers.0.mlp.up_proj"
SHAPES = [(1, 4), (3, 12), (16, 64), (17, 1028)]


def written_by_compressed_tensors(dense: np.ndarray, dtype: torch.dtype) -> dict[str, Tensor]:
    """The three tensors of one Linear: the two largest magnitudes of each group, even where they are zero."""
    groups = np.abs(dense.reshape(-1, 4))
    mask = np.zeros_like(groups, dtype=bool)
    np.put_along_axis(mask, np.argsort(-groups, axis=1, kind="stable")[:, :2], values=True, axis=1)
    mask = mask.reshape(dense.shape)
    return {
        f"{PREFIX}.shape": torch.tensor(dense.shape).reshape(-1, 1),
        f"{PREFIX}.compressed": torch.from_numpy(dense[mask].reshape(len(dense), -1)).to(dtype),
        f"{PREFIX}.bitmask": torch.from_numpy(np.packbits(mask, axis=1, bitorder="little")),
    }


def dense_24(out_features: int, in_features: int) -> np.ndarray:
    """fp32 2:4 weights exact in 16 bits, in which some groups have one non-zero or none."""
    rng = np.random.default_rng(out_features * in_features)
    dense = rng.integers(-100, 100, (out_features, in_features)).astype(np.float32)
    dense.reshape(-1, 4)[
        np.arange(dense.size // 4)[:, None], rng.permuted(np.tile(np.arange(4), (dense.size // 4, 1)), axis=1)[:, :2]
    ] = 0
    dense[:, 0] = 0
    if out_features > 2:
        dense[1] = 0
    return dense


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reads_the_dense_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The dense weight comes back, and so do the canonical parts with the stored values untouched."""
    dense = dense_24(*shape)
    tensors = written_by_compressed_tensors(dense, dtype)
    expected = torch.from_numpy(dense).to(dtype)
    assert torch.equal(legacy.read(tensors, PREFIX), expected)
    packed = legacy.read_two_four(tensors, PREFIX)
    two_four.check_meta(packed.meta, shape[1])
    assert packed.values.data_ptr() == tensors[f"{PREFIX}.compressed"].data_ptr()
    assert torch.equal(two_four.unpack(*packed), expected)


def test_golden_bytes() -> None:
    """Mask 1010 0011 (columns 0, 1 of group 0 low) becomes nibbles 4 and d; three groups leave a high nibble 0."""
    tensors = {
        f"{PREFIX}.shape": torch.tensor([[1], [12]]),
        f"{PREFIX}.compressed": torch.arange(1.0, 7.0).view(1, 6),
        f"{PREFIX}.bitmask": torch.tensor([[0b10100011, 0b00001100]], dtype=torch.uint8),
    }
    packed = legacy.read_two_four(tensors, PREFIX)
    assert packed.meta.numpy().tobytes().hex(" ") == "d4 0e"
    assert legacy.read(tensors, PREFIX).tolist() == [[1, 2, 0, 0, 0, 3, 0, 4, 0, 0, 5, 6]]


def test_bit_patterns_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN payloads, infinities and -0.0 are moved, not computed with; chunks do not show."""
    tensors = written_by_compressed_tensors(dense_24(8, 32), torch.bfloat16)
    bits = torch.randint(-(1 << 15), 1 << 15, (8, 16), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    bits[0, :3] = torch.tensor([0x7FC1, -0x8000, 0x7F80])
    tensors[f"{PREFIX}.compressed"] = bits.view(torch.bfloat16)
    monkeypatch.setattr(_bits, "CHUNK", 1)
    dense = legacy.read(tensors, PREFIX)
    mask = np.unpackbits(tensors[f"{PREFIX}.bitmask"].numpy(), axis=1, bitorder="little").astype(bool)
    words = dense.view(torch.int16).numpy()
    assert np.array_equal(words[mask], bits.numpy().ravel())
    assert not words[~mask].any()


def change(part: str, change_tensor: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PREFIX}.{part}"] = change_tensor(tensors[f"{PREFIX}.{part}"].clone())

    return apply


def with_byte(row: int, byte: int, value: int) -> Callable[[Tensor], Tensor]:
    def apply(bitmask: Tensor) -> Tensor:
        bitmask[row, byte] = value
        return bitmask

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop(f"{PREFIX}.bitmask"), f"no tensor {PREFIX}.bitmask: a sparse-24-bitmask layer has"),
        (change("shape", lambda t: t + 4), r"shape says \[7, 16\], but .*compressed is \[3, 6\]"),
        (change("compressed", torch.flatten), r"compressed is \[18\]"),
        (change("compressed", lambda t: t.to(torch.float8_e4m3fn)), "compressed has dtype float8_e4m3fn"),
        (change("bitmask", lambda t: t[:, :1]), r"bitmask is \[3, 1\], must be \[3, 2\]"),
        (change("bitmask", lambda t: t.int()), "bitmask has dtype int32; allowed: uint8"),
        (change("bitmask", lambda t: t.to("meta")), "compressed on cpu, bitmask on meta"),
        (change("bitmask", with_byte(1, 0, 0x37)), "row 1, group 0 has 3 bits set, a 2:4 group has exactly 2"),
        (change("bitmask", with_byte(2, 0, 0x13)), "row 2, group 1 has 1 bits set"),
        (change("bitmask", with_byte(2, 1, 0x01)), "row 2, group 2 has 1 bits set"),
        (change("bitmask", with_byte(2, 1, 0x33)), "row 2, group 3 lies beyond the last column"),
    ],
)
def test_damaged_checkpoints_are_refused(damage: Callable[[dict[str, Tensor]], None], message: str) -> None:
    """Every damage says where and what to do."""
    tensors = written_by_compressed_tensors(dense_24(3, 12), torch.bfloat16)
    damage(tensors)
    with pytest.raises(ValueError, match=message):
        legacy.read(tensors, PREFIX)


def test_formats_by_name() -> None:
    """sparse-24-bitmask is read; marlin-24 is refused by name; others say what is allowed."""
    legacy.check_format("sparse-24-bitmask")
    with pytest.raises(ValueError, match="marlin-24 checkpoints are not supported"):
        legacy.check_format("marlin-24")
    with pytest.raises(ValueError, match="unknown sparse checkpoint format 'sparse-bitmask'; allowed: sparse-24-bitmask"):
        legacy.check_format("sparse-bitmask")
