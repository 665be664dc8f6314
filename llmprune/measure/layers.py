"""Single packed layers against ``F.linear`` on the same weight made dense: which of the two is faster, at how many tokens.

Weights rotate through more bytes than the caches hold, as in a model whose layers follow one another; inputs are random
numbers, because zeros run faster. O out features, I in features, T tokens.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.devices import free_bytes, is_out_of_memory
from llmprune.events import Event, Progress
from llmprune.measure.bandwidth import cache_bytes
from llmprune.measure.graphs import CaptureFailed, capture
from llmprune.measure.timing import MIN_ROUNDS, Clock, Run, quartiles, seconds_of, take_turns
from llmprune.packing import packed_layers
from llmprune.speed import LayerSpeed, LayerTime, Protocol
from llmprune_kernels.linear import PackedLinear, SparseLinear24

_MAX_COPIES = {"cpu": 16}
_DEFAULT_MAX_COPIES = 64
_SHORTEST = 2e-3
"""A timed run lasts at least so many seconds: shorter ones measure the clock."""

Kind = tuple[str, tuple[int, int]]
"""Format and shape [O, I] of a packed layer."""


def kind_of(layer: PackedLinear) -> Kind:
    """What layers must have in common to be measured as one."""
    form = ("2:4 int8" if layer.is_int8 else "2:4") if isinstance(layer, SparseLinear24) else "bitmask"
    return form, (layer.out_features, layer.in_features)


@torch.no_grad()
def measure_layers(
    model: PreTrainedModel,
    protocol: Protocol,
    device: torch.device,
    *,
    seconds: float,
    done: int,
    total: int,
    clock: Clock = time.perf_counter,
) -> Generator[Event, None, tuple[tuple[LayerSpeed, ...], tuple[str, ...]]]:
    """Time every kind of packed layer at each of ``protocol.layer_tokens``; returns the speeds, and notes on what was left out.

    Progress is told as steps ``done`` + 1 ... of ``total`` of the stage ``benchmark``.
    """
    groups: dict[Kind, list[tuple[str, PackedLinear]]] = {}
    for name, layer in packed_layers(model).items():
        groups.setdefault(kind_of(layer), []).append((name, layer))
    speeds: list[LayerSpeed] = []
    notes: list[str] = []
    num_late = 0
    begun = clock()
    for number, ((form, shape), members) in enumerate(groups.items()):
        what = f"{form} {shape[0]} x {shape[1]}"
        until = clock() + (seconds - (clock() - begun)) / (len(groups) - number)
        times: list[LayerTime] = []
        dense, packed = _rotation([layer for _, layer in members], device)
        for index, num_tokens in enumerate(sorted(protocol.layer_tokens)):
            remaining = until - clock()
            # A layer takes at least as long as with fewer tokens: what cannot be done in time is not begun.
            predicted = len(dense) * (times[-1].dense_seconds + times[-1].packed_seconds) if times else 0.0
            if times and (1 + MIN_ROUNDS) * predicted > remaining:
                num_late += 1
            else:
                try:
                    share = remaining / (len(protocol.layer_tokens) - index)
                    times.append(_time_layer(dense, packed, num_tokens, protocol.repeats, share, remaining, device, clock))
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    notes.append(f"layers {what} at {num_tokens} tokens are left out: memory ran out")
            done += 1
            yield Progress(stage="benchmark", done=done, total=total, detail=f"layers {what}")
        if times:
            name = members[0][0]
            speeds.append(LayerSpeed(format=form, shape=shape, num_layers=len(members), example=name, times=tuple(times)))
    if num_late:
        notes.append(
            f"left out for lack of time (--seconds): {num_late} of {len(groups) * len(protocol.layer_tokens)} layer timings"
        )
    return tuple(speeds), tuple(notes)


def _rotation(layers: Sequence[PackedLinear], device: torch.device) -> tuple[list[nn.Module], list[nn.Module]]:
    """Copies of layers, dense and packed, enough of them that none is still in a cache when its turn comes again."""
    first = layers[0]
    size = sum(parameter.nbytes for parameter in first.parameters())
    room = free_bytes(device) // (4 * (size + first.in_features * first.out_features * first.dtype.itemsize))
    count = max(1, min(_MAX_COPIES.get(device.type, _DEFAULT_MAX_COPIES), math.ceil(cache_bytes(device) / size), room))
    chosen = [layers[number % len(layers)] for number in range(count)]
    # Copies, also of the packed ones: a layer that is fused with others answers for all of them.
    packed: list[nn.Module] = [copy.deepcopy(layer).to(device) for layer in chosen]
    dense: list[nn.Module] = [layer.to_linear().to(device) for layer in chosen]
    return dense, packed


def _time_layer(
    dense: Sequence[nn.Module],
    packed: Sequence[nn.Module],
    num_tokens: int,
    repeats: int,
    seconds: float,
    limit: float,
    device: torch.device,
    clock: Clock,
) -> LayerTime:
    weight = next(dense[0].parameters())
    generator = torch.Generator().manual_seed(num_tokens)
    x_TI = torch.randn(num_tokens, weight.shape[1], generator=generator).to(device, weight.dtype)
    begun = clock()
    runs = _prepared((dense, packed), x_TI, device)
    counts = [max(1, math.ceil(_SHORTEST / max(seconds_of(run, device, clock), 1e-9))) for run in runs]
    repeated = [Run(_times(run.run, count)) for run, count in zip(runs, counts, strict=True)]
    spent = clock() - begun
    taken = take_turns(repeated, repeats=repeats, seconds=seconds - spent, limit=limit - spent, device=device, clock=clock)
    dense_time, packed_time = (
        quartiles([value / (count * len(dense)) for value in values]) for values, count in zip(taken, counts, strict=True)
    )
    return LayerTime(
        num_tokens=num_tokens,
        repeats=len(taken[0]),
        dense_seconds=dense_time[1],
        dense_quartiles=(dense_time[0], dense_time[2]),
        packed_seconds=packed_time[1],
        packed_quartiles=(packed_time[0], packed_time[2]),
    )


def _prepared(stacks: Sequence[Sequence[nn.Module]], x_TI: Tensor, device: torch.device) -> list[Run]:
    """One pass through each stack of layers, as CUDA graphs where both can be captured."""

    def through(layers: Sequence[nn.Module]) -> None:
        for layer in layers:
            layer(x_TI)

    works = [partial(through, layers) for layers in stacks]
    if device.type == "cuda":
        with suppress(CaptureFailed):
            return [Run(capture(work, device)) for work in works]
    for work in works:
        work()
    return [Run(work) for work in works]


def _times(work: Callable[[], object], count: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(count):
            work()

    return repeated
