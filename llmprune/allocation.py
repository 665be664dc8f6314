"""The stage ``allocate``: survey the dense model where the allocation asks for it, and share the zeros among the sites."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.allocate import ALLOCATORS, SiteFacts
from llmprune.anatomy.blocks import Stack, eager_experts, record
from llmprune.devices import module_device
from llmprune.engines.survey import Survey, probe_sequences, shapes_of
from llmprune.events import Event
from llmprune.measure.dispatch import dispatched
from llmprune.measure.quality import replay_tail
from llmprune.methods import get_method
from llmprune.report import AllocationReport
from llmprune.spec import PruneConfig


@dataclass(frozen=True)
class Sharing:
    """One allocation of a job; S tokens a sequence.

    Attributes:
        ids_NS: the calibration tokens, all sequences.
        batch_size: calibration sequences per forward.
    """

    model: PreTrainedModel
    stack: Stack
    config: PruneConfig
    ids_NS: Tensor
    batch_size: int
    device: torch.device

    @property
    def num_probes(self) -> int:
        """Sequences on which the divergence is measured; 0 where no curves are."""
        curves = ALLOCATORS[self.config.allocation].needs == "curves"
        return probe_sequences(*self.ids_NS.shape) if curves else 0

    @property
    def num_steps(self) -> int:
        """Steps of the stage."""
        return len(self.stack.blocks) + self.num_probes

    def run(self) -> Generator[Event, None, AllocationReport]:
        """Progress of the stage; returns the allocation. The model is as before afterwards."""
        config, allocator = self.config, ALLOCATORS[self.config.allocation]
        if allocator.needs == "shapes":
            facts = shapes_of(self.stack, config.skip)
        else:
            facts = yield from self._survey()
        counts = allocator.allocate(facts, config.sparsity, config.target(get_method(config.method).scope).scope)
        return AllocationReport(
            name=config.allocation,
            num_zeros=sum(counts.values()),
            numel=sum(fact.numel for fact in facts),
            sparsities={fact.name: counts[fact.name] / fact.numel for fact in facts},
        )

    def _survey(self) -> Generator[Event, None, list[SiteFacts]]:
        ids_NS, model, num_probes = self.ids_NS, self.model, self.num_probes
        with dispatched(model, self.device):
            device = module_device(model)
            recording = record(model, self.stack, [batch.to(device) for batch in ids_NS.split(self.batch_size)])
            streams = record(model, self.stack, [ids_NS[:num_probes].to(device)]) if num_probes else None
        needs = ALLOCATORS[self.config.allocation].needs
        survey = Survey(self.stack, recording, self.config, self.device, needs, streams)
        with eager_experts(model):
            yield from survey.run()
        if num_probes:
            with dispatched(model, self.device):
                device = module_device(model)

                def logits(number: int, hidden_NSH: Tensor) -> Tensor:
                    return replay_tail(model, self.stack, ids_NS[number : number + 1].to(device), hidden_NSH)

                yield from survey.measure(logits)
        return survey.facts
