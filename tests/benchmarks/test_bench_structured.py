"""`make bench-structured` without a search: its grid, bars both ways, tables, and a model whose time falls."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from benchmarks import quality, quality_cell, structured, structured_bars, structured_cell, structured_speed, structured_tables
from benchmarks.quality_bars import Bar
from benchmarks.quality_results import Results
from benchmarks.quality_variants import Cell
from benchmarks.structured_variants import BLOCKS, GRID, RIVALS, SHARES, STANDARD, models

DEMO = models(Path("/nowhere"))[0]


def outcome(kl: float, **sizes: Any) -> dict[str, Any]:
    """The result of a cell with this KL and a gap of twice that."""
    iterations = [
        {"curve": [[0, 0.4], [3, 0.3]], "generation_seconds": 3.0, "num_generations": 20, "supernet_bytes": 1 << 20},
        {"curve": [[0, 0.3], [2, 0.25]], "generation_seconds": 1.0, "num_generations": 20, "supernet_bytes": 3 << 19},
    ]
    return {
        "status": "ok", "perplexity_dense": 10.0, "perplexity": 10.0 * math.exp(2 * kl), "kl": kl, "top1": 0.9,
        "seconds": 9.0, "peak_bytes": 3 << 20, "sparsity": 0.25, "tokens": 512, "where": "CPU (1 threads), torch 9",
        "differences": [2 * kl] * 4, "busy": 0.5,
        "plan": {"generation_tokens": 1000, "forward_seconds": 5e-4, "supernet_bytes": [1 << 20, 1 << 20]},
        "structure": {
            "num_removed": 250, "num_removable": 1000, "num_parameters": 1750, "num_parameters_dense": 2000, "stock": False,
            "kv_bytes": 30, "kv_bytes_dense": 40, "blocks_removed": [], "iterations": iterations, **sizes,
        },
    }  # fmt: skip


def searched(curve: list[list[float]]) -> dict[str, Any]:
    """The result of a cell with one iteration of this curve."""
    first = {**outcome(0.1)["structure"]["iterations"][0], "curve": curve}
    return outcome(0.1, iterations=[first]) | {"plan": {**outcome(0.1)["plan"], "supernet_bytes": [1 << 20]}}


def results_of(**changes: dict[str, Any]) -> Results:
    """The demo model under everything that the first bar compares, changed by "variant/share"."""
    results = Results({DEMO.name: DEMO}, grid=GRID)
    for share in SHARES:
        for name in (*RIVALS, STANDARD):
            results.add(Cell(DEMO, GRID.variants[name], share, GRID), outcome(0.1 if name == STANDARD else 0.2))
    for place, change in changes.items():
        results.cells[f"{DEMO.name}/{place}"] = {**results.cells[f"{DEMO.name}/{place}"], **change}
    return results


def timing_of(seconds: float, blocks: int = structured_bars.LARGE) -> dict[str, Any]:
    """One model, half of whose blocks went, and the time of a prefill against one second of the dense model."""
    row = {"model": "random", "phase": "prefill", "batch_size": 1, "num_tokens": 512, "repeats": 9}
    dense = {"cut": "dense", "seconds": 1.0, "quartiles": [0.9, 1.1], "block_parameters": blocks, "num_parameters": 2 * blocks}
    half = {"block_parameters": blocks // 2, "num_parameters": 3 * blocks // 2}
    cut = {"cut": "free, 50%", "seconds": seconds, "quartiles": [seconds - 0.1, seconds + 0.1], **half}
    return {"rows": [{**row, **dense}, {**row, **cut}], "environment": {"device": "CPU", "num_threads": 1, "torch": "9"}}


def bar(results: Results, timing: dict[str, Any], word: str) -> Bar:
    """The one bar with this word."""
    (found,) = [bar for bar in structured_bars.bars(results, timing) if word in bar.text]
    return found


def test_this_version_can_do_every_variant() -> None:
    """And every one of the first bar is there."""
    GRID.check()
    assert {*RIVALS, STANDARD} < set(GRID.variants) and {cell.target for cell in GRID.cells([DEMO])} == set(GRID.targets)


def test_a_model_of_few_blocks_loses_none_whole(tmp_path: Path) -> None:
    """It has no cells there, and all others."""
    for name, num_blocks in {"few": 2, "some": 4}.items():
        (tmp_path / "models" / name).mkdir(parents=True)
        config = {"intermediate_size": 172, "max_position_embeddings": 512, "num_hidden_layers": num_blocks}
        (tmp_path / "models" / name / "config.json").write_text(json.dumps(config))
    demo, few, some = models(tmp_path)
    assert demo == DEMO and len(GRID.cells([some])) == len(GRID.cells([demo])) == len(GRID.cells([few])) + 3
    assert {cell.target for cell in GRID.cells([few])} == set(GRID.targets) - {BLOCKS}


@pytest.mark.parametrize(
    ("word", "place", "change"),
    [
        ("beats", "flap/25 %", {"kl": 0.09}),
        ("beats", "flap/25 %", {"perplexity": 10.1}),
        ("falls and never", f"{STANDARD}/25 %", searched([[0, 0.4], [1, 0.41], [2, 0.3]])),
        ("falls and never", f"{STANDARD}/25 %", searched([[0, 0.4]])),
        ("formula", f"{STANDARD}/12.5 %", {"plan": {**outcome(0.1)["plan"], "forward_seconds": 2.1e-3}}),
        ("formula", f"{STANDARD}/12.5 %", {"plan": {**outcome(0.1)["plan"], "supernet_bytes": [1 << 19, 1 << 20]}}),
    ],
)
def test_a_bar_is_met_and_not_met(word: str, place: str, change: dict[str, Any]) -> None:
    """Met where every check is; one check that fails is enough."""
    assert bar(results_of(), timing_of(0.5), word).verdict == "met"
    key = f"{DEMO.name}/{place}"
    broken = results_of(**{place: {**change, "hash": results_of().cells[key]["hash"]}})
    found = bar(broken, timing_of(0.5), word)
    assert found.verdict == "not met" and sum(check.is_met is False for check in found.checks) == 1


def test_a_rival_that_removed_more_is_held_against_a_search_that_did() -> None:
    """The least that removed as many; one that removed far more may win, and that it does not says nothing."""
    results = results_of(**{"magnitude/12.5 %": {"structure": {"num_removed": 255, "num_removable": 1000}}})
    assert bar(results, {}, "beats").verdict == "met so far"
    for share, kl, number, verdict in (
        ("26 %", 0.3, 300, "met so far"), ("26 %", 0.15, 300, "met"), ("14 %", 0.3, 260, "not met"), ("14 %", 0.15, 260, "met")
    ):  # fmt: skip
        results.add(Cell(DEMO, GRID.variants[STANDARD], share, GRID), outcome(kl, num_removed=number))
        assert bar(results, {}, "beats").verdict == verdict


def test_time_in_proportion() -> None:
    """Four fifths of the share of the parameters is enough, less is not; a model of small matrices is not judged."""
    assert bar(results_of(), timing_of(0.6), "time of a sliced").verdict == "met"
    assert bar(results_of(), timing_of(0.61), "time of a sliced").verdict == "not met"
    assert bar(results_of(), timing_of(1.0, 1000), "time of a sliced").verdict == "not measured"
    assert {bar.verdict for bar in structured_bars.bars(Results(grid=GRID), {})} == {"not measured"}


def test_tables_of_a_few_results() -> None:
    """The page and the CSV hold what was measured, the cost of a search as a mean over its generations among them."""
    results = results_of()
    removed = outcome(0.3, blocks_removed=[2, 4])
    results.add(Cell(DEMO, GRID.variants["shortgpt"], BLOCKS, GRID), removed)
    results.add(Cell(DEMO, GRID.variants["flap-uniform"], "25 %", GRID), {"status": "limit", "limit_seconds": 90.0})
    lines = structured_tables.page(results, timing_of(0.6)).splitlines()
    for line in (
        "| dense |  |  |  | 10.00 |  |  |  |  |  |",
        "| flap | 25.00% | 87.5% | 75% | 14.92 | 0.4000 ± 0.0000 | 0.2000 | 90.0% | 9.0 | 3 |",
        "| flap-uniform |  |  |  | > 1.5 min |  |  |  |  |  |",
        "| shortgpt (blocks 2, 4) | 25.00% | 87.5% | 75% | 18.22 | 0.6000 ± 0.0000 | 0.3000 | 90.0% | 9.0 | 3 |",
        f"| demo, 25 %, {STANDARD} | 0.4000 to 0.3000; 0.3000 to 0.2500 | 0.1000 | 1.00 | 0.50 | 2.00 | 1.5 | 1.00, 1.50 |",
        "| random: free, 50% | prefill of 512 tokens | x 0.50 | x 0.60 | 0.50 to 0.70 | 80% |",
    ):
        assert line in lines
    head, *rows = structured_tables.csv_text(results).splitlines()
    assert len(rows) == 10 and rows[0].startswith("demo,12.5 %,magnitude,baseline,ok,0.250000,2000,1750,40,30,False,10.0")
    assert "demo,25 %,flap-uniform,uniform,limit" + "," * 16 in rows and len(head.split(",")) == 21


def test_documents_are_written_from_results_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All three, the plot well-formed, also where no time was measured."""
    monkeypatch.setattr(structured, "SPEED", tmp_path / "none.json")
    texts = structured.documents(results_of())
    assert {*texts} == {"structured_results.csv", "structured_results.md", "structured_results.svg"}
    titles = list(ElementTree.fromstring(texts["structured_results.svg"]).iter("{http://www.w3.org/2000/svg}title"))
    assert len(titles) == 1 + 2 * (len(RIVALS) + 1) and "Time of sliced" not in texts["structured_results.md"]


