"""Which kernel multiplies, and with which tiles: a table measured on this GPU, and a stated heuristic where there is none.

`tuning.tune` measures; nothing else does, and nothing asks CUDA anything when this module is imported. A table is a JSON file
per GPU, compute capability, Triton and package version under $LLMPRUNE_KERNEL_CACHE, else $XDG_CACHE_HOME/llmprune/kernels.

Dimension letters: O out features, I in features, T tokens.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llmprune_kernels import fragments, int8, reference

TABLE_VERSION = 1
KERNELS = {"linear_24": "expand", "linear_24_mma": "mma_sp", "linear_24_int8": "mma_sp_int8", "linear_bitmask": "bitmask"}
OPS = tuple(KERNELS)
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MAX_KERNEL_TOKENS = 128  # beyond it the heuristic multiplies densely


class Choice(NamedTuple):
    """A kernel by name and the tile sizes it is launched with."""

    kernel: str
    tiles: Mapping[str, int] = {}


class Gpu(NamedTuple):
    """What a choice depends on: the GPU and the versions that compile for it."""

    name: str
    capability: tuple[int, int]
    num_sms: int
    l2_bytes: int
    triton: str  # its version, or "" where it is not installed


def choose(op: str, num_tokens: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """The kernel and tiles for one product.

    Args:
        op: one of OPS.
        num_tokens: T, at least 1.
        out_features: O.
        in_features: I.
        dtype: of x.
        device: of x; any but a CUDA device gets the PyTorch reference.

    Raises:
        ValueError: if there is no such op.
    """
    if op not in OPS:
        raise ValueError(f"there is no op {op!r}; choose one of {', '.join(OPS)}")
    if device.type != "cuda":
        return Choice("reference")
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _choose(op, bucket(num_tokens), out_features, in_features, dtype, index)


@cache
def _choose(op: str, num_tokens: int, out_features: int, in_features: int, dtype: torch.dtype, index: int) -> Choice:
    gpu = describe(torch.device("cuda", index))
    entry = read_table(gpu).get(key(op, num_tokens, out_features, in_features, dtype))
    measured = None if entry is None else _parse(op, entry)
    return measured or heuristic(op, num_tokens, out_features, in_features, gpu)


def bucket(num_tokens: int) -> int:
    """The token count under which a choice for T tokens is kept: the next of BUCKETS, or the last."""
    return next((limit for limit in BUCKETS if num_tokens <= limit), BUCKETS[-1])


def heuristic(op: str, num_tokens: int, out_features: int, in_features: int, gpu: Gpu) -> Choice:
    """What is chosen where nothing was measured.

    Up to 128 tokens the sparse kernel, beyond them the weight is unpacked to a scratch that lives for the call, and cuBLAS
    multiplies: unpacking costs about 12 us per 4096 x 4096 on an H200, 7 % of the product of 4096 tokens. Without Triton
    everything is unpacked by PyTorch.

    mma.sp: each program reads x again, so that it has as many row tiles (16 rows) as token tiles (8 tokens), unless that leaves
    SMs idle; if even one row tile does, the in features are split among programs. Where programs are few they have 8 warps, as
    an SM needs about that many to keep its share of the memory busy. From 32 tokens on x is copied to the order of the
    fragments first, a quarter as many loads.
    """
    if not gpu.triton:
        return Choice("reference")
    if num_tokens > MAX_KERNEL_TOKENS:
        return Choice("dense")
    if op not in ("linear_24_mma", "linear_24_int8"):
        return Choice(KERNELS[op])
    token_tiles = min(8, power_of_two(-(-num_tokens // 8)))
    row_tiles = min(token_tiles, 2 if token_tiles == 8 else 4)  # 4 x 8 tiles spill
    num_blocks = -(-out_features // fragments.ROWS)
    while row_tiles > 1 and num_blocks < gpu.num_sms * row_tiles:
        row_tiles //= 2
    num_chunks, splits = -(-in_features // fragments.COLUMNS), 1
    num_warps = 8 if num_blocks < 4 * gpu.num_sms * row_tiles and num_chunks >= 16 else 4
    while num_blocks * splits < gpu.num_sms * row_tiles and 2 * splits * num_warps <= num_chunks:
        splits *= 2
    tiles = {
        "row_tiles": row_tiles, "token_tiles": token_tiles, "num_warps": num_warps, "splits": splits,
        "shuffle_x": int(token_tiles >= 4),
    }  # fmt: skip
    return Choice(KERNELS[op], tiles)


def launch(op: str, choice: Choice, x_TI: Tensor, weights: Sequence[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    """Run one choice: y_TO of contiguous x_TI and the op's weight tensors, in the order of its signature."""
    return LAUNCHERS[op][choice.kernel](Call(x_TI, weights, bias, out_features, choice.tiles))


