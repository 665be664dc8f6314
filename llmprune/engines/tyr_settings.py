"""Presets of Týr's search, and what they cost before anything runs: bytes, token-forwards, floating-point operations.

O out, I in features; G groups of C columns, R of them at once; A columns alive; L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.allocate.evolution import Stage
from llmprune.structured.levels import chunk_of
from llmprune.structured.units import Module

MAX_STARTS = 3
"""Allocations a search may begin at: the centre and two of dynamic programming."""
FRONT_POINTS = 16
MEASURED_POINTS = 5


@dataclass(frozen=True)
class TyrSettings:
    """How much is searched.

    Attributes:
        iterations: supernets, each with half the step of the one before; 0 prunes every module alike without a search.
        generations, offspring: of each iteration's search.
        stages: tokens that candidates of a generation are measured on and how many of them go on; the last is the whole fixed
            set whatever it says.
        max_moves: of a mutation, at most.
        warm_start: curves of each module by itself are measured and dynamic programming offers a start; they also give the
            front of size and divergence.
        curve_tokens: tokens of the curves, at most.
        settle: the result is pruned once more, every module on what those before it leave, and kept where it diverges less;
            off, as on the demo model it gained a ten-thousandth of a nat once in six runs and nothing in the others.
        hidden_weight: of the hidden states' term of the divergence.
        damping: share of the Gram matrix's mean diagonal that is added to it.
        sequential: whether a module of a supernet sees what those before it in its block leave.
    """

    iterations: int = 2
    generations: int = 20
    offspring: int = 32
    stages: tuple[Stage, ...] = (Stage(2048, 4), Stage(None, 1))
    max_moves: int = 4
    warm_start: bool = True
    curve_tokens: int = 2048
    settle: bool = False
    hidden_weight: float = 0.0
    damping: float = 0.01
    sequential: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.iterations >= 0 and self.generations >= 0 and self.offspring >= 1 and self.stages


PRESETS: dict[str, TyrSettings] = {
    "local": TyrSettings(iterations=0, generations=0, warm_start=False),
    "fast": TyrSettings(iterations=1, generations=0),
    "standard": TyrSettings(),
    "paper": TyrSettings(
        iterations=4, generations=50, offspring=128, stages=(Stage(2048, 16), Stage(16384, 4), Stage(131072, 1))
    ),
}
"""``local`` searches nothing; ``fast`` is dynamic programming on measured curves; ``paper`` as in its section 4."""


def stages_for(stages: Sequence[Stage], num_tokens: int) -> tuple[Stage, ...]:
    """The stages on a fixed set of so many tokens: none has more, one that would be as large as the next is left out, and the
    last is the whole set.
    """
    found = [Stage(None, stages[-1].survivors)]
    size = num_tokens
    for stage in reversed(stages[:-1]):
        if stage.num_tokens is not None and stage.num_tokens < size:
            size = stage.num_tokens
            found.insert(0, stage)
    return tuple(found)


def generation_tokens(settings: TyrSettings, num_tokens: int) -> int:
    """Token-forwards of one generation at most, candidates times the tokens each is measured on; ``num_tokens`` are the fixed
    set's. The parent was measured on it before.
    """
    total, candidates = 0, settings.offspring
    for stage in stages_for(settings.stages, num_tokens):
        if stage.num_tokens is None or candidates > stage.survivors:
            total += candidates * (stage.num_tokens or num_tokens)
            candidates = min(candidates, stage.survivors)
    return total


def search_tokens(settings: TyrSettings, num_tokens: int, num_levels: Sequence[int]) -> int:
    """Token-forwards of all iterations at most, the settling's measurement included; forwards of the whole model, of which
    candidates that begin alike share a part.

    Args:
        num_tokens: of the fixed set.
        num_levels: of every iteration, levels of all modules together, the dense ones left out.
    """
    assert len(num_levels) == settings.iterations
    drawn, warm = min(settings.curve_tokens, num_tokens), settings.warm_start
    # In each supernet the dense model is measured too, and the best start once more by the search.
    starts = (2 + (MAX_STARTS if warm else 1)) * num_tokens
    total = settings.iterations * (starts + settings.generations * generation_tokens(settings, num_tokens))
    if warm and num_levels:
        total += drawn * (sum(num_levels) + MEASURED_POINTS)
    return total + (2 * num_tokens if settings.settle or not settings.iterations else 0)


def path_flops(module: Module, counts: Sequence[int]) -> int:
    """Floating-point operations of a module's nested path to these numbers of groups removed, fp64.

    The inverse of the damped Gram matrix is 2 I^3 and G = W H is 2 O I^2; a round of R columns with A alive costs 2 A^2 R for
    the inverse, 2 O A R for the weights and (2 C + 3) O A for the groups' worth; a level of K columns K^3 / 3 + 2 O K^2 for its
    weights and 2 O I^2 for its loss. So it is O(I^3 + L O I^2).
    """
    num_out, num_in = module.consumer.shape
    size, chunk = module.group_size, chunk_of(module)
    total, alive, removed = 2 * num_in**3 + 2 * num_out * num_in**2, num_in, 0
    for count in counts:
        while removed < count:
            number = min(chunk, count - removed)
            columns = number * size
            total += alive * ((2 * size + 3) * num_out + 2 * columns * (alive + num_out))
            alive, removed = alive - columns, removed + number
        if 0 < count < module.num_groups:
            total += alive**3 // 3 + 2 * num_out * alive**2
        total += 2 * num_out * num_in**2 if count else 0
    return total
