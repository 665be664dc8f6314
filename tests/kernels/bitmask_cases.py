"""Cases of the bitmask kernels: a script that prints JSON, of the interpreter's results or of the machine code.

The interpreter has no assembly and our shim of it no loads, so `LoadingPTX` runs the kernel's assembly here: predicates,
64-bit addresses, and loads that must stay within the stored values.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from expand_cases import DTYPES, as_words, random_bits
from mma_sp_cases import before_poison, compare, poison_new_tensors
from numpy.typing import NDArray
from torch import Tensor


class Case(NamedTuple):
    """One launch of `linear` and one of `unpack` on the same weight; `special` is what is odd about its values."""

    dtype: str
    tokens: int
    out_features: int
    in_features: int
    density: float
    bias: bool
    asm: bool
    num_warps: int = 4
    special: str = ""

    def __str__(self) -> str:
        """Name of the test."""
        shape = f"{self.dtype}-T{self.tokens}-O{self.out_features}-I{self.in_features}-{self.density}"
        flags = ["bias"] * self.bias + ["asm"] * self.asm + [self.special] * bool(self.special)
        return "-".join([shape, f"W{self.num_warps}", *flags])


class Build(NamedTuple):
    """A kernel compiled for `sm_<arch>`, the registers a thread may take, the instructions per weight of the main loop."""

    arch: int
    kernel: str
    dtype: str
    tokens: int
    max_registers: int
    max_instructions: float

    def __str__(self) -> str:
        """Name of the test."""
        return f"sm{self.arch}-{self.kernel}-{self.dtype}-T{self.tokens}"


CASES = [
    Case("bf16", 1, 1, 4, 0.5, True, True),
    Case("bf16", 3, 15, 12, 0.2, False, True),
    Case("bf16", 8, 16, 60, 1.0, True, True, 1),
    Case("bf16", 9, 17, 252, 0.5, False, True),
    Case("bf16", 17, 33, 260, 0.2, True, True, 2),
    Case("bf16", 1, 100, 1000, 0.5, True, True),
    Case("bf16", 3, 16, 256, 0.0, True, True),
    Case("bf16", 8, 17, 1001, 1.0, False, True),
    Case("bf16", 3, 17, 256, 0.5, True, True, 4, "inf and nan"),
    Case("fp16", 1, 17, 1000, 0.5, True, True),
    Case("fp16", 9, 100, 12, 0.5, False, True),
    Case("fp16", 17, 15, 1028, 0.2, True, True, 4, "inf and nan"),
    Case("fp16", 8, 1, 3, 1.0, True, True),
    Case("bf16", 1, 100, 60, 0.5, True, False),
    Case("bf16", 9, 17, 1000, 0.2, True, False),
    Case("bf16", 17, 16, 256, 1.0, False, False, 2),
    Case("fp16", 3, 15, 260, 0.5, True, False, 1),
    Case("fp16", 8, 16, 5, 0.0, True, False),
    Case("fp32", 3, 17, 260, 0.5, True, False),
    Case("fp32", 1, 16, 1000, 0.2, False, False),
]

BUILDS = [
    Build(80, "linear", "bf16", 8, 255, 10.0),
    Build(80, "linear", "fp16", 16, 255, 11.5),
    Build(90, "linear", "bf16", 8, 168, 10.5),
    Build(90, "linear", "fp16", 16, 255, 11.5),
    Build(100, "linear", "bf16", 8, 168, 10.5),
    Build(100, "linear", "bf16", 16, 255, 11.5),
    *[Build(arch, "unpack", "bf16", 0, 168, 11.0) for arch in (80, 90, 100)],
    Build(90, "unpack", "fp32", 0, 255, 32.0),
]

WEIGHTS_PER_LANE = 128
"""Of one round of the main loop: 16 rows of 8 columns."""


class LoadingPTX:
    """Stands in for the interpreter's inline assembly: the kernel's PTX in numpy, with loads from `values` only."""

    def __init__(self, values: Tensor) -> None:
        self.begin = values.data_ptr()
        self.size = values.numel()
        self.memory = np.frombuffer((ctypes.c_uint16 * max(1, self.size)).from_address(self.begin), np.uint16)

    def __call__(self, builder: Any, asm: str, constraints: str, operands: list[Any], *_: Any) -> Any:
        """`InterpreterBuilder.create_inline_asm`: one register per lane and operand."""
        import triton.language as tl
        from interpreter import _Results
        from triton.runtime.interpreter import TensorHandle

        num_outputs = constraints.count("=")
        registers = {f"${num_outputs + i}": np.asarray(operand.data) for i, operand in enumerate(operands)}
        for line in re.sub(r"[{}]", "", asm).split(";"):
            if line.strip() and not line.strip().startswith(".reg"):
                self.step(registers, *line.split(None, 1))
        outputs = [registers[f"${i}"].astype(np.uint32).view(np.int32) for i in range(num_outputs)]
        return _Results([TensorHandle(output, tl.int32) for output in outputs])

    def step(self, registers: dict[str, NDArray[Any]], opcode: str, rest: str) -> None:
        """One instruction; the only one that may have a predicate is the load."""
        if opcode == "@kept":
            opcode, rest = rest.split(None, 1)
            assert opcode == "ld.global.nc.u16"
            target, address = re.findall(r"[\w$]+", rest)
            registers[target] = self.load(registers[target], registers[address], registers["kept"])
            return
        target, *names = re.findall(r"[\w$]+", rest)
        a, *others = (registers[name] if name in registers else np.uint32(int(name, 0) & 0xFFFFFFFF) for name in names)
        word = {"b64": np.uint64, "u64": np.uint64}.get(opcode.rsplit(".", 1)[1], np.uint32)
        sources = [np.asarray(a).astype(word), *(np.asarray(b).astype(word) for b in others)]
        lanes = registers["$4"].shape
        results = {
            "mov": lambda a: a,
            "and": np.bitwise_and,
            "shl": np.left_shift,
            "shr": np.right_shift,
            "add": np.add,
            "cvt": lambda a: a & np.uint64(0xFFFFFFFF),
            "setp": np.not_equal,
            "prmt": lambda a, b, _: (a & np.uint32(0xFFFF)) | (b << np.uint32(16)),
        }
        if opcode.startswith("prmt"):
            assert names[2] == "0x5410"
        registers[target] = np.broadcast_to(results[opcode.split(".")[0]](*sources), lanes)

    def load(self, old: NDArray[Any], address: NDArray[Any], kept: NDArray[Any]) -> NDArray[Any]:
        """A 16-bit load where `kept`, zero-extended; an address outside of the values is an error."""
        offset = address.astype(np.int64) - self.begin
        index = offset[kept] // 2
        assert not (offset[kept] % 2).any() and ((index >= 0) & (index < self.size)).all(), "load outside of the values"
        result = old.astype(np.uint32)
        result[kept] = self.memory[index]
        return result


def run(case: Case, seed: int) -> dict[str, Any]:
    """Launch both kernels, compare `linear` with fp64 and `unpack` bit by bit."""
    import triton

    from llmprune_kernels import bitmask
    from llmprune_kernels.kernels import bitmask as kernel

    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]
    shape = case.out_features, case.in_features
    keep = torch.rand(shape, generator=generator) < case.density
    weight = torch.randn(shape, generator=generator).masked_fill(~keep, 0.0).to(dtype)
    if case.special == "inf and nan":
        weight[0, weight[0].nonzero()[0]] = float("inf")
        weight[1, weight[1].nonzero()[0]] = float("nan")
    x = torch.randn(case.tokens, case.in_features, generator=generator).to(dtype)
    bias = torch.randn(case.out_features, generator=generator).to(dtype) if case.bias else None
    pattern = random_bits(shape, dtype, generator).masked_fill(~keep, 0.0)

    original = triton.runtime.interpreter.InterpreterBuilder.create_inline_asm
    results: dict[str, Any] = {}
    for matrix in (weight, pattern):
        packed = bitmask.pack(matrix)
        bits, values, starts = (before_poison(part) for part in (packed.bits, packed.values, bitmask.row_starts(packed.bits)))
        machine = LoadingPTX(values)
        triton.runtime.interpreter.InterpreterBuilder.create_inline_asm = lambda *args, machine=machine: machine(*args)
        kernel._options = lambda _, num_warps: {"NUM_WARPS": num_warps, "ASM": case.asm, "num_warps": num_warps}
        if matrix is weight:
            y = kernel.linear(before_poison(x), bits, values, starts, bias, num_warps=case.num_warps)
            results = compare(x, weight.double(), bias, y)._asdict()
        out = torch.full(shape, float("nan"), dtype=dtype)
        dense = kernel.unpack(bits, values, starts, case.in_features, out=out)
        results["unpacked"] = results.get("unpacked", True) and torch.equal(as_words(dense), as_words(matrix))
    triton.runtime.interpreter.InterpreterBuilder.create_inline_asm = original
    return results


def inspect(build: Build) -> dict[str, Any]:
    """The machine code of `build` as launched on an NVIDIA device with four warps."""
    from aot import compile_kernel, report

    from llmprune_kernels.kernels import bitmask

    constants: dict[str, Any] = {"NUM_WARPS": 4, "ASM": build.dtype != "fp32"}
    value = f"*{build.dtype}"
    if build.kernel == "linear":
        kernel = bitmask.linear_kernel
        constants |= {"BLOCK_T": build.tokens, "UP": False}
    else:
        kernel = bitmask.unpack_kernel
        value = "*i32" if build.dtype == "fp32" else "*i16"
    types = dict.fromkeys(("x_ptr", "values_ptr", "bias_ptr", "y_ptr", "weight_ptr"), value)
    types |= {"bits_ptr": "*u8", "starts_ptr": "*i32"}
    types |= dict.fromkeys(("num_tokens", "out_features", "in_features"), "i32")
    aligned = tuple(name for name in kernel.arg_names if name.endswith(("_ptr", "_features")))
    return report(compile_kernel(kernel, types, constants, arch=build.arch, aligned=aligned))._asdict()


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
    json.dump({str(case): run(case, seed) for seed, case in enumerate(CASES)}, sys.stdout)


if __name__ == "__main__":
    main()
