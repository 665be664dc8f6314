"""Calibration text that needs none: the model samples its own.

N samples, S sequence, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmprune.errors import NonFiniteError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@torch.no_grad()
def sample_ids(model: nn.Module, tokenizer: Tokenizer, *, num_samples: int, seq_len: int, seed: int, batch_size: int) -> Tensor:
    """Sample int64 ids [N, S] on the CPU at temperature 1 from the whole vocabulary; end tokens do not end a sequence.

    All uniform numbers are drawn at the start, on the CPU, so neither the batch size nor the device changes them.
    Raises NonFiniteError where the logits hold NaN or inf.
    """
    generator = torch.Generator().manual_seed(seed)
    starts_N1 = _starts(model, tokenizer, num_samples, generator)
    uniform_NS = torch.rand(num_samples, seq_len, generator=generator, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        batches = [slice(first, first + batch_size) for first in range(0, num_samples, batch_size)]
        return torch.cat([_continue(model, starts_N1[batch], uniform_NS[batch]) for batch in batches])
    finally:
        model.train(was_training)


def _starts(model: nn.Module, tokenizer: Tokenizer, num_samples: int, generator: torch.Generator) -> Tensor:
    """The bos token; where there is none a random ordinary token for every sample."""
    if tokenizer.bos_token_id is not None:
        return torch.full((num_samples, 1), tokenizer.bos_token_id)
    vocabulary = min(len(tokenizer), model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(vocabulary) if token not in special])
    return ordinary[torch.randint(len(ordinary), (num_samples, 1), generator=generator)]


def _continue(model: nn.Module, ids_NS: Tensor, uniform_NS: Tensor) -> Tensor:
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    cache: dict[str, Any] = {}
    for step in range(1, uniform_NS.shape[1]):
        # A model that returns no such cache (a state space model) reads its sequence again: slow, but right.
        new_NS = ids_NS[:, -1:] if cache else ids_NS
        output = model(input_ids=new_NS.to(device), use_cache=True, **cache)
        past = getattr(output, "past_key_values", None)
        cache = {} if past is None else {"past_key_values": past}
        next_N1 = _draw(output.logits[:, -1], uniform_NS[:, step, None])
        ids_NS = torch.cat([ids_NS, next_N1], dim=1)
    return ids_NS


def _draw(logits_NV: Tensor, uniform_N1: Tensor) -> Tensor:
    """Invert the cumulative distribution: row n gets the token whose share of [0, 1) holds its uniform number."""
    # MPS has no float64; in float32 the sum over a large vocabulary is good to about 1e-5, which only blurs the draw.
    dtype = torch.float32 if logits_NV.device.type == "mps" else torch.float64
    cumulative_NV = logits_NV.float().softmax(-1).cumsum(-1, dtype=dtype)
    total_N1 = cumulative_NV[:, -1:]
    if not total_N1.isfinite().all():
        raise NonFiniteError("the model's logits hold NaN or inf while it samples synthetic text. Try dtype float32.")
    token_N1 = torch.searchsorted(cumulative_NV, uniform_N1.to(total_N1) * total_N1, right=True)
    return token_N1.clamp(max=logits_NV.shape[-1] - 1).cpu()
