"""Týr-the-Pruner's outer loop (arXiv 2503.09657, algorithm 4): a supernet, a search on it, and again with half the step.

Every supernet is built from the dense weights, around the best that was found; the one before it is gone by then. Beyond the
paper: the search starts at what dynamic programming makes of measured curves where that is better than the centre, an iteration
that ends worse than one before it is not taken, and the result may be pruned once more as a model of its own.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from llmprune.allocate.evolution import Levels, Search
from llmprune.anatomy.blocks import Recording, Stack
from llmprune.engines.curves import Curves, FrontPoint
from llmprune.engines.divergence import Divergence, Head
from llmprune.engines.evolution import scratch
from llmprune.engines.supernet import Rack, Supernet, level_bytes, racks_of
from llmprune.engines.tyr_settings import FRONT_POINTS, MEASURED_POINTS, TyrSettings, stages_for
from llmprune.structured.budget import Budget
from llmprune.structured.levels import grid, step_of, trades_of
from llmprune.structured.slicing import Cut
from llmprune.structured.uniform import Widths, closest
from llmprune.structured.units import Part

Phase = Literal["supernet", "curves", "search", "settle"]


@dataclass(frozen=True)
class Step:
    """One unit of work is done: a block, or a generation of a search.

    Attributes:
        done, total: units; a search that has nothing left to try skips some.
        iteration: from 1; 0 after the last.
        divergence: the best so far in this iteration, in nats; None while a supernet is built.
    """

    phase: Phase
    done: int
    total: int
    iteration: int
    divergence: float | None = None


@dataclass
class Round:
    """One iteration, for the report.

    Attributes:
        iteration: from 1.
        steps: groups from one level to the next, by kind and group size.
        starts: divergence of each allocation the search could begin at, in nats.
        curve: (generation, best divergence) as it fell.
        counts: groups removed from each module at its end.
        supernet_bytes: of all levels, the dense weights included.
        on_disk: whether they did not fit in memory.
    """

    iteration: int
    steps: dict[str, int]
    supernet_bytes: int
    on_disk: bool = False
    starts: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    seconds_supernet: float = 0.0
    seconds_curves: float = 0.0
    seconds_search: float = 0.0
    num_generations: int = 0
    num_evaluated: int = 0

    @property
    def divergence(self) -> float:
        """Of the best, in nats."""
        return self.curve[-1][1]

    @property
    def seconds_per_generation(self) -> float:
        """0 where there was none."""
        return self.seconds_search / self.num_generations if self.num_generations else 0.0


@dataclass
class Tyr:
    """The search of how many groups go from each module, and which; what stays, and its weights, are the cuts.

    Attributes:
        modules: what groups go from, mixtures too, in the order of the blocks.
        budget: how much goes from them.
        calibration: sequences the supernet is built on.
        texts: sequences the divergence from the dense model is measured on, a chunk a batch.
        head: the model's own, on ``texts``.
        widths: pairs that every layer may be cut to, instead of widths of its own; each is measured and the best taken.
        directory: where what does not fit in memory goes; None for the system's own place.
        cuts: of each module by name; known once run.
        counts: groups removed from each module; known once run.
        divergence: of the result on ``texts``, in nats; known once run.
        settled: divergence of the result pruned once more, kept where it is less; None without.
        rounds: of every iteration that is done.
        front: size against divergence, by the first iteration's curves; empty without them.
    """

    stack: Stack
    modules: Sequence[Part]
    budget: Budget
    calibration: Recording
    texts: Recording
    device: torch.device
    head: Head
    settings: TyrSettings
    widths: Sequence[Widths] | None = None
    directory: Path | None = None
    cuts: dict[str, Cut] = field(init=False, default_factory=dict)
    counts: list[int] = field(init=False, default_factory=list)
    divergence: float = field(init=False, default=float("inf"))
    settled: float | None = field(init=False, default=None)
    rounds: list[Round] = field(init=False, default_factory=list)
    front: list[FrontPoint] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        assert tuple(self.modules) == self.budget.modules
        self._num_iterations = min(self.settings.iterations, 1) if self.widths else self.settings.iterations
        self._current: Round | None = None
        self._start: Levels = ()
        self._state: dict[str, Any] = {}
        self._search: Search | None = None

    @property
    def total(self) -> int:
        """Steps of a run."""
        num_blocks = len(self.stack.blocks)
        return self._num_iterations * self._each + (num_blocks if self._settles else 0)

    @property
    def _each(self) -> int:
        """Steps of an iteration."""
        num_blocks, warm = len(self.stack.blocks), self.settings.warm_start
        return num_blocks + (len(self.widths) if self.widths else (num_blocks if warm else 0) + self.settings.generations)

    @property
    def _settles(self) -> bool:
        return self.settings.settle or not self._num_iterations

    def run(self) -> Iterator[Step]:
        """Search. The model is dense afterwards, also where it is stopped before its end by an error or by closing this.

        Raises:
            NonFiniteError, FactorizationError, UnsupportedModel: as :meth:`llmprune.engines.supernet.Supernet.fill` does.
            OutputError: the levels fit neither in memory nor on the disk.
        """
        while len(self.rounds) < self._num_iterations:
            yield from self._iterate(len(self.rounds) + 1)
        if self.rounds:
            best = self._best(self.rounds)
            if not self.cuts:  # of a run that went on from a snapshot: the weights are not in it
                with self._supernet(self._racks(best.iteration)) as supernet:
                    yield from self._fill(supernet, best.iteration, self._done(best.iteration))
                    self._take(supernet, best)
        if self._settles:
            yield from self._settle()
        assert (self.widths and not self.budget.shared) or self.budget.removed(self.counts) >= self.budget.target

    def snapshot(self) -> dict[str, Any]:
        """What :meth:`restore_` needs, as JSON has it; before :meth:`run` or after any of its steps."""
        state = self._search.snapshot() if self._search else self._state
        return {
            "rounds": [asdict(one) for one in self.rounds], "current": asdict(self._current) if self._current else None,
            "start": list(self._start), "search": state, "front": [asdict(point) for point in self.front],
        }  # fmt: skip

    def restore_(self, state: Mapping[str, Any]) -> None:
        """Before :meth:`run`, of the same model, texts and settings: go on from a snapshot to the same end, bit for bit.

        Supernets are built again, as no weights are in it.
        """
        self.rounds = [_round(own) for own in state["rounds"]]
        self._current = _round(state["current"]) if state["current"] else None
        self._start, self._state = tuple(state["start"]), dict(state["search"])
        self.front = [FrontPoint(**point) for point in state["front"]]

    def _iterate(self, iteration: int) -> Iterator[Step]:
        racks, done = self._racks(iteration), self._done(iteration)
        own = self._current or Round(iteration, self._steps(iteration), level_bytes(racks))
        with self._supernet(racks) as supernet:
            begun = time.perf_counter()
            yield from self._fill(supernet, iteration, done)
            own.seconds_supernet, own.on_disk = time.perf_counter() - begun, supernet.directory is not None
            done += len(self.stack.blocks)
            fitness = self._fitness(supernet)
            searching = self._choose if self.widths else self._evolve
            best = yield from searching(supernet, fitness, own, done)
            own.counts = [rack.counts[level] for rack, level in zip(racks, best, strict=True)]
            self.rounds.append(own)
            self._current, self._search, self._start, self._state = None, None, (), {}
            if self._best(self.rounds) is own:
                self._take(supernet, own)

    def _evolve(self, supernet: Supernet, fitness: Divergence, own: Round, done: int) -> Generator[Step, None, Levels]:
        """The best levels by evolutionary search, from the best start there is."""
        settings, racks = self.settings, supernet.groups
        if not self._start:
            begun = time.perf_counter()
            yield from self._find_start(supernet, fitness, own, done)
            own.seconds_curves = time.perf_counter() - begun
        done += len(self.stack.blocks) if settings.warm_start else 0
        self._current = own
        ladder = self.budget.ladder([rack.counts for rack in racks], self._start, own.iteration)
        stages = stages_for(settings.stages, _num_tokens(self.texts))
        seed = settings.seed + own.iteration
        search = self._search = Search(
            ladder, settings.generations, settings.offspring, seed, stages=stages, max_moves=settings.max_moves
        )
        if self._state:
            search.restore_(self._state)
        running, begun = search.run(fitness), time.perf_counter() - own.seconds_search
        while True:
            try:
                generation = next(running)
            except StopIteration as stop:
                own.curve, own.num_generations = list(search.curve), search.num_generations
                own.num_evaluated = search.num_evaluated
                best: Levels = stop.value
                return best
            own.seconds_search = time.perf_counter() - begun
            yield self._step("search", done + generation, own.iteration, search.curve[-1][1])
            begun = time.perf_counter() - own.seconds_search

    def _find_start(self, supernet: Supernet, fitness: Divergence, own: Round, done: int) -> Iterator[Step]:
        """The centre, or what dynamic programming says of the local losses or of measured curves, where that diverges less."""
        settings, racks = self.settings, supernet.groups
        levels = [rack.counts for rack in racks]
        centre = self._levels(racks, self._centre(own.iteration))
        starts = {"centre": centre}
        if settings.warm_start:
            starts["losses"] = self.budget.assign(levels, supernet.losses, centre, own.iteration)
            curves = Curves(racks, settings.curve_tokens, settings.seed)
            measuring = curves.measure(fitness)
            while True:
                try:
                    block = next(measuring)
                except StopIteration as stop:
                    distortions = stop.value
                    break
                yield self._step("curves", done + block, own.iteration)
            starts["curves"] = self.budget.assign(levels, distortions, centre, own.iteration)
            if own.iteration == 1:
                self.front = curves.measured(fitness, curves.front(distortions, FRONT_POINTS), MEASURED_POINTS)
        unique = list(dict.fromkeys(starts.values()))
        divergences = dict(zip(unique, fitness(unique, None), strict=True))
        own.starts = {name: divergences[start] for name, start in starts.items()}
        self._start = min(unique, key=divergences.__getitem__)

    def _choose(self, supernet: Supernet, fitness: Divergence, own: Round, done: int) -> Generator[Step, None, Levels]:
        """The levels of the pair of widths that diverges the least; they are few, so all are measured."""
        assert self.widths
        self._current = own
        racks = supernet.groups
        pairs = [self._levels(racks, one.removed(self.modules)) for one in self.widths]
        for number in range(len(own.starts), len(pairs)):
            (divergence,) = fitness([pairs[number]], None)
            own.starts[str(number)] = divergence
            least = min(own.starts.values())
            if not own.curve or least < own.curve[-1][1]:
                own.curve.append((number, least))
            yield self._step("search", done + number + 1, own.iteration, least)
        return pairs[own.curve[-1][0]]

    def _settle(self) -> Iterator[Step]:
        """Prune every module to its count, on what those before it leave, and keep that where it diverges less."""
        counts = self.counts or self._centre(1)
        racks = racks_of(self.modules, [(count,) for count in counts])
        with self._supernet(racks, sequential=True) as supernet:
            yield from self._fill(supernet, 0, self._done(self._num_iterations + 1))
            (self.settled,) = self._fitness(supernet)([(0,) * len(racks)], None)
            if self.settled < self.divergence:
                self._keep(supernet, (0,) * len(racks), self.settled)

    def _take(self, supernet: Supernet, own: Round) -> None:
        self._keep(supernet, self._levels(supernet.groups, own.counts), own.divergence)

    def _keep(self, supernet: Supernet, levels: Levels, divergence: float) -> None:
        """Copy what stays of each module: the supernet is gone after this."""
        self.divergence = divergence
        self.counts = [rack.counts[level] for rack, level in zip(supernet.groups, levels, strict=True)]
        for number, level in enumerate(levels):
            self.cuts[self.modules[number].name] = supernet.cut(number, level)

    @contextmanager
    def _supernet(self, racks: list[Rack], *, sequential: bool = False) -> Iterator[Supernet]:
        """To be filled; the model is dense when this ends."""
        with scratch(level_bytes(racks), self.directory, owner="the supernet", remedy="") as directory:
            supernet = Supernet(
                self.stack, racks, directory, damping=self.settings.damping,
                sequential=sequential or self.settings.sequential,
            )  # fmt: skip
            try:
                yield supernet
            finally:  # closing the generator too
                supernet.restore_()

    def _fill(self, supernet: Supernet, iteration: int, done: int) -> Iterator[Step]:
        for block in supernet.fill(self.calibration, self.device):
            yield self._step("supernet" if iteration else "settle", done + block, iteration)

    def _fitness(self, supernet: Supernet) -> Divergence:
        weight = self.settings.hidden_weight
        return Divergence(self.stack, supernet, self.texts, self.device, self.head, hidden_weight=weight)

    def _racks(self, iteration: int) -> list[Rack]:
        if self.widths:
            counts = zip(*(one.removed(self.modules) for one in self.widths), strict=True)
            return racks_of(self.modules, [sorted(set(own)) for own in counts])
        centre = self._centre(iteration)
        return racks_of(self.modules, grid(self.modules, centre, iteration), centre)

    def _centre(self, iteration: int) -> list[int]:
        """Groups that go from each module in the middle of an iteration's levels."""
        if self.widths:
            return closest(self.widths, self.modules, self.budget.sparsity).removed(self.modules)
        if iteration == 1:
            return self.budget.centre()
        return self.budget.fit(self._best(self.rounds[: iteration - 1]).counts, iteration)

    def _steps(self, iteration: int) -> dict[str, int]:
        if self.widths:
            return {}
        return {
            f"{kind} of {size}": step_of([self.modules[index] for index in own], iteration)
            for (kind, size), own in trades_of(self.modules).items()
        }

    def _done(self, iteration: int) -> int:
        return (iteration - 1) * self._each

    def _step(self, phase: Phase, done: int, iteration: int, divergence: float | None = None) -> Step:
        return Step(phase, done, self.total, iteration, divergence)

    @staticmethod
    def _levels(racks: Sequence[Rack], counts: Sequence[int]) -> Levels:
        return tuple(rack.counts.index(count) for rack, count in zip(racks, counts, strict=True))

    @staticmethod
    def _best(rounds: Sequence[Round]) -> Round:
        """The first of the least divergence."""
        return min(rounds, key=lambda one: one.divergence)


def _round(state: Mapping[str, Any]) -> Round:
    own = Round(**state)
    own.curve = [(generation, divergence) for generation, divergence in own.curve]
    return own


def _num_tokens(recording: Recording) -> int:
    """Positions of all chunks."""
    return sum(hidden_NSH.shape[0] * hidden_NSH.shape[1] for hidden_NSH in recording.hidden)
