"""Local structured pruning by block optimal brain surgeon: a whole path of nested sparsities in one pass.

For one module min ||X W^T - X W'^T||_F^2 over W' that is zero on the removed groups of input columns (Týr-the-Pruner,
arXiv 2503.09657, section 3.2; block updates as in OSSCAR, arXiv 2403.12983). Groups go a few at a time, the rest is updated
after each, and at the asked counts the weights of the kept ones are solved for exactly.

O out, I in features, A of them alive; G groups of C consecutive columns; R columns that go at once; K columns kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmprune.errors import FactorizationError

Criterion = Literal["obs", "obs+g", "obs+|g|"]
"""What a group is worth: the exact rise of the loss without it, alone or with the signed or absolute first-order term."""


@dataclass(frozen=True)
class Level:
    """One module with some of its groups removed.

    Attributes:
        kept_G: indices of the groups that stay, rising, int64.
        weight_OK: their columns, solved for, in the weight's own dtype; the weight itself, bit for bit, where all stay.
        loss: 1/2 tr((W - W') H (W - W')^T), before the cast.
    """

    kept_G: Tensor
    weight_OK: Tensor
    loss: float


@torch.no_grad()
def nested_path(
    weight_OI: Tensor,
    hessian_II: Tensor,
    *,
    group_size: int,
    counts: Sequence[int],
    chunk: int = 1,
    criterion: Criterion = "obs+|g|",
) -> list[Level]:
    """The module with each of these numbers of groups removed; every level's groups are among those of the one before it.

    With H the damped Gram matrix and G = W H (so that the dense weights are the optimum), the worth of a group g is

        1/2 tr(W_g ([H^-1]_gg)^-1 W_g^T)  +  | <W_g, G_g> |

    of the weights and the inverse as they are after what went before. The first part is what the loss rises by, exactly. The
    second, of eq. 3 with G fixed, is a heuristic that keeps two groups which stand in for one another from going together; its
    absolute value is the paper's, the sum without it the released code's.

    Args:
        weight_OI: [O, I], any float dtype; computed in fp64.
        hessian_II: damped X^T X, positive definite, [I, I].
        group_size: C, divides I.
        counts: groups to remove, rising, from 0 to all of them.
        chunk: groups that go between two updates; the paper's are 1 head, 16 channels.
        criterion: ``obs+|g|`` is the paper's.

    Raises:
        FactorizationError: the matrix is not positive definite.
    """
    num_groups = weight_OI.shape[1] // group_size
    assert weight_OI.shape[1] == num_groups * group_size, "groups are of one size"
    assert list(counts) == sorted(set(counts)) and counts[0] >= 0 and counts[-1] <= num_groups, "rising, at most all groups"
    dense_OI, hessian_II = weight_OI.double(), hessian_II.double()
    pull_OI = dense_OI @ hessian_II
    state = _State(
        dense_OI.clone(), _inverse(hessian_II), pull_OI, torch.arange(num_groups, device=weight_OI.device), group_size
    )
    levels, removed = [], 0
    for count in counts:
        while removed < count:
            number = min(chunk, count - removed)
            state.remove_(state.worth(criterion).argsort(stable=True)[:number])
            removed += number
        levels.append(_level(weight_OI, dense_OI, hessian_II, pull_OI, state.groups_G.sort().values, group_size))
    return levels


def expectation(levels: Sequence[Level], num_groups: int, group_size: int) -> Tensor:
    """The mean weight [O, I] of the levels, each by its share of groups that stay: what one forward then puts out is the mean
    of what the levels would, as the module is linear (eq. 6).
    """
    shares = torch.tensor([len(level.kept_G) for level in levels], dtype=torch.float64)
    if not shares.sum():
        shares.fill_(1.0)
    first = levels[0].weight_OK
    mean_OI = torch.zeros(len(first), num_groups * group_size, dtype=torch.float64, device=first.device)
    for level, share in zip(levels, (shares / shares.sum()).tolist(), strict=True):
        mean_OI[:, columns_of(level.kept_G, group_size)] += share * level.weight_OK.double()
    return mean_OI.to(first.dtype)


def columns_of(groups_G: Tensor, group_size: int) -> Tensor:
    """The columns of these groups, in their order."""
    return (groups_G[:, None] * group_size + torch.arange(group_size, device=groups_G.device)).reshape(-1)


@dataclass
class _State:
    """What is left while groups go: weights, inverse and first-order term of the columns that are alive, and their groups."""

    weight_OA: Tensor
    inverse_AA: Tensor
    pull_OA: Tensor
    groups_G: Tensor
    group_size: int

    def worth(self, criterion: Criterion) -> Tensor:
        """Of every group that is alive, fp64 [G]."""
        weight_OGC = self.weight_OA.unflatten(1, (-1, self.group_size))
        blocks_GCC = self.inverse_AA.unflatten(1, (-1, self.group_size)).unflatten(0, (-1, self.group_size)).diagonal(0, 0, 2)
        blocks_GCC = blocks_GCC.permute(2, 0, 1)
        weight_GCO = weight_OGC.permute(1, 2, 0)
        worth_G: Tensor = (weight_GCO * torch.linalg.solve(blocks_GCC, weight_GCO)).sum((1, 2)) / 2
        if criterion == "obs":
            return worth_G
        slope_G: Tensor = (weight_OGC * self.pull_OA.unflatten(1, (-1, self.group_size))).sum((0, 2))
        return worth_G + (slope_G if criterion == "obs+g" else slope_G.abs())

    def remove_(self, gone_R: Tensor) -> None:
        """Take groups out, by position among those alive, and let the others make up for them."""
        keep_G = torch.ones(len(self.groups_G), dtype=torch.bool, device=gone_R.device)
        keep_G[gone_R] = False
        keep_A = keep_G.repeat_interleave(self.group_size)
        cross_AR = self.inverse_AA[keep_A][:, ~keep_A]
        factor_RR = torch.linalg.cholesky(self.inverse_AA[~keep_A][:, ~keep_A])
        spread_RA = torch.cholesky_solve(cross_AR.T, factor_RR)
        self.weight_OA = self.weight_OA[:, keep_A] - self.weight_OA[:, ~keep_A] @ spread_RA
        self.inverse_AA = self.inverse_AA[keep_A][:, keep_A] - cross_AR @ spread_RA
        self.pull_OA, self.groups_G = self.pull_OA[:, keep_A], self.groups_G[keep_G]


def _inverse(hessian_II: Tensor) -> Tensor:
    lower_II, info = torch.linalg.cholesky_ex(hessian_II)
    if int(info):
        raise FactorizationError("the damped Gram matrix is not positive definite.")
    return torch.cholesky_inverse(lower_II)


def _level(weight_OI: Tensor, dense_OI: Tensor, hessian_II: Tensor, pull_OI: Tensor, kept_G: Tensor, group_size: int) -> Level:
    """The exact weights of the groups that stay, W_K = G_K H_KK^-1: rounding of the updates does not pile up."""
    if kept_G.numel() * group_size == weight_OI.shape[1]:
        return Level(kept_G, weight_OI.clone(), 0.0)
    columns_K = columns_of(kept_G, group_size)
    solved_OK = dense_OI[:, :0]
    if len(columns_K):
        lower_KK = torch.linalg.cholesky(hessian_II[columns_K][:, columns_K])
        solved_OK = torch.cholesky_solve(pull_OI[:, columns_K].T, lower_KK).T
    change_OI = dense_OI.clone()
    change_OI[:, columns_K] -= solved_OK
    loss = float(((change_OI @ hessian_II) * change_OI).sum()) / 2
    return Level(kept_G, solved_OK.to(weight_OI.dtype).contiguous(), loss)
