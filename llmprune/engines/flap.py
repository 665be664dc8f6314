"""Structured baselines: FLAP (arXiv 2312.11983) and plain magnitude. The weights that stay are the dense ones."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from typing import Literal

import torch

from llmprune.anatomy.blocks import Recording, Stack
from llmprune.engines.layerwise import Walk
from llmprune.errors import NonFiniteError, UnsupportedModel
from llmprune.spec import Need, PruneConfig
from llmprune.stats import LinearStats
from llmprune.structured.levels import centres
from llmprune.structured.scores import below_one_threshold, best, compensation, fluctuation_worth, magnitude_worth
from llmprune.structured.slicing import Cut
from llmprune.structured.units import Module

Baseline = Literal["flap", "magnitude"]


def structural_cuts(
    method: Baseline,
    stack: Stack,
    modules: Sequence[Module],
    recording: Recording | None,
    device: torch.device,
    *,
    sparsity: float = 0.0,
    counts: Sequence[int] | None = None,
    with_bias: bool = True,
) -> Generator[int, None, dict[str, Cut]]:
    """Which groups stay of every module, by name; yields the number of blocks done. The model is not changed.

    ``magnitude`` takes the groups of the least root mean square weight, as large a share of each module
    (:func:`llmprune.structured.levels.centres`). ``flap`` takes those of the least input variance, below one threshold for all
    modules (:func:`llmprune.structured.scores.below_one_threshold`), so widths differ and no module is left with nothing; it
    looks at the dense model's inputs, as its paper does, and makes up for the mean of what goes by the consumer's bias.

    Args:
        recording: the calibration text; only read, and not at all for ``magnitude``.
        sparsity: share of the modules' parameters that goes, where there are no ``counts``.
        counts: groups to remove from each module instead, for widths that are given.
        with_bias: whether a consumer without a bias may be given one; where it has one, FLAP makes use of it either way.

    Raises:
        ConfigError: FLAP cannot reach the sparsity.
        NonFiniteError: the activations overflow; names the block or the module.
        UnsupportedModel: no token reached a module; names it.
    """
    if method == "magnitude":
        worths, stats = [magnitude_worth(module) for module in modules], {}
    else:
        assert recording is not None
        stats = yield from input_stats(stack, modules, recording, device)
        worths = [fluctuation_worth(module, stats[module.name]) for module in modules]
    if counts is None:
        counts = centres(modules, sparsity) if method == "magnitude" else below_one_threshold(modules, worths, sparsity)
    cuts = {}
    for module, worth_G, count in zip(modules, worths, counts, strict=True):
        kept_G, bias_O = best(worth_G, count), None
        if stats and count and (with_bias or getattr(module.consumer.module, "bias", None) is not None):
            bias_O = compensation(module, stats[module.name], kept_G)
        cuts[module.name] = Cut(kept_G, bias_O=bias_O)
    return cuts


@torch.no_grad()
def input_stats(
    stack: Stack, modules: Sequence[Module], recording: Recording, device: torch.device
) -> Generator[int, None, dict[str, LinearStats]]:
    """Mean and variance of the consumers' inputs in the dense model, by module, in one forward of each block; yields the number
    of blocks done.

    Raises:
        NonFiniteError, UnsupportedModel: as :func:`structural_cuts` does.
    """
    calls = copy.deepcopy(recording.calls) if recording.stateful else recording.calls
    walk = Walk(stack, Recording(recording.hidden.copy(), calls), PruneConfig(), device)
    found: dict[str, LinearStats] = {}
    for index, block in enumerate(stack.blocks):
        own = {module.consumer.name: module for module in modules if module.block == index}
        sites = {name: module.consumer for name, module in own.items()}
        with stack.placed(index, device):
            collected = walk.collect(index, block, sites, whole=True, keep=True, needs=Need.MEAN)
        for name, module in own.items():
            if name not in collected:
                raise UnsupportedModel(f"{name} is reached by no calibration token.")
            if not bool(torch.isfinite(collected[name].sq_I).all()):
                raise NonFiniteError(f"the calibration activations of {name} overflow fp32. Use --dtype float32 or bfloat16.")
            found[module.name] = collected[name]
        yield index + 1
    return found
