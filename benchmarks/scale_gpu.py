"""What the walk takes on a GPU, in one visit: check its sums and supports there, then time a Llama of 8 B random weights.

    python -m benchmarks.scale_gpu                  # make bench-scale-gpu; about 10 minutes, 24 GiB of CPU memory

Weights wait in CPU memory and go to the GPU block by block, as with `--offload cpu`; hidden states stay on the GPU, and the
plain forward has the whole model there. No time is reported while a check is red. Results go to
benchmarks/results/scale_<gpu>.json. `--check-only` stops after the checks; `--dry-run` runs the logic on a CPU with tiny
shapes, whose times mean nothing and are not kept.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import scale_formulas as formulas
from benchmarks.scale_walk import fields_of, forward, product_rate, random_llama, synchronize, timed, token_ids
from llmprune.anatomy.blocks import Recording, Stack, eager_experts, find_stack, probe, record
from llmprune.devices import environment
from llmprune.engines.layerwise import Walk
from llmprune.linalg import add_gram_, energy, inverse_factor, mirror_
from llmprune.measure.dispatch import dispatched
from llmprune.spec import PruneConfig

RESULTS = Path(__file__).parent / "results"
LARGE = {**formulas.LLAMA_8B, "max_position_embeddings": 8192}
TINY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
CASES = ("wanda 2:4", "sparsegpt")
MAX_ERROR = 1e-5  # of sums and factors against fp64, relative to their largest entries
MIN_AGREEMENT = 0.999  # of a support with that of a CPU in fp32: near ties fall either way
GIGABYTE = 1e9
Say = Callable[[str], None]
# what, limit, where it is found; smaller is better but for the share of the rate, which has none
TARGETS: tuple[tuple[str, float | None, str, str], ...] = (
    ("Wanda 2:4, seconds", 30, "wanda 2:4", "seconds"),
    ("SparseGPT, seconds", 120, "sparsegpt", "seconds"),
    ("Wanda 2:4, x one forward", 1.3, "wanda 2:4", "ratio"),
    ("SparseGPT, x one forward", 2.5, "sparsegpt", "ratio"),
    ("Wanda 2:4, peak GB", 40, "wanda 2:4", "peak_gigabytes"),
    ("SparseGPT, peak GB", 40, "sparsegpt", "peak_gigabytes"),
    ("Wanda 2:4, share of the product rate", None, "wanda 2:4", "share"),
    ("SparseGPT, share of the product rate", None, "sparsegpt", "share"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the visit; 0 if all checks are green, 1 if one is red, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check-only", action="store_true", help="check, and time nothing")
    parser.add_argument("--dry-run", action="store_true", help="the logic on a CPU, with tiny shapes")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of 2048 tokens")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU: nothing was checked and nothing was measured. --dry-run exercises the logic of this script on a CPU.")
        return 2
    return visit(options)


def visit(options: argparse.Namespace) -> int:
    """Check, then measure; returns the exit code."""
    begun = time.monotonic()
    say = lambda text: print(f"[{time.monotonic() - begun:5.0f} s] {text}", flush=True)
    device = torch.device("cpu" if options.dry_run else "cuda")
    result: dict[str, Any] = {"environment": environment(device).model_dump(mode="json"), "dry_run": options.dry_run}
    result["checks"] = run_checks(device)
    for name, check in result["checks"].items():
        say(f"{'green' if check['green'] else 'RED'} {name}: {check['value']:.3g} (limit {check['limit']:g})")
    if not result["checks"] or not all(check["green"] for check in result["checks"].values()):
        say("RED: no time is reported.")
        return 1
    if options.check_only:
        return 0
    small = options.dry_run
    fields, num_tokens, seq_len = (TINY, 256, 32) if small else (LARGE, options.samples * 2048, 2048)
    dtype, size = (torch.float32, 64) if small else (torch.bfloat16, 8192)
    result |= measure(device, fields, num_tokens, seq_len, dtype, size, say)
    print("\n" + verdict_table(result))
    if small:
        say("dry run: these times are of a CPU and tiny shapes; nothing was kept")
        return 0
    name = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"scale_{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    say(f"written: {path}")
    return 0


def run_checks(device: torch.device) -> dict[str, dict[str, Any]]:
    """What the walk computes on this device against fp64 and against the CPU."""
    checks: dict[str, dict[str, Any]] = {}

    def at_most(name: str, found: Tensor, wanted: Tensor) -> None:
        error = float((found.double().cpu() - wanted).abs().max() / wanted.abs().max())
        checks[name] = {"value": error, "limit": MAX_ERROR, "green": error <= MAX_ERROR}  # NaN is red

    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x_TI = torch.randn(3000, 700, generator=generator).to(dtype)
        gram_II = torch.zeros(700, 700, device=device)
        add_gram_(gram_II, x_TI.to(device))
        mirror_(gram_II)
        wanted_II = x_TI.double().T @ x_TI.double()
        at_most(f"Gram matrix of {str(dtype).removeprefix('torch.')}", gram_II, wanted_II)
    weight_OI = torch.randn(33, 700, generator=generator)
    at_most("energy", energy(weight_OI.to(device), gram_II), ((weight_OI.double() @ wanted_II) * weight_OI.double()).sum())
    factor_II, used = inverse_factor(gram_II, 0.01)
    ours_II, _ = inverse_factor(gram_II.cpu().double(), used)
    at_most("inverse factor", factor_II, ours_II.double())
    for case in CASES:
        there, here = pruned_tiny(case, device), pruned_tiny(case, torch.device("cpu"))
        agreement = float(torch.cat([(one == 0) == (two == 0) for one, two in zip(there, here, strict=True)]).float().mean())
        zeros = float(torch.cat([one == 0 for one in there]).float().mean())
        is_pruned = abs(zeros - 0.5) < 0.01
        checks[f"support of {case}"] = {
            "value": agreement, "limit": MIN_AGREEMENT, "green": agreement >= MIN_AGREEMENT and is_pruned
        }  # fmt: skip
    return checks


def pruned_tiny(case: str, device: torch.device) -> list[Tensor]:
    """The site weights of a tiny model pruned on a device in fp32, flat."""
    model = random_llama(TINY, torch.device("cpu"))
    ids_NS = token_ids(512, 32, TINY["vocab_size"], torch.device("cpu")).to(device)
    with dispatched(model, device):
        stack, recording = recorded(model, ids_NS)
    walked(model, stack, recording, case, device)
    return [site.weight_OI.flatten().cpu() for sites in stack.sites for site in sites]


def recorded(model: PreTrainedModel, ids_NS: Tensor) -> tuple[Stack, Recording]:
    """The probed stack and the arguments of its blocks."""
    stack = probe(model, find_stack(model), ids_NS[:1, :16])
    return stack, record(model, stack, [ids_NS])


def walked(model: PreTrainedModel, stack: Stack, recording: Recording, case: str, device: torch.device) -> None:
    """One one-pass walk."""
    walk = Walk(stack, recording, PruneConfig(**fields_of(case)), device)
    assert walk.kind == "one-pass"
    with eager_experts(model):
        for _ in walk.run():
            pass


def measure(
    device: torch.device, fields: dict[str, int], num_tokens: int, seq_len: int, dtype: torch.dtype, size: int, say: Say
) -> dict[str, Any]:
    """Rates, one forward, and every case on weights of its own."""
    kinds = (dtype, torch.float32, torch.float64)
    rates = {str(kind).removeprefix("torch."): product_rate(device, kind, size) for kind in kinds}
    say("products: " + ", ".join(f"{name} {rate / 1e12:.4g} TFLOP/s" for name, rate in rates.items()))
    rate = rates[str(dtype).removeprefix("torch.")]
    shape = formulas.shape_of(fields)
    ids_NS = token_ids(num_tokens, seq_len, fields["vocab_size"], device)
    plain_flops = formulas.forward_flops(shape, num_tokens, seq_len)
    result: dict[str, Any] = {"fields": fields, "num_tokens": num_tokens, "seq_len": seq_len, "rates": rates, "rows": []}
    for case in CASES:
        model = random_blocks(fields, device, dtype)
        with dispatched(model, device):
            stack, recording = recorded(model, ids_NS)
            forward(model, ids_NS[:4])
            plain = timed(partial(forward, model, ids_NS), device).wall
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(partial(walked, model, stack, recording, case, device), device).wall
        method = fields_of(case)["method"]
        flops = plain_flops + (walk_flops(shape, num_tokens) if method == "sparsegpt" else 0.0)
        row = {
            "case": case, "seconds": seconds, "forward_seconds": plain, "ratio": seconds / plain, "flops": flops,
            "share": flops / seconds / rate, "forward_share": plain_flops / plain / rate,
            "peak_gigabytes": torch.cuda.max_memory_allocated() / GIGABYTE if device.type == "cuda" else 0.0,
        }  # fmt: skip
        result["rows"].append(row)
        peak = row["peak_gigabytes"]
        say(f"{case}: {seconds:.2f} s, {row['ratio']:.2f}x one forward, {row['share']:.1%} of the rate, {peak:.1f} GB")
        del model, stack, recording
        synchronize(device)
    return result


def walk_flops(shape: formulas.Shape, num_tokens: int) -> float:
    """What SparseGPT computes beyond the forward."""
    return sum((formulas.gram_flops(shape, num_tokens), *(part(shape) for part in _SOLVE)))


_SOLVE = (formulas.factor_flops, formulas.column_flops, formulas.error_flops)


def random_blocks(fields: dict[str, int], device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of random weights in CPU memory, made block by block where that is fast; norms stay one."""
    model = random_llama({**fields, "num_hidden_layers": 1}, torch.device("cpu"), dtype)  # its buffers are right
    blocks = model.model.layers
    generator = torch.Generator(device).manual_seed(0)
    for index in range(1, fields["num_hidden_layers"]):
        with torch.device("meta"):
            block = type(blocks[0])(model.config, index).to(dtype).eval().requires_grad_(False)
        block.to_empty(device="cpu")
        for parameter in block.parameters():
            random = torch.randn(parameter.shape, device=device, generator=generator)
            parameter.copy_(random.mul_(0.02) if parameter.dim() == 2 else 1.0)
        blocks.append(block)
    model.config.num_hidden_layers = len(blocks)
    return model


def verdict_table(result: dict[str, Any]) -> str:
    """The targets beside what was measured."""
    rows = {row["case"]: row for row in result["rows"]}
    lines = [f"| {'target':38s} | {'limit':>7s} | {'measured':>8s} | verdict |", "|---|---:|---:|---|"]
    for name, limit, case, field in TARGETS:
        value = rows.get(case, {}).get(field)
        if value is None:
            verdict = "not measured"
        elif result["dry_run"]:
            verdict = "dry run"
        else:
            verdict = "" if limit is None else "met" if value <= limit else "MISSED"
        shown = "" if value is None else f"{value:.1%}" if field == "share" else f"{value:.2f}"
        lines.append(f"| {name:38s} | {'' if limit is None else f'{limit:g}':>7s} | {shown:>8s} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
