"""PQ index: what a site can spare follows from how unequal its Wanda scores are (Diao et al. 2023, arXiv 2302.05601)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmprune.allocate import SiteFacts
    from llmprune.allocate.budget import Budget

P, Q = 1.0, 2.0
"""The index is 1 - d^(1/Q - 1/P) ||x||_P / ||x||_Q over the d scores x of a site: 0 where they are equal."""


def zeros(sites: Sequence[SiteFacts], budget: Budget) -> list[float]:
    """Zeros per site: densities in the ratio of the paper's lower bound on what must be kept, (1 - index)^(PQ / (Q - P))
    (with eta = 0), times the one factor that meets the target.

    Departure from the paper: its own schedule prunes, rewinds and trains again, which is not done here; the bound serves
    as a ratio alone, and the index is that of the Wanda scores, as the weights of language models are near to Gaussian
    and hardly tell sites apart.
    """
    power = P * Q / (Q - P)
    return budget.scale([(1 - site.pq_index) ** power for site in sites])
