"""What can be done, and what was achieved: methods, and the finished jobs of a model beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Annotated, Any

from fastapi import APIRouter, Query

from llmprune.methods import METHODS, STRUCTURAL
from llmprune.spec import PruneConfig
from llmprune_service.api import auth
from llmprune_service.api.deps import JobsDep
from llmprune_service.api.openapi import KEYED
from llmprune_service.api.views import Methods, MethodView, Pareto, ParetoPoint
from llmprune_service.jobs import Row

router = APIRouter(prefix="/v1", tags=["results"], responses=KEYED)
_COPIED = ("text", "decode_tokens_per_second", "prefill_tokens_per_second", "checkpoint_bytes")


@router.get("/methods", summary="Pruning methods")
def methods(_: auth.reader) -> Methods:
    """With the JSON Schema of their parameters."""
    views = [
        MethodView(
            name=method.name, summary=method.summary, paper=method.paper, needs=method.needs.name.lower(),
            scope=method.scope, updates_weights=method.updates_weights,
            pattern=method.structure,
        )
        for method in (*METHODS.values(), *STRUCTURAL.values())
    ]  # fmt: skip
    return Methods(data=views, config_schema=PruneConfig.model_json_schema())


@router.get("/pareto", summary="Sparsity against perplexity")
def pareto(principal: auth.reader, jobs: JobsDep, model: Annotated[str, Query(description="As it was submitted.")]) -> Pareto:
    """The finished jobs of a model, and which of them are on the front."""
    return Pareto(data=points(jobs.pareto(principal.sees, model=model)))


def points(rows: Sequence[Row]) -> list[ParetoPoint]:
    """A point for each row of jobs; perplexities are compared on the same text only."""
    front = _front([row for row in rows if row.result and row.result["perplexity_pruned"] is not None])
    return [_point(row, row.id in front) for row in rows if row.result]


def _front(rows: Sequence[Row]) -> set[str]:
    """From the sparsest on: each job that beats all sparser ones on its text."""
    best: dict[str, float] = {}
    front = set()
    for row in sorted(rows, key=lambda row: (-row.result["sparsity"], float(row.result["perplexity_pruned"]))):
        text, perplexity = row.result["text"], float(row.result["perplexity_pruned"])
        if perplexity < best.get(text, inf):
            best[text] = perplexity
            front.add(row.id)
    return front


def _point(row: Row, on_front: bool) -> ParetoPoint:
    result: dict[str, Any] = row.result
    perplexities = {name: result[name] for name in ("perplexity_dense", "perplexity_pruned")}
    return ParetoPoint(
        job_id=row.id, method=row.method, pattern=row.pattern, sparsity=result["sparsity"], on_front=on_front,
        created_at=row.created_at, **perplexities, **{name: result[name] for name in _COPIED},
    )  # fmt: skip
