"""`make bench-structured`: Týr and what it is held against, on the models of `make bench-quality` and in the same way.

Before the cells, the time of sliced models is measured in a process of its own, where that has no result yet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import quality_plot, structured_bars, structured_tables, structured_variants
from benchmarks.quality import ROOT, Suite, data_root, run_suite
from benchmarks.quality_bars import Bar
from benchmarks.quality_results import Results

RESULTS = Path(__file__).parent / "results" / "structured.json"
SPEED = Path(__file__).parent / "results" / "structured_speed.json"


def run(console: Console, options: argparse.Namespace) -> bool:
    """Measure what has no result yet, write the tables; whether any of the cells asked for has failed."""
    is_part = any((options.models, options.targets, options.variants))
    if not (options.tables or is_part) and (options.fresh or not SPEED.exists()):
        console.print("Time of sliced models: about ten minutes on one thread.")
        measure_speed()
    return run_suite(SUITE, RESULTS, console, options)


def measure_speed() -> None:
    """Write the file of times, measured in a process that has one thread."""
    environ = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "benchmarks.structured_speed", str(SPEED), str(data_root().resolve())]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **environ})


def _timing() -> dict[str, Any]:
    return json.loads(SPEED.read_text()) if SPEED.exists() else {}


def _bars(results: Results) -> Sequence[Bar]:
    return structured_bars.bars(results, _timing())


def documents(results: Results) -> dict[str, str]:
    """The CSV, the page and the plot, from the results alone."""
    return {
        "structured_results.csv": structured_tables.csv_text(results),
        "structured_results.md": structured_tables.page(results, _timing()),
        "structured_results.svg": quality_plot.svg(results, structured_variants.SHARES),
    }


SUITE = Suite(structured_variants.GRID, structured_variants.models, _bars, documents)
