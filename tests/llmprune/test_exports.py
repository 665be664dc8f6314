"""Reports in other formats: what each holds, where they go, and that no text in them is markup or a formula."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from llmprune.errors import ConfigError, OutputError
from llmprune.io.exports import FORMATS, export_paths, export_report, read_report, sites_csv, summary_csv, to_csv
from llmprune.io.render import render_html, render_markdown
from llmprune.report import Report
from llmprune.structure import ModuleReport, StructureReport
from tests.llmprune.test_render import HOSTILE, bare_report, hostile_report
from tests.reports import sample_report

STRUCTURE = StructureReport(
    structure="structured", method="tyr", num_parameters_dense=1000, num_parameters=900, num_removable=400, num_removed=100,
    stock=True,
    modules=(ModuleReport(name="layers.0.mlp", block=0, unit="channel", num_groups=8, num_kept=6, parameters_per_group=12),),
)  # fmt: skip


def rows(text: str) -> list[dict[str, str]]:
    """A CSV as a spreadsheet reads it."""
    return list(csv.DictReader(io.StringIO(text)))


def test_every_format_of_one_report(tmp_path: Path) -> None:
    """Files by their endings, in a directory that is made; JSON comes back as the report; CSV has a summary beside it."""
    report = sample_report()
    for format in FORMATS:
        written = export_report(report, tmp_path / "new" / f"one.{format}")
        assert [path.name for path in written] == [f"one.{format}", *(["one-summary.csv"] if format == "csv" else [])]
        assert all(path.stat().st_size > 200 for path in written)
    assert read_report(tmp_path / "new" / "one.json") == report
    assert (tmp_path / "new" / "one.html").read_text() == render_html(report)


def test_csv_has_a_row_for_every_site() -> None:
    """Counts add up to the report's; what was not measured is empty."""
    report = sample_report(num_experts=3)
    table = rows(sites_csv(report))
    assert len(table) == report.num_sites > 20
    assert sum(int(row["zeros"]) for row in table) == report.num_zeros_model
    site = report.blocks[0].sites[0]
    assert table[0]["site"] == site.name and float(table[0]["sparsity"]) == site.sparsity
    assert table[0]["target"] == "0.5" and table[0]["pattern"] == "unstructured"
    assert {row["output_error"] for row in table if "experts" in row["site"]} == {""}


def test_csv_of_what_went_whole() -> None:
    """A row for every module, or for every block."""
    (row,) = rows(sites_csv(sample_report(structure=STRUCTURE, blocks=())))
    assert (row["unit"], row["groups"], row["kept"], row["sparsity"]) == ("channel", "8", "6", "0.25")
    blocks = STRUCTURE.model_copy(update={"structure": "blocks", "blocks_removed": (2,), "block_scores": (0.5, 0.25)})
    table = rows(sites_csv(sample_report(structure=blocks, blocks=())))
    assert [(row["removed"], row["score"]) for row in table] == [("0", "0.5"), ("0", "0.25"), ("1", ""), ("0", "")]


def test_summary_is_one_row() -> None:
    """The worst text in columns that every job has, and each text's own after them."""
    report = sample_report()
    (row,) = rows(summary_csv(report))
    assert row["text"] == "wikitext2" and float(row["perplexity_pruned"]) == 29.3103 and row["verdict"] == "degraded"
    assert float(row["perplexity_pruned c4"]) == 34.0052 and float(row["decode_tokens_per_second_pruned batch 1"]) == 45.6
    assert float(row["sparsity"]) == report.sparsity and row["recipe"] == "sparsegpt"
    (bare,) = rows(summary_csv(bare_report()))
    assert bare["text"] == bare["perplexity_pruned"] == "" and bare["verdict"] == "unmeasured"


def test_text_is_no_formula_in_a_spreadsheet() -> None:
    """What begins like one gets an apostrophe; numbers keep their sign."""
    text = to_csv([{"a": "=cmd|' /C calc'!A0", "b": "@x", "c": -0.5, "d": 'say "no", twice\nover'}])
    (row,) = rows(text)
    assert row == {"a": "'=cmd|' /C calc'!A0", "b": "'@x", "c": "-0.5", "d": 'say "no", twice\nover'}
    assert to_csv([]) == ""


@pytest.mark.parametrize("report", [sample_report(), bare_report(), sample_report(structure=STRUCTURE, blocks=())])
def test_markdown_has_the_numbers(report: Report) -> None:
    """Verdict, tables, and the command that does it again."""
    text = render_markdown(report)
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert "## Reproduce" in text and "llmprune prune Qwen/Qwen3-0.6B" in text
    assert "{{" not in text and "None" not in text and "\n\n\n\n" not in text
    for item in report.quality:
        assert f"{item.perplexity_pruned:.2f}" in html
    assert html.count("<table>") == 1 + bool(report.quality) + bool(report.latency) + bool(report.stages)


def test_hostile_text_is_inert() -> None:
    """In Markdown it is neither HTML nor a link nor a heading."""
    html = MarkdownIt("commonmark").enable("table").render(render_markdown(hostile_report()))
    assert "<script" not in html and "<a " not in html and html.count("<h1>") == 1
    assert rows(sites_csv(hostile_report()))[0]["site"] == HOSTILE


def test_where_exports_go(tmp_path: Path) -> None:
    """A format's name is a file beside the checkpoint; a path is itself."""
    out = tmp_path / "pruned"
    elsewhere = tmp_path / "results" / "a.csv"
    assert export_paths(("md", str(elsewhere)), out) == (tmp_path / "pruned-report.md", elsewhere)


@pytest.mark.parametrize(
    ("wanted", "error", "said"),
    [
        ("pdf", ConfigError, "md, html, json, csv"),
        ("report", ConfigError, "neither a format"),
        ("there.md", OutputError, "is a directory"),
        ("pruned/mine.csv", OutputError, "or give the format alone: csv"),
    ],
)
def test_exports_that_cannot_be_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, error: type[Exception], said: str
) -> None:
    """Before the job, with the remedy."""
    monkeypatch.chdir(tmp_path)
    Path("there.md").mkdir()
    with pytest.raises(error, match=said):
        export_paths((wanted,), Path("pruned"))


def test_what_cannot_be_read_or_written(tmp_path: Path) -> None:
    """No report, another file, and a directory that is a file: one line each."""
    with pytest.raises(ConfigError, match="holds no report"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text('{"model": "x"}')
    with pytest.raises(ConfigError, match="is not a report of llmprune"):
        read_report(tmp_path)
    with pytest.raises(OutputError, match="cannot be written"):
        export_report(sample_report(), tmp_path / "report.json" / "one.md")
