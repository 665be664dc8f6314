"""Zero-shot tasks: the harness itself on a task of three questions where it is installed, and what is made of its results."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import llmprune
import tiny
from harness import StandIn
from llmprune.errors import ConfigError, TextError, TextUnreachable
from llmprune.io.exports import summary_csv
from llmprune.io.render import render_card, render_html, render_markdown
from llmprune.measure.tasks import open_tasks, scores_of
from llmprune.spec import PruneConfig
from llmprune.task_report import TaskReport, TaskScore, side_by_side
from tests.llmprune.test_render import HOSTILE, Page
from tests.reports import sample_report

WITHOUT = importlib.util.find_spec("lm_eval") is None
real = pytest.mark.skipif(WITHOUT, reason="lm-evaluation-harness, the extra `tasks`, is not installed")

RESULTS = {
    "results": {
        "mmlu": {"alias": "mmlu", "name": "mmlu", "sample_len": 4, "acc,none": 0.5, "acc_stderr,none": 0.01},
        "gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A", "alias": "gsm8k"},
        "lambada": {"perplexity,none": 12.5, "perplexity_stderr,none": 0.5},
    },
    "groups": {"mmlu": {"alias": "mmlu", "acc,none": 0.5, "acc_stderr,none": 0.01}},
    "n-samples": {"gsm8k": {"original": 1319, "effective": 40}},
    "n-shot": {"gsm8k": 5},
    "versions": {"gsm8k": 3.0},
    "higher_is_better": {"gsm8k": {"exact_match": True}, "lambada": {"perplexity": False}},
}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a task of three questions in the words of the tiny language, and one whose data are missing."""
    folder = tmp_path_factory.mktemp("tasks")
    asked = [
        {"question": "the model of", "choices": [" a small sparse", " keeps what then"], "answer": 0},
        {"question": "then keeps", "choices": [" what the", " a a a a"], "answer": 0},
        {"question": "its weight", "choices": [" of of of", " and then"], "answer": 1},
    ]
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    for name, data in (("tiny_choice", "asked.jsonl"), ("tiny_missing", "nowhere.jsonl")):
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / data}\n"
            "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
            "doc_to_target: '{{answer}}'\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\nmetadata:\n  version: 2.0\n"
        )
    return folder


def score(dense: float | None, pruned: float, **changes: Any) -> TaskScore:
    """Of a task with names that try to be markup."""
    given = {"task": HOSTILE, "metric": "acc", "num_samples": 2000, "dense": dense, "pruned": pruned}
    return TaskScore.model_validate({**given, "dense_stderr": 0.01, "pruned_stderr": 0.01, **changes})


def test_scores_of_the_harness() -> None:
    """A score for every metric, with its filter's name where it has one; a group appears once; N/A is no error."""
    scores = {item.task: item for item in scores_of(RESULTS)}
    assert list(scores) == ["mmlu", "gsm8k", "lambada"]
    assert (scores["mmlu"].pruned, scores["mmlu"].pruned_stderr, scores["mmlu"].num_samples) == (0.5, 0.01, None)
    strict = scores["gsm8k"]
    assert (strict.metric, strict.pruned_stderr, strict.num_samples, strict.num_fewshot, strict.version) == (
        "exact_match (strict-match)", None, 40, 5, "3.0",
    )  # fmt: skip
    assert not scores["lambada"].higher_is_better and strict.higher_is_better


def test_two_models_side_by_side() -> None:
    """A change within two standard errors of a difference is not clear; a task of one model alone stays."""
    dense, pruned = (TaskReport(harness="0.4.13", scores=(score(None, value),), seconds_pruned=value) for value in (0.5, 0.46))
    both = side_by_side(dense, pruned)
    (found,) = both.scores
    assert (found.dense, found.pruned, found.change) == (0.5, 0.46, pytest.approx(-0.04)) and found.is_clear
    assert (both.seconds_dense, both.seconds_pruned) == (0.5, 0.46)
    assert score(0.5, 0.475).is_clear is False
    assert score(0.5, 0.4, dense_stderr=None).is_clear is score(None, 0.4).is_clear is None
    assert side_by_side(None, pruned) == pruned


