"""The walk over the blocks as a job does it: every finished block goes to the journal, recorded ones are put back.

The weights of blocks that lie on disk are written by a thread of its own, while the walk goes on with the next block.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Recording, Stack, eager_experts, record
from llmprune.devices import module_device
from llmprune.engines.layerwise import Walk, WalkEvent
from llmprune.engines.sharding import Shares
from llmprune.events import BlockFinished, BlockStarted, Progress
from llmprune.hidden import HiddenStates
from llmprune.io.journal import Journal
from llmprune.measure.dispatch import dispatched
from llmprune.report import BlockReport

A = TypeVar("A")

_HIDDEN = "hidden-*.safetensors"


@dataclass(frozen=True)
class JournaledWalk:
    """A walk whose blocks are recorded under ``kind``; without a journal it just walks.

    Of several processes the first alone has the journal. Each of the others has a place of its own in it, ``own``, for its
    hidden states: they are there before the record of their block is. One without that place goes through the blocks again.
    Of a model whose blocks stay on disk each reads the pruned ones from the journal, so it needs that place.
    """

    model: PreTrainedModel
    walk: Walk
    journal: Journal | None = None
    kind: str = "block"
    own: Journal | None = None

    @property
    def start(self) -> int:
        """Number of blocks that an earlier process recorded."""
        return self._agreed(lambda: self.journal.num_blocks(self.kind) if self.journal else 0)

    def restore(self) -> list[BlockReport]:
        """Put the recorded blocks back, and the hidden states to where they end; their reports.

        A dense walk that took its statistics from the cache carried no hidden states: if they are wanted now, the blocks
        carry them before they are replaced.
        """
        walk, start, recording = self.walk, self.start, self.walk.recording
        if not start:
            return []
        if walk.dense and not recording.stateful:
            with eager_experts(self.model):
                walk.replay(start, dense=True)
        dense = walk.kind == "dense"
        found = [] if recording.stateful else self._hidden(start - 1)
        if dense and not found and walk.carries(start):
            with eager_experts(self.model):
                walk.replay(start)
        reports = [self._put_back(index) for index in range(start)]
        if found and walk.carries(start):
            for batch, tensor in enumerate(found):
                walk.hidden[batch] = tensor
        elif not found and not dense and walk.carries(start):
            with eager_experts(self.model):
                walk.replay(start)
        return reports

    def run(self, start: int) -> Iterator[WalkEvent]:
        """Prune the blocks from ``start`` on; a finished one is recorded before it is told of."""
        with eager_experts(self.model), ThreadPoolExecutor(1, "llmprune-write") as writer:
            if self.journal is None:
                for event in self.walk.run(start):
                    if isinstance(event, BlockFinished):
                        self._keep_own(event.block)
                    yield event
                self._read_pruned(start)
                return
            finish: Callable[[], BlockFinished] | None = None  # of the block that is being written
            for event in self.walk.run(start):
                if finish and not isinstance(event, BlockStarted | Progress):
                    yield finish()
                    finish = None
                if not isinstance(event, BlockFinished):
                    yield event
                    continue
                self._keep_own(event.block)
                finish = self._record(event, writer)
                if self.walk.stack.weights is None:  # what is in memory may change
                    yield finish()
                    finish = None
            if finish:
                yield finish()
            self._read_pruned(start)

    def _read_pruned(self, start: int) -> None:
        """Have blocks on disk read, in all processes, as the first has written them."""
        if self.walk.shares and self.walk.stack.weights:
            self._agreed(lambda: None)  # it has
            for index in range(start, len(self.walk.stack.blocks)):
                self._replace(index)

    def _replace(self, index: int) -> None:
        journal = self.journal or (Journal(self.own.directory.parent) if self.own else None)
        assert journal is not None and self.walk.stack.weights is not None
        self.walk.stack.weights.replace(index, journal.weights_file(index, self.kind))

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

    def _put_back(self, index: int) -> BlockReport:
        block = self.walk.stack.blocks[index]

        def read() -> BlockReport:
            assert self.journal
            report, file = self.journal.read_block(index, self.kind), self.journal.weights_file(index, self.kind)
            if self.walk.stack.weights is None:
                block.load_state_dict(load_file(file), strict=False)
            return report

        if self.walk.stack.weights is not None:
            report = self._agreed(read)
            self._replace(index)
            return report
        return self.walk.shares.first_changes(block, read) if self.walk.shares else read()

    def _hidden(self, index: int) -> list[Tensor]:
        """What this process recorded of its hidden states after a block; empty where it could not."""
        if self.journal:
            return self.journal.read_hidden(index, self.kind)
        name = self._own_name(index)
        if self.own is None or not self.own.has(name):
            return []
        files = sorted(self.own.read(name, [])["sha256"])
        self.own.read(name, files)
        return [self.own.tensors(name, file)["hidden"] for file in files]

    def _keep_own(self, index: int) -> None:
        """Record this process's hidden states, if it is not the first, and wait for the others.

        Those of blocks before the newest whole record are of no more use.
        """
        shares = self.walk.shares
        if shares is None:
            return

        def keep() -> int:
            if self.own is not None:
                files = {_HIDDEN.replace("*", f"{batch:05d}"): {"hidden": part} for batch, part in enumerate(self.walk.hidden)}
                shutil.rmtree(self.own.directory / self._own_name(index), ignore_errors=True)  # of a run that was killed
                self.own.write(self._own_name(index), {}, files)
            return self.journal.num_blocks(self.kind) if self.journal else 0

        num_recorded = shares.together(keep)[0]
        if self.own is not None:
            for old in range(num_recorded - 1):
                shutil.rmtree(self.own.directory / self._own_name(old), ignore_errors=True)

    def _own_name(self, index: int) -> str:
        return f"{self.kind}-{index:05d}"

    def _agreed(self, work: Callable[[], A]) -> A:
        return self.walk.shares.by_first(work) if self.walk.shares else work()


def own_place(directory: Path | None, shares: Shares | None) -> Journal | None:
    """Where one of several processes, not the first, records what is its own in the work directory; None where it sees none."""
    if shares is None or shares.rank == 0 or directory is None or not directory.is_dir():
        return None
    place = Journal(directory / f"process-{shares.rank:05d}")
    place.directory.mkdir(exist_ok=True)
    return place


def record_batches(
    model: PreTrainedModel, stack: Stack, batches: Sequence[Tensor], device: torch.device, hidden: HiddenStates | None = None
) -> Recording:
    """Every block's arguments on the calibration batches, token ids [N, S]; their hidden states go to ``hidden``."""
    with dispatched(model, device):
        where = module_device(model)
        return record(model, stack, [batch.to(where) for batch in batches], hidden)
