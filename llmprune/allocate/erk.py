"""Erdos-Renyi-Kernel: density grows with (O + I) / (O * I) (Evci et al. 2020, arXiv 1911.11134, section 3).

O out, I in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmprune.allocate import SiteFacts
    from llmprune.allocate.budget import Budget


def zeros(sites: Sequence[SiteFacts], budget: Budget) -> list[float]:
    """Zeros per site; a matrix whose density would exceed 1 stays dense and the others share what is left.

    A matrix has no kernel dimensions, so this is the Erdos-Renyi rule per site; like the reference it leaves nothing else
    out.
    """
    return budget.scale([(site.shape[0] + site.shape[1]) / site.numel for site in sites])
