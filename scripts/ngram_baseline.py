"""Interpolated modified Kneser-Ney n-gram model over token ids: what a demo model has to beat.

S. F. Chen and J. Goodman, "An empirical study of smoothing techniques for language modeling", 1999, section 3. Here the
recursion ends in a uniform distribution, and documents follow one another in one stream, so no padding is needed.

An n-gram is one integer, its ids in base 2^bits, oldest first: a sorted array of them with their counts is a model.
Shapes: T tokens in the stream, G distinct n-grams, C distinct contexts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class _Level:
    """The n-grams of one order: their counts, and per context the total count and how much mass the discounts free."""

    grams: IntArray
    counts: IntArray
    contexts: IntArray
    totals: FloatArray
    freed: FloatArray
    discounts: FloatArray


class KneserNey:
    """An n-gram model fitted on one token stream; `order` * ceil(log2(vocab_size)) may not pass 62 bits."""

    def __init__(self, tokens_T: IntArray, *, order: int, vocab_size: int) -> None:
        self.order = order
        self.vocab_size = vocab_size
        self.bits = max(1, (vocab_size - 1).bit_length())
        if order < 1 or order * self.bits > 62:
            raise ValueError(f"order must be 1 to {62 // self.bits} for a vocabulary of {vocab_size}, got {order}")
        grams_G, counts_G = np.unique(self._grams(tokens_T, order), return_counts=True)
        levels = [self._level(grams_G, counts_G.astype(np.int64))]
        for length in range(order - 1, 0, -1):
            # Below the highest order an n-gram counts the distinct tokens seen before it, not its occurrences.
            suffixes = levels[-1].grams & ((1 << (length * self.bits)) - 1)
            grams_G, counts_G = np.unique(suffixes, return_counts=True)
            levels.append(self._level(grams_G, counts_G.astype(np.int64)))
        self.levels = levels[::-1]

    def probabilities(self, tokens_T: IntArray) -> FloatArray:
        """p(token | the order - 1 tokens before it), for tokens order - 1 and later: shape (T - order + 1,)."""
        full = self._grams(tokens_T, self.order)
        probabilities = np.full(len(full), 1.0 / self.vocab_size)
        for length, level in enumerate(self.levels, start=1):
            grams = full & ((1 << (length * self.bits)) - 1)
            counts = _lookup(level.grams, level.counts, grams)
            totals = _lookup(level.contexts, level.totals, grams >> self.bits)
            freed = _lookup(level.contexts, level.freed, grams >> self.bits)
            kept = np.maximum(counts - level.discounts[np.minimum(counts, 3)], 0.0)
            seen = totals > 0  # An unseen context says nothing: keep the shorter context's estimate.
            longer = (kept + freed * probabilities) / np.where(seen, totals, 1.0)
            probabilities = np.where(seen, longer, probabilities)
        return probabilities

    def _grams(self, tokens_T: IntArray, length: int) -> IntArray:
        """Every window of `length` tokens as one integer, shape (T - length + 1,)."""
        num_windows = len(tokens_T) - length + 1
        grams = np.zeros(num_windows, dtype=np.int64)
        for offset in range(length):
            grams = (grams << self.bits) | tokens_T[offset : offset + num_windows].astype(np.int64)
        return grams

    def _level(self, grams_G: IntArray, counts_G: IntArray) -> _Level:
        discounts = _discounts(counts_G)
        contexts_C, context_of_gram = np.unique(grams_G >> self.bits, return_inverse=True)
        totals_C = np.bincount(context_of_gram, weights=counts_G)
        freed_C = np.bincount(context_of_gram, weights=discounts[np.minimum(counts_G, 3)])
        return _Level(grams_G, counts_G, contexts_C, totals_C, freed_C, discounts)


def _discounts(counts_G: IntArray) -> FloatArray:
    """What to subtract from a count of 0, 1, 2 and of 3 or more (Chen and Goodman's estimates)."""
    n1, n2, n3, n4 = (max(1, int((counts_G == count).sum())) for count in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # The estimates assume counts that fall off like a power law; outside [0, count] they would not be discounts.
    return np.clip(discounts, [0.0, 0.1, 0.1, 0.1], [0.0, 0.95, 1.9, 2.8])


def _lookup(keys: IntArray, values: NDArray[np.generic], queries: IntArray) -> NDArray[np.generic]:
    """values[i] where keys[i] == query, 0 where no key does; `keys` sorted."""
    at = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[at] == queries, values[at], 0).astype(values.dtype)
