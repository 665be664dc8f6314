"""Every kernel on this device against fp64, with awkward shapes and real ones: what must be green before a time means anything.

The cases run in several processes, because most of the time goes to compiling; what they compile stays in Triton's cache for
the measurements that follow.

Dimension letters: O out features, I in features, T tokens.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmprune_kernels import SparseLinear24, bitmask, dispatch, fragments, fuse_, ops, tuning, two_four

MAX_RELATIVE_ERROR = 2.5e-3  # Frobenius, against fp64, of 16-bit results
FEW = 4096
TIMEOUT_SECONDS = 300
AWKWARD = ((1, 4), (16, 256), (17, 260), (37, 300), (63, 1000), (100, 516), (129, 4100), (1000, 2052))
REAL = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
TOKENS = (1, 2, 5, 8, 9, 16, 17, 33, 63, 64, 65, 100, 130)
DTYPES = ("bfloat16", "float16", "float32")
DENSITIES = {"linear_bitmask": (0.5, 0.2)}


@dataclass(frozen=True)
class Case:
    """One product: by the op and what dispatch chooses, or by a kernel with given tiles."""

    op: str
    dtype: str
    shape: tuple[int, int]
    num_tokens: int
    bias: bool = True
    density: float = 0.5
    kernel: str = ""
    tiles: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        tiles = f" {self.kernel} {self.tiles}" if self.kernel else ""
        return f"{self.op} {self.dtype} {self.shape[0]}x{self.shape[1]} T={self.num_tokens} bias={self.bias}{tiles}"


@dataclass
class Outcome:
    """What came of a case; `error` is relative to fp64, in the Frobenius norm, of results of at least FEW numbers."""

    name: str
    error: float | None = None
    red: str = ""


def cases(*, small: bool) -> Iterator[Case]:
    """All of them; `small` leaves a handful that a CPU can do."""
    for op, dtype in product(dispatch.OPS, DTYPES):
        if dtype == "float32" and op in ("linear_24_mma", "linear_24_int8"):
            continue
        shapes = AWKWARD[:4] if small else AWKWARD
        for (index, shape), num_tokens in product(enumerate(shapes), TOKENS[:3] if small else TOKENS):
            for density in DENSITIES.get(op, (0.5,)):
                yield Case(op, dtype, shape, num_tokens, bias=(index + num_tokens) % 2 == 0, density=density)
        for shape, num_tokens in product(() if small else REAL, (1, 8, 16, 64, 256)):
            yield Case(op, dtype, shape, num_tokens)
    for op in () if small else dispatch.OPS:
        yield from _tile_cases(op)


def _tile_cases(op: str) -> Iterator[Case]:
    """Every tile of every kernel on a real shape, as it is timed later, and some in fp16 on an awkward one with a bias."""
    seen = set()
    for bucket, shape in product(dispatch.BUCKETS, ((1024, 4096), (4096, 14336))):
        for choice in tuning.candidates(op, bucket, *shape, 132):
            tiles = dict(choice.tiles)
            if (choice.kernel, str(tiles)) in seen:
                continue
            seen.add((choice.kernel, str(tiles)))
            tile_tokens = 8 * tiles.get("token_tiles", 2)
            yield Case(op, "bfloat16", (1024, 4096), tile_tokens - 3, bias=False, kernel=choice.kernel, tiles=tiles)
            if len(seen) % 3 == 0:
                yield Case(op, "float16", (40, 520), tile_tokens + 3, kernel=choice.kernel, tiles=tiles)


def run_all(device: str, *, small: bool = False, num_workers: int | None = None) -> list[Outcome]:
    """Check every case, in several processes on a GPU and in this one on a CPU."""
    todo = sorted(cases(small=small), key=lambda case: (case.op, case.dtype, case.kernel, str(case.tiles)))
    num_workers = num_workers if num_workers is not None else (min(12, os.cpu_count() or 1) if device == "cuda" else 0)
    if not num_workers:
        return [*check_all(todo, device), *check_modules(device)]
    num_chunks = 4 * num_workers
    chunks = [todo[len(todo) * k // num_chunks : len(todo) * (k + 1) // num_chunks] for k in range(num_chunks)]
    outcomes: list[Outcome] = []
    begun = time.monotonic()
    executor = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn"))
    futures = [executor.submit(check_all, chunk, device) for chunk in chunks]
    for chunk, future in zip(chunks, futures, strict=True):
        try:
            outcomes += future.result(timeout=max(1.0, TIMEOUT_SECONDS - (time.monotonic() - begun)))
        except (TimeoutError, BrokenProcessPool) as error:
            outcomes += [Outcome(case.name, red=f"no answer: {type(error).__name__}") for case in chunk]
    if not all(future.done() for future in futures):
        for process in list(executor._processes.values()):  # a kernel that never ends would keep this process too
            process.kill()
    executor.shutdown(cancel_futures=True)
    return [*outcomes, *check_modules(device)]


def check_all(todo: Sequence[Case], device: str) -> list[Outcome]:
    """Check cases one after another; an exception is a red outcome."""
    outcomes = []
    for case in todo:
        try:
            outcomes.append(check(case, torch.device(device)))
        except Exception as error:
            outcomes.append(Outcome(case.name, red=f"{type(error).__name__}: {str(error)[:300]}"))
    return outcomes


def check(case: Case, device: torch.device) -> Outcome:
    """One case: within twice what PyTorch loses, within the limit over all, no trace of stale memory, the same twice."""
    torch.manual_seed(len(case.name) + case.num_tokens)
    dtype = getattr(torch, case.dtype)
    (num_rows, num_columns), num_tokens = case.shape, case.num_tokens
    weights = tuning.random_weights(case.op, num_rows, num_columns, dtype, device, case.density)
    weight_OI = dense_double(case.op, weights, case.shape, dtype)
    x_TI = torch.randn(num_tokens, num_columns, device=device).to(dtype)
    bias = torch.randn(num_rows, device=device).to(dtype) if case.bias else None
    expected = F.linear(x_TI.double(), weight_OI, None if bias is None else bias.double())
    theirs = F.linear(x_TI, weight_OI.to(dtype), bias)
    results = []
    for _ in range(2):
        poison = torch.full_like(theirs, float("nan"))
        del poison  # the allocator hands this memory to the next result
        results.append(multiply(case, x_TI, weights, bias))
    return judge(case.name, results, theirs, expected)


def judge(name: str, results: Sequence[Tensor], theirs: Tensor, expected: Tensor) -> Outcome:
    """Compare results with fp64, and with what PyTorch loses."""
    ours = results[0]
    if ours.shape != expected.shape or ours.dtype != theirs.dtype:
        return Outcome(name, red=f"{ours.dtype} {tuple(ours.shape)} instead of {theirs.dtype} {tuple(expected.shape)}")
    scale = expected.norm().item() or 1.0
    error = (ours.double() - expected).norm().item() / scale
    worst = (ours.double() - expected).abs().max().item()
    allowed = 2 * (theirs.double() - expected).abs().max().item() + 1e-6 * expected.abs().max().item()
    # of few numbers the rounding alone may exceed the limit that holds for many
    is_few = expected.numel() < FEW
    limit = max(MAX_RELATIVE_ERROR, 2 * (theirs.double() - expected).norm().item() / scale if is_few else 0.0)
    red = ""
    if not worst <= allowed:
        red = f"largest error {worst:.3g}, twice PyTorch's is {allowed:.3g}"
    elif not error <= limit:
        red = f"relative error {error:.3g}, the limit is {limit:.3g}"
    elif any(not torch.equal(ours, other) for other in results[1:]):
        red = "a second run gave other numbers"
    return Outcome(name, None if is_few else error, red)


def multiply(case: Case, x_TI: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """By the named kernel, or by the op as users call it."""
    if case.kernel:
        choice = dispatch.Choice(case.kernel, case.tiles)
        return dispatch.launch(case.op, choice, x_TI, weights, bias, case.shape[0])
    features = (case.shape[0],) if case.op in ("linear_24_mma", "linear_24_int8") else ()
    result: Tensor = getattr(ops, case.op)(x_TI, *weights, bias, *features)
    return result


def dense_double(op: str, weights: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight that the packed tensors stand for, in fp64, by the PyTorch code of the formats."""
    if op == "linear_bitmask":
        bits, values, _ = weights
        return bitmask.unpack(bits, values, bitmask.row_group_offsets(bits), shape[1]).double()
    if op == "linear_24":
        return two_four.unpack(*weights).double()
    if op == "linear_24_mma":
        return two_four.unpack(*fragments.from_fragments(*weights, *shape, dtype)).double()
    values_frag, meta_frag, scale = weights
    integers, meta = fragments.from_fragments(values_frag, meta_frag, *shape, torch.int8)
    return two_four.unpack(integers, meta).double() * scale.double()[:, None]


