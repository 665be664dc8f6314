"""iCBS: a mask improved against the loss of the whole model, a block of weights at a time (arXiv 2411.17796).

A step takes a few sequences, one site (or several) and the weights of it that are most likely on the wrong side of the
mask, models the change of the loss to second order in them, and solves for which of them to prune, their number fixed.
Kept weights carry their dense values; nothing is retrained. Beyond the paper: a step that raises the loss on a held-out
batch is undone, several sites can share a backward pass, and rows or n:m groups can keep their counts.

Several processes share the sequences of a step and of the held-out batch, whose gradients and losses add up, and the sites of a
step, of which each is chosen from and solved by one of them.

Written from the paper's mathematics. A patent application on the method has been published (US 2026/0094048 A1).
N sequences, O out, I in features, V variables of a block.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.sites import Site
from llmprune.engines.candidates import SiteState, allocate_steps
from llmprune.engines.curvature import exact_hessian, positive_factor
from llmprune.engines.gradients import SiteGradients, can_gather, gather, input_norms, mean_loss, wide
from llmprune.engines.icbs_settings import RefineSettings as RefineSettings
from llmprune.engines.icbs_settings import RefineStep as RefineStep
from llmprune.engines.sharding import Shares
from llmprune.errors import NonFiniteError
from llmprune.solvers.problem import BlockProblem
from llmprune.solvers.solve import solve
from llmprune.spec import Pattern, Scope

_MIN_SCALE = 2.0**-10
_FIRST_RIDGE = 1e-3  # where a ridge of zero begins to rise


@dataclass(frozen=True)
class _Block:
    """Weights of one site that are tried together, and what models the loss in them; V of them, N sequences."""

    state: SiteState
    index_V: Tensor
    dense_V: Tensor
    gradient_V: Tensor
    factor_NV: Tensor  # the curvature is its transpose times itself, less shift
    shift: float


@dataclass(frozen=True)
class _Move:
    """A solved block of one site: which weights, which of them are and which should be pruned, the predicted change."""

    state: SiteState
    index_V: Tensor
    before_V: Tensor
    after_V: Tensor
    change: float

    def write_(self) -> int:
        """Make the move in the model; how many weights it newly prunes."""
        self.state.write_(self.index_V, self.after_V)
        return int((self.after_V & ~self.before_V).sum())

    def undo_(self) -> None:
        self.state.write_(self.index_V, self.before_V)


@dataclass
class Refinement:
    """One refinement of a pruned model, in place.

    Attributes:
        model: pruned, on the device where it runs.
        states: the sites under refinement, by name.
        ids_NS: sequences to learn from.
        held_out_NS: sequences that judge the steps; empty keeps every step.
        shares: of several processes what this one does; each of them has the model and all sequences.
        history: a record per backward pass, after one of the start.
        stopped: why it ended, when it has.
    """

    model: PreTrainedModel
    states: Mapping[str, SiteState]
    ids_NS: Tensor
    held_out_NS: Tensor
    settings: RefineSettings
    shares: Shares = field(default_factory=Shares.alone)
    history: list[RefineStep] = field(default_factory=list, init=False)
    stopped: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(f"{self.settings.seed} icbs".encode()))
        self.ridge = self.settings.ridge
        # fp16 gradients of single tokens underflow; the factor is halved where they overflow instead.
        self.scale = 1024.0 if self.model.dtype == torch.float16 else 1.0
        self.epochs = 0
        self.groups: list[list[str]] = []  # of this epoch, those to come
        self.batches: list[list[int]] = []  # of this round through the sequences, those to come

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        sites: Sequence[Site],
        dense: Mapping[str, Tensor],
        ids_NS: Tensor,
        held_out_NS: Tensor,
        settings: RefineSettings,
        *,
        pattern: Pattern | None = None,
        scope: Scope = "matrix",
        shares: Shares | None = None,
    ) -> Refinement:
        """Refinement of a model as a method left it.

        Weights are frozen by Wanda's score, |w| times the norm of the inputs that the pruned model sees. Sites that have
        no module of their own (fused experts) stay as they are.

        Args:
            model: pruned in place, on the device where it runs.
            sites: the pruned ones.
            dense: their dense weights [O, I] by name, on any device.
            ids_NS: token ids to learn from, int64.
            held_out_NS: token ids to judge by, other ones.
            settings: how.
            pattern: an n:m pattern is kept group by group.
            scope: ``row`` keeps every row's number of zeros, else the site's is kept.
            shares: of several processes what this one does.

        Raises:
            ValueError: a kept weight is not the dense one.
        """
        shares = shares or Shares.alone()
        reached = [site for site in sites if can_gather(site)]
        norms = input_norms(model, reached, ids_NS[: settings.num_sequences], batch_size=settings.batch_size, shares=shares)
        states = {}
        for site in reached:
            if site.name not in norms:
                continue
            states[site.name] = SiteState.of(
                site,
                dense[site.name],
                group_size=(pattern.m if pattern else None) or (site.shape[1] if scope == "row" else None),
                score_OI=dense[site.name].to(site.stored.device).float().abs() * norms[site.name],
                fix_pruned=settings.fix_pruned,
                fix_kept=settings.fix_kept,
                tabu=settings.tabu,
                block_size=settings.block_size,
            )
        return cls(model, states, ids_NS, held_out_NS, settings, shares)

    @property
    def crowded(self) -> list[str]:
        """Sites with fewer free weights than a block has: a block takes all of them."""
        return [name for name, state in self.states.items() if state.num_free < self.settings.block_size]

    def run(self) -> Iterator[RefineStep]:
        """Refine; one record per backward pass, after one of the start. Closing the generator leaves a valid mask.

        Goes on where a restored snapshot was taken.

        Raises:
            NonFiniteError: gradients stay NaN or inf at any scale of the loss.
        """
        if not self.history:
            self.history.append(RefineStep(0, (), 0, 0.0, math.nan, self._judge(), True, self.ridge, 0.0))
            yield self.history[-1]
        begun = time.perf_counter() - self.history[-1].seconds
        while not self.stopped:
            if (group := self._next_group()) is None:
                self.stopped = f"all {self.history[-1].step} blocks are tried"
                return
            self.history.append(self._step(group, begun))
            if self._plateau():
                self.stopped = (
                    f"the held-out loss fell by less than {self.settings.min_gain:.2%} in {self.settings.patience} passes"
                )
            yield self.history[-1]

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that :meth:`restore_` needs to go on from here to the same end: plain data, and tensors on the CPU."""
        tensors = {"generator": self.generator.get_state()}
        for name, state in self.states.items():
            tensors[f"mask {name}"], tensors[f"tabu {name}"] = state.snapshot()
        data = {
            "ridge": self.ridge, "scale": self.scale, "epochs": self.epochs, "groups": self.groups, "batches": self.batches,
            "history": [asdict(step) for step in self.history], "stopped": self.stopped,
        }  # fmt: skip
        return data, tensors

    def restore_(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go back to a snapshot, in the model too. The refinement is of the same model, sites, text and settings."""
        for name, state in self.states.items():
            state.restore_(tensors[f"mask {name}"], tensors[f"tabu {name}"])
        self.generator.set_state(tensors["generator"])
        self.ridge, self.scale, self.epochs = data["ridge"], data["scale"], data["epochs"]
        self.groups, self.batches, self.stopped = list(data["groups"]), list(data["batches"]), data["stopped"]
        self.history = [RefineStep(**{**step, "sites": tuple(step["sites"])}) for step in data["history"]]

    def _step(self, group: Sequence[str], begun: float) -> RefineStep:
        """One backward pass: solve a block of every site of the group, move, and keep it unless it does harm."""
        held_out, predicted, num_swaps, accepted = self.history[-1].held_out, 0.0, 0, True
        blocks, loss = self._blocks(group, self._next_batch())
        for _ in range(1 + self.settings.retries):
            ridge = self.ridge
            moves = self._solve(blocks)
            predicted = sum(move.change for move in moves)
            num_swaps, accepted = sum(move.write_() for move in moves), True
            if not num_swaps:
                self._trust(0.0, 0.0, accepted)
            elif len(self.held_out_NS):
                after = self._judge()
                accepted = after <= held_out * (1 + self.settings.tolerance)
                self._trust(predicted, after - held_out, accepted)
                if accepted:
                    held_out = after
                else:
                    num_swaps = 0
                    for move in moves:
                        move.undo_()
            if accepted:
                for block in blocks:
                    block.state.tried(block.index_V)
                break
        step, seconds = self.history[-1].step + len(group), time.perf_counter() - begun
        return RefineStep(step, tuple(group), num_swaps, predicted, loss, held_out, accepted, ridge, seconds)

    def _blocks(self, group: Sequence[str], ids_NS: Tensor) -> tuple[list[_Block], float]:
        """One block of every site of a group with its second-order model, and the mean loss before."""
        settings, shares = self.settings, self.shares
        sites, own_NS = [self.states[name].site for name in group], shares.part(ids_NS)
        gradients: dict[str, SiteGradients] = {}

        def differentiate() -> float:
            found, loss = gather(self.model, sites, own_NS, batch_size=settings.batch_size, scale=self.scale)
            gradients.update(found)
            return loss

        loss = shares.mean(len(own_NS), differentiate)
        seen = shares.together(lambda: [own.num_sequences == len(own_NS) for own in gradients.values()])
        blocks = []
        for number, name in enumerate(group):
            if not all(once[number] for once in seen if once):  # not called, or more than once
                gradients.pop(name, None)
                continue
            block = self._block(self.states[name], gradients.pop(name, None), ids_NS)
            if block is None:  # not finite
                self.scale /= 2
                shares.together(partial(self._check_scale, name, loss))
                return [], loss
            blocks.append(block)
        return blocks, loss

    def _check_scale(self, name: str, loss: float) -> None:
        if self.scale < _MIN_SCALE or not math.isfinite(loss):
            raise NonFiniteError(f"{name}: its gradients hold NaN or inf. Use --dtype float32 or bfloat16.")

    def _trust(self, predicted: float, measured: float, accepted: bool) -> None:
        """A larger ridge where the model of the loss promised too much; a smaller one where it kept a tenth of its word
        (a few sequences always promise more than others keep), or where nothing moved.
        """
        if not self.settings.adapt_ridge:
            return
        if accepted and measured <= 0.1 * predicted:
            self.ridge = max(self.ridge / 2, self.settings.ridge)
        else:
            self.ridge = max((2 if accepted else 4) * self.ridge, _FIRST_RIDGE)

    def _block(self, state: SiteState, gradients: SiteGradients | None, ids_NS: Tensor) -> _Block | None:
        """The weights of a site that are tried, and the model of the loss in them; None if not finite.

        Args:
            gradients: of this process's sequences; None where it has none.
            ids_NS: the sequences of all.
        """
        settings, shares = self.settings, self.shares
        stored = state.site.stored
        zero = wide(stored.new_zeros(()))
        mean_OI = gradients.total() if gradients else zero.repeat(state.site.shape)
        shares.sum_(mean_OI)
        mean_OI /= len(ids_NS)
        if not bool(torch.isfinite(mean_OI).all()):
            return None
        count = settings.pruned_of_block

        def select() -> Tensor:
            score_OI = (state.dense_OI.to(mean_OI.device) * mean_OI).abs()
            return state.select(score_OI, count, settings.block_size - count).cpu()

        index_V = shares.by_first(select).to(mean_OI.device)
        rows_V, columns_V = state.rows_and_columns(index_V)
        own_N, own_NS = shares.part(torch.arange(len(ids_NS))), shares.part(ids_NS)
        if settings.hessian == "exact":
            hessian_VV = zero.repeat(len(index_V), len(index_V))
            if len(own_NS):
                hessian_VV += len(own_NS) * exact_hessian(
                    self.model, state.site, own_NS, rows_V, columns_V, batch_size=settings.batch_size
                )
            shares.sum_(hessian_VV)
            factor_NV, shift = positive_factor(hessian_VV / len(ids_NS))
        else:
            factor_NV, shift = zero.repeat(len(ids_NS), len(index_V)), 0.0
            if gradients:
                factor_NV[own_N] = gradients.at(rows_V, columns_V) / math.sqrt(len(ids_NS))
            shares.sum_(factor_NV)
        dense_V = state.dense_at(rows_V, columns_V).to(mean_OI.dtype)
        return _Block(state, index_V, dense_V, mean_OI[rows_V, columns_V], factor_NV, shift)

    def _solve(self, blocks: Sequence[_Block]) -> list[_Move]:
        """Which weights of the blocks to prune, by the ridge of this moment; each block is solved in one process."""
        options = [self._options() for _ in blocks]  # drawn for all blocks in every process
        own = range(self.shares.rank, len(blocks), self.shares.size)

        def work() -> dict[int, tuple[Tensor, float]]:
            solved = {number: solve(self._problem(blocks[number]), self.settings.solver, **options[number]) for number in own}
            return {number: (solution.pruned_V.cpu(), solution.change) for number, solution in solved.items()}

        found = {number: pair for part in self.shares.together(work) for number, pair in part.items()}
        moves = []
        for number, block in enumerate(blocks):
            before_V, (after_V, change) = block.state.pruned_W[block.index_V], found[number]
            moves.append(_Move(block.state, block.index_V, before_V, after_V.to(before_V.device), change))
        return moves

    def _problem(self, block: _Block) -> BlockProblem:
        state = block.state
        return BlockProblem.of_loss(
            block.dense_V,
            state.pruned_W[block.index_V],
            block.gradient_V,
            block.factor_NV,
            multiplier=self.settings.multiplier,
            ridge=self.ridge - block.shift / 2,
            group_V=None if state.group_size == state.pruned_W.numel() else block.index_V // state.group_size,
        )

    def _options(self) -> dict[str, Any]:
        options = dict(self.settings.solver_options)
        if self.settings.solver == "anneal":
            options.setdefault("seed", int(torch.randint(2**31, (), generator=self.generator)))
        return options

    def _next_group(self) -> list[str] | None:
        """Sites of the next backward pass; None after the last."""
        limit = self.settings.max_passes
        if not self.states or (limit is not None and len(self.history) > limit):
            return None
        if not self.groups:
            if self.epochs == self.settings.num_epochs:
                return None
            self.epochs += 1
            self.groups = self._shuffled_groups()
        return self.groups.pop(0)

    def _shuffled_groups(self) -> list[list[str]]:
        """The passes of an epoch: a permutation of one fixed multiset of sites; a site goes to the first pass that has
        room and does not have it yet.
        """
        names, settings = list(self.states), self.settings
        sizes = [self.states[name].pruned_W.numel() for name in names]
        counts = allocate_steps(sizes, settings.steps_per_epoch or len(names), min_steps=settings.min_steps)
        tickets = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
        groups: list[list[str]] = []
        width = settings.layers_per_step or len(names)
        for ticket in torch.randperm(len(tickets), generator=self.generator).tolist():
            name = tickets[ticket]
            group = next((group for group in groups if len(group) < width and name not in group), None)
            if group is None:
                groups.append([name])
            else:
                group.append(name)
        return groups

    def _next_batch(self) -> Tensor:
        """Sequences of the next step: all of them in random order, then again in another."""
        size = min(self.settings.num_sequences, len(self.ids_NS))
        if not self.batches:
            order_N = torch.randperm(len(self.ids_NS), generator=self.generator)
            self.batches = [chosen_N.tolist() for chosen_N in order_N.split(size) if len(chosen_N) == size]
        return self.ids_NS[self.batches.pop(0)]

    def _judge(self) -> float:
        if not len(self.held_out_NS):
            return math.nan
        own_NS = self.shares.part(self.held_out_NS)
        return self.shares.mean(len(own_NS), lambda: mean_loss(self.model, own_NS, batch_size=self.settings.batch_size))

    def _plateau(self) -> bool:
        patience = self.settings.patience
        if patience is None or len(self.history) <= patience:
            return False
        return self.history[-1].held_out > self.history[-1 - patience].held_out * (1 - self.settings.min_gain)
