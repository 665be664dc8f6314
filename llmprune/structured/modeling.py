"""Layers of widths of their own: brings a model of its stock class to the shapes that its config lists.

``pruned_shapes`` of the config says what differs from the class: modules that are gone, parameters of other shapes, the counts
that go with them. This file needs torch and transformers alone, as it is also written into every such checkpoint.

H hidden; N sequences, S sequence; O out features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

FIELD = "pruned_shapes"
_HIDDEN = ("hidden_states", "x", "hidden")


class NoAttention(nn.Module):
    """An attention without heads: it adds nothing but the bias of its output projection.

    A KV cache counts its tokens by what the layers put into it, the first above all, so this one puts in a single zero a token.
    """

    bias: nn.Parameter | None

    def __init__(self, bias_O: nn.Parameter | None, layer_idx: int | None) -> None:
        super().__init__()
        self.register_parameter("bias", bias_O)
        self.layer_idx = layer_idx

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Zeros, or the bias, in the shape of the hidden state; no attention weights."""
        hidden_NSH = _hidden(args, kwargs)
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is not None and self.layer_idx is not None:
            zero = hidden_NSH.new_zeros(hidden_NSH.shape[0], 1, hidden_NSH.shape[1], 1)
            cache.update(zero, zero, self.layer_idx)
        return _constant(hidden_NSH, self.bias), None


class NoFFN(nn.Module):
    """An FFN without channels: it adds nothing but the bias of its down projection."""

    bias: nn.Parameter | None

    def __init__(self, bias_O: nn.Parameter | None) -> None:
        super().__init__()
        self.register_parameter("bias", bias_O)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros, or the bias, in the shape of the hidden state."""
        return _constant(_hidden(args, kwargs), self.bias)


def reshape_(model: PreTrainedModel, shapes: Mapping[str, Any]) -> None:
    """Bring a model of its stock class, on ``meta`` or in memory, to the shapes that its config lists.

    Nothing grows: what is smaller keeps the first rows and columns, and a new bias is zero.

    Args:
        shapes: ``removed``, what went by the path of each module; ``parameters``, shapes by name, of buffers too; ``numbers``
            and ``configs``, the integers that a module, or the config it reads, holds of its own, by the path of the module.

    Raises:
        ValueError: they do not fit the model.
    """
    for path, kind in shapes.get("removed", {}).items():
        owner = _module(model, path)
        layer_idx = getattr(owner, "layer_idx", None)
        model.set_submodule(path, NoAttention(None, layer_idx) if kind == "attention" else NoFFN(None))
        guard_(model.get_submodule(path), owner)
    for name, shape in shapes.get("parameters", {}).items():
        _reshape_parameter_(model, name, shape)
    for path, numbers in shapes.get("numbers", {}).items():
        module = _module(model, path)
        for name, value in numbers.items():
            _check_number(f"{name} of {path}", vars(module).get(name), value)
            setattr(module, name, value)
    for path, fields in shapes.get("configs", {}).items():
        module = _module(model, path)
        config = vars(module).get("config")
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"{path} has no config")
        config = copy.copy(config)
        for name, value in fields.items():
            _check_number(f"{name} of the config of {path}", vars(config).get(name), value)
            setattr(config, name, value)
        setattr(module, "config", config)  # noqa: B010 (nn.Module declares no such attribute)


def guard_(gone: nn.Module, owner: nn.Module) -> None:
    """Have a removed module hold one number under the name of a matrix of what it stands for.

    The stock class stops at its shape. Without, it would only warn, and fill the whole module with random numbers.
    """
    names = (name.split(".") for name, parameter in owner.named_parameters() if parameter.ndim > 1)
    leaf, parameter = next((name for name in names if len(name) == 2), ("", ""))
    if leaf and not hasattr(gone, leaf):
        holder = nn.Module()
        holder.register_buffer(parameter, torch.zeros(1))
        gone.add_module(leaf, holder)


def _reshape_parameter_(model: PreTrainedModel, name: str, shape: Sequence[int]) -> None:
    path, _, leaf = name.rpartition(".")
    module = _module(model, path)
    if leaf not in module._parameters and module._buffers.get(leaf) is None:
        raise ValueError(f"the model has no parameter {name}")
    before: Tensor | None = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
    if before is None:
        width = model.config.get_text_config().hidden_size
        if len(shape) != 1 or not 0 < shape[0] <= width:
            raise ValueError(f"{name} cannot be of shape {list(shape)}: it is a bias of at most {width}")
        like = next(module.parameters(recurse=False), next(model.parameters()))
        after = torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)
    else:
        if len(shape) != before.ndim or not all(0 <= new <= old for new, old in zip(shape, before.shape, strict=True)):
            raise ValueError(f"{name} of shape {list(before.shape)} cannot be brought to {list(shape)}")
        after = before.detach()[tuple(slice(size) for size in shape)].clone(memory_format=torch.contiguous_format)
        if leaf in module._buffers:
            module._buffers[leaf] = after
            return
    setattr(module, leaf, nn.Parameter(after, before is None or before.requires_grad))
    if leaf == "weight" and isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif leaf == "weight" and isinstance(module, Conv1D):
        module.nx, module.nf = shape


def _module(model: PreTrainedModel, path: str) -> nn.Module:
    try:
        found: nn.Module = model.get_submodule(path)
        return found
    except AttributeError:
        raise ValueError(f"the model has no module {path}") from None


def _check_number(what: str, before: object, after: int) -> None:
    if type(before) is not int or type(after) is not int or not 0 <= after <= before:
        raise ValueError(f"{what} is {before} and cannot be {after}")


def _hidden(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    found = args[0] if args else next((kwargs[key] for key in _HIDDEN if key in kwargs), None)
    if not isinstance(found, Tensor):
        raise TypeError(f"a module is called without a hidden state: looked for a first argument or a keyword of {_HIDDEN}.")
    return found


def _constant(hidden_NSH: Tensor, bias_O: Tensor | None) -> Tensor:
    zero_NSH = torch.zeros_like(hidden_NSH)
    return zero_NSH if bias_O is None else zero_NSH + bias_O
