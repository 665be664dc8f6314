"""What a walk costs beside one plain forward of the same tokens, and how it grows with blocks and tokens.

Forward and walks alternate in one process with one thread; every repeat gives its own ratio, and the median counts. Seconds are
those in which the process had a processor, with wall time beside them: other work on the machine is not of the walk. On a GPU,
whose work no processor clock sees, wall time counts alone.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks import scale_formulas as formulas
from llmprune.anatomy.blocks import eager_experts, find_stack, probe, record
from llmprune.engines.layerwise import Walk
from llmprune.spec import PruneConfig

LIMITS = {"wanda": 1.3, "wanda 2:4": 1.3, "sparsegpt": 2.5, "sparsegpt 2:4": 2.5}
SEQ_LEN = 512
BATCH_TOKENS = 8192  # of the plain forward: as many as suit caches
WIDE = {
    "vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 16,
    "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
NARROW = {**WIDE, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2}
NUM_TOKENS = 16384
MANY_BLOCKS = (2, 4, 8, 16)
MANY_TOKENS = (4096, 8192, 16384, 32768)
FEW_TOKENS = 2048  # of the models of more and more blocks


@dataclass(frozen=True)
class Times:
    """Seconds of one piece of work: of this process's processor, and of the clock."""

    cpu: float
    wall: float

    def on(self, device: torch.device) -> float:
        """Those that count."""
        return self.cpu if device.type == "cpu" else self.wall


def random_llama(fields: dict[str, int], device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A Llama of random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields), dtype=dtype)
    return model.eval().requires_grad_(False).to(device)


def timed(work: Callable[[], object], device: torch.device) -> Times:
    """Seconds of ``work()``, whatever was started before it done first."""
    gc.collect()
    synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    synchronize(device)
    return Times(time.process_time() - cpu, time.perf_counter() - wall)


