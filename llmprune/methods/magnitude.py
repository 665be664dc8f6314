"""Magnitude pruning: the score is |W_ij| (Han et al. 2015, arXiv 1506.02626, section 3). O out, I in features."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.stats import LinearStats


def score(weight_OI: Tensor, stats: LinearStats, *, generator: torch.Generator) -> Tensor:
    """|W_ij|, fp32 [O, I]."""
    return weight_OI.float().abs()
