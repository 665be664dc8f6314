"""The pruning methods: one paper, one file, one line of the table.

Command-line choices, the service's schema, the docs and the contract tests all read this table. Torch-free: a method's
file is imported when it is first used.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmprune.errors import ConfigError
from llmprune.patterns import STRUCTURE_METHODS, Need, Pattern, Scope, Structure, Target
from llmprune.spec import PruneConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmprune.stats import LinearStats

Gives = Literal["score", "support", "prune", "structure"]


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        name: what the user types, and the name of the file in this folder.
        needs: input statistics the walk must collect.
        scope: set in which scores compete, as in the paper.
        gives: what the file has: ``score`` (the highest survive), ``support`` (which survive), both with survivors bit-equal to
            the dense weights, ``prune`` (the pruned weights, survivors changed), or ``structure``: no such file, as it takes
            more than single matrices (:mod:`llmprune.structuring`).
        summary: one sentence.
        paper: reference with its equation.
        surveyed_by: method that stands in for it where an allocation prunes every site many times.
        structure: what it takes out whole; None where it leaves zeros.
    """

    name: str
    needs: Need
    scope: Scope
    gives: Gives
    summary: str
    paper: str
    surveyed_by: str | None = None
    structure: Structure | None = None

    @property
    def updates_weights(self) -> bool:
        """Whether survivors may be changed; else they are bit-equal to the dense weights."""
        return self.gives in ("prune", "structure")

    def prune(
        self, weight_OI: Tensor, stats: LinearStats, target: Target, *, damping: float, generator: torch.Generator
    ) -> Tensor:
        """The pruned weight, same shape, dtype and device; the input is not changed.

        Args:
            weight_OI: dense weight [out, in], any float dtype.
            stats: statistics of the site's inputs, at least ``needs``.
            target: pattern, sparsity and scope.
            damping: fraction of the mean Gram diagonal added to it, for methods that factorise it.
            generator: source of randomness, on the CPU.
        """
        from llmprune.masks import keep_mask

        module: Any = importlib.import_module(f"llmprune.methods.{self.name}")
        if self.gives == "prune":
            return module.prune(weight_OI, stats, target, damping=damping)  # type: ignore[no-any-return]
        if self.gives == "support":
            keep_OI = module.support(weight_OI, stats, target)
        else:
            score_OI = module.score(weight_OI, stats, generator=generator)
            keep_OI = keep_mask(score_OI, target.pattern, target.sparsity, target.scope)
        return weight_OI.where(keep_OI, 0)


_TABLE = (
    Method(
        "magnitude", Need.NOTHING, "matrix", "score",
        summary="Prune the smallest weights.",
        paper="Han et al. 2015, arXiv 1506.02626, section 3",
    ),
    Method(
        "random", Need.NOTHING, "matrix", "score",
        summary="Prune at random: the floor every method must beat.",
        paper="baseline",
    ),
    Method(
        "wanda", Need.NORM, "row", "score",
        summary="Weight times input norm, compared within each output.",
        paper="Sun et al. 2023, arXiv 2306.11695, eq. 1",
    ),
    Method(
        "ria", Need.NORM, "matrix", "score",
        summary="Weight relative to its row and column, times the root of the input norm.",
        paper="Zhang et al. 2024, ICLR, Plug-and-Play, eq. 5",
    ),
    Method(
        "dsnot", Need.MEAN, "row", "support",
        summary="Wanda's support, then swaps in each output that lower its mean error.",
        paper="Zhang et al. 2023, arXiv 2310.08915, algorithm 1",
    ),
    Method(
        "sparsegpt", Need.GRAM, "block", "prune",
        summary="Column-wise optimal brain surgeon with weight updates.",
        paper="Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1",
    ),
    Method(
        "alps", Need.GRAM, "matrix", "prune",
        summary="Support by ADMM, then least squares on it by conjugate gradients.",
        paper="Meng et al. 2024, arXiv 2406.07831, algorithms 1 and 2", surveyed_by="sparsegpt",
    ),
)  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in _TABLE}
_STRUCTURES = (
    Method(
        "tyr", Need.GRAM, "matrix", "structure", structure="structured",
        summary="Groups by block optimal brain surgeon on every level, then an evolutionary search over levels.",
        paper="Li et al. 2025, Týr-the-Pruner, arXiv 2503.09657, algorithms 1 to 4",
    ),
    Method(
        "flap", Need.MEAN, "matrix", "structure", structure="structured",
        summary="Groups whose input varies least, weighted by their columns, with the mean they leave as a bias.",
        paper="An et al. 2023, FLAP, arXiv 2312.11983",
    ),
    Method(
        "magnitude", Need.NOTHING, "matrix", "structure", structure="structured",
        summary="Groups of the smallest weights.",
        paper="Han et al. 2015, arXiv 1506.02626, of groups",
    ),
    Method(
        "block-qubo", Need.NOTHING, "matrix", "structure", structure="blocks",
        summary="Blocks by a quadratic model of what they cost together, the best sets measured.",
        paper="Block removal by constrained binary optimisation, arXiv 2602.00161",
    ),
    Method(
        "drop-one", Need.NOTHING, "matrix", "structure", structure="blocks",
        summary="Blocks without which alone the output changes least.",
        paper="Sieberling et al. 2024, arXiv 2410.14649",
    ),
    Method(
        "shortgpt", Need.NOTHING, "matrix", "structure", structure="blocks",
        summary="Blocks that turn the hidden states least.",
        paper="Men et al. 2024, ShortGPT, arXiv 2403.03853",
    ),
    Method(
        "reap", Need.NOTHING, "matrix", "structure", structure="experts",
        summary="Experts of the smallest router-weighted activation.",
        paper="Lasby et al. 2025, REAP, arXiv 2510.13999",
    ),
    Method(
        "frequency", Need.NOTHING, "matrix", "structure", structure="experts",
        summary="Experts that the fewest tokens are routed to.",
        paper="baseline",
    ),
)  # fmt: skip
STRUCTURAL: dict[tuple[Structure, str], Method] = {
    (method.structure, method.name): method for method in _STRUCTURES if method.structure
}
"""Methods that take out what goes whole."""
REFINED: dict[str, str] = {
    "icbs": "Wanda, then its mask improved against the loss of the whole model: method wanda with refine icbs "
    "(arXiv 2411.17796)."
}
"""Names that PruneConfig takes for a method of the table and a refinement after it."""


def get_method(name: str) -> Method:
    """The method of that name; raises ConfigError with the nearest known name."""
    if name in METHODS:
        return METHODS[name]
    known = list(dict.fromkeys([*METHODS, *REFINED, *(name for names in STRUCTURE_METHODS.values() for name in names)]))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"method {name!r} is unknown.{hint} Known methods: {', '.join(known)}.")


def method_of(config: PruneConfig) -> Method:
    """The method of a job; raises ConfigError where it is unknown, or cannot be refined."""
    structure = Pattern.parse(config.pattern).structure
    if structure:
        return STRUCTURAL[structure, config.method]
    method = get_method(config.method)
    if config.refine != "none" and method.updates_weights:
        kept = ", ".join(other.name for other in METHODS.values() if not other.updates_weights)
        raise ConfigError(
            f"refine {config.refine!r} moves zeros among dense weights, but {method.name} changes the kept ones. Refine a "
            f"method that keeps them ({kept}), and add --reconstruct to tune them afterwards."
        )
    return method
