"""Free widths: a config that lists the shapes of a sliced model whose layers differ, and the code that reads them.

What differs from the stock class is found by building that class from the config, without memory, and comparing; whether it
says all is found by applying it to the class and comparing again (:mod:`llmprune.structured.modeling`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmprune.errors import CorruptCheckpoint, UnsupportedModel, one_line
from llmprune.spec import describe
from llmprune.structured import modeling
from llmprune.structured.modeling import FIELD, NoAttention, NoFFN, guard_, reshape_

VERSION = 1
CODE = "modeling_pruned"
"""Name of the module that is written into a checkpoint."""
KINDS = {NoAttention.__name__: "attention", NoFFN.__name__: "ffn"}
_LINEAR_WIDTHS = ("in_features", "out_features", "nf", "nx")

_CLASS = '''

from {origin} import {stock} as Stock


class {stock}(Stock):  # of its name, as transformers goes by it
    """The class of the same name with the widths that {field} of its config lists."""

    stock_class = Stock

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        reshape_(self, config.{field})

    @classmethod
    def is_custom_code(cls) -> bool:
        """As its tensors are called in files what those of the other are."""
        return Stock.is_custom_code()
'''


class Shapes(BaseModel):
    """``pruned_shapes`` of config.json; what each part means is said at :func:`llmprune.structured.modeling.reshape_`."""

    model_config = ConfigDict(frozen=True, strict=True)

    version: Literal[1]
    removed: dict[str, Literal["attention", "ffn"]] = {}
    parameters: dict[str, list[NonNegativeInt]] = {}
    numbers: dict[str, dict[str, NonNegativeInt]] = {}
    configs: dict[str, dict[str, NonNegativeInt]] = {}


def check_shapes(entry: object, model: str) -> None:
    """Check a ``pruned_shapes``, as far as can be told without the model.

    Raises:
        UnsupportedModel: it is of another version.
        CorruptCheckpoint: it is not in order.
    """
    version = entry.get("version") if isinstance(entry, dict) else VERSION
    if version != VERSION:
        raise UnsupportedModel(
            f"{FIELD} of {model!r} is of version {version!r}; this llmprune reads version {VERSION}. Update llmprune."
        )
    try:
        Shapes.model_validate(entry)
    except ValidationError as error:
        raise CorruptCheckpoint(
            f"{FIELD} in config.json of {model!r} is not in order ({describe(error)[:200]}). Download it again."
        ) from None


def is_free(config: PreTrainedConfig) -> bool:
    """Whether it lists shapes of its own."""
    return getattr(config, FIELD, None) is not None


@contextmanager
def shape_errors(config: PreTrainedConfig, model: str) -> Iterator[None]:
    """Turn what a class says of shapes that do not fit it into CorruptCheckpoint."""
    try:
        yield
    except ValueError as error:
        if not is_free(config):
            raise
        raise CorruptCheckpoint(
            f"{FIELD} in config.json of {model!r} does not fit its class ({one_line(error)}). Download it again."
        ) from None


def describe_free_(model: PreTrainedModel) -> dict[str, Any]:
    """Have the config of a sliced model list its shapes, under ``pruned_shapes``, where they are not those of its class.

    A module that is gone gets a number under the name of one of its matrices, so that the stock class refuses the checkpoint.

    Returns:
        The list; empty where the class needs none, and the config then has none.

    Raises:
        UnsupportedModel: it cannot say what the model is; names the first difference.
    """
    stock = _build(model)
    shapes = _differences(model, stock)
    vars(model.config).pop(FIELD, None)
    if shapes:
        _code_of(model)
        for path in shapes.get("removed", {}):
            guard_(model.get_submodule(path), stock.get_submodule(path))
        try:
            reshape_(stock, shapes)
        except ValueError as error:
            raise _cannot_say(model, str(error)) from error
    _compare(model, stock, shapes)
    if shapes:
        shapes = {"version": VERSION} | shapes
        setattr(model.config, FIELD, shapes)
    return shapes


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class whose shapes its config says, less ``pruned_shapes``."""
    found: type[PreTrainedModel] = getattr(type(model), "stock_class", type(model))
    return found


