"""Recomputing inputs after each group of sites, once per block, as the papers do, and never: the demo model at 60 %."""

from __future__ import annotations

from typing import Any

from rich.console import Console

import llmprune
from llmprune.devices import pick_device


def run(console: Console) -> dict[str, Any]:
    """Measure the three ways with two methods and print perplexity and seconds."""
    # Half precision is emulated on most CPUs, many times slower than fp32.
    dtype = "float32" if pick_device("auto").type == "cpu" else "auto"
    rows = []
    for sequential in ("group", "block", "none"):
        for method in ("wanda", "sparsegpt"):
            report = llmprune.prune(
                method=method,
                sparsity=0.6,
                sequential=sequential,
                latency=False,
                prompt=(),
                dtype=dtype,
                statistics_cache=False,
            )
            quality = report.quality[0]
            seconds = next(stage.seconds for stage in report.stages if stage.name == "prune")
            console.print(f"{sequential:6s} {method:10s} {quality.perplexity_pruned:9.3f}  {seconds:.1f} s")
            rows.append(
                {
                    "sequential": sequential, "method": method, "dense": quality.perplexity_dense,
                    "perplexity": quality.perplexity_pruned, "kl": quality.kl, "seconds": seconds, "walk": report.walk,
                }
            )  # fmt: skip
    return {"rows": rows}
