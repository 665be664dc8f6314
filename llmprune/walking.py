"""The walk over the blocks as a job does it: every finished block goes to the journal, recorded ones are put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Recording, Stack, eager_experts, record
from llmprune.devices import module_device
from llmprune.engines.layerwise import Walk, WalkEvent
from llmprune.events import BlockFinished
from llmprune.io.journal import Journal
from llmprune.measure.dispatch import dispatched
from llmprune.report import BlockReport


@dataclass(frozen=True)
class JournaledWalk:
    """A walk whose blocks are recorded under ``kind``; without a journal it just walks."""

    model: PreTrainedModel
    walk: Walk
    journal: Journal | None = None
    kind: str = "block"

    @property
    def start(self) -> int:
        """Number of blocks that an earlier process recorded."""
        return self.journal.num_blocks(self.kind) if self.journal else 0

    def restore(self) -> list[BlockReport]:
        """Put the recorded blocks back, and the hidden states to where they end; their reports."""
        walk, start, recording = self.walk, self.start, self.walk.recording
        if self.journal is None or not start:
            return []
        if walk.dense and not recording.stateful:
            with eager_experts(self.model):
                walk.replay(start, dense=True)
        reports = []
        for index in range(start):
            report, weights = self.journal.read_block(index, self.kind)
            walk.stack.blocks[index].load_state_dict(weights, strict=False)
            reports.append(report)
        if recording.stateful:
            with eager_experts(self.model):
                walk.replay(start)
        else:
            found = self.journal.read_hidden(start - 1, self.kind)
            walk.hidden = [tensor.to(recording.hidden[0].device) for tensor in found]
        return reports

    def run(self, start: int) -> Iterator[WalkEvent]:
        """Prune the blocks from ``start`` on; a finished one is recorded before it is told of."""
        with eager_experts(self.model):
            for event in self.walk.run(start):
                if isinstance(event, BlockFinished) and self.journal:
                    weights = dict(self.walk.stack.blocks[event.block].named_parameters())
                    digest = self.journal.write_block(event.block, event.report, weights, self.walk.hidden, self.kind)
                    event = event.model_copy(update={"sha256": digest})
                yield event


def record_batches(model: PreTrainedModel, stack: Stack, batches: Sequence[Tensor], device: torch.device) -> Recording:
    """Every block's arguments on the calibration batches, token ids [N, S]."""
    with dispatched(model, device):
        where = module_device(model)
        return record(model, stack, [batch.to(where) for batch in batches])
