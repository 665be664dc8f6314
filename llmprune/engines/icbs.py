"""iCBS: a mask improved against the loss of the whole model, a block of weights at a time (arXiv 2411.17796).

A step takes a few sequences, one site (or several) and the weights of it that are most likely on the wrong side of the
mask, models the change of the loss to second order in them, and solves for which of them to prune, their number fixed.
Kept weights carry their dense values; nothing is retrained. Beyond the paper: a step that raises the loss on a held-out
batch is undone, several sites can share a backward pass, and rows or n:m groups can keep their counts.

Written from the paper's mathematics. A patent application on the method has been published (US 2026/0094048 A1).
N sequences, O out, I in features, V variables of a block.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.sites import Site
from llmprune.engines.candidates import SiteState, allocate_steps
from llmprune.engines.gradients import SiteGradients, can_gather, gather, input_norms, mean_loss
from llmprune.errors import NonFiniteError
from llmprune.solvers.problem import BlockProblem
from llmprune.solvers.solve import Solver, solve
from llmprune.spec import Pattern, Scope

_MIN_SCALE = 2.0**-10
_FIRST_RIDGE = 1e-3  # where a ridge of zero begins to rise


@dataclass(frozen=True)
class RefineSettings:
    """How a mask is refined. The defaults are the paper's for Mistral-7B; ``held_out`` and what follows is not in it.

    Attributes:
        num_epochs, steps_per_epoch: blocks tried are their product.
        block_size: n, weights of a block.
        num_pruned: k, pruned ones among them; None is half.
        num_sequences: N of a step.
        multiplier: gamma, of the gradient term.
        ridge: lambda, on the step.
        tabu, fix_pruned, fix_kept: see :meth:`llmprune.engines.candidates.SiteState.of`.
        min_steps: of every site in an epoch, where that is possible.
        solver, solver_options: see :func:`llmprune.solvers.solve.solve`.
        layers_per_step: sites that share one backward pass, each with a block of its own.
        adapt_ridge: double the ridge where the held-out loss falls by less than a tenth of what was predicted, halve it
            again (not below ``ridge``) where the prediction holds or nothing moves; without held-out text it stays.
        tolerance: a step that raises the held-out loss by more than this fraction is undone; inf keeps every step.
        patience: stop when the held-out loss fell by less than ``min_gain`` (a fraction) in this many passes; None never.
        batch_size: sequences at once.
        seed: of the order of sites and sequences, and of the solver.
    """

    num_epochs: int = 10
    steps_per_epoch: int = 300
    block_size: int = 4096
    num_pruned: int | None = None
    num_sequences: int = 16
    multiplier: float = 0.75
    ridge: float = 0.001
    tabu: float = 0.40
    fix_pruned: float = 0.42
    fix_kept: float = 0.35
    min_steps: int = 10
    solver: str | Solver = "anneal"
    solver_options: Mapping[str, Any] = field(default_factory=dict)
    layers_per_step: int = 1
    adapt_ridge: bool = True
    tolerance: float = 0.0
    patience: int | None = None
    min_gain: float = 1e-3
    batch_size: int = 1
    seed: int = 0

    @property
    def num_steps(self) -> int:
        """Blocks tried at most."""
        return self.num_epochs * self.steps_per_epoch

    @property
    def pruned_of_block(self) -> int:
        """k."""
        return self.block_size // 2 if self.num_pruned is None else self.num_pruned


@dataclass(frozen=True)
class RefineStep:
    """What one step did; step 0 is the start.

    Attributes:
        step: blocks tried so far.
        sites: names of the sites whose blocks this step tried.
        num_swaps: weights newly pruned, and as many newly kept.
        predicted: the model's change of the loss, at most 0.
        loss: mean over the step's sequences, before it.
        held_out: mean over the held-out ones after it; as it was if the step was undone. NaN where it is not measured.
        accepted: whether the step stayed.
        ridge: lambda of the step.
        seconds: since the start.
    """

    step: int
    sites: tuple[str, ...]
    num_swaps: int
    predicted: float
    loss: float
    held_out: float
    accepted: bool
    ridge: float
    seconds: float


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
        stopped: why it ended, when it has.
    """

    model: PreTrainedModel
    states: Mapping[str, SiteState]
    ids_NS: Tensor
    held_out_NS: Tensor
    settings: RefineSettings
    stopped: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(f"{self.settings.seed} icbs".encode()))
        self.ridge = self.settings.ridge
        # fp16 gradients of single tokens underflow; the factor is halved where they overflow instead.
        self.scale = 1024.0 if self.model.dtype == torch.float16 else 1.0

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

        Raises:
            ValueError: a kept weight is not the dense one.
        """
        reached = [site for site in sites if can_gather(site)]
        norms = input_norms(model, reached, ids_NS[: settings.num_sequences], batch_size=settings.batch_size)
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
        return cls(model, states, ids_NS, held_out_NS, settings)

    def run(self) -> Iterator[RefineStep]:
        """Refine; one record per backward pass, after one of the start. Closing the generator leaves a valid mask.

        Raises:
            NonFiniteError: gradients stay NaN or inf at any scale of the loss.
        """
        begun = time.perf_counter()
        held_out = self._judge()
        yield RefineStep(0, (), 0, 0.0, math.nan, held_out, True, self.ridge, 0.0)
        batches = self._batches()
        history = [held_out]
        step = 0
        for group in self._schedule():
            moves, loss = self._try(group, next(batches))
            ridge, predicted = self.ridge, sum(move.change for move in moves)
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
                for move in moves:
                    move.state.tried(move.index_V)
            step += len(group)
            history.append(held_out)
            seconds = time.perf_counter() - begun
            yield RefineStep(step, tuple(group), num_swaps, predicted, loss, held_out, accepted, ridge, seconds)
            if self._plateau(history):
                self.stopped = (
                    f"the held-out loss fell by less than {self.settings.min_gain:.2%} in {self.settings.patience} passes"
                )
                return
        self.stopped = f"all {step} blocks are tried"

    def _try(self, group: Sequence[str], ids_NS: Tensor) -> tuple[list[_Move], float]:
        """One block of every site of a group, solved but not written, and the mean loss before."""
        settings = self.settings
        sites = [self.states[name].site for name in group]
        gradients, loss = gather(self.model, sites, ids_NS, batch_size=settings.batch_size, scale=self.scale)
        moves = []
        for name in group:
            found = gradients.pop(name)
            if found.num_sequences != len(ids_NS):  # not called, or more than once
                continue
            move = self._solve(self.states[name], found)
            if move is None:  # not finite
                self.scale /= 2
                if self.scale < _MIN_SCALE or not math.isfinite(loss):
                    raise NonFiniteError(f"{name}: its gradients hold NaN or inf. Use --dtype float32 or bfloat16.")
                return [], loss
            moves.append(move)
        return moves, loss

    def _trust(self, predicted: float, measured: float, accepted: bool) -> None:
        """A larger ridge where the model of the loss promised too much; a smaller one where it kept a tenth of its word
        (a few sequences always promise more than others keep), or where nothing moved.
        """
        if not self.settings.adapt_ridge:
            return
        if accepted and measured <= 0.1 * predicted:
            self.ridge = max(self.ridge / 2, self.settings.ridge)
        else:
            self.ridge = max(2 * self.ridge, _FIRST_RIDGE)

    def _solve(self, state: SiteState, gradients: SiteGradients) -> _Move | None:
        """The answer for one block: which weights, which of them to prune, predicted change; None if not finite."""
        settings = self.settings
        mean_OI = gradients.mean()
        if not bool(torch.isfinite(mean_OI).all()):
            return None
        dense_OI = state.dense_OI.to(mean_OI.dtype)
        count = settings.pruned_of_block
        index_V = state.select((dense_OI * mean_OI).abs(), count, settings.block_size - count)
        rows_V, columns_V = state.rows_and_columns(index_V)
        problem = BlockProblem.of_loss(
            dense_OI[rows_V, columns_V],
            state.pruned_W[index_V],
            mean_OI[rows_V, columns_V],
            gradients.at(rows_V, columns_V) / math.sqrt(gradients.num_sequences),
            multiplier=settings.multiplier,
            ridge=self.ridge,
            group_V=None if state.group_size == state.pruned_W.numel() else index_V // state.group_size,
        )
        options = dict(settings.solver_options)
        if settings.solver == "anneal":
            options.setdefault("seed", int(torch.randint(2**31, (), generator=self.generator)))
        solution = solve(problem, settings.solver, **options)
        return _Move(state, index_V, state.pruned_W[index_V], solution.pruned_V, solution.change)

    def _schedule(self) -> Iterator[list[str]]:
        """Sites of every backward pass: each epoch a permutation of one fixed multiset; a site goes to the first pass that
        has room and does not have it yet.
        """
        names = list(self.states)
        if not names:
            return
        sizes = [self.states[name].pruned_W.numel() for name in names]
        counts = allocate_steps(sizes, self.settings.steps_per_epoch, min_steps=self.settings.min_steps)
        tickets = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
        for _ in range(self.settings.num_epochs):
            groups: list[list[str]] = []
            for ticket in torch.randperm(len(tickets), generator=self.generator).tolist():
                name, width = tickets[ticket], self.settings.layers_per_step
                group = next((group for group in groups if len(group) < width and name not in group), None)
                if group is None:
                    groups.append([name])
                else:
                    group.append(name)
            yield from groups

    def _batches(self) -> Iterator[Tensor]:
        """Sequences of every step: all of them in random order, then again in another."""
        size = min(self.settings.num_sequences, len(self.ids_NS))
        while True:
            for chosen_N in torch.randperm(len(self.ids_NS), generator=self.generator).split(size):
                if len(chosen_N) == size:
                    yield self.ids_NS[chosen_N]

    def _judge(self) -> float:
        if not len(self.held_out_NS):
            return math.nan
        return mean_loss(self.model, self.held_out_NS, batch_size=self.settings.batch_size)

    def _plateau(self, history: Sequence[float]) -> bool:
        patience = self.settings.patience
        if patience is None or len(history) <= patience:
            return False
        return history[-1] > history[-1 - patience] * (1 - self.settings.min_gain)
