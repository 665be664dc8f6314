"""Zero-shot tasks, by EleutherAI's lm-evaluation-harness: the extra ``tasks``. The harness does the work."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.errors import ConfigError, LlmpruneError, TextError, TextUnreachable, one_line
from llmprune.events import Event, Progress, Stage
from llmprune.spec import PruneConfig
from llmprune.task_report import TaskReport, TaskScore

BATCH_SIZE = 8
"""Requests a forward; the harness sorts them by length."""
NOT_RUN = "the model does not fit on the device, or is read from disk block by block, and the harness needs it whole"
_UNREACHABLE = (
    "Connect this machine, once for `llmprune fetch MODEL --tasks {task}`, or name tasks of your own with --tasks-path."
)


@dataclass(frozen=True)
class Tasks:
    """Tasks whose data are here, ready to be run on a model."""

    names: tuple[str, ...]
    manager: Any
    limit: int | None
    num_fewshot: int | None
    seed: int

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stage: Stage, steps: int
    ) -> Generator[Event, None, TaskReport]:
        """Progress of the stage, all of whose ``steps`` are done, with each task before it begins; returns the scores, as those
        of a pruned model.
        """
        from lm_eval import simple_evaluate

        begun = time.perf_counter()
        scores: list[TaskScore] = []
        with _quiet():
            subject = _subject(model, copy.deepcopy(tokenizer))
        for name in self.names:
            yield Progress(stage=stage, done=steps, total=steps, detail=f"task {name}")
            with _quiet(), _task_errors(name):
                results = simple_evaluate(
                    subject, tasks=[name], num_fewshot=self.num_fewshot, limit=self.limit, task_manager=self.manager,
                    fewshot_random_seed=self.seed, random_seed=None, numpy_random_seed=None, torch_random_seed=None,
                    log_samples=False,
                )  # fmt: skip
            scores += scores_of(results)
        return TaskReport(
            harness=version("lm_eval"), limit=self.limit, scores=tuple(scores), seconds_pruned=time.perf_counter() - begun
        )


def open_tasks(config: PruneConfig) -> Tasks | None:
    """The tasks of a job, their data read once, so that what is wrong with one is known before the work; None without any.

    Raises:
        ConfigError: the harness is not installed, there is no such task, or its definition makes no sense.
        TextUnreachable: the data of a task are on the hub, which does not answer.
        TextError: they are not where the task says.
    """
    if not config.tasks:
        return None
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("tasks need EleutherAI's lm-evaluation-harness: pip install 'llmprune[tasks]'.")
    folder = Path(config.tasks_path) if config.tasks_path else None
    if folder and not folder.is_dir():
        raise ConfigError(f"--tasks-path {folder} is not a directory; it holds the YAML files of tasks.")
    with _quiet():
        manager = _manager(config.tasks, folder)
        for name in config.tasks:
            with _task_errors(name):
                manager.load([name])
    return Tasks(config.tasks, manager, config.task_limit, config.num_fewshot, config.seed)


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """The harness's index of tasks; of the thousands it comes with only where a name is not in ``folder``."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or manager.match_tasks(list(names)) != sorted(names):
        manager = TaskManager(include_path=folder)
    known = manager.all_tasks
    for name in names:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, known, 3)
            hint = f"Did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists them."
            raise ConfigError(f"there is no task {name!r} in lm-evaluation-harness{f' or {folder}' if folder else ''}. {hint}")
    return manager


def scores_of(results: Mapping[str, Any]) -> list[TaskScore]:
    """The harness's results of one call, a score for every metric of every task and group."""
    scores = []
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            samples = results.get("n-samples", {}).get(task, {}).get("effective")
            better = results.get("higher_is_better", {}).get(task, {}).get(metric)
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if kind == "none" else f"{metric} ({kind})",
                    higher_is_better=better is not False,
                    version=str(results.get("versions", {}).get(task) or ""),
                    num_fewshot=results.get("n-shot", {}).get(task),
                    num_samples=samples,
                    pruned=float(value),
                    pruned_stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                )
            )
    return scores


def _subject(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model as the harness wants it, which draws no bars of its own."""
    from lm_eval.models.huggingface import HFLM

    class Subject(HFLM):  # type: ignore[misc]
        def loglikelihood(self, requests: Any, **_: Any) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, **_: Any) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    return Subject(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH_SIZE)


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither bars nor warnings of the harness and its data between the lines of a job."""
    import datasets
    import lm_eval.api.task as task

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with patch.object(task, "tqdm", partial(task.tqdm, disable=True)):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _task_errors(name: str) -> Iterator[None]:
    """Whatever goes wrong inside of the harness, as an error with the task's name."""
    try:
        yield
    except LlmpruneError:
        raise
    except ConnectionError as error:
        raise TextUnreachable(
            f"the data of task {name} cannot be had ({one_line(error)}). {_UNREACHABLE.format(task=name)}"
        ) from None
    except FileNotFoundError as error:
        raise TextError(f"the data of task {name} are not where it says: {one_line(error)}.") from None
    except (KeyError, TypeError, ValueError, ImportError, OSError) as error:
        raise ConfigError(f"task {name} cannot be run: {one_line(error)}.") from None
