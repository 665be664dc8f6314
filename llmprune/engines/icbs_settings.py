"""How a mask is refined by iCBS, and what one step of it did. N sequences of a step, n weights of a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmprune.solvers.solve import Solver
from llmprune.spec import IcbsHessian


@dataclass(frozen=True)
class RefineSettings:
    """How a mask is refined. The defaults are the paper's for Mistral-7B; ``held_out`` and what follows is not in it.

    Attributes:
        num_epochs: how often the sites are gone through; None until another limit.
        steps_per_epoch: blocks of an epoch; None is one of every site.
        max_passes: backward passes at most; None is no limit of its own.
        block_size: n, weights of a block.
        num_pruned: k, pruned ones among them; None is half.
        num_sequences: N of a step.
        multiplier: gamma, of the gradient term.
        ridge: lambda, on the step.
        tabu, fix_pruned, fix_kept: see :meth:`llmprune.engines.candidates.SiteState.of`.
        min_steps: of every site in an epoch, where that is possible.
        hessian: curvature of a block: the empirical Fisher matrix of N sequences, or the loss's own second derivatives.
        solver, solver_options: see :func:`llmprune.solvers.solve.solve`.
        layers_per_step: sites that share one backward pass, each with a block of its own; None is all.
        retries: how often a step that is undone is solved again, of the same gradients under the ridge it has raised.
        adapt_ridge: double the ridge where the held-out loss falls by less than a tenth of what was predicted, four times
            where it rises and the step is undone; halve it again (not below ``ridge``) where the prediction holds or
            nothing moves; without held-out text it stays.
        tolerance: a step that raises the held-out loss by more than this fraction is undone; inf keeps every step.
        patience: stop when the held-out loss fell by less than ``min_gain`` (a fraction) in this many passes; None never.
        batch_size: sequences at once.
        seed: of the order of sites and sequences, and of the solver.
    """

    num_epochs: int | None = 10
    steps_per_epoch: int | None = 300
    max_passes: int | None = None
    block_size: int = 4096
    num_pruned: int | None = None
    num_sequences: int = 16
    multiplier: float = 0.75
    ridge: float = 0.001
    tabu: float = 0.40
    fix_pruned: float = 0.42
    fix_kept: float = 0.35
    min_steps: int = 10
    hessian: IcbsHessian = "fisher"
    solver: str | Solver = "anneal"
    solver_options: Mapping[str, Any] = field(default_factory=dict)
    layers_per_step: int | None = 1
    adapt_ridge: bool = True
    retries: int = 0
    tolerance: float = 0.0
    patience: int | None = None
    min_gain: float = 1e-3
    batch_size: int = 1
    seed: int = 0

    @property
    def pruned_of_block(self) -> int:
        """k."""
        return self.block_size // 2 if self.num_pruned is None else self.num_pruned

    def max_blocks(self, num_sites: int) -> int | None:
        """Blocks tried at most; None without a number of epochs."""
        return None if self.num_epochs is None else self.num_epochs * (self.steps_per_epoch or num_sites)

    def passes(self, num_sites: int) -> int | None:
        """Backward passes at most, about; None without a limit."""
        blocks, width = self.max_blocks(num_sites), min(self.layers_per_step or num_sites, num_sites)
        limits = [self.max_passes, None if blocks is None else -(-blocks // width)]
        return min((limit for limit in limits if limit is not None), default=None)


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
