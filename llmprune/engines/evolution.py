"""What a candidate allocation costs on the model: its weights are put in place, block by block, and its divergence measured.

The weights of every rung are computed once, by the job's own method on the dense calibration inputs, and kept as one bit a
weight and, where the method changes what it keeps, the kept values: for nine rungs about a byte a weight of the model for
methods that only score. They lie in CPU memory, or where that is short in a file that is mapped. All candidates of a stage
travel together, so a block is brought to the device once, and candidates that agree up to a block share its forwards.

O out, I in features; N sequences of S tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import random
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.anatomy.blocks import Recording, Stack
from llmprune.anatomy.sites import Site
from llmprune.devices import free_bytes, module_device, placed
from llmprune.engines.draws import Part, draw, narrowed, whole
from llmprune.engines.layerwise import Walk
from llmprune.errors import OutputError
from llmprune.processes import spread
from llmprune.spec import Target
from llmprune.stats import LinearStats

MEMORY_SHARE = 0.5
"""Share of the free memory that the weights of all rungs may take, beyond which they go to disk, and that the hidden states of
candidates may, beyond which they are measured in turn.
"""
WORST = 1e9
"""A divergence in place of NaN and inf, in nats."""
_ALIGNMENT = 16

Candidate = tuple[int | None, ...]
"""The rung of every group, None where it is dense."""
Logits = Callable[[int, Tensor], Tensor]
"""(number of a chunk, the last block's output [N, S, H]) -> logits [N, S, V]."""
Head = Callable[[], AbstractContextManager[Logits]]
"""Makes the model's head ready to run; open only while no block runs."""


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
            home = module_device(block)
            shelf = self.shelves[index] = Shelf(f"block{index}", self.directory)
            members = {site.name: site for group in self.groups if group.block == index for site in group.sites}
            with placed(block, walk.device if home.type == "cpu" else home):
                stats = walk.collect(index, block, members, whole=True, keep=True)
                for number, group in enumerate(self.groups):
                    if group.block == index:
                        _put(shelf, number, group, walk, stats)
            shelf.close()
            yield index + 1

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


def _put(shelf: Shelf, number: int, group: Group, walk: Walk, stats: Mapping[str, LinearStats]) -> None:
    for member, site in enumerate(group.sites):
        dense_OI = site.weight_OI
        shelf.put(number, member, None, [dense_OI])
        for rung, targets in enumerate(group.rungs):
            pruned_OI = dense_OI
            if targets[member].sparsity > 0:
                pruned_OI, _, _ = walk.solve(site, stats.get(site.name), targets[member])
            keep_OI = pruned_OI != 0
            changed = not torch.equal(pruned_OI, dense_OI.where(keep_OI, 0))
            shelf.put(number, member, rung, [pack_bits(keep_OI), *([pruned_OI[keep_OI]] if changed else [])])


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


@dataclass
class Divergence:
    """Mean KL(dense || candidate) of candidates over calibration tokens, in fp32; a
    :class:`llmprune.allocate.evolution.Fitness`. Where several processes run, each measures some of the candidates.

    Attributes:
        recording: the search's sequences, a chunk [N, S] a batch.
        head: the model's own, on the last block's outputs.
        hidden_weight: of what is added to the KL: after the first, the middle and the last block the squared error of the
            hidden states over their squared norm, summed (Li et al. 2025, arXiv 2503.09657, eq. 6).
    """

    stack: Stack
    shelves: Variants[Any]
    recording: Recording
    device: torch.device
    head: Head
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        # Candidates are told apart, up to a block, by the rungs of the groups before it.
        self.cuts = [sum(group.block <= index for group in self.shelves.groups) for index in range(len(self.stack.blocks))]
        last = len(self.stack.blocks) - 1
        watched = sorted({0, last // 2, last}) if self.hidden_weight else []
        self.hidden: dict[int, dict[int, Tensor]] = {index: {} for index in watched}
        self.cut: int | None = None
        dense: Candidate = (None,) * len(self.shelves.groups)
        outputs = self._outputs([dense], self._all, lambda at, _key, part, out: self.hidden[at].update({part.chunk: out}))
        self.dense = [outputs[dense, part] for part in self._all]

    @property
    def _all(self) -> list[Part]:
        return [whole(chunk, hidden_NSH) for chunk, hidden_NSH in enumerate(self.recording.hidden)]

    @torch.no_grad()
    def __call__(
        self, candidates: Sequence[Candidate], rng: random.Random | None, num_tokens: int | None = None
    ) -> list[float]:
        """See :class:`llmprune.allocate.evolution.Fitness`; with ``rng`` alone a chunk is drawn."""
        if self.cut is None and num_tokens is not None:
            self.cut = self._probe()
        parts = self._all if rng is None else draw(self.recording.hidden, rng, num_tokens, together=self.cut == 2)
        runs = {part: self._widened(part)[self.cut or 0] for part in parts}
        # The hidden states before and after a block, of as many candidates as fit.
        hidden = self.recording.hidden
        size = sum(run.num_tokens * hidden[run.chunk][0, 0].nbytes for run in set(runs.values()))
        count = max(1, int(MEMORY_SHARE * free_bytes(hidden[0].device) / (2 * size)))

        def work(own: Sequence[Candidate]) -> list[float]:
            groups = (own[start : start + count] for start in range(0, len(own), count))
            return [divergence for group in groups for divergence in self._measure(group, runs)]

        return spread(candidates, work, self.device)

    def _measure(self, candidates: Sequence[Candidate], runs: Mapping[Part, Part]) -> list[float]:
        """Divergences on the parts, of which ``runs`` has what is run for each, itself or more."""
        errors: dict[tuple[int, Candidate], float] = defaultdict(float)

        def watch(index: int, key: Candidate, ran: Part, out_NSH: Tensor) -> None:
            for part, run in runs.items():
                if run == ran:
                    errors[index, key] += _norm(part.of(self.hidden[index][part.chunk]) - part.within(run).of(out_NSH))

        outputs = self._outputs(candidates, list(dict.fromkeys(runs.values())), watch)
        sums = [0.0] * len(candidates)
        with self.head() as logits:
            for part, run in runs.items():
                dense_RLV = self._log_probs(logits, part, run, run.of(self.dense[run.chunk]))
                for number, candidate in enumerate(candidates):
                    other_RLV = self._log_probs(logits, part, run, outputs[candidate, run])
                    kl = F.kl_div(other_RLV, dense_RLV, log_target=True, reduction="none").sum(dtype=torch.float64)
                    sums[number] += _finite(float(kl))
        num_tokens = sum(part.num_tokens for part in runs)
        found = [max(total, 0.0) / num_tokens for total in sums]
        for index, dense in self.hidden.items():
            norm = sum(_norm(part.of(dense[part.chunk])) for part in runs)
            for number, candidate in enumerate(candidates):
                found[number] += self.hidden_weight * _finite(errors[index, self._prefix(candidate, index)] / norm)
        return found

    @staticmethod
    def _log_probs(logits: Logits, part: Part, run: Part, hidden_RLH: Tensor) -> Tensor:
        """Of a part [R, L, V], from what the last block put out where ``run`` was run."""
        return F.log_softmax(part.within(run).of(logits(run.chunk, hidden_RLH)).float(), dim=-1)

    @torch.no_grad()
    def _outputs(
        self, candidates: Sequence[Candidate], parts: Sequence[Part], watch: Callable[[int, Candidate, Part, Tensor], None]
    ) -> dict[tuple[Candidate, Part], Tensor]:
        """The last block's output [R, L, H] of every candidate on every part; ``watch`` is shown what the watched blocks put
        out, once for all candidates that agree up to there.
        """
        hidden, made, stateful = self.recording.hidden, self.recording.calls, self.recording.stateful
        calls = {part: [narrowed(call, part, hidden[part.chunk]) for call in made[part.chunk]] for part in parts}
        # A mutable object that blocks hand on belongs to one candidate alone.
        own = {(one, part): copy.deepcopy(calls[part]) for one in candidates for part in parts} if stateful else {}
        streams: dict[tuple[Candidate, Part], Tensor] = {}
        for index, block in enumerate(self.stack.blocks):
            after: dict[tuple[Candidate, Part], Tensor] = {}
            home = module_device(block)
            device = self.device if home.type == "cpu" else home
            with placed(block, device):
                for candidate in self._in_turn(candidates, index):
                    before, key = self._prefix(candidate, index - 1), self._prefix(candidate, index)
                    if (key, parts[0]) in after:
                        continue
                    for number in self.shelves.used_by[index]:
                        self.shelves.hold_(number, candidate[number])
                    for part in parts:
                        hidden_RLH = streams[before, part] if index else part.of(hidden[part.chunk])
                        call = own.get((candidate, part), calls[part])[index]
                        after[key, part] = call.run(block, hidden_RLH.to(device)).to(hidden_RLH.device)
                        if index in self.hidden:
                            watch(index, key, part, after[key, part])
            streams = after
        last = len(self.stack.blocks) - 1
        return {(one, part): streams[self._prefix(one, last), part] for one in candidates for part in parts}

    def _in_turn(self, candidates: Sequence[Candidate], index: int) -> list[Candidate]:
        """Those with the same rungs in a block after one another, so that its weights change as seldom as they can."""
        used = self.shelves.used_by[index]
        return sorted(candidates, key=lambda one: [-1 if one[number] is None else one[number] for number in used])

    def _prefix(self, candidate: Candidate, index: int) -> Candidate:
        """What of a candidate the outputs of a block depend on."""
        return candidate if self.recording.stateful or index < 0 else candidate[: self.cuts[index]]

    def _widened(self, part: Part) -> tuple[Part, Part, Part]:
        """What can be run for a part: itself, its sequences to their ends, its chunk."""
        full = whole(part.chunk, self.recording.hidden[part.chunk])
        return part, Part(part.chunk, part.rows, full.length), full

    def _probe(self) -> int:
        """The first of :meth:`_widened` for which the blocks and the head give what they give for a whole chunk."""
        num_rows, length = self.recording.hidden[0].shape[:2]
        widened, dense = self._widened(Part(0, (num_rows - 1,), max(1, 2 * length // 3))), (None,) * len(self.shelves.groups)
        for cut, part in enumerate(widened[:2]):
            try:
                found = self._outputs([dense], [part], lambda *_: None)[dense, part]
                with self.head() as logits:
                    pairs = [(found, part.of(self.dense[0])), (logits(0, found), part.of(logits(0, self.dense[0])))]
            except (IndexError, RuntimeError, TypeError, ValueError):
                continue
            if all(one.shape == other.shape and _close(one, other) for one, other in pairs):
                return cut
        return 2


def _close(one: Tensor, other: Tensor) -> bool:
    return _norm(one - other) <= torch.finfo(one.dtype).eps * _norm(other)


def _norm(values: Tensor) -> float:
    """The squared Frobenius norm, in fp64."""
    return float(values.float().square().sum(dtype=torch.float64))


def _finite(value: float) -> float:
    """NaN and inf as what no search keeps."""
    return value if math.isfinite(value) else WORST
