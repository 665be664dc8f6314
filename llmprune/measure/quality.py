"""Perplexity by the GPTQ protocol, and divergence from the dense model on the same tokens.

The dense model is gone when the pruned one is measured, so its final hidden states are kept instead of its logits: the
model's own head, with every block an identity, turns them back into the very same logits.

N sequences of one batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
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
from llmprune.hidden import HiddenStates
from llmprune.report import Quality

_LOGITS_BUDGET = 1 << 24
"""Forward of one forward, in elements: bounds the memory of a batch of windows."""


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


Forward = Callable[[int, Tensor], Tensor]
"""(batch number, input_ids [N, S]) -> logits [N, S, V]: of a model, or of what was kept of one."""

Keep = list[Tensor] | HiddenStates
"""The head's inputs [N, S, H] by batch."""


@torch.no_grad()
def score_text(
    model: PreTrainedModel, ids_NS: Tensor, *, dense: Forward | None = None, keep: Keep | None = None
) -> Generator[int, None, Scores]:
    """Score windows of token ids [num_windows, S]; yields the number of windows done, returns the scores.

    Args:
        model: on one device, or dispatched over several.
        ids_NS: int64.
        dense: gives the dense model's logits; with it the divergence is measured too.
        keep: the head's inputs [N, S, H] are appended to it, one tensor per batch, on the CPU.
    """
    begun = time.perf_counter()
    device, sums, done = module_device(model), Sums(), 0
    for number, batch_NS in enumerate(batches_of(model, ids_NS)):
        sums.add(model, number, batch_NS.to(device), forward_of(model), dense=dense, keep=keep)
        done += len(batch_NS)
        yield done
    return sums.scores(time.perf_counter() - begun)


def forward_of(model: PreTrainedModel) -> Forward:
    """The whole model's own."""

    def forward(_number: int, ids_NS: Tensor) -> Tensor:
        logits_NSV: Tensor = model(input_ids=ids_NS, use_cache=False).logits
        return logits_NSV

    return forward


def batches_of(model: PreTrainedModel, ids_NS: Tensor) -> tuple[Tensor, ...]:
    """The windows as they are scored: as many at once as the logits leave room for."""
    return torch.split(ids_NS, windows_per_batch(ids_NS.shape[1], model.config.get_text_config().vocab_size))


@dataclass
class Sums:
    """What is summed over the scored tokens so far."""

    loss: float = 0.0
    divergence: float | None = None
    agreement: float = 0.0
    num_scored: int = 0

    def add(
        self, model: PreTrainedModel, number: int, ids_NS: Tensor, forward: Forward, *, dense: Forward | None,
        keep: Keep | None,
    ) -> None:  # fmt: skip
        """Score one batch by what ``forward`` makes of it, through the model's head; see :func:`score_text` for the rest."""
        with head_inputs(model) as captured:
            log_probs_NSV = _log_probs(forward(number, ids_NS))
        if keep is not None:
            keep.append(captured[0].cpu())
        targets_NS = ids_NS[:, 1:].to(log_probs_NSV.device)
        self.loss -= float(log_probs_NSV.gather(-1, targets_NS[..., None]).sum(dtype=torch.float64))
        self.num_scored += targets_NS.numel()
        if dense is not None:
            dense_NSV = _log_probs(dense(number, ids_NS)).to(log_probs_NSV.device)
            self.agreement += float((dense_NSV.argmax(-1) == log_probs_NSV.argmax(-1)).sum())
            kl = F.kl_div(log_probs_NSV, dense_NSV, log_target=True, reduction="none").sum(dtype=torch.float64)
            self.divergence = (self.divergence or 0.0) + float(kl)

    def scores(self, seconds: float) -> Scores:
        """The means."""
        loss, divergence = self.loss / self.num_scored, self.divergence
        return Scores(
            perplexity=math.exp(loss) if loss < 700 else math.inf,
            kl=None if divergence is None else divergence / self.num_scored,
            top1_agreement=None if divergence is None else self.agreement / self.num_scored,
            seconds=seconds,
        )


def mean_of(parts: Sequence[tuple[int, Scores]]) -> Scores:
    """The scores of a text from those of its parts, each with its number of windows; the seconds are the longest part's."""
    total = sum(count for count, _ in parts)

    def mean(value: Callable[[Scores], float | None]) -> float | None:
        values = [(count, value(scores)) for count, scores in parts]
        return None if any(one is None for _, one in values) else sum(count * one for count, one in values if one) / total

    mean_loss = sum(count * math.log(scores.perplexity) for count, scores in parts) / total
    return Scores(
        perplexity=math.exp(mean_loss) if mean_loss < 700 else math.inf,
        kl=mean(lambda scores: scores.kl),
        top1_agreement=mean(lambda scores: scores.top1_agreement),
        seconds=max(scores.seconds for _, scores in parts),
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
