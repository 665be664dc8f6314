"""Simulated annealing by swaps: many restarts side by side, every constraint kept by construction.

V variables, N samples, R restarts, P swaps of a sweep, Q of them resolved together, G groups.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmprune.solvers.greedy import greedy
from llmprune.solvers.problem import BlockProblem

HOTTEST, COLDEST = 1.0, 1e-2
"""First and last temperature, over the mean energy change of a random swap of the present choice."""
_WIDTH = 256  # swaps resolved together; the result does not depend on it but for rounding
_MAX_QUENCH = 50  # sweeps at temperature zero, until nothing moves


def anneal(
    problem: BlockProblem, *, num_restarts: int = 20, num_temperatures: int = 121, num_sweeps: int = 1, seed: int = 0
) -> Tensor:
    """The best choice seen by any restart, bool [V]; never worse than the present one.

    All restarts begin at the present choice, at ``num_temperatures`` temperatures that fall geometrically, and end with
    sweeps at zero; the best is polished by best-swap descent. A sweep pairs the pruned with the kept variables of each
    group at random, once each, and goes through the pairs in turn: a swap that changes the energy by D is taken if D < 0,
    else with probability exp(-D / T).
    With u = B x held, D costs O(N) and not O(V): D = l_j - l_i + (b_j - b_i) . u + 1/2 ||b_j - b_i||^2.

    The problem may be multiplied by any positive number without changing the result: temperatures are relative.
    """
    generator = torch.Generator().manual_seed(seed)
    pairing = _Pairing(problem)
    if not pairing.num_pairs:
        return problem.pruned_V.clone()
    state = _State(problem, num_restarts)
    scale = state.mean_change(*pairing.draw(state.pruned_RV, generator))
    if scale == 0:
        return problem.pruned_V.clone()
    steps = torch.linspace(0, 1, num_temperatures, dtype=torch.float64)
    temperatures = scale * HOTTEST * (COLDEST / HOTTEST) ** steps
    for temperature in temperatures.tolist():
        moved = False
        for _ in range(num_sweeps):
            moved |= state.sweep(*pairing.draw(state.pruned_RV, generator), temperature, generator)
        if not moved:
            break
    for _ in range(_MAX_QUENCH):
        if not state.sweep(*pairing.draw(state.pruned_RV, generator), 0.0, generator):
            break
    candidates_RV = torch.cat([problem.pruned_V[None], state.best_RV])
    best_V = candidates_RV[problem.energy(candidates_RV).argmin()]
    return greedy(replace(problem, pruned_V=best_V))


class _Pairing:
    """Random matchings of pruned with kept variables inside the groups. How many a group has never changes."""

    def __init__(self, problem: BlockProblem) -> None:
        index_V, pruned_G, kept_G = problem.groups()
        num_pruned = int(pruned_G.sum())
        pairs_G = torch.minimum(pruned_G, kept_G)
        self.num_pairs = int(pairs_G.sum())
        self.num_groups = len(pairs_G)
        self.index_V = index_V
        rank_P = _ranks(pairs_G)
        self.pruned_slot_P = torch.repeat_interleave(pruned_G.cumsum(0) - pruned_G, pairs_G) + rank_P
        self.kept_slot_P = torch.repeat_interleave(kept_G.cumsum(0) - kept_G, pairs_G) + rank_P + num_pruned
        # Keys below G + 1: fp32 resolves them while groups are few.
        self.dtype = torch.float32 if self.num_groups <= 16 else torch.float64

    def draw(self, pruned_RV: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(variables to keep [R, P], variables to prune [R, P]); no variable comes twice."""
        key_RV = torch.rand(pruned_RV.shape, generator=generator, dtype=self.dtype).to(pruned_RV.device)
        key_RV += self.index_V + self.num_groups * ~pruned_RV  # pruned ones first, by group, in random order
        order_RV = key_RV.argsort(dim=1)
        return order_RV[:, self.pruned_slot_P], order_RV[:, self.kept_slot_P]


