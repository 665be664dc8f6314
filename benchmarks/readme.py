"""Write the tables of README.md from the results of the benchmarks, between their markers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"


def refresh(results: Path) -> None:
    """Replace what stands between <!-- NAME --> and <!-- /NAME --> for every result there is."""
    text = README.read_text(encoding="utf-8")
    tables: dict[str, Callable[[dict[str, Any]], str]] = {"quality": _quality, "speed": _speed, "memory": _memory}
    for name, table in tables.items():
        file = results / f"{name}.json"
        if file.exists():
            body = table(json.loads(file.read_text()))
            text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", rf"\g<1>{body}\n\g<2>", text, flags=re.DOTALL)
    README.write_text(text, encoding="utf-8")


def _quality(result: dict[str, Any]) -> str:
    rows = result["rows"]
    lines = [
        "| sparsity | method | perplexity | x dense | KL(dense \\|\\| pruned) | top-1 agreement | pruning |",
        "|---|---|---:|---:|---:|---:|---:|",
        f"| dense | | {rows[0]['dense']:.2f} | 1.00 | 0 | 100 % | |",
    ]
    for row in rows:
        lines.append(
            f"| {row['sparsity']} | {row['method']} | {row['perplexity']:.2f} | {row['ratio']:.2f} | {row['kl']:.4f} "
            f"| {row['top1']:.1%} | {row['seconds']:.1f} s |"
        )
    note = (
        f"\n{rows[0]['text']}, {rows[0]['walk']} walk (`--sequential group`); {result['environment']['device']}. "
        "`python -m benchmarks quality` prints it."
    )
    return "\n".join(lines) + "\n" + note


def _speed(result: dict[str, Any]) -> str:
    lines = ["| pruning | x one forward pass | target |", "|---|---:|---:|"]
    for row in result["rows"]:
        lines.append(f"| {row['case']} | {row['ratio']:.2f} | {row['target'] or ''} |")
    note = f"\n{result['shape']}; {result['environment']['device']}. `python -m benchmarks speed` prints it."
    return "\n".join(lines) + "\n" + note


def _memory(result: dict[str, Any]) -> str:
    lines = ["| walk | peak while pruning | x hidden states | plan against measured |", "|---|---:|---:|---:|"]
    for row in result["rows"]:
        lines.append(
            f"| {row['walk']} | {row['prune_bytes'] / 2**20:.0f} MiB | {row['times_hidden']:.2f} | {row['plan_error']:+.0%} |"
        )
    return "\n".join(lines) + "\n\n`python -m benchmarks memory` prints it."
