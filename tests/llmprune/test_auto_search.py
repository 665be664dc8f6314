"""The search within a budget: against all jobs tried, on curves that are known; and what is held against a budget."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import pytest

from llmprune.events import Event
from llmprune.report import Latency, Quality
from llmprune.spec import PruneConfig
from llmprune.structure import StructureReport
from llmprune.sweep_report import PointReport, Trial, TrialKind
from llmprune.sweep_spec import AutoConfig, point_name
from llmprune.sweeps.budget import excess, in_words, measured_of, missed, unseen_of
from llmprune.sweeps.searching import MAX_CONFIRMATIONS, Search
from tests.reports import sample_benchmark, sample_report

SCALE = {"wanda": 1.0, "sparsegpt": 0.55, "flap": 3.0}


def kl_of(config: PruneConfig) -> float:
    """A divergence that rises with sparsity; half as much again for n:m, less with an allocation."""
    shape = 1.5 if ":" in config.pattern else 1.0
    return SCALE[config.method] * shape * (0.8 if config.allocation == "owl" else 1.0) * config.sparsity**4


def size_of(config: PruneConfig) -> float:
    """Bytes: what goes whole is gone, of zeros a bit is left for each weight."""
    kept = 1 - config.sparsity
    return 1e6 * (kept if config.pattern == "structured" else 0.56 if config.pattern == "2:4" else min(1.0, kept + 1 / 16))


class Jobs:
    """Jobs that take no time: what they measure, and which were done. ``bias``: the few windows' KL over the whole text's."""

    def __init__(self, config: AutoConfig, bias: float = 1.0) -> None:
        self.config, self.bias, self.done = config, bias, list[tuple[TrialKind, str]]()

    def __call__(self, kind: TrialKind, config: PruneConfig) -> Generator[Event, None, Trial]:
        self.done.append((kind, point_name(config, {})))
        assert self.done.count(self.done[-1]) == 1, "no job is done twice"
        kl = kl_of(config) * (self.bias if kind == "proxy" else 1.0)
        measured = {"kl": kl, "perplexity_increase": math.expm1(kl), "size": size_of(config), "speedup": 1.0}
        values = {"parameters": 1e6 * (1 - config.sparsity), "sparsity": config.sparsity}
        point = PointReport(name=point_name(config, {}), config=config, values=values)
        yield from ()
        return Trial(kind=kind, point=point, measured=measured, missed=missed(self.config.budgets, measured))


def search(bias: float = 1.0, **fields: Any) -> tuple[Trial | None, Search, Jobs]:
    """What is found, and how."""
    config = AutoConfig.build(PruneConfig(), **fields)
    jobs = Jobs(config, bias)
    looking = Search(config, jobs)
    run = looking.run()
    try:
        while True:
            next(run)
    except StopIteration as stop:
        return stop.value, looking, jobs


def everything(config: AutoConfig) -> list[PruneConfig]:
    """All jobs that may be tried."""
    steps = [round(index * config.step, 10) for index in range(1, round(1 / config.step))]
    steps = [step for step in steps if config.min_sparsity - 1e-9 <= step <= config.max_sparsity + 1e-9]
    return [config.at(family, step) for family in config.families() for step in steps]


@pytest.mark.parametrize("bias", [0.7, 1.0, 1.4])
@pytest.mark.parametrize("max_kl", [0.001, 0.05, 0.2, 2.0])
def test_the_sparsest_within_bounds_on_quality(max_kl: float, bias: float) -> None:
    """The same sparsity as among all 340 jobs, by an eighth of them, whatever the few windows make of it."""
    best, looking, jobs = search(bias, max_kl=max_kl)
    within = [job for job in everything(looking.config) if kl_of(job) <= max_kl]
    assert best is not None and best.kind == "confirmed" and not best.missed
    assert best.point.config.sparsity == max(job.sparsity for job in within)
    assert kl_of(best.point.config) == min(kl_of(job) for job in within if job.sparsity == best.point.config.sparsity)
    assert sum(kind == "proxy" for kind, _ in jobs.done) <= 42
    assert sum(kind == "confirmed" for kind, _ in jobs.done) <= MAX_CONFIRMATIONS
    assert looking.binding(best) == (("max_kl",) if max_kl < 2.0 else ())


@pytest.mark.parametrize("bias", [0.7, 1.4])
@pytest.mark.parametrize("max_size", [3e5, 560_000, 9e5])
def test_the_best_that_is_small_enough(max_size: float, bias: float) -> None:
    """The lowest KL of all jobs within the size: a pattern that fixes its size, or the lowest sparsity that is enough."""
    best, looking, _ = search(bias, max_size=max_size)
    within = [job for job in everything(looking.config) if size_of(job) <= max_size]
    assert best is not None and kl_of(best.point.config) == min(map(kl_of, within))
    assert looking.binding(best) == (() if best.point.config.pattern == "2:4" else ("max_size",))


def test_budgets_combine_and_what_meets_none_is_told() -> None:
    """Small and good at once: not here; the nearest is named, and what it misses."""
    best, looking, _ = search(max_size=300_000, max_kl=0.3)
    assert best is not None and best.point.name == "sparsegpt-0.77-owl"
    best, looking, jobs = search(max_size=300_000, max_kl=0.01)
    assert best is None and not any(kind == "confirmed" for kind, _ in jobs.done)
    nearest = looking.nearest()
    assert nearest is not None
    assert excess({"max_size": 3e5, "max_kl": 0.01}, nearest.worst) == min(
        excess({"max_size": 3e5, "max_kl": 0.01}, trial.worst) for trial in looking.trials
    )


def test_zeros_are_never_faster() -> None:
    """A bound on speed that nothing measured is above is met by nothing."""
    best, looking, _ = search(min_speedup=1.2)
    assert best is None and {trial.missed for trial in looking.trials} == {("min_speedup",)}


def test_a_search_ends_when_its_trials_are_spent() -> None:
    """With the best that it knows by then, confirmed."""
    best, looking, jobs = search(max_kl=0.05, max_trials=3)
    assert looking.spent and sum(kind == "proxy" for kind, _ in jobs.done) == 3
    assert best is not None and not best.missed


def test_what_is_measured_of_a_report() -> None:
    """Quality of the worst text, and speed only beyond the spread of the runs and never of zeros in dense tensors."""
    report = sample_report()
    values = measured_of(report, "decode")
    assert values["kl"] == 0.3127 and values["perplexity_increase"] == pytest.approx(29.3103 / 20.9664 - 1)
    assert values["speedup"] == 1.0 and values["size"] == report.checkpoint_bytes
    packed = sample_report(benchmark=sample_benchmark())
    assert measured_of(packed, "decode")["speedup"] == pytest.approx(1.5)
    assert measured_of(packed, "prefill")["speedup"] == pytest.approx(40 / 42)
    structure = StructureReport(
        structure="structured",
        method="flap",
        num_parameters_dense=9,
        num_parameters=8,
        num_removable=4,
        num_removed=1,
        stock=True,
    )
    assert measured_of(sample_report(structure=structure), "decode")["speedup"] == pytest.approx(45.6 / 42.4)
    assert report.latency
    same = Latency(device="x", dense=report.latency.dense, pruned=report.latency.dense)
    assert measured_of(sample_report(structure=structure, latency=same), "decode")["speedup"] == 1.0
    broken = sample_report(quality=(report.quality[0].model_copy(update={"perplexity_pruned": math.nan, "kl": math.nan}),))
    assert measured_of(broken, "decode")["kl"] == measured_of(broken, "decode")["perplexity_increase"] == math.inf
    assert "speedup" not in measured_of(sample_report(latency=None), "decode")


def test_the_windows_that_were_not_seen_are_the_rest_of_a_mean() -> None:
    """Two windows seen of five: the other three by arithmetic; none where all were seen."""
    losses_dense, losses, kls = [1.0, 1.2, 0.9, 1.1, 1.3], [1.4, 1.3, 1.5, 1.9, 1.7], [0.1, 0.2, 0.3, 0.4, 0.5]

    def quality(windows: int) -> Quality:
        def mean(values: list[float]) -> float:
            return sum(values[:windows]) / windows

        text = sample_report().quality[0].text.model_copy(update={"num_sequences": windows})
        return Quality(
            text=text, perplexity_dense=math.exp(mean(losses_dense)), perplexity_pruned=math.exp(mean(losses)), kl=mean(kls)
        )

    whole, part = sample_report(quality=(quality(5),)), sample_report(quality=(quality(2),))
    rest = unseen_of(whole, part)
    assert rest["kl"] == pytest.approx(0.4)
    assert rest["perplexity_increase"] == pytest.approx(math.exp((1.5 + 1.9 + 1.7) / 3 - (0.9 + 1.1 + 1.3) / 3) - 1)
    assert unseen_of(part, part) == {}


def test_budgets_in_words() -> None:
    """With units and bounds; what was not measured is broken and a dash."""
    budgets = {"max_perplexity_increase": 0.05, "min_speedup": 1.3, "max_size": 4e9}
    values = {"perplexity_increase": 0.0481, "speedup": 1.1}
    assert missed(budgets, values) == ("min_speedup", "max_size") and excess(budgets, values) == math.inf
    said = in_words(budgets, values)
    assert "perplexity +4.81 % (at most +5.00 %)" in said and "speed 1.10x (at least 1.30x)" in said and "3.73 GiB" in said
    assert excess({"max_kl": 0.0}, {"kl": 0.0}) == 0.0 and excess({"max_kl": 0.0}, {"kl": 0.1}) == math.inf
