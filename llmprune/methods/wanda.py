"""Wanda: the score is |W_ij| * ||x_j||_2 (Sun et al. 2023, arXiv 2306.11695, eq. 1). O out, I in features."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.stats import LinearStats


def score(weight_OI: Tensor, stats: LinearStats, *, generator: torch.Generator) -> Tensor:
    """|W_ij| * ||x_j||_2 over all calibration tokens, fp32 [O, I]; compared within each row by default."""
    return weight_OI.float().abs().mul_(stats.sq_I.sqrt())
