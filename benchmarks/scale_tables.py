"""The tables of docs/scaling.md: from the results of the benchmarks, and on paper from their rates."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import scale_formulas as formulas

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
NUM_TOKENS, SEQ_LEN, BATCH_TOKENS, ITEMSIZE = 128 * 2048, 2048, 8192, 2
# A device that is assumed, not measured: its rates are stated on the page.
ASSUMED = formulas.Rates(product=400e12, gram=400e12, single=40e12, double=40e12, column_seconds=40e-6, disk=2e9)
METHODS = ("wanda", "sparsegpt")


def refresh(results: Path, page: Path = PAGE) -> None:
    """Write every table anew for which there is a result; the rest of the page stays."""
    before = text = page.read_text(encoding="utf-8")
    found = {name: _read(results / f"scale_{name}.json") for name in ("walk", "growth", "memory")}
    tables = {"scale_bytes": bytes_table()}
    if found["walk"]:
        tables |= {"scale_walk": walk_table(found["walk"]), "scale_paper": paper_table(found["walk"])}
    if found["growth"]:
        tables["scale_growth"] = growth_table(found["growth"])
    if found["memory"]:
        tables["scale_memory"] = memory_table(found["memory"])
    for name, table in tables.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", rf"\g<1>{table}\n\g<2>", text, flags=re.DOTALL)
    if text != before:
        page.write_text(text, encoding="utf-8")


def walk_table(result: dict[str, Any]) -> str:
    """Every case beside one forward, with its limit."""
    rows = [
        (
            row["case"], f"{row['ratio']:.2f}", f"{row['limit']:.2f}", f"{row['limit'] / row['ratio']:.0%}",
            f"{row['target']:g}", "met" if row["met"] else "missed", f"{row['wall_ratio']:.2f}",
        )
        for row in result["rows"]
    ]  # fmt: skip
    fields = result["fields"]
    note = (
        f"{result['num_tokens']} tokens in sequences of {result['seq_len']}, {result['dtype']}, Llama of "
        f"{fields['num_hidden_layers']} blocks of width {fields['hidden_size']}; {_where(result)}, one thread. Medians of "
        f"{len(result['rows'][0]['ratios'])} pairs, in seconds of the processor. Products: {result['single_rate'] / 1e9:.0f} "
        f"GFLOP/s in fp32, {result['double_rate'] / 1e9:.0f} in fp64; the forward reaches {_forward_rate(result) / 1e9:.0f}. "
        "`python -m benchmarks scale-walk` prints it."
    )
    head = ("one-pass walk", "x one forward", "limit", "of the limit", "target", "", "by the clock")
    return _table(head, rows) + "\n\n" + note


def growth_table(result: dict[str, Any]) -> str:
    """Exponents and the points they are fitted to."""
    rows = [
        (
            f"{row['case']}, against {row['what']}", f"{row['exponent']:.3f}", f"{row['r2']:.4f}",
            ", ".join(f"{size}: {seconds:.2f} s" for size, seconds in zip(row["sizes"], row["seconds"], strict=True)),
        )
        for row in result["rows"]
    ]  # fmt: skip
    note = f"Llamas of width {result['fields']['hidden_size']}; {_where(result)}, one thread, seconds of the processor."
    table = _table(("", "exponent", "r^2", "points"), rows)
    return f"{table}\n\n{note} `python -m benchmarks scale-growth` prints it."


def memory_table(result: dict[str, Any]) -> str:
    """Peaks against the number of blocks, and the run under a limit."""
    rows = []
    for row in result["blocks"]:
        peaks = (_mebibytes(row[name]) for name in ("anonymous", "file", "resident"))
        rows.append(
            (str(row["num_blocks"]), _mebibytes(row["checkpoint_bytes"]), *peaks, "yes" if not row["returncode"] else "no")
        )
    head = ("blocks", "checkpoint, MiB", "anonymous", "file pages", "resident", "pruned")
    limited = result["limited"]
    lines = []
    for offload in ("disk", "cpu"):
        one = limited[offload]
        ended = "prunes it" if one["returncode"] == 0 else f"ends with exit code {one['returncode']}"
        lines.append(f"`--offload {offload}` {ended} (virtual {_mebibytes(one['virtual'])} MiB at most).")
    note = (
        f"Anonymous pages of the largest over those of the smallest: {1 + result['spread']:.3f}. Under {limited['limit']} of "
        f"{_mebibytes(limited['limit_bytes'])} MiB, of which {_mebibytes(limited['idle_virtual_bytes'])} are taken by "
        f"importing llmprune, a checkpoint of {limited['num_blocks']} blocks and {_mebibytes(limited['checkpoint_bytes'])} "
        f"MiB: {' '.join(lines)} "
        "`python -m benchmarks scale-memory` prints it."
    )
    return _table(head, rows) + "\n\n" + note


def bytes_table() -> str:
    """What a streamed walk holds of large models, by the formulas alone."""
    rows = []
    for name, fields in formulas.LLAMAS.items():
        for method in METHODS:
            parts = formulas.bytes_of(fields, method, NUM_TOKENS, BATCH_TOKENS, ITEMSIZE)
            held = sum(value for key, value in parts.items() if key != "checkpoint")
            rows.append((f"{name}, {method}", *(f"{value / 1e9:.1f}" for value in (*parts.values(), held))))
    head = ("GB, bf16", "checkpoint", "3 blocks", "hidden states", "activations", "solve", "held in all")
    return _table(head, rows)


def paper_table(result: dict[str, Any]) -> str:
    """Times of large models, from the shares of this run: computed, not measured."""
    here, there = rates_of(result), assumed_rates(result)
    rows = []
    for name, fields in formulas.LLAMAS.items():
        for method in METHODS:
            shape, over = formulas.shape_of(fields), overhead(result, method)
            seconds = [
                over * formulas.total_seconds(shape, method, NUM_TOKENS, SEQ_LEN, rates, ITEMSIZE) for rates in (here, there)
            ]
            flops = formulas.forward_flops(shape, NUM_TOKENS, SEQ_LEN)
            rows.append((f"{name}, {method}", f"{flops / 1e15:.1f}", f"{over:.2f}", *(duration(value) for value in seconds)))
    share = _forward_rate(result) / result["product_rate"]
    note = (
        f"**Computed, never run.** {NUM_TOKENS} tokens in sequences of {SEQ_LEN}, one pass. What a walk is over its limit, and "
        f'the {share:.0%} of the product rate that a forward reaches, are this run\'s. "One thread here" is of the machine '
        f"above; the last column's device is assumed: {ASSUMED.product / 1e12:.0f} TFLOP/s in bf16, "
        f"{ASSUMED.single / 1e12:.0f} in fp32 and fp64, {ASSUMED.column_seconds * 1e6:.0f} us to start the operations of "
        f"one SparseGPT column, disk {ASSUMED.disk / 1e9:g} GB/s."
    )
    head = ("", "forward, PFLOP", "over the limit", "one thread here", "assumed device")
    return _table(head, rows) + "\n\n" + note


def overhead(result: dict[str, Any], method: str) -> float:
    """How far above its limit this run's walk by a method stays."""
    row = next(row for row in result["rows"] if row["case"] == method)
    return float(row["ratio"] / row["limit"])


def rates_of(result: dict[str, Any]) -> formulas.Rates:
    """The rates of this run; its forward's for products of activations and weights."""
    return formulas.Rates(
        product=_forward_rate(result), gram=result["single_rate"], single=result["single_rate"], double=result["double_rate"]
    )


def assumed_rates(result: dict[str, Any]) -> formulas.Rates:
    """Those of the assumed device, whose forward reaches the share of its products that this run's does."""
    share = _forward_rate(result) / result["product_rate"]
    return formulas.Rates(**{**vars(ASSUMED), "product": share * ASSUMED.product})


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, whichever is short."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _forward_rate(result: dict[str, Any]) -> float:
    return float(result["forward_flops"] / result["rows"][0]["forward_seconds"])


def _where(result: dict[str, Any]) -> str:
    return f"{result['environment']['device'].split(' (')[0]}, torch {result['environment']['torch']}"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:.0f}"


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
