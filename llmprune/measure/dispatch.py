"""Running a whole model on a device it may not fit on: placement and offload are accelerate's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.devices import free_bytes, module_device, placed
from llmprune.processes import num_here

WORKING_SHARE = 0.8
"""Share of the free memory that weights may take; the rest is for activations."""


def fits(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether the whole model can be on that device: it is there, or there is room."""
    if device.type == "cpu" or module_device(model).type != "cpu":
        return True
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return bool(size <= WORKING_SHARE * free_bytes(device))


@contextmanager
def dispatched(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Make whole-model forwards run on ``device``: as it lies, moved there, or spread by accelerate over all devices and
    the CPU where it does not fit. Afterwards the weights are back where they were.

    Of a model whose blocks are on disk the rest is moved; the blocks come to it one by one.
    """
    home = module_device(model)
    if device.type == "cpu" or home.type != "cpu":
        yield
        return
    if any(parameter.is_meta for parameter in model.parameters()):
        here = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
        move_(here, device)
        try:
            yield
        finally:
            move_(here, home)
        return
    if fits(model, device):
        with placed(model, device):
            yield
        return
    own: dict[int | str, int | str] | None = None
    if num_here() > 1:  # the other devices are other processes'
        own = {device.index or 0: int(WORKING_SHARE * free_bytes(device)), "cpu": free_bytes(torch.device("cpu"))}
    device_map = infer_auto_device_map(model, own, no_split_module_classes=list(model._no_split_modules or []))
    with spread(model, device_map):
        yield


def move_(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Move parameters and buffers in place: what is tied stays so."""
    for tensor in tensors:
        tensor.data = tensor.data.to(device)


@contextmanager
def spread(model: PreTrainedModel, device_map: Mapping[str, int | str | torch.device]) -> Iterator[None]:
    """Dispatch over a device map (``cpu`` and ``disk`` entries are offloaded), then gather the weights on the CPU."""
    with tempfile.TemporaryDirectory() as offload:
        dispatch_model(model, dict(device_map), offload_dir=offload, force_hooks=True)
        try:
            yield
        finally:
            remove_hook_from_submodules(model)
            model.to("cpu")
            model.__dict__.pop("hf_device_map", None)