@cache
def describe(device: torch.device) -> Gpu:
    """Ask CUDA about a device, once."""
    properties = torch.cuda.get_device_properties(device)
    capability = torch.cuda.get_device_capability(device)
    return Gpu(properties.name, capability, properties.multi_processor_count, properties.L2_cache_size, triton_version())


@cache
def triton_version() -> str:
    """The installed version of Triton, or "" if it is not installed."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


@cache
def package_version() -> str:
    """The version of the distribution that holds this package, or "source"."""
    try:
        return metadata.version("llmprune")
    except metadata.PackageNotFoundError:
        return "source"


def key(op: str, num_tokens: int, out_features: int, in_features: int, dtype: torch.dtype) -> str:
    """Under what a table keeps a choice."""
    return f"{op}/{out_features}x{in_features}/{str(dtype).removeprefix('torch.')}/{bucket(num_tokens)}"


def table_path(gpu: Gpu) -> Path:
    """Where the table of a GPU is, or would be."""
    own = os.environ.get("LLMPRUNE_KERNEL_CACHE")
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(own) if own else cache_home / "llmprune" / "kernels"
    name = f"{gpu.name} sm{gpu.capability[0]}{gpu.capability[1]} triton {gpu.triton or 'none'} llmprune {package_version()}"
    return folder / (re.sub(r"[^a-z0-9.]+", "-", name.lower()) + ".json")


def read_table(gpu: Gpu) -> dict[str, Any]:
    """The entries measured on this GPU; none, with a warning, if the file is damaged or of another GPU or version."""
    path = table_path(gpu)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["header"] != _header(gpu):
            warnings.warn(f"{path} is of another GPU or version and is ignored; tune again", stacklevel=2)
            return {}
        return dict(table["entries"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} cannot be read and is ignored ({error!r}); delete it and tune again", stacklevel=2)
        return {}


def write_table(gpu: Gpu, entries: Mapping[str, Any]) -> Path:
    """Add entries to this GPU's table: the file is replaced as a whole, so that no reader sees half of it."""
    path = table_path(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"header": _header(gpu), "entries": dict(sorted((read_table(gpu) | dict(entries)).items()))}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        json.dump(table, file, indent=1)
    Path(file.name).replace(path)
    _choose.cache_clear()
    return path


def _header(gpu: Gpu) -> dict[str, Any]:
    return {
        "table_version": TABLE_VERSION, "gpu": gpu.name, "capability": list(gpu.capability), "num_sms": gpu.num_sms,
        "triton": gpu.triton, "package": package_version(),
    }  # fmt: skip


def _parse(op: str, entry: Any) -> Choice | None:
    """A table's entry as a choice, or None with a warning if it is none: people edit files."""
    try:
        choice = Choice(entry["kernel"], {str(name): int(size) for name, size in entry["tiles"].items()})
    except (KeyError, TypeError, ValueError, AttributeError):
        choice = Choice("")
    if choice.kernel not in LAUNCHERS[op]:
        warnings.warn(f"the kernel table names no kernel of {op} in {entry!r}, which is ignored; tune again", stacklevel=2)
        return None
    return choice


