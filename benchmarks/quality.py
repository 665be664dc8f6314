"""The README's table: the demo model under every method at 50 %, 2:4 and 60 %, measured in one run.

Also the models and texts of a folder named by LLMPRUNE_BENCH_DATA (its models/ and corpora/), where there is one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import llmprune
from llmprune.devices import environment, pick_device

METHODS = ("magnitude", "wanda", "sparsegpt")
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("50 %", {"sparsity": 0.5}),
    ("2:4", {"pattern": "2:4"}),
    ("60 %", {"sparsity": 0.6}),
)


def run(console: Console, **overrides: Any) -> dict[str, Any]:
    """Prune the bundled model in every setting and print perplexity, KL and seconds."""
    rows = [_row(console, label, method, fields | overrides) for label, fields in SETTINGS for method in METHODS]
    first = rows[0]
    table = Table("sparsity", "method", "perplexity", "ratio", "KL", "top-1", "prune s", title=f"Demo model, {first['text']}")
    table.add_row("dense", "", f"{first['dense']:.2f}", "1.00", "0", "100 %", "")
    for row in rows:
        table.add_row(
            row["sparsity"], row["method"], f"{row['perplexity']:.2f}", f"{row['ratio']:.2f}", f"{row['kl']:.4f}",
            f"{row['top1']:.1%}", f"{row['seconds']:.1f}",
        )  # fmt: skip
    console.print(table)
    return {"environment": environment(pick_device("auto")).model_dump(), "rows": rows}


def run_sequential(console: Console) -> dict[str, Any]:
    """Recomputing inputs after each group of sites against once per block, as the papers do."""
    rows = []
    for sequential in ("group", "block"):
        for method in ("wanda", "sparsegpt"):
            row = _row(console, "60 %", method, {"sparsity": 0.6, "sequential": sequential})
            rows.append({**row, "sequential": sequential})
    return {"rows": rows}


def run_corpora(console: Console) -> dict[str, Any] | None:
    """Small models trained by others, on TinyStories and WikiText-2; None where the data is not there."""
    root = Path(os.environ.get("LLMPRUNE_BENCH_DATA", "../shared"))
    cases = (
        ("stories260K", "tinystories/calib.txt", "tinystories/test.txt", 512),
        ("TinyStories-656K", "tinystories/calib.txt", "tinystories/test.txt", 512),
        ("stories2M-relu", "tinystories/calib.txt", "tinystories/test.txt", 512),
        ("demo", "calibration/code.utf8", "wikitext-2/wiki.test.raw", 512),
    )
    if not (root / "models").is_dir():
        console.print(f"No models under {root}: skipped. Name a folder with LLMPRUNE_BENCH_DATA.")
        return None
    rows = []
    for model, calibration, evaluation, seq_len in cases:
        for method in METHODS:
            fields = {
                "model": model if model == "demo" else str(root / "models" / model),
                "calibration": str(root / "corpora" / calibration), "eval": str(root / "corpora" / evaluation),
                "seq_len": seq_len, "max_eval_tokens": 65536, "trust_remote_code": model == "stories2M-relu",
            }  # fmt: skip
            rows.append({"model": model, **_row(console, "50 %", method, fields)})
    return {"rows": rows}


def _row(console: Console, label: str, method: str, fields: dict[str, Any]) -> dict[str, Any]:
    # Half precision is emulated on most CPUs, many times slower than fp32.
    dtype = "float32" if pick_device("auto").type == "cpu" else "auto"
    fields = {"sequential": "group", **fields}
    report = llmprune.prune(method=method, latency=False, dtype=dtype, **fields)
    quality = report.quality[0]
    assert quality.perplexity_dense and quality.perplexity_pruned and quality.ratio
    seconds = next(stage.seconds for stage in report.stages if stage.name == "prune")
    # Only the file's name: a table is no place for the folders of a machine.
    text = f"{Path(quality.text.source).name}, seq_len {quality.text.seq_len}, {quality.text.num_tokens} tokens"
    text += f", {report.model.dtype}"
    console.print(
        f"{Path(report.model.name).name:18s} {label:5s} {method:10s} {quality.perplexity_pruned:9.3f}  {seconds:.1f} s"
    )
    return {
        "sparsity": label, "method": method, "text": text, "dense": quality.perplexity_dense,
        "perplexity": quality.perplexity_pruned, "ratio": quality.ratio, "kl": quality.kl, "top1": quality.top1_agreement,
        "seconds": seconds, "walk": report.walk, "achieved": report.sparsity,
    }  # fmt: skip
