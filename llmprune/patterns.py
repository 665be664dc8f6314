"""Where zeros may lie, how many, and what is compared with what: the words a job's target is made of. Torch-free."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from enum import IntEnum
from fractions import Fraction
from typing import Literal

from llmprune.errors import ConfigError, PatternError

Scope = Literal["row", "matrix", "block"]
Structure = Literal["structured", "blocks", "experts"]
"""What goes whole: groups of heads and channels, decoder blocks, or experts."""
STRUCTURE_METHODS: dict[Structure, tuple[str, ...]] = {
    "structured": ("tyr", "flap", "magnitude"),
    "blocks": ("block-qubo", "drop-one", "shortgpt"),
    "experts": ("reap", "frequency"),
}
"""The methods of each structure, the default first."""
MIXED = "mixed"
_N_TO_M = re.compile(r"([1-9]\d?):([1-9]\d?)", re.ASCII)
_MAX_M = 32


def structure_of(method: str) -> Structure | None:
    """The structure that a method names by itself: ``magnitude`` prunes weights too, and names none."""
    return next((name for name, known in STRUCTURE_METHODS.items() if method in known and method != "magnitude"), None)


class Need(IntEnum):
    """The input statistics a method needs; each level holds the ones below it."""

    NOTHING = 0
    NORM = 1
    MEAN = 2
    GRAM = 3


@dataclass(frozen=True)
class Pattern:
    """Where zeros may lie: anywhere (``n`` is None), or ``n`` weights KEPT in every ``m`` consecutive inputs.

    A job's pattern may also be ``mixed``: then every site has one of its own, and no site has this one. Or it names a
    ``structure`` that goes whole, and matrices get smaller instead of sparse.
    """

    n: int | None = None
    m: int | None = None
    mixed: bool = False
    structure: Structure | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read ``unstructured``, ``mixed``, a structure, or ``n:m`` with 0 < n < m; raises ConfigError."""
        for structure in STRUCTURE_METHODS:
            if text == structure:
                return cls(structure=structure)
        if text in ("unstructured", MIXED):
            return cls(mixed=text == MIXED)
        match = _N_TO_M.fullmatch(text)
        if not match or not 0 < int(match[1]) < int(match[2]) <= _MAX_M:
            raise ConfigError(
                f"pattern {text!r} is unknown; use 'unstructured', 'n:m' with 0 < n < m <= {_MAX_M}, such as '2:4' "
                "(n weights kept in every m consecutive inputs), 'mixed' (an n:m of its own for every matrix), or what goes "
                f"whole: {', '.join(map(repr, STRUCTURE_METHODS))}."
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        if self.m is None:
            return self.structure or (MIXED if self.mixed else "unstructured")
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float | None:
        """The sparsity the pattern itself fixes, or None for unstructured and mixed."""
        return None if self.m is None or self.n is None else 1 - self.n / self.m

    def check(self, in_features: int, site: str) -> None:
        """Raise PatternError where ``m`` does not divide the inputs of the named site."""
        if self.m is not None and in_features % self.m:
            stem, _, leaf = site.rpartition(".")
            glob = f"*.{stem.rpartition('.')[2]}.*" if leaf.isdigit() else f"*.{leaf}"
            raise PatternError(
                f"{self} needs in_features divisible by {self.m}, got {in_features} ({site}). "
                f"Skip it with --skip '{glob}' or choose an unstructured pattern."
            )


@dataclass(frozen=True)
class Target:
    """What one site is to become: pattern, sparsity in [0, 1], and the set its scores are compared in."""

    pattern: Pattern
    sparsity: float
    scope: Scope

    @property
    def name(self) -> str:
        """The pattern's, or ``dense`` where nothing is pruned."""
        return str(self.pattern) if self.sparsity else "dense"

    def eased(self, done: float) -> Target:
        """The target of a round, ``done`` in (0, 1] the share of the rounds that is over with it: sparsity rises as the cubic
        of Zhu and Gupta 2017 (arXiv 1710.01878, eq. 1), fast at first; n:m keeps whole weights, and at least n.
        """
        share = 1 - (1 - done) ** 3
        if self.pattern.n is None or self.pattern.m is None:
            return replace(self, sparsity=self.sparsity * share)
        kept = self.pattern.m - math.floor((self.pattern.m - self.pattern.n) * share)
        return replace(self, pattern=Pattern(kept, self.pattern.m), sparsity=1 - kept / self.pattern.m)


def num_pruned(numel: int, sparsity: float) -> int:
    """Number of zeros nearest to ``sparsity * numel``, in exact arithmetic (``int(20 * (1 - 0.85))`` is 3 in floats)."""
    return int(Fraction(repr(float(sparsity))) * numel + Fraction(1, 2))
