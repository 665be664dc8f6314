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
from llmprune.speed import Benchmark, BenchmarkSpeed, LayerSpeed, LayerTime, ModelSpeed, Protocol

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


def sample_benchmark(**changes: Any) -> Benchmark:
    """A packed 8B-like model against its dense original on a GPU: faster at decode, slower at prefill."""
    fields: dict[str, Any] = {
        "model": "pruned-packed",
        "against": "pruned",
        "environment": sample_report().environment,
        "protocol": Protocol(),
        "copy_gigabytes_per_second": 4000.0,
        "interleaved": True,
        "subject": ModelSpeed(
            name="pruned-packed",
            weights_bytes=9_000_000_000,
            packed_bytes=7_900_000_000,
            num_packed=224,
            peak_bytes=10_000_000_000,
            speeds=(
                point("prefill", 1, 2048, 40_000.0),
                point("decode", 1, 32, 360.0, 3240.0),
                point("decode", 16, 32, 4800.0),
            ),
        ),
        "dense": ModelSpeed(
            name="pruned",
            weights_bytes=15_000_000_000,
            peak_bytes=16_000_000_000,
            speeds=(
                point("prefill", 1, 2048, 42_000.0),
                point("decode", 1, 32, 240.0, 3600.0),
                point("decode", 16, 32, 3750.0),
            ),
        ),
        "layers": (
            layer("2:4", (14336, 4096), 64, packed_seconds=17.9e-6, dense_seconds=30.2e-6),
            layer("bitmask", (1024, 4096), 64, packed_seconds=6.0e-6, dense_seconds=5.0e-6),
        ),
        "notes": ("prefill stops at the model's maximum of 2048 tokens (asked: 8192)",),
        "seconds": 61.0,
    }
    return Benchmark(**{**fields, **changes})


def point(
    phase: Literal["prefill", "decode"], batch_size: int, num_tokens: int, rate: float, gigabytes: float | None = None,
    repeats: int = 20,
) -> BenchmarkSpeed:  # fmt: skip
    """A speed with quartiles at one per cent to either side."""
    return BenchmarkSpeed(
        phase=phase,
        batch_size=batch_size,
        num_tokens=num_tokens,
        repeats=repeats,
        tokens_per_second=rate,
        quartiles=(0.99 * rate, 1.01 * rate),
        context=128 if phase == "decode" else 0,
        cuda_graph=True,
        gigabytes_per_second=gigabytes,
        copy_share=None if gigabytes is None else gigabytes / 4000.0,
    )


def layer(
    format: str, shape: tuple[int, int], num_layers: int, *, packed_seconds: float, dense_seconds: float, tokens: int = 1
) -> LayerSpeed:
    """One kind of layer at one number of tokens, with quartiles at one per cent to either side."""
    time = LayerTime(
        num_tokens=tokens,
        repeats=20,
        dense_seconds=dense_seconds,
        dense_quartiles=(0.99 * dense_seconds, 1.01 * dense_seconds),
        packed_seconds=packed_seconds,
        packed_quartiles=(0.99 * packed_seconds, 1.01 * packed_seconds),
    )
    example = f"model.layers.0.{format}"
    return LayerSpeed(format=format, shape=shape, num_layers=num_layers, example=example, times=(time,))
