"""The order of channels for n:m against brute force. R rows, I channels, K rows and columns of an assignment."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from llmprune import channels
from llmprune.channels import assign, best_order, deal, kept_score
from llmprune.spec import Pattern

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(1, 2)]


def _score(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Scores whose channels differ in scale, as those of trained models do."""
    generator = torch.Generator().manual_seed(seed)
    scale_I = torch.randn(columns, generator=generator).exp()
    return torch.randn(rows, columns, generator=generator).abs() * scale_I


def _partitions(columns: tuple[int, ...], m: int) -> list[list[int]]:
    """Every way to share the columns among groups of m, as an order."""
    if not columns:
        return [[]]
    first, rest = columns[0], columns[1:]
    return [
        [first, *others, *tail]
        for others in itertools.combinations(rest, m - 1)
        for tail in _partitions(tuple(column for column in rest if column not in others), m)
    ]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_near_the_best_of_all_orders(pattern: Pattern) -> None:
    """On eight channels: never below the present order, never above the best there is, and on average most of the way."""
    assert pattern.m is not None
    all_orders = _partitions(tuple(range(8)), pattern.m)
    assert len(all_orders) in (35, 105)
    gained = possible = 0.0
    for seed in range(8):
        score_RI = _score(6, 8, seed)
        best = max(kept_score(score_RI[:, order], pattern) for order in all_orders)
        order_I = best_order(score_RI, pattern)
        assert sorted(order_I.tolist()) == list(range(8))
        before, after = kept_score(score_RI, pattern), kept_score(score_RI[:, order_I], pattern)
        assert before <= after <= best + 1e-9
        gained, possible = gained + after - before, possible + best - before
    assert gained > 0.8 * possible


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_round_keeps_more(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept score rises with the rounds allowed, above what dealing gives, and with groups trading in parts too."""
    score_RI = _score(32, 96)
    assert pattern.m is not None
    for trading in (64, 5):
        monkeypatch.setattr(channels, "_TRADING", trading)
        kept = [kept_score(score_RI, pattern)]
        for rounds in (0, 1, 2, 4):
            monkeypatch.setattr(channels, "MAX_ROUNDS", rounds)
            kept.append(kept_score(score_RI[:, best_order(score_RI, pattern)], pattern))
        assert kept == sorted(kept)
        assert kept[0] < kept[1] < kept[2] and kept[-1] > 1.005 * kept[0]


def test_kept_score_by_hand() -> None:
    """2:4 keeps 4 + 3 and 8 + 7 of 1 to 8; the other way round in the second row."""
    score_RI = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 9, 1, 0, 0, 0]])
    assert kept_score(score_RI, Pattern(2, 4)) == 4 + 3 + 8 + 7 + 9 + 1


def test_deal_by_hand() -> None:
    """Eight channels of falling sums go to two groups as 0 | 1, 3 | 2, 4 | 5, 7 | 6."""
    assert deal(torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]), 4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


@pytest.mark.parametrize("columns", [4, 8])
def test_nothing_to_gain_keeps_the_order(columns: int) -> None:
    """One group, and channels that are all alike, stay where they are."""
    assert best_order(torch.ones(3, columns), Pattern(2, 4)).tolist() == list(range(columns))
    assert best_order(_score(3, 4), Pattern(2, 4)).tolist() == list(range(4))


@pytest.mark.parametrize("size", range(1, 7))
def test_assignment_is_the_best_of_all(size: int) -> None:
    """Brute force over permutations, with ties and negative gains."""
    generator = torch.Generator().manual_seed(size)
    for number in range(20):
        gain_KK = torch.randn(size, size, generator=generator, dtype=torch.float64)
        if number % 2:
            gain_KK = (2 * gain_KK).round()
        column_K = assign(gain_KK)
        assert sorted(column_K.tolist()) == list(range(size))
        best = max(
            sum(float(gain_KK[row, column]) for row, column in enumerate(columns))
            for columns in itertools.permutations(range(size))
        )
        assert math.isclose(float(gain_KK[range(size), column_K].sum()), best, abs_tol=1e-9)


def test_large_assignment_admits_no_better_cycle() -> None:
    """No exchange between any rows gains: the graph of gains by moving has no positive cycle (Floyd and Warshall)."""
    gain_KK = torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    column_K = assign(gain_KK)
    best_KK = gain_KK[:, column_K] - gain_KK[range(40), column_K][:, None]  # row k in the place of row l
    for via in range(40):
        best_KK = torch.maximum(best_KK, best_KK[:, via, None] + best_KK[via])
    assert best_KK.diagonal().max() <= 1e-9


def test_gains_are_the_kept_scores_of_the_groups() -> None:
    """Up to a constant of each group, an entry is what the group keeps with that channel in the open slot."""
    score_RI = _score(5, 12)
    others_KM = torch.tensor([[0, 1, 2], [4, 5, 6], [8, 9, 10]])
    given_K = torch.tensor([3, 7, 11])
    gain_KK = channels._gains(score_RI[:, given_K], score_RI[:, others_KM], 2)
    for group, others in enumerate(others_KM.tolist()):
        kept = torch.tensor([kept_score(score_RI[:, [*others, given]], Pattern(2, 4)) for given in given_K.tolist()])
        spread = gain_KK[group] - kept
        assert (spread - spread[0]).abs().max() < 1e-4
