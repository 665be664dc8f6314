"""Wall time of pruning as a multiple of one plain forward pass of the same tokens through the same model.

The limit of any sequential layerwise method is 1.0: every token must pass every block once. Targets: Wanda one-pass 1.5,
Wanda two-pass 2.5, SparseGPT 4.0. Forward and pruning alternate in one process; the median of the ratios is reported.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmprune.anatomy.blocks import eager_experts, find_stack, probe, record
from llmprune.devices import environment, pick_device
from llmprune.engines.layerwise import Walk
from llmprune.memory import CPU_STAGED_TOKENS, STAGED_TOKENS
from llmprune.spec import PruneConfig

CASES: list[tuple[str, dict[str, Any], bool, float | None]] = [
    ("magnitude", {"method": "magnitude", "sequential": "group"}, True, None),
    ("wanda, one-pass", {"method": "wanda", "sequential": "group"}, True, 1.5),
    ("wanda, staged", {"method": "wanda", "sequential": "group"}, False, None),
    ("wanda, two-pass", {"method": "wanda"}, False, 2.5),
    ("wanda 2:4, one-pass", {"method": "wanda", "sequential": "group", "pattern": "2:4"}, True, 1.5),
    ("sparsegpt, one-pass", {"method": "sparsegpt", "sequential": "group"}, True, 4.0),
    ("sparsegpt 2:4, one-pass", {"method": "sparsegpt", "sequential": "group", "pattern": "2:4"}, True, 4.0),
    ("sparsegpt, two-pass", {"method": "sparsegpt"}, False, 4.0),
]


def medium_llama(device: torch.device, num_layers: int = 4) -> PreTrainedModel:
    """A random Llama of 3.2 M weights a block on a CPU, of 50 M on an accelerator."""
    torch.manual_seed(0)
    large = device.type != "cpu"
    config = AutoConfig.for_model(
        "llama", vocab_size=2048, hidden_size=2048 if large else 512, intermediate_size=5632 if large else 1408,
        num_hidden_layers=num_layers, num_attention_heads=16 if large else 8, num_key_value_heads=4,
        max_position_embeddings=2048,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if large else torch.float32).eval().to(device)


@torch.no_grad()
def _staged(ids_NS: torch.Tensor) -> int:
    """Sequences of a batch, as a job has them."""
    tokens = CPU_STAGED_TOKENS if ids_NS.device.type == "cpu" else STAGED_TOKENS
    return max(1, tokens // ids_NS.shape[1])


def forward_seconds(model: PreTrainedModel, ids_NS: torch.Tensor) -> float:
    """One plain forward of all tokens through embeddings and blocks, without the head, in batches that suit caches."""
    begun = time.perf_counter()
    for batch in ids_NS.split(_staged(ids_NS)):
        model.base_model(input_ids=batch, use_cache=False)
    _synchronize(ids_NS.device)
    return time.perf_counter() - begun


def prune_seconds(fields: dict[str, Any], ids_NS: torch.Tensor, pausing: bool) -> float:
    """Recording and walk on a fresh copy of the model; loading and probing are not counted."""
    model = medium_llama(ids_NS.device)
    stack = probe(model, find_stack(model), ids_NS[:1, :16])
    _synchronize(ids_NS.device)
    begun = time.perf_counter()
    batches = list(ids_NS.split(len(ids_NS) if pausing and ids_NS.device.type != "cpu" else _staged(ids_NS)))
    recording = record(model, stack, batches)
    with eager_experts(model):
        for _ in Walk(stack, recording, PruneConfig(**fields), ids_NS.device, pausing=pausing).run():
            pass
    _synchronize(ids_NS.device)
    return time.perf_counter() - begun


def run(console: Console, *, repeats: int = 2) -> dict[str, Any]:
    """Measure every case and print the ratios."""
    device = pick_device("auto")
    num_samples, seq_len = (128, 2048) if device.type != "cpu" else (32, 512)
    ids_NS = torch.randint(0, 2048, (num_samples, seq_len), generator=torch.Generator().manual_seed(0)).to(device)
    model = medium_llama(device)
    forward_seconds(model, ids_NS[:4])
    rows = []
    for name, fields, pausing, target in CASES:
        pairs = []
        for _ in range(repeats):
            forward = forward_seconds(model, ids_NS)
            pairs.append((prune_seconds(fields, ids_NS, pausing), forward))
        ratio = statistics.median(prune / forward for prune, forward in pairs)
        rows.append(
            {
                "case": name, "ratio": ratio, "target": target,
                "seconds": statistics.median(prune for prune, _ in pairs),
                "forward_seconds": statistics.median(forward for _, forward in pairs),
            }
        )  # fmt: skip
        console.print(f"{name:26s} {ratio:5.2f}x one forward" + (f"  (target {target:g})" if target else ""))
    table = Table("pruning", "seconds", "forward", "ratio", "target", title="Wall time over one plain forward; limit 1.0")
    for row in rows:
        target = f"{row['target']:g}" if row["target"] else ""
        table.add_row(row["case"], f"{row['seconds']:.2f}", f"{row['forward_seconds']:.2f}", f"{row['ratio']:.2f}", target)
    console.print(table)
    shape = f"{num_samples} x {seq_len} tokens, Llama with {model.config.num_hidden_layers} blocks, {model.dtype}"
    return {"shape": shape, "environment": environment(device).model_dump(), "rows": rows}


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
