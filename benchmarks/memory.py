"""Peak memory of the prune stage, and how near `llmprune plan` came.

A random Llama is saved to disk and pruned by the command line in a process of its own; the report's own per-stage peaks
are read. Bound for a walk in batches: model + 3x the hidden states of the calibration set + one block. The one-pass walk
trades memory for time (it holds a block's activations of all tokens at once) and is chosen only where that fits.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from llmprune.devices import environment, pick_device
from llmprune.io.models import BUNDLED_PATH
from llmprune.report import Plan, Report

NUM_SAMPLES, SEQ_LEN = 64, 512
CASES = {
    "wanda, two-pass": ["--method", "wanda"],
    "wanda, one-pass in batches": ["--method", "wanda", "--sequential", "group", "--batch-size", "4"],
    "wanda, one-pass": ["--method", "wanda", "--sequential", "group", "--batch-size", str(NUM_SAMPLES)],
    "sparsegpt, two-pass": ["--method", "sparsegpt"],
}


def save_model(folder: Path) -> None:
    """A Llama of 38 M random weights in fp32 with the demo model's tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=2048, hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for file in BUNDLED_PATH.glob("tokenizer*"):
        shutil.copy(file, folder)


def llmprune(*arguments: str) -> str:
    """Run the command line and return its stdout."""
    command = [sys.executable, "-m", "llmprune", *arguments, "--json"]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environ, timeout=1800).stdout


def idle_bytes() -> int:
    """Resident set of a process that has imported everything and done nothing."""
    code = "import llmprune.api, psutil; print(psutil.Process().memory_info().rss)"
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def run(console: Console) -> dict[str, Any]:
    """Measure every case and print peaks, bound, and the plan's error."""
    idle = idle_bytes()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_model(folder)
        for number, (name, flags) in enumerate(CASES.items()):
            common = [
                str(folder), *flags, "--num-samples", str(NUM_SAMPLES), "--seq-len", str(SEQ_LEN),
                "--calibration", "stdlib", "--eval", "stdlib", "--max-eval-tokens", "4096", "--device", "cpu",
            ]  # fmt: skip
            plan = Plan.model_validate(json.loads(llmprune("plan", *common)))
            out = str(Path(temporary) / str(number))
            report = Report.model_validate(json.loads(llmprune("prune", *common, "--out", out, "--no-latency", "--no-prompt")))
            rows.append(_row(name, report, plan, idle))
    table = Table(
        "walk", "prune peak", "bound", "x hidden", "peak of all", "plan", "plan error", title="Peak resident set, MiB"
    )
    for row in rows:
        mebibytes = (f"{row[key] / 2**20:.0f}" for key in ("prune_bytes", "bound_bytes"))
        rest = (f"{row[key] / 2**20:.0f}" for key in ("peak_bytes", "plan_bytes"))
        table.add_row(row["walk"], *mebibytes, f"{row['times_hidden']:.2f}", *rest, f"{row['plan_error']:+.0%}")
    console.print(table)
    return {"environment": environment(pick_device("cpu")).model_dump(), "idle_bytes": idle, "rows": rows}


def _row(name: str, report: Report, plan: Plan, idle: int) -> dict[str, Any]:
    peaks = {stage.name: stage.peak_cpu_bytes or 0 for stage in report.stages}
    hidden = NUM_SAMPLES * SEQ_LEN * 768 * 4
    weights = report.model.weights_bytes
    block = weights // report.model.num_blocks
    measured = max(peaks.values())
    return {
        "walk": name,
        "prune_bytes": peaks["prune"],
        "bound_bytes": idle + weights + 3 * hidden + block,
        "times_hidden": (peaks["prune"] - idle - weights - block) / hidden,
        "peak_bytes": measured,
        "plan_bytes": plan.peak_cpu_bytes,
        "plan_error": plan.peak_cpu_bytes / measured - 1,
        "stages": peaks,
        "planned_stages": {stage.name: stage.peak_cpu_bytes for stage in plan.stages},
    }
