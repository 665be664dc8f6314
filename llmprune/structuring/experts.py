"""Pattern ``experts``: whole experts go from every mixture, equally many, and their rows of the router with them."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack
from llmprune.devices import module_device
from llmprune.engines.reap import ExpertScores, best_experts, expert_scores
from llmprune.errors import ConfigError
from llmprune.events import Event, Progress
from llmprune.measure.dispatch import dispatched
from llmprune.patterns import Structure, num_pruned
from llmprune.spec import PruneConfig
from llmprune.structure import ModuleReport
from llmprune.structured.experts import Mixture, find_experts, remove_experts_
from llmprune.structuring.choice import CHECK_TOKENS, Choice, Setting


@dataclass
class Experts:
    """The choice of experts of one job."""

    setting: Setting
    structure: Structure = "experts"
    done: int = 0

    def __post_init__(self) -> None:
        self.mixtures = find_experts(self.setting.model, self.setting.stack)

    @staticmethod
    def check(config: PruneConfig, model: PreTrainedModel, stack: Stack) -> None:
        """Refuse a model without experts, and a share that is no expert or too many."""
        for mixture in find_experts(model, stack):
            num_kept(config, mixture)

    @property
    def total(self) -> int:
        """Steps of the choice."""
        return len(self.setting.stack.blocks)

    def choose(self) -> Generator[Event, None, Choice]:
        """Which experts stay in every mixture."""
        setting, begun = self.setting, time.perf_counter()
        recording = setting.record(setting.shares.rows(setting.ids_NS).split(setting.batch_size))
        scoring = expert_scores(setting.stack, self.mixtures, recording, setting.device, setting.shares)
        while True:
            try:
                done = next(scoring)
            except StopIteration as stop:
                scores: tuple[ExpertScores, ...] = stop.value
                break
            yield Progress(stage="structure", done=done, total=self.total, detail=setting.stack.name(done - 1))
        warnings, tensors = [], {}
        for mixture, score in zip(self.mixtures, scores, strict=True):
            worth_E = score.saliency_E if setting.config.method == "reap" else score.count_E.double()
            kept = best_experts(worth_E, num_kept(setting.config, mixture), mixture.route_groups)
            tensors[mixture.experts] = torch.tensor(kept)
            if unseen := int((score.count_E[kept] == 0).sum()):
                warnings.append(
                    f"{unseen} of the {len(kept)} experts that stay in {mixture.experts} were chosen for no calibration token. "
                    "Use more --num-samples."
                )
        return Choice({"seconds": time.perf_counter() - begun}, tensors, tuple(warnings))

    def apply_(self, choice: Choice) -> dict[str, Any]:
        """Take the experts out; the rest is compared with the dense model that never chooses them."""
        setting, model = self.setting, self.setting.model
        kept = [choice.tensors[mixture.experts].tolist() for mixture in self.mixtures]
        modules = [
            ModuleReport(
                name=mixture.experts, block=mixture.block, unit="expert", num_groups=mixture.num_experts, num_kept=len(own),
                parameters_per_group=mixture.parameters_per_group,
            )
            for mixture, own in zip(self.mixtures, kept, strict=True)
        ]  # fmt: skip
        with dispatched(model, setting.device):
            ids_NS = setting.ids_NS[:1, :CHECK_TOKENS].to(module_device(model))
            remove_experts_(model, self.mixtures, kept, ids_NS)
        return {
            "modules": [module.model_dump() for module in modules],
            "num_removable": sum(module.num_groups * module.parameters_per_group for module in modules),
            "num_removed": sum((module.num_groups - module.num_kept) * module.parameters_per_group for module in modules),
            "stock": True,
        }


def num_kept(config: PruneConfig, mixture: Mixture) -> int:
    """Experts that stay in a mixture: the number nearest to the share, as many of each group where a token chooses groups.

    Raises:
        ConfigError: none would go, or fewer stay than a token needs.
    """
    groups, most = mixture.route_groups, mixture.max_removed
    gone = groups * num_pruned(mixture.num_experts // groups, config.sparsity)
    if not 0 < gone <= most:
        raise ConfigError(
            f"sparsity {config.sparsity:g} of the {mixture.num_experts} experts of {mixture.experts} is {gone}, and {groups} "
            f"to {most} can go, as {mixture.top_k} are chosen for every token. Choose another --sparsity."
        )
    return mixture.num_experts - gone
