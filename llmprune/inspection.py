"""Looking at a model without changing it: ``llmprune inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack, eager_experts, find_stack, probe
from llmprune.anatomy.sites import Site
from llmprune.anatomy.watch import SharedInputs, Watcher
from llmprune.description import describe_model
from llmprune.devices import pick_device
from llmprune.io.models import load_model, resolve
from llmprune.report import Inspection, SiteInfo
from llmprune.spec import PruneConfig


def inspect(model: str | Path | None = None, **overrides: Any) -> Inspection:
    """Blocks, sites, shapes, which sites read the same input, how sparse each already is, and what is never pruned.

    Loads the weights on the CPU and runs 16 tokens through them.
    """
    if model is not None:
        overrides["model"] = str(model)
    config = PruneConfig.build(None, **overrides)
    source = resolve(config)
    loaded = load_model(source, config, pick_device("cpu"))
    ids_1S = torch.arange(16)[None] % loaded.config.get_text_config().vocab_size
    stack = probe(loaded, find_stack(loaded), ids_1S)
    groups = input_groups(loaded, stack, ids_1S)
    reached = {(id(site.module), site.parameter) for sites in stack.sites for site in sites}
    return Inspection(
        model=describe_model(loaded, stack, source),
        stack=stack.path,
        blocks=tuple(tuple(_describe(site, groups) for site in sites) for sites in stack.sites),
        not_pruned=tuple(
            f"{name}.{key}" if name else key
            for name, module in loaded.named_modules()
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.dim() > 1 and (id(module), key) not in reached
        ),
        tied_embeddings=bool(loaded.config.get_text_config().tie_word_embeddings),
    )


@torch.no_grad()
def input_groups(model: PreTrainedModel, stack: Stack, ids_NS: Tensor) -> dict[str, int]:
    """Number of the input each site reads, counted over the whole model: sites of one number share one Gram matrix."""
    groups: dict[str, int] = {}
    shared: SharedInputs[int] = SharedInputs()

    def on_input(site: Site, x: Tensor) -> None:
        number = shared.get(x)
        if number is None:
            number = len(set(groups.values()))
            shared.put(x, number)
        groups.setdefault(site.name, number)

    with eager_experts(model), Watcher([site for sites in stack.sites for site in sites], on_input):
        model(input_ids=ids_NS, use_cache=False)
    return groups


def _describe(site: Site, groups: dict[str, int]) -> SiteInfo:
    num_zeros = int((site.stored == 0).sum())
    return SiteInfo(name=site.name, shape=site.shape, input_group=groups.get(site.name), num_zeros=num_zeros)
