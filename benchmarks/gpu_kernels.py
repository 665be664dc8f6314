"""Everything that needs a GPU, in one visit: check every kernel on the silicon, then time it, then a whole model.

    make bench-gpu                                                    # or, where nothing is installed:
    PYTHONPATH=triton_kernels python3 -m benchmarks.gpu_kernels       # needs torch, triton and transformers; about 8 minutes

No speed is reported while a check is red. Results go to benchmarks/results/<gpu>.json, and the fastest tiles to the kernel
table of this machine. `--check-only` stops after the checks; `--dry-run` runs the logic on a CPU with tiny shapes, whose
times mean nothing and are not kept.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checks, gpu_model, gpu_times
from llmprune_kernels import dispatch, tuning

RESULTS = Path(__file__).parent / "results"
MAX_LOGITS_ERROR = 0.05  # of 32 blocks in bf16, packed against pruned
TINY_SHAPES = ((32, 256), (48, 260))
Find = Callable[[dict[str, Any]], float | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the visit; 0 if all checks are green, 1 if one is red, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check-only", action="store_true", help="check, and time nothing")
    parser.add_argument("--dry-run", action="store_true", help="the logic on a CPU, with tiny shapes")
    parser.add_argument("--no-model", action="store_true", help="leave the 8 B model out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU: nothing was checked and nothing was measured. --dry-run exercises the logic of this script on a CPU.")
        return 2
    with stand_ins() if options.dry_run else nullcontext():
        return visit(options)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Let the reference stand in for every kernel: a dry run is about this script, not about them."""
    kept = {op: dict(launchers) for op, launchers in dispatch.LAUNCHERS.items()}
    try:
        for launchers in dispatch.LAUNCHERS.values():
            launchers.update(dict.fromkeys(launchers, launchers["reference"]))
        yield
    finally:
        dispatch.LAUNCHERS.update(kept)


def visit(options: argparse.Namespace) -> int:
    """Check, then measure; returns the exit code."""
    begun = time.monotonic()
    say = lambda text: print(f"[{time.monotonic() - begun:5.0f} s] {text}", flush=True)
    device = torch.device("cpu" if options.dry_run else "cuda")
    result: dict[str, Any] = {"environment": environment(device), "dry_run": options.dry_run}
    say(" ".join(f"{name}: {value};" for name, value in result["environment"].items()))

    outcomes = gpu_checks.run_all(device.type, small=options.dry_run)
    result["checks"] = {"count": len(outcomes), "red": gpu_checks.as_records(outcomes)}
    result["worst_error"] = max((outcome.error or 0.0 for outcome in outcomes if not outcome.red), default=0.0)
    if result["checks"]["red"] or not outcomes:
        for record in result["checks"]["red"][:50]:
            say(f"RED {record['name']}: {record['red']}")
        say(f"RED: {len(result['checks']['red'])} of {len(outcomes)} checks failed. No speed is reported.")
        return 1
    say(f"all {len(outcomes)} checks are green; worst relative error {result['worst_error']:.2e}")
    if options.check_only:
        return 0

    with torch.no_grad():
        measure_kernels(result, device, say)
    if not options.no_model:
        measure_model(result, device, say)
        if not max(result["model"]["logits_error"], result["model"]["fused_logits_error"]) <= MAX_LOGITS_ERROR:
            say(f"RED: the packed model's logits are off by {result['model']['logits_error']:.3g}. No speed is reported.")
            return 1
    print("\n" + verdict_table(result))
    text = json.dumps(result, indent=1) + "\n"
    if options.dry_run:
        say("dry run: these times are of a CPU and tiny shapes; nothing was kept")
        return 0
    name = re.sub(r"[^a-z0-9]+", "_", result["environment"]["device"].lower()).strip("_")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}.json"
    path.write_text(text)
    say(f"written: {path}")
    return 0


def measure_kernels(result: dict[str, Any], device: torch.device, say: Callable[[str], None]) -> None:
    """Fill in the copy bandwidth, the rows of times and the kernel table, which is written for this machine."""
    tiny: dict[str, Any] = {}
    if device.type == "cuda":
        clock = gpu_times.Clock(device, tuning.graph_microseconds)
        result["copy_tbs"] = gpu_times.copy_bandwidth(clock)
    else:
        clock = gpu_times.Clock(device, wall_microseconds, rotation_bytes=2**14)
        result["copy_tbs"] = gpu_times.copy_bandwidth(clock, 2**12)
        tiny = {"shapes": TINY_SHAPES, "token_counts": (1, 16)}
    say(f"copy: {result['copy_tbs']:.2f} TB/s")
    rows, entries = gpu_times.time_two_four(clock, **tiny, say=say)
    other_rows, other_entries = gpu_times.time_others(clock, **tiny, say=say)
    result["rows"], result["table"] = rows + other_rows, entries | other_entries
    for row in result["rows"]:
        row["percent_of_copy"] = 100 * row["tbs"] / result["copy_tbs"]
    if device.type == "cuda":
        say(f"kernel table: {dispatch.write_table(dispatch.describe(device), result['table'])}")


