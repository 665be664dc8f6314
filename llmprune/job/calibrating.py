"""The stage ``calibration``: texts become tokens, a batch is chosen, and the journal of the run is opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from llmprune import memory
from llmprune._version import __version__
from llmprune.anatomy.sites import total_weights
from llmprune.devices import free_bytes
from llmprune.events import Event, Progress
from llmprune.hidden import Place
from llmprune.io.text import TokenSet, load_calibration, load_evaluation
from llmprune.job.state import JobState, config_fields
from llmprune.measure.dispatch import dispatched
from llmprune.measure.tasks import open_tasks
from llmprune.measure.writing import Prompts, prepare_prompts
from llmprune.methods import method_of
from llmprune.processes import first_says
from llmprune.spec import Need, Pattern


def calibrate(job: JobState) -> Iterator[Event]:
    """Read the texts and choose the batch."""
    clock = job.clock("calibration")
    yield clock.started(1 + len(job.eval_sources))
    assert job.model is not None and job.tokenizer is not None
    job.calibration = job.agreed(partial(_load_calibration, job))
    yield Progress(stage="calibration", done=1, total=1 + len(job.eval_sources), detail=job.calibration_source)
    job.texts = []
    for source in job.eval_sources:
        load = partial(partial(_load_evaluation, job), source)
        job.texts.append(first_says(load) if job.shares else load())
        done = 1 + len(job.texts)
        yield Progress(stage="calibration", done=done, total=1 + len(job.eval_sources), detail=source)
    job.prompts = job.agreed(partial(_prepare_prompts, job))
    job.agreed(partial(_open_tasks, job))
    if job.calibration_source in job.eval_sources and Path(job.calibration_source).exists():
        yield job.warn(f"{job.calibration_source} serves for calibration and evaluation: the perplexity is optimistic.")
    if few := _too_few_tokens(job):
        yield job.warn(few)
    job.batch_size = job.config.batch_size or _choose_batch_size(job)
    yield clock.finished()


def _load_calibration(job: JobState) -> TokenSet:
    assert job.model is not None and job.tokenizer is not None
    with dispatched(job.model, job.device) if job.calibration_source == "synthetic" else nullcontext():
        return load_calibration(
            job.calibration_source, job.tokenizer, num_samples=job.config.num_samples, seq_len=job.seq_len,
            seed=job.config.seed, model=job.model,
        )  # fmt: skip


def _load_evaluation(job: JobState, source: str) -> TokenSet:
    assert job.tokenizer is not None
    return load_evaluation(source, job.tokenizer, seq_len=job.seq_len, max_tokens=job.config.max_eval_tokens)


def _prepare_prompts(job: JobState) -> Prompts:
    assert job.model is not None and job.tokenizer is not None
    return prepare_prompts(job.model, job.tokenizer, job.config.prompt, name=job.model_report.name)


def _open_tasks(job: JobState) -> None:
    """The first of several processes alone runs them."""
    job.tasks = open_tasks(job.config)


def _too_few_tokens(job: JobState) -> str | None:
    """A warning where the calibration tokens cannot give every Gram matrix its rank."""
    widest = max((site for sites in job.stack.sites for site in sites), key=lambda site: site.shape[1])
    tokens = job.calibration.ids_NS.numel()
    if method_of(job.config).needs < Need.GRAM or tokens >= widest.shape[1]:
        return None
    return (
        f"{tokens} calibration tokens are fewer than the {widest.shape[1]} inputs of {widest.name}: its Gram matrix lacks "
        f"rank, and damping ({job.config.damping:g} of its mean diagonal) decides the rest. Use more --num-samples, or a "
        "longer --seq-len."
    )


def _choose_batch_size(job: JobState) -> int:
    assert job.model is not None
    hidden_size = job.model.config.get_text_config().hidden_size
    num_processes = job.shares.size if job.shares and not job.config.reconstruct else 1  # they take steps on one batch
    return memory.choose_batch_size(
        [site for sites in job.stack.sites for site in sites],
        num_samples=-(-job.config.num_samples // num_processes),
        seq_len=job.seq_len,
        hidden_size=hidden_size,
        itemsize=job.model.dtype.itemsize,
        need=Need.GRAM if job.config.sequential == "none" else method_of(job.config).needs,  # any method: equal batches
        one_pass=job.config.sequential == "group" and job.shares is None,
        free_bytes=free_bytes(job.device),
        on_cpu=job.device.type == "cpu",
        tuned_sites=max(job.stack.sites, key=total_weights) if job.config.reconstruct else (),
        hidden_here=hidden_place(job) in ("device", job.device.type),
    )


def can_pause(job: JobState) -> bool:
    """Whether there is room for all batches of the walk to wait at a site at once."""
    assert job.model is not None
    return memory.can_pause(
        [site for sites in job.stack.sites for site in sites],
        num_samples=job.config.num_samples,
        batch_size=job.batch_size,
        seq_len=job.seq_len,
        hidden_size=job.model.config.get_text_config().hidden_size,
        itemsize=job.model.dtype.itemsize,
        need=method_of(job.config).needs,
        free_bytes=free_bytes(job.device),
    )


def hidden_place(job: JobState) -> Place:
    """Where hidden states wait between blocks; on a CPU its memory is the device."""
    assert job.model is not None
    sets = 2 if job.config.reconstruct else 1
    hidden_size = job.model.config.get_text_config().hidden_size
    size = sets * job.calibration.ids_NS.numel() * hidden_size * job.model.dtype.itemsize
    on_cpu = job.device.type == "cpu"
    return memory.hidden_place(
        job.config.offload, size, device_free=None if on_cpu else free_bytes(job.device),
        cpu_free=free_bytes(torch.device("cpu")),
    )  # fmt: skip


def open_journal(job: JobState) -> int:
    """Only jobs that can be started again from a name keep a journal. Returns the batch size of the run."""
    if job.out is None or job.source is None:
        return job.batch_size
    job.fingerprint = {
        "revision": job.source.revision,
        "tokens": job.calibration.report.sha256,
        "batch_size": job.batch_size,
        "seq_len": job.seq_len,
        "streamed": job.streamed is not None,
        "llmprune": __version__,
        "torch": torch.__version__,
        **config_fields(job.config),
    }
    job.journal = job.journal_of(job.out)
    if Pattern.parse(job.config.pattern).structure is None:  # another number of them has other hidden states
        job.fingerprint["num_processes"] = job.shares.size if job.shares else 1
    job.resumed = job.resume and job.journal.exists
    if job.resumed:  # the batch that fits may have changed since; the run's own one is kept
        job.fingerprint["batch_size"] = job.batch_size = job.journal.recorded()["batch_size"]
    job.journal.open(job.fingerprint, resume=job.resume)
    return job.batch_size
