"""The stage ``allocate``: survey the dense model where the allocation asks for it, and share the zeros among the sites."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.allocate import ALLOCATORS, SiteFacts
from llmprune.allocate.budget import Budget
from llmprune.allocate.evolution import Ladder, Levels, Search, climb
from llmprune.allocate.mixed import Menu
from llmprune.anatomy.blocks import Stack, eager_experts, record
from llmprune.anatomy.sites import select
from llmprune.devices import module_device
from llmprune.engines.divergence import Divergence
from llmprune.engines.evolution import Group, Shelves, rung_bytes, scratch
from llmprune.engines.sharding import Shares
from llmprune.engines.survey import Survey, probe_sequences, shapes_of, surveyed_need, surveyor
from llmprune.events import Event, Progress, Warned
from llmprune.io.statistics import Statistics
from llmprune.measure.dispatch import dispatched
from llmprune.measure.heads import head_of
from llmprune.methods import get_method
from llmprune.report import AllocationReport, SearchReport, StatisticsReport
from llmprune.spec import Need, Pattern, PruneConfig, Scope, Target

SEARCH_TOKENS = 8192
"""Calibration tokens a search measures its best candidates on, at most."""
NUM_CHUNKS = 8


@dataclass(frozen=True)
class Sharing:
    """One allocation of a job; S tokens a sequence.

    Attributes:
        ids_NS: the calibration tokens, all sequences.
        batch_size: calibration sequences per forward.
        directory: where a search may put what does not fit in memory; None for the system's own place.
        statistics: the cache for statistics of such a need, where there is one.
        reused: what was found there.
        shares: of several processes what this one does: statistics come from its own sequences, and a search's candidates
            are dealt out. None where it is alone.
    """

    model: PreTrainedModel
    stack: Stack
    config: PruneConfig
    ids_NS: Tensor
    batch_size: int
    device: torch.device
    directory: Path | None = None
    statistics: Callable[[Need], Statistics | None] = lambda _: None
    reused: list[StatisticsReport] = field(default_factory=list)
    shares: Shares | None = None

    @property
    def num_probes(self) -> int:
        """Sequences on which the divergence is measured; 0 where no curves are."""
        curves = ALLOCATORS[self.config.allocation].needs == "curves"
        return probe_sequences(*self.ids_NS.shape) if curves else 0

    @property
    def num_steps(self) -> int:
        """Steps of the stage."""
        generations = self.config.evolution_generations
        search = len(self.stack.blocks) + generations if searches(self.config) else 0
        return len(self.stack.blocks) + self.num_probes + search

    def run(self) -> Generator[Event, None, AllocationReport]:
        """Progress of the stage; returns the allocation. The model is as before afterwards."""
        config, allocator = self.config, ALLOCATORS[self.config.allocation]
        facts = shapes_of(self.stack, config.skip) if allocator.needs == "shapes" else (yield from self._survey())
        mixed = Pattern.parse(config.pattern).mixed
        search = None
        if mixed:
            ladder = Menu.of(facts, config.sparsity).ladder(facts)
            counts = ladder.shares(ladder.start)
        else:
            by_name = allocator.allocate(facts, config.sparsity, self._scope)
            counts = [by_name[fact.name] for fact in facts]
        if searches(config):
            if not mixed:
                budget = Budget.of([fact.shape for fact in facts], config.sparsity, self._scope)
                ladder = climb(facts, counts, budget)
            counts, search = yield from self._search(facts, ladder)
        return AllocationReport(
            name=config.allocation,
            num_zeros=sum(counts),
            numel=sum(fact.numel for fact in facts),
            sparsities={fact.name: count / fact.numel for fact, count in zip(facts, counts, strict=True)},
            patterns={
                fact.name: self._target(fact.shape, count).name for fact, count in zip(facts, counts, strict=True) if mixed
            },
            search=search,
        )

    @property
    def _scope(self) -> Scope:
        return self.config.target(get_method(self.config.method).scope).scope

    def _target(self, shape: tuple[int, int], count: int) -> Target:
        """What a site of this shape with so many zeros is."""
        numel = shape[0] * shape[1]
        target = self.config.target(self._scope)
        if not target.pattern.mixed:
            return replace(target, sparsity=count / numel)
        choices = self.config.choices(shape[1], target.scope)
        return next(choice for choice in choices if round(choice.sparsity * numel) == count)

    def _survey(self) -> Generator[Event, None, list[SiteFacts]]:
        ids_NS, model, num_probes = self.ids_NS, self.model, self.num_probes
        with dispatched(model, self.device):
            device = module_device(model)
            recording = record(model, self.stack, [batch.to(device) for batch in self._own_batches])
            streams = record(model, self.stack, [ids_NS[:num_probes].to(device)]) if num_probes else None
        needs = ALLOCATORS[self.config.allocation].needs
        statistics = self._opened(surveyed_need(needs))
        survey = Survey(
            self.stack, recording, self.config, self.device, needs, streams, statistics=statistics, shares=self.shares
        )
        with eager_experts(model):
            yield from self._steps(survey.run())
        yield from self._close(statistics, "allocate")
        if num_probes:
            with head_of(model, self.stack, ids_NS[:num_probes].split(1), self.device)() as logits:
                yield from self._steps(survey.measure(logits))
        return self.shares.by_first(lambda: survey.facts) if self.shares else survey.facts

    @property
    def _own_batches(self) -> Sequence[Tensor]:
        """The calibration sequences of this process, in batches."""
        own_NS = self.shares.rows(self.ids_NS) if self.shares else self.ids_NS
        return own_NS.split(self.batch_size)  # type: ignore[no-any-return]

    def _opened(self, need: Need) -> Statistics | None:
        """The cache, open for all blocks."""
        statistics = self.statistics(need)
        if statistics is not None:
            statistics.open(len(self.stack.blocks))
        return statistics

    def _close(self, statistics: Statistics | None, stage: str) -> Iterator[Warned]:
        """Let the cache go, and say what became of it."""
        if statistics is not None:
            statistics.close()
            self.reused.append(statistics.report(stage))
            yield from (Warned(message=message) for message in statistics.messages)

    def _steps(self, steps: Iterator[Progress]) -> Iterator[Progress]:
        """A part's steps as those of the whole stage."""
        return (step.model_copy(update={"total": self.num_steps}) for step in steps)

    def _search(self, facts: Sequence[SiteFacts], ladder: Ladder) -> Generator[Event, None, tuple[list[int], SearchReport]]:
        """Search from where the ladder starts, on the whole model; returns the zeros of every site."""
        config, model = self.config, self.model
        sites = {site.name: site for sites in self.stack.sites for site in select(sites, config.skip)}
        groups = [
            Group(
                facts[indices[0]].block,
                tuple(sites[facts[index].name] for index in indices),
                tuple(
                    tuple(self._target(facts[index].shape, count) for index, count in zip(indices, rung, strict=True))
                    for rung in rungs
                ),
            )
            for indices, rungs in zip(ladder.members, ladder.counts, strict=True)
        ]
        chunks = search_chunks(self.ids_NS)
        with dispatched(model, self.device):
            device = module_device(model)
            calibration = record(model, self.stack, [batch.to(device) for batch in self._own_batches])
            recording = record(model, self.stack, [chunk.to(device) for chunk in chunks])
        walk = surveyor(self.stack, calibration, config, self.device, self.shares)
        walk.needs = walk.method.needs
        walk.statistics = statistics = self._opened(walk.needs)
        head = head_of(model, self.stack, chunks, self.device)
        done = len(self.stack.blocks) + self.num_probes
        with scratch(rung_bytes(groups, changes=walk.method.updates_weights), self.directory) as directory:
            shelves = Shelves(self.stack, groups, directory)
            with eager_experts(model):
                for number in shelves.fill(walk):
                    detail = f"candidates: {self.stack.name(number - 1)}"
                    yield Progress(stage="allocate", done=done + number, total=self.num_steps, detail=detail)
            yield from self._close(statistics, "allocate, candidates")
            search = Search(ladder, config.evolution_generations, config.evolution_offspring, config.seed)
            done += len(self.stack.blocks)
            try:
                running = search.run(Divergence(self.stack, shelves, recording, self.device, head))
                while True:
                    try:
                        generation = next(running)
                    except StopIteration as stop:
                        best: Levels = stop.value
                        break
                    detail = f"KL {search.curve[-1][1]:.4f} after {search.curve[0][1]:.4f}"
                    kl = search.curve[-1][1]
                    yield Progress(
                        stage="allocate", done=done + generation, total=self.num_steps, detail=detail, value=kl
                    )  # fmt: skip
            finally:
                shelves.restore_()
        report = SearchReport(
            generations=search.num_generations, num_evaluated=search.num_evaluated,
            num_tokens=sum(chunk.numel() for chunk in chunks), curve=tuple(search.curve),
        )  # fmt: skip
        return ladder.shares(best), report