def measure_model(result: dict[str, Any], device: torch.device, say: Callable[[str], None]) -> None:
    """Fill in the times of the whole model."""
    if device.type == "cuda":
        result["model"] = gpu_model.run(device, gpu_model.event_seconds, say=say)
    else:
        wall_seconds = lambda work: wall_microseconds([work]) / 1e6
        result["model"] = gpu_model.run(device, wall_seconds, fields=gpu_model.TINY, context=8, prefill=(8,), steps=2, say=say)


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {"torch": torch.__version__, "triton": dispatch.triton_version(), "llmprune": dispatch.package_version()}
    if device.type != "cuda":
        return {"device": "cpu", **versions}
    gpu = dispatch.describe(device)
    return {
        "device": gpu.name, "capability": f"{gpu.capability[0]}.{gpu.capability[1]}", "num_sms": gpu.num_sms,
        "l2_bytes": gpu.l2_bytes, "cuda": torch.version.cuda, **versions,
    }  # fmt: skip


def wall_microseconds(thunks: Sequence[tuning.Thunk]) -> float:
    """The clock of a dry run."""
    begun = time.perf_counter()
    for thunk in thunks:
        thunk()
    return (time.perf_counter() - begun) * 1e6 / len(thunks)


def _least(field: str, shapes: Sequence[tuple[int, int]], token_counts: Sequence[int]) -> Find:
    """The worst value of a field over some shapes and token counts of the 2:4 layers."""

    def find(result: dict[str, Any]) -> float | None:
        found = [
            row[field]
            for row in result.get("rows", ())
            if row["kind"] == "2:4"
            and (row["out_features"], row["in_features"]) in shapes
            and row["num_tokens"] in token_counts
        ]
        return min(found, default=None)

    return find


def _end_to_end(name: str) -> Find:
    return lambda result: result.get("model", {}).get("speedups", {}).get(name)


SQUARE, WIDE = (4096, 4096), (14336, 4096)
# what, must, aim, where it is found; a smaller number is better where must > aim
TARGETS: tuple[tuple[str, float, float, Find], ...] = (
    ("1-8 tokens, 4096x4096, x cuBLAS", 1.3, 1.6, _least("speedup", (SQUARE,), (1, 4, 8))),
    ("1-8 tokens, 14336x4096, x cuBLAS", 1.5, 1.72, _least("speedup", (WIDE,), (1, 4, 8))),
    ("1 token, 14336x4096, TB/s", 3.4, 4.0, _least("tbs", (WIDE,), (1,))),
    ("16-64 tokens, both, x cuBLAS", 1.2, 1.5, _least("speedup", (SQUARE, WIDE), (16, 32, 64))),
    ("1024-4096 tokens, both, x cuBLAS", 0.9, 1.3, _least("speedup", (SQUARE, WIDE), (1024, 4096))),
    ("Llama-8B shape, decode, x dense", 1.3, 1.5, _end_to_end("decode_seconds")),
    ("Llama-8B shape, prefill 2048, x dense", 0.9, 1.3, _end_to_end("prefill_2048_seconds")),
    ("worst relative error against fp64", 2.5e-3, 2.5e-3, lambda result: result["worst_error"]),
)


def verdict_table(result: dict[str, Any]) -> str:
    """The targets of an H200 beside what was measured."""
    lines = [f"| {'target':38s} | {'must':>7s} | {'aim':>7s} | {'measured':>8s} | verdict |", f"|{'---|' * 5}"]
    for name, must, aim, find in TARGETS:
        value = find(result)
        is_error = must < 0.1
        reached = lambda limit, value=value, is_error=is_error: value <= limit if is_error else value >= limit
        verdict = "not measured" if value is None else "aim" if reached(aim) else "must" if reached(must) else "MISSED"
        verdict = "dry run" if result["dry_run"] else verdict
        shown = "" if value is None else f"{value:.2e}" if is_error else f"{value:.2f}"
        lines.append(f"| {name:38s} | {must:7g} | {aim:7g} | {shown:>8s} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
