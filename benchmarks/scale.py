"""Scale: what a walk costs beside a forward, how it grows, and that its memory does not.

`make bench-scale` runs the three parts, a quarter of an hour, and writes the tables of docs/scaling.md; `python -m benchmarks
scale-walk`, `scale-growth` or `scale-memory` one of them. `python -m benchmarks.scale_gpu` is the part for a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console

from benchmarks import scale_memory, scale_walk
from llmprune.devices import environment

CPU = torch.device("cpu")


def walk(console: Console) -> dict[str, Any]:
    """Ratios to one plain forward."""
    with_one_thread()
    result = scale_walk.against_forward(console, CPU)
    return {**described(), **result, "wrong": not all(row["met"] for row in result["rows"])}


def growth(console: Console) -> dict[str, Any]:
    """Fitted exponents."""
    with_one_thread()
    return {**described(), "fields": scale_walk.NARROW, "rows": scale_walk.growth(console, CPU)}


def memory(console: Console) -> dict[str, Any]:
    """Peak memory against blocks, and a run under a limit."""
    result = scale_memory.run(console)
    limited = result["limited"]
    is_wrong = result["spread"] > scale_memory.MAX_SPREAD or limited["disk"]["returncode"] != 0
    return {**described(), **result, "shape": scale_memory.SHAPE, "wrong": is_wrong}


PARTS = {"scale-walk": walk, "scale-growth": growth, "scale-memory": memory}


def with_one_thread() -> None:
    """Of several, the processor's seconds would hold those that wait for one another."""
    torch.set_num_threads(1)


def described() -> dict[str, Any]:
    """Where this ran."""
    return {"environment": environment(CPU).model_dump(mode="json")}
