"""Which weights of a site may move: what is frozen, what was just tried, and the block that is tried next.

O out, I in features, W = O * I weights in the order of rows, G groups of M weights, K pairs, V variables of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmprune.anatomy.sites import Site
from llmprune.masks import keep_highest


@dataclass
class SiteState:
    """One site under refinement. A weight is its dense value or zero, always.

    Attributes:
        site: the weights in the model.
        dense_OI: their dense values, in the model's dtype, on any device: only the entries of a block are brought over.
        pruned_W: which are zero now, bool.
        group_size: consecutive weights among which the number of pruned ones is kept: a row's, an n:m group's, or all.
        fixed_W: frozen ones, bool: never in a block.
        capacity: how many of the last tried weights are tabu; 0 for none.
        tabu_F: flat indices of the tabu ones, oldest first.
    """

    site: Site
    dense_OI: Tensor
    pruned_W: Tensor
    group_size: int
    fixed_W: Tensor
    capacity: int = 0
    tabu_F: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.tabu_F = torch.empty(0, dtype=torch.int64, device=self.pruned_W.device)

    @classmethod
    def of(
        cls,
        site: Site,
        dense_OI: Tensor,
        *,
        group_size: int | None = None,
        score_OI: Tensor | None = None,
        fix_pruned: float = 0.0,
        fix_kept: float = 0.0,
        tabu: float = 0.0,
        block_size: int = 1,
    ) -> SiteState:
        """The state of a site as it is in the model.

        Args:
            site: pruned already.
            dense_OI: dense values [O, I]; every weight of the model is this or zero.
            group_size: in which the number of pruned weights is kept; None is the whole site.
            score_OI: importance, to freeze the least important pruned and the most important kept weights by.
            fix_pruned: fraction of the pruned weights to freeze, to the nearest whole weight.
            fix_kept: fraction of the kept ones.
            tabu: capacity of the tabu list over the free weights; without effect where fewer than a block would be left.
            block_size: V.

        Raises:
            ValueError: a weight is neither zero nor its dense value.
        """
        weight_OI = site.weight_OI
        dense_OI = dense_OI.to(weight_OI.dtype)
        here_OI = dense_OI.to(weight_OI.device)
        pruned_OI = weight_OI == 0
        if not torch.equal(weight_OI, torch.where(pruned_OI, 0, here_OI)):
            raise ValueError(
                f"{site.name}: kept weights differ from the dense ones; refine the mask of a method that keeps them."
            )
        pruned_W = pruned_OI.reshape(-1)
        absent_W = (here_OI == 0).reshape(-1)  # zero in the dense model: nothing to restore
        fixed_W = absent_W.clone()
        if score_OI is not None:
            score_W = score_OI.reshape(-1)
            fixed_W |= _lowest(score_W, pruned_W & ~absent_W, round(fix_pruned * int((pruned_W & ~absent_W).sum())))
            fixed_W |= _lowest(-score_W, ~pruned_W, round(fix_kept * int((~pruned_W).sum())))
        num_free = int((~fixed_W).sum())
        capacity = round(tabu * num_free)
        state = cls(site, dense_OI, pruned_W, group_size or pruned_W.numel(), fixed_W)
        state.capacity = capacity if num_free - capacity >= block_size else 0
        return state

    @property
    def num_free(self) -> int:
        """Weights that are not frozen."""
        return int((~self.fixed_W).sum())

    def select(self, score_OI: Tensor, num_pruned: int, num_kept: int) -> Tensor:
        """Flat indices [V] of the next block, pruned ones first: the weights most likely on the wrong side.

        Of the pruned ones those with the highest score, of the kept ones those with the lowest, ties by position, at most
        ``num_pruned`` and ``num_kept``; frozen and tabu ones stay out. Where there are groups, the pairs of a pruned and a
        kept weight of one group whose scores differ most. A block as large as all that is free takes it all, tabu or not.
        """
        open_W = ~self.fixed_W
        if int(open_W.sum()) > num_pruned + num_kept:
            open_W[self.tabu_F] = False
        score_W = score_OI.reshape(-1)
        pruned_W, kept_W = open_W & self.pruned_W, open_W & ~self.pruned_W
        if self.group_size == self.pruned_W.numel():
            chosen_W = _lowest(-score_W, pruned_W, num_pruned) | _lowest(score_W, kept_W, num_kept)
        else:
            chosen_W = _pairs(score_W, pruned_W, kept_W, self.group_size, min(num_pruned, num_kept))
        index_V = chosen_W.nonzero()[:, 0]
        return torch.cat([index_V[self.pruned_W[index_V]], index_V[~self.pruned_W[index_V]]])

    def tried(self, index_V: Tensor) -> None:
        """Make a block tabu, and the oldest ones free again."""
        if self.capacity:
            self.tabu_F = torch.cat([self.tabu_F, index_V])[-self.capacity :]

    def write_(self, index_V: Tensor, pruned_V: Tensor) -> None:
        """Set which weights of a block are pruned, here and in the model."""
        rows_V, columns_V = self.rows_and_columns(index_V)
        self.pruned_W[index_V] = pruned_V
        self.site.weight_OI[rows_V, columns_V] = torch.where(pruned_V, 0, self.dense_at(rows_V, columns_V))

    def dense_at(self, row_V: Tensor, column_V: Tensor) -> Tensor:
        """Dense values [V], on the model's device."""
        home = self.dense_OI.device
        return self.dense_OI[row_V.to(home), column_V.to(home)].to(row_V.device)

    def snapshot(self) -> tuple[Tensor, Tensor]:
        """(the mask, a bit a weight, uint8 [W / 8], the tabu list), on the CPU."""
        return pack_bits(self.pruned_W.cpu()), self.tabu_F.cpu()

    def restore_(self, bits: Tensor, tabu_F: Tensor) -> None:
        """Take a snapshot's mask, here and in the model, and its tabu list."""
        home = self.pruned_W.device
        self.pruned_W = unpack_bits(bits, self.pruned_W.numel()).to(home)
        self.tabu_F = tabu_F.to(home)
        pruned_OI = self.pruned_W.view(self.site.shape)
        self.site.weight_OI.copy_(torch.where(pruned_OI, 0, self.dense_OI.to(home)))

    def rows_and_columns(self, index_V: Tensor) -> tuple[Tensor, Tensor]:
        """(row, column) of flat indices."""
        num_columns = self.dense_OI.shape[1]
        return index_V // num_columns, index_V % num_columns


