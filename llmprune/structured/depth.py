"""Depth: whole decoder blocks leave a model, and what is left is one of its stock class.

The blocks that stay are renumbered, everything the config says layer by layer is cut to them, and the result is compared with
the dense model in which the blocks that go are bypassed: on a batch, and token by token with a KV cache.

N sequences, S sequence, V vocabulary; L blocks, K of them kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmprune.anatomy.blocks import Stack, stubbed
from llmprune.errors import UnsupportedModel
from llmprune.structured.stock import applied, config_changes, differences, distance, rounding, stock_model

LAYER_NUMBERS = ("mlp_only_layers", "attn_layer_indices", "moe_layers", "full_attn_idxs")
"""Fields of configs that list the numbers of layers."""
LEADING_LAYERS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
"""Fields of configs that say how many of the first layers are of another kind."""
LAST_LAYERS = ("moe_layer_end_index",)
"""Fields of configs that hold the number of the last layer of a kind."""
_NOT_BY_LAYER = re.compile(r"token_ids?$|^architectures$|^id2label$|^keys_to_ignore")
_STEPS = 3  # single tokens of the check with a cache
_FAILURES = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)


@torch.no_grad()
def remove_blocks_(model: PreTrainedModel, stack: Stack, indices: Sequence[int], input_ids_NS: Tensor) -> None:
    """Take blocks out of a model, and have its config say so. ``stack`` no longer describes the model.

    Args:
        model: refused, it is left as it was.
        stack: probed, so that its blocks can be bypassed.
        indices: of the blocks to remove; at least one block stays.
        input_ids_NS: the batch to check on, of at least five tokens each.

    Raises:
        UnsupportedModel: blocks share weights or keys and values, the config cannot say what is left, or the result differs
            from the dense model with the blocks bypassed.
    """
    num_blocks = len(stack.blocks)
    assert set(indices) < set(range(num_blocks)), "blocks of the stack, not all of them"
    kept = [index for index in range(num_blocks) if index not in set(indices)]
    _check_apart(model, stack)
    fields = layer_fields(model.config.get_text_config(), num_blocks, kept)
    with bypassed(stack, indices):
        reference_NSV = _logits(model, input_ids_NS)
    slack = _cache_slack(model, input_ids_NS)
    stock = stock_model(model, fields)
    whole = model.get_submodule(stack.path)
    model.set_submodule(stack.path, nn.ModuleList(stack.blocks[index] for index in kept))
    try:
        changes = differences(model, stock, lambda ours, theirs: _follows(ours, theirs, num_blocks, kept))
        with applied([*changes, *config_changes(model, fields)]):
            _check(model, reference_NSV, input_ids_NS, slack)
    except BaseException:
        model.set_submodule(stack.path, whole)
        raise


def layer_fields(text: PreTrainedConfig, num_blocks: int, kept: Sequence[int]) -> dict[str, Any]:
    """The fields of a config that describe a model of these of its ``num_blocks`` blocks, with their new values.

    Lists of one entry a layer are cut, lists of layer numbers renumbered, counts of leading layers counted again. What else
    depends on the number of a layer, as sliding_window_pattern does, stays: whether it still says the same, the model built
    from it shows.
    """
    fields: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in vars(text).items():
        if name.startswith("_") or _NOT_BY_LAYER.search(name):
            continue
        if name in LAYER_NUMBERS and isinstance(value, list | tuple):
            fields[name] = [new for new, old in enumerate(kept) if old in value]
        elif name in LEADING_LAYERS and isinstance(value, int):
            fields[name] = sum(old < value for old in kept)
        elif name in LAST_LAYERS and isinstance(value, int) and value >= 0:
            fields[name] = sum(old <= value for old in kept) - 1
        elif isinstance(value, list | tuple) and len(value) == num_blocks:
            fields[name] = [value[old] for old in kept]
    return fields


@contextmanager
def bypassed(stack: Stack, indices: Sequence[int]) -> Iterator[None]:
    """While active these blocks hand on what they are given."""
    rests = tuple(stack.rests[index] for index in indices)
    with stubbed(Stack(stack.path, tuple(stack.blocks[index] for index in indices), rests)):
        yield


def _follows(ours: Any, theirs: Any, num_blocks: int, kept: Sequence[int]) -> bool:
    """Whether a module's attribute is a layer's number, the number of layers, or a list of one entry a layer."""
    if isinstance(ours, list | tuple):
        return len(ours) == num_blocks and list(theirs) == [ours[old] for old in kept]
    if isinstance(ours, bool) or not isinstance(ours, int) or not isinstance(theirs, int):
        return False
    numbered = 0 <= theirs < len(kept) and ours == kept[theirs]
    return numbered or (ours, theirs) in ((num_blocks, len(kept)), (num_blocks - 1, len(kept) - 1))


def _check_apart(model: PreTrainedModel, stack: Stack) -> None:
    """Raise UnsupportedModel where blocks have weights, keys and values, or constants of each other."""
    text = model.config.get_text_config()
    if getattr(text, "num_kv_shared_layers", 0):
        raise UnsupportedModel(f"layers of {text.model_type} read keys and values of other layers (num_kv_shared_layers).")
    uses = Counter(id(parameter) for block in stack.blocks for parameter in block.parameters())
    for name, parameter in model.named_parameters():
        if uses[id(parameter)] > 1:
            raise UnsupportedModel(f"{name} serves several blocks, none of which can be removed alone.")
    constants: dict[str, Tensor] = {}
    for block in stack.blocks:
        saved = block.state_dict(keep_vars=True)
        for name, buffer in block.named_buffers():
            known = constants.setdefault(name, buffer)
            if name not in saved and not (known.shape == buffer.shape and torch.equal(known, buffer)):
                raise UnsupportedModel(
                    f"{name} of {text.model_type} blocks differs from block to block and is not part of a checkpoint: "
                    "renumbered blocks would load with other values."
                )


def _check(model: PreTrainedModel, reference_NSV: Tensor, input_ids_NS: Tensor, slack: float | None) -> None:
    """Raise UnsupportedModel where the model's logits are not the reference's, with or without a cache."""
    allowed = rounding(reference_NSV.dtype)
    try:
        plain, cached = _logits(model, input_ids_NS), None if slack is None else _cached_logits(model, input_ids_NS)
    except _FAILURES as error:
        raise UnsupportedModel(f"{type(model).__name__} does not run without these blocks ({error}).") from error
    for logits_NSV, bound, how in ((plain, allowed, "on a batch"), (cached, max(allowed, 2 * (slack or 0)), "with a cache")):
        if logits_NSV is None:
            continue
        away = distance(logits_NSV, reference_NSV[:, -logits_NSV.shape[1] :])
        if not away <= bound:
            raise UnsupportedModel(
                f"{type(model).__name__} without these blocks puts out logits {how} that are {away:.1e} away from those with "
                f"the blocks bypassed, where {bound:.1e} is rounding: something depends on the number of a layer."
            )


def _cache_slack(model: PreTrainedModel, input_ids_NS: Tensor) -> float | None:
    """How far the dense model's logits with a cache are from those without; None where it does not run token by token."""
    try:
        cached = _cached_logits(model, input_ids_NS)
    except _FAILURES:
        return None
    return None if cached is None else distance(cached, _logits(model, input_ids_NS)[:, -_STEPS - 1 :])


def _logits(model: PreTrainedModel, input_ids_NS: Tensor) -> Tensor:
    logits_NSV: Tensor = model(input_ids=input_ids_NS, use_cache=False).logits
    return logits_NSV


def _cached_logits(model: PreTrainedModel, input_ids_NS: Tensor) -> Tensor | None:
    """The logits of the last tokens [N, 4, V], the last three given one by one; None where there is no KV cache."""
    split = input_ids_NS.shape[1] - _STEPS
    output = model(input_ids=input_ids_NS[:, :split], use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        return None
    parts = [output.logits[:, -1:]]
    for position in range(split, input_ids_NS.shape[1]):
        output = model(input_ids=input_ids_NS[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    return torch.cat(parts, dim=1)
