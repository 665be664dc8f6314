"""The block problem: a quadratic of low rank over binary variables whose sums are fixed.

N samples, V variables (weights of the block), R candidate solutions, G groups.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import ConfigError


@dataclass(frozen=True)
class BlockProblem:
    """Minimise E(x) = 1/2 ||B x||^2 + l . x + c over x in {0, 1}^V with the sum of x in every group as it is now.

    x_i = 1 means that weight i is pruned. As x_i^2 = x_i this is x^T Q x + c with Q = 1/2 B^T B + diag(l), of which
    only the factor is held: V is thousands, N tens.

    Attributes:
        factor_NV: B, float.
        linear_V: l, same dtype and device.
        pruned_V: the present x, bool; it says how many are pruned in every group.
        group_V: group of every variable, int64, any values; None is one group.
        constant: c.
    """

    factor_NV: Tensor
    linear_V: Tensor
    pruned_V: Tensor
    group_V: Tensor | None = None
    constant: float = 0.0

    @classmethod
    def of_loss(
        cls,
        dense_V: Tensor,
        pruned_V: Tensor,
        gradient_V: Tensor,
        factor_NV: Tensor,
        *,
        multiplier: float = 1.0,
        ridge: float = 0.0,
        group_V: Tensor | None = None,
    ) -> BlockProblem:
        """The second-order model of the loss change when x replaces the present choice (iCBS, arXiv 2411.17796).

        With w = dense * (1 - pruned) the present weights, x = 1 where pruned afterwards and d = -(w - dense + x * dense)
        the step, dL(x) = multiplier * G . d + 1/2 d^T H d + ridge * ||d||^2, and H = A^T A. The present choice is d = 0,
        dL = 0. The ridge is on the step, not on the weights: it pays for moving, in either direction.

        Args:
            dense_V: weights of the dense model.
            pruned_V: which of them are zero now, bool.
            gradient_V: G, the loss's gradient at the present weights.
            factor_NV: A. For the empirical Fisher the per-sample gradients over sqrt(N); for an exact Hessian any factor.
            multiplier: gamma of the paper, below 1 to trust the gradient less than the curvature.
            ridge: lambda of the paper.
            group_V: groups in which the number of pruned weights is kept.
        """
        shift_V = torch.where(pruned_V, -dense_V, torch.zeros_like(dense_V))
        moved_N = factor_NV @ shift_V
        slope_V = factor_NV.T @ moved_N - multiplier * gradient_V + ridge * (2 * shift_V + dense_V)
        constant = 0.5 * moved_N.square().sum() - multiplier * (gradient_V * shift_V).sum() + ridge * shift_V.square().sum()
        return cls(factor_NV * dense_V, dense_V * slope_V, pruned_V, group_V, float(constant))

    @property
    def num_variables(self) -> int:
        """V."""
        return len(self.linear_V)

    def groups(self) -> tuple[Tensor, Tensor, Tensor]:
        """(group of every variable 0..G-1 [V], pruned per group [G], kept per group [G])."""
        if self.group_V is None:
            index_V = torch.zeros_like(self.pruned_V, dtype=torch.int64)
        else:
            index_V = torch.unique(self.group_V, return_inverse=True)[1]
        num_groups = int(index_V.max()) + 1 if len(index_V) else 0
        size_G = torch.bincount(index_V, minlength=num_groups)
        pruned_G = torch.bincount(index_V[self.pruned_V], minlength=num_groups)
        return index_V, pruned_G, size_G - pruned_G

    def energy(self, pruned_RV: Tensor) -> Tensor:
        """E of every candidate, fp64 [R]."""
        x_RV = pruned_RV.double()
        output_RN = x_RV @ self.factor_NV.double().T
        return 0.5 * output_RN.square().sum(1) + x_RV @ self.linear_V.double() + self.constant

    def feasible(self, pruned_RV: Tensor) -> Tensor:
        """Whether every candidate keeps the number of pruned weights of every group, bool [R]."""
        index_V, pruned_G, _ = self.groups()
        count_RG = torch.zeros(len(pruned_RV), len(pruned_G), dtype=torch.int64, device=pruned_RV.device)
        count_RG.index_add_(1, index_V, pruned_RV.long())
        return (count_RG == pruned_G).all(1)

    def dense(self) -> Tensor:
        """Q [V, V], symmetric, for other solvers: E(x) = x^T Q x + constant under the same sums."""
        return 0.5 * self.factor_NV.T @ self.factor_NV + torch.diag(self.linear_V)

    def penalised(self, weight: float) -> tuple[Tensor, float]:
        """(Q [V, V], constant) of a problem without constraints, for QUBO solvers that know none.

        Every group g adds weight * (sum of its x - k_g)^2, which is 0 exactly where the constraint holds.
        """
        index_V, pruned_G, _ = self.groups()
        same_VV = (index_V[:, None] == index_V).to(self.linear_V.dtype)
        count_V = pruned_G[index_V].to(self.linear_V.dtype)
        penalty = float(pruned_G.double().square().sum())
        return self.dense() + weight * (same_VV - 2 * torch.diag(count_V)), self.constant + weight * penalty

    def safe_penalty(self) -> float:
        """A weight for :meth:`penalised` from which on its least energy keeps every constraint: above what any one variable
        can change the energy by.
        """
        size_VV = self.dense().abs().double()
        return 1.001 * float((2 * size_VV.sum(1) - size_VV.diagonal()).max()) if self.num_variables else 0.0

    def to_bqm(self, weight: float | None = None) -> Any:
        """The problem as a ``dimod.BinaryQuadraticModel`` over variables 0 .. V-1, constraints as penalties, for the samplers
        of D-Wave's Ocean and what speaks its format.

        Args:
            weight: of the penalties; None is :meth:`safe_penalty`.

        Raises:
            ConfigError: dimod is not installed.
        """
        try:
            dimod: Any = importlib.import_module("dimod")
        except ImportError:
            raise ConfigError("to_bqm needs the package dimod: pip install dimod.") from None
        q_VV, constant = self.penalised(self.safe_penalty() if weight is None else weight)
        model = dimod.BinaryQuadraticModel(q_VV.double().cpu().numpy(), dimod.BINARY)
        model.offset += constant
        return model

    def to(self, device: torch.device | str) -> BlockProblem:
        """The same problem on another device."""
        return replace(
            self,
            factor_NV=self.factor_NV.to(device),
            linear_V=self.linear_V.to(device),
            pruned_V=self.pruned_V.to(device),
            group_V=None if self.group_V is None else self.group_V.to(device),
        )
