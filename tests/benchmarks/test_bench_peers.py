"""`make bench-peers` without the peer: ratios, bars both ways, tables, the judge, the meter, what the environment holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import peers_bars, peers_judge, peers_tables, peers_venv
from benchmarks.peers_bars import FROM_DISK, ONE_PASS, OURS, PEER, PRUNING, WHOLE, Cost, bars, change, ratio
from benchmarks.peers_cell import Meter
from llmprune.io.models import BUNDLED_PATH

MEBI = 2**20


def took(seconds: float, peak: float) -> dict[str, Any]:
    """A run whose pruning takes so long and so much; the rest takes a second a phase."""
    phase = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": 100 * MEBI, "end_bytes": 100 * MEBI}
    prune = {"seconds": seconds, "cpu_seconds": seconds / 2, "peak_bytes": peak * MEBI, "end_bytes": peak * MEBI}
    return {"import": phase, "load": phase, "prune": prune, "save": phase}


def contestant(times: list[float], peak: float, losses: list[float]) -> dict[str, Any]:
    """Of several runs; its checkpoint is half zeros."""
    quality = {"losses": losses, "kls": losses, "num_zeros": 50, "num_weights": 100}
    return {"runs": [took(seconds, peak) for seconds in times], "quality": quality}


def results_of(seconds: float, peak: int, loss: float) -> dict[str, Any]:
    """One cell of a random and one of a trained model, of ours with these numbers; the peer takes 10 s, 500 MiB, loss 3."""
    cell = {
        "threads": 1,
        "contestants": {
            PEER: contestant([9.0, 10.0, 40.0], 500, [2.9, 3.1]),
            OURS: contestant([seconds] * 3, peak, [loss - 0.1, loss + 0.1]),
            FROM_DISK: contestant([seconds] * 3, peak / 2, [loss - 0.1, loss + 0.1]),
            ONE_PASS: contestant([seconds / 2] * 3, peak, [loss - 0.1, loss + 0.1]),
        },
        "agreement": {"mean": 0.99, "first": 0.9999, "worst": 0.98, "distance": 1e-3},
    }
    about = {"samples": [16, 512], "losses": [2.0, 2.2]}
    return {
        "cells": {"random/wanda/50 %": cell, "demo/sparsegpt/2:4": cell},
        "models": {
            "random": {"about": "random weights, on random tokens", "is_trained": False, **about},
            "demo": {"about": "on text", "is_trained": True, **about},
        },
        "environment": {"device": "CPU (2 threads)"},
        "versions": {"llmcompressor": "1", "torch": "2", "transformers": "5"},
    }


def test_ratios_are_of_medians() -> None:
    """An outlier among the peer's runs changes nothing; the whole run adds its other phases."""
    cell = results_of(5.0, 250, 3.0)["cells"]["random/wanda/50 %"]
    assert ratio(cell, OURS, PRUNING, lambda cost: cost.wall) == pytest.approx(0.5)
    assert ratio(cell, OURS, PRUNING, lambda cost: cost.cpu) == pytest.approx(0.5)
    assert ratio(cell, OURS, WHOLE, lambda cost: cost.wall) == pytest.approx(8 / 13)
    assert ratio(cell, OURS, WHOLE, lambda cost: cost.peak) == pytest.approx(0.5)
    cost = Cost.of(cell["contestants"][PEER]["runs"], PRUNING)
    assert cost.wall == (10.0, 9.0, 40.0)
    assert cost.above[0] == 400 * MEBI


@pytest.mark.parametrize(
    ("numbers", "met"),
    [
        ((5.0, 300, 3.0), [True, True, True]),
        ((5.1, 300, 3.0), [False, True, True]),
        ((5.0, 301, 3.0), [True, False, True]),
        ((5.0, 300, 3.001), [True, True, False]),
    ],
)
def test_bars_both_ways(numbers: tuple[float, int, float], met: list[bool]) -> None:
    """Each limit is met on it and not past it."""
    found = bars(results_of(*numbers))
    assert len(found) == 9
    assert [bar.verdict == "met" for bar in found[:3]] == met
    assert [len(bar.checks) for bar in found[:3]] == [1, 1, 2]


