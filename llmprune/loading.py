"""Loading a checkpoint to use it: ``llmprune.load``, for packed and for ordinary ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmprune.devices import pick_device
from llmprune.io.models import load_model, resolve
from llmprune.packing import input_groups, packed_layers
from llmprune.spec import PruneConfig
from llmprune_kernels.fuse import fuse_
from llmprune_kernels.linear import SparseLinear24


def load(
    model: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    packed: bool = True,
    fuse: bool | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model in evaluation mode, from a directory or the hub, packed or dense.

    Args:
        model: directory, hub ID, or ``demo``.
        device: where; ``auto`` is the accelerator if there is one.
        dtype: of the weights; ``auto`` keeps the checkpoint's.
        packed: keep the layers of a packed checkpoint packed; False makes ordinary ones of them while loading.
        fuse: compute 2:4 layers that read the same tensor (q, k and v; gate and up) in one launch; None does so on a GPU.
        revision: hub branch, tag or commit.
        trust_remote_code: run modelling code shipped with the model.

    Raises:
        UserError: the refusals of :func:`llmprune.prune`, as far as models go.
    """
    name = str(dtype).removeprefix("torch.")
    config = PruneConfig.build(model=str(model), dtype=name, revision=revision, trust_remote_code=trust_remote_code)
    home = pick_device(str(device))
    loaded = load_model(resolve(config), config, home, packed=packed)
    if fuse or (fuse is None and home.type == "cuda"):
        fuse_shared_inputs_(loaded)
    return loaded


def fuse_shared_inputs_(model: PreTrainedModel) -> int:
    """Have packed 2:4 layers that read one tensor share a launch, as seen on 16 tokens; returns the number of groups."""
    layers = packed_layers(model)
    if not layers:
        return 0
    device = next(iter(layers.values())).device
    input_ids_NS = torch.arange(16, device=device)[None] % model.config.get_text_config().vocab_size
    num_fused = 0
    for group in input_groups(model, input_ids_NS):
        paths = [path for path in group if isinstance(layers[path], SparseLinear24)]
        parent = model.get_submodule(_common_parent(paths)) if len(paths) > 1 else None
        if parent is not None and fuse_([layer for path in paths if isinstance(layer := layers[path], SparseLinear24)], parent):
            num_fused += 1
    return num_fused


def _common_parent(paths: Sequence[str]) -> str:
    """The path of the closest module that holds all of them."""
    parts = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, parts))
