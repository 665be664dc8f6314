"""What a structured job does and needs, from shapes alone: for ``llmprune plan``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack
from llmprune.devices import free_bytes
from llmprune.engines.evolution import MEMORY_SHARE
from llmprune.engines.supernet import level_bytes, racks_of
from llmprune.engines.tyr_settings import path_flops, search_tokens
from llmprune.patterns import Pattern
from llmprune.spec import PruneConfig
from llmprune.structured.levels import grid
from llmprune.structured.units import Module
from llmprune.structuring.blocks import DEPTH_TOKENS
from llmprune.structuring.groups import budget_of_shapes, max_search_tokens, settings_of, units_of, widths_of


@dataclass(frozen=True)
class Cost:
    """Of the stage ``structure``.

    Attributes:
        flops: floating-point operations.
        working_bytes: beside the weights, where the blocks run.
        kept_bytes: in CPU memory.
        disk_bytes: in the work directory.
    """

    flops: float
    working_bytes: int = 0
    kept_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class Sizes:
    """What is known of a job: calibration tokens and those of a sequence; operations of a forward of a token through the
    blocks and through the head; bytes of a token's hidden state.
    """

    num_tokens: int
    seq_len: int
    forward: float
    head: float
    hidden_bytes: int

    def some(self, most: int) -> int:
        """Tokens of whole sequences, about ``most`` of them."""
        return min(self.num_tokens, max(1, most // self.seq_len) * self.seq_len)


def structure_cost(config: PruneConfig, model: PreTrainedModel, stack: Stack, sizes: Sizes) -> Cost:
    """The cost of a structured job; ``model`` may be on ``meta``.

    Raises:
        UserError: as the job itself refuses.
    """
    structure = Pattern.parse(config.pattern).structure
    if structure == "blocks":
        # Every block is left out once, from there to the end, and then whole sets of them.
        num_blocks, tokens = len(stack.blocks), sizes.some(DEPTH_TOKENS)
        num_sets = 20 if config.method == "block-qubo" else 1
        passes = 1.0 if config.method == "shortgpt" else 1 + num_blocks / 2
        streams = 1 if config.method == "shortgpt" else num_blocks
        whole = sizes.forward + sizes.head
        return Cost(tokens * (passes + num_sets) * whole, kept_bytes=tokens * sizes.hidden_bytes * (streams + num_sets))
    if structure == "experts" or config.method != "tyr":
        return Cost(2 * sizes.num_tokens * sizes.forward)
    return _tyr(config, model, stack, sizes)


def _tyr(config: PruneConfig, model: PreTrainedModel, stack: Stack, sizes: Sizes) -> Cost:
    """Supernets: two forwards of the calibration text, the Gram matrices and the nested paths. Searches: candidates' tokens."""
    units = units_of(config, model, stack)
    modules, settings, widths = units.parts, settings_of(config), widths_of(config, model, units.modules)
    budget = budget_of_shapes(config, modules)
    grids = [grid(modules, budget.fit(budget.centre(), number), number) for number in range(1, settings.iterations + 1)]
    racks = racks_of(modules, grids[0] if grids else [(count,) for count in budget.centre()])
    paths = sum(path_flops(rack.module, rack.counts) for rack in racks if isinstance(rack.module, Module))
    grams = 2.0 * sizes.num_tokens * sum(module.consumer.shape[1] ** 2 for module in units.modules)
    supernets = min(settings.iterations, 1) if widths else settings.iterations
    supernets += 1 if settings.settle or not settings.iterations else 0
    tokens = sizes.some(max_search_tokens(config))
    num_levels = [sum(count > 0 for own in levels for count in own) for levels in grids]
    searched = (len(widths) + 3) * tokens if widths else search_tokens(settings, tokens, num_levels)
    walks = 4 if units.mixtures else 2  # to score experts: a forward of each block, and the chosen experts once more
    flops = supernets * (walks * sizes.num_tokens * sizes.forward + grams + paths) + searched * (sizes.forward + sizes.head)
    widest = max((module.consumer.shape for module in units.modules), key=lambda shape: shape[1], default=(0, 0))
    working = 8 * (3 * widest[1] ** 2 + 4 * widest[0] * widest[1])  # fp64: Gram, inverse, factor; weights, pull, change, copy
    on_shelves = level_bytes(racks)
    hidden = (sizes.num_tokens + tokens) * sizes.hidden_bytes
    in_memory = on_shelves <= MEMORY_SHARE * free_bytes(torch.device("cpu"))
    return Cost(flops, working, hidden + (on_shelves if in_memory else 0), 0 if in_memory else on_shelves)
