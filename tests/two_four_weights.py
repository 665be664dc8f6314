"""Models with zeros, made in no time: what is pruned here is pruned by magnitude."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmprune.anatomy.blocks import find_stack


@torch.no_grad()
def prune_(model: nn.Module, sparsity: float | None = None) -> nn.Module:
    """Set weights of all sites to zero, in place: to 2:4, or to an unstructured sparsity."""
    for sites in find_stack(model).sites:
        for site in sites:
            if site.shape[1] % 4 == 0 or sparsity is not None:
                weight_OI = site.weight_OI
                weight_OI.copy_(two_four_of(weight_OI) if sparsity is None else sparse_of(weight_OI, sparsity))
    return model


def two_four_of(weight_OI: Tensor) -> Tensor:
    """The two largest of every four are kept."""
    groups_OG4 = weight_OI.reshape(weight_OI.shape[0], -1, 4)
    keep = torch.zeros_like(groups_OG4, dtype=torch.bool).scatter_(-1, groups_OG4.abs().topk(2, -1).indices, True)
    return torch.where(keep, groups_OG4, 0.0).reshape(weight_OI.shape).to(weight_OI.dtype)


def sparse_of(weight_OI: Tensor, sparsity: float) -> Tensor:
    """The largest of the whole matrix are kept."""
    order = weight_OI.abs().flatten().argsort()
    flat = weight_OI.flatten().clone()
    flat[order[: round(sparsity * len(flat))]] = 0.0
    return flat.view(weight_OI.shape)
