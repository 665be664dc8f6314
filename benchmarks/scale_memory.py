"""Peak memory of pruning straight from the shards: against the number of blocks, and under a limit below the checkpoint.

Random Llamas are written shard by shard, so that no process ever holds one, and pruned by the command line in processes of
their own. What is polled from /proc: anonymous pages are the process's own, file pages are those of mapped shards and
libraries, which the kernel takes back when others want them.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoConfig

from llmprune.io.models import BUNDLED_PATH

NUM_BLOCKS = (8, 32, 128)
LIMITED_BLOCKS = 44
LIMIT_BYTES = 1792 * 2**20
MAX_SPREAD = 0.10
SHAPE = {
    "vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
# The limited one is wider: fewer and larger blocks take less time for as many bytes.
LIMITED_SHAPE = {**SHAPE, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
BLOCKS_PER_SHARD = 4
POLL_SECONDS = 0.005
PRUNE = (
    "--method", "wanda", "--num-samples", "8", "--seq-len", "128", "--calibration", "stdlib", "--eval", "stdlib",
    "--max-eval-tokens", "1024", "--device", "cpu", "--dtype", "float32", "--no-latency", "--no-prompt",
)  # fmt: skip


@dataclass(frozen=True)
class Peak:
    """The most of each kind of page that was seen at any moment, in bytes, and how the process ended."""

    anonymous: int
    file: int
    resident: int
    virtual: int
    returncode: int
    seconds: float
    error: str = ""


def save_random_llama(folder: Path, num_blocks: int, shape: dict[str, Any] | None = None) -> int:
    """Write a Llama of random fp32 weights shard by shard, with the demo model's tokenizer; its bytes.

    Never more than one shard is in memory.
    """
    folder.mkdir(parents=True)
    config = AutoConfig.for_model("llama", num_hidden_layers=num_blocks, **(shape or SHAPE))
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float32"
    config.save_pretrained(folder)
    for file in BUNDLED_PATH.glob("tokenizer*"):
        shutil.copy(file, folder)
    ends = {
        "model.embed_tokens.weight": _random(config.vocab_size, config.hidden_size, seed=10**6),
        "model.norm.weight": torch.ones(config.hidden_size),
    }
    weight_map: dict[str, str] = {}
    starts = range(0, num_blocks, BLOCKS_PER_SHARD)
    total = 0
    for number, start in enumerate(starts):
        tensors = ends if number == 0 else {}
        for index in range(start, min(start + BLOCKS_PER_SHARD, num_blocks)):
            tensors |= random_block(config, index)
        name = f"model-{number + 1:05d}-of-{len(starts):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return total


def random_block(config: Any, index: int) -> dict[str, torch.Tensor]:
    """The tensors of one block, small random matrices and norms of one."""
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    return {
        f"model.layers.{index}.{name}.weight": _random(*shape, seed=100 * index + number)
        if len(shape) > 1
        else torch.ones(shape)
        for number, (name, shape) in enumerate(shapes.items())
    }


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(0.02)


def watch(command: Sequence[str], *, limit: Callable[[], None] | None = None, seconds: float = 1800) -> Peak:
    """Run a command to its end and poll its memory; ``limit`` is called in the new process before it starts."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    begun = time.monotonic()
    seen = {"RssAnon": 0, "RssFile": 0, "VmHWM": 0, "VmPeak": 0}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=errors, preexec_fn=limit) as process,
    ):
        while process.poll() is None:
            for name, value in memory_of(process.pid).items():
                seen[name] = max(seen[name], value)
            if time.monotonic() - begun > seconds:
                process.kill()
            time.sleep(POLL_SECONDS)
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
        error = " ".join(lines[-3:])[-400:] if process.returncode else ""
    passed = time.monotonic() - begun
    return Peak(seen["RssAnon"], seen["RssFile"], seen["VmHWM"], seen["VmPeak"], process.returncode, passed, error)


def memory_of(pid: int) -> dict[str, int]:
    """Anonymous, file-backed, peak resident and peak virtual bytes of a process; none once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "VmHWM", "VmPeak") if name in fields}


def prune_command(model: Path, out: Path, offload: str) -> list[str]:
    """The command line that prunes one of these models."""
    return [sys.executable, "-m", "llmprune", "prune", str(model), "--out", str(out), *PRUNE, "--offload", offload]


def against_blocks(console: Console, root: Path) -> list[dict[str, Any]]:
    """Prune models of more and more blocks from the disk; the peak of each."""
    rows = []
    for num_blocks in NUM_BLOCKS:
        folder, out = root / f"llama-{num_blocks}", root / f"out-{num_blocks}"
        weights = save_random_llama(folder, num_blocks)
        peak = watch(prune_command(folder, out, "disk"))
        rows.append({"num_blocks": num_blocks, "checkpoint_bytes": weights, **vars(peak)})
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(folder)
        console.print(f"{num_blocks} blocks, {weights / 2**20:.0f} MiB: {describe(peak)}")
    return rows


def under_a_limit(console: Console, root: Path) -> dict[str, Any]:
    """Prune a checkpoint under a limit of address space below its bytes, from the disk, and then with the weights in memory."""
    folder = root / "limited"
    weights = save_random_llama(folder, LIMITED_BLOCKS, LIMITED_SHAPE)
    idle = watch([sys.executable, "-c", "import llmprune.api"])
    result: dict[str, Any] = {
        "num_blocks": LIMITED_BLOCKS, "checkpoint_bytes": weights, "limit_bytes": LIMIT_BYTES, "limit": "RLIMIT_AS (ulimit -v)",
        "idle_virtual_bytes": idle.virtual,
    }  # fmt: skip
    for offload in ("disk", "cpu"):
        out = root / f"limited-{offload}"
        peak = watch(prune_command(folder, out, offload), limit=limit_address_space)
        result[offload] = vars(peak) | {"written": (out / "config.json").exists()}
        console.print(f"--offload {offload} within {LIMIT_BYTES / 2**20:.0f} MiB of {weights / 2**20:.0f}: {describe(peak)}")
    return result


def limit_address_space() -> None:
    """What `ulimit -v` does."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))


def spread(rows: Sequence[dict[str, Any]], key: str = "anonymous") -> float:
    """The largest over the smallest of a peak, less one; infinite where a run failed, as then nothing was measured."""
    if not rows or any(row["returncode"] or not row[key] for row in rows):
        return float("inf")
    values = [row[key] for row in rows]
    return max(values) / min(values) - 1


def describe(peak: Peak) -> str:
    """One line of a peak."""
    parts = {"anonymous": peak.anonymous, "file": peak.file, "resident": peak.resident, "virtual": peak.virtual}
    sizes = ", ".join(f"{name} {value / 2**20:.0f} MiB" for name, value in parts.items())
    return f"exit {peak.returncode}, {sizes}, {peak.seconds:.0f} s" + (f" ({peak.error[-160:]})" if peak.returncode else "")


def run(console: Console) -> dict[str, Any]:
    """Both measurements."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        blocks = against_blocks(console, root)
        return {"blocks": blocks, "spread": spread(blocks), "limited": under_a_limit(console, root)}
