"""Times of the kernels beside cuBLAS and cuSPARSELt in the same run: CUDA graphs, random data, weights that miss the L2.

Dimension letters: O out features, I in features, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmprune_kernels import dispatch, tuning

SHAPES = ((4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336))
TOKENS = (1, 4, 8, 16, 32, 64, 256, 1024, 4096)
OTHER_SHAPES = ((4096, 4096), (14336, 4096))
OTHER_TOKENS = (1, 8, 64)
ROTATION_BYTES = 400_000_000
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Clock:
    """Where and how times are taken."""

    device: torch.device
    measure: tuning.Measure
    rotation_bytes: int = ROTATION_BYTES


def copy_bandwidth(clock: Clock, num_bytes: int = 2**31) -> float:
    """TB/s of copying a tensor, bytes read and written both counted."""
    source = torch.randn(num_bytes // 4, device=clock.device)
    target = torch.empty_like(source)
    return 2 * num_bytes / clock.measure([lambda: target.copy_(source)]) / 1e6


def time_two_four(
    clock: Clock,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    token_counts: Sequence[int] = TOKENS,
    *,
    say: Callable[[str], None],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of times of the 2:4 layers as users run them, and the table entries that were the fastest."""
    rows, entries = [], {}
    for out_features, in_features in shapes:
        dense = _rotating_dense(clock, out_features, in_features)
        packed = tuning.rotating_weights(
            "linear_24_mma", out_features, in_features, DTYPE, clock.device, 0.5, clock.rotation_bytes
        )
        others = tuning.cusparselt_weights(out_features, in_features, DTYPE, clock.device, len(packed))
        for num_tokens in token_counts:
            x_TI = torch.randn(num_tokens, in_features, device=clock.device).to(DTYPE)
            theirs = clock.measure([partial(F.linear, x_TI, weight_OI) for weight_OI in dense])
            entry = tuning.fastest("linear_24_mma", x_TI, packed, out_features, clock.measure)
            assert entry is not None
            row = _row("2:4", x_TI, out_features, entry, theirs, packed[0])
            if others:
                row["cusparselt_microseconds"] = clock.measure([partial(F.linear, x_TI, weight) for weight in others])
                entry["cusparselt_microseconds"] = row["cusparselt_microseconds"]
            rows.append(row)
            entries[dispatch.key("linear_24_mma", num_tokens, out_features, in_features, DTYPE)] = entry
            say(describe(row))
        del dense, packed, others
    return rows, entries


def time_others(
    clock: Clock, shapes: Sequence[tuple[int, int]] = OTHER_SHAPES, token_counts: Sequence[int] = OTHER_TOKENS,
    *, say: Callable[[str], None],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """The same of the canonical layout, int8 values, and bitmasks of 50 % and 70 % sparsity."""
    kinds = (
        ("2:4 canonical", "linear_24", 0.5), ("2:4 int8", "linear_24_int8", 0.5),
        ("bitmask 50 %", "linear_bitmask", 0.5), ("bitmask 70 %", "linear_bitmask", 0.3),
    )  # fmt: skip
    rows, entries = [], {}
    for out_features, in_features in shapes:
        dense = _rotating_dense(clock, out_features, in_features)
        for name, op, density in kinds:
            packed = tuning.rotating_weights(op, out_features, in_features, DTYPE, clock.device, density, clock.rotation_bytes)
            for num_tokens in token_counts:
                x_TI = torch.randn(num_tokens, in_features, device=clock.device).to(DTYPE)
                theirs = clock.measure([partial(F.linear, x_TI, weight_OI) for weight_OI in dense])
                entry = tuning.fastest(op, x_TI, packed, out_features, clock.measure)
                assert entry is not None
                rows.append(_row(name, x_TI, out_features, entry, theirs, packed[0]))
                entries[dispatch.key(op, num_tokens, out_features, in_features, DTYPE)] = entry
                say(describe(rows[-1]))
            del packed
        del dense
    return rows, entries


def describe(row: dict[str, Any]) -> str:
    """One line for the reader who waits."""
    cusparselt = f"  cuSPARSELt {row['cusparselt_microseconds']:7.1f}" if "cusparselt_microseconds" in row else ""
    tiles = " ".join(f"{name}={size}" for name, size in row["tiles"].items())
    return (
        f"{row['kind']:13s} {row['out_features']:5d}x{row['in_features']:<5d} T={row['num_tokens']:<4d} "
        f"cuBLAS {row['cublas_microseconds']:7.1f} us ({row['cublas_tbs']:.2f} TB/s){cusparselt}  "
        f"ours {row['microseconds']:7.1f} us ({row['tbs']:.2f} TB/s)  {row['speedup']:.2f}x  {row['kernel']} {tiles}"
    )


def _rotating_dense(clock: Clock, out_features: int, in_features: int) -> list[Tensor]:
    first = torch.randn(out_features, in_features, device=clock.device).to(DTYPE)
    return [first, *(first.clone() for _ in range(clock.rotation_bytes // first.nbytes))]


def _row(
    kind: str, x_TI: Tensor, out_features: int, entry: dict[str, Any], theirs: float, packed: Sequence[Tensor]
) -> dict[str, Any]:
    num_tokens, in_features = x_TI.shape
    activations = 2 * num_tokens * (in_features + out_features)
    weight_bytes = sum(tensor.nbytes for tensor in packed)
    return {
        "kind": kind, "out_features": out_features, "in_features": in_features, "num_tokens": num_tokens,
        "kernel": entry["kernel"], "tiles": entry["tiles"], "microseconds": entry["microseconds"],
        "unpack_microseconds": entry["dense_microseconds"], "cublas_microseconds": theirs,
        "speedup": theirs / entry["microseconds"],
        "tbs": (weight_bytes + activations) / entry["microseconds"] / 1e6,
        "cublas_tbs": (2 * out_features * in_features + activations) / theirs / 1e6,
    }  # fmt: skip
