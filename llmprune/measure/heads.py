"""The model's own head, for searches that keep the last block's outputs instead of logits."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack
from llmprune.devices import module_device
from llmprune.engines.divergence import Head, Logits
from llmprune.measure.dispatch import dispatched
from llmprune.measure.quality import replay_tail


def head_of(model: PreTrainedModel, stack: Stack, chunks: Sequence[Tensor], device: torch.device) -> Head:
    """The model's own head on the last block's outputs of these chunks [N, S], or of a chunk's first sequences and tokens."""

    @contextmanager
    def head() -> Generator[Logits, None, None]:
        with dispatched(model, device):
            where = module_device(model)

            def logits(chunk: int, hidden_NSH: Tensor) -> Tensor:
                ids_NS = chunks[chunk][: hidden_NSH.shape[0], : hidden_NSH.shape[1]]
                return replay_tail(model, stack, ids_NS.to(where), hidden_NSH)

            yield logits

    return head