def power_of_two(number: int) -> int:
    """The next power of two that is not less."""
    return 1 << (number - 1).bit_length()


class Call(NamedTuple):
    """The arguments of one launch; `weights` in the order of the op's signature."""

    x_TI: Tensor
    weights: Sequence[Tensor]
    bias: Tensor | None
    out_features: int
    tiles: Mapping[str, Any]


Launcher = Callable[[Call], Tensor]


def _mma_sp(call: Call) -> Tensor:
    from llmprune_kernels.kernels import mma_sp

    values, meta = call.weights
    return mma_sp.linear(call.x_TI, values, meta, call.bias, call.out_features, **call.tiles)


def _mma_sp_int8(call: Call) -> Tensor:
    from llmprune_kernels.kernels import mma_sp_int8

    values, meta, scale = call.weights
    return mma_sp_int8.linear(call.x_TI, values, meta, scale, call.bias, call.out_features, **call.tiles)


def _expand(call: Call) -> Tensor:
    from llmprune_kernels.kernels import expand

    values, meta = call.weights
    return expand.linear(call.x_TI, values, meta, call.bias, **call.tiles)


def _bitmask(call: Call) -> Tensor:
    from llmprune_kernels.kernels import bitmask as kernel

    bits, values, row_starts = call.weights
    return kernel.linear(call.x_TI, bits, values, row_starts, call.bias, **call.tiles)


def _dense_24(call: Call) -> Tensor:
    from llmprune_kernels.kernels import expand

    values, meta = call.weights
    return F.linear(call.x_TI, expand.unpack(values, meta), call.bias)


def _dense_mma(call: Call) -> Tensor:
    from llmprune_kernels.kernels import expand

    values, meta = call.weights
    features = call.out_features, call.x_TI.shape[1]
    return F.linear(call.x_TI, expand.unpack_fragments(values, meta, *features, call.x_TI.dtype), call.bias)


def _dense_int8(call: Call) -> Tensor:
    from llmprune_kernels.kernels import expand

    values_frag, meta_frag, scale = call.weights
    integers, meta = fragments.from_fragments(values_frag, meta_frag, call.out_features, call.x_TI.shape[1], torch.int8)
    return F.linear(call.x_TI, expand.unpack(int8.dequantize(integers, scale, call.x_TI.dtype), meta), call.bias)


def _dense_bitmask(call: Call) -> Tensor:
    from llmprune_kernels.kernels import bitmask as kernel

    bits, values, row_starts = call.weights
    return F.linear(call.x_TI, kernel.unpack(bits, values, row_starts, call.x_TI.shape[1]), call.bias)


def _reference_24(call: Call) -> Tensor:
    values, meta = call.weights
    return reference.linear_24(call.x_TI, values, meta, call.bias)


def _reference_mma(call: Call) -> Tensor:
    values, meta = call.weights
    return reference.linear_24_mma(call.x_TI, values, meta, call.bias, call.out_features)


def _reference_int8(call: Call) -> Tensor:
    values, meta, scale = call.weights
    return reference.linear_24_int8(call.x_TI, values, meta, scale, call.bias, call.out_features)


def _reference_bitmask(call: Call) -> Tensor:
    bits, values, row_starts = call.weights
    return reference.linear_bitmask(call.x_TI, bits, values, row_starts, call.bias)


LAUNCHERS: dict[str, dict[str, Launcher]] = {
    "linear_24": {"expand": _expand, "dense": _dense_24, "reference": _reference_24},
    "linear_24_mma": {"mma_sp": _mma_sp, "dense": _dense_mma, "reference": _reference_mma},
    "linear_24_int8": {"mma_sp_int8": _mma_sp_int8, "dense": _dense_int8, "reference": _reference_int8},
    "linear_bitmask": {"bitmask": _bitmask, "dense": _dense_bitmask, "reference": _reference_bitmask},
}
