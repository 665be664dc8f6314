"""Compile a Triton kernel for a GPU that is not there, and read its machine code.

Triton's wheel carries ptxas, nvdisasm and cuobjdump, so registers, stack, spills and every instruction are known without a
GPU. Run in a process without TRITON_INTERPRET; `report` is plain data for JSON.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)")
LABEL = re.compile(r"^\s*(\.L_[A-Za-z0-9_]+):")
TARGET = re.compile(r"(\.L_[A-Za-z0-9_]+)\)")


USUAL_ARCH = 90
"""Compiled in every run; what is compiled for others is marked slow."""


def as_parameters(builds: Sequence[Any]) -> list[Any]:
    """Parameters of a test, one for each build."""
    return [pytest.param(build, id=str(build), marks=[pytest.mark.slow] * (build.arch != USUAL_ARCH)) for build in builds]


class Report(NamedTuple):
    """Registers per thread, bytes of stack, shared and local memory, and the instructions of the kernel and of its main loop.

    `loop` counts instructions by name with all modifiers; it is the loop with the most tensor-core instructions (the most
    instructions where there are none). `asm_layouts` are the distinct TTGIR layouts of the inline assembly;
    `loop_conversions` counts `convert_layout` inside loops.
    """

    registers: int
    stack: int
    shared: int
    total: dict[str, int]
    loop: dict[str, int]
    asm_layouts: list[str]
    loop_conversions: int

    def count(self, prefix: str, *, whole: bool = False) -> int:
        """How many instructions begin with `prefix`, in the main loop or in the whole kernel."""
        return sum(n for name, n in (self.total if whole else self.loop).items() if name.startswith(prefix))

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory, in the whole kernel."""
        return self.count("LDL", whole=True) + self.count("STL", whole=True)


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    *,
    arch: int,
    num_warps: int = 4,
    num_stages: int = 1,
    aligned: tuple[str, ...] = (),
) -> Any:
    """Compile `kernel` for `sm_<arch>`.

    Args:
        kernel: what `@triton.jit` returned.
        signature: argument name -> type ("*bf16", "i32"); arguments in `constants` need none.
        constants: constexpr argument -> value; also pointers that are None at launch.
        arch: 80, 90, 100, 120.
        num_warps: warps per CTA.
        num_stages: depth of Triton's own pipelining.
        aligned: arguments divisible by 16 (pointers by bytes), as Triton finds them at launch.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )


def report(compiled: Any) -> Report:
    """Disassemble what `compile_kernel` returned."""
    code, resources = _disassemble(compiled.asm["cubin"])
    instructions, loops = _instructions(code)
    main = max(loops, key=lambda names: (sum("MMA" in name for name in names), len(names)), default=[])
    return Report(
        registers=int(_find(r"REG:(\d+)", resources)),
        stack=int(_find(r"STACK:(\d+)", resources)),
        shared=compiled.metadata.shared,
        total=dict(Counter(instructions)),
        loop=dict(Counter(main)),
        asm_layouts=_asm_layouts(compiled.asm["ttgir"]),
        loop_conversions=_loop_conversions(compiled.asm["ttgir"]),
    )


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, text
    return match[1]


def _disassemble(cubin: bytes) -> tuple[str, str]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.cubin"
        file.write_bytes(cubin)
        code = subprocess.run([tools / "nvdisasm", "-c", file], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file], capture_output=True, text=True, check=True)
    return code, usage.stdout + usage.stderr


def _instructions(code: str) -> tuple[list[str], list[list[str]]]:
    """All instruction names in order, and the bodies of all loops (what a backward branch jumps over)."""
    names: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := INSTRUCTION.search(line):
            name, operands = instruction.groups()
            if name.startswith("BRA") and (target := TARGET.search(operands)):
                branches.append((len(names), target[1]))
            names.append(name)
    bodies = [(labels[target], end) for end, target in branches if labels.get(target, end) < end]
    return names, [names[begin : end + 1] for begin, end in bodies]


def _asm_layouts(ttgir: str) -> list[str]:
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.M))
    used = set(re.findall(r"elementwise_inline_asm.*-> tensor<[^,]+, (#\w+)>", ttgir))
    return sorted(layouts[name] for name in used)


def _loop_conversions(ttgir: str) -> int:
    """`convert_layout` operations nested in an scf.for or scf.while, by counting braces."""
    depth, loops, found = 0, [], 0
    for line in ttgir.splitlines():
        found += bool(loops) and "ttg.convert_layout" in line
        opens, closes = line.count("{"), line.count("}")
        if re.search(r"\bscf\.(for|while)\b", line):
            loops.append(depth)
        depth += opens - closes
        while loops and depth <= loops[-1]:
            loops.pop()
    return found