def test_time_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where all is measured and there is no result, or a fresh one is asked for; never for tables alone or a part."""
    measured: list[str] = []

    def measure_speed() -> None:
        measured.append(arguments)
        (tmp_path / "speed.json").write_text(json.dumps(timing_of(0.6)))

    monkeypatch.setattr(structured, "SPEED", tmp_path / "speed.json")
    monkeypatch.setattr(structured, "measure_speed", measure_speed)
    monkeypatch.setattr(structured, "run_suite", lambda *_: False)
    for arguments in ("--tables", "--models demo", "", "--targets 25%", "", "--fresh --tables", "--fresh"):
        parser = argparse.ArgumentParser()
        quality.add_options(parser)
        assert not structured.run(Console(), parser.parse_args(arguments.split()))
    assert measured == ["", "--fresh"]
    assert "Time of sliced" in structured.documents(results_of())["structured_results.md"]


def test_a_cell_keeps_sizes_and_the_plan(tiny_model_dir: Path, text_file: Path, eval_file: Path) -> None:
    """Of a search that is hardly one; the first supernet has the bytes that the plan says."""
    fields = {
        "model": str(tiny_model_dir), "calibration": str(text_file), "eval": str(eval_file), "num_samples": 4, "seq_len": 16,
        "max_eval_tokens": 160, "device": "cpu", "dtype": "float32", "pattern": "structured", "method": "tyr", "sparsity": 0.25,
        "budget": "parameters", "tyr_generations": 1, "tyr_offspring": 2,
    }  # fmt: skip
    found = quality_cell.measure(fields)
    sizes, plan = found["structure"], found["plan"]
    assert sizes["num_removed"] >= 0.25 * sizes["num_removable"] and sum(sizes["kept"]) > 0
    assert sizes["num_parameters"] == sizes["num_parameters_dense"] - sizes["num_removed"]
    assert sizes["iterations"][0]["supernet_bytes"] == plan["supernet_bytes"][0] and len(plan["supernet_bytes"]) == 2
    # Two candidates on all 64 calibration tokens, which are fewer than the first stage has.
    assert plan["generation_tokens"] == 2 * 64 and plan["forward_seconds"] > 0 and 0 < found["busy"] < 64
    assert "differences" in found and structured_cell.found.__doc__


def test_sliced_models_that_are_timed() -> None:
    """Their blocks have about the share that is left, with the same widths in every layer or not."""
    dense = structured_speed.random_llama(64, 192, 4, 8)
    for widths, sparsity in structured_speed.CUTS:
        cut = structured_speed.sliced(dense, widths, sparsity)
        left = structured_speed.block_parameters(cut) / structured_speed.block_parameters(dense)
        assert left == pytest.approx(1 - sparsity, abs=0.07)
        shapes = {block.mlp.down_proj.weight.shape for block in cut.model.layers}
        assert len(shapes) == (1 if widths == "uniform" else 4)
        assert cut(torch.zeros(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 512)
