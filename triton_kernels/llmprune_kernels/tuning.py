"""Measuring which kernel is fastest on this GPU, for the tables that `dispatch` chooses by. Never done by itself: call `tune`.

Dimension letters: O out features, I in features, T tokens.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmprune_kernels import bitmask, dispatch, fragments, int8, two_four
from llmprune_kernels.dispatch import BUCKETS, KERNELS, MAX_KERNEL_TOKENS, Choice, Gpu, bucket, describe, key, launch

MAX_ERROR = 1e-2  # a candidate that is farther from the dense product, relatively, is broken here and not chosen
MIN_CUSPARSELT_TOKENS = 64
CUSPARSELT_FROM = 1024  # tokens from which it is 1.4-1.8x as fast as cuBLAS on an H100; for layers that were not measured

Thunk = Callable[[], object]
Measure = Callable[[Sequence[Thunk]], float]
"""Microseconds per call of functions that do the same on different weights."""

TILES: dict[str, list[dict[str, int]]] = {
    "expand": [
        {"block_t": 16, "block_o": block_o, "block_i": block_i, "num_warps": num_warps}
        for block_o, block_i, num_warps in ((16, 256, 4), (32, 128, 4), (32, 256, 4), (64, 128, 4), (64, 256, 8), (128, 128, 8))
    ],
    "bitmask": [{"num_warps": num_warps} for num_warps in (1, 2, 4, 8)],
}
"""Of the kernels that name none themselves."""


def candidates(op: str, num_tokens: int, out_features: int, in_features: int, num_sms: int) -> list[Choice]:
    """Everything `tune` tries for a product, the dense one first; more splits where the rows alone leave SMs idle."""
    kernel = KERNELS[op]
    found = [Choice("dense")]
    for tile in _tiles(kernel, num_tokens) if num_tokens <= 4 * MAX_KERNEL_TOKENS else ():
        found.append(Choice(kernel, tile))
        if "splits" in tile:
            num_programs = -(-out_features // (fragments.ROWS * tile["row_tiles"])) * -(
                -num_tokens // (8 * tile["token_tiles"])
            )
            most = min(4 * num_sms // num_programs, -(-in_features // fragments.COLUMNS) // tile["num_warps"])
            if num_programs < 2 * num_sms:
                found += [Choice(kernel, tile | {"splits": splits}) for splits in (2, 4, 8) if splits <= most]
    return found


def tune(
    shapes: Iterable[tuple[int, int]],
    *,
    op: str = "linear_24_mma",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    token_counts: Sequence[int] = BUCKETS,
    density: float = 0.5,
    cusparselt: bool = False,
    measure: Measure | None = None,
    gpu: Gpu | None = None,
) -> dict[str, Any]:
    """Measure every candidate for the shapes and keep the fastest in this GPU's table.

    A candidate that fails or is wrong here is passed over. About a minute for four shapes, most of it compiling.

    Args:
        shapes: (O, I) of the layers; an I that the format cannot hold raises ValueError.
        op: one of OPS.
        dtype: of x.
        device: a CUDA device.
        token_counts: rounded up to BUCKETS.
        density: of the random weights, for linear_bitmask.
        cusparselt: measure it too, where torch has it, so that `cusparselt_from` knows where it is the fastest.
        measure: how times are taken; CUDA graphs over weights that together exceed the L2 by default.
        gpu: what the table is for; that of the device by default.

    Returns:
        The entries measured: kernel, tiles, microseconds, and the microseconds of the dense product.
    """
    device = torch.device(device)
    gpu = gpu or describe(device)
    measure = measure or graph_microseconds
    entries: dict[str, Any] = {}
    for out_features, in_features in dict.fromkeys(shapes):
        sets = rotating_weights(op, out_features, in_features, dtype, device, density, 4 * gpu.l2_bytes)
        others = cusparselt_weights(out_features, in_features, dtype, device, len(sets)) if cusparselt else []
        for num_tokens in sorted({bucket(count) for count in token_counts}):
            x_TI = torch.randn(num_tokens, in_features, device=device).to(dtype)
            entry = fastest(op, x_TI, sets, out_features, measure)
            if entry is not None:
                if others and num_tokens >= MIN_CUSPARSELT_TOKENS:
                    entry["cusparselt_microseconds"] = measure([partial(F.linear, x_TI, weight) for weight in others])
                entries[key(op, num_tokens, out_features, in_features, dtype)] = entry
        del sets, others
    dispatch.write_table(gpu, entries)
    return entries


def fastest(
    op: str, x_TI: Tensor, sets: Sequence[Sequence[Tensor]], out_features: int, measure: Measure
) -> dict[str, Any] | None:
    """The entry of the fastest candidate that is right, or None if not even the dense product runs."""
    times: list[tuple[float, Choice]] = []
    expected: Tensor | None = None
    num_sms = describe(x_TI.device).num_sms if x_TI.is_cuda else 1
    for choice in candidates(op, len(x_TI), out_features, x_TI.shape[1], num_sms):
        try:
            y_TO = launch(op, choice, x_TI, sets[0], None, out_features).float()
        except Exception as error:  # it does not compile, or asks for more registers or memory than there are
            warnings.warn(f"{op}: {choice.kernel} {dict(choice.tiles)} fails here and is passed over: {error}", stacklevel=2)
            continue
        expected = y_TO if expected is None else expected
        if not (y_TO - expected).norm() <= MAX_ERROR * expected.norm():
            warnings.warn(f"{op}: {choice.kernel} {dict(choice.tiles)} is wrong here and is passed over", stacklevel=2)
            continue
        times.append((measure([partial(launch, op, choice, x_TI, weights, None, out_features) for weights in sets]), choice))
    if not times:
        return None
    microseconds, best = min(times, key=lambda pair: pair[0])
    dense = next((time for time, choice in times if choice.kernel == "dense"), None)
    return {"kernel": best.kernel, "tiles": dict(best.tiles), "microseconds": microseconds, "dense_microseconds": dense}


def rotating_weights(
    op: str, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device, density: float, num_bytes: int
) -> list[tuple[Tensor, ...]]:
    """As many sets of the op's random weight tensors as exceed num_bytes together: reading them in turn misses the L2."""
    first = random_weights(op, out_features, in_features, dtype, device, density)
    set_bytes = sum(tensor.numel() * tensor.element_size() for tensor in first)
    return [first, *(tuple(tensor.clone() for tensor in first) for _ in range(num_bytes // set_bytes))]


def random_weights(
    op: str, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device, density: float = 0.5
) -> tuple[Tensor, ...]:
    """The op's weight tensors of a random sparse weight [O, I], in the order of its signature."""
    weight_OI = torch.randn(out_features, in_features, device=device)
    if op == "linear_bitmask":
        kept = torch.rand(out_features, in_features, device=device) < density
        packed = bitmask.pack(torch.where(kept, weight_OI, 0.0).to(dtype))
        return packed.bits, packed.values, bitmask.row_starts(packed.bits)
    values, meta = two_four.pack(two_largest_of_four(weight_OI).to(dtype))
    if op == "linear_24":
        return values, meta
    if op == "linear_24_mma":
        return fragments.to_fragments(values, meta)
    integers, scale = int8.quantize(values)
    return (*fragments.to_fragments(integers, meta), scale)


def graph_microseconds(thunks: Sequence[Thunk], *, repeats: int = 20) -> float:
    """Median time of one call, in microseconds: all thunks in one CUDA graph, replayed and timed by events."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and fills the allocator
        thunks[0]()
        thunks[-1]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()  # torch.cuda.graph would empty the allocator's cache each time, which takes longer than measuring
        try:
            for thunk in thunks:
                thunk()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(2):
        graph.replay()
    times: list[float] = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(thunks))
    return statistics.median(times)


def has_cusparselt(device: torch.device) -> bool:
    """Whether torch can multiply 2:4 weights by cuSPARSELt on this device."""
    return device.type == "cuda" and torch.version.hip is None and bool(torch.backends.cusparselt.is_available())


def compress(weight_OI: Tensor) -> Tensor | None:
    """A 2:4 weight as cuSPARSELt has it, for F.linear; None where torch, device, shape or dtype does not allow it."""
    if not has_cusparselt(weight_OI.device):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls it a prototype
            return torch.sparse.to_sparse_semi_structured(weight_OI)
    except RuntimeError:
        return None


def cusparselt_weights(
    out_features: int, in_features: int, dtype: torch.dtype, device: torch.device, num_sets: int
) -> list[Tensor]:
    """As many random 2:4 weights in the form of cuSPARSELt; none where it does not take them."""
    weight_OI = two_largest_of_four(torch.randn(out_features, in_features, device=device)).to(dtype)
    return [weight for _ in range(num_sets) if (weight := compress(weight_OI)) is not None]


def cusparselt_from(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """The fewest tokens from which cuSPARSELt was the fastest in every measurement, None if it never was.

    1024 for a shape that `tune(..., cusparselt=True)` has not measured.
    """
    table = dispatch.read_table(describe(device))
    least: int | None = CUSPARSELT_FROM
    for num_tokens in reversed(BUCKETS):
        entry = table.get(key("linear_24_mma", num_tokens, out_features, in_features, dtype)) or {}
        if "cusparselt_microseconds" in entry:
            if entry["cusparselt_microseconds"] >= entry["microseconds"]:
                return None if num_tokens == BUCKETS[-1] else least
            least = num_tokens
    return least


def _tiles(kernel: str, num_tokens: int) -> list[dict[str, int]]:
    """The tile sizes a kernel says it has code for; those that suit T tokens, where it cuts the tokens itself."""
    module = import_module(f"llmprune_kernels.kernels.{kernel.removesuffix('_int8')}")  # both mma.sp kernels take the same
    tiles = [dict(tile._asdict()) for tile in module.TILES] if hasattr(module, "TILES") else TILES[kernel]
    wanted = min(8, dispatch.power_of_two(-(-num_tokens // 8)))
    fitting = [
        tile for tile in tiles if tile.get("token_tiles", wanted) in (wanted, wanted // 2 if num_tokens > 64 else wanted)
    ]
    return fitting or tiles


def two_largest_of_four(weight_OI: Tensor) -> Tensor:
    """The weight with the two smaller of every four consecutive inputs set to zero."""
    groups = weight_OI.unflatten(1, (-1, 4))
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.abs().topk(2, dim=2).indices, True)
    return torch.where(kept, groups, 0.0).flatten(1)
