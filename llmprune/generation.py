"""Letting a model write, and another one beside it: ``llmprune generate``.

S tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.devices import environment, memory_errors, module_device, pick_device
from llmprune.errors import ConfigError
from llmprune.events import Event, StageFinished, StageStarted, TextGenerated, TextPiece
from llmprune.io.models import Source, load_model, load_tokenizer, resolve
from llmprune.loading import fuse_shared_inputs_
from llmprune.measure.phases import last_logits_only, max_tokens
from llmprune.measure.timing import synchronize
from llmprune.measure.writing import end_tokens, text_after, text_ids
from llmprune.packing import packed_layers
from llmprune.report import Generated, Generation
from llmprune.spec import PruneConfig

_CPU_NOTE = (
    "on a CPU packed weights are expanded at every call, which is slow: `llmprune convert DIR --to dense`, or "
    "llmprune.load(DIR, packed=False), gives the same model in dense weights."
)
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def generate(
    model: str | Path | PreTrainedModel | None,
    prompt: str,
    *,
    compare: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    **overrides: Any,
) -> Generation:
    """What a model writes after a prompt, and with ``compare`` what another one makes of the same prompt.

    Args:
        model: hub ID or directory, packed or dense, or a model in memory; None is the bundled one.
        prompt: the text to go on with; with ``chat`` a message to answer.
        compare: hub ID or directory of another model with the same vocabulary, loaded when the first has finished.
        tokenizer: of a model in memory.
        max_new_tokens: at most so many tokens; a model that ends by itself writes fewer.
        temperature: 0 always takes the most probable token; above, tokens are drawn from softmax(logits / temperature).
        seed: of the drawing, the same for both models.
        chat: put the prompt into the tokenizer's chat template.
        overrides: PruneConfig's fields ``device``, ``dtype``, ``revision``, ``trust_remote_code``.

    Raises:
        UserError: a value makes no sense, the prompt does not fit, there is no chat template, or a model cannot be loaded.
    """
    run = generate_iter(
        model, prompt, compare=compare, tokenizer=tokenizer, max_new_tokens=max_new_tokens, temperature=temperature,
        seed=seed, chat=chat, **overrides,
    )  # fmt: skip
    for event in run:
        if isinstance(event, TextGenerated):
            return event.generation
    raise AssertionError("writing ends with TextGenerated")


def generate_iter(
    model: str | Path | PreTrainedModel | None,
    prompt: str,
    *,
    compare: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    **overrides: Any,
) -> Iterator[Event]:
    """:func:`generate` as a generator of events: each piece of text as it is written; the last one is TextGenerated."""
    _check(max_new_tokens, temperature)
    in_memory = model if isinstance(model, PreTrainedModel) else None
    if in_memory is None and model is not None:
        overrides["model"] = str(model)
    config = PruneConfig.build(None, **overrides, seed=seed)
    device = pick_device(config.device) if in_memory is None else module_device(in_memory)
    name = config.model if in_memory is None else in_memory.name_or_path or type(in_memory).__name__
    yield StageStarted(stage="load", total=1)
    begun = time.perf_counter()
    with memory_errors():
        subject, tokenizer = (in_memory, tokenizer) if in_memory is not None else _load(config, device)
        if tokenizer is None:
            raise ConfigError("a model in memory needs its tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...).")
        ids_1S = prompt_ids(tokenizer, prompt, chat=chat, name=name).to(device)
        vocab_size = subject.config.get_text_config().vocab_size
        yield StageFinished(stage="load", seconds=time.perf_counter() - begun)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        generated = yield from _pieces(name, subject, tokenizer, ids_1S, **options)
        other = None
        if compare is not None:
            del subject, in_memory
            gc.collect()
            again = config.model_copy(update={"model": str(compare), "revision": None})
            yield StageStarted(stage="load", total=1)
            begun = time.perf_counter()
            dense = _weights(resolve(again), again, device)
            if dense.config.get_text_config().vocab_size != vocab_size:
                raise ConfigError(f"{name} and {compare} have different vocabularies: --compare needs the same one.")
            yield StageFinished(stage="load", seconds=time.perf_counter() - begun)
            other = yield from _pieces(str(compare), dense, tokenizer, ids_1S, **options)
    yield TextGenerated(
        generation=Generation(
            prompt=prompt,
            num_prompt_tokens=ids_1S.shape[1],
            environment=environment(device),
            generated=generated,
            compared=other,
        )
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool, name: str) -> Tensor:
    """Token ids [1, S] of a prompt, in the chat template or as it is. Raises ConfigError."""
    if chat:
        if not tokenizer.chat_template:
            raise ConfigError(f"{name} has no chat template: its tokenizer was not made for chat. Leave --chat out.")
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids_1S: Tensor = inputs["input_ids"]
        return ids_1S
    return text_ids(tokenizer, prompt)[None]


@torch.no_grad()
def write(
    model: PreTrainedModel, ids_1S: Tensor, *, max_new_tokens: int, temperature: float, seed: int
) -> Generator[tuple[int, float], None, bool]:
    """Token by token, each with the seconds the model took for it; returns whether the model ended by itself.

    The token that ends the text is not given out. A model without a cache reads everything anew for each token.
    """
    device = module_device(model)
    options = last_logits_only(model)
    ends = end_tokens(model)
    generator = torch.Generator().manual_seed(seed)
    inputs_1S = ids_1S
    cache: Any = None
    for _ in range(max_new_tokens):
        begun = time.perf_counter()
        past = {} if cache is None else {"past_key_values": cache}
        output = model(input_ids=inputs_1S, use_cache=True, **past, **options)
        token = _choose(output.logits[0, -1], temperature, generator)
        synchronize(device)
        seconds = time.perf_counter() - begun
        if token in ends:
            return True
        yield token, seconds
        cache = getattr(output, "past_key_values", None)
        token_11 = torch.tensor([[token]], device=device)
        inputs_1S = token_11 if cache is not None else torch.cat([inputs_1S, token_11], dim=1)
    return False


def _choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    """The most probable token, or one drawn on the CPU, so that a seed means the same on every device."""
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities_V = torch.softmax(logits_V.float().cpu() / temperature, dim=-1)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def _pieces(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids_1S: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Generator[Event, None, Generated]:
    """What a model writes, as events, characters that are not whole yet held back; returns all of it."""
    notes = [_CPU_NOTE] if module_device(model).type == "cpu" and packed_layers(model) else []
    limit = max_tokens(model)
    if limit is not None and ids_1S.shape[1] + max_new_tokens > limit:
        max_new_tokens = limit - ids_1S.shape[1]
        if max_new_tokens < 1:
            raise ConfigError(f"the prompt has {ids_1S.shape[1]} tokens, and {name} has positions for {limit}. Shorten it.")
        notes.append(f"{max_new_tokens} new tokens at most: {name} has positions for {limit}.")
    yield StageStarted(stage="generate", total=max_new_tokens)
    before = ids_1S[0].tolist()
    tokens: list[int] = []
    seconds: list[float] = []
    shown = text = ""
    writing = write(model, ids_1S, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    while True:
        try:
            token, took = next(writing)
        except StopIteration as stop:
            finished = bool(stop.value)
            break
        tokens.append(token)
        seconds.append(took)
        text = text_after(tokenizer, before, tokens)
        if not text.endswith(_UNFINISHED) and len(text) > len(shown):
            yield TextPiece(model=name, text=text[len(shown) :])
            shown = text
    if len(text) > len(shown):
        yield TextPiece(model=name, text=text[len(shown) :])
    yield StageFinished(stage="generate", seconds=sum(seconds))
    return Generated(
        model=name,
        text=text,
        tokens=tuple(tokens),
        finished=finished,
        prefill_seconds=sum(seconds[:1]),
        decode_seconds=sum(seconds[1:]),
        notes=tuple(notes),
    )


def _load(config: PruneConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = resolve(config)
    tokenizer = load_tokenizer(source.path, config)  # before the weights: it is sooner there, or not
    return _weights(source, config, device), tokenizer


def _weights(source: Source, config: PruneConfig, device: torch.device) -> PreTrainedModel:
    model = load_model(source, config, device, packed=True)
    if device.type == "cuda":
        fuse_shared_inputs_(model)
    return model


def _check(max_new_tokens: int, temperature: float) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"temperature is {temperature}; it must be 0 (greedy) or above, such as 0.7.")
