"""Random tokens of recorded sequences: which are drawn, and how a block is called with them alone.

N sequences of S tokens in a chunk, H hidden; R rows of N and L tokens of S that are drawn.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from llmprune.anatomy.blocks import Call


@dataclass(frozen=True)
class Part:
    """The first tokens of some sequences of a chunk.

    Attributes:
        chunk: its number.
        rows: which sequences.
        length: tokens of each.
    """

    chunk: int
    rows: tuple[int, ...]
    length: int

    @property
    def num_tokens(self) -> int:
        """Of all its sequences."""
        return len(self.rows) * self.length

    def of(self, values_NSX: Tensor) -> Tensor:
        """What of a chunk's values [N, S, X] are its own [R, L, X]; a view where that is all of them."""
        rows_NLX = values_NSX[:, : self.length]
        return rows_NLX if self.rows == tuple(range(len(values_NSX))) else rows_NLX[list(self.rows)]

    def within(self, run: Part) -> Part:
        """Where it lies in the values of a part that holds it."""
        return Part(self.chunk, tuple(run.rows.index(row) for row in self.rows), self.length)


def whole(chunk: int, hidden_NSH: Tensor) -> Part:
    """All of a chunk."""
    return Part(chunk, tuple(range(len(hidden_NSH))), hidden_NSH.shape[1])


def draw(hidden: Sequence[Tensor], rng: random.Random, num_tokens: int | None, *, together: bool = False) -> list[Part]:
    """Random sequences without replacement, the last of them cut off where ``num_tokens`` is reached (Sieberling et al. 2024,
    arXiv 2410.14649, section 3); all tokens where there are no more. ``num_tokens`` None: one of the chunks, as it is.

    Args:
        hidden: the chunks, each [N, S, H].
        together: from as few chunks as can be, where a chunk costs as much as all that is drawn of it.
    """
    if num_tokens is None:
        chunk = rng.randrange(len(hidden))
        return [whole(chunk, hidden[chunk])]
    assert num_tokens >= 1
    rows = [(chunk, row) for chunk, hidden_NSH in enumerate(hidden) for row in range(len(hidden_NSH))]
    rng.shuffle(rows)
    if together:
        order = rng.sample(range(len(hidden)), len(hidden))
        rows.sort(key=lambda row: order[row[0]])
    found: dict[tuple[int, int], list[int]] = {}
    for chunk, row in rows:
        length = min(hidden[chunk].shape[1], num_tokens)
        found.setdefault((chunk, length), []).append(row)
        num_tokens -= length
        if not num_tokens:
            break
    return [Part(chunk, tuple(sorted(own)), length) for (chunk, length), own in sorted(found.items())]


def narrowed(call: Call, part: Part, hidden_NSH: Tensor) -> Call:
    """The call of a block with a part of the chunk ``hidden_NSH``. What its arguments' axes are is told by their sizes, so a
    caller checks once that the outputs are those of the whole chunk.
    """
    num_rows, length = hidden_NSH.shape[:2]
    if part == whole(part.chunk, hidden_NSH):
        return call

    def narrow(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() > 1 and len(value) == num_rows > 1:
            value = value[list(part.rows)]
        for axis, size in enumerate(value.shape):
            if size == length and (axis > 0 or value.dim() == 1):
                value = value.narrow(axis, 0, part.length)
        return value

    args, kwargs = tree_map(narrow, (call.args, call.kwargs))
    return Call(args, kwargs, call.hidden_key)
