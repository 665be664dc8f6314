"""Distortion curves of modules, each by itself, and what they say at once: the front of size against divergence.

A module at a level, all others dense (Xu et al. 2023, arXiv 2308.10438, section 3): if the distortions of modules add up,
dynamic programming over them is the search's result without a search. They do about as far as the model stays near the dense
one, so some points of the front are measured.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from llmprune.allocate.evolution import Levels
from llmprune.engines.divergence import Candidate
from llmprune.engines.supernet import Rack
from llmprune.structured.budget import least


class Measure(Protocol):
    """Divergences of candidates of which modules may be dense; as :class:`llmprune.engines.evolution.Divergence`."""

    def __call__(
        self, candidates: Sequence[Candidate], rng: random.Random | None, num_tokens: int | None = None
    ) -> list[float]:
        """In nats."""


@dataclass(frozen=True)
class FrontPoint:
    """An allocation of dynamic programming on the curves.

    Attributes:
        num_parameters: left in the modules.
        predicted: divergence as the sum of the modules' own, in nats.
        measured: divergence of the model that is pruned so, on the tokens of the curves; None where it was not measured.
    """

    num_parameters: int
    predicted: float
    measured: float | None = None


@dataclass(frozen=True)
class Curves:
    """Divergence of each level of each module, on a draw of tokens that is the same for all.

    Attributes:
        num_tokens: drawn, at most.
        seed: of the draw.
    """

    racks: Sequence[Rack]
    num_tokens: int
    seed: int

    def measure(self, measure: Measure) -> Generator[int, None, list[tuple[float, ...]]]:
        """The curves, block by block; yields the number of blocks done. The dense level is 0 and is not measured.

        Candidates are one block's at a time: they share the forwards before it, and only their hidden states are held.
        """
        found = [[0.0] * len(rack.counts) for rack in self.racks]
        last = self.racks[-1].block if self.racks else -1
        for block in range(last + 1):
            asked = [
                (number, level)
                for number, rack in enumerate(self.racks)
                for level, count in enumerate(rack.counts)
                if rack.block == block and count
            ]
            if asked:
                candidates = [self._alone(number, level) for number, level in asked]
                for (number, level), divergence in zip(asked, self.draw(measure, candidates), strict=True):
                    found[number][level] = divergence
            yield block + 1
        return [tuple(own) for own in found]

    def front(self, curves: Sequence[Sequence[float]], num_points: int) -> list[tuple[Levels, FrontPoint]]:
        """Allocations of about evenly spaced numbers of parameters, from all to what the levels leave at least: of each size
        the least sum of divergences, whatever kind the parameters are of.
        """
        per_group = [rack.module.parameters_per_group for rack in self.racks]
        spent = [[count * size for count in rack.counts] for rack, size in zip(self.racks, per_group, strict=True)]
        total = sum(rack.module.num_groups * size for rack, size in zip(self.racks, per_group, strict=True))
        low, high = sum(own[0] for own in spent), sum(own[-1] for own in spent)
        found: dict[Levels, FrontPoint] = {}
        for point in range(num_points):
            levels = least(spent, curves, low + point * (high - low) // (num_points - 1), high)
            assert levels is not None, "all of the last levels are within bounds"
            removed = sum(own[level] for own, level in zip(spent, levels, strict=True))
            predicted = sum(own[level] for own, level in zip(curves, levels, strict=True))
            found[levels] = FrontPoint(total - removed, predicted)
        return list(found.items())

    def measured(self, measure: Measure, front: Sequence[tuple[Levels, FrontPoint]], num_points: int) -> list[FrontPoint]:
        """The front, with about so many of its points measured, evenly spaced, the first and the last among them."""
        wanted = {index * (len(front) - 1) // max(num_points - 1, 1) for index in range(num_points)}
        order = sorted(wanted)
        divergences = dict(zip(order, self.draw(measure, [front[index][0] for index in order]), strict=True))
        return [replace(point, measured=divergences.get(index)) for index, (_, point) in enumerate(front)]

    def draw(self, measure: Measure, candidates: Sequence[Candidate]) -> list[float]:
        """Divergences on the tokens of the curves."""
        return measure(candidates, random.Random(self.seed), self.num_tokens)

    def _alone(self, number: int, level: int) -> Candidate:
        return tuple(level if other == number else None for other in range(len(self.racks)))
