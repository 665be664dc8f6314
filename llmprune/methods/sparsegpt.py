"""SparseGPT: column-wise optimal brain surgeon (Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1).

O out, I in features, B columns of one block. Weights are held transposed, one input column a contiguous row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.masks import COLUMN_BLOCK, block_counts, keep_highest, keep_mask, keep_n_of_lanes
from llmprune.spec import Target
from llmprune.stats import LinearStats


def prune(weight_OI: Tensor, stats: LinearStats, target: Target, *, damping: float) -> Tensor:
    """Prune column by column and let the columns to the right make up for each error.

    With U the upper Cholesky factor of the damped inverse Gram, weight W_ij scores W_ij^2 / U_jj^2 (eq. 5) at the moment
    its block of 128 columns is reached (its group of m columns for n:m), and pruning it moves the later columns by
    -(W_ij / U_jj) U_j,j+1: (eq. 3).

    Departures from the reference implementation: counts are exact (it prunes ``score <= threshold``, so ties overshoot);
    columns that no token ever reached are pruned first but not beyond the target; scopes ``row`` and ``matrix`` exist,
    the latter with scores taken from the dense weights before any update.

    Args:
        weight_OI: [O, I], any float dtype; computed in fp32.
        stats: with the Gram matrix.
        target: pattern, sparsity, scope; ``block`` is the paper's.
        damping: fraction of the mean Gram diagonal added to it, 0.01 in the paper.
    """
    if target.pattern.m is None and target.sparsity == 0:
        return weight_OI.clone()
    factor_II = stats.inverse_factor(damping)
    alive_I = (stats.sq_I > 0).float()
    solve = _Columns(
        weight_IO=weight_OI.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format),
        error_IO=torch.zeros(weight_OI.shape[::-1], dtype=torch.float32, device=weight_OI.device),
        factor_II=factor_II,
        weigh_I=alive_I / factor_II.diagonal(),
        target=target,
    )
    solve.run()
    return solve.weight_IO.T.to(weight_OI.dtype).contiguous()


@dataclass
class _Columns:
    """The state of one solve: all of it is changed in place.

    Importance of w in column j is |w| * weigh_I[j], the root of the paper's w^2 / U_jj^2: the same order without its
    underflow. A range of columns is pruned by halves: the left one, then what it
    owes to the right one in a single matrix product, then the right one. On entering a range, its columns have taken in
    the errors of all earlier columns, which is when a block's support is chosen.
    """

    weight_IO: Tensor
    error_IO: Tensor
    factor_II: Tensor
    weigh_I: Tensor
    target: Target

    def run(self) -> None:
        num_in, num_out = self.weight_IO.shape
        self.width = self.target.pattern.m or COLUMN_BLOCK
        rows = 1 if self.target.scope == "row" else num_out
        self.counts = block_counts(rows, num_in, sparsity=self.target.sparsity, width=self.width)
        self.share_I1 = self.factor_II.diagonal().reciprocal()[:, None]
        self.next_to = self.factor_II.diagonal(1).tolist()
        self.weights, self.errors = self.weight_IO.unbind(), self.error_IO.unbind()
        self.planned_IO = None
        if self.target.pattern.m is None and self.target.scope == "matrix":
            self.planned_IO = keep_mask(self._score(slice(None)).T, self.target.pattern, self.target.sparsity, "matrix").T
        self._prune(0, num_in)

    def _prune(self, start: int, stop: int) -> None:
        """Prune columns [start, stop), blocks of them; a split falls between blocks."""
        size = stop - start
        if size <= self.width:
            keep_IO = self._choose(start, stop) if self.planned_IO is None else self.planned_IO[start:stop]
            drop_IO = (~keep_IO).contiguous()
            # What a column owes is its error over U_jj: 1 / U_jj where a weight goes, 0 where it stays, times the weight.
            self._owe(start, stop, drop_IO.mul(self.share_I1[start:stop]).unbind(), start)
            self.weight_IO[start:stop].masked_fill_(drop_IO, 0)
            return
        middle = start + self.width * ((-(-size // self.width) + 1) // 2)
        self._prune(start, middle)
        self._settle(start, middle, stop)
        self._prune(middle, stop)

    def _owe(self, start: int, stop: int, shares: Sequence[Tensor], first: int) -> None:
        """Fill the errors of columns [start, stop) of a block that begins at ``first``. Starting an operation takes longer than
        what it does, so the last columns are left to as few as can be.
        """
        if stop - start == 1:
            torch.mul(self.weights[start], shares[start - first], out=self.errors[start])
            return
        if stop - start == 2:
            torch.mul(self.weights[start], shares[start - first], out=self.errors[start])
            self.weights[start + 1].sub_(self.errors[start], alpha=self.next_to[start])
            torch.mul(self.weights[start + 1], shares[start + 1 - first], out=self.errors[start + 1])
            return
        middle = (start + stop + 1) // 2
        self._owe(start, middle, shares, first)
        self._settle(start, middle, stop)
        self._owe(middle, stop, shares, first)

    def _settle(self, start: int, middle: int, stop: int) -> None:
        """Columns [middle, stop) take in the errors of [start, middle)."""
        owed = self.factor_II[start:middle, middle:stop].T
        self.weight_IO[middle:stop].addmm_(owed, self.error_IO[start:middle], alpha=-1)

    def _choose(self, start: int, stop: int) -> Tensor:
        """The support [B, O] of one block from its present weights."""
        score_BO = self._score(slice(start, stop))
        if self.target.pattern.n is not None:
            return keep_n_of_lanes(score_BO, self.target.pattern.n)
        score_OB = score_BO.T.contiguous()
        shape = score_OB.shape if self.target.scope == "row" else (1, -1)
        return keep_highest(score_OB.view(shape), self.counts[start // self.width]).view(score_OB.shape).T

    def _score(self, columns: slice) -> Tensor:
        return self.weight_IO[columns].abs().mul_(self.weigh_I[columns, None])
