"""Write the tables of README.md from the results of the benchmarks, between their markers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import packed, peers_tables, quality_tables, service_chaos, service_download, service_load
from benchmarks.quality_results import Results
from benchmarks.service import say_where

README = Path(__file__).parent.parent / "README.md"


def refresh(results: Path) -> None:
    """Replace what stands between <!-- NAME --> and <!-- /NAME --> for every result there is, unless its table is empty."""
    before = text = README.read_text(encoding="utf-8")
    tables: dict[str, Callable[[dict[str, Any]], str]] = {
        "quality": _quality, "speed": _speed, "memory": _memory, "packed": _packed, "peers": peers_tables.readme_table,
        "service_load": _service_load, "service_download": _service_download, "service_chaos": _service_chaos,
    }  # fmt: skip
    for name, table in tables.items():
        file = results / f"{name}.json"
        if file.exists() and (body := table(json.loads(file.read_text()))):
            text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", rf"\g<1>{body}\n\g<2>", text, flags=re.DOTALL)
    if text != before:
        README.write_text(text, encoding="utf-8")


def _quality(result: dict[str, Any]) -> str:
    return quality_tables.readme_table(Results.parse(result))


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


def _packed(result: dict[str, Any]) -> str:
    lines = ["| one weight in bf16 | bytes, of dense | packing, x a copy | unpacking, x a copy |", "|---|---:|---:|---:|"]
    for row in result["formats"]:
        lines.append(f"| {row['format']} | {row['bytes']:.4f} | {row['pack']:.1f} | {row['unpack']:.1f} |")
    note = f"\n{packed.describe(result['checkpoint'])} `python -m benchmarks packed` prints it."
    return "\n".join(lines) + "\n" + note


def _service_load(result: dict[str, Any]) -> str:
    names = [row["database"] for row in result["rows"]]
    rows = [[name.strip(), *values, limit] for name, values, limit in service_load.table_rows(result)]
    return _with_host(["with a job running", *names, "limit"], rows, result, "service-load")


def _service_download(result: dict[str, Any]) -> str:
    rows = [[name.strip(), value] for name, value in service_download.table_rows(result)]
    return _with_host(["download over breaking connections", ""], rows, result, "service-download")


def _service_chaos(result: dict[str, Any]) -> str:
    names = [row["database"] for row in result["rows"]]
    rows = [[name, *values] for name, values in service_chaos.table_rows(result)]
    return _with_host(["jobs under random kills", *names], rows, result, "service-chaos")


def _with_host(head: list[str], rows: list[list[str]], result: dict[str, Any], name: str) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{say_where(result)} `python -m benchmarks {name}` prints it."
