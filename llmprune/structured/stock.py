"""The stock model of a changed config: built without memory, it shows what its class makes of the config.

Parts are taken out of a model in memory; whether its class would build the same model from the config that is written beside
the weights is not taken on trust. Every module of the two is compared: its class, the shapes of its parameters, and the plain
numbers, words and lists it remembers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmprune.errors import UnsupportedModel, one_line

Follows = Callable[[Any, Any], bool]
"""(what a module remembers, what its stock twin does) -> whether the difference is what was asked for."""
Change = tuple[Any, str, Any]
"""(object, attribute, value)."""
_PLAIN = (int, float, str, type(None))
_ROUNDINGS = 4
_LEAST = {torch.float64: 1e-10, torch.float32: 1e-5}


def changed_config(config: PreTrainedConfig, fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy with these values in its text part, as a checkpoint would give it back.

    Raises:
        UnsupportedModel: it does not take them.
    """
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    with _refused(text, fields):
        for field, value in fields.items():
            setattr(text, field, value)
        return type(config).from_dict(changed.to_dict())


def stock_model(model: PreTrainedModel, fields: Mapping[str, Any]) -> PreTrainedModel:
    """A model of the same class from the config with these values in its text part; its weights are on ``meta``.

    Raises:
        UnsupportedModel: config or class do not take them.
    """
    config = changed_config(model.config, fields)
    with _refused(config.get_text_config(), fields), torch.device("meta"):
        return type(model)(config)


@contextmanager
def _refused(text: PreTrainedConfig, fields: Mapping[str, Any]) -> Iterator[None]:
    """Turn what a config or a class says of values into UnsupportedModel."""
    try:
        yield
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError, StrictDataclassError) as error:
        raise UnsupportedModel(
            f"the config of {text.model_type} does not take {dict(fields)} ({one_line(error)}). Choose other numbers."
        ) from error


def differences(model: PreTrainedModel, stock: PreTrainedModel, follows: Follows) -> list[Change]:
    """What the modules of ``model`` must remember to be as those of ``stock``.

    Args:
        model: with its parts taken out, so that names and shapes should be those of ``stock``.
        stock: what its class builds.
        follows: says of each difference whether it is expected.

    Raises:
        UnsupportedModel: they differ otherwise; names the module and what it is that differs.
    """
    ours, theirs = dict(model.named_modules()), dict(stock.named_modules())
    if ours.keys() != theirs.keys():
        name = sorted(ours.keys() ^ theirs.keys())[0]
        raise _cannot_say(model, name, "there" if name in ours else "not there", "the opposite")
    changes: list[Change] = []
    for name, module in ours.items():
        twin = theirs[name]
        if type(module) is not type(twin):
            raise _cannot_say(model, name, type(module).__name__, type(twin).__name__)
        shapes, wanted = _shapes(module), _shapes(twin)
        for key in sorted(shapes.keys() | wanted.keys()):
            if shapes.get(key) != wanted.get(key):
                raise _cannot_say(model, f"{name}.{key}", shapes.get(key), wanted.get(key))
        values, others = _remembered(module), _remembered(twin)
        for key in sorted(values.keys() & others.keys()):
            if values[key] == others[key]:
                continue
            if not follows(values[key], others[key]):
                raise _cannot_say(model, f"{name}.{key}", values[key], others[key])
            changes.append((module, key, others[key]))
    return changes


@contextmanager
def applied(changes: list[Change]) -> Iterator[None]:
    """Set the attributes; an error inside puts them back as they were."""
    before = [(owner, key, getattr(owner, key)) for owner, key, _ in changes]
    try:
        for owner, key, value in changes:
            setattr(owner, key, value)
        yield
    except BaseException:
        for owner, key, value in reversed(before):
            setattr(owner, key, value)
        raise


def config_changes(model: PreTrainedModel, fields: Mapping[str, Any]) -> list[Change]:
    """The fields set in the text config, and in every copy of it that a module holds."""
    text = model.config.get_text_config()
    holders = {id(text): text}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and type(config) is type(text):
            holders[id(config)] = config
    return [(config, field, value) for config in holders.values() for field, value in fields.items()]


def rounding(dtype: torch.dtype) -> float:
    """By how much of its norm a result may differ that was summed in another order: 1e-10 in fp64, 1e-5 in fp32, four
    roundings in 16 bits.
    """
    return _LEAST.get(dtype, _ROUNDINGS * torch.finfo(dtype).eps)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of ``theirs``; NaN where either has one."""
    scale = theirs.double().norm().clamp(min=torch.finfo(torch.float32).tiny)
    return float((ours.double() - theirs.double()).norm() / scale)


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: list(tensor.shape) for name, tensor in tensors}


def _remembered(module: nn.Module) -> dict[str, Any]:
    plain = {
        key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training" and _plain(value)
    }
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def _plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, list | tuple) and all(isinstance(one, _PLAIN) for one in value))


def _cannot_say(model: PreTrainedModel, what: str, ours: object, theirs: object) -> UnsupportedModel:
    kind = model.config.get_text_config().model_type
    return UnsupportedModel(
        f"{what} is {ours} in the model once parts are taken out, and {theirs} in the {kind} that its config describes: a "
        "checkpoint of it would load as something else."
    )
