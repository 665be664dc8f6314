"""What groups are worth where nothing is solved for: by the variance of their inputs (FLAP), or by their weights (magnitude).

O out, I in features of a consumer; G groups of C columns; P groups of all modules; R columns that go.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from llmprune.errors import ConfigError
from llmprune.stats import LinearStats
from llmprune.structured.path import columns_of
from llmprune.structured.units import Module


def fluctuation_worth(module: Module, stats: LinearStats) -> Tensor:
    """FLAP's worth of every group, fp64 [G]: comparable between modules (arXiv 2312.11983).

    Of a column j it is WIFV_j = Var(x_j) ||W_:j||^2, for attention squared once more as in the released code, standardized by
    the mean and the deviation over the module's columns; of a group, the mean over its columns.
    """
    weight_OI = module.consumer.weight_OI.double()
    worth_I = stats.variance_I.to(weight_OI) * weight_OI.square().sum(0)
    if module.kind == "attention":
        worth_I = worth_I.square()
    worth_I = worth_I - worth_I.mean()
    deviation = worth_I.square().sum().div(max(len(worth_I) - 1, 1)).sqrt()
    standard_I = worth_I / deviation.clamp(min=torch.finfo(torch.float64).tiny)
    worth_G: Tensor = standard_I.unflatten(0, (-1, module.group_size)).mean(1)
    return worth_G


def magnitude_worth(module: Module) -> Tensor:
    """The root mean square of all that goes with each group, fp64 [G]: its columns of the consumer, its rows of the producers
    and their biases.
    """
    square_G = module.consumer.weight_OI.double().square().sum(0).unflatten(0, (-1, module.group_size)).sum(1)
    for part in module.producers:
        square_R = part.site.weight_OI.double().square().sum(1)
        bias_R = getattr(part.site.module, "bias", None)
        if isinstance(bias_R, Tensor):
            square_R = square_R + bias_R.detach().double().square()
        square_G = square_G + square_R[part.rows_GR.to(square_R.device)].sum(1).to(square_G.device)
    worth_G: Tensor = (square_G / module.parameters_per_group).sqrt()
    return worth_G


def parameters_that_go(modules: Sequence[Module], sparsity: float) -> int:
    """How many parameters this share of the modules' is, rounded up.

    Raises:
        ConfigError: it cannot go where every module keeps a group.
    """
    total = sum(module.parameters_per_group * module.num_groups for module in modules)
    spare = total - sum(module.parameters_per_group for module in modules)
    needed = ceil(Fraction(repr(float(sparsity))) * total)  # repr: 0.3 means three tenths, not the float a little below them
    if needed > spare:
        raise ConfigError(
            f"a sparsity of {sparsity} cannot be reached: every module keeps a group, and {spare / max(total, 1):.4f} is "
            "the most. Use a lower --sparsity."
        )
    return needed


def below_one_threshold(modules: Sequence[Module], worths: Sequence[Tensor], sparsity: float) -> list[int]:
    """How many groups of each module lie below one threshold for all, so that this share of the modules' parameters goes: the
    least number of groups that reaches it, in the order of their worth. Each module keeps its best group.

    FLAP weighs a head as 512/3 channels; here each group counts the parameters that go with it.

    Raises:
        ConfigError: the share cannot be reached.
    """
    needed = parameters_that_go(modules, sparsity)
    if not needed:
        return [0] * len(modules)
    sizes = [module.parameters_per_group for module in modules]
    sorted_ones = [worth_G.cpu().sort().values[:-1] for worth_G in worths]
    owner_P = torch.cat([torch.full((len(part),), index) for index, part in enumerate(sorted_ones)])
    owner_P = owner_P[torch.cat(sorted_ones).argsort(stable=True)]
    gone_P = torch.tensor(sizes)[owner_P].cumsum(0)
    number = int((gone_P < needed).sum()) + 1
    return owner_P[:number].bincount(minlength=len(modules)).tolist()


def best(worth_G: Tensor, removed: int) -> Tensor:
    """The groups that stay once so many of the least worth are gone, rising, int64; of equals the later one stays."""
    return worth_G.argsort(stable=True)[removed:].sort().values.cpu()


def compensation(module: Module, stats: LinearStats, kept_G: Tensor) -> Tensor:
    """The consumer's bias that makes up for the mean of the inputs that go, b + W_:R mean(x_R), fp64 [O] (FLAP):
    over the calibration tokens the module then puts out the same mean.
    """
    weight_OI, bias_O = module.consumer.weight_OI, getattr(module.consumer.module, "bias", None)
    gone_I = torch.ones(weight_OI.shape[1], dtype=torch.bool, device=weight_OI.device)
    gone_I[columns_of(kept_G.to(weight_OI.device), module.group_size)] = False
    shift_O = weight_OI.double()[:, gone_I] @ stats.mean_I.to(weight_OI.device, torch.float64)[gone_I]
    return shift_O if bias_O is None else shift_O + bias_O.detach().double()
