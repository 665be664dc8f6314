"""Run the benchmarks: `make bench`, or `python -m benchmarks speed memory packed quality corpora sequential readme`.

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

from benchmarks import memory, packed, quality, readme, service, service_chaos, service_download, service_load, speed

RESULTS = Path(__file__).parent / "results"
BENCHMARKS: dict[str, Any] = {
    "quality": quality.run,
    "sequential": quality.run_sequential,
    "speed": speed.run,
    "memory": memory.run,
    "packed": packed.run,
    "corpora": quality.run_corpora,
}
SERVICE: dict[str, Any] = {
    "service-load": service_load.run,
    "service-download": service_download.run,
    "service-chaos": service_chaos.run,
}


def main() -> None:
    """Run what is named, write a JSON file for each, and refresh the README's table from the files.

    Exits with 1 if a result says that something is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*BENCHMARKS, *SERVICE, "service", "readme", []]
    parser.add_argument("names", nargs="*", choices=choices, help="default: all but those of the service")
    names = parser.parse_args().names or [*BENCHMARKS]
    console = Console()
    is_wrong = False
    for name in chain.from_iterable(SERVICE if name == "service" else [name] for name in names):
        if name != "readme":
            console.rule(name)
            result = (BENCHMARKS | SERVICE)[name](console)
            is_wrong |= bool(result and result.get("wrong"))
            is_smaller = name in SERVICE and any(size in os.environ for size in service.SMALLER)
            if result is not None and not is_smaller:
                (RESULTS / f"{name.replace('-', '_')}.json").write_text(json.dumps(result, indent=1) + "\n")
    readme.refresh(RESULTS)
    sys.exit(is_wrong)


if __name__ == "__main__":
    main()