def allocate_steps(sizes: Sequence[int], num_steps: int, *, min_steps: int = 1) -> list[int]:
    """How many of ``num_steps`` each site gets: in proportion to the logarithm of its size, at least ``min_steps`` each
    where that is possible, the sum exact; what rounding leaves goes to the largest remainders, then to earlier sites.
    """
    floor = min(min_steps, num_steps // len(sizes))
    logs = [math.log10(max(size, 2)) for size in sizes]
    spare, open_sites, counts = num_steps, list(range(len(sizes))), [0] * len(sizes)
    while True:  # those whose share is below the minimum get it; the others share the rest
        total = sum(logs[site] for site in open_sites)
        low = [site for site in open_sites if spare * logs[site] / total < floor - 1e-9]
        if not low:
            break
        for site in low:
            counts[site] = floor
        spare -= floor * len(low)
        open_sites = [site for site in open_sites if site not in low]
    shares = {site: spare * logs[site] / total for site in open_sites}
    for site, share in shares.items():
        counts[site] = math.floor(share)
    left = num_steps - sum(counts)
    for site in sorted(shares, key=lambda site: (counts[site] - shares[site], site))[:left]:
        counts[site] += 1
    return counts


def pack_bits(flag_W: Tensor) -> Tensor:
    """Eight flags a byte, the first in the highest bit, uint8."""
    padded_W = torch.nn.functional.pad(flag_W.to(torch.uint8), (0, -flag_W.numel() % 8))
    places = 2 ** torch.arange(7, -1, -1, dtype=torch.uint8)
    return (padded_W.view(-1, 8) * places).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """The first ``count`` flags of :func:`pack_bits`, bool."""
    places = 2 ** torch.arange(7, -1, -1, dtype=torch.uint8)
    return (bits[:, None] & places).bool().reshape(-1)[:count]


def _lowest(score_W: Tensor, among_W: Tensor, count: int) -> Tensor:
    """Bool [W], True at the ``count`` lowest scores of ``among_W`` (or all there are), the earlier of equals."""
    count = min(count, int(among_W.sum()))
    masked_W = score_W.where(among_W, torch.inf)
    return ~keep_highest(masked_W[None], count)[0] & among_W


def _pairs(score_W: Tensor, pruned_W: Tensor, kept_W: Tensor, group_size: int, num_pairs: int) -> Tensor:
    """Bool [W], True at both members of the ``num_pairs`` pairs of a group that promise most: the highest pruned with the
    lowest kept, the second with the second, and so on.
    """
    score_GM = score_W.view(-1, group_size)
    high_GM, high_order_GM = score_GM.where(pruned_W.view_as(score_GM), -torch.inf).sort(dim=1, descending=True, stable=True)
    low_GM, low_order_GM = score_GM.where(kept_W.view_as(score_GM), torch.inf).sort(dim=1, stable=True)
    gap_GM = high_GM - low_GM  # -inf where either side has run out
    taken_GM = _lowest(-gap_GM.reshape(-1), torch.isfinite(gap_GM).reshape(-1), num_pairs).view_as(gap_GM)
    chosen_GM = torch.zeros_like(taken_GM)
    chosen_GM.scatter_(1, high_order_GM, taken_GM)
    others_GM = torch.zeros_like(taken_GM)
    others_GM.scatter_(1, low_order_GM, taken_GM)
    return (chosen_GM | others_GM).reshape(-1)
