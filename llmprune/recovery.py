"""Training a pruned checkpoint back towards the dense model, zeros and shapes kept: ``llmprune recover``."""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack, find_stack, probe
from llmprune.continuations import Continuations
from llmprune.description import IN_MEMORY
from llmprune.devices import environment, memory_errors, module_device, pick_device
from llmprune.engines.adapters import require_peft
from llmprune.engines.recover import Trained, make_accelerator, recover_
from llmprune.errors import ConfigError, UserError, one_line
from llmprune.events import Event, Progress, Recovered, Stage, StageFinished, StageStarted, Warned
from llmprune.io import checkpoint
from llmprune.io.models import Source, load_model, load_tokenizer, local_directory, locate, quantization_of, resolve
from llmprune.io.text import TokenSet, check_source, load_calibration, load_evaluation
from llmprune.measure.dispatch import dispatched
from llmprune.measure.quality import Forward, Scores, as_events, score_text
from llmprune.measure.quality import against as against_dense
from llmprune.measure.writing import prepare_prompts, write_all
from llmprune.processes import is_first
from llmprune.recovery_spec import NO_TEACHER, RecoverConfig
from llmprune.report import Quality, Recovery, Report
from llmprune.spec import PACKING_METHOD, PruneConfig, default_seq_len

RECORD = "recovery.json"
"""The recovery beside the weights; where the checkpoint has a report, it is part of that too."""


def recover(model: str | Path, *, out: str | Path, **fields: Any) -> Recovery:
    """Train a pruned checkpoint back towards the dense model and write it to ``out``; zeros and shapes stay.

    Args:
        model: directory or hub ID of a pruned checkpoint: with zeros, n:m, or sliced; not packed.
        out: the new directory.
        fields: of :class:`~llmprune.recovery_spec.RecoverConfig` by name.

    Raises:
        UserError: it is packed or no checkpoint, ``out`` is in the way, the text is too short, the teacher has another
            vocabulary or tokenizer, peft is missing, or the loss is not finite any more.
    """
    for event in recover_iter(model, out=out, **fields):
        if isinstance(event, Recovered):
            return event.recovery
    raise AssertionError("a recovery ends with Recovered")


def recover_iter(model: str | Path, *, out: str | Path, **fields: Any) -> Iterator[Event]:
    """:func:`recover` as a generator of events; the last one is Recovered. Closing it cancels and leaves nothing behind."""
    config = RecoverConfig.build(model=str(model), **fields)
    if config.mode == "lora":
        require_peft()
    device = pick_device(config.device)
    checkpoint.check_output(Path(out), local_directory(config.model))
    with checkpoint.disk_errors(Path(out)), memory_errors():
        yield from _Recovery(config, Path(out), device).run()


