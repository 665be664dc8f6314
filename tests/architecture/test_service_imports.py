"""The service's processes are light: neither the web process nor the worker loads torch, and imports have no circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SERVICE = Path(__file__).parents[2] / "service" / "llmprune_service"
MODULES = sorted(
    ".".join(("llmprune_service", *path.relative_to(SERVICE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SERVICE.rglob("*.py")
    if "migrations" not in path.parts and path.name != "child.py"
)
HEAVY = ("torch", "transformers", "datasets", "accelerate", "pandas", "pyarrow")
# What a job's process needs of the service is nothing: it is started through this file alone.
STANDARD_LIBRARY_ONLY = SERVICE / "child.py"


def test_no_process_of_the_service_loads_torch() -> None:
    """All modules in one fresh process: what none of them loads, the web process and the worker do not load."""
    assert len(MODULES) > 20
    code = (
        f"import importlib, sys\nfor name in {MODULES!r}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", MODULES)
def test_every_module_can_be_imported_first(name: str) -> None:
    """A circle of imports shows when the wrong module comes first; at top level only, in file order."""
    seen: list[str] = []

    def visit(module: str) -> None:
        assert module not in seen, f"{' -> '.join([*seen, module])} is a circle"
        seen.append(module)
        for imported in _imports_of(module):
            visit(imported)
        seen.pop()

    visit(name)


def test_the_launcher_of_jobs_needs_the_standard_library_only() -> None:
    """It runs in isolated mode before anything else."""
    tree = ast.parse(STANDARD_LIBRARY_ONLY.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names <= set(sys.stdlib_module_names)


def _imports_of(module: str) -> set[str]:
    path = SERVICE.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmprune_service"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else str(node.module))
    return found - {module, "llmprune_service"}
