"""The weights of every candidate allocation of a search, and which of them the model holds.

The weights of every rung are computed once, by the job's own method on the dense calibration inputs, and kept as one bit a
weight and, where the method changes what it keeps, the kept values: for nine rungs about a byte a weight of the model for
methods that only score. They lie in CPU memory, or where that is short in a file that is mapped.

O out, I in features.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.anatomy.blocks import Stack
from llmprune.anatomy.sites import Site
from llmprune.devices import free_bytes
from llmprune.engines.layerwise import Walk
from llmprune.engines.sharding import Shares
from llmprune.errors import OutputError
from llmprune.spec import Target
from llmprune.stats import LinearStats

MEMORY_SHARE = 0.5
"""Share of the free memory that the weights of all rungs may take; beyond it they go to disk."""
_ALIGNMENT = 16


@dataclass(frozen=True)
class Group:
    """Sites that take one rung together.

    Attributes:
        block: index of their decoder block.
        sites: the members.
        rungs: target of each member, of each rung.
    """

    block: int
    sites: tuple[Site, ...]
    rungs: tuple[tuple[Target, ...], ...]


Rungs = dict[tuple[int, int], list[Tensor]]
"""By member and rung: the support as bits and, where the method changes what it keeps, the kept values; bytes in CPU memory."""


@dataclass
class Shelf:
    """The weights of the groups of one block, dense and of every rung, in one piece of memory or of a mapped file.

    Attributes:
        directory: where the file goes; None for memory.
    """

    name: str
    directory: Path | None
    parts: list[Tensor] = field(default_factory=list)
    spans: dict[tuple[int, int, int | None], list[tuple[int, int]]] = field(default_factory=dict)
    end: int = 0

    def put(self, group: int, member: int, rung: int | None, tensors: Sequence[Tensor]) -> None:
        """Keep the tensors of a group's member on a rung; None for the dense weight."""
        spans = []
        for tensor in tensors:
            part = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
            spans.append((self.end, len(part)))
            self.parts.append(F.pad(part, (0, -len(part) % _ALIGNMENT)))
            self.end += len(self.parts[-1])
        self.spans[group, member, rung] = spans

    def close(self) -> None:
        """No more is put: join what there is."""
        if self.directory is None:
            self.whole = torch.cat([*self.parts, torch.empty(0, dtype=torch.uint8)])
        else:
            path = self.directory / self.name
            with path.open("wb") as file:  # reserved, as a full disk would kill a process that writes to a mapped hole
                for part in self.parts:
                    file.write(part.numpy().data)
                file.write(bytes(0 if self.end else 1))
            self.whole = torch.from_file(str(path), shared=False, size=self.end, dtype=torch.uint8)
        self.parts = []

    def get(self, group: int, member: int, rung: int | None) -> list[Tensor]:
        """The tensors, as bytes."""
        return [self.whole[start : start + size] for start, size in self.spans[group, member, rung]]


class Placed(Protocol):
    """What takes one rung together, and where it is."""

    @property
    def block(self) -> int:
        """Index of its decoder block."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """Its members."""


G = TypeVar("G", bound=Placed)


@dataclass
class Variants(ABC, Generic[G]):
    """The weights of all rungs, and which of them the model holds; the dense ones are put back at the end.

    Attributes:
        groups: in the order of the blocks, as in the ladder.
        directory: for files; None keeps all in memory.
    """

    stack: Stack
    groups: Sequence[G]
    directory: Path | None = None

    def __post_init__(self) -> None:
        self.shelves: dict[int, Shelf] = {}
        self.held: list[int | None] = [None] * len(self.groups)
        uses = [{id(parameter) for parameter in block.parameters()} for block in self.stack.blocks]
        # Blocks may share a parameter, which is a site of the first one alone.
        self.used_by = [
            [
                number
                for number, group in enumerate(self.groups)
                if any(id(getattr(site.module, site.parameter)) in used for site in group.sites)
            ]
            for used in uses
        ]

    @torch.no_grad()
    def hold_(self, number: int, rung: int | None) -> None:
        """Put a group's weights of a rung into the model; None the dense ones."""
        if self.held[number] == rung:
            return
        shelf = self.shelves[self.groups[number].block]
        for member, site in enumerate(self.groups[number].sites):
            found = [part.to(site.stored.device) for part in shelf.get(number, member, rung)]
            if rung is None:
                site.weight_OI.copy_(found[0].view(site.stored.dtype).view(site.shape))
            else:
                site.weight_OI.copy_(self.decode(number, member, found))
        self.held[number] = rung

    @abstractmethod
    def decode(self, number: int, member: int, found: Sequence[Tensor]) -> Tensor:
        """A member's weight [O, I] of a rung, from what its shelf has of it, as bytes on the member's device."""

    def restore_(self) -> None:
        """Put the dense weights back."""
        for number in range(len(self.groups)):
            self.hold_(number, None)


