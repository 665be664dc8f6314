"""One seam for every solver of the block problem. V variables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmprune.solvers.anneal import anneal
from llmprune.solvers.exhaustive import exhaustive
from llmprune.solvers.greedy import greedy
from llmprune.solvers.problem import BlockProblem

Solver = Callable[..., Tensor]
"""A problem, and options by keyword, to the choice of pruned variables, bool [V]."""

SOLVERS: dict[str, Solver] = {"anneal": anneal, "greedy": greedy, "exhaustive": exhaustive}


@dataclass(frozen=True)
class Solution:
    """An answer that keeps every constraint and is no worse than the present choice.

    Attributes:
        pruned_V: which variables are pruned, bool.
        change: energy after minus energy before, in fp64; at most 0.
        num_swaps: how many variables are newly pruned, and as many newly kept.
    """

    pruned_V: Tensor
    change: float
    num_swaps: int


def solve(problem: BlockProblem, solver: str | Solver = "anneal", **options: Any) -> Solution:
    """Answer a block problem.

    Args:
        problem: what is asked; its tensors' device is where the solver runs.
        solver: ``anneal``, ``greedy``, ``exhaustive``, or a function of the problem that returns a bool [V], which may
            hand :meth:`BlockProblem.dense` to any other program.
        options: for the solver, such as ``seed`` and ``num_restarts`` of ``anneal``.

    Raises:
        ValueError: unknown name; or the answer breaks a constraint.
    """
    if isinstance(solver, str) and solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; use one of {', '.join(SOLVERS)}.")
    home = problem.pruned_V.device
    work = problem.to("cpu") if home.type == "mps" else problem  # energies are compared in fp64
    function = SOLVERS[solver] if isinstance(solver, str) else solver
    pruned_V = function(work, **options)
    if pruned_V.shape != work.pruned_V.shape or not bool(work.feasible(pruned_V[None].bool())):
        raise ValueError("the solver's answer changes how many variables of a group are pruned.")
    pruned_V = pruned_V.bool()
    before, after = work.energy(work.pruned_V[None])[0], work.energy(pruned_V[None])[0]
    change = float(after - before)
    if not change < 0:
        return Solution(problem.pruned_V.clone(), 0.0, 0)
    return Solution(pruned_V.to(home), change, int((pruned_V & ~work.pruned_V).sum()))
