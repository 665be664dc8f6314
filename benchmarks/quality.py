"""`make bench-quality`: every method, combination and preset on the demo model and on the models of a folder.

The folder is named by LLMPRUNE_BENCH_DATA (its models/ and corpora/). Every cell is a process of its own, and its result is
in the file of results as soon as it is there: a run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import quality_bars, quality_plot, quality_tables
from benchmarks.quality_bars import Bar
from benchmarks.quality_results import Results
from benchmarks.quality_variants import PATHS, QUALITY, Cell, Grid, Model, find_models
from llmprune.spec import BUNDLED_MODEL

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "quality.json"
DOCS = ROOT / "docs"
LIMIT_MINUTES = 20.0


@dataclass(frozen=True)
class Suite:
    """One benchmark of this kind.

    Attributes:
        models: those below a folder.
        bars: what the results must reach.
        documents: texts by the name of the file in docs/.
    """

    grid: Grid
    models: Callable[[Path], list[Model]]
    bars: Callable[[Results], Sequence[Bar]]
    documents: Callable[[Results], dict[str, str]]


def documents(results: Results) -> dict[str, str]:
    """The CSV, the page and the plot, from the results alone."""
    return {
        "quality.csv": quality_tables.csv_text(results),
        "quality.md": quality_tables.page(results),
        "quality.svg": quality_plot.svg(results),
    }


SUITE = Suite(QUALITY, find_models, quality_bars.bars, documents)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What only this benchmark takes, and those of the same kind."""
    group = parser.add_argument_group("quality, structured")
    for name, example in (("models", "demo"), ("targets", "60%%,2:4"), ("variants", "wanda,alps+reconstruct")):
        group.add_argument(f"--{name}", default="", metavar="A,B", help=f"only these, such as {example}")
    group.add_argument("--jobs", type=int, default=1, help="cells at once, which share the cores (1)")
    group.add_argument("--limit", type=float, default=LIMIT_MINUTES, help=f"minutes a cell may take ({LIMIT_MINUTES:g})")
    group.add_argument("--fresh", action="store_true", help="measure again what has a result")
    group.add_argument("--tables", action="store_true", help="measure nothing: tables and plot from the results there are")


def run(console: Console, options: argparse.Namespace) -> bool:
    """Measure what has no result yet, write tables and plot; whether any of the cells asked for has failed."""
    return run_suite(SUITE, RESULTS, console, options)


def run_suite(suite: Suite, file: Path, console: Console, options: argparse.Namespace) -> bool:
    """:func:`run` of any suite, whose results are in ``file``."""
    suite.grid.check()
    results = Results.read(file, suite.grid)
    has_failed = False
    if not options.tables:
        chosen = _choose(suite, console, options)
        results.models |= {cell.model.name: cell.model for cell in chosen}
        open_cells = [cell for cell in chosen if options.fresh or not results.is_done(cell, 60 * options.limit)]
        console.print(f"{len(chosen)} cells, {len(chosen) - len(open_cells)} of them with a result.")
        for line in _measure(open_cells, results, file, jobs=options.jobs, limit_seconds=60 * options.limit):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        failed = [cell.key for cell in chosen if (found := results.cell(cell)) and found["status"] == "failed"]
        has_failed = bool(failed)
        if failed:
            console.print(f"FAILED: {', '.join(failed)}", style="red", markup=False)
    if results.cells:
        for name, text in suite.documents(results).items():
            (DOCS / name).write_text(text, encoding="utf-8")
        for bar in suite.bars(results):
            console.print(f"{bar.verdict:12s} {bar.text}", highlight=False, markup=False, soft_wrap=True)
    return has_failed


