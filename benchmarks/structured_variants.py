"""What `make bench-structured` compares: structured methods at two shares of the modules' parameters, and whole blocks.

All variants but those named ``kinds`` remove at least that share of the parameters; those give attention and FFN the share
each, as the paper does.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from benchmarks.quality_variants import EVERYTHING, Fields, Grid, Model, Variant, find_models
from llmprune.io.models import BUNDLED_PATH
from llmprune.spec import BUNDLED_MODEL

SHARES = ("12.5 %", "25 %")
BLOCKS = "blocks"
TARGETS: dict[str, Fields] = {
    "12.5 %": {"pattern": "structured", "sparsity": 0.125},
    "25 %": {"pattern": "structured", "sparsity": 0.25},
    "14 %": {"pattern": "structured", "sparsity": 0.14},
    "26 %": {"pattern": "structured", "sparsity": 0.26},
    BLOCKS: {"pattern": "blocks", "sparsity": 0.25},
}
ABOVE = ("14 %", "26 %")
"""The standard search at a little more too: to hold against what rounds its groups up, and so removes more than was asked."""
MIN_BLOCKS = 4
"""Of a model whose blocks are taken out: a quarter of fewer is none."""
STANDARD = "tyr-standard"
RIVALS = ("magnitude", "flap", "tyr-local")


def _tyr(preset: str, suffix: str = "", shares: tuple[str, ...] = SHARES, **fields: str) -> Variant:
    known = {"method": "tyr", "tyr_preset": preset, "budget": "parameters", **fields}
    return Variant(f"tyr-{preset}{suffix}", "search" if preset != "local" else "local", known, shares)


GRID = Grid.of(
    TARGETS,
    (
        Variant("magnitude", "baseline", {"method": "magnitude"}, SHARES),
        Variant("flap", "baseline", {"method": "flap"}, SHARES),
        _tyr("local"),
        _tyr("fast"),
        _tyr("standard", shares=(*SHARES, *ABOVE)),
        _tyr("fast", "-kinds", budget="kinds"),
        _tyr("standard", "-kinds", budget="kinds"),
        Variant("flap-uniform", "uniform", {"method": "flap", "widths": "uniform"}, SHARES),
        _tyr("standard", "-uniform", widths="uniform"),
        *(Variant(method, "blocks", {"method": method}, (BLOCKS,)) for method in ("shortgpt", "drop-one", "block-qubo")),
    ),
)


def models(root: Path) -> list[Model]:
    """Those of :func:`benchmarks.quality_variants.find_models`; those of few blocks lose none whole."""
    found = []
    for model in find_models(root):
        folder = BUNDLED_PATH if model.name == BUNDLED_MODEL else root / model.fields["model"]
        num_blocks = json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"]
        found.append(replace(model, skip={BLOCKS: EVERYTHING} if num_blocks < MIN_BLOCKS else {}))
    return found
