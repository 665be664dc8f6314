"""Prefill and decode speed of a model as it stands, in tokens per second."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.devices import module_device
from llmprune.measure.phases import last_logits_only
from llmprune.measure.timing import Run, quartiles, seconds_of
from llmprune.speed import Phase, Speed

DENSE_NOTE = (
    "Zeros stored in dense tensors bring no speed: both models do the same arithmetic, and any difference here is noise."
)


@torch.no_grad()
def measure_speed(model: PreTrainedModel, ids_NS: Tensor, *, num_decode: int = 32, repeats: int = 7) -> tuple[Speed, ...]:
    """Median and quartiles of ``repeats`` timed runs after one warm-up, at the batch size of ``ids_NS``.

    Prefill reads all tokens of ``ids_NS`` [N, S]; decode then generates ``num_decode`` tokens greedily, one at a time,
    with the KV cache. Models without a cache are measured in prefill alone.
    """
    device = module_device(model)
    ids_NS = ids_NS.to(device)
    batch_size, seq_len = ids_NS.shape
    options = last_logits_only(model)

    def prefill() -> Any:
        return model(input_ids=ids_NS, use_cache=True, **options)

    times = [seconds_of(Run(prefill), device) for _ in range(repeats + 1)]
    speeds = [_speed("prefill", batch_size, seq_len, times[1:])]
    if getattr(prefill(), "past_key_values", None) is None:
        return tuple(speeds)

    def decode(output: Any) -> None:
        token_N1 = output.logits[:, -1:].argmax(-1)
        for _ in range(num_decode):
            output = model(input_ids=token_N1, past_key_values=output.past_key_values, use_cache=True)
            token_N1 = output.logits[:, -1:].argmax(-1)

    times = []
    for _ in range(repeats + 1):
        start = prefill()  # every run decodes from its own fresh cache
        times.append(seconds_of(Run(partial(decode, start)), device))
    speeds.append(_speed("decode", batch_size, num_decode, times[1:]))
    return tuple(speeds)


def _speed(phase: Phase, batch_size: int, num_tokens: int, times: list[float]) -> Speed:
    low, median, high = quartiles([batch_size * num_tokens / seconds for seconds in times])
    return Speed(
        phase=phase,
        batch_size=batch_size,
        num_tokens=num_tokens,
        repeats=len(times),
        tokens_per_second=median,
        quartiles=(low, high),
    )
