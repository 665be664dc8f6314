"""How the budget of zeros is shared among the sites: one idea, one file, one line of the table.

Command-line choices, the service's schema, the docs and the contract tests all read this table. Torch-free: what an
allocation needs to know of the model is a few numbers per site (:class:`SiteFacts`), gathered by
:mod:`llmprune.engines.survey` where weights and inputs must be seen.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmprune.allocate.budget import Budget
from llmprune.spec import Scope

Facts = Literal["shapes", "scores", "curves"]


@dataclass(frozen=True)
class SiteFacts:
    """What is known of one site before it is pruned.

    Attributes:
        name: path of the site.
        block: index of its decoder block.
        shape: (out_features, in_features).
        group: sites of one group get one sparsity where curves decide: the experts of a parameter.
        num_outliers: weights whose Wanda score is above ``OUTLIER_FACTOR`` times the mean score of their block.
        pq_index: PQ index of the site's Wanda scores, in [0, 1).
        curve: (sparsity, distortion) of the whole group, sparsities rising, distortions in nats per token.
    """

    name: str
    block: int
    shape: tuple[int, int]
    group: str = ""
    num_outliers: int = 0
    pq_index: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Allocator:
    """One line of the table.

    Attributes:
        name: what the user types, and the name of the file in this folder.
        needs: the facts it reads: the shapes alone, the Wanda scores, or measured distortion curves.
        summary: one sentence.
        paper: reference with its equation.
        searches: what it allocates is where a search over the model itself begins.
    """

    name: str
    needs: Facts
    summary: str
    paper: str
    searches: bool = False

    def allocate(self, sites: Sequence[SiteFacts], sparsity: float, scope: Scope) -> dict[str, int]:
        """Zeros per site, by name; together exactly ``Budget.num_zeros``.

        Raises:
            ConfigError: the budget cannot be met; names the closest one that can.
        """
        budget = Budget.of([site.shape for site in sites], sparsity, scope)
        module: Any = importlib.import_module(f"llmprune.allocate.{self.name}")
        wishes = module.zeros(sites, budget)
        counts = budget.apportion(wishes)
        return {site.name: count for site, count in zip(sites, counts, strict=True)}


_TABLE = (
    Allocator("uniform", "shapes", "The same sparsity everywhere.", "baseline"),
    Allocator(
        "erk", "shapes", "More of the small and thin matrices is kept: density grows with (out + in) / (out * in).",
        "Evci et al. 2020, arXiv 1911.11134, section 3",
    ),
    Allocator(
        "owl", "scores", "Blocks whose Wanda scores hold more outliers keep more.",
        "Yin et al. 2023, arXiv 2310.05175, section 3.2",
    ),
    Allocator(
        "pqi", "scores", "Sites whose Wanda scores are spread more evenly keep more, by the PQ index.",
        "Diao et al. 2023, arXiv 2302.05601, section 3",
    ),
    Allocator(
        "dp", "curves", "The least sum of measured distortions, by exact dynamic programming.",
        "after Xu et al. 2023, arXiv 2308.10438, section 3",
    ),
    Allocator(
        "evolution", "curves", "The least divergence of the whole pruned model, by evolutionary search from dp's result.",
        "Sieberling et al. 2024, arXiv 2410.14649, section 3", searches=True,
    ),
)  # fmt: skip
ALLOCATORS: dict[str, Allocator] = {allocator.name: allocator for allocator in _TABLE}
