"""Scoring block by block: every block is on the device once a text, not once a batch of windows.

For a model that does not fit on the device, or whose blocks are read from disk. The hidden states of all windows wait
between the blocks instead. N sequences of one batch, S sequence, H hidden.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack, record
from llmprune.devices import free_bytes
from llmprune.hidden import HiddenStates
from llmprune.measure.dispatch import fits, move_
from llmprune.measure.quality import Forward, Keep, Scores, Sums, batches_of, replay_tail
from llmprune.memory import hidden_place
from llmprune.spec import Offload

NO_SPEED = (
    "speed was not measured: the model does not fit on the device, or is read from disk block by block, and it is the reading "
    "that would be timed."
)


def is_streamed(model: PreTrainedModel, stack: Stack, device: torch.device) -> bool:
    """Whether the model should be scored block by block."""
    return stack.weights is not None or not fits(model, device)


@contextmanager
def ends_placed(model: PreTrainedModel, stack: Stack, device: torch.device) -> Iterator[torch.device]:
    """Hold what is not in a block (embeddings, final norm, head) where it can run, and give that device.

    Blocks stay where they are: the model runs while they are stubbed.
    """
    ends = [
        tensor
        for module in _outside(model, set(stack.blocks))
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    ends = list({id(tensor): tensor for tensor in ends}.values())  # a tied one once
    home = ends[0].device
    if home.type != "cpu" or device.type == "cpu":
        yield home
        return
    try:
        move_(ends, device)
        yield device
    finally:
        move_(ends, home)


@torch.no_grad()
def score_streamed(
    model: PreTrainedModel,
    stack: Stack,
    ids_NS: Tensor,
    device: torch.device,
    *,
    dense: Forward | None = None,
    keep: Keep | None = None,
    offload: Offload = "auto",
    folder: Path | None = None,
) -> Generator[int, None, Scores]:
    """Scores of the very same batches and operations as :func:`llmprune.measure.quality.score_text`, block by block.

    Yields how many windows' worth of work is done.

    Args:
        model: its blocks anywhere; they are brought to ``device`` and taken back.
        ids_NS: int64, [num_windows, S].
        dense: gives the dense model's logits; called while ``model``'s embeddings and head are on the device.
        keep: the head's inputs [N, S, H] are appended to it, one tensor per batch, on the CPU.
        offload: where the hidden states wait, as :func:`llmprune.memory.hidden_place` has it.
        folder: the directory of their files.
    """
    begun = time.perf_counter()
    batches = batches_of(model, ids_NS)
    text_config = model.config.get_text_config()
    size = ids_NS.numel() * text_config.hidden_size * model.dtype.itemsize
    free = None if device.type == "cpu" else free_bytes(device)
    place = hidden_place(offload, size, device_free=free, cpu_free=free_bytes(torch.device("cpu")))
    with ends_placed(model, stack, device) as where:
        recording = record(model, stack, [batch.to(where) for batch in batches], HiddenStates((), place, folder))
    hidden, steps, shown = recording.hidden, 0, 0
    total = len(ids_NS) * (len(stack.blocks) + 1)  # the head counts as a block
    for index, block in enumerate(stack.blocks):
        with stack.placed(index, device) as where:
            for number, calls in enumerate(recording.calls):
                hidden[number] = calls[index].run(block, hidden[number].to(where))
                steps += len(batches[number])
                if (done := len(ids_NS) * steps // total) > shown:
                    yield (shown := done)
    sums = Sums()
    with ends_placed(model, stack, device) as where:

        def forward(number: int, ids_NS: Tensor) -> Tensor:
            return replay_tail(model, stack, ids_NS, hidden[number])

        for number, batch_NS in enumerate(batches):
            sums.add(model, number, batch_NS.to(where), forward, dense=dense, keep=keep)
            steps += len(batch_NS)
            if (done := len(ids_NS) * steps // total) > shown:
                yield (shown := done)
    return sums.scores(time.perf_counter() - begun)


def _outside(module: nn.Module, blocks: set[nn.Module]) -> list[nn.Module]:
    """The module and all below it that can be reached without passing a block, each once."""
    found = {id(module): module}
    for child in module.children():
        if child not in blocks:
            found |= {id(one): one for one in _outside(child, blocks)}
    return list(found.values())
