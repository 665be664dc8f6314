"""`make bench-quality` without measuring: hashes, gaps, shares, verdicts both ways, tables, the plot, and going on."""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

import llmprune
from benchmarks import quality, quality_bars, quality_cell, quality_plot, quality_tables, quality_variants
from benchmarks.quality_results import Estimate, Results
from benchmarks.quality_variants import TARGETS, VARIANTS, Cell, Grid, Model, Variant
from llmprune.errors import ConfigError
from llmprune.methods import METHODS

DENSE = 10.0
DEMO = quality_variants.find_models(Path("/nowhere"))[0]
Gaps = dict[tuple[str, str], float]
"""Gaps by (variant, target)."""


def outcome(gap: float, *, seconds: float = 2.0) -> dict[str, Any]:
    """The result of a cell with this gap, the same on each of four windows but for a noise of its own size."""
    noise = [0.01 * gap, -0.01 * gap, 0.01 * gap, -0.01 * gap]
    return {
        "status": "ok", "perplexity_dense": DENSE, "perplexity": DENSE * math.exp(gap), "kl": gap / 2, "top1": 0.5,
        "seconds": seconds, "peak_bytes": 3 << 20, "sparsity": 0.6, "tokens": 2048, "where": "CPU (2 threads), torch 9",
        "differences": [gap + change for change in noise],
    }  # fmt: skip


def results_of(gaps: Gaps, *, model: Model = DEMO) -> Results:
    """Results of one model with these gaps."""
    results = Results({model.name: model})
    for (variant, target), gap in gaps.items():
        results.add(Cell(model, VARIANTS[variant], target), outcome(gap))
    return results


def test_this_version_can_do_every_variant() -> None:
    """And every method of the table is one."""
    quality_variants.QUALITY.check()
    assert set(METHODS) <= set(VARIANTS)


@pytest.mark.parametrize("fields", [{"method": "wandah"}, {"colour": "red"}, {"method": "wanda", "damping": 7}])
def test_a_variant_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    """By name, before anything is measured."""
    with pytest.raises(ConfigError, match="variant 'odd' at 50 %"):
        Grid.of(TARGETS, [Variant("odd", "score", fields)]).check()


def test_the_hash_is_of_every_setting() -> None:
    """Of the model, the target and the variant; neither the order of fields nor a default that is spelt out."""
    cell = Cell(DEMO, VARIANTS["wanda"], "60 %")
    turned = Model(DEMO.name, dict(reversed(DEMO.fields.items())), {})
    assert Cell(turned, VARIANTS["wanda"], "60 %").hash == cell.hash
    spelt = Variant("wanda", "score", {"method": "wanda", "reconstruct": False})
    assert Cell(DEMO, spelt, "60 %").hash == cell.hash
    others = [
        Cell(DEMO, VARIANTS["alps"], "60 %"),
        Cell(DEMO, VARIANTS["wanda"], "2:4"),
        Cell(Model(DEMO.name, {**DEMO.fields, "num_samples": 3}, {}), VARIANTS["wanda"], "60 %"),
        Cell(Model(DEMO.name, DEMO.fields, {"60 %": ["*.down_proj"]}), VARIANTS["wanda"], "60 %"),
    ]
    assert len({cell.hash, *(other.hash for other in others)}) == 5


def test_models_of_a_folder(tmp_path: Path) -> None:
    """Each with the length and the trust it needs, and a pattern that does not fit skips what it does not fit."""
    for name, changes in {
        "even": {},
        "odd": {"intermediate_size": 172, "auto_map": {}, "max_position_embeddings": 128},
    }.items():
        (tmp_path / "models" / name).mkdir(parents=True)
        config = {"intermediate_size": 512, "max_position_embeddings": 2048, **changes}
        (tmp_path / "models" / name / "config.json").write_text(json.dumps(config))
    demo, even, odd = quality_variants.find_models(tmp_path)
    assert (
        demo == DEMO
        and even.fields["seq_len"] == quality_variants.MAX_SEQ_LEN
        and "trust_remote_code" not in even.fields
        and not even.skip
    )
    assert odd.fields["seq_len"] == 128 and odd.fields["trust_remote_code"] and odd.skip == {"4:8": ["*.down_proj"]}
    assert Cell(odd, VARIANTS["wanda"], "4:8").fields["skip"] == ["*.down_proj"]
    assert "skip" not in Cell(odd, VARIANTS["wanda"], "2:4").fields


