"""Evaluating a model as it lies on disk, alone or against another: ``llmprune evaluate``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.devices import device_name, environment, module_device, pick_device
from llmprune.errors import ConfigError
from llmprune.events import Evaluated, Event, StageFinished, StageStarted
from llmprune.io.models import load_model, load_tokenizer, resolve
from llmprune.io.text import TokenSet, check_source, load_evaluation
from llmprune.measure.dispatch import dispatched
from llmprune.measure.latency import DENSE_NOTE, measure_speed
from llmprune.measure.quality import against as against_dense
from llmprune.measure.quality import as_events, score_text
from llmprune.report import Evaluation, Latency, Quality
from llmprune.spec import PruneConfig, default_seq_len


def evaluate(model: str | Path | None = None, *, against: str | Path | None = None, **overrides: Any) -> Evaluation:
    """Perplexity of a model on every text of ``eval``; with ``against`` also the divergence from that dense model.

    Args:
        model: hub ID or directory; None is the bundled one.
        against: the dense model, with the same vocabulary.
        overrides: PruneConfig's fields ``eval``, ``seq_len``, ``max_eval_tokens``, ``latency``, ``device``, ``dtype``,
            ``revision``, ``trust_remote_code``.
    """
    for event in evaluate_iter(model, against=against, **overrides):
        if isinstance(event, Evaluated):
            return event.evaluation
    raise AssertionError("an evaluation ends with Evaluated")


def evaluate_iter(model: str | Path | None = None, *, against: str | Path | None = None, **overrides: Any) -> Iterator[Event]:
    """:func:`evaluate` as a generator of events; the last one is Evaluated."""
    if model is not None:
        overrides["model"] = str(model)
    config = PruneConfig.build(None, **overrides)
    sources = config.eval_sources()
    if not sources:
        raise ConfigError("nothing to evaluate: give at least one --eval text.")
    for source in sources:
        check_source(source, evaluation=True)
    device = pick_device(config.device)
    yield StageStarted(stage="load", total=2 if against else 1)
    pruned = _Loaded.load(config)
    dense = None
    if against is not None:
        dense = _Loaded.load(config.model_copy(update={"model": str(against), "revision": None}))
        if dense.vocab_size != pruned.vocab_size:
            raise ConfigError(
                f"{config.model} has {pruned.vocab_size} tokens and {against} {dense.vocab_size}: "
                "--against needs the same vocabulary."
            )
    yield StageFinished(stage="load", seconds=0)
    seq_len = config.seq_len or default_seq_len(pruned.model.config.get_text_config())
    texts = [
        load_evaluation(source, pruned.tokenizer, seq_len=seq_len, max_tokens=config.max_eval_tokens) for source in sources
    ]
    yield from _measure(config, pruned, dense, texts, device)


def _measure(
    config: PruneConfig, pruned: _Loaded, dense: _Loaded | None, texts: list[TokenSet], device: torch.device
) -> Iterator[Event]:
    total = sum(len(text.ids_NS) for text in texts) * (2 if dense else 1)
    yield StageStarted(stage="pruned", total=total)
    quality: list[Quality] = []
    offset, seconds = 0, 0.0
    for text in texts:
        result = Quality(text=text.report)
        if dense:
            with dispatched(dense.model, device):
                scoring = score_text(dense.model, text.ids_NS)
                scores = yield from as_events(scoring, "pruned", text.report.source, offset=offset, total=total)
            result = result.model_copy(update={"perplexity_dense": scores.perplexity, "seconds_dense": scores.seconds})
            offset += len(text.ids_NS)
            seconds += scores.seconds
        with dispatched(pruned.model, device):
            scoring = score_text(pruned.model, text.ids_NS, dense=dense.logits if dense else None)
            scores = yield from as_events(scoring, "pruned", text.report.source, offset=offset, total=total)
        offset += len(text.ids_NS)
        seconds += scores.seconds
        quality.append(against_dense(result, scores))
    latency = None
    if config.latency:
        with dispatched(pruned.model, device):
            speeds = measure_speed(pruned.model, texts[0].ids_NS[:1])
        latency = Latency(device=device_name(device), dense=(), pruned=speeds, note=DENSE_NOTE)
    yield StageFinished(stage="pruned", seconds=seconds)
    yield Evaluated(
        evaluation=Evaluation(
            model=config.model,
            against=dense.name if dense else None,
            environment=environment(device),
            quality=tuple(quality),
            latency=latency,
        )
    )


@dataclass(frozen=True)
class _Loaded:
    name: str
    model: PreTrainedModel
    tokenizer: Any

    @classmethod
    def load(cls, config: PruneConfig) -> _Loaded:
        source = resolve(config)
        model = load_model(source, config, torch.device("cpu"), packed=True)
        return cls(source.name, model, load_tokenizer(source.path, config))

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def logits(self, _batch: int, ids_NS: Tensor) -> Tensor:
        """The model's logits [N, S, V]: the reference of a divergence."""
        logits: Tensor = self.model(input_ids=ids_NS.to(module_device(self.model)), use_cache=False).logits
        return logits
