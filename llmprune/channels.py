"""The order of input channels in which an n:m pattern keeps most: which m of them share a group.

R rows of scores, I input channels, G groups of m, K groups that trade channels at once. After RIA's channel permutation (Zhang
et al. 2024, ICLR, "Plug-and-Play", section 4): channels are dealt to the groups by their sums, then traded between groups by
linear assignment, one slot at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.masks import keep_mask
from llmprune.spec import Pattern

MAX_ROUNDS = 4
_TRADING = 64  # groups in one assignment: its time grows with the cube, what larger ones gain is in the fourth digit
_WORTHWHILE = 1e-4  # of the kept score, in a round


def kept_score(score_RI: Tensor, pattern: Pattern) -> float:
    """Sum of the scores that the n:m pattern keeps, in fp64."""
    keep_RI = keep_mask(score_RI, pattern, pattern.sparsity or 0.0, "row")
    return float(score_RI.where(keep_RI, 0).sum(dtype=torch.float64))


def best_order(score_RI: Tensor, pattern: Pattern) -> Tensor:
    """The order of the channels, int64 [I]: place p takes channel ``order[p]``. Never worse than leaving them as they are.

    Starts from the better of the present order and the dealt one. In a slot step each group gives one channel away, and an
    assignment hands them out for the largest kept score; of more than 64 groups, those of one part trade at a time. Ends when
    a round of all slots gains less than a ten-thousandth.

    Args:
        score_RI: importance, not negative, fp32 or fp64; a row for every output that the channel takes part in.
        pattern: n:m, m divides I.
    """
    assert pattern.n is not None and pattern.m is not None and score_RI.shape[1] % pattern.m == 0
    present_I = torch.arange(score_RI.shape[1], device=score_RI.device)
    before = kept_score(score_RI, pattern)
    order_I, kept = present_I, before
    dealt_I = deal(score_RI.sum(0), pattern.m)
    if (dealt := kept_score(score_RI[:, dealt_I], pattern)) > kept:
        order_I, kept = dealt_I, dealt
    for number in range(MAX_ROUNDS if len(present_I) > pattern.m else 0):
        traded_I = _trade(score_RI, order_I, pattern.n, pattern.m, number)
        after = kept_score(score_RI[:, traded_I], pattern)
        if after <= kept:
            break
        order_I, gain, kept = traded_I, (after - kept) / after, after
        if gain < _WORTHWHILE:
            break
    return order_I


def deal(sum_I: Tensor, m: int) -> Tensor:
    """Channels by falling sum, dealt to the I / m groups there and back again: no group gets the best of every round."""
    hands_MG = sum_I.argsort(descending=True, stable=True).view(m, -1)
    hands_MG[1::2] = hands_MG[1::2].flip(1)
    return hands_MG.T.reshape(-1)


def _trade(score_RI: Tensor, order_I: Tensor, n: int, m: int, number: int) -> Tensor:
    """One round: every slot of the groups once. Which groups trade, and which of their slots, changes with the ``number``."""
    order_GM = order_I.view(-1, m)
    groups_G = torch.arange(len(order_GM), device=order_I.device)
    order_GM = order_GM.gather(1, (torch.arange(m, device=order_I.device) + number * groups_G[:, None]) % m)
    num_parts = -(-len(groups_G) // _TRADING)
    parts = [groups_G[part::num_parts] for part in range(num_parts)] if number % 2 else groups_G.chunk(num_parts)
    for slot in range(m):
        for part_K in parts:
            others_KM = torch.cat([order_GM[part_K, :slot], order_GM[part_K, slot + 1 :]], dim=1)
            given_K = order_GM[part_K, slot]
            gain_KK = _gains(score_RI[:, given_K], score_RI[:, others_KM], n)
            order_GM[part_K, slot] = given_K[assign(gain_KK)]
    return order_GM.view(-1)


def _gains(given_RK: Tensor, others_RKM: Tensor, n: int) -> Tensor:
    """What group k of the rows keeps of its n highest and a joining channel, less a constant of the group; fp64 [K, K].

    The n-th highest score t of a group makes room for a higher one, so that the sum is over max(t, s), half of t + s + |t - s|.
    """
    threshold_RK = others_RKM.topk(n, dim=2).values[..., -1]
    distance_KK = torch.cdist(threshold_RK.T.contiguous(), given_RK.T.contiguous(), p=1)
    return (distance_KK + threshold_RK.sum(0)[:, None] + given_RK.sum(0)).double() / 2


def assign(gain_KK: Tensor) -> Tensor:
    """For each row a column of its own, int64 [K], so that the sum of the gains is the largest there is.

    Shortest augmenting paths with dual prices (Jonker and Volgenant 1987, in the form of Crouse 2016,
    doi 10.1109/TAES.2016.140952), on the CPU.
    """
    cost_KK = -gain_KK.double().cpu()
    size = len(cost_KK)
    price_K = cost_KK.amin(0)  # of the columns; so every reduced cost is at least zero
    rent = [0.0] * size  # of the rows
    row_of, column_of = [-1] * size, [-1] * size
    for start in range(size):
        shortest_K = torch.full((size,), torch.inf, dtype=torch.float64)
        open_K = torch.zeros(size, dtype=torch.float64)  # inf once a column is settled
        parent_K = torch.full((size,), -1)
        settled: list[tuple[int, float]] = []
        row, length = start, 0.0
        while True:
            through_K = cost_KK[row] - price_K + (open_K + (length - rent[row]))
            parent_K.masked_fill_(through_K < shortest_K, row)
            shortest_K = torch.minimum(shortest_K, through_K)
            nearest, at = (shortest_K + open_K).min(0)
            length, column = float(nearest), int(at)
            open_K[column] = torch.inf
            settled.append((column, length))
            if row_of[column] < 0:
                break
            row = row_of[column]
        rent[start] += length
        for done, distance in settled[:-1]:
            rent[row_of[done]] += length - distance
            price_K[done] -= length - distance
        while True:  # along the path, every row moves to the column it was reached through
            row = int(parent_K[column])
            row_of[column], column_of[row], column = row, column, column_of[row]
            if row == start:
                break
    return torch.tensor(column_of, device=gain_KK.device)
