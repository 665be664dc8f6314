"""The Python API: the same objects in and out as on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.benchmarking import benchmark as benchmark
from llmprune.conversion import convert as convert
from llmprune.errors import ConfigError, UnsupportedModel
from llmprune.evaluation import evaluate as evaluate
from llmprune.events import Event, Finished
from llmprune.fetching import fetch as fetch
from llmprune.generation import generate as generate
from llmprune.inspection import inspect as inspect
from llmprune.io.exports import export_report as export_report
from llmprune.io.exports import read_report as read_report
from llmprune.job import Job
from llmprune.loading import load as load
from llmprune.planning import plan as plan
from llmprune.recovery import recover as recover
from llmprune.recovery import recover_iter as recover_iter
from llmprune.report import Report
from llmprune.spec import PruneConfig
from llmprune.sweeps.auto import auto as auto
from llmprune.sweeps.auto import auto_iter as auto_iter
from llmprune.sweeps.comparing import compare as compare
from llmprune.sweeps.running import sweep as sweep
from llmprune.sweeps.running import sweep_iter as sweep_iter

Model = str | Path | nn.Module


def prune(
    model: Model | None = None,
    config: PruneConfig | None = None,
    *,
    out: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    resume: bool = False,
    **overrides: Any,
) -> Report:
    """Prune a model and return the report.

    Args:
        model: hub ID, directory, or a transformers model in memory, which is pruned in place. None is the bundled one.
        config: the job; ``overrides`` are fields of PruneConfig by name and take precedence.
        out: directory for the checkpoint; None writes nothing.
        tokenizer: needed for a model in memory.
        resume: go on with the journal an unfinished run left beside ``out``; what is finished already is returned.

    Raises:
        LlmpruneError: any of the tree in :mod:`llmprune.errors`; UserError is the caller's to mend.
    """
    for event in prune_iter(model, config, out=out, tokenizer=tokenizer, resume=resume, **overrides):
        if isinstance(event, Finished):
            return event.report
    raise AssertionError("a job ends with Finished")


def prune_iter(
    model: Model | None = None,
    config: PruneConfig | None = None,
    *,
    out: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    resume: bool = False,
    **overrides: Any,
) -> Iterator[Event]:
    """:func:`prune` as a generator of events; the last one is Finished and carries the report. Closing it cancels."""
    in_memory = None
    if isinstance(model, nn.Module):
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModel(f"{type(model).__name__} is not a transformers PreTrainedModel.")
        in_memory = model
        if resume:
            raise ConfigError("a model in memory cannot be resumed: only runs that load from a name keep a journal.")
    elif model is not None:
        overrides["model"] = str(model)
    job = Job(
        PruneConfig.build(config, **overrides),
        model=in_memory,
        tokenizer=tokenizer,
        out=Path(out) if out is not None else None,
        resume=resume,
    )
    yield from job.run()
