"""The points of a benchmark: what is measured of a whole model, and the loop that measures it."""

from __future__ import annotations

import gc
import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.devices import PeakMemory, is_out_of_memory, module_device
from llmprune.events import Event, Progress
from llmprune.measure.phases import Prepared, max_tokens, prepare_decode, prepare_prefill
from llmprune.measure.timing import MIN_ROUNDS, Clock, quartiles, seconds_of, take_turns
from llmprune.packing import packed_layers
from llmprune.speed import BenchmarkSpeed, ModelSpeed, Phase, Protocol


@dataclass(frozen=True)
class Point:
    """One phase at one size."""

    phase: Phase
    batch_size: int
    num_tokens: int

    @property
    def name(self) -> str:
        """In words."""
        return f"decode at batch {self.batch_size}" if self.phase == "decode" else f"prefill of {self.num_tokens} tokens"


@dataclass
class Subject:
    """A model under measurement and what was found."""

    name: str
    model: PreTrainedModel
    copy_gigabytes_per_second: float
    speeds: list[BenchmarkSpeed] = field(default_factory=list)
    working_bytes: int | None = None

    def __post_init__(self) -> None:
        self.weights_bytes = weights_bytes(self.model)
        self.read_bytes = bytes_read(self.model)
        packed = packed_layers(self.model).values()
        self.num_packed = len(packed)
        self.packed_bytes = weights_bytes(*packed)

    def prepare(self, point: Point, context: int) -> Prepared | None:
        """Make ready and warm up, noting the memory that takes beside the weights."""
        device = module_device(self.model)
        with _current(device):  # whose counters are read
            peak = PeakMemory(collect=False)
            before = _used_on(device)
            if point.phase == "prefill":
                prepared: Prepared | None = prepare_prefill(self.model, point.num_tokens)
            else:
                prepared = prepare_decode(self.model, point.batch_size, context, point.num_tokens)
            if prepared is not None:
                seconds_of(prepared.run, device)
            self.working_bytes = max(self.working_bytes or 0, _peak_of(peak, device) - before)
        return prepared

    def file(self, point: Point, prepared: Prepared, times: Sequence[float], context: int) -> None:
        """Keep the speeds of one point."""
        low, median, high = quartiles([point.batch_size * point.num_tokens / seconds for seconds in times])
        rate = None
        if point.phase == "decode" and self.read_bytes is not None:
            rate = self.read_bytes * median / point.batch_size / 1e9
        self.speeds.append(
            BenchmarkSpeed(
                phase=point.phase,
                batch_size=point.batch_size,
                num_tokens=point.num_tokens,
                repeats=len(times),
                tokens_per_second=median,
                quartiles=(low, high),
                context=context if point.phase == "decode" else 0,
                cuda_graph=prepared.cuda_graph,
                gigabytes_per_second=rate,
                copy_share=None if rate is None else rate / self.copy_gigabytes_per_second,
            )
        )

    def report(self) -> ModelSpeed:
        """What was found, points in the order of phase and size."""
        order = sorted(self.speeds, key=lambda speed: (speed.phase == "decode", speed.batch_size, speed.num_tokens))
        return ModelSpeed(
            name=self.name,
            weights_bytes=self.weights_bytes,
            packed_bytes=self.packed_bytes,
            num_packed=self.num_packed,
            peak_bytes=None if self.working_bytes is None else self.weights_bytes + self.working_bytes,
            speeds=tuple(order),
        )


def fit_protocol(protocol: Protocol, model: PreTrainedModel) -> tuple[Protocol, tuple[str, ...]]:
    """The protocol cut to the positions the model has, and what was cut, in words."""
    limit = max_tokens(model)
    if limit is None:
        return protocol, ()
    notes = []
    beyond = [count for count in protocol.prefill_tokens if count > limit]
    if beyond:
        notes.append(f"prefill stops at the model's maximum of {limit} tokens (asked: {', '.join(map(str, beyond))})")
    context = protocol.context
    if context + protocol.decode_tokens > limit:
        context = max(1, limit - protocol.decode_tokens)
        notes.append(f"decode starts after {context} tokens, so as to stay within the model's maximum of {limit}")
    prefill = tuple(sorted({min(count, limit) for count in protocol.prefill_tokens}))
    decode = min(protocol.decode_tokens, max(1, limit - context))
    return protocol.model_copy(update={"prefill_tokens": prefill, "context": context, "decode_tokens": decode}), tuple(notes)


