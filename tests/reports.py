"""A realistic :class:`llmprune.report.Report` without running anything. Torch-free."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from llmprune.report import (
    BlockReport,
    Environment,
    Latency,
    ModelReport,
    Quality,
    Report,
    SiteReport,
    Speed,
    StageReport,
    TextReport,
)
from llmprune.spec import PruneConfig

ATTENTION = {
    "self_attn.q_proj": (2048, 1024),
    "self_attn.k_proj": (1024, 1024),
    "self_attn.v_proj": (1024, 1024),
    "self_attn.o_proj": (1024, 2048),
}
MLP = {"mlp.gate_proj": (3072, 1024), "mlp.up_proj": (3072, 1024), "mlp.down_proj": (1024, 3072)}
EXPERTS = {"mlp.experts.gate_up_proj": (1536, 1024), "mlp.experts.down_proj": (1024, 768)}


def sample_report(*, num_blocks: int = 4, num_experts: int = 0, with_errors: bool = True, **changes: Any) -> Report:
    """A report on a Qwen3-like model; with ``num_experts`` its MLPs are fused experts. ``changes`` replace fields."""
    blocks = tuple(_block(index, num_experts, with_errors) for index in range(num_blocks))
    sites = [site for block in blocks for site in block.sites]
    num_prunable = sum(site.numel for site in sites)
    num_parameters = num_prunable + 155_648_000
    fields: dict[str, Any] = {
        "config": PruneConfig(model="Qwen/Qwen3-0.6B", method="sparsegpt", sparsity=0.5, eval=("wikitext2", "c4"), seed=7),
        "model": ModelReport(
            name="Qwen/Qwen3-0.6B",
            revision="c1899de289a04d12100db370d81485cdf75e47ca",
            model_type="qwen3",
            dtype="bfloat16",
            num_parameters=num_parameters,
            num_prunable=num_prunable,
            num_blocks=num_blocks,
            weights_bytes=2 * num_parameters,
        ),
        "environment": Environment(
            llmprune="0.1.0", torch="2.9.1", transformers="5.3.0", python="3.11.9", device="NVIDIA H200", num_threads=16
        ),
        "calibration": _text("c4", "train", "first shard, en", 128, 2048),
        "scope": "block",
        "walk": "one pass, 128 sequences at once",
        "blocks": blocks,
        "quality": (
            Quality(
                text=_text("wikitext2", "test", "wikitext-2-raw-v1, joined with blank lines", 146, 2048),
                perplexity_dense=20.9664,
                perplexity_pruned=29.3103,
                kl=0.3127,
                top1_agreement=0.7421,
            ),
            Quality(
                text=_text("c4", "validation", "1100 documents of the first shard", 256, 2048),
                perplexity_dense=26.4181,
                perplexity_pruned=34.0052,
                kl=0.2744,
                top1_agreement=0.7603,
            ),
        ),
        "latency": _latency(),
        "stages": _stages(),
        "num_zeros_model": sum(site.num_zeros for site in sites),
        "warnings": ("c4 was read from a local copy; its sha256 is in the report.",),
        "out": "pruned/qwen3-0.6b",
        "checkpoint_bytes": 2 * num_parameters + 11_422_934,
    }
    return Report(**{**fields, **changes})


def _text(source: str, split: str, description: str, num_sequences: int, seq_len: int) -> TextReport:
    sha256 = hashlib.sha256(f"{source}/{split}".encode()).hexdigest()
    return TextReport(
        source=source, split=split, description=description, num_sequences=num_sequences, seq_len=seq_len, sha256=sha256
    )


def _block(index: int, num_experts: int, with_errors: bool) -> BlockReport:
    name = f"model.layers.{index}"
    sites = [_site(f"{name}.{leaf}", shape, index, with_errors) for leaf, shape in ATTENTION.items()]
    if num_experts:
        for leaf, shape in EXPERTS.items():
            sites += [_expert(f"{name}.{leaf}", shape, index, expert) for expert in range(num_experts)]
    else:
        sites += [_site(f"{name}.{leaf}", shape, index, with_errors) for leaf, shape in MLP.items()]
    return BlockReport(index=index, name=name, seconds=2.5 + 0.125 * (index % 5), sites=tuple(sites))


def _site(name: str, shape: tuple[int, int], index: int, with_errors: bool) -> SiteReport:
    """Sparsities wander around one half and errors grow with depth, so that a chart has something to show."""
    numel = shape[0] * shape[1]
    wobble = (7 * index + len(name)) % 11 - 5
    return SiteReport(
        name=name,
        shape=shape,
        numel=numel,
        num_zeros=numel // 2 + wobble * numel // 200,
        num_tokens=128 * 2048,
        output_error=0.011 + 0.0037 * index + 0.0021 * abs(wobble) if with_errors else None,
    )


def _expert(name: str, shape: tuple[int, int], index: int, expert: int) -> SiteReport:
    numel = shape[0] * shape[1]
    num_tokens = 0 if expert % 41 == 3 else 9_000 + 613 * ((expert * 17 + index * 5) % 23)
    fallback = None if num_tokens else "no calibration token reached it"
    return SiteReport(
        name=f"{name}.{expert}",
        shape=shape,
        numel=numel,
        num_zeros=numel // 2,
        num_tokens=num_tokens,
        fallback=fallback,
    )


def _latency() -> Latency:
    def speed(phase: Literal["prefill", "decode"], rate: float) -> Speed:
        tokens = 2048 if phase == "prefill" else 128
        return Speed(
            phase=phase,
            batch_size=1,
            num_tokens=tokens,
            repeats=10,
            tokens_per_second=rate,
            quartiles=(rate * 0.985, rate * 1.0125),
        )

    return Latency(
        device="NVIDIA H200",
        dense=(speed("prefill", 61_250.0), speed("decode", 42.4)),
        pruned=(speed("prefill", 61_012.5), speed("decode", 45.6)),
        note="Dense kernels run at the same speed whether weights are zero or not.",
    )


def _stages() -> tuple[StageReport, ...]:
    seconds = {"load": 3.21, "calibration": 1.04, "dense": 12.8, "prune": 84.6, "pruned": 12.9, "save": 2.4}
    peaks = {"dense": 3_221_225_472, "prune": 5_368_709_120, "pruned": 3_221_225_472}
    return tuple(
        StageReport(name=name, seconds=value, peak_cpu_bytes=2_254_857_830, peak_gpu_bytes=peaks.get(name))
        for name, value in seconds.items()
    )
