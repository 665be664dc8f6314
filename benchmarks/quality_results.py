"""The results of `make bench-quality`, and what follows from them: gaps, their noise, and the share of SparseGPT's closed.

The gap of a pruned model is ln(perplexity) - ln(dense perplexity), in nats per token, on the windows that both were scored on.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality_variants import QUALITY, Cell, Grid, Model

BASELINE = "sparsegpt"
NOISE = 2.0
"""A difference of so many standard errors is more than noise."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float

    @property
    def is_below_zero(self) -> bool:
        """By more than noise."""
        return self.mean < -NOISE * self.error

    @property
    def is_above_zero(self) -> bool:
        """By more than noise."""
        return self.mean > NOISE * self.error


@dataclass
class Results:
    """The file of results: the models' settings, and what was measured by cell of a grid."""

    models: dict[str, Model] = field(default_factory=dict)
    cells: dict[str, Result] = field(default_factory=dict)
    grid: Grid = field(default_factory=lambda: QUALITY, repr=False)

    @classmethod
    def read(cls, file: Path, grid: Grid = QUALITY) -> Results:
        """Of a file; empty where there is none."""
        return cls.parse(json.loads(file.read_text()), grid) if file.exists() else cls(grid=grid)

    @classmethod
    def parse(cls, stored: dict[str, Any], grid: Grid = QUALITY) -> Results:
        """Of what such a file holds."""
        models = {name: Model(name, value["fields"], value["skip"]) for name, value in stored["models"].items()}
        return cls(models, stored["cells"], grid)

    def write(self, file: Path) -> None:
        """A line a cell; the file is whole at any time."""
        models = {name: {"fields": model.fields, "skip": model.skip} for name, model in self.models.items()}
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(self.cells.items()))
        new = file.with_suffix(".tmp")
        new.write_text(f'{{"models": {json.dumps(models)},\n"cells": {{\n{lines}\n}}}}\n')
        new.replace(file)

    def add(self, cell: Cell, result: Result) -> None:
        """File the result of a cell."""
        self.cells[cell.key] = {"hash": cell.hash, **result}

    def cell(self, cell: Cell) -> Result | None:
        """What is known of a cell, unless it is of other settings."""
        found = self.cells.get(cell.key)
        return found if found and found["hash"] == cell.hash else None

    def is_done(self, cell: Cell, limit_seconds: float) -> bool:
        """Whether a cell needs no measuring: it has a result, or had at least as much time."""
        found = self.cell(cell)
        if found is None or found["status"] == "failed":
            return False
        return found["status"] == "ok" or found["limit_seconds"] >= limit_seconds

    def get(self, model: str, variant: str, target: str) -> Result | None:
        """:meth:`cell` by names; None also where this version knows no such cell."""
        variants = self.grid.variants
        known = model in self.models and variant in variants and target in variants[variant].targets
        return self.cell(Cell(self.models[model], variants[variant], target, self.grid)) if known else None

    def measured(self, model: str, variant: str, target: str) -> Result | None:
        """The same, where it holds a perplexity."""
        found = self.get(model, variant, target)
        return found if found and found["status"] == "ok" else None

    @property
    def num_stale(self) -> int:
        """Results of settings or variants that are no longer these; the tables leave them out."""
        known = {cell.key: cell.hash for cell in self.grid.cells(self.models.values())}
        return sum(known.get(key) != result["hash"] for key, result in self.cells.items())

    def gap(self, model: str, variant: str, target: str) -> Estimate | None:
        """Of one cell, against the dense model."""
        found = self.measured(model, variant, target)
        return _estimate(found["differences"], gap_of(found)) if found else None

    def change(self, model: str, variant: str, other: str, target: str) -> Estimate | None:
        """How much larger a variant's gap is than the other's, window by window on the same text."""
        one, two = self.measured(model, variant, target), self.measured(model, other, target)
        if one is None or two is None:
            return None
        pairs = zip(one["differences"], two["differences"], strict=True)
        return _estimate([first - second for first, second in pairs], gap_of(one) - gap_of(two))

    def closed(self, model: str, variant: str, target: str) -> Estimate | None:
        """The share of SparseGPT's gap that a variant closes: 1 is dense, 0 is SparseGPT, below 0 is worse."""
        change, gap = self.change(model, variant, BASELINE, target), self.gap(model, BASELINE, target)
        if change is None or gap is None or gap.mean <= 0:
            return None
        return Estimate(0.0 - change.mean / gap.mean, change.error / gap.mean)


def gap_of(result: Result) -> float:
    """ln(perplexity) - ln(dense perplexity)."""
    return math.log(result["perplexity"]) - math.log(result["perplexity_dense"])


def _estimate(differences: list[float], mean: float) -> Estimate:
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return Estimate(mean, math.nan)
    return Estimate(mean, statistics.stdev(differences) / math.sqrt(len(differences)))
