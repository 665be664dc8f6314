"""Run the benchmarks: `make bench`, or `python -m benchmarks speed memory quality corpora sequential readme`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import memory, quality, readme, speed

RESULTS = Path(__file__).parent / "results"
BENCHMARKS: dict[str, Any] = {
    "quality": quality.run,
    "sequential": quality.run_sequential,
    "speed": speed.run,
    "memory": memory.run,
    "corpora": quality.run_corpora,
}


def main() -> None:
    """Run what is named, write a JSON file for each, and refresh the README's table from the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, "readme", []], help="default: all")
    names = parser.parse_args().names or [*BENCHMARKS]
    console = Console()
    for name in names:
        if name in BENCHMARKS:
            console.rule(name)
            result = BENCHMARKS[name](console)
            if result is not None:
                (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    readme.refresh(RESULTS)


if __name__ == "__main__":
    main()
