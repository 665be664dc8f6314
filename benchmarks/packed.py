"""What packing costs and saves: bytes of each format, seconds as multiples of copying the weight, a checkpoint there and back.

The limit of every conversion is one pass over the weight: reading the dense bytes and writing the packed ones, or the other
way round. A plain copy of the dense weight, timed in the same run, stands for it.
"""

from __future__ import annotations

import hashlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import llmprune
from llmprune.devices import environment, pick_device
from llmprune.io.models import BUNDLED_PATH
from llmprune.masks import keep_mask
from llmprune.packing import packable
from llmprune.spec import Pattern
from llmprune_kernels import bitmask, fragments, int8, two_four

SHAPE = (4096, 14336)
REPEATS = 5


def sparse_weight(pattern: str, sparsity: float) -> Tensor:
    """A random bf16 weight of SHAPE with the smallest weights of every row, or of every group, at zero."""
    weight_OI = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    keep_OI = keep_mask(weight_OI.float().abs(), Pattern.parse(pattern), sparsity, "row")
    return torch.where(keep_OI, weight_OI, torch.zeros((), dtype=torch.bfloat16))


def run(console: Console) -> dict[str, Any]:
    """Measure the formats and one checkpoint; ``wrong`` where something does not come back as it was."""
    formats, wrong_format = _formats()
    checkpoint, wrong_checkpoint = _checkpoint()
    table = Table("", "bytes, of dense bf16", "pack, x copy", "unpack, x copy", title=f"One weight of {SHAPE[0]} x {SHAPE[1]}")
    for row in formats:
        table.add_row(row["format"], f"{row['bytes']:.4f}", f"{row['pack']:.1f}", f"{row['unpack']:.1f}")
    console.print(table)
    console.print(describe(checkpoint))
    return {
        "environment": environment(pick_device("cpu")).model_dump(),
        "formats": formats,
        "checkpoint": checkpoint,
        "wrong": wrong_format or wrong_checkpoint,
    }


def describe(checkpoint: dict[str, Any]) -> str:
    """A sentence on the checkpoint that went there and back."""
    millions, layers = checkpoint["weights"] / 1e6, checkpoint["layers"]
    size = f"A 2:4 checkpoint of {millions:.0f} M weights: pruned layers {layers:.4f} of their bytes"
    speed = (
        f"packed in {checkpoint['pack']:.1f} x and unpacked in {checkpoint['unpack']:.1f} x the time of copying the dense file"
    )
    return f"{size}, {speed}; the same bytes again: {'yes' if checkpoint['same'] else 'NO'}."


def _formats() -> tuple[list[dict[str, Any]], bool]:
    rows: list[dict[str, Any]] = []
    wrong = False
    weight = sparse_weight("2:4", 0.5)
    copy = _seconds(weight.clone)
    packed = two_four.pack(weight)
    pack, unpack = _seconds(lambda: two_four.pack(weight)), _seconds(lambda: two_four.unpack(*packed))
    rows.append(_row("2:4", weight, packed, pack / copy, unpack / copy))
    wrong |= not torch.equal(two_four.unpack(*packed), weight)

    order = fragments.to_fragments(*packed)
    wrong |= not all(map(torch.equal, fragments.from_fragments(*order, *SHAPE, torch.bfloat16), packed))
    there = _seconds(lambda: fragments.to_fragments(*packed))
    back = _seconds(lambda: fragments.from_fragments(*order, *SHAPE, torch.bfloat16))
    rows.append(_row("2:4 to fragment order", weight, order, there / copy, back / copy))

    values, scale = int8.quantize(packed.values)
    there = pack + _seconds(lambda: int8.quantize(packed.values))
    back = unpack + _seconds(lambda: int8.dequantize(values, scale, torch.bfloat16))
    rows.append(_row("2:4, int8 values", weight, (values, scale, packed.meta), there / copy, back / copy))

    for sparsity in (0.5, 0.7):
        weight = sparse_weight("unstructured", sparsity)
        kept = bitmask.pack(weight)
        wrong |= not torch.equal(bitmask.unpack(*kept, SHAPE[1]), weight)
        there, back = _seconds(partial(bitmask.pack, weight)), _seconds(partial(bitmask.unpack, *kept, SHAPE[1]))
        rows.append(_row(f"bitmask, {sparsity:.0%} zeros", weight, kept, there / copy, back / copy))
    return rows, wrong


def _row(name: str, weight: Tensor, parts: tuple[Tensor, ...], pack: float, unpack: float) -> dict[str, Any]:
    return {"format": name, "bytes": sum(part.nbytes for part in parts) / weight.nbytes, "pack": pack, "unpack": unpack}


def _checkpoint() -> tuple[dict[str, Any], bool]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        num_weights = _save_model(folder / "dense")
        copy = _seconds(lambda: shutil.copytree(folder / "dense", folder / "copy", dirs_exist_ok=True), repeats=3)
        there = llmprune.convert(folder / "dense", to="packed", out=folder / "packed")
        back = llmprune.convert(folder / "packed", to="dense", out=folder / "back")
        same = _digest(folder / "dense") == _digest(folder / "back")
        assert there.packed is not None
        checkpoint = {
            "weights": num_weights,
            "layers": there.packed.packed_bytes / there.packed.dense_bytes,
            "whole": there.bytes_after / there.bytes_before,
            "pack": there.seconds / copy,
            "unpack": back.seconds / copy,
            "same": same,
        }
    return checkpoint, not same


@torch.no_grad()
def _save_model(folder: Path) -> int:
    """A Llama of 140 M random weights in bf16, 2:4 in its blocks."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=2048, hidden_size=1536, intermediate_size=4096, num_hidden_layers=5, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for site in packable(model)[0].values():
        site.weight_OI.mul_(keep_mask(site.weight_OI.float().abs(), Pattern.parse("2:4"), 0.5, "row")).add_(
            0.0
        )  # -0.0 becomes +0.0
    model.save_pretrained(folder)
    for file in BUNDLED_PATH.glob("tokenizer*"):
        shutil.copy(file, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}


def _seconds(act: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median after one run that is not counted."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        act()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])