def synchronize(device: torch.device) -> None:
    """Wait for the accelerator, where there is one."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.no_grad()
def forward(model: PreTrainedModel, ids_NS: Tensor) -> None:
    """One plain forward of all tokens through embeddings and blocks, without the head."""
    for batch in ids_NS.split(max(1, BATCH_TOKENS // ids_NS.shape[1])):
        model.base_model(input_ids=batch, use_cache=False)


def fields_of(case: str) -> dict[str, Any]:
    """What a case asks for: a method, and a pattern after it."""
    method, _, pattern = case.partition(" ")
    return {"method": method, "sequential": "group", **({"pattern": pattern} if pattern else {"sparsity": 0.5})}


def walk_times(model: PreTrainedModel, case: str, ids_NS: Tensor) -> Times:
    """Recording and one-pass walk; the model is put back afterwards.

    Loading, the probe and the copy are not counted.
    """
    device = ids_NS.device
    stack = probe(model, find_stack(model), ids_NS[:1, :16])
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def work() -> None:
        recording = record(model, stack, [ids_NS])
        walk = Walk(stack, recording, PruneConfig(**fields_of(case)), device)
        assert walk.kind == "one-pass"
        with eager_experts(model):
            for _ in walk.run():
                pass

    found = timed(work, device)
    pruned = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    if pruned < 0.3 * sum(site.numel for sites in stack.sites for site in sites):
        raise AssertionError(f"{case} pruned {pruned} weights: its time is that of nothing")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(dense[name])
    return found


def token_ids(num_tokens: int, seq_len: int, vocab_size: int, device: torch.device) -> Tensor:
    """Random token ids [N, S]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (num_tokens // seq_len, seq_len), generator=generator).to(device)


def product_rate(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    """Operations a second of the best of a few square matrix products."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right
    seconds = min(timed(lambda: left @ right, device).on(device) for _ in range(repeats))
    return 2 * size**3 / seconds


def against_forward(
    console: Console, device: torch.device, *, fields: dict[str, int] | None = None, num_tokens: int = NUM_TOKENS,
    seq_len: int = SEQ_LEN, repeats: int = 3, dtype: torch.dtype = torch.float32, product_size: int = 1024,
) -> dict[str, Any]:  # fmt: skip
    """Every case beside the forward of the same repeat; the limit beside both."""
    fields = fields or WIDE
    shape = formulas.shape_of(fields)
    model = random_llama(fields, device, dtype)
    ids_NS = token_ids(num_tokens, seq_len, fields["vocab_size"], device)
    forward(model, ids_NS[:2])
    rates = [product_rate(device, kind, product_size) for kind in (dtype, torch.float32, torch.float64)]
    pairs: dict[str, list[tuple[Times, Times]]] = {case: [] for case in LIMITS}
    for _ in range(repeats):
        for case, found in pairs.items():
            plain = timed(lambda: forward(model, ids_NS), device)
            found.append((plain, walk_times(model, case, ids_NS)))
    rows = []
    plain_flops = formulas.forward_flops(shape, num_tokens, seq_len)
    for case, found in pairs.items():
        ratios = [walk.on(device) / plain.on(device) for plain, walk in found]
        plain_seconds = statistics.median(plain.on(device) for plain, _ in found)
        walk_seconds = statistics.median(walk.on(device) for _, walk in found)
        reached = plain_flops / plain_seconds  # the rate of the plain forward is what the limit's forward runs at
        assumed = formulas.Rates(product=reached, gram=rates[1], single=rates[1], double=rates[2])
        parts = formulas.walk_seconds(shape, fields_of(case)["method"], num_tokens, seq_len, assumed)
        rows.append(
            {
                "case": case, "ratio": statistics.median(ratios), "ratios": sorted(ratios), "target": LIMITS[case],
                "limit": sum(parts.values()) / parts["forward"], "seconds": walk_seconds, "forward_seconds": plain_seconds,
                "wall_ratio": statistics.median(walk.wall / plain.wall for plain, walk in found),
                "met": statistics.median(ratios) <= LIMITS[case],
            }
        )  # fmt: skip
        ratio, limit = rows[-1]["ratio"], rows[-1]["limit"]
        console.print(f"{case:14s} {ratio:.2f}x one forward (limit {limit:.2f}, target {LIMITS[case]:g})")
    return {
        "fields": fields, "num_tokens": num_tokens, "seq_len": seq_len, "dtype": str(dtype).removeprefix("torch."),
        "forward_flops": plain_flops, "product_rate": rates[0], "single_rate": rates[1], "double_rate": rates[2],
        "score_seconds": score_seconds(rows, shape), "rows": rows,
    }  # fmt: skip


def score_seconds(rows: list[dict[str, Any]], shape: formulas.Shape) -> float:
    """What Wanda took beyond the forward, per weight: scores, selection, writing, and squares of the inputs."""
    row = next(row for row in rows if row["case"] == "wanda")
    return max(row["seconds"] - row["forward_seconds"], 0.0) / (shape.num_blocks * shape.block_weights)


def growth(console: Console, device: torch.device, *, fields: dict[str, int] | None = None,
           blocks: tuple[int, ...] = MANY_BLOCKS, tokens: tuple[int, ...] = MANY_TOKENS, few_tokens: int = FEW_TOKENS,
           repeats: int = 2) -> list[dict[str, Any]]:  # fmt: skip
    """Seconds of SparseGPT and Wanda against blocks, and against tokens, each with its fitted exponent."""
    fields = fields or NARROW
    rows = []
    models = {count: random_llama({**fields, "num_hidden_layers": count}, device) for count in blocks}
    for case in ("wanda", "sparsegpt"):
        for what, sizes in (("blocks", blocks), ("tokens", tokens)):
            seconds: dict[int, list[float]] = {size: [] for size in sizes}
            for _ in range(repeats):
                for size in sizes:
                    model = models[size] if what == "blocks" else models[blocks[0]]
                    count = few_tokens if what == "blocks" else size
                    ids_NS = token_ids(count, min(SEQ_LEN, count // 4), fields["vocab_size"], device)
                    seconds[size].append(walk_times(model, case, ids_NS).on(device))
            medians = [statistics.median(seconds[size]) for size in sizes]
            exponent, r2 = formulas.fit(sizes, medians)
            rows.append({"case": case, "what": what, "sizes": list(sizes), "seconds": medians, "exponent": exponent, "r2": r2})
            console.print(f"{case:10s} grows as {what} ^ {exponent:.3f} (r^2 {r2:.4f})")
    return rows
