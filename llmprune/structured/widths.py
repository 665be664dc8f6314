"""Widths a config can say: a model cut alike in every layer is one of its stock class, with other numbers in its config.

Whether the class agrees is not taken on trust: it is built from the new config, without memory, and compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmprune.errors import UnsupportedModel
from llmprune.structured.experts import EXPERT_COUNTS, Mixture
from llmprune.structured.stock import changed_config, stock_model
from llmprune.structured.units import Module, Part

FFN_WIDTHS = (
    "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "intermediate_size_mlp", "dense_intermediate_size",
    "shared_intermediate_size",
)  # fmt: skip


def uniform_fields(model: PreTrainedModel, modules: Sequence[Part], kept: Mapping[str, int]) -> dict[str, int]:
    """The fields of the config, with their values, that describe the model once so many groups are left in each module.

    Args:
        model: its config says the widths the modules have.
        modules: all of them.
        kept: groups left, by module; the others stay whole.

    Raises:
        UnsupportedModel: widths differ from layer to layer, a module is left with nothing, or config or class do not take them.
    """
    fields: dict[str, tuple[int, str]] = {}
    text = model.config.get_text_config()
    counts = {module.name: kept.get(module.name, module.num_groups) for module in modules}
    cut = [module for module in modules if counts[module.name] < module.num_groups]
    for module in [*cut, *(module for module in modules if module not in cut)]:
        count = counts[module.name]
        if not count:
            raise UnsupportedModel(f"{module.name} is left with nothing, which no config of {text.model_type} can say.")
        try:
            own = fields_of(text, module, count)
        except UnsupportedModel:
            if module in cut:
                raise
            continue
        for field, value in own.items():
            known, other = fields.get(field, (value, module.name))
            if known != value:
                raise UnsupportedModel(
                    f"{other} would have {field} {known} and {module.name} {value}; the config of {text.model_type} has one "
                    "number for all layers. Cut all to the same widths."
                )
            if module in cut:
                fields[field] = known, other
    values = {field: value for field, (value, _) in fields.items()}
    try:
        stock = stock_model(model, values)
    except UnsupportedModel as error:
        attention = next((module for module in cut if module.kind == "attention"), None)
        if not isinstance(attention, Module):
            raise
        taken = ", ".join(map(str, uniform_counts(model, attention)))
        groups = f"{attention.num_groups} {'query heads' if attention.multi_query else 'kv groups'}"
        raise UnsupportedModel(f"{error} Of {groups} it takes {taken}.") from error
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for module in cut:
        if isinstance(module, Mixture):
            shapes |= {
                path: [counts[module.name] if at == axis else size for at, size in enumerate(shapes[path])]
                for path, axis in module.entries
                if path in shapes  # buffers are not
            }
        else:
            shapes |= _shapes_of(module, counts[module.name])
    _check_shapes(model, stock, shapes, values)
    return values


def uniform_counts(model: PreTrainedModel, module: Module) -> tuple[int, ...]:
    """The numbers of groups of an attention or an FFN that the config can say, rising; some want the number of heads to divide
    the hidden size, and where heads have no size of their own they are all or none.
    """
    text, taken = model.config.get_text_config(), []
    counts = range(1, module.num_groups + 1)
    if module.kind == "attention":
        for count in counts:
            with suppress(UnsupportedModel):
                changed_config(model.config, fields_of(text, module, count))
                taken.append(count)
    else:
        taken = list(counts)
    if len(taken) < 2:
        return tuple(taken)
    try:  # whether the class makes of one what the config says
        fields = fields_of(text, module, taken[0])
        _check_shapes(model, stock_model(model, fields), _shapes_of(module, taken[0]), fields)
    except UnsupportedModel:
        return (module.num_groups,)
    return tuple(taken)


def describe_(model: PreTrainedModel, modules: Sequence[Part], fields: Mapping[str, int]) -> None:
    """Have the config of a sliced model say its widths, so that ``save_pretrained`` writes a checkpoint of the stock class.

    The class is built from the new config without memory, and must give every parameter the shape it has, and every module
    the counts and scales.

    Raises:
        UnsupportedModel: the class makes something else of the config; names it.
    """
    stock = stock_model(model, fields)
    _check_shapes(model, stock, {name: list(parameter.shape) for name, parameter in model.named_parameters()}, fields)
    for path in dict.fromkeys(path for module in modules for path in _counting(module)):
        ours, theirs = _numbers(model.get_submodule(path)), _numbers(stock.get_submodule(path))
        for key in sorted(ours.keys() & theirs.keys()):
            if ours[key] != theirs[key]:
                raise _cannot_say(model, fields, f"{key} of {path}", ours[key], theirs[key])
    text = model.config.get_text_config()
    for field, value in fields.items():
        setattr(text, field, value)
    for module in modules:
        owner = model.get_submodule(module.name)
        if isinstance(module, Module) and module.fused and hasattr(owner, "config"):
            owner.config = text


def fields_of(text: PreTrainedConfig, module: Part, kept: int) -> dict[str, int]:
    """The fields that say what one module is with ``kept`` of its groups; head_dim too, as it no longer follows from others.
    A field of None stands for a width that follows from others, such as GPT-2's.

    Raises:
        UnsupportedModel: there is no field for its channels or experts.
    """
    if isinstance(module, Mixture):
        fields = {field: kept for field in EXPERT_COUNTS if getattr(text, field, None) == module.num_experts}
        if not fields:
            raise UnsupportedModel(f"the config of {text.model_type} has no field for the {module.num_experts} experts.")
        return fields
    if module.kind == "ffn":
        known = [field for field in FFN_WIDTHS if getattr(text, field, 0) in (module.num_groups, None)]
        field = next((field for field in known if getattr(text, field) is not None), known[0] if known else None)
        if field is None:
            raise UnsupportedModel(
                f"the config of {text.model_type} has no field for the {module.num_groups} channels of {module.name}; looked "
                f"for {', '.join(FFN_WIDTHS)}."
            )
        return {field: kept}
    fields = {"num_attention_heads": kept * module.num_query_heads}
    if module.head_dim and not isinstance(getattr(type(text), "head_dim", None), property):
        fields["head_dim"] = module.head_dim
    if not module.multi_query and (module.num_query_heads > 1 or getattr(text, "num_key_value_heads", None) is not None):
        fields["num_key_value_heads"] = kept
    return fields


def _shapes_of(module: Module, kept: int) -> dict[str, list[int]]:
    """Of its parameters, by name, once so many groups are left."""
    gone = module.num_groups - kept
    shapes = {f"{module.name}.{name}": [kept * module.num_query_heads] for name in module.per_head}
    for site, rows, columns in [
        (module.consumer, 0, gone * module.group_size),
        *((part.site, gone * part.rows_GR.shape[1], 0) for part in module.producers),
    ]:
        shape = [site.shape[0] - rows, site.shape[1] - columns]
        shapes[f"{site.name}.weight"] = shape[::-1] if site.transposed else shape
        if isinstance(site.module.bias, nn.Parameter):
            shapes[f"{site.name}.bias"] = [site.shape[0] - rows]
    return shapes


def _check_shapes(
    model: PreTrainedModel, stock: PreTrainedModel, shapes: Mapping[str, list[int]], fields: Mapping[str, int]
) -> None:
    """Raise UnsupportedModel where a parameter of the class has another shape than it is to have."""
    theirs = {name: list(parameter.shape) for name, parameter in stock.named_parameters()}
    for name, shape in shapes.items():
        if theirs.get(name) != shape:
            raise _cannot_say(model, fields, name, shape, theirs.get(name))


def _counting(module: Part) -> tuple[str, ...]:
    """Paths of the modules that remember its widths."""
    return (module.owner, module.router, module.experts) if isinstance(module, Mixture) else (module.name,)


def _numbers(owner: nn.Module) -> dict[str, float]:
    """The counts and scales a module remembers."""
    return {key: value for key, value in vars(owner).items() if isinstance(value, int | float) and not isinstance(value, bool)}


def _cannot_say(model: PreTrainedModel, fields: Mapping[str, int], what: str, ours: object, theirs: object) -> UnsupportedModel:
    kind = model.config.get_text_config().model_type
    return UnsupportedModel(
        f"{what} is {ours} in the sliced model and {theirs} in a {kind} of {dict(fields)}: its config cannot say these widths. "
        "Use --widths free."
    )
