"""Widths a config can say: a model cut alike in every layer is one of its stock class, with other numbers in its config.

Whether the class agrees is not taken on trust: it is built from the new config, without memory, and compared.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmprune.errors import UnsupportedModel
from llmprune.structured.units import Module

FFN_WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size")


def uniform_fields(model: PreTrainedModel, modules: Sequence[Module], kept: Mapping[str, int]) -> dict[str, int]:
    """The fields of the config, with their values, that describe the model once so many groups are left in each module.

    Args:
        model: its config says the widths the modules have.
        modules: all of them.
        kept: groups left, by module; the others stay whole.

    Raises:
        UnsupportedModel: widths differ from layer to layer, a module is left with nothing, or the config does not take them.
    """
    fields: dict[str, tuple[int, str]] = {}
    text = model.config.get_text_config()
    for module in modules:
        count = kept.get(module.name, module.num_groups)
        if not count:
            raise UnsupportedModel(f"{module.name} is left with nothing, which no config of {text.model_type} can say.")
        for field, value in fields_of(text, module, count).items():
            known, other = fields.setdefault(field, (value, module.name))
            if known != value:
                raise UnsupportedModel(
                    f"{other} would have {field} {known} and {module.name} {value}; the config of {text.model_type} has one "
                    "number for all layers. Cut all to the same widths."
                )
    values = {field: value for field, (value, _) in fields.items()}
    try:
        _with_fields(model.config, values)
    except UnsupportedModel as error:
        attention = next((module for module in modules if module.kind == "attention"), None)
        if attention is None:
            raise
        counts = ", ".join(map(str, uniform_counts(model, attention)))
        raise UnsupportedModel(f"{error} Of {attention.num_groups} kv groups it takes {counts}.") from error
    return values


def uniform_counts(model: PreTrainedModel, module: Module) -> tuple[int, ...]:
    """The numbers of kv groups of an attention, or channels of an FFN, that the config takes, rising; some want the number of
    heads to divide the hidden size.
    """
    if module.kind == "ffn":
        return tuple(range(1, module.num_groups + 1))
    text, taken = model.config.get_text_config(), []
    for count in range(1, module.num_groups + 1):
        with suppress(UnsupportedModel):
            _with_fields(model.config, fields_of(text, module, count))
            taken.append(count)
    return tuple(taken)


def describe_(model: PreTrainedModel, modules: Sequence[Module], fields: Mapping[str, int]) -> None:
    """Have the config of a sliced model say its widths, so that ``save_pretrained`` writes a checkpoint of the stock class.

    The class is built from the new config without memory, and must give every parameter the shape it has, and every module
    the counts and scales.

    Raises:
        UnsupportedModel: the class makes something else of the config; names it.
    """
    with torch.device("meta"):
        stock = type(model)(_with_fields(model.config, fields))
    shapes = {name: list(parameter.shape) for name, parameter in stock.named_parameters()}
    for name, parameter in model.named_parameters():
        if shapes.get(name) != list(parameter.shape):
            raise _cannot_say(model, fields, name, list(parameter.shape), shapes.get(name))
    for module in modules:
        ours, theirs = _numbers(model.get_submodule(module.name)), _numbers(stock.get_submodule(module.name))
        for key in sorted(ours.keys() & theirs.keys()):
            if ours[key] != theirs[key]:
                raise _cannot_say(model, fields, f"{key} of {module.name}", ours[key], theirs[key])
    text = model.config.get_text_config()
    for field, value in fields.items():
        setattr(text, field, value)
    for module in modules:
        if module.fused:
            model.get_submodule(module.name).config = text


def fields_of(text: PreTrainedConfig, module: Module, kept: int) -> dict[str, int]:
    """The fields that say what one module is with ``kept`` of its groups; head_dim too, as it no longer follows from others.

    Raises:
        UnsupportedModel: there is no field for its channels.
    """
    if module.kind == "ffn":
        field = next((field for field in FFN_WIDTHS if getattr(text, field, None) == module.num_groups), None)
        if field is None:
            raise UnsupportedModel(
                f"the config of {text.model_type} has no field for the {module.num_groups} channels of {module.name}; looked "
                f"for {', '.join(FFN_WIDTHS)}."
            )
        return {field: kept}
    fields = {"num_attention_heads": kept * module.num_query_heads, "head_dim": module.head_dim}
    if module.num_query_heads > 1 or getattr(text, "num_key_value_heads", None) is not None:
        fields["num_key_value_heads"] = kept
    return fields


def _with_fields(config: PreTrainedConfig, fields: Mapping[str, int]) -> PreTrainedConfig:
    """A copy with these values, as a checkpoint would give it back."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    try:
        for field, value in fields.items():
            setattr(text, field, value)
        return type(config).from_dict(changed.to_dict())
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModel(
            f"the config of {text.model_type} does not take {dict(fields)} ({reason}). Choose other widths."
        ) from error


def _numbers(owner: nn.Module) -> dict[str, float]:
    """The counts and scales a module remembers."""
    return {key: value for key, value in vars(owner).items() if isinstance(value, int | float) and not isinstance(value, bool)}


def _cannot_say(model: PreTrainedModel, fields: Mapping[str, int], what: str, ours: object, theirs: object) -> UnsupportedModel:
    kind = model.config.get_text_config().model_type
    return UnsupportedModel(
        f"{what} is {ours} in the sliced model and {theirs} in a {kind} of {dict(fields)}: its config cannot say these widths."
    )
