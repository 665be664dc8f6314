"""The stage ``load``: the model, where its weights wait, its blocks and sites, and what is refused because of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from llmprune import memory
from llmprune.anatomy.blocks import Stack, find_stack, probe
from llmprune.anatomy.sites import check_pattern
from llmprune.description import describe_model
from llmprune.devices import free_bytes, module_device
from llmprune.engines.survey import check_budget
from llmprune.errors import ConfigError, NonFiniteError, UnsupportedModel
from llmprune.events import Event, Progress
from llmprune.hidden import Place
from llmprune.io import checkpoint
from llmprune.io.models import load_model, load_tokenizer, resolve
from llmprune.io.streaming import load_streamed, not_streamed
from llmprune.job.state import JobState
from llmprune.linalg import all_finite
from llmprune.measure.dispatch import dispatched
from llmprune.refining import check_refinement
from llmprune.spec import Pattern, default_seq_len
from llmprune.structuring.stage import check_structure


def load(job: JobState) -> Iterator[Event]:
    """Load the model, or only its skeleton, and find what of it can be pruned."""
    clock = job.clock("load")
    yield clock.started(3)
    if job.model is None:
        job.source = resolve(job.config)
        yield Progress(stage="load", done=1, total=3, detail=str(job.source.name))
        if job.out is not None:
            checkpoint.check_output(job.out, job.source.path)
            checkpoint.check_disk(job.out, (3 if job.config.export == "packed" else 2) * job.source.dense_bytes)
        job.tokenizer = job.tokenizer or load_tokenizer(job.source.path, job.config)
        place = _place(job)
        if place == "disk":
            job.model, job.streamed = load_streamed(job.source, job.config)
        else:
            job.model = load_model(job.source, job.config, job.device if place == "device" else torch.device("cpu"))
    elif module_device(job.model).type != "cpu":
        job.device = module_device(job.model)
    if job.tokenizer is None:
        raise ConfigError("a model in memory needs its tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...).")
    yield Progress(stage="load", done=2, total=3)
    job.model.eval()
    if job.device.type == "cpu" and job.model.dtype in (torch.float16, torch.bfloat16):
        yield job.warn(
            f"most CPUs emulate {str(job.model.dtype).removeprefix('torch.')}; --dtype float32 can be many times faster."
        )
    text_config = job.model.config.get_text_config()
    job.seq_len = job.config.seq_len or default_seq_len(text_config)
    job.stack = probed(job)
    _check_sites(job, job.stack)
    if not job.streamed:  # which is checked as it comes
        _check_finite(job.stack)
    job.model_report = describe_model(job.model, job.stack, job.source)
    yield clock.finished()


def _place(job: JobState) -> Place:
    """Where the weights wait; a run that is resumed goes on with those that it had. Of several processes all leave them on disk
    where one of them has to.
    """
    assert job.source is not None
    reason, streamed = job.agreed(partial(_streaming, job))
    if job.config.offload == "disk" and reason:
        raise ConfigError(f"weights cannot stay on disk {reason}.")
    if streamed:
        return "disk"
    device_free = free_bytes(job.device) if job.device.type != "cpu" else None
    place = memory.weights_place(
        job.config.offload, job.source.bytes_in(job.config.dtype), device_free=device_free,
        cpu_free=free_bytes(torch.device("cpu")),
    )  # fmt: skip
    places = job.shares.together(lambda: place) if job.shares else [place]
    if "disk" in places:
        return "cpu" if reason else "disk"
    return place


def _streaming(job: JobState) -> tuple[str | None, bool]:
    """Why the weights cannot stay on disk, if so; and whether they did in the run that is resumed."""
    recorded = job.journal_of(job.out) if job.out and job.resume else None
    streamed = recorded is not None and recorded.exists and recorded.recorded().get("streamed", False)
    return not_streamed(job.config, job.out), streamed


def probed(job: JobState) -> Stack:
    """Find the stack of blocks, and what can be known of it by a forward."""
    assert job.model is not None
    with dispatched(job.model, job.device):
        ids_1S = torch.arange(16, device=module_device(job.model))[None] % job.model.config.get_text_config().vocab_size
        return probe(job.model, replace(find_stack(job.model), weights=job.streamed), ids_1S)


def _check_sites(job: JobState, stack: Stack) -> None:
    pattern = Pattern.parse(job.config.pattern)
    if pattern.structure:
        assert job.model is not None
        check_structure(job.config, job.model, stack)
        return
    chosen = job.sites()
    if not chosen:
        raise UnsupportedModel(
            f"nothing to prune: {sum(map(len, stack.sites))} sites in {stack.path}, all taken out by --skip."
        )
    check_pattern(chosen, pattern)
    check_budget(job.config, chosen)
    check_refinement(job.config, job.model, chosen)


def _check_finite(stack: Stack) -> None:
    for index, block in enumerate(stack.blocks):
        for name, parameter in block.named_parameters():
            if parameter.is_floating_point() and not all_finite(parameter):
                raise NonFiniteError(
                    f"{stack.name(index)}: its weight {name} holds NaN or inf. The checkpoint is damaged: download it again."
                )