def test_gap_and_closed_share() -> None:
    """By hand: gaps of 0.4 and 0.1 nats, of which three quarters are closed; noise is paired."""
    results = results_of({("sparsegpt", "60 %"): 0.4, ("alps", "60 %"): 0.1, ("wanda", "60 %"): 0.6})
    gap, closed = results.gap("demo", "alps", "60 %"), results.closed("demo", "alps", "60 %")
    assert gap and closed
    assert gap.mean == pytest.approx(0.1) and closed.mean == pytest.approx(0.75)
    # The windows of both scatter together: +-0.001 and +-0.004, so +-0.003 apart; n - 1 = 3 and the root of 4 windows.
    assert closed.error == pytest.approx(0.003 * math.sqrt(4 / 3) / 2 / 0.4)
    worse, itself = results.closed("demo", "wanda", "60 %"), results.closed("demo", "sparsegpt", "60 %")
    assert worse and itself and worse.mean == pytest.approx(-0.5) and str(itself.mean) == "0.0"
    assert results.closed("demo", "magnitude", "60 %") is None and results.closed("demo", "alps", "2:4") is None


def test_noise_is_two_standard_errors() -> None:
    """Either way; an infinite loss is above none."""
    assert Estimate(-0.21, 0.1).is_below_zero and not Estimate(-0.19, 0.1).is_below_zero
    assert Estimate(0.21, 0.1).is_above_zero and not Estimate(0.19, 0.1).is_above_zero
    results = results_of({("sparsegpt", "60 %"): 0.4, ("random", "60 %"): 1.0})
    results.cells["demo/random/60 %"] |= {"perplexity": math.inf, "differences": [math.inf, 1.0, 1.0, 1.0]}
    change = results.change("demo", "random", "sparsegpt", "60 %")
    assert change and change.mean == math.inf and not change.is_below_zero


def bar(results: Results, word: str) -> quality_bars.Bar:
    """The one bar with this word."""
    (found,) = [bar for bar in quality_bars.bars(results) if word in bar.text]
    return found