def pruned_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """What the code in a checkpoint makes of the class: a model that has the shapes of its config before weights are loaded."""

    def init(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        reshape_(self, getattr(config, FIELD))

    return type(stock.__name__, (stock,), {"__init__": init, "__module__": stock.__module__, "stock_class": stock})


def modeling_code(model: PreTrainedModel) -> tuple[str, str]:
    """The Python module that loads the model without llmprune, and the name of the class in it: that of the stock class, by
    which transformers knows what its tensors are called in files.

    Raises:
        UnsupportedModel: the model's class is defined where the checkpoint cannot reach it.
    """
    stock = stock_class(model)
    text = Path(modeling.__file__).read_text(encoding="utf-8")
    return text + _CLASS.format(stock=stock.__name__, origin=_code_of(model), field=FIELD), stock.__name__


def _code_of(model: PreTrainedModel) -> str:
    """What the model's class is imported from: transformers, or the code beside the weights."""
    stock = stock_class(model)
    root, _, rest = stock.__module__.partition(".")
    if root == "transformers":
        return root if getattr(transformers, stock.__name__, None) is stock else stock.__module__
    if root != "transformers_modules":
        raise UnsupportedModel(
            f"{stock.__name__} is neither a class of transformers nor of code that a checkpoint ships: no checkpoint can say "
            "widths that differ from layer to layer. Cut all to the same widths."
        )
    return f".{rest.rpartition('.')[2]}"


def _build(model: PreTrainedModel) -> PreTrainedModel:
    """The stock class's model of the config, as a checkpoint would give it back, without memory."""
    with torch.device("meta"):
        return stock_class(model)(type(model.config).from_dict(model.config.to_dict()))


def _differences(model: PreTrainedModel, stock: PreTrainedModel) -> dict[str, Any]:
    """What :func:`reshape_` is given to make the one of the other; without the parts that are empty."""
    theirs = dict(stock.named_modules())
    # By name, as a model that was loaded with the code of its checkpoint has classes of its own.
    removed = {path: KINDS[kind] for path, module in model.named_modules() if (kind := type(module).__name__) in KINDS}
    parameters: dict[str, list[int]] = {}
    changed: dict[str, None] = {}  # modules with such parameters and those around them, in order
    for path, module in model.named_modules():
        if path not in theirs and not any(path.startswith(f"{gone}.") for gone in removed):
            raise _cannot_say(model, f"a {model.config.model_type} has no module {path}")
        for leaf, parameter in module.named_parameters(recurse=False):
            before = None if path in removed else theirs[path]._parameters.get(leaf)
            if before is None or before.shape != parameter.shape:
                parameters[f"{path}.{leaf}"] = list(parameter.shape)
                changed |= dict.fromkeys(_ancestors(path))
        for leaf, buffer in module.named_buffers(recurse=False) if path not in removed and path in theirs else ():
            known = theirs[path]._buffers.get(leaf)
            if known is not None and known.shape != buffer.shape:
                parameters[f"{path}.{leaf}"] = list(buffer.shape)
                changed |= dict.fromkeys(_ancestors(path))
    numbers, configs = {}, {}
    for path in changed:
        module = model.get_submodule(path)
        if path not in removed:
            numbers[path] = _changed(vars(module), vars(theirs[path]))
            if isinstance(module, nn.Linear | Conv1D):  # these two follow from the shape
                numbers[path] = {name: number for name, number in numbers[path].items() if name not in _LINEAR_WIDTHS}
            if isinstance(config := vars(module).get("config"), PreTrainedConfig):
                configs[path] = _changed(vars(config), vars(theirs[path].config))
    parts = {"removed": removed, "parameters": parameters, "numbers": _filled(numbers), "configs": _filled(configs)}
    return {name: part for name, part in parts.items() if part}


def _compare(model: PreTrainedModel, stock: PreTrainedModel, shapes: dict[str, Any]) -> None:
    """Raise UnsupportedModel for the first tensor that differs, or number around a parameter of another shape."""
    ours, theirs = ({name: list(value.shape) for name, value in each.state_dict().items()} for each in (model, stock))
    for name in (*ours, *theirs):
        if ours.get(name) != theirs.get(name):
            raise _cannot_say(model, f"{name} is {ours.get(name)} in memory and {theirs.get(name)} in what its config lists")
    for path in dict.fromkeys(path for name in shapes.get("parameters", {}) for path in _ancestors(name.rpartition(".")[0])):
        left, right = _simple(model.get_submodule(path)), _simple(stock.get_submodule(path))
        for key in sorted(left.keys() | right.keys()):
            if left.get(key) != right.get(key):
                raise _cannot_say(
                    model, f"{key} of {path} is {left.get(key)} in memory and {right.get(key)} in what its config lists"
                )


def _ancestors(path: str) -> Iterator[str]:
    """The path of a module and of those around it, but for the model."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _changed(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, int]:
    return {
        name: value
        for name, value in ours.items()
        if not name.startswith("_") and type(value) is int and type(theirs.get(name)) is int and theirs[name] != value
    }


def _simple(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name[0] != "_" and type(value) in (int, float, tuple, list)}


def _filled(parts: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    return {path: part for path, part in parts.items() if part}


def _cannot_say(model: PreTrainedModel, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"the shapes of the sliced {model.config.model_type} cannot be written down: {why}.")