class _State:
    """Where every restart is, and the best it has seen."""

    def __init__(self, problem: BlockProblem, num_restarts: int) -> None:
        self.problem = problem
        self.factor_VN = problem.factor_NV.T.contiguous()
        self.pruned_RV = problem.pruned_V.repeat(num_restarts, 1)
        self.best_RV = self.pruned_RV.clone()
        self.best_R = self._energy()

    def _energy(self) -> Tensor:
        x_RV = self.pruned_RV.to(self.factor_VN.dtype)
        self.output_RN = x_RV @ self.factor_VN  # afresh: what swaps add to it would gather rounding
        return 0.5 * self.output_RN.square().sum(1) + x_RV @ self.problem.linear_V

    def _changes(self, keep_RP: Tensor, prune_RP: Tensor) -> tuple[Tensor, Tensor]:
        """Each swap alone: what it adds to u [R, P, N], and to the energy [R, P]."""
        step_RPN = self.factor_VN[prune_RP] - self.factor_VN[keep_RP]
        linear_RP = self.problem.linear_V[prune_RP] - self.problem.linear_V[keep_RP]
        return step_RPN, linear_RP + (step_RPN * (self.output_RN[:, None] + 0.5 * step_RPN)).sum(-1)

    def mean_change(self, keep_RP: Tensor, prune_RP: Tensor) -> float:
        return float(self._changes(keep_RP, prune_RP)[1].abs().mean())

    def sweep(self, keep_RP: Tensor, prune_RP: Tensor, temperature: float, generator: torch.Generator) -> bool:
        """Try every pair in turn; whether any restart moved."""
        allowed_RP = torch.zeros(keep_RP.shape, dtype=self.factor_VN.dtype)
        if temperature:
            draw_RP = torch.empty(keep_RP.shape, dtype=torch.float64).exponential_(generator=generator)
            allowed_RP = (draw_RP * temperature).to(allowed_RP.dtype)
        moved = torch.zeros((), dtype=torch.bool, device=keep_RP.device)
        allowed_RP = allowed_RP.to(keep_RP.device)
        for start in range(0, keep_RP.shape[1], _WIDTH):
            few = slice(start, start + _WIDTH)
            keep_RQ, prune_RQ = keep_RP[:, few], prune_RP[:, few]
            step_RQN, change_RQ = self._changes(keep_RQ, prune_RQ)
            taken_RQ = _in_turn(step_RQN, change_RQ, allowed_RP[:, few])
            self.output_RN += (step_RQN * taken_RQ[..., None]).sum(1)
            self.pruned_RV.scatter_(1, keep_RQ, ~taken_RQ).scatter_(1, prune_RQ, taken_RQ)
            moved |= taken_RQ.any()
        energy_R = self._energy()
        better_R = energy_R < self.best_R
        self.best_R = torch.where(better_R, energy_R, self.best_R)
        self.best_RV = torch.where(better_R[:, None], self.pruned_RV, self.best_RV)
        return bool(moved)


def _in_turn(step_RPN: Tensor, change_RP: Tensor, allowed_RP: Tensor) -> Tensor:
    """Which swaps are taken, bool [R, P], when each is judged after all before it: its energy change, with the swaps
    taken before it, is below what is allowed.

    A swap adds s_p . (sum of s_q taken before) to its change alone. Starting from any guess, judging all swaps at once
    settles at least one more of the leading ones each time, and mostly all of them after a few: the loop in fact ends
    with exactly what judging one by one gives.
    """
    taken_RP = change_RP < allowed_RP
    for _ in range(taken_RP.shape[1]):
        own_RPN = step_RPN * taken_RP[..., None]
        before_RPN = own_RPN.cumsum(1) - own_RPN
        judged_RP = change_RP + (step_RPN * before_RPN).sum(-1) < allowed_RP
        if torch.equal(judged_RP, taken_RP):
            break
        taken_RP = judged_RP
    return taken_RP


def _ranks(count_G: Tensor) -> Tensor:
    """0 .. count - 1 of every group, one after the other."""
    starts_G = count_G.cumsum(0) - count_G
    total = int(count_G.sum())
    return torch.arange(total, device=count_G.device) - torch.repeat_interleave(starts_G, count_G)
