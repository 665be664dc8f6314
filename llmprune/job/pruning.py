"""The stages that change the model: allocate, prune, refine, reconstruct; or structure, which takes parts out whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from llmprune.allocation import Sharing, targets_of_sites
from llmprune.anatomy.blocks import Recording
from llmprune.engines.layerwise import Walk, block_messages, shared_sites
from llmprune.engines.permute import permutation_messages
from llmprune.engines.sharding import Shares
from llmprune.events import BlockFinished, Event, Progress, Warned
from llmprune.hidden import HiddenStates
from llmprune.io.statistics import Statistics, statistics_of
from llmprune.job.calibrating import can_pause, hidden_place
from llmprune.job.loading import probed
from llmprune.job.state import JobState
from llmprune.methods import method_of
from llmprune.processes import wait_for_all
from llmprune.refining import Refining, copy_weights, put_back, tuned_report
from llmprune.report import AllocationReport, StatisticsReport
from llmprune.spec import Need
from llmprune.structuring.choice import Setting
from llmprune.structuring.stage import Structuring
from llmprune.walking import JournaledWalk, record_batches

_ALLOCATION = "allocation"
_TUNED = "tuned"


def allocate(job: JobState) -> Iterator[Event]:
    """Share the zeros among the sites, after a survey of the dense model where the allocation needs one."""
    config = job.config
    if config.allocation == "uniform":
        return
    clock = job.clock("allocate")
    recorded = job.journal is not None and job.journal.has(_ALLOCATION)
    if data := job.agreed(lambda: job.journal.read(_ALLOCATION, []) if job.journal and recorded else None):
        job.allocation = AllocationReport.model_validate(data["allocation"])
        job.statistics += [StatisticsReport.model_validate(item) for item in data["statistics"]]
        yield clock.started(data["total"], resumed_at=data["total"])
        yield clock.finished(data["seconds"])
        return
    assert job.model is not None
    directory = job.journal.directory if job.journal else None
    sharing = Sharing(
        job.model,
        job.stack,
        config,
        job.calibration.ids_NS,
        job.batch_size,
        job.device,
        directory,
        partial(_statistics, job),
        shares=job.shares,
    )
    yield clock.started(sharing.num_steps)
    job.allocation = yield from job.noted(sharing.run())
    job.statistics += sharing.reused
    if job.journal:
        data = {"allocation": job.allocation.model_dump(mode="json"), "total": sharing.num_steps}
        data["statistics"] = [item.model_dump(mode="json") for item in sharing.reused]
        job.journal.write(_ALLOCATION, {**data, "seconds": clock.seconds}, {})
    yield clock.finished()


def prune(job: JobState) -> Iterator[Event]:
    """Walk over the blocks and prune their sites."""
    clock = job.clock("prune")
    yield clock.started(len(job.stack.blocks), resumed_at=job.journal.num_blocks() if job.journal else 0)
    assert job.model is not None
    config = job.config
    if config.refine != "none":  # the mask comes first: kept weights are tuned when it is final
        config = config.model_copy(update={"reconstruct": False})
        job.dense_weights = copy_weights(job.sites())
    start = job.agreed(lambda: job.journal.num_blocks() if job.journal else 0)
    statistics = _dense_statistics(job, start)
    known = statistics is not None and statistics.complete(start)  # then no block has to run
    recording = Recording() if known else _recording(job)
    targets = targets_of_sites(job.config, job.allocation)
    walk = Walk(
        job.stack, recording, config, job.device, targets, shares=job.shares, parts=_batches(job)[1], pausing=can_pause(job)
    )
    walk.statistics = statistics
    job.walk_kind = walk.kind
    journaled = JournaledWalk(job.model, walk, job.journal, own=job.own)
    job.blocks = journaled.restore()
    before = sum(block.seconds for block in job.blocks)
    job.warnings += [message for block in job.blocks for message in block_messages(block)]
    for event in job.noted(journaled.run(len(job.blocks))):
        if isinstance(event, BlockFinished):
            job.blocks.append(event.report)
        yield event
    if statistics is not None:
        statistics.close()
        for message in statistics.messages:
            yield job.warn(message)
        times = [block.collected for block in job.blocks if block.collected]
        job.statistics.append(
            StatisticsReport(
                stage="prune", num_blocks=len(job.blocks), num_reused=len(times), collected=min(times, default=None)
            )
        )
    if job.config.permute:
        for message in permutation_messages(job.blocks):
            yield job.warn(message)
    yield clock.finished(before + clock.seconds)


def structure(job: JobState) -> Iterator[Event]:
    """Take out what goes whole."""
    clock = job.clock("structure")
    assert job.model is not None
    structuring = structuring_of(job)
    yield clock.started(structuring.total, resumed_at=structuring.done)
    job.structure, seconds = yield from job.noted(structuring.run())
    if job.shared:
        wait_for_all()  # the others may have files in the work directory
    job.stack = probed(job)
    yield clock.finished(seconds)


def structuring_of(job: JobState) -> Structuring:
    """The stage ``structure`` of this job, as it stands in the journal."""
    assert job.model is not None
    directory = job.agreed(lambda: job.journal.directory if job.journal else None)
    setting = Setting(
        job.model, job.stack, job.config, job.calibration.ids_NS, job.batch_size, job.device, job.journal,
        directory if directory and directory.is_dir() else None, job.shared,
    )  # fmt: skip
    return Structuring(setting)


def refine(job: JobState) -> Iterator[Event]:
    """Improve the mask against the loss of the whole model."""
    if job.config.refine == "none":
        return
    clock = job.clock("refine")
    assert job.model is not None
    refining = Refining(
        job.model, job.stack, job.config, job.dense_weights, job.calibration.ids_NS, job.device, job.journal,
        job.shares or Shares.alone(),
    )  # fmt: skip
    yield clock.started(refining.total, resumed_at=refining.done)
    before = refining.seconds_before
    job.refinement = yield from job.noted(refining.run())
    if not job.config.reconstruct:
        job.dense_weights = {}
    if job.shares:
        for block in job.stack.blocks:
            job.shares.same_(block)  # other hardware may have frozen other weights
    yield clock.finished(before + clock.seconds)


def reconstruct(job: JobState) -> Iterator[Event]:
    """Tune the kept weights of a refined mask: the dense weights are put back, and the blocks walked once more."""
    if job.config.refine == "none" or not job.config.reconstruct:
        return
    clock, total = job.clock("reconstruct"), len(job.stack.blocks)
    yield clock.started(total, resumed_at=job.journal.num_blocks(_TUNED) if job.journal else 0)
    assert job.model is not None
    supports = put_back(job.sites(), job.dense_weights)
    walk = Walk(
        job.stack, _recording(job), job.config, job.device, supports=supports, shares=job.shares, parts=_batches(job)[1]
    )
    journaled = JournaledWalk(job.model, walk, job.journal, _TUNED, job.own)
    recorded = journaled.restore()
    before = sum(block.seconds for block in recorded)
    job.warnings += [message for block in recorded for message in block_messages(block)]
    for event in job.noted(journaled.run(len(recorded))):
        if isinstance(event, BlockFinished):
            recorded.append(event.report)
            yield Progress(stage="reconstruct", done=event.block + 1, total=total, detail=event.report.name)
        elif isinstance(event, Progress):
            yield event.model_copy(update={"stage": "reconstruct"})
        elif isinstance(event, Warned):
            yield event
    job.dense_weights = {}
    job.blocks = [tuned_report(*pair) for pair in zip(job.blocks, recorded, strict=True)]
    yield clock.finished(before + clock.seconds)


def _recording(job: JobState) -> Recording:
    assert job.model is not None
    place = job.journal or job.own
    hidden = HiddenStates((), hidden_place(job), place.directory if place else None)
    return record_batches(job.model, job.stack, _batches(job)[0], job.device, hidden)


def _batches(job: JobState) -> tuple[Sequence[Tensor], list[int | None] | None]:
    """The calibration sequences of this process, a batch a forward. Of several that tune blocks, which takes steps on whole
    batches: its part of each batch, and which part that is.
    """
    ids_NS = job.calibration.ids_NS
    if job.shares and job.config.reconstruct:
        return job.shares.batches(ids_NS, job.batch_size)
    return (job.shares.rows(ids_NS) if job.shares else ids_NS).split(job.batch_size), None


def _statistics(job: JobState, need: Need) -> Statistics | None:
    """The cache of what is measured on the dense model; None where there is none, as of a model without a revision."""
    if not job.config.statistics_cache or job.source is None:
        return None
    statistics = statistics_of(
        job.config, job.source, job.model, need, device=job.device, tokens=job.calibration.report.sha256,
        seq_len=job.seq_len, batch_size=job.batch_size, streamed=job.streamed is not None, shares=job.shares,
    )  # fmt: skip
    if job.shares and not all(job.shares.together(lambda: statistics is not None)):
        return None
    job.opened += [statistics] if statistics else []
    return statistics


def _dense_statistics(job: JobState, start: int) -> Statistics | None:
    """The cache, open from block ``start`` on, for a walk all of whose statistics are the dense model's: not where channels
    change places before they are collected, or where pruning a block changes a later one.
    """
    config = job.config
    if config.sequential != "none" or config.permute or shared_sites(job.stack):
        return None
    statistics = _statistics(job, method_of(config).needs)
    if statistics is not None:
        statistics.open(len(job.stack.blocks), start)
    return statistics
