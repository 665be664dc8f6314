"""Random pruning: a uniform score, the floor every method must beat. O out, I in features."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.stats import LinearStats


def score(weight_OI: Tensor, stats: LinearStats, *, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), fp32 [O, I]; drawn on the CPU so that every device prunes the same weights.

    Weights that are already zero score -1: pruning what is pruned costs nothing.
    """
    uniform_OI = torch.rand(weight_OI.shape, generator=generator).to(weight_OI.device)
    return uniform_OI.where(weight_OI != 0, -1.0)
