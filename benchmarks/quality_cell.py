"""One cell of `make bench-quality` or `make bench-structured` in a process of its own.

Fields come as JSON on stdin, the result goes as JSON into a file.

python -m benchmarks.quality_cell RESULT < FIELDS
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from benchmarks import structured_cell
from benchmarks.children import end_with_parent
from benchmarks.structured_cell import Busy
from llmprune.events import Finished, StageFinished
from llmprune.io.text import load_evaluation
from llmprune.job import Job
from llmprune.measure.dispatch import dispatched
from llmprune.measure.quality import Scores, replay_head, score_text
from llmprune.report import Report
from llmprune.spec import PruneConfig

STORY_END = "<|endoftext|>"
NOT_PRUNING = ("load", "calibration", "dense", "pruned", "save")
"""Stages that any job has; the time and memory of all others are what a variant costs."""


def measure(fields: dict[str, Any]) -> dict[str, Any]:
    """Prune as asked, and score the dense and the pruned model window by window on the same tokens.

    ``differences`` are the windows' mean losses, pruned - dense, in nats per token; ``peak_bytes`` is what the process held
    at most while pruning, above what it held before it loaded the model. Of a structured job there is more:
    :func:`benchmarks.structured_cell.found`.
    """
    idle = psutil.Process().memory_info().rss
    config = PruneConfig.build(**{**fields, "eval": (), "latency": False, "prompt": ()})
    job = Job(config)
    windows: list[Tensor] = []
    hidden: list[Tensor] = []  # the head's inputs of the dense model, by window
    dense: list[Scores] = []
    planned: dict[str, Any] = {}
    busy, share = Busy(), 1.0
    report: Report | None = None
    for event in job.run():
        if isinstance(event, StageFinished) and event.stage == "calibration":
            text = load_evaluation(fields["eval"], job.tokenizer, seq_len=job.seq_len, max_tokens=config.max_eval_tokens)
            windows = [*text.ids_NS.split(1)]
            with dispatched(job.model, job.device):
                dense = [_last(score_text(job.model, ids, keep=hidden)) for ids in windows]
                planned = structured_cell.planned(job)
            busy = Busy()
        if isinstance(event, Finished):
            report, share = event.report, busy.share(job.device)
    assert report and report.walk and windows
    with dispatched(job.model, job.device):
        pruned = [_score(job, ids, kept) for ids, kept in zip(windows, hidden, strict=True)]
    result = _result(report, dense, pruned, idle, sum(ids.numel() for ids in windows))
    return result | structured_cell.found(report, planned, share)


def _result(report: Report, dense: list[Scores], pruned: list[Scores], idle: int, num_tokens: int) -> dict[str, Any]:
    stages = {stage.name: stage for stage in report.stages if stage.name not in NOT_PRUNING}
    before, after = [_loss(scores) for scores in dense], [_loss(scores) for scores in pruned]
    peaks = [max(stage.peak_cpu_bytes or 0, idle) - idle + (stage.peak_gpu_bytes or 0) for stage in stages.values()]
    return {
        "perplexity_dense": _exp(statistics.fmean(before)),
        "perplexity": _exp(statistics.fmean(after)),
        "kl": statistics.fmean(scores.kl or 0.0 for scores in pruned),
        "top1": statistics.fmean(scores.top1_agreement or 0.0 for scores in pruned),
        "seconds": sum(stage.seconds for stage in stages.values()),
        "stages": {name: round(stage.seconds, 2) for name, stage in stages.items()},
        "peak_bytes": max(peaks),
        "sparsity": report.sparsity,
        "walk": report.walk,
        "tokens": num_tokens,
        "where": f"{report.environment.device}, torch {report.environment.torch}",
        "differences": [round(late - early, 5) for early, late in zip(before, after, strict=True)],
    }


def _score(job: Job, ids_1S: Tensor, hidden_1SH: Tensor) -> Scores:
    assert job.model is not None
    model = job.model
    return _last(score_text(model, ids_1S, dense=lambda _batch, ids: replay_head(model, job.stack, ids, hidden_1SH)))


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _loss(scores: Scores) -> float:
    return math.log(scores.perplexity)


def _last(scoring: Generator[int, None, Scores]) -> Scores:
    while True:
        try:
            next(scoring)
        except StopIteration as stop:
            scores: Scores = stop.value
            return scores


def split_stories(files: Iterable[Path], folder: Path) -> dict[str, str]:
    """JSON lines of the stories of text files that mark where one ends, by the file's path; others are left alone.

    The marker is foreign to the models: spelt out it is a twelfth of a story's tokens and most of its loss.
    """
    made = {}
    for file in files:
        text = file.read_text(encoding="utf-8")
        if STORY_END in text:
            copy = folder / f"{file.stem}.jsonl"
            stories = [story.strip() for story in text.split(STORY_END)]
            copy.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories if story))
            made[str(file)] = str(copy)
    return made


def main() -> None:
    """Read, measure, write."""
    end_with_parent()
    fields = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as temporary:
        texts = {fields[name] for name in ("calibration", "eval") if Path(fields[name]).is_file()}
        copies = split_stories(map(Path, sorted(texts)), Path(temporary))
        fields = {name: copies.get(value, value) if isinstance(value, str) else value for name, value in fields.items()}
        result = measure(fields)
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
