"""Uniform: the target sparsity everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmprune.allocate import SiteFacts
    from llmprune.allocate.budget import Budget


def zeros(sites: Sequence[SiteFacts], budget: Budget) -> list[float]:
    """Zeros per site.

    A job with uniform allocation takes no allocation at all: every site is rounded by itself. This is the same up to
    rounding.
    """
    return budget.shift([budget.sparsity] * len(sites))
