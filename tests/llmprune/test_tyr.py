"""Týr's outer loop on tiny models: budgets, starts, curves and front, uniform widths, settling, and going on after a stop."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmprune.allocate.evolution import Stage
from llmprune.devices import free_bytes
from llmprune.engines import evolution, tyr
from llmprune.engines.curves import Curves
from llmprune.engines.divergence import Candidate, Divergence
from llmprune.engines.supernet import level_bytes, module_levels
from llmprune.engines.tyr import Tyr
from llmprune.engines.tyr_settings import MAX_STARTS, PRESETS, generation_tokens, path_flops, search_tokens, stages_for
from llmprune.spec import Need
from llmprune.stats import LinearStats
from llmprune.structured.levels import grid
from llmprune.structured.path import nested_path
from llmprune.structured.slicing import mask_
from llmprune.structured.uniform import Widths, uniform_widths
from supernet_case import CPU, SETTINGS, Case, ids, make_case


def _cuts(engine: Tyr) -> dict[str, tuple[list[int], list[float]]]:
    """What stays, to the bit."""
    found = {}
    for name, cut in engine.cuts.items():
        assert cut.weight_OK is not None
        found[name] = (cut.kept_G.tolist(), cut.weight_OK.flatten().tolist())
    return found


def test_the_search_ends_no_worse_and_on_its_budget() -> None:
    """Of each kind as many groups go as asked; curves fall; the cuts diverge as told, from a model that is dense again."""
    case = make_case()
    engine = case.tyr(0.25)
    wanted = engine.budget.centre()
    steps = list(engine.run())
    assert case.unchanged() and len(engine.rounds) == 2 and len(engine.cuts) == len(case.modules) == 4
    for pair in ((0, 2), (1, 3)):
        assert sum(engine.counts[number] for number in pair) == sum(wanted[number] for number in pair)
    assert sum(wanted[1::2]) == 64
    for module, count in zip(case.modules, engine.counts, strict=True):
        assert len(engine.cuts[module.name].kept_G) == module.num_groups - count
    assert engine.divergence == pytest.approx(case.kl(engine.cuts), rel=1e-4)
    for one in engine.rounds:
        assert all(after < before for (_, before), (_, after) in itertools.pairwise(one.curve))
        assert one.curve[0][1] == min(one.starts.values()) <= one.starts["centre"] and one.divergence >= engine.divergence
    done = [step.done for step in steps]
    assert done == sorted(set(done)) and done[-1] == engine.total == steps[0].total == 2 * (2 + 2 + 3) + 2
    assert [step.phase for step in steps if step.iteration == 1][:4] == ["supernet"] * 2 + ["curves"] * 2


@pytest.mark.parametrize("name", ["parameters", "latency"])
def test_a_shared_budget_is_met_from_above(name: Any) -> None:
    """Weights, or seconds of which attention's are dear: at least the share, and no more than the bounds leave."""
    case = make_case()
    costs = {module.name: 4e-4 if module.kind == "attention" else 1e-5 for module in case.modules}
    engine = case.tyr(0.25, name, costs if name == "latency" else None, warm_start=name == "latency", generations=1)
    list(engine.run())
    per_group = [costs[module.name] if name == "latency" else float(module.parameters_per_group) for module in case.modules]
    total = sum(size * module.num_groups for size, module in zip(per_group, case.modules, strict=True))
    removed = sum(size * count for size, count in zip(per_group, engine.counts, strict=True))
    low, high = engine.budget.bounds(1)
    assert total / 4 * (1 - 1e-9) <= removed <= total / 4 * (high / low) * (1 + 1e-9) and case.unchanged()


def test_an_iteration_that_ends_worse_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one's weights stay, and the later one is built around them."""
    case = make_case()
    first = case.tyr(0.5, iterations=1, generations=1, settle=False)
    list(first.run())
    engine = case.tyr(0.5, iterations=2, generations=1, settle=False)
    monkeypatch.setattr(tyr.Round, "divergence", property(lambda own: own.curve[-1][1] + own.iteration))
    list(engine.run())
    assert _cuts(engine) == _cuts(first) and len(engine.rounds) == 2