def targets_of_sites(config: PruneConfig, allocation: AllocationReport | None) -> dict[str, Target]:
    """What the walk is to make of each site, by name."""
    if allocation is None:
        return {}
    target = config.target(get_method(config.method).scope)
    targets = {}
    for name, sparsity in allocation.sparsities.items():
        own = allocation.patterns.get(name, str(target.pattern))
        pattern = Pattern() if own == "dense" else Pattern.parse(own)
        targets[name] = Target(pattern, sparsity, target.scope)
    return targets


def searches(config: PruneConfig) -> bool:
    """Whether the allocation searches on the model."""
    return ALLOCATORS[config.allocation].searches and config.evolution_generations > 0


def search_tokens(num_samples: int, seq_len: int) -> int:
    """Calibration tokens, of whole sequences, that a search measures on."""
    return max(1, min(num_samples, SEARCH_TOKENS // seq_len)) * seq_len


def search_chunks(ids_NS: Tensor) -> tuple[Tensor, ...]:
    """The calibration sequences the search measures on, in at most eight parts of which the first stage draws one."""
    count = search_tokens(*ids_NS.shape) // ids_NS.shape[1]
    size = -(-count // NUM_CHUNKS)
    return tuple(ids_NS[start : min(start + size, count)] for start in range(0, count, size))
