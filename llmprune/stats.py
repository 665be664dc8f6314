"""What is known of a site's inputs: sums over calibration tokens, additive and mergeable.

I in features, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmprune.linalg import Spectrum, add_gram_, inverse_factor, mirror_, spectrum
from llmprune.spec import Need

T = TypeVar("T")
_ROWS = 4096  # summed by themselves first, so that rounding does not grow with T and no fp32 copy is whole
_CACHED_ROWS = 256  # of sums over columns, which read their part twice: 4 bytes x 256 x I stay in the cache

_CONSTANT = 1e-5  # the rounding of a mean square in fp32, with room


class LinearStats:
    """Input statistics of one group of sites that read the same tensor.

    Attributes:
        num_tokens: tokens seen.
        sq_I: sum of x_j^2, fp32 [I].
        sum_I: sum of x_j, fp32 [I]; None unless the method needs it.

    Adding the same tokens in any split gives the same sums up to rounding, so shards and ranks just add up.
    """

    def __init__(self, in_features: int, need: Need, device: torch.device | str) -> None:
        self.num_tokens = 0
        self.need = need
        self._gram_II: Tensor | None
        self._mirrored: bool
        self.sq_I = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.sum_I = torch.zeros(in_features, dtype=torch.float32, device=device) if need >= Need.MEAN else None
        self.gram_II = torch.zeros(in_features, in_features, dtype=torch.float32, device=device) if need >= Need.GRAM else None
        self._solved: tuple[tuple[object, float], Any, float] | None = None

    @property
    def gram_II(self) -> Tensor | None:
        """Sum of x x^T, fp32 [I, I]; None unless the method needs it."""
        if self._gram_II is not None and not self._mirrored:  # updates leave what is below the diagonal
            mirror_(self._gram_II)
            self._mirrored = True
        return self._gram_II

    @gram_II.setter
    def gram_II(self, gram_II: Tensor | None) -> None:
        self._gram_II, self._mirrored = gram_II, True

    def update(self, x_TI: Tensor) -> None:
        """Add tokens; ``x_TI`` is [..., I] in any float dtype and is read only."""
        x_TI = x_TI.detach().reshape(-1, x_TI.shape[-1])
        self.num_tokens += x_TI.shape[0]
        self._solved = None
        if self.need == Need.NOTHING:
            return
        if self.sum_I is not None:
            self.sum_I += _column_sums(x_TI, lambda part_TI: part_TI)
        if self._gram_II is not None:
            for part_TI in x_TI.split(_ROWS):
                add_gram_(self._gram_II, part_TI)
            self._mirrored = False
            self.sq_I = self._gram_II.diagonal().clone()
        else:
            self.sq_I += _column_sums(x_TI, Tensor.square)

    def merge(self, other: LinearStats) -> None:
        """Add another shard's sums, of the same statistics."""
        assert other.need == self.need and other.sq_I.shape == self.sq_I.shape
        self.num_tokens += other.num_tokens
        self._solved = None
        self.sq_I += other.sq_I
        if self.sum_I is not None and other.sum_I is not None:
            self.sum_I += other.sum_I
        if self.gram_II is not None and other.gram_II is not None:
            self.gram_II += other.gram_II

    @property
    def mean_I(self) -> Tensor:
        """Mean of x_j over the tokens, fp32 [I]; zero before the first token."""
        assert self.sum_I is not None
        return self.sum_I / max(self.num_tokens, 1)

    @property
    def variance_I(self) -> Tensor:
        """Variance of x_j over the tokens, fp32 [I]; not below what rounding makes of a constant input."""
        square_I = self.sq_I / max(self.num_tokens, 1)
        return torch.maximum(square_I - self.mean_I.square(), _CONSTANT * square_I)

    @property
    def damping_used(self) -> float | None:
        """The damping the last factorisation took; None before one."""
        return self._solved[2] if self._solved else None

    def inverse_factor(self, damping: float) -> Tensor:
        """Upper Cholesky factor of the damped inverse Gram, fp32 [I, I]; computed once per group of sites."""
        return self._solve(inverse_factor, damping)

    def spectrum(self, damping: float) -> Spectrum:
        """Eigendecomposition of the damped Gram scaled to a unit diagonal; computed once per group of sites."""
        return self._solve(spectrum, damping)

    def _solve(self, solve: Callable[[Tensor, float], tuple[T, float]], damping: float) -> T:
        """What ``solve`` makes of the Gram matrix; the last result is kept until the sums change."""
        assert self.gram_II is not None
        key = (solve, damping)
        if self._solved is None or self._solved[0] != key:
            self._solved = None  # not two at a time
            self._solved = (key, *solve(self.gram_II, damping))
        result: T = self._solved[1]
        return result


class ServingStats(LinearStats):
    """Statistics that also serve, to the last bit, who needs less of them: see :meth:`at`.

    Attributes:
        squares_I: sum of x_j^2, fp32 [I], as it is summed without a Gram matrix, whose diagonal differs in rounding; None
            where ``sq_I`` is that very sum.
    """

    def __init__(self, in_features: int, need: Need, device: torch.device | str) -> None:
        super().__init__(in_features, need, device)
        self.squares_I = torch.zeros_like(self.sq_I) if need >= Need.GRAM else None

    def update(self, x_TI: Tensor) -> None:
        """Add tokens; ``x_TI`` is [..., I] in any float dtype and is read only."""
        super().update(x_TI)
        if self.squares_I is not None:
            self.squares_I += _column_sums(x_TI.detach().reshape(-1, x_TI.shape[-1]), Tensor.square)

    def merge(self, other: LinearStats) -> None:
        """Add another shard's sums, of the same statistics."""
        assert isinstance(other, ServingStats)
        super().merge(other)
        if self.squares_I is not None and other.squares_I is not None:
            self.squares_I += other.squares_I

    def at(self, need: Need) -> LinearStats:
        """The same tokens as if no more than ``need`` had been summed of them."""
        assert need <= self.need
        lower = LinearStats(0, Need.NOTHING, self.sq_I.device)
        lower.need, lower.num_tokens = need, self.num_tokens
        if need == Need.NOTHING:
            lower.sq_I = torch.zeros_like(self.sq_I)
        else:
            lower.sq_I = self.sq_I if need == self.need or self.squares_I is None else self.squares_I
        lower.sum_I = self.sum_I if need >= Need.MEAN else None
        lower.gram_II = self.gram_II if need >= Need.GRAM else None
        return lower


def _column_sums(x_TI: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Column sums of ``of(x)``, fp32 [I], by parts."""
    total_I = torch.zeros(x_TI.shape[1], dtype=torch.float32, device=x_TI.device)
    for rows_TI in x_TI.split(_ROWS):
        rows = _CACHED_ROWS if x_TI.device.type == "cpu" else _ROWS
        parts = [of(part_TI.float()).sum(0) for part_TI in rows_TI.split(rows)]
        total_I += torch.stack(parts).sum(0)
    return total_I