def test_losses_are_compared_window_by_window() -> None:
    """The windows' own differences are no noise: a constant one is certain."""
    cell = results_of(5.0, 300, 3.01)["cells"]["demo/sparsegpt/2:4"]
    found = change(cell, OURS, "losses")
    assert found.mean == pytest.approx(0.01)
    assert found.error == pytest.approx(0, abs=1e-12)


def test_page_has_every_cell_and_the_readme_the_random_model() -> None:
    """From the results alone."""
    results = results_of(5.0, 250, 3.0)
    page = peers_tables.page(json.loads(json.dumps(results)))
    for part in (
        "## random",
        "## demo",
        f"wanda, 50 %: {PEER}",
        f"sparsegpt, 2:4: {ONE_PASS}",
        "10.0 (9.0 to 40.0)",
        "99.9900%",
    ):
        assert part in page, part
    assert page.count("perplexity no worse") >= 2
    table = peers_tables.readme_table(results)
    assert f"| random, wanda, 50 %: {OURS} | 0.50 | 0.50 | 0.62 | 0.50 | 0.38 |" in table and "demo" not in table
    assert peers_tables.readme_table({**results, "cells": {}}) == ""
    assert "wall x 0.50" in peers_tables.line(results["cells"]["random/wanda/50 %"])


def test_agreement_of_two_results() -> None:
    """Shares are of what both keep or both prune; the first block's distance is over its norm."""
    one = {"model.layers.0.q": torch.tensor([[3.0, 0.0], [4.0, 0.0]]), "model.layers.1.q": torch.tensor([[1.0, 0.0]])}
    other = {"model.layers.0.q": torch.tensor([[3.0, 0.0], [0.0, 3.0]]), "model.layers.1.q": torch.tensor([[2.0, 0.0]])}
    found = peers_judge.agreement(one, other)
    assert found == {"mean": 0.75, "first": 0.5, "worst": 0.5, "distance": pytest.approx(1.0)}


def test_judge_counts_zeros_and_finds_the_dense_model_unchanged(tmp_path: Path) -> None:
    """A copy with one matrix emptied has its zeros and another loss; the dense model itself diverges by nothing."""
    ids_NS = torch.arange(24).reshape(2, 12)
    judge = peers_judge.Judge(str(BUNDLED_PATH), ids_NS)
    same = judge.quality(BUNDLED_PATH)
    assert same["losses"] == pytest.approx(judge.losses) and same["kls"] == pytest.approx([0, 0], abs=1e-6)
    for file in BUNDLED_PATH.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights: dict[str, Tensor] = peers_judge.load_file(BUNDLED_PATH / "model.safetensors")
    emptied = f"{judge.sites[0]}.weight"
    save_file({**weights, emptied: torch.zeros_like(weights[emptied])}, tmp_path / "model.safetensors", {"format": "pt"})
    found = judge.quality(tmp_path)
    assert found["num_zeros"] - same["num_zeros"] == weights[emptied].numel() > 0
    assert found["kls"][0] > 1e-3


def test_meter_sees_a_phase_of_its_own() -> None:
    """A peak ends with its phase, where the system can start it anew."""
    meter = Meter()
    held = torch.ones(16 * MEBI)
    meter.end("large")
    del held
    meter.end("between")
    meter.end("small")
    assert set(meter.phases) == {"large", "between", "small"}
    assert meter.phases["large"]["peak_bytes"] - meter.phases["small"]["peak_bytes"] > 32 * MEBI
    assert 0 <= meter.phases["small"]["seconds"] < 5


def test_environment_has_the_peer_and_no_torch_of_its_own() -> None:
    """Torch is installed first, in this environment's version."""
    names = [need.partition(">")[0].partition("=")[0] for need in peers_venv.packages()]
    assert names[0] == "llmcompressor" and "transformers" in names and "torch" not in names
    assert peers_bars.WHOLE == ("import", "load", "prune", "save")