def test_local_prunes_each_module_on_what_those_before_it_leave() -> None:
    """Every cut is that of the path on its inputs in the model with the cuts before it masked in, by hand."""
    case = make_case()
    engine = case.tyr(0.5, iterations=0)
    steps = list(engine.run())
    assert engine.counts == engine.budget.centre() and not engine.rounds and not engine.front
    assert [step.phase for step in steps] == ["settle"] * 2 and engine.settled == engine.divergence
    assert engine.divergence == pytest.approx(case.kl(engine.cuts), rel=1e-4)
    for module, count in zip(case.modules, engine.counts, strict=True):
        stats = LinearStats(module.consumer.shape[1], Need.GRAM, CPU)
        handle = module.consumer.module.register_forward_pre_hook(lambda _module, args, stats=stats: stats.update(args[0]))
        with torch.no_grad():
            case.model(input_ids=ids(), use_cache=False)
        handle.remove()
        [level], _ = module_levels(module.consumer.weight_OI, stats, module, [count])
        cut = engine.cuts[module.name]
        assert torch.equal(cut.kept_G, level.kept_G) and cut.weight_OK is not None
        torch.testing.assert_close(cut.weight_OK, level.weight_OK, rtol=1e-3, atol=1e-5)
        mask_(module, cut)


def test_settling_is_kept_where_it_diverges_less() -> None:
    """Never worse than the search; the numbers removed stay."""
    case = make_case()
    plain, settled = (case.tyr(0.5, iterations=1, generations=1, settle=settle) for settle in (False, True))
    for engine in (plain, settled):
        list(engine.run())
    assert settled.settled is not None and plain.settled is None and settled.counts == plain.counts
    assert settled.divergence == min(plain.divergence, settled.settled) == pytest.approx(case.kl(settled.cuts), rel=1e-4)


def _front(case: Case) -> tuple[Any, Any, Any]:
    net = case.supernet()
    curves = Curves(case.racks, num_tokens=6 * 32, seed=0)
    measuring = curves.measure(case.fitness(net))
    blocks = []
    while True:
        try:
            blocks.append(next(measuring))
        except StopIteration as stop:
            assert blocks == [1, 2]
            return net, curves, stop.value


def test_curves_are_of_each_module_by_itself() -> None:
    """A few of them against whole forwards of the model with one module at its level; 0 where nothing goes."""
    case = make_case(sparsity=0.25)
    net, _, found = _front(case)
    for number, level in ((0, 2), (1, 3), (2, 4), (3, 8)):
        net.restore_()
        net.hold_(number, level)
        assert found[number][level] == pytest.approx(case.kl(), rel=1e-4) and found[number][level] > 0
    assert all(own[0] == 0 and len(own) == len(rack.counts) for own, rack in zip(found, case.racks, strict=True))