def points_of(protocol: Protocol) -> list[Point]:
    """All points, the cheapest first."""
    prefill = [Point("prefill", 1, count) for count in protocol.prefill_tokens]
    decode = [Point("decode", count, protocol.decode_tokens) for count in sorted(set(protocol.batch_sizes))]
    return sorted(prefill + decode, key=lambda point: point.batch_size * point.num_tokens)


@torch.no_grad()
def measure_points(
    subjects: Sequence[Subject],
    protocol: Protocol,
    *,
    seconds: float,
    done: int,
    total: int,
    clock: Clock = time.perf_counter,
) -> Generator[Event, None, list[str]]:
    """Measure every point of the protocol on all subjects, which take turns; returns notes on what was done otherwise.

    The time is shared evenly among the points that are left; a point that one round of would overrun it is left out.
    """
    points = points_of(protocol)
    notes: list[str] = []
    late: list[str] = []
    begun = clock()
    last: dict[Phase, tuple[int, float]] = {}
    for number, point in enumerate(points):
        remaining = seconds - (clock() - begun)
        if point.phase in last and _predicted(point, *last[point.phase]) > remaining:
            late.append(point.name)
        else:
            round_begun = clock()
            share = max(remaining, 0.0) / (len(points) - number)
            notes += _measure_point(subjects, point, protocol, share, remaining, clock)
            rounds = max((speed.repeats for speed in subjects[0].speeds[-1:]), default=1)
            last[point.phase] = (point.batch_size * point.num_tokens, (clock() - round_begun) / (rounds + 1))
        done += 1
        yield Progress(stage="benchmark", done=done, total=total, detail=point.name)
    if late:
        notes.append(f"left out for lack of time (--seconds): {', '.join(late)}")
    return list(dict.fromkeys(notes))


def _measure_point(
    subjects: Sequence[Subject], point: Point, protocol: Protocol, seconds: float, limit: float, clock: Clock
) -> list[str]:
    device = module_device(subjects[0].model)
    begun = clock()
    try:
        found = [subject.prepare(point, protocol.context) for subject in subjects]
        prepared = [item for item in found if item is not None]
        if len(prepared) < len(subjects):
            return ["decode is not measured: the model keeps no cache"]
        spent = clock() - begun
        times = take_turns(
            [item.run for item in prepared],
            repeats=protocol.repeats, seconds=seconds - spent, limit=limit - spent, device=device, clock=clock,
        )  # fmt: skip
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _empty_cache(device)
        return [f"{point.name} is left out: memory ran out"]
    for subject, item, values in zip(subjects, prepared, times, strict=True):
        subject.file(point, item, values, protocol.context)
    return [item.note for item in prepared if item.note]


def _predicted(point: Point, tokens: int, seconds: float) -> float:
    """At least how long a warm-up and the rounds take; a decode step may take no longer for more sequences, prefill does."""
    scale = point.batch_size * point.num_tokens / tokens if point.phase == "prefill" else 1.0
    return (1 + MIN_ROUNDS) * seconds * scale


def weights_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters, those that are shared once."""
    return sum(parameter.nbytes for parameter in {id(p): p for module in modules for p in module.parameters()}.values())


def bytes_read(model: PreTrainedModel) -> int | None:
    """Bytes of the weights a decode step reads: all but the rows of an embedding it does not look up.

    None for a mixture of experts, which reads those its router chooses.
    """
    if any("expert" in name for name, _ in model.named_modules()):
        return None
    total = weights_bytes(model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(table, nn.Embedding) and getattr(head, "weight", None) is not table.weight:
        total -= table.weight.nbytes
    return total


def zeros_of(model: PreTrainedModel) -> float:
    """Fraction of zeros in the matrices, embeddings left out."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1 and id(parameter) not in tables]
    num_zeros = sum(int((matrix == 0).sum()) for matrix in matrices)
    numel: int = sum(matrix.numel() for matrix in matrices)
    return num_zeros / max(1, numel)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make an accelerator with an index the current one."""
    if device.type == "cpu" or device.index is None:
        return nullcontext()
    return torch.accelerator.device_index(device.index)


def _peak_of(peak: PeakMemory, device: torch.device) -> int:
    return peak.cpu_bytes if device.type == "cpu" else peak.gpu_bytes or 0


def _used_on(device: torch.device) -> int:
    if device.type == "cpu":
        return int(psutil.Process().memory_info().rss)
    return int(torch.accelerator.memory_allocated())


def _empty_cache(device: torch.device) -> None:
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
