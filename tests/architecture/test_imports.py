"""Imports point one way: cli > api > io, measure > engines > anatomy, methods, allocate > masks, stats > spec, errors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "llmprune"
# Rank of each module or folder; a module may import what ranks lower, or its own folder.
RANKS = {
    "_version": 0, "efforts": 0, "turns": 0, "errors": 0, "registration": 0, "patterns": 1, "speed": 1, "spec": 2,
    "pruning": 2, "structure": 2, "recovery_spec": 3, "sweep_spec": 3, "report": 4, "sweep_report": 4, "events": 5,
    "processes": 1, "launching": 2, "continuations": 2, "task_report": 2,
    "linalg": 4, "terminal": 4, "masks": 4, "channels": 5, "stats": 5, "devices": 5, "solvers": 5, "hidden": 5,
    "methods": 6, "allocate": 6, "anatomy": 6, "memory": 7, "packing": 7, "stages": 7, "structured": 7,
    "engines": 8, "measure": 9, "io": 9,
    "speed_tables": 10, "console": 11, "tables": 12,
    "conversion": 10, "description": 10, "loading": 10,
    "allocation": 11, "scoring": 11, "refining": 11, "structuring": 11, "walking": 10, "job": 12,
    "evaluation": 13, "recovery": 13, "fetching": 13, "inspection": 13, "planning": 13,
    "benchmarking": 14, "generation": 14, "sweeps": 14, "api": 15,
    "cli_options": 16, "cli_convert": 17, "cli_measure": 17, "cli_recover": 17, "cli_report": 17, "cli_sweep": 17,
    "cli": 18, "__main__": 19,
}  # fmt: skip
TORCH_FREE = (
    "sweep_spec", "sweep_report", "cli_sweep", "sweeps/__init__", "sweeps/points", "sweeps/page", "sweeps/comparing",
    "sweeps/budget", "sweeps/searching",
    "_version", "efforts", "errors", "registration", "patterns", "spec", "speed", "pruning", "structure", "recovery_spec",
    "report", "events", "terminal", "speed_tables", "console", "tables", "cli", "cli_convert", "cli_measure", "cli_options",
    "cli_recover", "methods/__init__", "allocate/__init__", "allocate/budget", "__init__", "io/headers", "io/course",
    "io/structure_text", "io/scale", "io/pareto", "processes", "launching",
    "cli_report", "io/exports", "io/formats", "io/grid", "io/plots", "io/report_plots",
    "cli_report", "io/exports", "continuations", "task_report",
)  # fmt: skip


def _modules() -> list[Path]:
    return sorted(LIBRARY.rglob("*.py"))


def _unit(path: Path) -> str:
    relative = path.relative_to(LIBRARY)
    return relative.parts[0].removesuffix(".py")


def _imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = _runs_on_import(tree) if top_level_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _runs_on_import(tree: ast.Module) -> list[ast.AST]:
    return [node for node in tree.body if not isinstance(node, ast.If)]


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(LIBRARY)))
def test_imports_point_downwards(path: Path) -> None:
    """No module imports a layer above its own, and no method another method."""
    unit = _unit(path)
    if unit == "__init__":
        return
    assert unit in RANKS, f"{unit} has no place in the layers"
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] != "llmprune" or len(parts) < 2 or parts[1] not in RANKS:
            continue
        assert RANKS[parts[1]] < RANKS[unit] or parts[1] == unit, f"{path.name} imports {name}"
        if unit == "methods" and len(parts) > 2 and path.name != "__init__.py":
            assert parts[1] != "methods", f"method {path.name} imports {name}"


@pytest.mark.parametrize("name", TORCH_FREE)
def test_light_modules_do_not_import_torch_at_top_level(name: str) -> None:
    """What a web process or --help needs comes without torch."""
    assert not {"torch", "transformers", "accelerate"} & {
        module.split(".")[0] for module in _imports(LIBRARY / f"{name}.py", top_level_only=True)
    }


def test_no_library_module_names_a_device_or_asks_for_one_on_import() -> None:
    """No 'cuda:0', and no query of an accelerator when a module is imported."""
    for path in _modules():
        text = path.read_text()
        assert "cuda:0" not in text, path
        for node in _runs_on_import(ast.parse(text)):
            if isinstance(node, ast.Assign):
                assert "is_available" not in ast.unparse(node), path


def test_the_other_packages_keep_to_themselves() -> None:
    """The kernels import torch and triton only; the service imports llmprune's public names and no torch."""
    for path in (ROOT / "triton_kernels").rglob("*.py"):
        roots = {name.split(".")[0] for name in _imports(path)} - set(sys.stdlib_module_names)
        assert roots <= {"torch", "triton", "llmprune_kernels"}, path
    for path in (ROOT / "service").rglob("*.py"):
        assert not {"torch", "transformers"} & {name.split(".")[0] for name in _imports(path)}, path


def test_importing_every_module_touches_no_gpu_and_no_network() -> None:
    """All of the library imports on a machine without accelerator, in a fresh process."""
    names = [".".join(("llmprune", *path.relative_to(LIBRARY).with_suffix("").parts)) for path in _modules()]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = (
        f"import importlib, torch\nfor name in {names!r}: importlib.import_module(name)\nassert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], check=True, cwd=ROOT, timeout=120)
