"""What the results must reach, and whether they do: computed from them, model by model and target by target."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.quality_results import NOISE, Estimate, Results
from benchmarks.quality_variants import TARGETS, VARIANTS

BEST = "best"
CLOSED_AT_LEAST = 0.55
ICBS_BY_TIME = ("icbs-short", "icbs")
RECONSTRUCTED = "+reconstruct"


@dataclass(frozen=True)
class Check:
    """One bar in one place: where, what was found, and whether that is enough; None where it was not measured."""

    where: str
    found: str
    is_met: bool | None


@dataclass(frozen=True)
class Bar:
    """One sentence and its checks."""

    text: str
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> str:
        """``met`` only where every check was measured and is met."""
        found = [check.is_met for check in self.checks]
        if any(is_met is False for is_met in found):
            return "not met"
        if not any(found):
            return "not measured"
        return "met" if all(found) else "met so far"

    @property
    def detail(self) -> str:
        """How many checks are met, of how many measured and of how many there should be."""
        measured = [check for check in self.checks if check.is_met is not None]
        met = sum(bool(check.is_met) for check in measured)
        missing = len(self.checks) - len(measured)
        return f"{met} of {len(measured)}" + (f", {missing} not measured" if missing else "")


def bars(results: Results) -> list[Bar]:
    """All bars, over the models that have results."""
    models = list(results.models)
    icbs = [("icbs", "wanda", VARIANTS["icbs"].targets)]
    times = [(later, sooner, VARIANTS[sooner].targets) for sooner, later in pairwise(ICBS_BY_TIME)]
    tuned = [
        (variant.name, variant.name.removesuffix(RECONSTRUCTED), variant.targets)
        for variant in VARIANTS.values()
        if variant.name.endswith(RECONSTRUCTED)
    ]
    tuned.append(("balanced", "alps", VARIANTS["balanced"].targets))
    shared = [
        (f"{method}+{allocation}", method, ("70 %",)) for allocation in ("dp", "evolution") for method in ("wanda", "sparsegpt")
    ]
    return [
        Bar(
            f"The best preset closes at least {CLOSED_AT_LEAST:.0%} of SparseGPT's gap at 60 % and at 2:4 on every model.",
            tuple(_closed(results, model, target) for model in models for target in ("60 %", "2:4")),
        ),
        Bar("iCBS from a Wanda start ends below Wanda.", _changes(results, models, icbs, lambda change: change.is_below_zero)),
        Bar(
            "iCBS keeps falling with time: more passes, lower perplexity.",
            _changes(results, models, times, lambda change: change.is_below_zero),
        ),
        Bar(
            "Reconstruction never makes perplexity worse by more than noise.",
            _changes(results, models, tuned, lambda change: not change.is_above_zero),
        ),
        Bar(
            "Allocations dp and evolution beat uniform at 70 %.",
            _changes(results, models, shared, lambda change: change.is_below_zero),
        ),
    ]


def _closed(results: Results, model: str, target: str) -> Check:
    share = results.closed(model, BEST, target)
    where = f"{model}, {target}"
    if share is None:
        return Check(where, "not measured", None)
    return Check(where, f"{share.mean:.0%} ± {share.error:.0%}", share.mean >= CLOSED_AT_LEAST)


def _changes(
    results: Results,
    models: Iterable[str],
    pairs: Iterable[tuple[str, str, tuple[str, ...]]],
    is_met: Callable[[Estimate], bool],
) -> tuple[Check, ...]:
    """Each pair of a variant and the one that it is held against, by the change of the gap on the same windows."""
    checks = []
    for model in models:
        for variant, other, targets in pairs:
            for target in (name for name in TARGETS if name in targets):
                change = results.change(model, variant, other, target)
                where = f"{model}, {target}: {variant} against {other}"
                if change is None:
                    checks.append(Check(where, "not measured", None))
                else:
                    found = f"{change.mean:+.4f} ± {change.error:.4f} nats"
                    checks.append(Check(where, found, is_met(change)))
    return tuple(checks)


NOTE = f"Noise is {NOISE:g} standard errors of the mean difference between two models on the same windows."