BARS: dict[str, tuple[Gaps, tuple[str, str], float]] = {
    "preset": (
        {(name, target): gap for target in ("60 %", "2:4") for name, gap in (("sparsegpt", 0.4), ("best", 0.17))},
        ("best", "2:4"), 0.19,
    ),
    "ends below Wanda": (
        {(name, target): gap for target in ("50 %", "60 %", "2:4") for name, gap in (("wanda", 0.4), ("icbs", 0.3))},
        ("icbs", "50 %"), 0.41,
    ),
    "keeps falling": (
        {
            (name, target): gap
            for target in ("50 %", "60 %", "2:4")
            for name, gap in (("icbs-short", 0.4), ("icbs", 0.3))
        },
        ("icbs", "50 %"), 0.41,
    ),
    "Reconstruction": (
        {
            (method + tuned, target): gap
            for method in ("magnitude", "wanda", "sparsegpt")
            for target in TARGETS
            for tuned, gap in (("", 0.4), ("+reconstruct", 0.2))
        }
        | {(name, target): gap for target in ("60 %", "2:4") for name, gap in (("alps", 0.4), ("balanced", 0.2))},
        ("sparsegpt+reconstruct", "2:4"), 0.5,
    ),
    "dp and evolution": (
        {
            (method + allocation, "70 %"): gap
            for method in ("wanda", "sparsegpt")
            for allocation, gap in (("", 0.4), ("+dp", 0.3), ("+evolution", 0.2))
        },
        ("sparsegpt+dp", "70 %"), 0.4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("word", BARS)
def test_a_bar_is_met_and_not_met(word: str) -> None:
    """Met where every check is; one check that fails is enough, one that is missing leaves it open."""
    gaps, where, worse = BARS[word]
    met = bar(results_of(gaps), word)
    assert met.verdict == "met" and met.detail == f"{len(met.checks)} of {len(met.checks)}"
    broken = bar(results_of({**gaps, where: worse}), word)
    assert broken.verdict == "not met" and sum(check.is_met is False for check in broken.checks) == 1
    partial = bar(results_of({key: gap for key, gap in gaps.items() if key != where}), word)
    assert partial.verdict == ("met so far" if len(met.checks) > 1 else "not measured")
    assert "1 not measured" in partial.detail or "2 not measured" in partial.detail
    assert bar(results_of({}), word).verdict == "not measured"


def test_a_reconstruction_that_changes_nothing_is_no_harm() -> None:
    """But an allocation that does not, beats nothing."""
    gaps = dict.fromkeys(BARS["Reconstruction"][0], 0.4)
    assert bar(results_of(gaps), "Reconstruction").verdict == "met"
    gaps = {(method + more, "70 %"): 0.4 for method in ("wanda", "sparsegpt") for more in ("", "+dp")}
    assert bar(results_of(gaps), "dp and evolution").verdict == "not met"


def test_a_cell_measures_what_a_job_reports(tiny_model_dir: Path, text_file: Path, eval_file: Path) -> None:
    """The same perplexities and KL as llmprune.prune, and a difference for every window."""
    fields = {
        "model": str(tiny_model_dir), "calibration": str(text_file), "eval": str(eval_file), "num_samples": 4, "seq_len": 16,
        "max_eval_tokens": 160, "method": "sparsegpt", "pattern": "2:4", "device": "cpu",
    }  # fmt: skip
    measured = quality_cell.measure(fields)
    report = llmprune.prune(**fields, latency=False)
    quality = report.quality[0]
    assert quality.ratio and quality.ratio > 1
    assert measured["perplexity_dense"] == pytest.approx(quality.perplexity_dense, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(quality.perplexity_pruned, rel=1e-5)
    assert measured["kl"] == pytest.approx(quality.kl, rel=1e-4) and measured["top1"] == pytest.approx(quality.top1_agreement)
    assert measured["tokens"] == 160 and len(measured["differences"]) == 10
    assert sum(measured["differences"]) / 10 == pytest.approx(math.log(quality.ratio), abs=1e-4)
    assert measured["sparsity"] == 0.5 and measured["peak_bytes"] >= 0 and [*measured["stages"]] == ["prune"]


def test_stories_are_split_at_their_marker(tmp_path: Path) -> None:
    """Into documents without it; other files are left alone."""
    (tmp_path / "stories.txt").write_text("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n")
    (tmp_path / "plain.txt").write_text("Three.")
    made = quality_cell.split_stories(sorted(tmp_path.glob("*.txt")), tmp_path)
    assert [*made] == [str(tmp_path / "stories.txt")]
    lines = Path(made[str(tmp_path / "stories.txt")]).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "One."}, {"text": "Two."}]


def test_tables_of_a_few_results() -> None:
    """The page, the CSV and the plot hold what was measured, and what could not be."""
    results = results_of({("wanda", "60 %"): 0.6, ("sparsegpt", "60 %"): 0.4, ("alps", "60 %"): 0.1, ("alps", "2:4"): 0.2})
    results.add(Cell(DEMO, VARIANTS["random"], "60 %"), {"status": "failed", "error": "MemoryError: no | more"})
    results.add(Cell(DEMO, VARIANTS["magnitude"], "60 %"), {"status": "limit", "limit_seconds": 90.0})
    page = quality_tables.page(results)
    for line in (
        "| dense | 10.00 | 10.00 | 10.00 | 10.00 | 10.00 |  |  |",
        "| alps |  | 11.05 |  | 12.21 |  | 2.0 | 3 |",
        "| random |  | failed |  |  |  |  |  |",
        "| magnitude |  | > 1.5 min |  |  |  |  |  |",
        "| wanda |  | -50% ± 0% |  |  |  |",
        "| alps |  | 75% ± 0% |  |  |  |",
        "- demo, 60 %, random: MemoryError: no | more",
    ):
        assert line in page.splitlines()
    head, *lines = quality_tables.csv_text(results).splitlines()
    assert len(lines) == 6 and head.startswith("model,target,variant")
    assert "demo,60 %,random,weights alone,failed,,,,,,,,,,,,," in lines
    alps = dict(
        zip(head.split(","), next(line for line in lines if line.startswith("demo,60 %,alps")).split(","), strict=False)
    )
    assert alps["gap"] == "0.10000" and alps["closed"] == "0.75000" and alps["peak_mib"] == "3.0"


def test_plot_of_a_few_results() -> None:
    """Well-formed; every measured point is there with its name, and the front goes down."""
    gaps = {("wanda", "60 %"): 0.6, ("sparsegpt", "60 %"): 0.4, ("alps", "60 %"): 0.1, ("alps", "2:4"): 0.2}
    results = results_of(gaps)
    results.cells["demo/alps/60 %"]["seconds"] = 9.0
    svg = ElementTree.fromstring(quality_plot.svg(results))
    titles = [title.text for title in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert "alps: gap 0.1000, 9.0 s" in titles and len(titles) == 1 + 4
    front = quality_plot.front(quality_plot.points(results, "demo", "60 %"))
    assert [point.name for point in front] == ["sparsegpt", "alps"]
    assert "not measured" in quality_plot.svg(Results({"demo": DEMO}))


def test_readme_table_is_whole_or_not_there() -> None:
    """A run of a few cells leaves the README as it is."""
    names = [name for name in quality_tables.README_VARIANTS if name in VARIANTS]
    gaps = {(name, target): 0.2 for name in names for target in quality_tables.README_TARGETS}
    table = quality_tables.readme_table(results_of(gaps))
    assert "| dense | 10.00 | 10.00 |" in table and "| sparsegpt | 12.21 | 12.21 | 0% | 2 s |" in table
    del gaps["wanda", "2:4"]
    assert quality_tables.readme_table(results_of(gaps)) == ""


def test_results_survive_the_file(tmp_path: Path) -> None:
    """A line a cell; results of other settings are counted and left out."""
    results = results_of({("wanda", "60 %"): 0.6, ("alps", "60 %"): 0.1})
    results.cells["demo/alps/60 %"]["perplexity"] = math.inf
    results.write(tmp_path / "quality.json")
    again = Results.read(tmp_path / "quality.json")
    assert again == results and len((tmp_path / "quality.json").read_text().splitlines()) == 5
    again.cells["demo/wanda/60 %"]["hash"] = "other"
    assert again.num_stale == 1 and again.measured("demo", "wanda", "60 %") is None
    assert Results.read(tmp_path / "none.json") == Results()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[bool, list[str], str]]:
    """Run the benchmark with made-up cells; whether it failed, which cells it measured, and what it printed."""
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "quality.json")
    monkeypatch.setattr(quality, "DOCS", tmp_path)
    monkeypatch.setenv("LLMPRUNE_BENCH_DATA", str(tmp_path / "none"))

    def run(*arguments: str, **outcomes: dict[str, Any]) -> tuple[bool, list[str], str]:
        measured = []

        def run_cell(cell: Cell, *, jobs: int, limit_seconds: float) -> dict[str, Any]:
            assert jobs == 1 and limit_seconds > 0
            measured.append(cell.key)
            return {**outcomes.get(cell.variant.name, outcome(0.3)), "wall_seconds": 1.0}

        monkeypatch.setattr(quality, "run_cell", run_cell)
        parser = argparse.ArgumentParser()
        quality.add_options(parser)
        printed = io.StringIO()
        has_failed = quality.run(Console(file=printed, width=200), parser.parse_args(arguments))
        return has_failed, measured, printed.getvalue()

    return run


