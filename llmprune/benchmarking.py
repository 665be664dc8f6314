"""Benchmarking checkpoints on disk, one alone or against its dense original: ``llmprune benchmark``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from llmprune.devices import PeakMemory, free_bytes, memory_errors, pick_device
from llmprune.errors import ConfigError, DoesNotFit
from llmprune.events import Benchmarked, Event, StageFinished, StageStarted, Warned
from llmprune.io.models import Source, load_model, resolve
from llmprune.loading import fuse_shared_inputs_
from llmprune.measure.benchmark import benchmark_models, benchmark_together, protocol_for
from llmprune.measure.dispatch import WORKING_SHARE
from llmprune.spec import PruneConfig, describe
from llmprune.speed import Benchmark, Protocol


def benchmark(
    model: str | Path | None = None,
    *,
    against: str | Path | None = None,
    prefill_tokens: tuple[int, ...] | None = None,
    batch_sizes: tuple[int, ...] | None = None,
    repeats: int | None = None,
    seconds: float | None = None,
    **overrides: Any,
) -> Benchmark:
    """Speed of a checkpoint, whole and layer by layer, alone or against its dense original on the same device.

    Args:
        model: hub ID or directory, packed or dense; None is the bundled one.
        against: the dense original.
        prefill_tokens: lengths of the prompts whose reading is timed; default 128, 512, 2048.
        batch_sizes: sequences that decode generates at once; default 1, 4, 16, 64.
        repeats: at most so many timed runs of each point; default 20.
        seconds: about how long all of it may take; default 60.
        overrides: PruneConfig's fields ``device``, ``dtype``, ``revision``, ``trust_remote_code``.

    Raises:
        UserError: a value makes no sense, or a model cannot be loaded or does not fit.
    """
    run = benchmark_iter(
        model, against=against, prefill_tokens=prefill_tokens, batch_sizes=batch_sizes, repeats=repeats, seconds=seconds,
        **overrides,
    )  # fmt: skip
    for event in run:
        if isinstance(event, Benchmarked):
            return event.benchmark
    raise AssertionError("a benchmark ends with Benchmarked")


def benchmark_iter(
    model: str | Path | None = None,
    *,
    against: str | Path | None = None,
    prefill_tokens: tuple[int, ...] | None = None,
    batch_sizes: tuple[int, ...] | None = None,
    repeats: int | None = None,
    seconds: float | None = None,
    **overrides: Any,
) -> Iterator[Event]:
    """:func:`benchmark` as a generator of events; the last one is Benchmarked."""
    if model is not None:
        overrides["model"] = str(model)
    config = PruneConfig.build(None, **overrides)
    device = pick_device(config.device)
    protocol = protocol_for(
        device,
        _protocol(prefill_tokens=prefill_tokens, batch_sizes=batch_sizes, repeats=repeats, seconds=seconds),
    )
    subject = _Opened.find(config)
    dense = None if against is None else _Opened.find(config.model_copy(update={"model": str(against), "revision": None}))
    together = _fit(device, subject, dense)
    with memory_errors():
        yield StageStarted(stage="load", total=1 if dense is None else 2)
        begun = time.perf_counter()
        first = (dense if dense is not None and not together else subject).load(device)
        other = dense.load(device) if dense is not None and together else None
        yield StageFinished(stage="load", seconds=time.perf_counter() - begun)
        if device.type == "cpu" and first.dtype in (torch.float16, torch.bfloat16):
            name = str(first.dtype).removeprefix("torch.")
            yield Warned(message=f"most CPUs emulate {name}: these speeds are not those of --dtype float32.")
        yield StageStarted(stage="benchmark")
        begun, peak = time.perf_counter(), PeakMemory()
        if dense is None or together:
            named = (dense.name, other) if dense is not None and other is not None else None
            measured = yield from benchmark_together((subject.name, first), named, protocol, device)
        else:
            yield Warned(message="the two models do not fit on the device together: they are measured one after the other.")
            measured = yield from benchmark_models(
                first, lambda: subject.load(device), device=device, protocol=protocol, name=subject.name, against=dense.name
            )
        yield StageFinished(
            stage="benchmark",
            seconds=time.perf_counter() - begun,
            peak_cpu_bytes=peak.cpu_bytes,
            peak_gpu_bytes=peak.gpu_bytes,
        )
    yield Benchmarked(benchmark=measured)


@dataclass(frozen=True)
class _Opened:
    """A checkpoint that is on disk and can be loaded."""

    config: PruneConfig
    source: Source

    @classmethod
    def find(cls, config: PruneConfig) -> _Opened:
        return cls(config, resolve(config))

    @property
    def name(self) -> str:
        return str(self.source.name)

    def load(self, device: torch.device) -> PreTrainedModel:
        model = load_model(self.source, self.config, device, packed=True)
        if device.type == "cuda":
            fuse_shared_inputs_(model)
        return model


def _protocol(**asked: Any) -> Protocol:
    try:
        given = {name: value for name, value in asked.items() if value is not None}
        protocol = Protocol.model_validate(given)
    except ValidationError as error:
        raise ConfigError(describe(error)) from None
    if not protocol.prefill_tokens and not protocol.batch_sizes:
        raise ConfigError("nothing to measure: give at least one of --prefill-tokens and --batch-sizes.")
    return protocol


def _fit(device: torch.device, subject: _Opened, dense: _Opened | None) -> bool:
    """Whether both fit on the device at once. Raises DoesNotFit where not even one of them does."""
    room = WORKING_SHARE * free_bytes(device)
    sizes = [item.source.weights_bytes for item in (subject, dense) if item is not None]
    if max(sizes) > room:
        raise DoesNotFit(
            f"the weights take {max(sizes) / 1e9:.1f} GB and {device} has {room / 1e9:.1f} GB to hold them. "
            "A speed measured with part of them elsewhere would say nothing: use a larger device, or --device cpu."
        )
    return sum(sizes) <= room
