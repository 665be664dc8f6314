"""Sweeps: many jobs in one directory that share what they can, go on where they stopped, and grow; and comparisons."""

from __future__ import annotations

import csv
import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import llmprune
import tiny
from llmprune.anatomy.blocks import Call
from llmprune.errors import ConfigError, OutOfMemory, OutputError, ResumeRefused
from llmprune.events import BlockFinished, PointFinished, PointStarted, Progress, StageStarted, Swept
from llmprune.job import Job
from llmprune.report import Report
from llmprune.sweep_report import SweepReport
from llmprune.sweep_spec import SweepConfig

Fields = dict[str, Any]
NAMES = ["wanda-0.4", "wanda-0.6", "wanda-2-4", "sparsegpt-0.4", "sparsegpt-0.6", "sparsegpt-2-4"]
AXES: Fields = {"methods": ("wanda", "sparsegpt"), "sparsities": (0.4, 0.6), "patterns": ("unstructured", "2:4")}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of the test's own."""
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def texts(text_file: Path, eval_file: Path) -> Fields:
    """Overrides of a quick job."""
    return {"calibration": str(text_file), "eval": (str(eval_file),), **tiny.QUICK, "batch_size": 2}


@pytest.fixture(scope="module")
def swept(tiny_model_dir: Path, texts: Fields, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], int]:
    """A sweep of six points: its directory, its events and how often a block ran on calibration text; read only."""
    out, calls = tmp_path_factory.mktemp("sweep") / "out", []
    run = Call.run

    def counted(self: Call, *arguments: Any) -> Any:
        calls.append(1)
        return run(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMPRUNE_CACHE", str(out.parent / "cache"))
        patch.setattr(Call, "run", counted)
        events = list(llmprune.sweep_iter(tiny_model_dir, out=out, **AXES, **texts))
    return out, events, len(calls)


def test_every_point_is_an_ordinary_job(swept: tuple[Path, list[Any], int], tiny_model_dir: Path, texts: Fields) -> None:
    """With checkpoint and report, in the order of the grid, and the same bytes as the job alone."""
    out, events, _ = swept
    last = events[-1]
    assert isinstance(last, Swept) and [point.name for point in last.sweep.points] == NAMES
    assert all(point.status == "done" and point.kept for point in last.sweep.points)
    for name in NAMES:
        report = llmprune.read_report(out / name)
        assert report.out == str(out / name) and (out / name / "model.safetensors").is_file()
    alone = out.parent / "alone"
    llmprune.prune(tiny_model_dir, out=alone, method="sparsegpt", sparsity=0.6, sequential="none", **texts)
    same = (out / "sparsegpt-0.6" / "model.safetensors").read_bytes()
    assert same == (alone / "model.safetensors").read_bytes()
    assert llmprune.read_report(alone).quality[0].perplexity_pruned == last.sweep.points[4].values["perplexity"]


def test_points_share_statistics_and_the_dense_measurements(swept: tuple[Path, list[Any], int]) -> None:
    """Two batches through two blocks once, and one measurement of the dense model, for six jobs."""
    _, events, calls = swept
    assert calls == 2 * 2
    dense = [event.resumed_at for event in events if isinstance(event, StageStarted) and event.stage == "dense"]
    assert len(dense) == 6 and dense[0] == 0 and all(dense[1:])
    started = [event for event in events if isinstance(event, PointStarted)]
    assert [event.index for event in started] == list(range(6)) and {event.total for event in started} == {6}
    assert not any(event.reused for event in events if isinstance(event, PointFinished))


def test_results_are_one_table_one_plot_and_one_csv(swept: tuple[Path, list[Any], int]) -> None:
    """The same points in all of them; the front is marked; links lead to the reports."""
    out, events, _ = swept
    report = events[-1].sweep
    assert SweepReport.model_validate_json((out / "sweep.json").read_bytes()) == report
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == NAMES
    assert [row["front"] == "1" for row in rows] == [point.on_front for point in report.points]
    assert any(point.on_front for point in report.points) and not all(point.on_front for point in report.points)
    assert float(rows[0]["perplexity"]) == report.points[0].values["perplexity"]
    assert {row["config.method"] for row in rows} == {"wanda", "sparsegpt"}
    assert (out / "sweep.md").read_text().count("\n") == 8
    svg = ElementTree.fromstring((out / "sweep.svg").read_text())
    assert sum("point" in (path.get("class") or "").split() for path in svg.iter("{http://www.w3.org/2000/svg}path")) == 6
    page = (out / "sweep.html").read_text()
    HTMLParser().feed(page)
    for name in NAMES:
        assert f'href="{name}/report.html"' in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


def test_a_sweep_goes_on_and_grows(
    swept: tuple[Path, list[Any], int], tiny_model_dir: Path, texts: Fields, tmp_path: Path
) -> None:
    """Finished points are not done again, one whose report is gone is, and new ones join the table."""
    out = tmp_path / "grown"
    shutil.copytree(swept[0], out)
    shutil.rmtree(out / "wanda-0.6")
    events = list(llmprune.sweep_iter(tiny_model_dir, out=out, **AXES, **texts))
    done = {event.point.name: event.reused for event in events if isinstance(event, PointFinished)}
    assert done == {name: name != "wanda-0.6" for name in NAMES}
    report = llmprune.sweep(tiny_model_dir, out=out, methods="wanda", sparsities=0.5, keep="best", **texts)
    assert [point.name for point in report.points] == [*NAMES, "wanda-0.5"]
    kept = {point.name for point in report.points if point.kept}
    assert kept == {point.name for point in report.points if point.on_front} and len(kept) < 7
    for point in report.points:
        assert (out / point.name / "report.json").is_file()
        assert (out / point.name / "model.safetensors").is_file() == (point.name in kept)
    with pytest.raises(ResumeRefused, match=r"config.num_samples = 4, not 8"):
        llmprune.sweep(tiny_model_dir, out=out, methods="wanda", **{**texts, "num_samples": 8})


def test_an_interrupted_point_goes_on_by_its_journal(tiny_model_dir: Path, texts: Fields, tmp_path: Path) -> None:
    """Closed after its first block, the second call begins at the second."""
    out = tmp_path / "out"
    run = llmprune.sweep_iter(tiny_model_dir, out=out, sparsities=(0.5,), **texts)
    next(event for event in run if isinstance(event, BlockFinished))
    run.close()  # type: ignore[attr-defined]
    assert (out / "wanda-0.5.work" / "run.json").is_file()
    events = list(llmprune.sweep_iter(tiny_model_dir, out=out, sparsities=(0.5,), keep="none", **texts))
    (start,) = [event for event in events if isinstance(event, StageStarted) and event.stage == "prune"]
    assert start.resumed_at == 1
    assert sorted(file.name for file in (out / "wanda-0.5").iterdir()) == ["README.md", "report.html", "report.json"]
    again = llmprune.sweep(tiny_model_dir, out=out, sparsities=(0.5,), keep="none", **texts)
    assert again.points[0].status == "done" and not again.points[0].kept


def test_a_point_that_fails_does_not_end_the_sweep(
    cli: Callable[..., Any], tiny_model_dir: Path, texts: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is reported, the exit code says so, and the next call tries it again."""
    run = Job.run

    def fails(self: Job) -> Iterator[Any]:
        if self.config.sparsity == 0.6:
            yield Progress(stage="load", done=0, total=1)
            raise OutOfMemory("no memory for <b>this</b>.")
        yield from run(self)

    monkeypatch.setattr(Job, "run", fails)
    options = ("--calibration", texts["calibration"], "--eval", texts["eval"][0], "--num-samples", 4, "--seq-len", 32,
               "--max-eval-tokens", 512, "--no-latency")  # fmt: skip
    command = ("sweep", tiny_model_dir, "--sparsities", "60%,0.5", "--out", tmp_path / "out", *options)
    outcome = cli(*command)
    assert outcome.code == 1 and "1 of 2 points failed" in outcome.err
    assert "wanda-0.6: failed: no memory for <b>this</b>" in outcome.out and "wanda-0.5" in outcome.out
    assert "&lt;b&gt;this" in (tmp_path / "out" / "sweep.html").read_text()
    monkeypatch.undo()
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    outcome = cli(*command, "--json")
    assert outcome.code == 0
    assert {point["status"] for point in json.loads(outcome.out)["points"]} == {"done"}


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({}, ConfigError, "a sweep of nothing"),
        ({"methods": ("wanda", "wandas")}, ConfigError, "Did you mean 'wanda'"),
        ({"methods": "wanda", "sparsities": (0.1, 0.2, 0.3), "max_points": 2}, ConfigError, "3 points, more than 2"),
        ({"sparsity": 0.5, "methods": "wanda"}, ConfigError, "sparsity is an axis of a sweep: give its values as sparsities"),
        ({"methods": "wanda", "keep": "some"}, ConfigError, "keep 'some' is unknown"),
        ({"methods": "wanda", "keep": "best", "eval": ()}, ConfigError, "keep 'best' needs a perplexity"),
        ({"methods": "wanda", "model": "/nowhere"}, llmprune.UserError, "nowhere"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_a_sweep_refuses(
    fields: Fields, error: type[Exception], words: str, tiny_model_dir: Path, texts: Fields, tmp_path: Path
) -> None:
    """Before any point where that can be known; a model that is not there ends them all."""
    fields = {"model": tiny_model_dir, **texts, **fields}
    with pytest.raises(error, match=words):
        llmprune.sweep(out=tmp_path / "out", **fields)


def test_a_directory_of_something_else_is_refused(tiny_model_dir: Path, texts: Fields, tmp_path: Path) -> None:
    """Nothing is written among other files."""
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="not empty"):
        llmprune.sweep(tiny_model_dir, out=tmp_path, methods="wanda", **texts)
    config = SweepConfig.build(llmprune.PruneConfig.build(None, model=str(tiny_model_dir), **texts), methods="wanda")
    with pytest.raises(OutputError, match="not empty"):
        llmprune.sweep(config=config, out=tmp_path)


def test_checkpoints_are_compared(swept: tuple[Path, list[Any], int], cli: Callable[..., Any], tmp_path: Path) -> None:
    """By their reports, in every format; a sweep stands for its points, and the front is the sweep's."""
    out, events, _ = swept
    result = llmprune.compare(out)
    expected = {point.name: point.on_front for point in events[-1].sweep.points}
    assert {point.name: point.on_front for point in result.points} == expected and result.differing
    two = llmprune.compare(out / "wanda-0.4", out / "sparsegpt-0.4", x="bytes", y="kl")
    assert (two.x, two.y, two.differing) == ("bytes", "kl", ("method",))
    page = tmp_path / "pages" / "two.html"
    outcome = cli("compare", out / "wanda-0.4", out / "sparsegpt-0.4", "--out", page)
    assert outcome.code == 0 and "wanda-0.4" in outcome.out and "\N{BLACK STAR} sparsegpt-0.4" in outcome.out
    assert "report.html" in page.read_text() and "<svg" in page.read_text()
    for format, sign in (("md", "| :---: |"), ("csv", "name,status,front"), ("json", '"points"'), ("html", "<!DOCTYPE html>")):
        outcome = cli("compare", out / "wanda-0.4", out / "sparsegpt-0.4", "--format", format)
        assert outcome.code == 0 and sign in outcome.out, format


def test_names_and_notes_of_a_comparison(swept: tuple[Path, list[Any], int], tmp_path: Path) -> None:
    """Equal last parts are told apart by what is before them; other texts and other models are told."""
    for name in ("a", "b"):
        shutil.copytree(swept[0] / "wanda-0.4", tmp_path / name / "pruned")
    report = json.loads((tmp_path / "b" / "pruned" / "report.json").read_text())
    report["config"]["model"], report["quality"][0]["text"]["sha256"] = "<i>other</i>", "0"
    Report.model_validate(report)
    (tmp_path / "b" / "pruned" / "report.json").write_text(json.dumps(report))
    result = llmprune.compare(tmp_path / "a" / "pruned", tmp_path / "b" / "pruned")
    assert [point.name for point in result.points] == ["a/pruned", "b/pruned"]
    assert "2 different texts" in result.notes[0] and "not all made from the same model" in result.notes[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{tmp}/nowhere",), "nowhere holds no report"),
        (("{tmp}",), "holds no report"),
        (("{out}/wanda-0.4", "{out}/wanda-0.4"), "is given twice"),
        (("{out}/wanda-0.4", "--x", "colour"), "axis 'colour' is unknown"),
        (("{out}/wanda-0.4", "--format", "pdf"), "--format 'pdf' is unknown"),
        (("{out}/wanda-0.4", "--out", "{out}"), "cannot be written"),
    ],
)
def test_what_a_comparison_refuses(
    arguments: tuple[str, ...], words: str, swept: tuple[Path, list[Any], int], cli: Callable[..., Any], tmp_path: Path
) -> None:
    """One line with the remedy, exit code 2."""
    outcome = cli("compare", *(word.format(tmp=tmp_path, out=swept[0]) for word in arguments))
    assert outcome.code == 2 and words in " ".join(outcome.err.split())
