"""Perplexity by the GPTQ protocol, and divergence from the dense model on the same tokens.

The dense model is gone when the pruned one is measured, so its final hidden states are kept instead of its logits: the
model's own head, with every block an identity, turns them back into the very same logits.

N sequences of one batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack, stubbed
from llmprune.devices import module_device
from llmprune.errors import UnsupportedModel
from llmprune.events import Event, Progress, Stage
from llmprune.report import Quality

_LOGITS_BUDGET = 1 << 24
"""Logits of one forward, in elements: bounds the memory of a batch of windows."""


@dataclass(frozen=True)
class Scores:
    """Sums over the scored tokens of one text: the last S-1 positions of every window.

    ``perplexity`` is exp of the mean cross-entropy; ``kl`` the mean KL(dense || pruned) in nats; ``top1_agreement`` the
    share of positions with the same most probable token. The last two are None without a dense reference.
    """

    perplexity: float
    kl: float | None
    top1_agreement: float | None
    seconds: float


def windows_per_batch(seq_len: int, vocab_size: int) -> int:
    """How many evaluation windows go through the model at once."""
    return max(1, min(16, _LOGITS_BUDGET // (seq_len * vocab_size)))


Reference = Callable[[int, Tensor], Tensor]
"""(batch number, input_ids [N, S]) -> the dense model's logits [N, S, V]."""


@torch.no_grad()
def score_text(
    model: PreTrainedModel, ids_NS: Tensor, *, dense: Reference | None = None, keep: list[Tensor] | None = None
) -> Generator[int, None, Scores]:
    """Score windows of token ids [num_windows, S]; yields the number of windows done, returns the scores.

    Args:
        model: on one device, or dispatched over several.
        ids_NS: int64.
        dense: gives the dense model's logits; with it the divergence is measured too.
        keep: the head's inputs [N, S, H] are appended to it, one tensor per batch, on the CPU.
    """
    begun = time.perf_counter()
    device = module_device(model)
    loss = divergence = agreement = 0.0
    num_scored = done = 0
    batches = ids_NS.split(windows_per_batch(ids_NS.shape[1], model.config.get_text_config().vocab_size))
    for number, batch_NS in enumerate(batches):
        batch_NS = batch_NS.to(device)
        with head_inputs(model) as captured:
            log_probs_NSV = _log_probs(model(input_ids=batch_NS, use_cache=False).logits)
        if keep is not None:
            keep.append(captured[0].cpu())
        targets_NS = batch_NS[:, 1:].to(log_probs_NSV.device)
        loss -= float(log_probs_NSV.gather(-1, targets_NS[..., None]).sum(dtype=torch.float64))
        num_scored += targets_NS.numel()
        if dense is not None:
            dense_NSV = _log_probs(dense(number, batch_NS)).to(log_probs_NSV.device)
            agreement += float((dense_NSV.argmax(-1) == log_probs_NSV.argmax(-1)).sum())
            divergence += float(F.kl_div(log_probs_NSV, dense_NSV, log_target=True, reduction="none").sum(dtype=torch.float64))
        done += len(batch_NS)
        yield done
    mean_loss = loss / num_scored
    return Scores(
        perplexity=math.exp(mean_loss) if mean_loss < 700 else math.inf,
        kl=None if dense is None else divergence / num_scored,
        top1_agreement=None if dense is None else agreement / num_scored,
        seconds=time.perf_counter() - begun,
    )


def as_events(
    scoring: Generator[int, None, Scores], stage: Stage, detail: str, *, offset: int, total: int
) -> Generator[Event, None, Scores]:
    """The windows :func:`score_text` has done, as progress of a stage; returns its scores."""
    while True:
        try:
            done = next(scoring)
        except StopIteration as stop:
            scores: Scores = stop.value
            return scores
        yield Progress(stage=stage, done=offset + done, total=total, detail=detail)


def against(dense: Quality, scores: Scores) -> Quality:
    """A text's quality once the pruned model is measured too."""
    return dense.model_copy(
        update={
            "perplexity_pruned": scores.perplexity,
            "kl": scores.kl,
            "top1_agreement": scores.top1_agreement,
            "seconds_pruned": scores.seconds,
        }
    )


def _log_probs(logits_NSV: Tensor) -> Tensor:
    """fp32 log-probabilities of the successors of the first S-1 tokens."""
    return F.log_softmax(logits_NSV[:, :-1].float(), dim=-1)


def replay_head(model: PreTrainedModel, stack: Stack, ids_NS: Tensor, hidden_NSH: Tensor) -> Tensor:
    """The logits [N, S, V] the model's head and whatever follows it (soft-caps, scales) make of stored head inputs."""
    head = _head(model)

    def swap(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (hidden_NSH.to(args[0].device), *args[1:])

    return _stubbed_logits(model, stack, ids_NS, head.register_forward_pre_hook(swap))


def replay_tail(model: PreTrainedModel, stack: Stack, ids_NS: Tensor, hidden_NSH: Tensor) -> Tensor:
    """The logits [N, S, V] that whatever follows the stack (final norm, head, soft-caps) makes of the last block's output."""

    def swap(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return hidden_NSH.to(output.device)
        return (hidden_NSH.to(output[0].device), *output[1:])

    return _stubbed_logits(model, stack, ids_NS, stack.blocks[-1].register_forward_hook(swap))


def _stubbed_logits(model: PreTrainedModel, stack: Stack, ids_NS: Tensor, handle: RemovableHandle) -> Tensor:
    """The logits [N, S, V] with all blocks stubbed, while a hook puts in hidden states; the hook goes."""
    try:
        with stubbed(stack):
            logits: Tensor = model(input_ids=ids_NS, use_cache=False).logits
            return logits
    finally:
        handle.remove()


@contextmanager
def head_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect what the model's head is given."""
    captured: list[Tensor] = []
    handle = _head(model).register_forward_pre_hook(lambda _module, args: captured.append(args[0].detach()))
    try:
        yield captured
    finally:
        handle.remove()


def _head(model: PreTrainedModel) -> nn.Module:
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModel(f"{type(model).__name__} has no output embeddings; looked for get_output_embeddings().")
    return head
