"""Prefill and decode of a whole model as something to time: with a static cache in a CUDA graph where there is one.

B sequences of one batch, S tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from llmprune.devices import is_out_of_memory, module_device
from llmprune.errors import one_line
from llmprune.measure.graphs import WARM_UPS, CaptureFailed, StaticState, capture
from llmprune.measure.timing import Run

Capture = Callable[[Callable[[], object], torch.device], Callable[[], object]]


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to be timed; ``note`` says what had to be done otherwise."""

    run: Run
    cuda_graph: bool = False
    note: str = ""


def prepare_prefill(model: PreTrainedModel, num_tokens: int) -> Prepared:
    """Reading one prompt of ``num_tokens`` random tokens, up to the logits of the last and a filled cache."""
    ids_BS = random_ids(model, 1, num_tokens)
    options = last_logits_only(model)
    forward = lambda: model(input_ids=ids_BS, use_cache=True, **options)
    device = module_device(model)
    note = ""
    if device.type == "cuda":
        try:
            return Prepared(Run(capture(forward, device)), cuda_graph=True)
        except CaptureFailed as error:
            note = f"prefill runs without a CUDA graph ({error})"
    return Prepared(Run(forward), note=note)


def prepare_decode(model: PreTrainedModel, batch_size: int, context: int, num_tokens: int) -> Prepared | None:
    """Generating ``num_tokens`` greedily for each of B prompts of ``context`` random tokens, one step at a time.

    None for a model that keeps no cache.
    """
    prompt_BS = random_ids(model, batch_size, context)
    note = ""
    if module_device(model).type == "cuda":
        try:
            return static_decode(model, prompt_BS, num_tokens, capture)
        except CaptureFailed as error:
            note = f"decode runs with a growing cache and without a CUDA graph ({error})"
    output = model(input_ids=prompt_BS, use_cache=True, **last_logits_only(model))
    start = getattr(output, "past_key_values", None)
    if start is None:
        return None
    first_B1: Tensor = output.logits[:, -1:].argmax(-1)
    caches: list[Any] = []

    def reset() -> None:
        caches[:] = [copy.deepcopy(start)]

    def decode() -> Tensor:
        token_B1: Tensor = first_B1
        for _ in range(num_tokens):
            logits_BSV: Tensor = model(input_ids=token_B1, past_key_values=caches[0], use_cache=True).logits
            token_B1 = logits_BSV[:, -1:].argmax(-1)
        return token_B1

    return Prepared(Run(decode, reset), note=note)


def static_decode(model: PreTrainedModel, prompt_BS: Tensor, num_tokens: int, capture: Capture) -> Prepared:
    """Decode on a cache of fixed size, each step a replay of one captured forward.

    Raises:
        CaptureFailed: the model takes no such cache, or its step cannot be captured.
    """
    device = module_device(model)
    spare = max(num_tokens, WARM_UPS + 2)  # a step beyond the end of the cache would write out of bounds
    try:
        cache = StaticCache(config=model.config, max_cache_len=prompt_BS.shape[1] + spare)
        output = model(input_ids=prompt_BS, past_key_values=cache, use_cache=True, **last_logits_only(model))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CaptureFailed(f"no static cache: {one_line(error)}") from None
    first_B1: Tensor = output.logits[:, -1:].argmax(-1)
    token_B1: Tensor = first_B1.clone()
    state = StaticState(cache)

    def step() -> None:
        logits_BSV: Tensor = model(input_ids=token_B1, past_key_values=cache, use_cache=True).logits
        token_B1.copy_(logits_BSV[:, -1:].argmax(-1))

    def reset() -> None:
        state.restore()
        token_B1.copy_(first_B1)

    replay = capture(step, device)

    def decode() -> Tensor:
        for _ in range(num_tokens):
            replay()
        return token_B1

    return Prepared(Run(decode, reset), cuda_graph=True)


def random_ids(model: PreTrainedModel, batch_size: int, num_tokens: int) -> Tensor:
    """Token ids [B, S], the same for the same sizes and vocabulary."""
    generator = torch.Generator().manual_seed(num_tokens)
    vocab_size = model.config.get_text_config().vocab_size
    return torch.randint(vocab_size, (batch_size, num_tokens), generator=generator).to(module_device(model))


def last_logits_only(model: PreTrainedModel) -> dict[str, int]:
    """The argument by which most models leave out all logits but the last token's, which generation needs."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}


def max_tokens(model: PreTrainedModel) -> int | None:
    """How many positions the model has; None where it does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
