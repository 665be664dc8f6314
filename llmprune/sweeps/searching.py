"""The search for the best model within a budget, over families of jobs that differ in their sparsity alone.

Quality falls with sparsity, and so do size and time, so that bisection finds where a bound is met: the highest sparsity within
bounds on quality, or the lowest one within bounds on cost, whose quality is the best that the cost allows. A step of it is a
cheap job on a few windows of the evaluation texts. The most promising job is then done on all of them; by what factor
they, and those that the search has not seen, say otherwise is held against the family's other cheap results, and the search
goes on until the best that it knows is a confirmed one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from llmprune.errors import LlmpruneError
from llmprune.events import Event
from llmprune.spec import MAX_MIXED_SPARSITY, Pattern, PruneConfig
from llmprune.sweep_report import PointReport, Trial, TrialKind
from llmprune.sweep_spec import AutoConfig
from llmprune.sweeps.budget import QUALITY, QUANTITIES, excess, missed

MAX_CONFIRMATIONS = 8
Run = Callable[[TrialKind, PruneConfig], Generator[Event, None, Trial]]


class Spent(LlmpruneError):
    """No trial is left."""


@dataclass
class Family:
    """Jobs of one method, pattern and allocation.

    ``proxies`` and ``confirmed`` are trials by step, the sparsity over the step's size, up to ``last``. ``fixed``: the pattern
    says how sparse it is, and there is the step 0 alone.
    """

    config: PruneConfig
    last: int
    fixed: bool
    proxies: dict[int, Trial] = field(default_factory=dict)
    confirmed: dict[int, Trial] = field(default_factory=dict)

    def values(self, step: int) -> dict[str, float]:
        """What is known or expected of a step: its confirmation, else its cheap trial by what the nearest one made of it."""
        if step in self.confirmed:
            return self.confirmed[step].worst
        found = dict(self.proxies[step].measured)
        near = min(self.confirmed, key=lambda other: abs(other - step), default=None)
        if near is not None:
            for key in (QUANTITIES[name] for name in QUALITY):
                worst, cheap = self.confirmed[near].worst, self.proxies[near].measured
                if key in found and key in worst and key in cheap:
                    is_loss = min(found[key], worst[key], cheap[key]) > 0
                    found[key] = found[key] * worst[key] / cheap[key] if is_loss else found[key] + worst[key] - cheap[key]
        return found


class Search:
    """One search; :meth:`run` may be called once.

    Args:
        config: budgets and what is tried.
        run: does one job, or finds it done.
    """

    def __init__(self, config: AutoConfig, run: Run) -> None:
        self.config, self._run = config, run
        self.first = -int(-(config.min_sparsity / config.step - 1e-9) // 1)
        self.families = [self._family(family) for family in config.families()]
        self.trials: list[Trial] = []
        self.spent = False

    def run(self) -> Generator[Event, None, Trial | None]:
        """Search and confirm; the best confirmed trial, or None."""
        for _ in range(MAX_CONFIRMATIONS):
            try:
                for family in self.families:
                    yield from self._seek(family)
            except Spent:
                self.spent = True
            best = self._best(self.families)
            if best is None:
                break
            family, step = best
            if step in family.confirmed:
                return family.confirmed[step]
            trial = yield from self._run("confirmed", self._job(family, step))
            self.trials.append(trial)
            family.confirmed[step] = trial
        sure = [trial for trial in self.trials if trial.kind == "confirmed" and not trial.missed]
        return min(sure, key=self._rank_of_trial, default=None)

    def binding(self, best: Trial) -> tuple[str, ...]:
        """The budgets that the next step beyond the best one breaks, as far as it was tried."""
        for family in self.families:
            for step, trial in family.confirmed.items():
                if trial is best:
                    beyond = step - 1 if self.config.bounds_cost else step + 1
                    if beyond in family.proxies:
                        return self._missed(family, beyond)
        return ()

    def nearest(self) -> Trial | None:
        """The trial that is closest to the budget, a confirmed one where there is any as close."""
        return min(self.trials, key=lambda trial: (excess(self.config.budgets, trial.worst), trial.kind), default=None)

    # Bisection --------------------------------------------------------------------------------------------------------------

    def _seek(self, family: Family) -> Generator[Event, None, None]:
        """Close in on the family's best step; one that cannot beat another family's of the same pattern is left early."""
        if family.fixed:
            yield from self._proxy(family, 0)
        elif self.config.bounds_cost:
            yield from self._seek_cheap(family)
        else:
            yield from self._seek_sparse(family)

    def _seek_sparse(self, family: Family) -> Generator[Event, None, None]:
        rivals = [other for other in self.families if other is not family and other.config.pattern == family.config.pattern]
        rival = self._best(rivals)
        if rival is not None:
            yield from self._proxy(family, rival[1])
            if self._missed(family, rival[1]):
                return
        while True:
            low, high = self._bracket(family)
            if high - low <= 1:
                return
            yield from self._proxy(family, (low + high + 1) // 2)

    def _seek_cheap(self, family: Family) -> Generator[Event, None, None]:
        yield from self._proxy(family, family.last)
        if self._too_dear(family, family.last):
            return
        while True:
            low, high = self._bracket(family)
            if high - low <= 1:
                return
            yield from self._proxy(family, (low + high) // 2)

    def _bracket(self, family: Family) -> tuple[int, int]:
        """Neighbouring known steps between which the bounds begin to break, or with bounds on cost begin to be met."""
        if self.config.bounds_cost:
            low = max((step for step in family.proxies if self._too_dear(family, step)), default=self.first - 1)
            return low, min((step for step in family.proxies if step > low), default=family.last + 1)
        high = min((step for step in family.proxies if self._missed(family, step)), default=family.last + 1)
        return max((step for step in family.proxies if step < high), default=self.first - 1), high

    def _best(self, families: list[Family]) -> tuple[Family, int] | None:
        """The family and step that is expected, or known, to be the best within the budget."""
        found = []
        for family in families:
            low, high = (0, 0) if family.fixed else self._bracket(family)
            step = high if self.config.bounds_cost else low
            if step in family.proxies and not self._missed(family, step):
                found.append((self._rank(family, step), family, step))
        best = min(found, key=lambda item: item[0], default=None)
        return None if best is None else best[1:]

    def _rank(self, family: Family, step: int) -> tuple[float, ...]:
        return self._rank_of(family.proxies[step].point, family.values(step), sure=step in family.confirmed)

    def _rank_of_trial(self, trial: Trial) -> tuple[float, ...]:
        return self._rank_of(trial.point, trial.worst, sure=True)

    def _rank_of(self, point: PointReport, values: dict[str, float], *, sure: bool) -> tuple[float, ...]:
        """Lower is better: with bounds on quality alone the sparsest, else the lowest KL; known ones before expected ones.

        Sparsity is that of the whole model, so that patterns compare.
        """
        loss = values.get("kl", values.get("perplexity_increase", 0.0))
        sparsest = () if self.config.bounds_cost else (float(f"{point.values.get('parameters', 0.0):.3e}"),)
        return (*sparsest, loss, float(not sure))

    def _missed(self, family: Family, step: int) -> tuple[str, ...]:
        return missed(self.config.budgets, family.values(step))

    def _too_dear(self, family: Family, step: int) -> bool:
        """Whether a step breaks a bound on cost; one that no job can reach, as the most that can go is less, does not."""
        return bool(family.proxies[step].measured) and any(name not in QUALITY for name in self._missed(family, step))

    def _proxy(self, family: Family, step: int) -> Generator[Event, None, None]:
        """Try a step cheaply, if it was not."""
        if step in family.proxies:
            return
        if sum(trial.kind == "proxy" for trial in self.trials) >= self.config.max_trials:
            raise Spent("no trial is left.")
        trial = yield from self._run("proxy", self._job(family, step))
        self.trials.append(trial)
        family.proxies[step] = trial

    def _job(self, family: Family, step: int) -> PruneConfig:
        if family.fixed:
            return family.config
        return self.config.at(family.config, round(step * self.config.step, 10))

    def _family(self, config: PruneConfig) -> Family:
        pattern = Pattern.parse(config.pattern)
        most = min(self.config.max_sparsity, MAX_MIXED_SPARSITY) if pattern.mixed else self.config.max_sparsity
        return Family(config, int(most / self.config.step + 1e-9), pattern.sparsity is not None)
