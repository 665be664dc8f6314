"""The walk over the blocks as a job does it: every finished block goes to the journal, recorded ones are put back.

The weights of blocks that lie on disk are written by a thread of its own, while the walk goes on with the next block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Recording, Stack, eager_experts, record
from llmprune.devices import module_device
from llmprune.engines.layerwise import Walk, WalkEvent
from llmprune.events import BlockFinished, BlockStarted, Progress
from llmprune.hidden import HiddenStates
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
        """Put the recorded blocks back, and the hidden states to where they end; their reports.

        A dense walk that took its statistics from the cache carried no hidden states: if they are wanted now, the blocks
        carry them before they are replaced.
        """
        walk, start, recording = self.walk, self.start, self.walk.recording
        if self.journal is None or not start:
            return []
        if walk.dense and not recording.stateful:
            with eager_experts(self.model):
                walk.replay(start, dense=True)
        dense = walk.kind == "dense"
        found = [] if recording.stateful else self.journal.read_hidden(start - 1, self.kind)
        if dense and not found and walk.carries(start):
            with eager_experts(self.model):
                walk.replay(start)
        reports = []
        for index in range(start):
            reports.append(self.journal.read_block(index, self.kind))
            file = self.journal.weights_file(index, self.kind)
            if walk.stack.weights is not None:
                walk.stack.weights.replace(index, file)
            else:
                walk.stack.blocks[index].load_state_dict(load_file(file), strict=False)
        if recording.stateful and not dense:
            with eager_experts(self.model):
                walk.replay(start)
        elif found and walk.carries(start):
            for batch, tensor in enumerate(found):
                walk.hidden[batch] = tensor
        return reports

    def run(self, start: int) -> Iterator[WalkEvent]:
        """Prune the blocks from ``start`` on; a finished one is recorded before it is told of."""
        with eager_experts(self.model), ThreadPoolExecutor(1, "llmprune-write") as writer:
            if self.journal is None:
                yield from self.walk.run(start)
                return
            finish: Callable[[], BlockFinished] | None = None  # of the block that is being written
            for event in self.walk.run(start):
                if finish and not isinstance(event, BlockStarted | Progress):
                    yield finish()
                    finish = None
                if not isinstance(event, BlockFinished):
                    yield event
                    continue
                finish = self._record(event, writer)
                if self.walk.stack.weights is None:  # what is in memory may change
                    yield finish()
                    finish = None
            if finish:
                yield finish()

    def _record(self, event: BlockFinished, writer: Executor) -> Callable[[], BlockFinished]:
        """Begin to record the block that the walk holds; what is returned waits for its end."""
        assert self.journal is not None
        journal, index, weights = self.journal, event.block, self.walk.stack.weights
        tensors = weights.export(index) if weights else dict(self.walk.stack.blocks[index].named_parameters())
        hidden = list(self.walk.hidden) if self.walk.carries(index + 1) else []
        state = (tensors, hidden, torch.get_rng_state())
        writing = writer.submit(journal.write_block, index, event.report, *state, self.kind)
        if self.walk.hidden.place != "device":  # the next block's outputs are written over them
            wait([writing])

        def finish() -> BlockFinished:
            digest = writing.result()
            if weights:
                weights.replace(index, journal.weights_file(index, self.kind))
            return event.model_copy(update={"sha256": digest})

        return finish


def record_batches(
    model: PreTrainedModel, stack: Stack, batches: Sequence[Tensor], device: torch.device, hidden: HiddenStates | None = None
) -> Recording:
    """Every block's arguments on the calibration batches, token ids [N, S]; their hidden states go to ``hidden``."""
    with dispatched(model, device):
        where = module_device(model)
        return record(model, stack, [batch.to(where) for batch in batches], hidden)