def test_a_run_goes_on_where_it_was(bench: Callable[..., Any], tmp_path: Path) -> None:
    """What has a result is not measured again, unless asked for; what failed is."""
    few = ("--targets", "60%,2:4", "--variants", "wanda,alps")
    failed = {"status": "failed", "error": "no"}
    has_failed, measured, printed = bench(*few, "--variants", "wanda,alps", wanda=failed)
    assert has_failed and len(measured) == 4 and "FAILED: demo/wanda/60 %, demo/wanda/2:4" in printed
    assert "only the demo model" in printed and "[4/4]" in printed and "to go" in printed
    assert bench(*few)[:2] == (False, ["demo/wanda/60 %", "demo/wanda/2:4"])
    assert bench(*few)[:2] == (False, [])
    assert len(bench(*few, "--fresh")[1]) == 4
    page = (tmp_path / "quality.md").read_text()
    (tmp_path / "quality.md").unlink()
    assert bench("--tables")[:2] == (False, []) and (tmp_path / "quality.md").read_text() == page
    assert {"quality.csv", "quality.svg"} < {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise ValueError('no /data/models/one')\n", "ValueError: no models/one"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("import sys; sys.exit(3)", "exit code 3"),
    ],
)
def test_a_failed_cell_says_why(code: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The exception it ended with, without the folder of the data, or the signal that ended it."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "quality_cell.py").write_text(code)
    monkeypatch.setenv("LLMPRUNE_BENCH_DATA", "/data")
    monkeypatch.setattr(quality, "ROOT", tmp_path)
    result = quality.run_cell(Cell(DEMO, VARIANTS["wanda"], "60 %"), jobs=1, limit_seconds=240)
    assert result["status"] == "failed" and result["error"] == says


def test_a_cell_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At its limit, which is what its result says."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "quality_cell.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(quality, "ROOT", tmp_path)
    result = quality.run_cell(Cell(DEMO, VARIANTS["wanda"], "60 %"), jobs=1, limit_seconds=0.3)
    assert (result["status"], result["limit_seconds"]) == ("limit", 0.3)


def test_a_cell_past_its_limit_is_tried_again_with_more_time(bench: Callable[..., Any]) -> None:
    """And only then; it is no failure."""
    few = ("--targets", "60%", "--variants", "alps")
    late = {"status": "limit", "limit_seconds": 60.0}
    has_failed, measured, printed = bench(*few, "--limit", "1", alps=late)
    assert not has_failed and len(measured) == 1 and "not done after 60 s" in printed
    assert bench(*few, "--limit", "1")[1] == [] and len(bench(*few, "--limit", "2")[1]) == 1


@pytest.mark.parametrize("flag", ["--models", "--variants", "--targets"])
def test_an_unknown_name_is_refused(flag: str, bench: Callable[..., Any]) -> None:
    """With those that are known."""
    with pytest.raises(SystemExit, match=f"{flag}: sparse unknown; known are "):
        bench(flag, "sparse")
