"""The machine code of the mma.sp kernels: what the design promises, read from cubins compiled without a GPU.

Run as a script with `compile-ARCH` it prints the reports as JSON; `--table ARCH KIND` prints registers and instructions of
every legal tile.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aot import Report, as_parameters, compile_kernel, report

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
SCRIPT = Path(__file__).name


class Build(NamedTuple):
    """A tile compiled for `sm_<arch>`, and the registers a thread may take."""

    arch: int
    kind: str
    row_tiles: int
    token_tiles: int
    num_warps: int
    shuffle_x: bool
    max_registers: int

    def __str__(self) -> str:
        """Name of the test."""
        shuffled = "-shuffled" * self.shuffle_x
        return f"sm{self.arch}-{self.kind.replace(' ', '-')}-{self.row_tiles}x{self.token_tiles}x{self.num_warps}{shuffled}"


BUILDS = [
    Build(80, "bf16", 1, 1, 8, False, 128),
    Build(80, "fp16", 2, 2, 8, False, 184),
    Build(80, "int8 bf16", 1, 1, 8, False, 128),
    Build(90, "bf16", 1, 1, 16, False, 128),
    Build(90, "fp16", 1, 1, 8, False, 128),
    Build(90, "bf16", 2, 1, 8, False, 184),
    Build(90, "bf16", 2, 1, 16, True, 128),
    Build(90, "bf16", 2, 2, 8, True, 184),
    Build(90, "bf16", 4, 4, 8, False, 255),
    Build(90, "bf16", 2, 8, 8, True, 255),
    Build(90, "int8 bf16", 1, 1, 8, True, 128),
    Build(90, "int8 fp16", 2, 1, 8, False, 184),
    Build(100, "bf16", 1, 1, 8, False, 128),
    Build(100, "bf16", 2, 2, 8, True, 184),
    Build(100, "int8 fp16", 1, 1, 8, False, 128),
]


@needs_triton
@pytest.mark.parametrize("build", as_parameters(BUILDS))
def test_machine_code(build: Build, reports: dict[str, Any]) -> None:
    """Eight HMMA.SP per tile and block, 128-bit streaming loads of every weight, no spill, registers within the budget."""
    sass = Report(**reports[str(build)])
    words = 4 if build.kind.startswith("int8") else 8
    kind = "BF16" if build.kind.endswith("bf16") else "F32"  # HMMA.SP.16832.F32 is fp16
    assert (
        sass.count("HMMA.SP.16832.F32.BF16" if kind == "BF16" else "HMMA.SP.16832.F32")
        == 8 * build.row_tiles * build.token_tiles
    )
    weight_loads = (words + 1) * build.row_tiles
    x_loads = 8 * build.token_tiles
    assert sass.count("LDG.E.EF.128") == weight_loads
    assert sass.count("LDG.E.128") == (x_loads if build.shuffle_x else 0)
    assert sass.count("LDG") == weight_loads + x_loads * (1 if build.shuffle_x else 4)
    assert sass.count("LDS") + sass.count("STS") + sass.count("BAR") + sass.count("SHFL") == 0
    assert (sass.spills, sass.stack) == (0, 0)
    assert sass.registers <= build.max_registers
    assert sass.registers * 32 * build.num_warps <= 65536


@needs_triton
@pytest.mark.parametrize("build", as_parameters(BUILDS))
def test_layout(build: Build, reports: dict[str, Any]) -> None:
    """The assembly's operands lie one row per lane with its four columns in registers, and are not moved in the loop."""
    sass = Report(**reports[str(build)])
    assert sass.asm_layouts
    for layout in sass.asm_layouts:
        assert re.search(r"sizePerThread = \[1, [14]\], threadsPerWarp = \[32, 1\]", layout), layout
        assert f"warpsPerCTA = [{build.num_warps}, 1]" in layout
    if all("[1, 4]" in layout for layout in sass.asm_layouts):
        assert sass.loop_conversions == 0


def inspect(build: Build) -> Report:
    """Compile `build` without a bias and with a width divisible by 256."""
    from llmprune_kernels.kernels import mma_sp

    int8 = build.kind.startswith("int8")
    pointer = "*bf16" if build.kind.endswith("bf16") else "*fp16"
    tile = mma_sp.Tile(build.row_tiles, build.token_tiles, build.num_warps, 1, build.shuffle_x)
    constants: dict[str, Any] = {**mma_sp.constants(tile, 4096, int8=int8), "bias_ptr": None}
    if not int8:
        constants["scale_ptr"] = None
    signature = {
        "x_ptr": pointer,
        "values_ptr": "*i32",
        "meta_ptr": "*i32",
        "scale_ptr": "*fp32",
        "y_ptr": pointer,
        "num_tokens": "i32",
        "out_features": "i32",
        "in_features": "i32",
    }
    aligned = ("x_ptr", "values_ptr", "meta_ptr", "y_ptr", "out_features", "in_features")
    kernel = mma_sp.mma_sp_kernel
    return report(compile_kernel(kernel, signature, constants, arch=build.arch, num_warps=build.num_warps, aligned=aligned))


def print_table(arch: int, kind: str) -> None:
    """Registers, instructions of the loop and instructions per stored byte of every legal tile."""
    from llmprune_kernels.kernels import mma_sp

    num_bytes = 2560 if kind.startswith("int8") else 4608
    for tile in mma_sp.TILES:
        sass = inspect(Build(arch, kind, tile.row_tiles, tile.token_tiles, tile.num_warps, tile.shuffle_x, 255))
        size = sum(sass.loop.values())
        per_byte = size / (num_bytes * tile.row_tiles)
        name = f"{tile.row_tiles}x{tile.token_tiles}x{tile.num_warps}{' shuffled' * tile.shuffle_x}"
        print(f"sm_{arch} {kind} {name:16} {sass.registers:3} regs {sass.spills:3} spills {size:5} {per_byte:.4f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--table"]:
        print_table(int(sys.argv[2]), sys.argv[3])
    else:
        arch = int(sys.argv[1].removeprefix("compile-"))
        json.dump({str(build): inspect(build)._asdict() for build in BUILDS if build.arch == arch}, sys.stdout)
