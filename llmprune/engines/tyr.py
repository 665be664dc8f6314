"""Týr-the-Pruner's outer loop (arXiv 2503.09657, algorithm 4): a supernet, a search on it, and again with half the step.

Every supernet is built from the dense weights, around what the search before it found; the one before it is gone by then.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llmprune.allocate.evolution import Levels, Search
from llmprune.anatomy.blocks import Recording, Stack
from llmprune.engines.evolution import Divergence, Head, scratch
from llmprune.engines.supernet import Rack, Supernet, ladder_of, least_loss, level_bytes, racks_of
from llmprune.structured.levels import centres, grid
from llmprune.structured.units import Module

ITERATIONS = 4


@dataclass(frozen=True)
class Step:
    """One unit of work is done: a block of a supernet, or a generation of a search.

    Attributes:
        iteration: from 1.
        block: number of blocks done while a supernet is built; None in the search.
        generation: of the search.
        divergence: the best so far, in nats; None while a supernet is built.
    """

    iteration: int
    block: int | None = None
    generation: int | None = None
    divergence: float | None = None


@dataclass
class Tyr:
    """The search of how many groups go from each module, and which.

    Attributes:
        modules: what groups go from, in the order of the blocks; at least one.
        calibration: sequences the supernet is built on.
        texts: sequences the divergence from the dense model is measured on, a chunk a batch.
        head: the model's own, on ``texts``.
        sparsity: share of the groups of each kind that go.
        directory: where what does not fit in memory goes; None for the system's own place.
        counts: groups removed from each module; the result once run.
        kept: the groups of each module that stay, rising, int64 [G]; known once run.
        curves: of every iteration, (generation, best divergence) as it fell.
    """

    stack: Stack
    modules: Sequence[Module]
    calibration: Recording
    texts: Recording
    device: torch.device
    head: Head
    sparsity: float
    iterations: int = ITERATIONS
    generations: int = 50
    offspring: int = 128
    seed: int = 0
    sequential: bool = False
    directory: Path | None = None
    counts: list[int] = field(init=False)
    kept: list[Tensor] = field(init=False, default_factory=list)
    curves: list[list[tuple[int, float]]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        assert self.iterations >= 1
        self.counts = centres(self.modules, self.sparsity)

    def run(self) -> Iterator[Step]:
        """Search; the model then holds the weights of what was found, zero in all columns that go. Stopped before its end, by
        an error or by closing the generator, it leaves the model dense.

        Raises:
            NonFiniteError, FactorizationError, UnsupportedModel: as :meth:`llmprune.engines.supernet.Supernet.fill` does.
            OutputError: the levels fit neither in memory nor on the disk.
        """
        for iteration in range(1, self.iterations + 1):
            racks = racks_of(self.modules, grid(self.modules, self.counts, iteration))
            with scratch(level_bytes(racks), self.directory, owner="the supernet", remedy="") as directory:
                supernet = Supernet(self.stack, racks, directory, sequential=self.sequential)
                for block in supernet.fill(self.calibration, self.device):
                    yield Step(iteration, block=block)
                try:
                    best = yield from self._search(supernet, iteration)
                    self.counts = [rack.counts[level] for rack, level in zip(racks, best, strict=True)]
                    self.kept = [supernet.level(number, level)[0] for number, level in enumerate(best)]
                    for number, level in enumerate(best):
                        supernet.hold_(number, level if iteration == self.iterations else None)
                except BaseException:  # closing the generator too
                    supernet.restore_()
                    raise

    def _search(self, supernet: Supernet, iteration: int) -> Generator[Step, None, Levels]:
        fitness = Divergence(self.stack, supernet, self.texts, self.device, self.head)
        start = self._start(supernet.groups, supernet.losses, fitness)
        search = Search(ladder_of(supernet.groups, start), self.generations, self.offspring, self.seed + iteration)
        self.curves.append(search.curve)
        running = search.run(fitness)
        while True:
            try:
                generation = next(running)
            except StopIteration as stop:
                best: Levels = stop.value
                return best
            yield Step(iteration, generation=generation, divergence=search.curve[-1][1])

    def _start(self, racks: Sequence[Rack], losses: Sequence[Sequence[float]], fitness: Divergence) -> Levels:
        """The centre, or the levels of the least loss where they diverge less."""
        centre = tuple(rack.counts.index(count) for rack, count in zip(racks, self.counts, strict=True))
        starts = list(dict.fromkeys([centre, least_loss(racks, losses, centre)]))
        divergences = fitness(starts, None)
        return starts[divergences.index(min(divergences))]