@dataclass
class _Recovery:
    config: RecoverConfig
    out: Path
    device: torch.device
    warnings: list[str] = field(default_factory=list)

    def run(self) -> Iterator[Event]:
        begun = time.perf_counter()
        yield StageStarted(stage="load", total=2)
        yield from self._load()
        yield StageFinished(stage="load", seconds=time.perf_counter() - begun)
        yield from self._load_texts()
        accelerator = make_accelerator(self.device, self.model.dtype, self.config)
        self.device = accelerator.device
        self.model.to(self.device)
        stack = self._stack()
        with ExitStack() as placed:
            if self.teacher is not None:
                placed.enter_context(dispatched(self.teacher, self.device))
            dense = yield from self._measure_dense()
            before = yield from self._measure(dense)
            zeros = _count_zeros(stack)
            training = recover_(
                self.model, stack, *self._split(), self._teach if self.teacher is not None else None, self.config, accelerator
            )
            trained = yield from self._train(training)
            after = yield from self._measure(dense)
        recovery = Recovery(
            config=self.config,
            teacher=self.teacher_name,
            environment=environment(self.device),
            text=self.text.report,
            num_held_out=self.config.num_held_out,
            num_trained=trained.num_trained,
            num_weights=sum(site.numel for sites in stack.sites for site in sites),
            num_zeros_before=zeros,
            num_zeros_after=_count_zeros(stack),
            points=trained.points,
            rolled_back=trained.rolled_back,
            quality_before=before,
            quality_after=after,
            seconds=time.perf_counter() - begun,
            warnings=tuple(self.warnings),
            out=str(self.out),
        )
        yield from self._save(recovery)

    def _load(self) -> Iterator[Event]:
        """The student, what its report says of its pruning, its tokenizer, and the teacher."""
        config = self.config
        loading = config.loading(config.model, config.revision)
        path = locate(loading)
        if quantization_of(path, loading).get("quant_method") == PACKING_METHOD:
            raise ConfigError(
                f"{config.model} is packed, and packed weights cannot be trained. Make it dense first: "
                f"llmprune convert {config.model} --to dense."
            )
        self.source = resolve(loading)
        checkpoint.check_output(self.out, self.source.path)
        checkpoint.check_disk(self.out, self.source.weights_bytes)
        manifest = checkpoint.read_any_manifest(self.source.path)
        self.report = manifest[1] if manifest else None
        self.pruning = self.report.config if self.report else loading
        self.in_memory = self.report is not None and self.report.model.revision == IN_MEMORY
        for text in (self._data(), *self._evals()):
            check_source(text, evaluation=text in self._evals())
        self.tokenizer = load_tokenizer(self.source.path, loading)
        self.model = load_model(self.source, loading, torch.device("cpu"))
        yield Progress(stage="load", done=1, total=2, detail=config.model)
        self.teacher: PreTrainedModel | None = None
        self.teacher_name: str | None = None
        yield from self._load_teacher()

    def _load_teacher(self) -> Iterator[Event]:
        config = self.config
        if config.teacher == NO_TEACHER:
            return
        if config.teacher is None and (self.report is None or self.in_memory):
            yield self._warn(f"nothing beside {config.model} names its dense model: it learns from the text alone.")
            return
        loading = config.loading(config.teacher or self.pruning.model, None if config.teacher else self.pruning.revision)
        try:
            source = resolve(loading)
        except UserError as error:
            if config.teacher is not None:
                raise
            yield self._warn(f"it learns from the text alone: {one_line(error)}. Name the dense model with --teacher.")
            return
        if config.teacher is None and self.report and source.revision != self.report.model.revision:
            yield self._warn(f"{source.name} is not what it was when {config.model} was pruned from it.")
        self._check_tokens(source, loading)
        self.teacher = load_model(source, loading, torch.device("cpu")).requires_grad_(False)
        self.teacher_name = source.name
        theirs, ours = _vocab_size(self.teacher), _vocab_size(self.model)
        if theirs != ours:
            raise ConfigError(
                f"{source.name} has {theirs} tokens and {config.model} {ours}: --teacher needs the same vocabulary."
            )

    def _check_tokens(self, source: Source, loading: PruneConfig) -> None:
        theirs, ours = load_tokenizer(source.path, loading).get_vocab(), self.tokenizer.get_vocab()
        if theirs != ours:
            differing = sum(theirs.get(token) != number for token, number in ours.items())
            raise ConfigError(
                f"the tokenizer of {source.name} has {len(theirs)} tokens and that of {self.config.model} {len(ours)}, of "
                f"which {differing} are others: --teacher needs the same tokenizer. Give the model it was pruned from, or none."
            )

    def _data(self) -> str:
        return self.config.data or self.pruning.calibration_source(in_memory=self.in_memory)

    def _evals(self) -> tuple[str, ...]:
        return self.pruning.eval_sources(in_memory=self.in_memory) if self.config.eval is None else self.config.eval

    def _load_texts(self) -> Iterator[Event]:
        config, begun = self.config, time.perf_counter()
        yield StageStarted(stage="calibration", total=1 + len(self._evals()))
        seq_len = config.seq_len or self.pruning.seq_len or default_seq_len(self.model.config.get_text_config())
        self.text = load_calibration(
            self._data(), self.tokenizer, num_samples=config.num_samples, seq_len=seq_len, seed=config.seed,
            model=self.model if self.teacher is None else self.teacher,
        )  # fmt: skip
        limit = config.max_eval_tokens or self.pruning.max_eval_tokens
        self.evals: list[TokenSet] = [
            load_evaluation(source, self.tokenizer, seq_len=seq_len, max_tokens=limit) for source in self._evals()
        ]
        yield StageFinished(stage="calibration", seconds=time.perf_counter() - begun)

    def _split(self) -> tuple[Tensor, Tensor]:
        """What is trained on, and what is held out."""
        ids_NS = self.text.ids_NS
        return ids_NS[: -self.config.num_held_out], ids_NS[-self.config.num_held_out :]

    def _stack(self) -> Stack:
        ids = torch.arange(16, device=self.device)[None] % _vocab_size(self.model)
        return probe(self.model, find_stack(self.model), ids)

    def _teach(self, ids_NS: Tensor) -> Tensor:
        assert self.teacher is not None
        logits: Tensor = self.teacher(input_ids=ids_NS.to(module_device(self.teacher)), use_cache=False).logits
        return logits

    def _measure_dense(self) -> Generator[Event, None, list[Quality]]:
        """The teacher on all evaluation texts; without one what the report says of these very texts."""
        if self.teacher is None:
            known = {item.text.sha256: item.perplexity_dense for item in (self.report.quality if self.report else ())}
            return [Quality(text=text.report, perplexity_dense=known.get(text.report.sha256)) for text in self.evals]
        scores = yield from self._score("dense", self.teacher, None)
        return [
            Quality(text=text.report, perplexity_dense=score.perplexity, seconds_dense=score.seconds)
            for text, score in zip(self.evals, scores, strict=True)
        ]

    def _measure(self, dense: Sequence[Quality]) -> Generator[Event, None, tuple[Quality, ...]]:
        """The student as it is, against the teacher where there is one."""
        teacher = (lambda _batch, ids_NS: self._teach(ids_NS)) if self.teacher is not None else None
        scores = yield from self._score("pruned", self.model, teacher)
        return tuple(against_dense(item, score) for item, score in zip(dense, scores, strict=True))

    def _score(self, stage: Stage, model: PreTrainedModel, dense: Forward | None) -> Generator[Event, None, list[Scores]]:
        """A model on all evaluation texts."""
        found: list[Scores] = []
        total, done, begun = sum(len(text.ids_NS) for text in self.evals), 0, time.perf_counter()
        yield StageStarted(stage=stage, total=total)
        for text in self.evals:
            scoring = score_text(model, text.ids_NS, dense=dense)
            found.append((yield from as_events(scoring, stage, text.report.source, offset=done, total=total)))
            done += len(text.ids_NS)
        yield StageFinished(stage=stage, seconds=time.perf_counter() - begun)
        return found

    def _train(self, training: Generator[Any, None, Trained]) -> Generator[Event, None, Trained]:
        begun, steps = time.perf_counter(), self.config.steps
        detail, loss = "", None
        yield StageStarted(stage="recover", total=steps)
        while True:
            try:
                point = next(training)
            except StopIteration as stop:
                trained: Trained = stop.value
                break
            if isinstance(point, int):
                yield Progress(stage="recover", done=point, total=steps, detail=detail, value=loss)
            else:
                detail, loss = f"held-out loss {point.loss:.4f}", point.loss
        yield StageFinished(stage="recover", seconds=time.perf_counter() - begun)
        if left := trained.left_out:
            yield self._warn(
                f"{len(left)} matrices that several blocks share were not trained, e.g. {left[0]}; --mode full trains them."
            )
        if trained.rolled_back:
            yield self._warn(
                "no step lowered the held-out loss: the weights are as they were. Try another --lr, or more --steps."
            )
        return trained

    def _save(self, recovery: Recovery) -> Iterator[Event]:
        """Under ``accelerate launch`` all processes have the same weights, and the first one writes them."""
        if not is_first():
            yield Recovered(recovery=recovery)
            return
        begun = time.perf_counter()
        yield StageStarted(stage="save", total=1)
        folder = self.out.with_name(f".{self.out.name}.tmp")
        try:
            checkpoint.save_weights(
                self.model, folder, tokenizer=None, source=self.source.path, code=self.config.trust_remote_code
            )
            recovery = recovery.model_copy(update={"checkpoint_bytes": checkpoint.weights_bytes(folder)})
            (folder / RECORD).write_text(recovery.model_dump_json(indent=1), encoding="utf-8")
            if self.report is None:
                checkpoint.finish_plain(folder, self.out, packed=False)
            else:
                report = self._reported(self.report, recovery)
                checkpoint.finish(folder, self.out, report, {}, checkpoint.license_of(self.source.path))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        yield StageFinished(stage="save", seconds=time.perf_counter() - begun)
        yield Recovered(recovery=recovery)

    def _reported(self, report: Report, recovery: Recovery) -> Report:
        """The report of the pruning, with the recovery, and the quality of the weights as they are now."""
        return report.model_copy(
            update={
                "recovery": recovery,
                "quality": recovery.quality_after,
                "continuations": self._continued(report.continuations),
                "tasks": None,  # they were another model's
                "num_zeros_model": sum(int((parameter == 0).sum()) for parameter in self.model.parameters()),
                "warnings": (*report.warnings, *recovery.warnings),
                "out": recovery.out,
                "checkpoint_bytes": recovery.checkpoint_bytes,
            }
        )

    def _continued(self, before: Continuations | None) -> Continuations | None:
        """What the weights as they are now make of the prompts of the pruning."""
        if before is None or not before.dense:
            return before
        prompts = prepare_prompts(self.model, self.tokenizer, self.pruning.prompt, name=self.config.model)
        if prompts.texts != before.prompts:
            return None
        with dispatched(self.model, self.device):
            return before.model_copy(update={"pruned": write_all(self.model, self.tokenizer, prompts)})

    def _warn(self, message: str) -> Warned:
        self.warnings.append(message)
        return Warned(message=message)


def _vocab_size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _count_zeros(stack: Stack) -> int:
    return sum(int((site.stored == 0).sum()) for sites in stack.sites for site in sites)
