"""Outlier Weighed Layerwise sparsity (Yin et al. 2023, arXiv 2310.05175, section 3.2). B blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmprune.allocate import SiteFacts
    from llmprune.allocate.budget import Budget

OUTLIER_FACTOR = 5.0
"""M: a weight is an outlier where its Wanda score is above M times the mean score of its block."""
MAX_DEVIATION = 0.08
"""lambda: the densities of the blocks spread over 2 lambda."""


def zeros(sites: Sequence[SiteFacts], budget: Budget) -> list[float]:
    """Zeros per site: one sparsity a block, 1 - density with density_b = d_b - mean(d) + 1 - sparsity.

    d_b is the block's share of outliers, mapped linearly so that the smallest becomes 0 and the largest 2 lambda. Departures
    from the reference implementation: the mean is weighted by the blocks' weights (equal where they are of one size), so
    that the target is met; densities stay within their bounds; blocks with equal shares of outliers are treated equally
    (there it divides by zero).
    """
    outliers: Counter[int] = Counter()
    weights: Counter[int] = Counter()
    for site in sites:
        outliers[site.block] += site.num_outliers
        weights[site.block] += site.numel
    shares = {block: outliers[block] / weights[block] for block in weights}
    low, high = min(shares.values()), max(shares.values())
    spread = 2 * MAX_DEVIATION / (high - low) if high > low else 0.0
    # The shift to the budget subtracts the mean.
    return budget.shift([budget.sparsity - (shares[site.block] - low) * spread for site in sites])
