"""Cases of the portable 2:4 kernels: a script that prints JSON, of the interpreter's results or of the machine code."""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import torch
from mma_sp_cases import before_poison, compare, poison_new_tensors, two_four_weight
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case(NamedTuple):
    """One launch of `linear`; `special` is what is odd about the weights."""

    dtype: str
    tokens: int
    out_features: int
    in_features: int
    bias: bool
    blocks: tuple[int, int, int] = (16, 64, 128)
    special: str = ""

    def __str__(self) -> str:
        """Name of the test."""
        shape = f"{self.dtype}-T{self.tokens}-O{self.out_features}-I{self.in_features}"
        return "-".join([shape, "x".join(map(str, self.blocks)), *["bias"] * self.bias, *[self.special] * bool(self.special)])


class Unpack(NamedTuple):
    """One unpacking of random bit patterns, from canonical or fragment order."""

    order: str
    dtype: str
    out_features: int
    in_features: int

    def __str__(self) -> str:
        """Name of the test."""
        return f"{self.order}-{self.dtype}-O{self.out_features}-I{self.in_features}"


class Build(NamedTuple):
    """A kernel compiled for `sm_<arch>`, and the registers a thread may take."""

    arch: int
    kernel: str
    dtype: str
    max_registers: int

    def __str__(self) -> str:
        """Name of the test."""
        return f"sm{self.arch}-{self.kernel}-{self.dtype}"


CASES = [
    Case("bf16", 1, 1, 4, True),
    Case("bf16", 3, 15, 12, False),
    Case("bf16", 8, 16, 60, True),
    Case("bf16", 9, 17, 252, False, (8, 16, 64)),
    Case("bf16", 17, 100, 260, True),
    Case("bf16", 1, 100, 1000, False, (16, 128, 256)),
    Case("bf16", 9, 16, 256, True, special="inf and nan"),
    Case("fp16", 1, 17, 1000, True),
    Case("fp16", 8, 100, 4, True),
    Case("fp16", 17, 15, 256, False, (32, 32, 32)),
    Case("fp16", 3, 5, 60, True, special="inf and nan"),
    Case("fp32", 1, 16, 252, True),
    Case("fp32", 3, 100, 60, False),
    Case("fp32", 9, 15, 1000, True),
    Case("fp32", 17, 17, 12, True, (8, 16, 16)),
    Case("fp32", 3, 17, 260, True, special="all zero"),
]

UNPACKS = [
    Unpack(order, dtype, out_features, in_features)
    for out_features, in_features in ((1, 4), (15, 12), (16, 60), (17, 252), (16, 256), (100, 260), (17, 1000))
    for order, dtype in (
        ("canonical", "bf16"),
        ("canonical", "fp32"),
        ("fragments", "fp16"),
    )
]

BUILDS = [
    *[Build(arch, "linear", "bf16", 168) for arch in (80, 90, 100)],
    *[Build(arch, "linear", "fp32", 168) for arch in (80, 90, 100)],
    *[Build(arch, "unpack", dtype, 64) for arch in (80, 90, 100) for dtype in ("bf16", "fp32")],
    *[Build(arch, "unpack_fragments", "bf16", 64) for arch in (80, 90, 100)],
]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bit pattern, among them NaN with every payload."""
    word = torch.int32 if dtype == torch.float32 else torch.int16
    limit = 2 ** (8 * word.itemsize - 1)
    return torch.randint(-limit, limit, shape, generator=generator).to(word).view(dtype)


def as_words(tensor: Tensor) -> Tensor:
    """Integers that are equal only where all bits are."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def run(case: Case, seed: int) -> dict[str, Any]:
    """Launch `linear` and compare with fp64."""
    from llmprune_kernels import two_four
    from llmprune_kernels.kernels import expand

    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]
    weight = two_four_weight(case.out_features, case.in_features, generator).to(dtype)
    if case.special == "all zero":
        weight.zero_()
    if case.special == "inf and nan":
        weight[0, weight[0].nonzero()[0]] = float("inf")
        weight[1, weight[1].nonzero()[0]] = float("nan")
    x = torch.randn(case.tokens, case.in_features, generator=generator).to(dtype)
    bias = torch.randn(case.out_features, generator=generator).to(dtype) if case.bias else None
    values, meta = (before_poison(part) for part in two_four.pack(weight))
    block_t, block_o, block_i = case.blocks
    y = expand.linear(before_poison(x), values, meta, bias, block_t=block_t, block_o=block_o, block_i=block_i)
    return compare(x, weight.double(), bias, y)._asdict()