@dataclass
class Shelves(Variants[Group]):
    """The weights of every rung as the support and, where the method changes what it keeps, the kept values."""

    @torch.no_grad()
    def fill(self, walk: Walk) -> Iterator[int]:
        """Prune every group to each of its rungs, on the dense model's inputs; yields the number of blocks done.

        Raises:
            NonFiniteError, FactorizationError: as the walk does.
        """
        for index, block in enumerate(self.stack.blocks):
            shelf = self.shelves[index] = Shelf(f"block{index}", self.directory)
            members = {site.name: site for group in self.groups if group.block == index for site in group.sites}
            with self.stack.placed(index, walk.device):
                stats = walk.collect(index, block, members, whole=True, keep=True)
                here = [number for number, group in enumerate(self.groups) if group.block == index]
                for number, rungs in zip(
                    here, self._solved([self.groups[number] for number in here], walk, stats), strict=True
                ):
                    for member, site in enumerate(self.groups[number].sites):
                        shelf.put(number, member, None, [site.weight_OI])
                    for (member, rung), tensors in rungs.items():
                        shelf.put(number, member, rung, tensors)
            shelf.close()
            yield index + 1

    def _solved(self, groups: Sequence[Group], walk: Walk, stats: Mapping[str, LinearStats]) -> list[Rungs]:
        """The rungs of each group; of several processes each solves for some of the groups, and gives them to the others."""
        shares = walk.shares or Shares.alone()
        found: list[Rungs] = []

        def work() -> list[dict[tuple[int, int], list[int]]]:
            for number, group in enumerate(groups):
                found.append(_rungs(group, walk, stats) if number % shares.size == shares.rank else {})
            return [{key: [len(one) for one in parts] for key, parts in rungs.items()} for rungs in found]

        sizes = shares.together(work)
        for number in range(len(groups)):
            owner = number % shares.size
            if owner != shares.rank:
                found[number] = {
                    key: [torch.empty(size, dtype=torch.uint8) for size in parts] for key, parts in sizes[owner][number].items()
                }
            for parts in found[number].values():
                for part in filter(len, parts):
                    shares.give_(part, owner)
        return found

    def decode(self, number: int, member: int, found: Sequence[Tensor]) -> Tensor:
        """See :class:`Variants`."""
        group = self.groups[number]
        site, (bits, *values) = group.sites[member], found
        keep_OI = unpack_bits(bits, site.numel).view(site.shape)
        if values:
            pruned_OI = torch.zeros(site.shape, dtype=site.stored.dtype, device=bits.device)
            pruned_OI[keep_OI] = values[0].view(site.stored.dtype)
            return pruned_OI
        (dense,) = self.shelves[group.block].get(number, member, None)
        return dense.to(bits.device).view(site.stored.dtype).view(site.shape).where(keep_OI, 0)


def _rungs(group: Group, walk: Walk, stats: Mapping[str, LinearStats]) -> Rungs:
    """What a shelf has of a group, but for the dense weights."""
    found: Rungs = {}
    for member, site in enumerate(group.sites):
        dense_OI = site.weight_OI
        for rung, targets in enumerate(group.rungs):
            pruned_OI = dense_OI
            if targets[member].sparsity > 0:
                pruned_OI, _, _ = walk.solve(site, stats.get(site.name), targets[member])
            keep_OI = pruned_OI != 0
            changed = not torch.equal(pruned_OI, dense_OI.where(keep_OI, 0))
            parts = [pack_bits(keep_OI), *([pruned_OI[keep_OI]] if changed else [])]
            found[member, rung] = [part.contiguous().cpu().view(-1).view(torch.uint8) for part in parts]
    return found


def rung_bytes(groups: Sequence[Group], *, changes: bool) -> int:
    """Bytes of the weights of all rungs, the dense ones included, if the method changes what it keeps or only scores."""
    total = 0.0
    for group in groups:
        for member, site in enumerate(group.sites):
            itemsize = site.stored.element_size()
            kept = sum(1 - targets[member].sparsity for targets in group.rungs) if changes else 0.0
            total += site.numel * (itemsize + len(group.rungs) / 8 + kept * itemsize)
    return int(total)


@contextmanager
def scratch(
    num_bytes: int, parent: Path | None, *, owner: str = "allocation 'evolution'", remedy: str = ", or --allocation dp"
) -> Iterator[Path | None]:
    """Where so many bytes of weights go: None for memory, where they fit; else a directory that is gone afterwards.

    Raises OutputError where there is no room for them either.
    """
    if num_bytes <= MEMORY_SHARE * free_bytes(torch.device("cpu")):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="candidates-", dir=parent) as directory:
        if num_bytes > shutil.disk_usage(directory).free:
            raise OutputError(
                f"{owner} keeps {num_bytes / 1e9:.1f} GB of candidate weights, which fit neither in memory nor "
                f"in {Path(directory).parent}. Use a larger disk (--out, or TMPDIR without one){remedy}."
            )
        yield Path(directory)


def pack_bits(keep: Tensor) -> Tensor:
    """One bit for each element of a boolean tensor, the first one the lowest: uint8."""
    flat = F.pad(keep.reshape(-1).to(torch.uint8), (0, -keep.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """The first ``count`` booleans of packed bits."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] >> shifts & 1).reshape(-1)[:count].bool()