def _choose(suite: Suite, console: Console, options: argparse.Namespace) -> list[Cell]:
    root = data_root()
    models = suite.models(root)
    if [model.name for model in models] == [BUNDLED_MODEL]:
        console.print(f"No models under {root}: only the demo model. Name a folder with LLMPRUNE_BENCH_DATA.")
    names = _only(options.models, [model.name for model in models], "models")
    variants = _only(options.variants, list(suite.grid.variants), "variants")
    targets = _only(options.targets, list(suite.grid.targets), "targets")
    asked = [cell for cell in suite.grid.cells(models) if cell.target in targets and cell.variant.name in variants]
    return [cell for cell in asked if cell.model.name in names]


def _only(asked: str, known: Sequence[str], what: str) -> list[str]:
    """The known names that were asked for, spaces aside ("60%" is "60 %"); all where none was."""
    plain = {name.replace(" ", ""): name for name in known}
    wanted = [name.replace(" ", "") for name in asked.split(",") if name.strip()] or list(plain)
    unknown = [name for name in wanted if name not in plain]
    if unknown:
        raise SystemExit(f"--{what}: {', '.join(unknown)} unknown; known are {', '.join(plain)}.")
    return [plain[name] for name in wanted]


def data_root() -> Path:
    """Where the models and texts are."""
    return Path(os.environ.get("LLMPRUNE_BENCH_DATA", "../shared"))


def _measure(open_cells: list[Cell], results: Results, file: Path, *, jobs: int, limit_seconds: float) -> Iterator[str]:
    """Measure cells, file each result as it comes, and yield a line about it."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        futures: dict[Future[dict[str, Any]], Cell] = {
            pool.submit(run_cell, cell, jobs=jobs, limit_seconds=limit_seconds): cell for cell in open_cells
        }
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                cell, result = futures[future], future.result()
                results.add(cell, result)
                results.write(file)
                spent = time.perf_counter() - begun
                rest = spent / number * (len(open_cells) - number)
                yield f"[{number}/{len(open_cells)}] {_line(cell, result)}; {_minutes(spent)} so far, {_minutes(rest)} to go"
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_cell(cell: Cell, *, jobs: int, limit_seconds: float) -> dict[str, Any]:
    """One cell in a process of its own: what it measured, or why there is nothing."""
    fields = dict(cell.fields)
    if cell.model.name != BUNDLED_MODEL:
        fields |= {name: str((data_root() / fields[name]).resolve()) for name in PATHS}
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    environ = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "result.json"
        command = [sys.executable, "-m", "benchmarks.quality_cell", str(file)]
        try:
            subprocess.run(
                command, input=json.dumps(fields), capture_output=True, text=True, check=True, timeout=limit_seconds,
                cwd=ROOT, env={**os.environ, **environ},
            )  # fmt: skip
            result = {"status": "ok", **json.loads(file.read_text())}
        except subprocess.TimeoutExpired:
            result = {"status": "limit", "limit_seconds": limit_seconds}
        except subprocess.CalledProcessError as error:
            result = {"status": "failed", "error": _reason(error)}
    return {**result, "wall_seconds": round(time.perf_counter() - begun, 1)}


def _reason(error: subprocess.CalledProcessError) -> str:
    """Why a cell's process ended: the exception, which is the last line it wrote, or the signal."""
    if error.returncode < 0:
        return f"ended by {signal.Signals(-error.returncode).name}"
    lines = error.stderr.strip().splitlines()
    # Names below the data's folder: results are no place for the folders of a machine.
    return lines[-1].replace(f"{data_root().resolve()}/", "") if lines else f"exit code {error.returncode}"


def _line(cell: Cell, result: dict[str, Any]) -> str:
    name = f"{cell.model.name:16s} {cell.target:6s} {cell.variant.name:22s}"
    if result["status"] == "ok":
        values = f"{quality_tables.number(result['perplexity'])} (dense {quality_tables.number(result['perplexity_dense'])})"
        return f"{name} {values}, {result['seconds']:.1f} s of {result['wall_seconds']:.0f} s"
    if result["status"] == "limit":
        return f"{name} not done after {_minutes(result['limit_seconds'])}"
    return f"{name} FAILED: {result['error']}"


def _minutes(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
