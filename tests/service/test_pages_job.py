"""The page of one job: its stages and curves while it runs, its plots and numbers afterwards."""

from __future__ import annotations

import re

import sqlalchemy as sa
from pages_kit import EVIL, Pages, begin, succeed

from llmprune.continuations import Continuations, Continued
from llmprune.task_report import TaskReport, TaskScore
from llmprune_service import tables
from reports import sample_report


def test_stages_are_bars_and_what_they_bring_down_is_a_curve(pages: Pages) -> None:
    """Ended stages with their time, the current one with its steps; a point for each value, those without one left out."""
    execution = begin(pages.jobs, pages.submit())
    for stage in ("load", "prune"):
        execution.say("job.metric", {"name": "stage", "stage": stage, "seconds": 65.0})
    for done, value in ((1, 3.5), (2, 3.25), (3, None), (3, "x"), (3, 3.0)):
        facts = {"stage": "refine", "done": done, "total": 8, "detail": ""} | ({} if value is None else {"value": value})
        progress = {"stage": "refine", "done": done, "total": 8, "began": 0, "resumed_at": 0}
        execution.say("job.progress", facts, progress=progress)
    execution.flush()
    text = pages.get(f"/ui/jobs/{execution.job.id}")
    stages = re.findall(r'<li><span>([^<]+)</span> <progress[^>]*></progress> <span class="muted">([^<]+)<', text)
    took = "1 min 05 s"
    assert stages == [("Loading model", took), ("Pruning blocks", took), ("Refining the mask", "3 of 8 (38 %)")]
    assert re.findall(r'<progress id="stage" max="(\d)" value="(\d)"', text) == [("8", "3")]
    assert re.findall(r"<title>(\d: 3\.\d+)</title>", text) == ["1: 3.5000", "2: 3.2500", "3: 3.0000"]
    assert "<title>1: 0.0100</title>" in text  # the errors of the blocks
    answer = pages.client.get(f"/ui/jobs/{execution.job.id}/plots/refine.svg")
    assert answer.headers["content-type"].startswith("image/svg+xml") and 'xmlns="' in answer.text and "3.2500" in answer.text
    listed = pages.get("/")
    assert "Refining the mask 38 %" in listed and "left of this stage" in listed


def test_a_finished_job_shows_its_report(pages: Pages) -> None:
    """Plots, each with a link to its file, and the numbers behind them; what there is no plot of is not found."""
    row = pages.job_in("succeeded")
    text = pages.get(f"/ui/jobs/{row.id}")
    for name in ("sparsity", "errors", "speed"):
        assert f'href="/ui/jobs/{row.id}/plots/{name}.svg"' in text
        answer = pages.client.get(f"/ui/jobs/{row.id}/plots/{name}.svg")
        assert answer.status_code == 200 and f"{name}.svg" in answer.headers["content-disposition"]
    for figure in (
        "block 0, q_proj: 52.00 %",
        "61,012",
        "Output error by site",
        "20.97",
        "1.40x",
        "is noise",
        "Dense kernels run at the",
    ):
        assert figure in text, figure
    assert pages.client.get(f"/ui/jobs/{row.id}/plots/front.svg").status_code == 404
    assert pages.client.get(f"/ui/jobs/{row.id}/plots/%3Cb%3E.svg").status_code == 404


def test_what_both_models_wrote_and_scored_is_side_by_side(pages: Pages) -> None:
    """Each prompt with both texts, markup in them being text; each task with both scores."""
    dense, pruned = (Continued(text=text, tokens=tokens, finished=False) for text, tokens in (("a b", (1, 2)), (EVIL, (1, 3))))
    written = Continuations(prompts=("Once", EVIL), max_new_tokens=2, dense=(dense, dense), pruned=(dense, pruned))
    row = pages.submit()
    score = TaskScore(task="piqa", metric="acc", dense=0.75, dense_stderr=0.01, pruned=0.5, pruned_stderr=0.02)
    tasks = TaskReport(harness="0.4", scores=(score,))
    succeed(begin(pages.jobs, row), sample_report(continuations=written, tasks=tasks))
    text = pages.get(f"/ui/jobs/{row.id}")
    assert re.findall(r"<summary>(\w+)</summary>", text) == ["Once"] and EVIL not in text
    assert re.findall(r'<pre tabindex="0" aria-label="(\w+), after[^>]*>\n([^<]*)</pre>', text) == [
        ("Dense", "a b"), ("Pruned", "a b"), ("Dense", "a b"), ("Pruned", "&lt;script&gt;alert(1)&lt;/script&gt;"),
    ]  # fmt: skip
    assert re.findall(r"(\d) leading tokens agree", text) == ["2", "1"]
    assert re.search(r">piqa</th>.*0\.7500 ± 0\.0100.*0\.5000 ± 0\.0200", text)


def test_a_report_of_another_version_leaves_the_headline(pages: Pages) -> None:
    """What this version cannot read has no plots, but a page."""
    row = pages.submit()
    succeed(begin(pages.jobs, row), sample_report(num_blocks=1))
    with pages.jobs.engine.begin() as connection:
        connection.execute(sa.update(tables.reports).values(report={"schema_version": 99}))
    text = pages.get(f"/ui/jobs/{row.id}")
    assert "16.21 → 21.94" in text and "plots/sparsity" not in text
    assert "has no report to compare" in pages.get(f"/ui/compare?job={row.id}")
