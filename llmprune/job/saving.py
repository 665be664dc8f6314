"""The stage ``save``: the checkpoint and its report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from llmprune.conversion import pack_folder_, packing_warnings
from llmprune.devices import device_name, environment
from llmprune.events import Event, Progress
from llmprune.io import checkpoint
from llmprune.job.state import JobState
from llmprune.measure.latency import DENSE_NOTE
from llmprune.methods import method_of
from llmprune.report import Latency, Report


def save(job: JobState) -> Iterator[Event]:
    """Write the checkpoint beside its place, then put it there; without one, only the report is made."""
    clock = job.clock("save")
    if job.out is None:
        job.report = _report(job, None)
        return
    yield clock.started(2)
    assert job.model is not None
    folder = job.out.with_name(f".{job.out.name}.tmp")
    try:
        source = job.source.path if job.source else None
        rest, shards = (job.streamed.rest, _shards(job)) if job.streamed else (None, [])
        checkpoint.save_weights(
            job.model, folder, tokenizer=job.tokenizer, source=source, code=job.config.trust_remote_code,
            rest=rest, shards=shards,
        )  # fmt: skip
        yield Progress(stage="save", done=1, total=2)
        if job.config.export == "packed":
            yield from _pack(job, folder)
        finished = clock.finished()
        job.report = _report(job, checkpoint.weights_bytes(folder))
        fingerprint = job.fingerprint if job.journal else {}
        checkpoint.finish(folder, job.out, job.report, fingerprint, checkpoint.license_of(source))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    yield finished
    if job.journal:
        job.journal.remove()


def _pack(job: JobState, folder: Path) -> Iterator[Event]:
    """Pack what was just written; where nothing gets smaller by it the checkpoint stays dense, with a warning."""
    assert job.model is not None
    packed = yield from pack_folder_(folder, job.model, "save")
    for message in packing_warnings(packed):
        yield job.warn(message)
    if packed.num_sites:
        job.packed = packed
    else:
        yield job.warn("nothing was packed: this checkpoint is an ordinary dense one.")


def _report(job: JobState, checkpoint_bytes: int | None) -> Report:
    assert job.model is not None
    latency = None
    if job.pruned.speed:
        note = "" if job.structure else DENSE_NOTE
        latency = Latency(device=device_name(job.device), dense=job.dense.speed, pruned=job.pruned.speed, note=note)
    return Report(
        config=job.config,
        model=job.model_report,
        environment=environment(job.device),
        calibration=job.calibration.report,
        scope=job.config.target(method_of(job.config).scope).scope,
        walk="none" if job.structure else job.walk_kind,
        allocation=job.allocation,
        refinement=job.refinement,
        structure=job.structure,
        blocks=tuple(job.blocks),
        quality=job.pruned.quality,
        latency=latency,
        continuations=job.continuations,
        tasks=job.scores,
        stages=tuple(job.stages),
        statistics=tuple(job.statistics),
        num_zeros_model=_num_zeros(job),
        warnings=tuple(job.warnings),
        resumed=job.resumed,
        out=str(job.out) if job.out else None,
        checkpoint_bytes=checkpoint_bytes,
        packed=job.packed,
        benchmark=job.benchmark,
    )


def _shards(job: JobState) -> list[Path]:
    """The files of the pruned blocks of a model that is streamed."""
    assert job.journal is not None
    return [job.journal.weights_file(index) for index in range(len(job.stack.blocks))]


def _num_zeros(job: JobState) -> int:
    """Of the whole model."""
    assert job.model is not None
    blocks = 0
    if job.streamed and job.journal:
        blocks = sum(job.journal.num_zeros(index) for index in range(len(job.stack.blocks)))
    return blocks + sum(int((parameter == 0).sum()) for parameter in job.model.parameters() if not parameter.is_meta)