def test_reports_show_scores_and_no_markup() -> None:
    """On the page, in the card and in Markdown, each with its standard error; in the summary in columns of their own."""
    tasks = TaskReport(harness="0.4.13", limit=100, scores=(score(0.5, 0.46), score(0.5, 0.49, metric="acc_norm")))
    report = sample_report(tasks=tasks)
    for html in (
        render_html(report),
        *(
            MarkdownIt("commonmark").enable("table").render(text)
            for text in (render_card(report, "a/b", None), render_markdown(report))
        ),
    ):
        assert "0.5000 ± 0.0100" in html and "-0.0400" in html and "~-0.0100" in html and "0.4.13" in html
        assert "<script>alert" not in html and 'href="http' not in html
    assert "<script>alert(1)" in Page(render_html(report)).text
    assert "acc pruned stderr" in summary_csv(report)


def test_names_of_tasks() -> None:
    """Commas part them; a path is none, and settings of tasks want a task."""
    assert PruneConfig.build(tasks="hellaswag, piqa").tasks == ("hellaswag", "piqa")
    assert PruneConfig.build(tasks=["hellaswag,piqa", "mmlu_*", "piqa"]).tasks == ("hellaswag", "piqa", "mmlu_*")
    for path in ("/etc/tasks.yaml", "../x", "a/b"):
        with pytest.raises(ConfigError, match="no name of a task"):
            PruneConfig.build(tasks=path)
    with pytest.raises(ConfigError, match="Add --tasks"):
        PruneConfig.build(task_limit=5)


