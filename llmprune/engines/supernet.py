"""The supernet of Týr-the-Pruner (arXiv 2503.09657, section 3.3): every module at every level, each from one nested path.

Blocks are walked in order. The Gram matrices of a block's modules are taken on what the blocks before it put out while each of
their modules holds the mean of its levels (error accumulation by expectation, eq. 6): a block is pruned on inputs of about the
kind it will have. The dense weights are back before the next block's turn. Of the levels only the kept columns are stored: half
of the dense weights of the modules for each level, on average, where the levels run from none to all.

The levels of a mixture are numbers of experts that its router gives no chance, those of the least router-weighted activation
(REAP, arXiv 2510.13999) on the inputs that the other modules of its block are pruned on. Weights of a mean do not exist: while
errors accumulate it holds its middle level.

E experts; O out, I in features; G groups of C columns; K columns kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmprune.anatomy.blocks import Recording
from llmprune.anatomy.sites import Site
from llmprune.engines.evolution import Shelf, Variants
from llmprune.engines.layerwise import Walk
from llmprune.engines.reap import ExpertScores, Tally, best_experts
from llmprune.errors import FactorizationError, NonFiniteError, UnsupportedModel
from llmprune.linalg import damped
from llmprune.spec import Need, PruneConfig
from llmprune.stats import LinearStats
from llmprune.structured.experts import Mixture, Muted
from llmprune.structured.levels import chunk_of
from llmprune.structured.path import Criterion, Level, columns_of, expectation, nested_path
from llmprune.structured.slicing import Cut
from llmprune.structured.units import Module, Part


@dataclass(frozen=True)
class Rack:
    """The levels of one module or mixture.

    Attributes:
        counts: groups removed at each level, rising.
        centre: the count they lie around; None for the middle one.
    """

    module: Part
    counts: tuple[int, ...]
    centre: int | None = None

    @property
    def block(self) -> int:
        """Index of its decoder block."""
        return self.module.block

    @property
    def sites(self) -> tuple[Site, ...]:
        """The one matrix, or none."""
        return self.module.sites

    @property
    def middle(self) -> int:
        """The rung of the centre."""
        return len(self.counts) // 2 if self.centre is None else self.counts.index(self.centre)


@dataclass
class Supernet(Variants[Rack]):
    """Every module at every level, and which of them the model holds; rung None is the dense weight.

    Attributes:
        criterion: what a group is worth.
        damping: share of the Gram matrix's mean diagonal that is added to it.
        sequential: each module of a block is pruned on inputs that those before it in the block have left, by a forward of the
            block for each; else all of them on one forward of the dense block, as in the released code.
        losses: of every module, the loss of each level over what the dense module puts out, 0 to about 1; known once filled.
    """

    criterion: Criterion = "obs+|g|"
    damping: float = 0.01
    sequential: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        assert all(one.block <= other.block for one, other in zip(self.groups, self.groups[1:], strict=False))
        self.losses: list[tuple[float, ...]] = [()] * len(self.groups)
        self.scores: dict[int, ExpertScores] = {}
        self.muted: dict[int, Muted] = {}
        for number, rack in enumerate(self.groups):
            if isinstance(rack.module, Mixture):
                name = self.stack.name(rack.block)
                self.muted[number] = Muted(rack.module, self.stack.blocks[rack.block], name)
                self.used_by[rack.block] = sorted([*self.used_by[rack.block], number])

    def hold_(self, number: int, rung: int | None) -> None:
        """See :class:`llmprune.engines.evolution.Variants`; of a mixture other experts are muted."""
        if number in self.muted and self.held[number] != rung:
            every = range(self.groups[number].module.num_groups)
            kept = every if rung is None else set(self.experts(number, rung))
            self.muted[number].hold_([expert for expert in every if expert not in kept])
        super().hold_(number, rung)

    @torch.no_grad()
    def fill(self, recording: Recording, device: torch.device) -> Iterator[int]:
        """Compute all levels, on the calibration inputs; yields the number of blocks done. The recording is only read, and the
        model is dense whenever this yields, ends or raises.

        Raises:
            NonFiniteError: NaN or inf in a block's output; names the block.
            FactorizationError: names the module.
            UnsupportedModel: no token reached a module, or how a mixture chooses is not understood; names it.
        """
        calls = copy.deepcopy(recording.calls) if recording.stateful else recording.calls
        walk = Walk(self.stack, Recording(recording.hidden.copy(), calls), PruneConfig(), device)
        for index, block in enumerate(self.stack.blocks):
            self.shelves[index] = Shelf(f"block{index}", self.directory)
            with self.stack.placed(index, device):
                self._fill_block(walk, index, block)
            self.shelves[index].close()
            yield index + 1

    def _fill_block(self, walk: Walk, index: int, block: nn.Module) -> None:
        racks = [(number, rack) for number, rack in enumerate(self.groups) if rack.block == index]
        numbers = {site.name: number for number, rack in racks for site in rack.sites}
        sites = {site.name: site for _, rack in racks for site in rack.sites}
        pending = dict(sites)
        mixtures = [number for number, _ in racks if number in self.muted]
        dense = {name: site.weight_OI.clone() for name, site in pending.items()}
        try:
            if not self.sequential:
                self._score(walk, index, block, mixtures)
            while pending:
                found = walk.collect(index, block, pending, whole=not self.sequential, needs=Need.GRAM)
                if not found:
                    raise UnsupportedModel(f"{next(iter(pending))} is reached by no calibration token.")
                for name, stats in found.items():
                    site = pending.pop(name)
                    site.weight_OI.copy_(self._fill_module(numbers[name], stats))
            if self.sequential:
                self._score(walk, index, block, mixtures)
            self._advance(walk, index, block, mixtures)
        finally:
            for name, weight_OI in dense.items():
                sites[name].weight_OI.copy_(weight_OI)
            for number in mixtures:
                self.hold_(number, None)

    def _score(self, walk: Walk, index: int, block: nn.Module, mixtures: Sequence[int]) -> None:
        """Score the experts of the mixtures on the block as it is, in a forward of their own."""
        for number in mixtures:
            tally = Tally(self.muted[number])
            try:
                walk.collect(index, block, {}, whole=True)
            finally:
                tally.handle.remove()
            rack, scores = self.groups[number], tally.scores()
            if not int(scores.count_E.sum()):
                raise UnsupportedModel(f"{rack.module.name} is reached by no calibration token.")
            self.scores[number] = scores
            worth_E = scores.count_E * scores.saliency_E.square()
            kept = [worth_E[self.experts(number, rung)].sum() for rung in range(len(rack.counts))]
            self.losses[number] = tuple(float(1 - one / worth_E.sum()) if worth_E.any() else 0.0 for one in kept)

    def _advance(self, walk: Walk, index: int, block: nn.Module, mixtures: Sequence[int]) -> None:
        """Carry the hidden states on with every mixture at its middle level, and see that it chooses none of the others."""
        tallies = []
        try:
            for number in mixtures:
                self.hold_(number, self.groups[number].middle)
                tallies.append((number, Tally(self.muted[number], outputs=False)))
            walk.advance(index, block)
        finally:
            for _, tally in tallies:
                tally.handle.remove()
        for number, tally in tallies:
            tally.count_E[self.experts(number, self.groups[number].middle)] = 0
            if tally.count_E.any():
                raise UnsupportedModel(f"{tally.mixture.router} chooses experts whose logits give them no chance.")

    def experts(self, number: int, rung: int) -> list[int]:
        """The experts of a mixture that a level keeps, rising; those of a higher one are among them."""
        mixture, count = self.muted[number].mixture, self.groups[number].counts[rung]
        return best_experts(self.scores[number].saliency_E, mixture.num_experts - count, mixture.route_groups)

    def cut(self, number: int, rung: int) -> Cut:
        """What a level keeps, a copy."""
        if number in self.muted:
            return Cut(torch.tensor(self.experts(number, rung)))
        kept_G, weight_OK = self.level(number, rung)
        return Cut(kept_G.clone(), weight_OK.clone())

    def _fill_module(self, number: int, stats: LinearStats) -> Tensor:
        """Store a module's levels; returns the mean of them [O, I]."""
        rack, shelf = self.groups[number], self.shelves[self.groups[number].block]
        module = self._module(number)
        weight_OI = module.consumer.weight_OI
        try:
            levels, whole = module_levels(weight_OI, stats, module, rack.counts, self.criterion, damping=self.damping)
        except NonFiniteError as error:
            raise NonFiniteError(f"{module.consumer.name}: {error}") from None
        except FactorizationError as error:
            raise FactorizationError(f"{module.consumer.name}: {error} Raise --damping, or use --dtype float32.") from None
        shelf.put(number, 0, None, [weight_OI])
        for rung, (level, count) in enumerate(zip(levels, rack.counts, strict=True)):
            shelf.put(number, 0, rung, [level.kept_G.int(), *([level.weight_OK] if count else [])])
            if not count:  # the dense weight, which is there already
                shelf.spans[number, 0, rung] += shelf.spans[number, 0, None]
        self.losses[number] = tuple(level.loss / whole if whole else 0.0 for level in levels)
        return expectation(levels, module.num_groups, module.group_size).to(weight_OI.device)

    def decode(self, number: int, member: int, found: Sequence[Tensor]) -> Tensor:
        """See :class:`llmprune.engines.evolution.Variants`."""
        module, site = self._module(number), self.groups[number].sites[member]
        kept_G, weight_OK = self._level(module, found)
        pruned_OI = torch.zeros(site.shape, dtype=weight_OK.dtype, device=weight_OK.device)
        pruned_OI[:, columns_of(kept_G, module.group_size)] = weight_OK
        return pruned_OI

    def level(self, number: int, rung: int) -> tuple[Tensor, Tensor]:
        """A module's stored level: groups kept, rising, int64 [G], and their columns [O, K], a view of what is stored."""
        return self._level(self._module(number), self.shelves[self.groups[number].block].get(number, 0, rung))

    def _module(self, number: int) -> Module:
        module = self.groups[number].module
        assert isinstance(module, Module)
        return module

    @staticmethod
    def _level(module: Module, found: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        kept_G, weight = found[0].view(torch.int32).long(), found[1].view(module.consumer.stored.dtype)
        return kept_G, weight.view(module.consumer.shape[0], len(kept_G) * module.group_size)


def racks_of(
    modules: Sequence[Part], counts: Sequence[Sequence[int]], centre: Sequence[int | None] | None = None
) -> list[Rack]:
    """The levels of the modules, of whom ``counts`` has the groups to remove, and ``centre`` those in the middle."""
    middle = centre or [None] * len(modules)
    return [Rack(module, tuple(own), at) for module, own, at in zip(modules, counts, middle, strict=True)]


def module_levels(
    weight_OI: Tensor,
    stats: LinearStats,
    module: Module,
    counts: Sequence[int],
    criterion: Criterion = "obs+|g|",
    *,
    damping: float = 0.01,
) -> tuple[list[Level], float]:
    """The levels of one module, and the loss of removing everything.

    The Gram matrix is the mean over tokens, damped by this share of its mean diagonal. Inputs that were never active are worth
    nothing, so a group of none but them goes first; where one stays, so do its weights. Level 0 is the weight, bit for bit.

    Raises:
        NonFiniteError: the activations overflow fp32.
        FactorizationError: the damped matrix is not positive definite.
    """
    assert stats.gram_II is not None
    if not bool(torch.isfinite(stats.sq_I).all()):
        raise NonFiniteError("the calibration activations overflow fp32. Use --dtype float32 or bfloat16.")
    hessian_II, _ = damped(stats.gram_II / max(stats.num_tokens, 1), damping)
    weight_OI = weight_OI.to(hessian_II.device)
    dead_I = (stats.sq_I == 0).to(hessian_II.device)
    levels = nested_path(
        weight_OI.masked_fill(dead_I, 0), hessian_II, group_size=module.group_size, counts=counts, chunk=chunk_of(module),
        criterion=criterion,
    )  # fmt: skip
    if dead_I.any():
        levels = [_with_dead(level, weight_OI, dead_I, module.group_size) for level in levels]
    live_OI = weight_OI.double().masked_fill(dead_I, 0)
    return levels, float(((live_OI @ hessian_II) * live_OI).sum()) / 2


def _with_dead(level: Level, weight_OI: Tensor, dead_I: Tensor, group_size: int) -> Level:
    """The weights of dead inputs that stay: nothing depends on them, so their best values are the dense ones."""
    columns_K = columns_of(level.kept_G, group_size)
    return replace(level, weight_OK=level.weight_OK.where(~dead_I[columns_K], weight_OI[:, columns_K]))


def level_bytes(racks: Sequence[Rack]) -> int:
    """Bytes of all levels of these modules, the dense weights included; of a mixture no weights are stored."""
    total = 0
    for rack in racks:
        width = rack.module.num_groups
        kept = sum(width - count for count in rack.counts if count)
        for site in rack.sites:
            weights = site.numel + site.shape[0] * kept * rack.module.group_size
            total += site.stored.element_size() * weights + 4 * sum(width - count for count in rack.counts)
    return total
