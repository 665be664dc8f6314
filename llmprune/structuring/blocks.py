"""Pattern ``blocks``: whole decoder blocks go."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack
from llmprune.devices import module_device
from llmprune.engines.depth import DepthChoice, DepthMethod, choose_blocks, num_steps
from llmprune.errors import ConfigError
from llmprune.events import Event, Progress
from llmprune.measure.dispatch import dispatched
from llmprune.measure.heads import head_of
from llmprune.patterns import Structure, num_pruned
from llmprune.spec import PruneConfig
from llmprune.structure import BlockChoice
from llmprune.structured.depth import remove_blocks_
from llmprune.structuring.choice import CHECK_TOKENS, Choice, Setting, search_texts

DEPTH_TOKENS = 8192
"""Calibration tokens that sets of blocks are measured on, at most."""


@dataclass
class Depth:
    """The choice of blocks of one job."""

    setting: Setting
    structure: Structure = "blocks"
    done: int = 0

    @staticmethod
    def check(config: PruneConfig, model: PreTrainedModel, stack: Stack) -> None:  # noqa: ARG004
        """Refuse a share that is no block, or all of them."""
        num_removed(config, len(stack.blocks))

    @property
    def total(self) -> int:
        """Steps of the choice."""
        num_blocks = len(self.setting.stack.blocks)
        return num_steps(self.method, num_blocks, num_removed(self.setting.config, num_blocks))

    @property
    def method(self) -> DepthMethod:
        """How they are chosen."""
        return cast(DepthMethod, self.setting.config.method)

    def choose(self) -> Generator[Event, None, Choice]:
        """Which blocks go."""
        setting, begun = self.setting, time.perf_counter()
        stack, texts = setting.stack, search_texts(setting.ids_NS, DEPTH_TOKENS, setting.shares)
        choosing = choose_blocks(
            self.method, stack, setting.record(texts), setting.device,
            head_of(setting.model, stack, texts, setting.device),
            num_removed(setting.config, len(stack.blocks)), seed=setting.config.seed, shares=setting.shares,
        )  # fmt: skip
        while True:
            try:
                done = next(choosing)
            except StopIteration as stop:
                choice: DepthChoice = stop.value
                break
            yield Progress(stage="structure", done=done, total=self.total, detail="blocks and sets of them")
        report = {
            "blocks_removed": choice.removed,
            "block_scores": choice.scores,
            "choices": [BlockChoice(blocks=blocks, kl=kl).model_dump() for blocks, kl in choice.tried],
        }
        return Choice({"report": report, "seconds": time.perf_counter() - begun})

    def apply_(self, choice: Choice) -> dict[str, Any]:
        """Take the blocks out; the rest is compared with the dense model that passes them by."""
        setting, model = self.setting, self.setting.model
        removed = choice.data["report"]["blocks_removed"]
        sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in setting.stack.blocks]
        with dispatched(model, setting.device):
            ids_NS = setting.ids_NS[:1, :CHECK_TOKENS].to(module_device(model))
            remove_blocks_(model, setting.stack, removed, ids_NS)
        return {"num_removable": sum(sizes), "num_removed": sum(sizes[index] for index in removed), "stock": True}


def num_removed(config: PruneConfig, num_blocks: int) -> int:
    """Blocks that go: the number nearest to the share.

    Raises:
        ConfigError: it is none, or all.
    """
    count = num_pruned(num_blocks, config.sparsity)
    if not 0 < count < num_blocks:
        raise ConfigError(
            f"sparsity {config.sparsity:g} of {num_blocks} blocks is {count} of them, and 1 to {num_blocks - 1} can go. Choose "
            f"--sparsity from {1 / num_blocks:.3g} to {(num_blocks - 1) / num_blocks:.3g}."
        )
    return count
