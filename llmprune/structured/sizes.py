"""How large a model is as it lies in memory: parameters, and what a token takes in the KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def num_parameters(model: PreTrainedModel) -> int:
    """Parameters of a model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes by which the cache of all layers grows with a token of one sequence, as two short forwards show it; 0 for a model
    without a cache.

    It is what the cache of transformers really holds: the latents of a latent attention, the keys and values of a layer once
    where others read them too, and of :class:`~llmprune.structured.slicing.NoAttention` its two zeros. A layer with a sliding
    window grows like any other until the window is full, and then no more; states of a fixed size count nothing.
    """
    one, two = (_cache_bytes(model, length) for length in (1, 2))
    return two - one


def _cache_bytes(model: PreTrainedModel, length: int) -> int:
    device = model.get_input_embeddings().weight.device
    ids_1S = torch.zeros(1, length, dtype=torch.int64, device=device)
    output = model(input_ids=ids_1S, use_cache=True)
    found: dict[int, Tensor] = {}
    _collect(getattr(output, "past_key_values", None), found, set())
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def _collect(value: Any, found: dict[int, Tensor], seen: set[int]) -> None:
    """All tensors that a cache holds, by id."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        found[id(value)] = value
    elif isinstance(value, Mapping):
        for part in value.values():
            _collect(part, found, seen)
    elif isinstance(value, list | tuple):
        for part in value:
            _collect(part, found, seen)
    elif type(value).__module__.startswith("transformers") and "cache" in type(value).__name__.lower() + type(value).__module__:
        _collect(vars(value), found, seen)
