"""Zero-shot tasks in a report: scores of the dense and the pruned model with their standard errors. Torch-free."""

from __future__ import annotations

import math

from pydantic import computed_field

from llmprune.speed import Part

CLEAR = 2.0
"""Standard errors of a difference beyond which it is called one."""


class TaskScore(Part):
    """One metric of one task, as the harness names them. A model evaluated alone is ``pruned``.

    Standard errors are the harness's; None where it has none. ``num_samples`` is None for a group of tasks.
    """

    task: str
    metric: str
    higher_is_better: bool = True
    version: str = ""
    num_fewshot: int | None = None
    num_samples: int | None = None
    dense: float | None = None
    dense_stderr: float | None = None
    pruned: float | None = None
    pruned_stderr: float | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def change(self) -> float | None:
        """Pruned minus dense."""
        return None if self.pruned is None or self.dense is None else self.pruned - self.dense

    @computed_field  # type: ignore[prop-decorator]
    @property
    def is_clear(self) -> bool | None:
        """Whether the change is beyond two standard errors of a difference of independent scores; None where unknown.

        Both models answer the same questions, so that their scores go together: this errs towards "not clear".
        """
        if self.change is None or self.dense_stderr is None or self.pruned_stderr is None:
            return None
        return abs(self.change) > CLEAR * math.hypot(self.dense_stderr, self.pruned_stderr)


class TaskReport(Part):
    """What lm-evaluation-harness measured, and with which version.

    ``limit`` is the number of examples of each task, None for all of them.
    """

    harness: str
    limit: int | None = None
    scores: tuple[TaskScore, ...] = ()
    seconds_dense: float = 0.0
    seconds_pruned: float = 0.0


def side_by_side(dense: TaskReport | None, pruned: TaskReport) -> TaskReport:
    """One report of two models, each measured alone."""
    if dense is None:
        return pruned
    known = {(score.task, score.metric): score for score in dense.scores}
    scores = []
    for score in pruned.scores:
        other = known.get((score.task, score.metric))
        update = {"dense": other.pruned, "dense_stderr": other.pruned_stderr} if other else {}
        scores.append(score.model_copy(update=update))
    return pruned.model_copy(update={"scores": tuple(scores), "seconds_dense": dense.seconds_pruned})
