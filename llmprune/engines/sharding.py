"""Several processes that work on one model: each has some of the calibration sequences.

Statistics of a site's inputs are sums over tokens, and gradients are sums over sequences, so those of all processes add up to
those of the whole set. Every site is solved by one process, and its weight given to the others, so that all hold the same model
after every block. Nothing here depends on when a process comes: sums are taken in the order of the processes, and a job that is
done again ends in the same bytes.

N sequences of S tokens, I in and O out features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count as count_up
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from llmprune.anatomy.sites import Site
from llmprune.devices import memory_errors
from llmprune.errors import ConfigError
from llmprune.processes import first_says, num_processes, own_number, peers, together
from llmprune.report import SiteReport
from llmprune.spec import Need
from llmprune.stats import LinearStats

A = TypeVar("A")
B = TypeVar("B")

_PIECE = 1 << 24
"""Numbers that are summed over the processes at a time: bounds what the sum takes beside them."""

Collect = Callable[[Mapping[str, Site], bool], dict[str, LinearStats]]
"""(sites, whole) -> their statistics in this process: of all of them, or of the first group."""


@dataclass(frozen=True)
class Shares:
    """What one of several processes does of a job. All of them have to make the same calls in the same order.

    Of size 1 it does all, and there is nobody to talk to.

    Attributes:
        rank: which one this is.
        size: how many there are.
        device: where it works; what is exchanged goes through there.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def of(cls, device: torch.device) -> Shares:
        """Those of this process, which have met."""
        return cls(own_number(), num_processes(), device)

    @classmethod
    def alone(cls) -> Shares:
        """All there is to do."""
        return cls(0, 1, torch.device("cpu"))

    def rows(self, ids_NS: Tensor) -> Tensor:
        """This process's own sequences: dealt in turn, so that every process has as many of each batch, to one."""
        if len(ids_NS) < self.size:
            raise ConfigError(
                f"{self.size} processes need a calibration sequence each, got {len(ids_NS)}. Use more --num-samples, or start "
                "fewer processes."
            )
        return ids_NS[self.rank :: self.size]

    def batches(self, ids_NS: Tensor, batch_size: int) -> tuple[Sequence[Tensor], list[int | None]]:
        """Of every batch of all sequences those that are this process's own, where it has any; and for every batch which of
        these they are.
        """
        ends = [*range(0, len(ids_NS), batch_size), len(ids_NS)]
        counts = [len(range(self.rank, after, self.size)) - len(range(self.rank, before, self.size))
                  for before, after in pairwise(ends)]  # fmt: skip
        batches = self.rows(ids_NS).split([count for count in counts if count])
        number = count_up()
        return batches, [next(number) if count else None for count in counts]

    def part(self, ids_NS: Tensor) -> Tensor:
        """This process's part of some sequences, which may be none of them."""
        return ids_NS.tensor_split(self.size)[self.rank]

    def together(self, work: Callable[[], A]) -> list[A]:
        """What ``work()`` returns in each process, for all; an error that ends it in one ends it in all."""

        def guarded() -> A:
            with memory_errors():
                return work()

        return [work()] if self.size == 1 else together(guarded)

    def gathered(self, steps: Generator[B, None, A]) -> Generator[B, None, list[A]]:
        """:meth:`together` of what a generator returns, after its steps."""
        own: list[A] = []
        failure: Exception | None = None
        try:
            own.append((yield from steps))
        except Exception as error:  # all of them have to hear of it
            failure = error

        def said() -> A:
            if failure is not None:
                raise failure
            return own[0]

        return self.together(said)

    def by_first(self, work: Callable[[], A]) -> A:
        """What ``work()`` returns in the first process."""
        return work() if self.size == 1 else first_says(work)

    def mean(self, count: int, work: Callable[[], float]) -> float:
        """The mean of what ``work()`` finds in every process for its ``count`` sequences; it is not called for none."""
        parts = self.together(lambda: (count, work() if count else 0.0))
        return sum(count * value for count, value in parts) / sum(count for count, _ in parts)

    # Statistics -----------------------------------------------------------------------------------------------------

    def merged(
        self, pending: Mapping[str, Site], collect: Collect, *, whole: bool, need: Need, kind: type[LinearStats] = LinearStats
    ) -> dict[str, LinearStats]:
        """Statistics of all processes together, of the sites that the first group (or ``whole``) has in any of them.

        An expert may have been reached in some processes alone: the others have seen no token of it, and add nothing.
        """
        own: dict[str, LinearStats] = {}

        def collected(sites: Mapping[str, Site], everything: bool) -> list[dict[str, tuple[int, int]]]:
            def work() -> dict[str, tuple[int, int]]:
                own.clear()
                own.update({name: stats for name, stats in collect(sites, everything).items() if name in sites})
                return _described(own)

            return self.together(work)

        found = collected(pending, whole)
        names = [name for name in pending if any(name in one for one in found)]
        if not whole:
            names = _group(pending, found)
            if any(_stopped_before(names, pending, one) for one in found):
                found = collected({name: pending[name] for name in names}, True)
        result: dict[str, LinearStats] = {}
        sums: dict[tuple[int | None, ...], LinearStats] = {}
        for name in names:
            shared = tuple(one[name][0] if name in one else None for one in found)  # sites of one input share its statistics
            if shared not in sums:
                site = pending[name]
                stats = own.get(name) or kind(site.shape[1], need, site.stored.device)
                if any(stats is other for other in sums.values()):  # one input here, but not so in another process
                    stats = copy.deepcopy(stats)
                stats.num_tokens = sum(one[name][1] for one in found if name in one)
                sums[shared] = stats
            result[name] = sums[shared]
        for stats in sums.values():
            for part in (stats.sq_I, stats.sum_I, stats.gram_II, getattr(stats, "squares_I", None)):
                if part is not None and stats.need > Need.NOTHING:
                    self.sum_(part)
        return result

    def sum_(self, tensor: Tensor) -> None:
        """Add up a tensor over all processes, in place: in fp64 and in their order, so that it is the same in every run.

        Each process sums a part of it and gives that to the others, which moves as much as a ring does.
        """
        from torch.distributed import all_gather, all_to_all_single

        if self.size == 1:
            return
        flat = tensor.reshape(-1)
        for piece in flat.split(_PIECE):
            padded = piece.new_zeros(-(-len(piece) // self.size) * self.size, device=self.device)
            padded[: len(piece)] = piece
            parts = torch.empty_like(padded)
            with peers():
                all_to_all_single(parts, padded)
                own = parts.view(self.size, -1).sum(0, dtype=torch.float64).to(tensor.dtype)
                all_gather(list(padded.view(self.size, -1)), own)
            piece.copy_(padded[: len(piece)])
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view_as(tensor))

    # Weights --------------------------------------------------------------------------------------------------------

    def pruned(
        self, work: Sequence[tuple[Site, LinearStats | None]], prune: Callable[[Site, LinearStats | None], SiteReport]
    ) -> list[SiteReport]:
        """Prune the sites, each in one process, and give all of them the weights; the reports of all sites."""
        owners = _dealt([_cost(site, stats) for site, stats in work], self.size)
        own = [pair for pair, owner in zip(work, owners, strict=True) if owner == self.rank]
        parts = self.together(lambda: [prune(site, stats) for site, stats in own])
        for (site, _), owner in zip(work, owners, strict=True):
            self.give_(site.stored, owner)
        turns = [iter(part) for part in parts]
        return [next(turns[owner]) for owner in owners]

    def first_changes(self, block: nn.Module, work: Callable[[], A]) -> A:
        """What ``work()`` returns in the first process, which may change the block: all have its weights afterwards."""
        result = first_says(work)
        self.same_(block)
        return result

    def same_(self, block: nn.Module) -> None:
        """Give all processes the first one's weights of a block, in place."""
        for parameter in block.parameters():
            self.give_(parameter.detach(), 0)

    def give_(self, tensor: Tensor, source: int) -> None:
        """Make a tensor in all processes what it is in one of them, in place and bit for bit."""
        from torch.distributed import broadcast

        if self.size == 1:
            return
        moved = tensor.to(self.device).contiguous()
        with peers():
            broadcast((moved if moved.dim() else moved[None]).view(torch.uint8), source)
        if moved.data_ptr() != tensor.data_ptr() and self.rank != source:
            tensor.copy_(moved)


def _described(own: Mapping[str, LinearStats]) -> dict[str, tuple[int, int]]:
    """Of every site which of the statistics are its own, by number, and their tokens."""
    numbers: dict[int, int] = {}
    return {name: (numbers.setdefault(id(stats), len(numbers)), stats.num_tokens) for name, stats in own.items()}


def _key(site: Site) -> tuple[int, str] | None:
    """The parameter that an expert is a part of; None for other sites."""
    return (id(site.module), site.parameter) if site.expert is not None else None


def _group(pending: Mapping[str, Site], found: Sequence[Mapping[str, object]]) -> list[str]:
    """The group of the first process that has one, with all experts of its parameters that any process has seen."""
    leader = next((one for one in found if one), {})
    parameters = {_key(pending[name]) for name in leader} - {None}
    seen = {name for one in found for name in one}
    return [name for name in pending if name in leader or (name in seen and _key(pending[name]) in parameters)]


def _stopped_before(names: Sequence[str], pending: Mapping[str, Site], one: Mapping[str, object]) -> bool:
    """Whether a process may have met a site of the group after its own group was complete. It watches all experts of a
    parameter that is in its group.
    """
    parameters = {_key(pending[name]) for name in one} - {None}
    return any(name not in one and _key(pending[name]) not in parameters for name in names)


def _cost(site: Site, stats: LinearStats | None) -> int:
    """Of solving a site, in some unit: methods that hold the Gram matrix factorise it and go through its columns."""
    rows, columns = site.shape
    return rows * columns * columns if stats is not None and stats.gram_II is not None else rows * columns


def _dealt(costs: Sequence[int], size: int) -> list[int]:
    """Which of ``size`` processes takes each: the dearest first, always to the one with the least work."""
    loads, owners = [0] * size, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return owners
