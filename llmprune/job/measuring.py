"""The stages ``dense``, ``pruned`` and ``benchmark``: what the model is worth, and how fast it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from llmprune._version import __version__
from llmprune.continuations import Continuations, Continued
from llmprune.errors import ConfigError
from llmprune.events import Event
from llmprune.io.journal import Journal
from llmprune.job.state import JobState
from llmprune.measure.benchmark import benchmark_models
from llmprune.measure.tasks import NOT_RUN
from llmprune.measure.writing import NOT_WRITTEN
from llmprune.packing import can_pack, pack_, packable, swap_, unpack_
from llmprune.processes import first_says, wait_for_all
from llmprune.report import Quality, Speed, TaskReport
from llmprune.scoring import Scores, Scoring
from llmprune.task_report import side_by_side
from llmprune.walking import own_place

_DENSE = "dense"
_HIDDEN = "hidden.safetensors"


def measure_dense(job: JobState) -> Iterator[Event]:
    """Measure the model before anything is changed, or take it from the journal."""
    clock = job.clock("dense")
    if job.shares:
        directory = first_says(lambda: job.journal.directory if job.journal else None)
        job.own = own_place(directory, job.shares)
        if job.streamed and not all(job.shares.together(lambda: job.journal is not None or job.own is not None)):
            if job.journal and not job.resumed:
                job.journal.remove()  # nothing was done
            raise ConfigError(
                "weights stay on disk where every process sees the folder of --out: each reads from it what the first has "
                "pruned. Use --offload cpu, or a file system that the machines share."
            )
    scoring = _scoring(job)
    if data := _recorded_dense(job):
        yield clock.started(scoring.num_windows, resumed_at=scoring.num_windows)
        job.dense = Scores(
            tuple(Quality.model_validate(item) for item in data["quality"]),
            tuple(Speed.model_validate(item) for item in data["speed"]),
            written=tuple(Continued.model_validate(item) for item in data.get("written", ())),
            tasks=TaskReport.model_validate(data["tasks"]) if data.get("tasks") else None,
        )
        yield clock.finished(data["seconds"])
        return
    yield clock.started(scoring.num_windows)
    job.dense = yield from job.noted(scoring.run("dense"))
    if job.own:
        job.own.write(_DENSE, {}, {_HIDDEN: dict(job.dense.hidden)})
    if job.shares:
        wait_for_all()  # the record says that all have theirs
    if place := _dense_place(job):
        place.write(
            _DENSE,
            {
                "quality": [item.model_dump(mode="json") for item in job.dense.quality],
                "speed": [item.model_dump(mode="json") for item in job.dense.speed],
                "written": [item.model_dump(mode="json") for item in job.dense.written],
                "tasks": job.dense.tasks.model_dump(mode="json") if job.dense.tasks else None,
                "seconds": clock.seconds,
            },
            {_HIDDEN: dict(job.dense.hidden)},
        )
    if place or job.own:
        job.dense = replace(job.dense, hidden={})  # read again, from the disk, when they are wanted
    yield clock.finished()


def _recorded_dense(job: JobState) -> dict[str, Any] | None:
    """What an earlier run recorded of the dense model; of several processes where each finds its hidden states."""
    place = _dense_place(job) or job.own

    def found() -> dict[str, Any] | None:
        return place.read(_DENSE, [_HIDDEN]) if place and place.has(_DENSE) else None

    recorded = job.shares.together(found) if job.shares else [found()]
    return recorded[0] if all(recorded) else None


def _dense_place(job: JobState) -> Journal | None:
    """Where measurements of the dense model are recorded: with those of other jobs that take the same, or in the journal."""
    if job.dense_records is None or job.shares or job.source is None:
        return job.journal
    assert job.model is not None
    same = {
        "revision": job.source.revision,
        "texts": [text.report.sha256 for text in job.texts],
        "seq_len": job.seq_len,
        "dtype": str(job.model.dtype),
        "device": str(job.device),
        "streamed": job.streamed is not None,
        "prompt": job.calibration.report.sha256 if job.config.latency else None,
        "continued": job.config.prompt,
        "tasks": [job.config.tasks, job.config.tasks_path, job.config.task_limit, job.config.num_fewshot, job.config.seed],
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    place = Journal(job.dense_records / hashlib.sha256(json.dumps(same).encode()).hexdigest()[:32])
    place.directory.mkdir(parents=True, exist_ok=True)
    return place


def measure_pruned(job: JobState) -> Iterator[Event]:
    """Measure it again, against what it was."""
    clock = job.clock("pruned")
    scoring = _scoring(job)
    yield clock.started(scoring.num_windows)
    place = _dense_place(job) or job.own
    dense = replace(job.dense, hidden=place.tensors(_DENSE, _HIDDEN)) if place else job.dense
    job.pruned = yield from job.noted(scoring.run("pruned", dense))
    yield from _compare_writing(job, streamed=scoring.streamed)
    if job.tasks and scoring.streamed:
        yield job.warn(f"tasks were not run: {NOT_RUN}.")
    job.scores = side_by_side(job.dense.tasks, job.pruned.tasks) if job.pruned.tasks else None
    yield clock.finished()


def _compare_writing(job: JobState, *, streamed: bool) -> Iterator[Event]:
    """Put what both models wrote side by side, with a warning where the pruned one no longer can."""
    prompts = job.prompts
    if not prompts.texts or not job.first:
        return
    job.continuations = Continuations(
        prompts=prompts.texts, max_new_tokens=prompts.max_new_tokens, dense=job.dense.written, pruned=job.pruned.written,
        skipped=NOT_WRITTEN if streamed else None,
    )  # fmt: skip
    if job.continuations.verdict.status == "degenerate":
        yield job.warn(f"the pruned model {job.continuations.verdict.text[:1].lower()}{job.continuations.verdict.text[1:]}")


def benchmark(job: JobState) -> Iterator[Event]:
    """Speed of the dense and the packed model, for a packed checkpoint; afterwards the model is dense again."""
    model = job.model
    assert model is not None
    if job.config.export != "packed" or not job.config.latency or job.streamed or not can_pack(model):
        return

    del job.stack  # its sites would keep every dense weight alive
    layers = {path: site.module for path, site in packable(model)[0].items()} if job.in_memory else {}

    def pack() -> PreTrainedModel:
        pack_(model)
        return model

    clock = job.clock("benchmark")
    yield clock.started(0)
    try:
        job.benchmark = yield from benchmark_models(model, pack, device=job.device)
    finally:
        for path, layer in layers.items():
            swap_(model, path, layer)  # the very layers the caller knows
        unpack_(model)
    yield clock.finished()


def _scoring(job: JobState) -> Scoring:
    assert job.model is not None
    prompt_1S = job.calibration.ids_NS[:1] if job.config.latency and job.first else None
    folder = place.directory if (place := job.journal or job.own) else None
    prompts = job.prompts if job.prompts.texts and job.first else None
    return Scoring(
        job.model, job.stack, job.texts, job.device, prompt_1S, job.config.offload, folder, job.shares, job.tokenizer, prompts,
        job.tasks,
    )  # fmt: skip
