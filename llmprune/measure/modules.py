"""What a group of a module costs in time: one module of every shape is sliced to a few widths, and a line laid through them.

For a budget of latency. B sequences of one batch, S tokens of a prompt.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from llmprune.devices import module_device
from llmprune.measure.phases import max_tokens, random_ids
from llmprune.measure.timing import Run, take_turns
from llmprune.structured.levels import quantum_of
from llmprune.structured.slicing import Cut, slice_
from llmprune.structured.units import Module

WIDTHS = (Fraction(1), Fraction(3, 4), Fraction(1, 2))
"""Shares of the groups that are timed; where two come to the same number it is timed once."""
LEAST_SHARE = 100
"""A group costs at least so small a part of an even share of its module, also where noise has the line fall or lie flat."""


@dataclass(frozen=True)
class ModuleSeconds:
    """Times of one module at a few widths.

    Attributes:
        groups: how many it had, falling from all of them.
        prefill: median seconds a token takes at each, in a prompt.
        decode: median seconds of one token after a prompt, at each.
    """

    groups: tuple[int, ...]
    prefill: tuple[float, ...]
    decode: tuple[float, ...]

    def per_group(self, prompt_tokens: int, new_tokens: int) -> float:
        """Seconds that a group adds to reading a prompt and writing so many tokens: the slope over the widths."""
        seconds = [
            prompt_tokens * prefill + new_tokens * decode for prefill, decode in zip(self.prefill, self.decode, strict=True)
        ]
        return slope(self.groups, seconds)


def slope(groups: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds a group, by least squares with an intercept; not below a hundredth of an even share of the first width's."""
    least = seconds[0] / groups[0] / LEAST_SHARE
    return max(statistics.linear_regression(groups, seconds).slope, least) if len(groups) > 1 else seconds[0] / groups[0]


def seconds_per_group(
    model: PreTrainedModel,
    modules: Sequence[Module],
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    repeats: int = 25,
    seconds: float = 2.0,
) -> dict[str, float]:
    """Seconds that a group of each module adds to one request, by module; one of every shape is measured and stands for all.

    Arguments as :func:`module_seconds` has them; ``new_tokens`` are written after the prompt.
    """
    known: dict[Any, float] = {}
    found = {}
    for module in modules:
        owner = model.get_submodule(module.name)
        shape = (type(owner), module.kind, module.group_size, module.num_groups, module.parameters_per_group)
        if shape not in known:
            times = module_seconds(model, module, prompt_tokens=prompt_tokens, repeats=repeats, seconds=seconds)
            known[shape] = times.per_group(prompt_tokens, new_tokens)
        found[module.name] = known[shape]
    return found


@torch.no_grad()
def module_seconds(
    model: PreTrainedModel, module: Module, *, prompt_tokens: int = 512, repeats: int = 25, seconds: float = 2.0
) -> ModuleSeconds:
    """Time one module, whole and with three quarters and half of its groups, on the device it lies on.

    It is given what the model gives it, at batch 1: a prompt of random tokens, and one token with the keys and values of that
    prompt in a cache. The narrow ones are copies, sliced as a pruned model is. The widths take turns, so that a change of the
    machine's pace hits all of them.

    Args:
        model: whole on one device.
        prompt_tokens: at most one less than the model has positions.
        repeats: rounds of each phase.
        seconds: about how long each phase takes at most.
    """
    device = module_device(model)
    limit = max_tokens(model)
    prompt_BS = random_ids(model, 1, prompt_tokens if limit is None else min(prompt_tokens, limit - 1))
    owner = model.get_submodule(module.name)
    prefill = _captured(owner, lambda: model(input_ids=prompt_BS, use_cache=False))
    cache = getattr(model(input_ids=prompt_BS, use_cache=True), "past_key_values", None)
    past = {} if cache is None else {"past_key_values": cache}
    decode = _captured(owner, lambda: model(input_ids=prompt_BS[:, -1:], use_cache=True, **past))
    groups = widths_of(module)
    parts = [_narrow(owner, module, kept) for kept in groups]
    medians = []
    for call in (prefill, decode):
        runs = [_run(part, call, kept) for part, kept in zip(parts, groups, strict=True)]
        take_turns(runs, repeats=3, seconds=seconds / 4, limit=seconds, device=device)  # to warm up
        times = take_turns(runs, repeats=repeats, seconds=seconds, limit=4 * seconds, device=device)
        medians.append([statistics.median(own) for own in times])
    num_tokens = prompt_BS.shape[1]
    return ModuleSeconds(groups, tuple(time / num_tokens for time in medians[0]), tuple(medians[1]))


def widths_of(module: Module) -> tuple[int, ...]:
    """The numbers of groups that are timed, falling from all: in whole quanta, and at least one."""
    quantum = quantum_of([module])
    least = min(quantum, module.num_groups)
    return tuple(sorted({max(least, round(share * module.num_groups / quantum) * quantum) for share in WIDTHS}, reverse=True))


_Call = tuple[tuple[Any, ...], dict[str, Any]]


def _captured(owner: nn.Module, forward: Callable[[], object]) -> _Call:
    """How the model calls the module; of a cache, what it held at that moment."""
    calls: list[_Call] = []
    handle = owner.register_forward_pre_hook(
        lambda _module, args, kwargs: calls.append(_map_caches(_copied, (args, kwargs))), with_kwargs=True
    )
    try:
        forward()
    finally:
        handle.remove()
    return calls[0]


def _narrow(owner: nn.Module, module: Module, kept: int) -> nn.Module:
    """A copy of the module with its first groups alone."""
    holder = nn.Module()
    holder.part, twin = copy.deepcopy((owner, module))
    if kept < module.num_groups:
        slice_(cast(PreTrainedModel, holder), replace(twin, name="part"), Cut(torch.arange(kept)))
    return holder.part


def _run(part: nn.Module, call: _Call, kept: int) -> Run:
    """The module called so, every time with the cache as it was, of the groups kept alone."""
    layer = getattr(part, "layer_idx", None)
    narrow = _map_caches(lambda cache: _copied(cache, layer, kept), call)
    ready: list[_Call] = []

    def reset() -> None:
        ready[:] = [_map_caches(_copied, narrow)]

    def run() -> object:
        args, kwargs = ready[0]
        return part(*args, **kwargs)

    return Run(run, reset)


def _copied(cache: Cache, layer: int | None = None, kept: int | None = None) -> Cache:
    """A cache of the same tensors, to be updated alone; one layer with its first heads only."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(own) for own in cache.layers]
    if layer is not None and isinstance(getattr(twin.layers[layer], "keys", None), Tensor):
        own = twin.layers[layer]
        own.keys, own.values = own.keys[:, :kept].contiguous(), own.values[:, :kept].contiguous()
    return twin


def _map_caches(change: Callable[[Cache], Cache], call: _Call) -> _Call:
    def swap(value: Any) -> Any:
        return change(value) if isinstance(value, Cache) else value

    args, kwargs = call
    return tuple(map(swap, args)), {key: swap(value) for key, value in kwargs.items()}