class _Block(nn.Module):
    """Three layers that read one tensor."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


def check_modules(device: str) -> list[Outcome]:
    """Layers: moved there and back, fused, with cuSPARSELt, and in a CUDA graph."""
    outcomes = []
    for name, run in {"layers": _check_layers, "int8 layers": _check_int8_layers}.items():
        try:
            outcomes += run(device)
        except Exception as error:
            outcomes.append(Outcome(name, red=f"{type(error).__name__}: {str(error)[:300]}"))
    return outcomes


def _check_layers(device: str) -> Iterator[Outcome]:
    torch.manual_seed(0)
    sizes = (256, 64, 48)
    linears = [nn.Linear(520, size, dtype=torch.bfloat16).requires_grad_(False) for size in sizes]
    for linear in linears:
        linear.weight.copy_(tuning.two_largest_of_four(linear.weight))
    packed = _Block([SparseLinear24.from_linear(linear) for linear in linears]).to(device)
    first = packed.layers[0]
    assert isinstance(first, SparseLinear24)
    is_there = not first.values.is_cpu or device == "cpu"
    yield Outcome("a layer moves to the device", red="" if is_there else "its weights are elsewhere")
    if device == "cuda":
        yield Outcome("it is laid out for mma.sp", red="" if first.layout == "fragments" else f"its layout is {first.layout}")
    saved = first.state_dict()["values"].cpu()
    wanted = two_four.pack(linears[0].weight).values
    yield Outcome("its state_dict is canonical", red="" if torch.equal(saved, wanted) else "other values")
    dense = copy.deepcopy(_Block(linears)).to(device)
    for num_tokens in (1, 8, 70, 2000):
        x_TI = torch.randn(num_tokens, 520, device=device).bfloat16()
        with torch.no_grad():
            theirs, alone = dense(x_TI), packed(x_TI)
            expected = dense.double()(x_TI.double())
            dense.bfloat16()
            yield judge(f"layers, {num_tokens} tokens", [alone], theirs, expected)
            fused = copy.deepcopy(packed)
            is_fused = fuse_([layer for layer in fused.layers if isinstance(layer, SparseLinear24)], fused)
            yield Outcome("layers fuse", red="" if is_fused else "they do not")
            yield judge(f"fused layers, {num_tokens} tokens", [fused(x_TI)], theirs, expected)
            if device == "cuda":
                yield judge(f"fused layers in a graph, {num_tokens} tokens", [_in_graph(fused, x_TI)], theirs, expected)
            prefill = copy.deepcopy(first)
            if prefill.add_cusparselt(1):
                rows = slice(0, sizes[0])
                yield judge(f"cuSPARSELt, {num_tokens} tokens", [prefill(x_TI)], theirs[:, rows], expected[:, rows])


def _check_int8_layers(device: str) -> Iterator[Outcome]:
    torch.manual_seed(0)
    weight_OI = tuning.two_largest_of_four(torch.randn(256, 520)).bfloat16()
    layer = SparseLinear24.from_weight(weight_OI, int8=True).to(device)
    x_TI = torch.randn(8, 520, device=device).bfloat16()
    error = (layer(x_TI).float() - F.linear(x_TI.float(), weight_OI.float().to(device))).norm()
    relative = (error / F.linear(x_TI.float(), weight_OI.float().to(device)).norm()).item()
    yield Outcome("an int8 layer", red="" if relative <= 0.01 else f"relative error {relative:.3g} of the unquantised product")


def _in_graph(module: nn.Module, x_TI: Tensor) -> Tensor:
    """What a replay gives after the graph was captured with another x."""
    static = torch.zeros_like(x_TI)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        module(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result: Tensor = module(static)
    static.copy_(x_TI)
    graph.replay()
    torch.cuda.synchronize()
    return result


def as_records(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """For the results file: the red ones whole."""
    return [asdict(outcome) for outcome in outcomes if outcome.red]
