"""Benchmarking models that are in memory: whole and layer by layer, what is compared taking turns where both are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.devices import environment
from llmprune.events import Event
from llmprune.measure.bandwidth import copy_bandwidth
from llmprune.measure.dispatch import dispatched
from llmprune.measure.layers import kind_of, measure_layers
from llmprune.measure.points import Subject, fit_protocol, measure_points, points_of, zeros_of
from llmprune.measure.reasons import DeviceFacts, explain
from llmprune.measure.timing import Clock
from llmprune.packing import packed_layers
from llmprune.speed import Benchmark, LayerSpeed, ModelSpeed, Protocol
from llmprune_kernels.linear import SparseLinear24

QUICK = Protocol(
    prefill_tokens=(128, 512), batch_sizes=(1, 16), layer_tokens=(1, 16, 512), decode_tokens=16, repeats=7, seconds=20.0
)
"""What a job measures of its own result."""
_LAYERS_SHARE = 0.35
"""Of the time, where there are packed layers."""


def num_steps(protocol: Protocol, *models: PreTrainedModel, rounds: int = 1) -> int:
    """Steps of the stage: points, ``rounds`` times, and kinds of packed layers at every number of tokens."""
    kinds = {kind_of(layer) for model in models for layer in packed_layers(model).values()}
    return rounds * len(points_of(protocol)) + len(kinds) * len(protocol.layer_tokens)


@dataclass
class _Bench:
    """What both ways of measuring share: the device, how long, the steps so far, and what is to be said of them."""

    device: torch.device
    protocol: Protocol
    clock: Clock
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begun = self.clock()
        self.copy = copy_bandwidth(self.device)
        self.done = self.total = 0

    def subject(self, name: str, model: PreTrainedModel) -> Subject:
        return Subject(name, model, self.copy)

    def points(self, subjects: Sequence[Subject], seconds: float) -> Iterator[Event]:
        notes = yield from measure_points(
            subjects, self.protocol, seconds=seconds, done=self.done, total=self.total, clock=self.clock
        )
        self.notes += notes
        self.done += len(points_of(self.protocol))

    def layers(self, model: PreTrainedModel, seconds: float) -> Generator[Event, None, tuple[LayerSpeed, ...]]:
        speeds, notes = yield from measure_layers(
            model, self.protocol, self.device, seconds=seconds, done=self.done, total=self.total, clock=self.clock
        )
        self.notes += notes
        return speeds

    @property
    def spent(self) -> float:
        return self.clock() - self.begun

    def report(self, subject: ModelSpeed, dense: ModelSpeed | None, zeros: float, **others: Any) -> Benchmark:
        layers = others.get("layers", ())
        return Benchmark(
            model=subject.name,
            against=dense.name if dense else None,
            environment=environment(self.device),
            protocol=self.protocol,
            copy_gigabytes_per_second=self.copy,
            subject=subject,
            dense=dense,
            reasons=explain(DeviceFacts.of(self.device), subject, dense, layers, zeros=zeros),
            notes=tuple(dict.fromkeys(self.notes)),
            seconds=self.spent,
            **others,
        )


def benchmark_together(
    subject: tuple[str, PreTrainedModel],
    dense: tuple[str, PreTrainedModel] | None,
    protocol: Protocol,
    device: torch.device,
    *,
    clock: Clock = time.perf_counter,
) -> Generator[Event, None, Benchmark]:
    """Measure models that both lie on ``device``, taking turns; ``dense`` is None to measure one alone.

    Where some kinds of packed layers turn out faster and others not, the latter are made dense in ``subject``, which is
    changed by that and measured once more.
    """
    protocol, notes = fit_protocol(protocol, subject[1])
    bench = _Bench(device, protocol, clock, list(notes))
    subjects = [bench.subject(*named) for named in (subject, dense) if named is not None]
    bench.total = num_steps(protocol, subject[1])
    for_layers = protocol.seconds * _LAYERS_SHARE if subjects[0].num_packed else 0.0
    yield from bench.points(subjects, protocol.seconds - for_layers)
    layers = yield from bench.layers(subject[1], for_layers)
    reports = [item.report() for item in subjects]
    zeros = zeros_of(subject[1])
    mixed = None
    if dense is not None and len({layer.pick for layer in layers}) > 1:
        make_dense_(subject[1], [layer for layer in layers if layer.pick == "dense"])
        mix = bench.subject(subject[0], subject[1])
        bench.total += len(points_of(protocol))
        yield from bench.points([mix], max(protocol.seconds / 5, protocol.seconds - bench.spent))
        mixed = mix.report()
    against = reports[1] if dense is not None else None
    return bench.report(reports[0], against, zeros, layers=layers, mixed=mixed, interleaved=dense is not None)


def benchmark_models(
    dense: PreTrainedModel,
    pack: Callable[[], PreTrainedModel],
    *,
    device: torch.device,
    quick: bool = True,
    name: str = "packed",
    against: str = "dense",
    protocol: Protocol | None = None,
    clock: Clock = time.perf_counter,
) -> Generator[Event, None, Benchmark]:
    """Measure ``dense``, then call ``pack``, which may change that very model, and measure what it returns.

    Only one of them need be in memory, so they cannot take turns: a drift of the machine between them is not corrected.

    Args:
        dense: the model before it is packed.
        pack: makes the packed one.
        device: where to measure; a model that lies elsewhere is moved there and back.
        quick: the shorter protocol, of a job.
        name, against: what the two are called in the report.
        protocol: in place of the two that ``quick`` chooses from.
        clock: seconds, for tests.
    """
    protocol, notes = fit_protocol(protocol or protocol_for(device, QUICK if quick else Protocol()), dense)
    bench = _Bench(device, protocol, clock, list(notes))
    bench.total = 2 * len(points_of(protocol))
    for_points = protocol.seconds * (1 - _LAYERS_SHARE) / 2
    with dispatched(dense, device):
        first = bench.subject(against, dense)
        yield from bench.points([first], for_points)
    report = first.report()
    del first, dense
    packed = pack()
    bench.total = num_steps(protocol, packed, rounds=2)
    with dispatched(packed, device):
        second = bench.subject(name, packed)
        yield from bench.points([second], for_points)
        layers = yield from bench.layers(packed, protocol.seconds * _LAYERS_SHARE)
    return bench.report(second.report(), report, zeros_of(packed), layers=layers, mixed=None, interleaved=False)


def protocol_for(device: torch.device, protocol: Protocol) -> Protocol:
    """On a CPU decode is of 8 tokens after 16: longer prompts would take longer than what is measured."""
    return protocol.model_copy(update={"context": 16, "decode_tokens": 8}) if device.type == "cpu" else protocol


def make_dense_(model: nn.Module, kinds: Iterable[LayerSpeed]) -> None:
    """Make the packed layers of these kinds dense in place."""
    chosen = {(kind.format, kind.shape) for kind in kinds}
    for name, layer in packed_layers(model).items():
        if kind_of(layer) in chosen:
            if isinstance(layer, SparseLinear24):
                layer.unfuse()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.to_linear())
