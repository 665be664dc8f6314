"""What a model writes after a few prompts, greedily, several at a time.

N prompts of one batch, S tokens of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.continuations import Continued
from llmprune.devices import module_device
from llmprune.errors import ConfigError
from llmprune.measure.phases import last_logits_only, max_tokens

PROMPTS = (
    "The history of the city goes back to the early Middle Ages, when it was",
    "Once upon a time there was a little girl who lived with her mother at the",
    "The first thing to know about how a computer works is that every program is",
    "import os\n\n\ndef count_files(folder):\n    names = os.listdir(folder)\n    return",
)
"""An encyclopedia, a story, an explanation and code."""
NUM_TOKENS = 48
"""Written after each prompt: a model that falls into a loop mostly does so within them."""
NOT_WRITTEN = "the model does not fit on the device, or is read from disk block by block, and every token would read all of it"
_CONTEXT = 4
"""Tokens of the prompt that are decoded together with the text, because many tokenizers drop the first one's space."""


@dataclass(frozen=True)
class Prompts:
    """What is to be continued: the texts, their token ids [S] each, and how many tokens may follow."""

    texts: tuple[str, ...]
    ids: tuple[Tensor, ...]
    max_new_tokens: int = NUM_TOKENS


def prepare_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: Sequence[str] | None, *, name: str
) -> Prompts:
    """The prompts asked for, or llmprune's own, cut to equal lengths that leave room for the text.

    Raises:
        ConfigError: a prompt is empty, or leaves no room among the model's positions.
    """
    limit = max_tokens(model)
    if wanted is not None:
        ids = [text_ids(tokenizer, text) for text in wanted]
        longest = max(map(len, ids), default=0)
        if limit is not None and longest >= limit:
            raise ConfigError(f"a prompt has {longest} tokens, and {name} has positions for {limit}. Shorten it.")
        room = NUM_TOKENS if limit is None else min(NUM_TOKENS, limit - longest)
        return Prompts(tuple(wanted), tuple(ids), room)
    ids = [text_ids(tokenizer, text) for text in PROMPTS]
    length = min(map(len, ids))
    if limit is not None:
        length = min(length, max(1, limit // 2))
    room = NUM_TOKENS if limit is None else min(NUM_TOKENS, limit - length)
    cut = [ids_S[:length] for ids_S in ids]
    return Prompts(tuple(str(tokenizer.decode(ids_S, skip_special_tokens=True)) for ids_S in cut), tuple(cut), room)


def write_all(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> tuple[Continued, ...]:
    """What the model makes of each prompt; prompts of equal length are one batch, so that none is padded."""
    if prompts.max_new_tokens < 1:
        return tuple(Continued(text="", tokens=(), finished=False) for _ in prompts.ids)
    found: dict[int, Continued] = {}
    for length in {len(ids_S): None for ids_S in prompts.ids}:
        rows = [row for row, ids_S in enumerate(prompts.ids) if len(ids_S) == length]
        batch_NS = torch.stack([prompts.ids[row] for row in rows])
        for row, (tokens, finished) in zip(rows, greedy(model, batch_NS, prompts.max_new_tokens), strict=True):
            text = text_after(tokenizer, prompts.ids[row].tolist(), tokens)
            found[row] = Continued(text=text, tokens=tuple(tokens), finished=finished)
    return tuple(found[row] for row in range(len(prompts.ids)))


@torch.no_grad()
def greedy(model: PreTrainedModel, ids_NS: Tensor, max_new_tokens: int) -> list[tuple[list[int], bool]]:
    """The most probable tokens after each row, and whether the model ended by itself; the token that ends is left out.

    A model without a cache reads everything anew for each token.
    """
    device = module_device(model)
    options = last_logits_only(model)
    ends = end_tokens(model)
    ids_NS = inputs_NS = ids_NS.to(device)
    steps: list[list[int]] = []
    cache: Any = None
    for _ in range(max_new_tokens):
        past = {} if cache is None else {"past_key_values": cache}
        output = model(input_ids=inputs_NS, use_cache=True, **past, **options)
        token_N1 = output.logits[:, -1:].argmax(-1)
        steps.append(token_N1[:, 0].tolist())
        if all(ends.intersection(row) for row in zip(*steps, strict=True)):
            break
        cache = getattr(output, "past_key_values", None)
        ids_NS = torch.cat([ids_NS, token_N1], dim=1)
        inputs_NS = ids_NS if cache is None else token_N1
    return [_until_end(row, ends) for row in zip(*steps, strict=True)]


def _until_end(tokens: Sequence[int], ends: set[int]) -> tuple[list[int], bool]:
    at = next((at for at, token in enumerate(tokens) if token in ends), None)
    return list(tokens[:at]), at is not None


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids [S] of a text to go on with. Raises ConfigError."""
    ids = list(tokenizer(text)["input_ids"])
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise ConfigError("the prompt is empty, and this tokenizer has no token to begin with: give at least one word.")
    return torch.tensor(ids)


def text_after(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of what was written after the prompt's tokens."""
    context = list(prompt[-_CONTEXT:])
    before = str(tokenizer.decode(context, skip_special_tokens=True))
    whole = str(tokenizer.decode([*context, *tokens], skip_special_tokens=True))
    return whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode(tokens, skip_special_tokens=True))


def end_tokens(model: PreTrainedModel) -> set[int]:
    """The tokens that end a text."""
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    if ends is None:
        ends = model.config.get_text_config().eos_token_id
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}
