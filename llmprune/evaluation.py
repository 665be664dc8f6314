"""Evaluating a model as it lies on disk, alone or against another: ``llmprune evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack, find_stack, probe
from llmprune.devices import device_name, environment, free_bytes, module_device, own_device, pick_device
from llmprune.engines.sharding import Shares
from llmprune.errors import ConfigError, UnsupportedModel
from llmprune.events import Evaluated, Event, StageFinished, StageStarted, Warned
from llmprune.hidden import HiddenStates
from llmprune.io.models import load_model, load_tokenizer, resolve
from llmprune.io.streaming import load_streamed
from llmprune.io.text import TokenSet, check_source, load_evaluation
from llmprune.measure.dispatch import dispatched, fits
from llmprune.measure.latency import DENSE_NOTE, measure_speed
from llmprune.measure.quality import Forward, Scores, as_events, forward_of, replay_head, score_text
from llmprune.measure.quality import against as against_dense
from llmprune.measure.streamed import NO_SPEED, score_streamed
from llmprune.measure.tasks import NOT_RUN, Tasks, open_tasks
from llmprune.memory import weights_place
from llmprune.processes import several
from llmprune.report import Evaluation, Latency, Quality, TaskReport
from llmprune.scoring import scores_of_all
from llmprune.spec import PruneConfig, default_seq_len
from llmprune.task_report import side_by_side

A = TypeVar("A")


def evaluate(model: str | Path | None = None, *, against: str | Path | None = None, **overrides: Any) -> Evaluation:
    """Perplexity of a model on every text of ``eval``; with ``against`` also the divergence from that dense model.

    Args:
        model: hub ID or directory; None is the bundled one.
        against: the dense model, with the same vocabulary.
        overrides: PruneConfig's fields ``eval``, ``tasks``, ``seq_len``, ``max_eval_tokens``, ``latency``, ``device``,
            ``offload``, ``dtype``, ``revision``, ``trust_remote_code``, and those of tasks.
    """
    for event in evaluate_iter(model, against=against, **overrides):
        if isinstance(event, Evaluated):
            return event.evaluation
    raise AssertionError("an evaluation ends with Evaluated")


def evaluate_iter(model: str | Path | None = None, *, against: str | Path | None = None, **overrides: Any) -> Iterator[Event]:
    """:func:`evaluate` as a generator of events; the last one is Evaluated.

    Of several processes (:mod:`llmprune.processes`) each scores some of the windows; all have the quality of all, and the first
    the latency.
    """
    if model is not None:
        overrides["model"] = str(model)
    config = PruneConfig.build(None, **overrides)
    sources = config.eval_sources()
    if not sources and not config.tasks:
        raise ConfigError("nothing to evaluate: give at least one --eval text, or --tasks.")
    device = own_device(config.device) if several() else pick_device(config.device)
    shares = Shares.of(device) if several() else None
    _agreed(shares, partial(_check, sources))
    tasks = _Opened()
    _agreed(shares, partial(tasks.open, config))
    yield StageStarted(stage="load", total=2 if against else 1)
    pruned = _Loaded.load(config, device)
    dense = None
    if against is not None:
        dense = _Loaded.load(config.model_copy(update={"model": str(against), "revision": None}), device)
        if dense.vocab_size != pruned.vocab_size:
            raise ConfigError(
                f"{config.model} has {pruned.vocab_size} tokens and {against} {dense.vocab_size}: "
                "--against needs the same vocabulary."
            )
    yield StageFinished(stage="load", seconds=0)
    seq_len = config.seq_len or default_seq_len(pruned.model.config.get_text_config())
    texts = _agreed(
        shares,
        lambda: [
            load_evaluation(source, pruned.tokenizer, seq_len=seq_len, max_tokens=config.max_eval_tokens) for source in sources
        ],
    )
    yield from _measure(config, pruned, dense, texts, tasks.found, device, shares)


def _check(sources: Sequence[str]) -> None:
    for source in sources:
        check_source(source, evaluation=True)


def _agreed(shares: Shares | None, work: Callable[[], A]) -> A:
    return shares.by_first(work) if shares else work()


def _measure(
    config: PruneConfig,
    pruned: _Loaded,
    dense: _Loaded | None,
    texts: list[TokenSet],
    tasks: Tasks | None,
    device: torch.device,
    shares: Shares | None,
) -> Iterator[Event]:
    windows = [shares.part(text.ids_NS) if shares else text.ids_NS for text in texts]
    total = sum(len(ids_NS) for ids_NS in windows) * (2 if dense else 1)

    def scored(scoring: Generator[int, None, Scores], text: TokenSet, ids_NS: Tensor) -> Generator[Event, None, Scores]:
        steps = as_events(scoring, "pruned", text.report.source, offset=offset, total=total)
        return scores_of_all(shares, steps, len(ids_NS)) if shares else steps

    yield StageStarted(stage="pruned", total=total)
    quality: list[Quality] = []
    offset, seconds = 0, 0.0
    for text, ids_NS in zip(texts, windows, strict=True):
        result, keep = Quality(text=text.report), HiddenStates()
        if dense:
            scores = yield from scored(dense.score(ids_NS, device, keep=keep if dense.stack else None), text, ids_NS)
            result = result.model_copy(update={"perplexity_dense": scores.perplexity, "seconds_dense": scores.seconds})
            offset += len(ids_NS)
            seconds += scores.seconds
        reference = dense.reference(keep) if dense else None
        scores = yield from scored(pruned.score(ids_NS, device, dense=reference), text, ids_NS)
        offset += len(ids_NS)
        seconds += scores.seconds
        quality.append(against_dense(result, scores))
    latency = None
    measured = config.latency and texts and (shares is None or shares.rank == 0)
    if measured and pruned.stack:
        yield Warned(message=NO_SPEED)
    elif measured:
        with dispatched(pruned.model, device):
            speeds = measure_speed(pruned.model, texts[0].ids_NS[:1])
        latency = Latency(device=device_name(device), dense=(), pruned=speeds, note=DENSE_NOTE)
    report = (yield from _examine(tasks, pruned, dense, device, total)) if tasks else None
    yield StageFinished(stage="pruned", seconds=seconds + (report.seconds_dense + report.seconds_pruned if report else 0))
    yield Evaluated(
        evaluation=Evaluation(
            model=config.model,
            against=dense.name if dense else None,
            environment=environment(device),
            quality=tuple(quality),
            latency=latency,
            tasks=report,
        )
    )


def _examine(
    tasks: Tasks, pruned: _Loaded, dense: _Loaded | None, device: torch.device, total: int
) -> Generator[Event, None, TaskReport | None]:
    """The tasks of one model, or of both; None where one of them cannot be run whole."""
    if pruned.stack or (dense and dense.stack):
        yield Warned(message=f"tasks were not run: {NOT_RUN}.")
        return None
    reports: list[TaskReport] = []
    for loaded in filter(None, (dense, pruned)):
        with dispatched(loaded.model, device):
            reports.append((yield from tasks.run(loaded.model, loaded.tokenizer, "pruned", total)))
    return side_by_side(reports[0] if dense else None, reports[-1])


@dataclass
class _Opened:
    """The tasks, which of several processes the first alone opens and runs."""

    found: Tasks | None = None

    def open(self, config: PruneConfig) -> None:
        self.found = open_tasks(config)


@dataclass(frozen=True)
class _Loaded:
    """A model to evaluate; with ``stack`` where it does not fit on the device or in memory, to be scored block by block."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    stack: Stack | None

    @classmethod
    def load(cls, config: PruneConfig, device: torch.device) -> _Loaded:
        source = resolve(config)
        tokenizer = load_tokenizer(source.path, config)
        cpu = torch.device("cpu")
        free = free_bytes(device) if device.type != "cpu" else None
        size = source.bytes_in(config.dtype)
        if weights_place(config.offload, size, device_free=free, cpu_free=free_bytes(cpu)) == "disk":
            model, weights = load_streamed(source, config)
            return cls(source.name, model, tokenizer, _probed(model, replace(find_stack(model), weights=weights), device))
        model = load_model(source, config, cpu, packed=True)
        return cls(source.name, model, tokenizer, _stack_to_stream(model, device))

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def score(
        self, ids_NS: Tensor, device: torch.device, *, dense: Forward | None = None, keep: HiddenStates | None = None
    ) -> Generator[int, None, Scores]:
        """Score one text; see :func:`score_text`."""
        if self.stack:
            return (yield from score_streamed(self.model, self.stack, ids_NS, device, dense=dense, keep=keep))
        with dispatched(self.model, device):
            return (yield from score_text(self.model, ids_NS, dense=dense, keep=keep))

    def reference(self, hidden: HiddenStates) -> Forward:
        """The model's logits [N, S, V]: of its head on what it was given, where all of the model is too much to run again."""

        def logits(batch: int, ids_NS: Tensor) -> Tensor:
            ids_NS = ids_NS.to(module_device(self.model))
            if self.stack:
                return replay_head(self.model, self.stack, ids_NS, hidden[batch])
            return forward_of(self.model)(batch, ids_NS)

        return logits


def _stack_to_stream(model: PreTrainedModel, device: torch.device) -> Stack | None:
    """The blocks of a model that does not fit on the device; None where it fits, or cannot be run block by block."""
    if fits(model, device):
        return None
    try:
        return _probed(model, find_stack(model), device)
    except UnsupportedModel:
        return None


def _probed(model: PreTrainedModel, stack: Stack, device: torch.device) -> Stack:
    with dispatched(model, device):
        ids_1S = torch.arange(16, device=module_device(model))[None] % model.config.get_text_config().vocab_size
        return probe(model, stack, ids_1S)
