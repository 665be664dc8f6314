"""Run the benchmarks: `make bench`, or `python -m benchmarks speed memory packed sequential readme`.

`make bench-quality`, or `python -m benchmarks quality`, compares the methods; it takes hours and goes on where it was stopped.
`make bench-structured`, or `python -m benchmarks structured`, does so with those that make matrices smaller.
`make bench-peers`, or `python -m benchmarks peers`, measures llmprune beside llm-compressor.
`make bench-scale`, or `python -m benchmarks scale`, runs scale-walk, scale-growth and scale-memory.
`make bench-service`, or `python -m benchmarks service`, runs service-load, service-download and service-chaos.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import (
    memory,
    packed,
    peers,
    quality,
    readme,
    scale,
    scale_tables,
    sequential,
    service,
    service_chaos,
    service_download,
    service_load,
    speed,
    structured,
)

RESULTS = Path(__file__).parent / "results"
BENCHMARKS: dict[str, Any] = {
    "sequential": sequential.run,
    "speed": speed.run,
    "memory": memory.run,
    "packed": packed.run,
}
BY_CELL: dict[str, Any] = {"quality": quality.run, "structured": structured.run, "peers": peers.run}
SERVICE: dict[str, Any] = {
    "service-load": service_load.run,
    "service-download": service_download.run,
    "service-chaos": service_chaos.run,
}


TOGETHER: dict[str, dict[str, Any]] = {"service": SERVICE, "scale": scale.PARTS}


def main() -> None:
    """Run what is named, write a JSON file for each, and refresh the README's tables from the files.

    Exits with 1 if a result says that something is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*BENCHMARKS, *BY_CELL, *SERVICE, *scale.PARTS, *TOGETHER, "readme", []]
    names_help = "default: all but quality, structured, peers, scale and those of the service"
    parser.add_argument("names", nargs="*", choices=choices, help=names_help)
    quality.add_options(parser)
    peers.add_options(parser)
    options = parser.parse_args()
    console = Console()
    is_wrong = False
    for name in chain.from_iterable(TOGETHER.get(name, [name]) for name in options.names or BENCHMARKS):
        if name == "readme":
            continue
        console.rule(name)
        if name in BY_CELL:  # keeps its own file
            is_wrong |= BY_CELL[name](console, options)
            continue
        result = (BENCHMARKS | SERVICE | scale.PARTS)[name](console)
        is_wrong |= bool(result and result.get("wrong"))
        is_smaller = name in SERVICE and any(size in os.environ for size in service.SMALLER)
        if result is not None and not is_smaller:
            (RESULTS / f"{name.replace('-', '_')}.json").write_text(json.dumps(result, indent=1) + "\n")
    readme.refresh(RESULTS)
    scale_tables.refresh(RESULTS)
    sys.exit(is_wrong)


if __name__ == "__main__":
    main()
