"""The package imports without Triton, without a GPU and without llmprune, and asks CUDA nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llmprune_kernels

PACKAGE = Path(llmprune_kernels.__file__).parent
SCRIPT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "llmprune", "transformers"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
import torch

def asked(*args, **kwargs):
    raise AssertionError("CUDA was asked")

for name in ("is_available", "get_device_capability", "get_device_properties", "current_device", "device_count", "_lazy_init"):
    setattr(torch.cuda, name, asked)

import llmprune_kernels
from llmprune_kernels import SparseLinear24, BitmaskLinear

assert not any(name.split(".")[0] in ("triton", "llmprune") for name in sys.modules)
for name in llmprune_kernels.__all__:
    assert getattr(llmprune_kernels, name) is not None, name
weight = torch.eye(8, 16)
for kind in (SparseLinear24, BitmaskLinear):
    assert torch.equal(kind.from_weight(weight)(torch.ones(16)), torch.ones(8))
print("fine")
"""


def test_the_package_needs_neither_triton_nor_a_gpu() -> None:
    """In a process where both are out of reach the layers compute."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(PACKAGE.parent)}
    )
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_torch_and_triton_only(path: Path) -> None:
    """And Triton at the top of kernels/ only, which nothing imports at its top."""
    tree = ast.parse(path.read_text())
    everywhere = _names(list(ast.walk(tree)))
    roots = {name.split(".")[0] for name in everywhere}
    assert roots <= {"torch", "triton", "llmprune_kernels", *sys.stdlib_module_names}
    if path.parent == PACKAGE:
        top = _names(tree.body)
        assert not any(name.startswith(("triton", "llmprune_kernels.kernels")) for name in top)


def _names(nodes: list[ast.AST] | list[ast.stmt]) -> set[str]:
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found
