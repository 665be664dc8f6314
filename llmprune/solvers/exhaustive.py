"""Trying everything: the exact answer for a handful of variables. V variables, R candidates."""

from __future__ import annotations

from itertools import combinations, islice, product
from math import comb, prod

import torch
from torch import Tensor

from llmprune.solvers.problem import BlockProblem

MAX_CANDIDATES = 2_000_000
_BATCH = 65_536


def exhaustive(problem: BlockProblem) -> Tensor:
    """The best choice, bool [V]; the first of equals in the order of positions.

    Raises:
        ValueError: more than two million choices.
    """
    index_V, pruned_G, kept_G = problem.groups()
    sizes = [(int(pruned), int(pruned + kept)) for pruned, kept in zip(pruned_G, kept_G, strict=True)]
    num_candidates = prod(comb(size, count) for count, size in sizes)
    if num_candidates > MAX_CANDIDATES:
        raise ValueError(f"{num_candidates:,} choices are too many to try all; use solver 'anneal' or 'greedy'.")
    members = [(index_V == group).nonzero()[:, 0].tolist() for group in range(len(sizes))]
    choices = product(*(combinations(member, count) for member, (count, _) in zip(members, sizes, strict=True)))
    best_V, least = problem.pruned_V.clone(), float("inf")
    while batch := list(islice(choices, _BATCH)):
        chosen_RK = torch.tensor([sum(choice, ()) for choice in batch], dtype=torch.int64, device=index_V.device)
        pruned_RV = torch.zeros(len(batch), problem.num_variables, dtype=torch.bool, device=index_V.device)
        pruned_RV.scatter_(1, chosen_RK, True)
        energy_R = problem.energy(pruned_RV)
        first = int(energy_R.argmin())
        if float(energy_R[first]) < least:
            best_V, least = pruned_RV[first], float(energy_R[first])
    return best_V