def unpacks_exactly(case: Unpack, seed: int) -> dict[str, bool]:
    """Whether the dense weight has the bits that the PyTorch reference gives, also written into a given tensor."""
    from llmprune_kernels import fragments, two_four
    from llmprune_kernels.kernels import expand

    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]
    shape = case.out_features, case.in_features
    meta = two_four.pack(two_four_weight(*shape, generator)).meta
    values = random_bits((shape[0], shape[1] // 2), dtype, generator)
    expected = as_words(two_four.unpack(values, meta))
    out = torch.full(shape, float("nan"), dtype=dtype)
    if case.order == "canonical":
        parts = before_poison(values), before_poison(meta)
        new = expand.unpack(*parts)
        given = expand.unpack(*parts, out=out)
    else:
        values_frag, meta_frag = (before_poison(part) for part in fragments.to_fragments(values, meta))
        new = expand.unpack_fragments(values_frag, meta_frag, *shape, dtype)
        given = expand.unpack_fragments(values_frag, meta_frag, *shape, dtype, out=out)
    return {"equal": torch.equal(as_words(new), expected), "out": given is out and torch.equal(as_words(out), expected)}


def inspect(build: Build) -> dict[str, Any]:
    """The machine code of `build` at its default blocks, for features divisible by 16."""
    from aot import compile_kernel, report

    from llmprune_kernels.kernels import expand

    fp32 = build.dtype == "fp32"
    kernel, constants = {
        "linear": (
            expand.linear_kernel,
            {"BLOCK_T": 16, "BLOCK_O": 32 if fp32 else 64, "BLOCK_I": 64 if fp32 else 128, "UP": False},
        ),
        "unpack": (expand.unpack_kernel, {"BLOCK_O": 8, "BLOCK_I": 512}),
        "unpack_fragments": (expand.unpack_fragments_kernel, {}),
    }[build.kernel]
    value = f"*{build.dtype}" if build.kernel == "linear" else "*i32" if fp32 else "*i16"
    if build.kernel == "unpack_fragments":
        value = "*i32"
    types = {"meta_ptr": value if build.kernel == "unpack_fragments" else "*u8"}
    types |= dict.fromkeys(("x_ptr", "values_ptr", "bias_ptr", "y_ptr", "weight_ptr"), value)
    types |= dict.fromkeys(("num_tokens", "out_features", "in_features"), "i32")
    aligned = tuple(name for name in kernel.arg_names if name.endswith(("_ptr", "_features")))
    stages = 3 if build.kernel == "linear" else 1
    return report(compile_kernel(kernel, types, constants, arch=build.arch, num_stages=stages, aligned=aligned))._asdict()


def main() -> None:
    """Print {name: result} of all cases of one mode: interpret, or compile-90 for an architecture."""
    mode, _, arch = sys.argv[1].partition("-")
    if mode == "compile":
        json.dump({str(build): inspect(build) for build in BUILDS if build.arch == int(arch)}, sys.stdout)
        return
    import interpreter

    interpreter.install()
    poison_new_tensors()
    torch.set_num_threads(1)
    results: dict[str, Any] = {str(case): run(case, seed) for seed, case in enumerate(CASES)}
    results |= {str(case): unpacks_exactly(case, seed) for seed, case in enumerate(UNPACKS)}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
