"""Whether a pruned model still writes: what it makes of a few prompts beside the dense one, in the report. Torch-free.

Both models always take the most probable token. Shares are of n-grams of tokens: ``distinct`` is how many of all n-grams of all
texts are different ones (Li et al. 2016, arXiv 1510.03055), ``repeated`` how many 4-grams their own text had before
(Welleck et al. 2020, arXiv 1908.04319).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import computed_field

from llmprune.speed import Part

MIN_LOOP = 8
"""Tokens that only repeat those before them, from which on a text may be said to be stuck."""
REPEATED_ORDER = 4

WritingStatus = Literal["fine", "degenerate", "both", "skipped"]


class Continued(Part):
    """What one model wrote after one prompt; ``finished`` says that it ended by itself."""

    text: str
    tokens: tuple[int, ...]
    finished: bool

    @computed_field  # type: ignore[prop-decorator]
    @property
    def longest_loop(self) -> int:
        """Tokens of the longest run that only repeats what stood a fixed distance before."""
        return longest_loop(self.tokens)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def is_stuck(self) -> bool:
        """Whether nothing was written, or most of it is one loop."""
        return not self.text.strip() or self.longest_loop >= max(MIN_LOOP, len(self.tokens) / 2)


class Diversity(Part):
    """How varied the texts of one model are, all prompts together; None where they are too short to have such n-grams."""

    distinct_1: float | None
    distinct_2: float | None
    distinct_3: float | None
    repeated: float | None
    longest_loop: int
    num_stuck: int


class WritingVerdict(Part):
    """A plain sentence on whether the pruned model still writes as the dense one does."""

    status: WritingStatus
    text: str


class Continuations(Part):
    """What the dense and the pruned model wrote after ``prompts``; where nothing was, ``skipped`` says why.

    The prompts of llmprune's own are cut to the same number of tokens, and shown as they were cut.
    """

    prompts: tuple[str, ...] = ()
    max_new_tokens: int
    dense: tuple[Continued, ...] = ()
    pruned: tuple[Continued, ...] = ()
    skipped: str | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def diversity_dense(self) -> Diversity | None:
        """Of the dense model's texts."""
        return diversity_of(self.dense)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def diversity_pruned(self) -> Diversity | None:
        """Of the pruned model's texts."""
        return diversity_of(self.pruned)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> WritingVerdict:
        """Degenerate where at least half of the pruned model's texts are stuck, and fewer than half of the dense one's."""
        dense, pruned, total = self.diversity_dense, self.diversity_pruned, len(self.prompts)
        if dense is None or pruned is None:
            return WritingVerdict(status="skipped", text=f"Nothing was written: {self.skipped or 'there was no prompt'}.")
        stuck = f"{pruned.num_stuck} of {total} continuations are empty or one loop, of the dense model's {dense.num_stuck}"
        if 2 * pruned.num_stuck < total:
            return WritingVerdict(status="fine", text=f"Writes on: {stuck}.")
        if 2 * dense.num_stuck < total:
            return WritingVerdict(status="degenerate", text=f"Degenerates: {stuck}. Read them, and lower the sparsity.")
        why = "as happens where always the most probable token is taken; other prompts may tell more"
        return WritingVerdict(status="both", text=f"Both models repeat themselves: {stuck}, {why}.")

    def num_agreeing(self, index: int) -> int:
        """How many tokens from the first on both models share, after one prompt."""
        pairs = zip(self.dense[index].tokens, self.pruned[index].tokens, strict=False)
        shorter = min(len(self.dense[index].tokens), len(self.pruned[index].tokens))
        return next((at for at, (one, other) in enumerate(pairs) if one != other), shorter)


def diversity_of(texts: Sequence[Continued]) -> Diversity | None:
    """Of all texts of one model; None where there are none."""
    if not texts:
        return None
    tokens = [text.tokens for text in texts]
    return Diversity(
        distinct_1=distinct(tokens, 1),
        distinct_2=distinct(tokens, 2),
        distinct_3=distinct(tokens, 3),
        repeated=repeated(tokens, REPEATED_ORDER),
        longest_loop=max(text.longest_loop for text in texts),
        num_stuck=sum(text.is_stuck for text in texts),
    )


def distinct(texts: Sequence[Sequence[int]], order: int) -> float | None:
    """Different n-grams over all n-grams, of all texts together; None where there is none."""
    grams = [gram for text in texts for gram in _grams(text, order)]
    return len(set(grams)) / len(grams) if grams else None


def repeated(texts: Sequence[Sequence[int]], order: int) -> float | None:
    """Share of n-grams that occurred before in the same text; None where there is none."""
    grams = [_grams(text, order) for text in texts]
    total = sum(map(len, grams))
    return 1 - sum(len(set(text)) for text in grams) / total if total else None


def longest_loop(tokens: Sequence[int]) -> int:
    """The longest run of tokens each of which equals the one a fixed distance before it, over all distances."""
    longest = 0
    for distance in range(1, len(tokens)):
        run = 0
        for at in range(distance, len(tokens)):
            run = run + 1 if tokens[at] == tokens[at - distance] else 0
            longest = max(longest, run)
    return longest


def _grams(tokens: Sequence[int], order: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[at : at + order]) for at in range(len(tokens) - order + 1)]