def test_the_front_runs_from_all_parameters_to_what_the_levels_leave() -> None:
    """Each point is the best sum of all allocations that remove as much, by brute force; some are measured, as forwards do."""
    case = make_case(sparsity=0.25)
    net, curves, found = _front(case)
    front = curves.front(found, 6)
    sizes = [rack.module.parameters_per_group for rack in case.racks]
    total = sum(rack.module.num_groups * size for rack, size in zip(case.racks, sizes, strict=True))
    every = [
        (
            sum(rack.counts[level] * size for rack, level, size in zip(case.racks, levels, sizes, strict=True)),
            sum(own[level] for own, level in zip(found, levels, strict=True)),
        )
        for levels in itertools.product(*(range(len(rack.counts)) for rack in case.racks))
    ]
    assert front[0][1].num_parameters == total and front[0][1].predicted == 0 and front[-1][1].num_parameters == 0
    assert len(front) >= 5
    for index, (_, point) in enumerate(front[:5]):
        best = min(cost for removed, cost in every if removed >= index * total // 5)
        assert point.predicted == pytest.approx(best) and point.num_parameters <= total - index * total // 5
    points = curves.measured(case.fitness(net), front, 3)
    assert [point.measured is not None for point in points].count(True) == 3
    for (levels, _), point in zip(front, points, strict=True):
        if point.measured is not None:
            for number, level in enumerate(levels):
                net.hold_(number, level)
            assert point.measured == pytest.approx(case.kl(), rel=1e-4, abs=1e-7)


def test_a_stopped_search_ends_as_if_it_had_not_been() -> None:
    """After a block and after generations: bit-equal weights, the same report, from what JSON gives back."""
    case = make_case()
    whole = case.tyr(0.5, generations=2)
    states = [(step, json.dumps(whole.snapshot())) for step in whole.run()]
    assert [states[number][0].phase for number in (5, -4)] == ["search"] * 2
    for number in (5, len(states) - 4):
        step, state = states[number]
        engine = case.tyr(0.5, generations=2)
        engine.restore_(json.loads(state))
        steps = list(engine.run())
        assert _cuts(engine) == _cuts(whole) and engine.counts == whole.counts and engine.front == whole.front
        assert (engine.divergence, engine.settled) == (whole.divergence, whole.settled)
        assert [one.curve for one in engine.rounds] == [one.curve for one in whole.rounds]
        if step.phase == "search":
            assert step.done + 1 in {other.done for other in steps} and step.done not in {other.done for other in steps}


def test_a_stopped_search_finds_the_weights_of_an_earlier_iteration_again() -> None:
    """The first iteration was the best, and nothing but numbers is left of it."""
    case = make_case()
    first = case.tyr(0.5, iterations=1, generations=1, settle=False)
    list(first.run())
    engine = case.tyr(0.5, generations=1, settle=False)
    state = case.tyr(0.5, iterations=1, settle=False).snapshot()
    state["rounds"] = json.loads(json.dumps(first.snapshot()["rounds"]))
    state["rounds"][0]["curve"][-1][1] = -1.0
    engine.restore_(state)
    list(engine.run())
    assert len(engine.rounds) == 2 and _cuts(engine) == _cuts(first) and engine.divergence == -1


@pytest.mark.parametrize("iterations", [1, 0])
def test_uniform_widths_are_the_best_of_all_pairs(iterations: int) -> None:
    """Every layer alike, at least the share goes, and no other pair diverges less; without iterations the one of nearest share
    in both. A search stopped after a pair goes on.
    """
    case = make_case()
    pairs = uniform_widths(case.tyr(0.25, "parameters").budget, (1, 2, 3, 4))
    assert len(pairs) == 4
    engine = case.tyr(0.25, "parameters", widths=pairs, iterations=iterations, settle=False)
    states = [engine.snapshot() for _ in engine.run()]
    chosen = next(pair for pair in pairs if pair.removed(case.modules) == engine.counts)
    assert engine.budget.removed(engine.counts) >= engine.budget.target and case.unchanged()
    assert engine.divergence == pytest.approx(case.kl(engine.cuts), rel=1e-4)
    if not iterations:
        assert chosen == Widths(3, 96)
        return
    [one] = engine.rounds
    assert len(one.starts) == 4 and engine.divergence == min(one.starts.values())
    assert one.starts[str(pairs.index(chosen))] == engine.divergence
    again = case.tyr(0.25, "parameters", widths=pairs, iterations=iterations, settle=False)
    again.restore_(json.loads(json.dumps(states[-2])))
    assert len(list(again.run())) == 3 and _cuts(again) == _cuts(engine)


def test_a_seed_fixes_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory and on disk, which the report tells."""
    found = []
    for share in (0.5, 0.0):
        monkeypatch.setattr(evolution, "MEMORY_SHARE", share)
        engine = make_case().tyr(0.5, iterations=1, generations=2, warm_start=False)
        list(engine.run())
        found.append((engine.counts, [one.curve for one in engine.rounds], _cuts(engine)))
        assert [one.on_disk for one in engine.rounds] == [not share]
        assert all(one.supernet_bytes > 0 and one.seconds_supernet > 0 < one.seconds_per_generation for one in engine.rounds)
    assert found[0] == found[1]


@pytest.mark.parametrize("stop_at", [0, 2, 4, -1])
def test_the_model_is_dense_when_the_search_is_stopped(stop_at: int) -> None:
    """Closed while a supernet is built, modules are measured by themselves, candidates are in place, or it settles."""
    case = make_case()
    engine = case.tyr(0.5, iterations=1, generations=1)
    run = engine.run()
    for _ in range(stop_at % engine.total + 1):
        next(run)
    run.close()  # type: ignore[attr-defined]
    assert case.unchanged()


def test_the_model_is_dense_when_the_search_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised while a candidate's weights are in place."""
    case = make_case()
    measure, held = Divergence.__call__, []

    def fail(self: Divergence, candidates: Any, rng: Any, num_tokens: int | None = None) -> list[float]:
        measure(self, candidates, rng, num_tokens)
        held.append(not case.unchanged())
        raise RuntimeError("broken")

    monkeypatch.setattr(Divergence, "__call__", fail)
    with pytest.raises(RuntimeError, match="broken"):
        list(case.tyr(0.5).run())
    assert held == [True] and case.unchanged()


def test_a_supernet_that_fits_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With words of its own, before anything is computed."""
    case = make_case()
    monkeypatch.setattr(tyr, "level_bytes", lambda _racks: 1 << 62)
    assert free_bytes(CPU) < 1 << 62
    with pytest.raises(evolution.OutputError, match="the supernet keeps"):
        list(case.tyr().run())
    assert case.unchanged()


def test_stages_of_small_sets() -> None:
    """None larger than the set; one that would be as large as the next is left out; the last is the whole set."""
    paper = PRESETS["paper"].stages
    assert stages_for(paper, 131072) == (Stage(2048, 16), Stage(16384, 4), Stage(None, 1)) == stages_for(paper, 1 << 20)
    assert stages_for(paper, 16384) == stages_for(paper, 4096) == (Stage(2048, 16), Stage(None, 1))
    assert stages_for(paper, 2048) == stages_for(paper, 100) == (Stage(None, 1),)


def test_the_paper_s_cost_of_a_generation() -> None:
    """1.18 million token-forwards with the parent's, which is not measured again here."""
    assert generation_tokens(PRESETS["paper"], 131072) == 128 * 2048 + 16 * 16384 + 4 * 131072
    assert generation_tokens(PRESETS["paper"], 1024) == 128 * 1024


def test_token_forwards_are_as_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in a run of enough choices for every generation to be full, the dense model's included."""
    case = make_case()
    engine = case.tyr(0.5, "parameters")
    measure, make, counted = Divergence.__call__, Divergence.__post_init__, [0]

    def count(
        self: Divergence, candidates: Sequence[Candidate], rng: random.Random | None, num_tokens: int | None = None
    ) -> list[float]:
        counted[0] += len(candidates) * (6 * 32 if rng is None else num_tokens or 0)
        return measure(self, candidates, rng, num_tokens)

    def dense(self: Divergence) -> None:
        counted[0] += 6 * 32
        make(self)

    monkeypatch.setattr(Divergence, "__call__", count)
    monkeypatch.setattr(Divergence, "__post_init__", dense)
    list(engine.run())
    centres = [engine._centre(iteration) for iteration in (1, 2)]
    levels = [
        sum(count > 0 for own in grid(case.modules, centre, iteration) for count in own)
        for iteration, centre in enumerate(centres, start=1)
    ]
    spared = sum(MAX_STARTS - len(set(one.starts.values())) for one in engine.rounds)
    assert counted[0] == search_tokens(SETTINGS, 6 * 32, levels) - spared * 6 * 32


def test_operations_of_a_path() -> None:
    """Those of the matrix products, as torch counts them, and no more than as much again for what it does not count; cubic in
    the inputs and hardly more for more levels.
    """
    case = make_case()
    for module in case.modules[:2]:
        weight_OI = module.consumer.weight_OI
        counts = [0, module.num_groups // 2, module.num_groups]
        with FlopCounterMode(display=False) as counter:
            nested_path(weight_OI, torch.eye(weight_OI.shape[1]), group_size=module.group_size, counts=counts, chunk=1)
        assert counter.get_total_flops() / 2 <= path_flops(module, counts) <= 4 * counter.get_total_flops()
        levels = range(0, module.num_groups + 1, max(1, module.num_groups // 8))
        assert path_flops(module, levels) < 5 * path_flops(module, [module.num_groups])


def test_a_supernet_s_bytes_are_told_beforehand() -> None:
    """The report has what the formula gives for the shapes."""
    case = make_case(sparsity=0.25)
    engine = case.tyr(0.25, iterations=1, generations=0)
    list(engine.run())
    assert engine.rounds[0].supernet_bytes == level_bytes(case.racks) and engine.rounds[0].steps == {
        "attention of 16": 1, "ffn of 1": 16,
    }  # fmt: skip
