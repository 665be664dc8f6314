"""Everything a job needs from the network, brought to this machine: ``llmprune fetch``.

Model and texts go to the caches of the Hugging Face libraries, through the same code a job reads them with: after it, the
same job runs with HF_HUB_OFFLINE=1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmprune.events import Downloaded, Event, Progress, StageFinished, StageStarted
from llmprune.io import text
from llmprune.io.models import resolve
from llmprune.measure.tasks import open_tasks
from llmprune.report import Fetched
from llmprune.spec import PruneConfig


def fetch(model: str | Path | None = None, config: PruneConfig | None = None, **overrides: Any) -> Fetched:
    """Download a model's files and the job's calibration and evaluation texts and tasks; no weight is loaded into memory.

    Args:
        model: hub ID or directory; None is the bundled one.
        config: the job; ``overrides`` are fields of PruneConfig by name and take precedence. Those that matter here are
            ``revision``, ``calibration``, ``eval``, ``tasks``, ``tasks_path`` and ``trust_remote_code``.

    Raises:
        UserError: the same refusals as the job itself, as far as model files and texts go.
    """
    for event in fetch_iter(model, config, **overrides):
        if isinstance(event, Downloaded):
            return event.fetched
    raise AssertionError("a download ends with Downloaded")


def fetch_iter(model: str | Path | None = None, config: PruneConfig | None = None, **overrides: Any) -> Iterator[Event]:
    """:func:`fetch` as a generator of events; the last one is Downloaded."""
    if model is not None:
        overrides["model"] = str(model)
    config = PruneConfig.build(config, **overrides)
    texts = [(config.calibration_source(), False), *((source, True) for source in config.eval_sources())]
    for source, evaluation in texts:
        text.check_source(source, evaluation=evaluation)
    begun, total = time.perf_counter(), 1 + len(texts) + bool(config.tasks)
    yield StageStarted(stage="fetch", total=total)
    found = resolve(config)
    yield Progress(stage="fetch", done=1, total=total, detail=found.name)
    for done, (source, evaluation) in enumerate(texts, start=2):
        text.fetch(source, evaluation=evaluation)
        yield Progress(stage="fetch", done=done, total=total, detail=source)
    if config.tasks:
        open_tasks(config)
        yield Progress(stage="fetch", done=total, total=total, detail=", ".join(config.tasks))
    yield StageFinished(stage="fetch", seconds=time.perf_counter() - begun)
    sources = tuple(source for source, _ in texts)
    yield Downloaded(
        fetched=Fetched(model=found.name, revision=found.revision, weights_bytes=found.weights_bytes, texts=sources)
    )