def test_missing_harness_is_said_before_the_work(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """With the command that installs it; nothing is written."""
    monkeypatch.setattr("llmprune.measure.tasks.importlib.util.find_spec", lambda name: None)
    outcome = cli("prune", tiny_model_dir, "-o", tmp_path / "out", "--tasks", "piqa", "--calibration", text_file, "--no-eval",
                  "--num-samples", 2, "--seq-len", 16)  # fmt: skip
    assert outcome.code == 2 and "pip install 'llmprune[tasks]'" in outcome.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_a_job_asks_the_harness_of_both_models(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """Of the dense one and the pruned one; a resumed job remembers the first; evaluate finds the second again."""
    harness = StandIn(monkeypatch, "logits")
    how = {**tiny.QUICK, "tasks": "logits", "task_limit": 7, "calibration": str(text_file), "eval": ()}
    out = tmp_path / "out"
    run = llmprune.prune_iter(tiny_model_dir, out=out, **how)
    events = []
    for event in run:
        events.append(event)
        if event.event == "block_finished":
            break
    run.close()  # type: ignore[attr-defined]
    assert [event.detail for event in events if event.event == "progress" and event.stage == "dense"] == ["task logits"]
    report = llmprune.prune(tiny_model_dir, out=out, resume=True, **how)
    assert harness.asked == [("logits", 7)] * 2 and report.tasks is not None
    (found,) = report.tasks.scores
    assert found.dense is not None and found.pruned is not None and found.dense != found.pruned
    assert (report.tasks.harness, report.tasks.limit) == ("9.9", 7)
    again = llmprune.evaluate(out, against=str(tiny_model_dir), eval=(), tasks="logits").tasks
    assert again is not None and again.limit is None
    assert [(item.dense, item.pruned) for item in again.scores] == [(found.dense, found.pruned)]


def test_what_the_harness_cannot_find(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is nearly one, and data that want a connection: each with its remedy."""
    harness = StandIn(monkeypatch, "logits")
    with pytest.raises(ConfigError, match="Did you mean logits"):
        open_tasks(PruneConfig.build(tasks="logit"))
    harness.is_reachable = False
    with pytest.raises(TextUnreachable, match="llmprune fetch MODEL --tasks logits"):
        open_tasks(PruneConfig.build(tasks="logits"))
    with pytest.raises(ConfigError, match="is not a directory"):
        open_tasks(PruneConfig.build(tasks="logits", tasks_path="/nowhere"))


@real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(600)
class TestHarness:
    def test_a_job_examines_both_models(
        self, cli: Callable[..., Any], questions: Path, trained_model_dir: Path, text_file: Path, tmp_path: Path
    ) -> None:
        """Dense and pruned in the report, and the checkpoint again by itself, packed or not, with the same scores."""
        how = {**tiny.QUICK, "tasks": "tiny_choice", "tasks_path": str(questions), "calibration": str(text_file), "eval": ()}
        out = tmp_path / "out"
        report = llmprune.prune(trained_model_dir, pattern="2:4", method="magnitude", out=out, **how)
        assert report.tasks is not None
        assert [(item.metric, item.num_samples, item.version) for item in report.tasks.scores] == [
            ("acc", 3, "2.0"), ("acc_norm", 3, "2.0"),
        ]  # fmt: skip
        dense = report.tasks.scores[0]
        assert all(value in (0, 1 / 3, 2 / 3, 1) for value in (dense.dense, dense.pruned)) and dense.dense_stderr is not None
        assert llmprune.read_report(out) == report and "tiny_choice" in (out / "README.md").read_text()
        llmprune.convert(out, to="packed", out=tmp_path / "packed")
        for checkpoint in (out, tmp_path / "packed"):
            outcome = cli("evaluate", checkpoint, "--tasks", "tiny_choice", "--tasks-path", questions, "--no-eval", "--json")
            assert outcome.code == 0, outcome.err
            again = json.loads(outcome.out)["tasks"]["scores"]
            assert [item["pruned"] for item in again] == [item.pruned for item in report.tasks.scores]
        shown = cli("evaluate", out, "--against", trained_model_dir, "--tasks", "tiny_choice", "--tasks-path", questions,
                    "--no-eval", "--task-limit", 2)  # fmt: skip
        assert "tiny_choice" in shown.out and "± " in shown.out and "first 2" in shown.out

    def test_a_sliced_model_is_examined(self, questions: Path, tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
        """Layers of different widths, built by the code in the checkpoint."""
        how = {**tiny.QUICK, "calibration": str(text_file), "eval": ()}
        llmprune.prune(tiny_model_dir, pattern="structured", method="magnitude", out=tmp_path / "out", **how)
        found = llmprune.evaluate(
            tmp_path / "out", eval=(), tasks="tiny_choice", tasks_path=str(questions), trust_remote_code=True
        ).tasks
        assert found is not None and [item.num_samples for item in found.scores] == [3, 3]

    @pytest.mark.parametrize(
        ("task", "error", "said"),
        [("tiny_choise", ConfigError, "Did you mean tiny_choice"), ("tiny_missing", TextError, "nowhere.jsonl")],
    )
    def test_tasks_that_cannot_be(
        self, questions: Path, monkeypatch: pytest.MonkeyPatch, task: str, error: type[Exception], said: str
    ) -> None:
        """A name that is nearly one, and data that are not there."""
        import lm_eval.tasks

        own = lm_eval.tasks.TaskManager
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **how: own(**{**how, "include_defaults": False}))
        with pytest.raises(error, match=said):
            open_tasks(PruneConfig.build(tasks=task, tasks_path=str(questions)))

    def test_data_on_the_hub_want_a_connection(self, tmp_path: Path) -> None:
        """Offline, with what to do about it."""
        (tmp_path / "far.yaml").write_text(
            "task: far_away\ndataset_path: nobody/nothing-that-is-here\noutput_type: multiple_choice\ntest_split: test\n"
            "doc_to_text: q\ndoc_to_choice: '{{c}}'\ndoc_to_target: 0\n"
        )
        with pytest.raises(TextUnreachable, match="llmprune fetch MODEL --tasks far_away"):
            open_tasks(PruneConfig.build(tasks="far_away", tasks_path=str(tmp_path)))
