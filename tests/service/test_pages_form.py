"""The form of a submission: made from the schema, filled in as a job that there is, planned before anything is queued."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest
from pages_kit import EVIL, Pages, sample_plan

from llmprune.spec import PruneConfig
from llmprune_service.api import forms
from llmprune_service.api.plan import Outcome
from llmprune_service.schemas import JobRequest

EVERYTHING: dict[str, Any] = {
    "model": "org/model", "pattern": "2:4", "method": "sparsegpt", "effort": "best", "skip": ("*.down_proj", "a b"), "eval": (),
    "prompt": ("Once upon", "a time"),
    "latency": False, "permute": True, "seed": 7, "damping": 0.02, "calibration": "c4", "num_samples": 16, "priority": 8,
    "metadata": {"team": "nlp", "note": "x = y"}, "revision": "main", "timeout_s": 600,
}  # fmt: skip


def values(text: str) -> dict[str, str]:
    """What a browser would send of the page's form."""
    found = {}
    for name, value in re.findall(r'<input name="(\w+)" value="([^"]*)"', text):
        found[name] = unescape(value)
    for name, options in re.findall(r'<select name="(\w+)"[^>]*>(.*?)</select>', text):
        found[name] = next(iter(re.findall(r'value="([^"]*)"[^>]* selected', options)), "")
    for name, value in re.findall(r'<textarea name="(\w+)"[^>]*>([^<]*)</textarea>', text):
        found[name] = unescape(value)
    return found


def test_the_form_has_every_field_of_a_request(pages: Pages) -> None:
    """With its description; all are empty, which is the default. Remote code is refused and webhooks are for programs."""
    text = pages.get("/")
    found = values(text)
    assert found.keys() == JobRequest.model_fields.keys() - {"trust_remote_code", "tasks_path", "webhook"}
    assert set(found.values()) == {""}
    assert "Fraction of zeros among the pruned sites" in text and '<option value="sparsegpt" title="' in text
    assert re.search(r'name="seed"[^>]*min="0"', text) and "default (wanda)" in text and "default (yes)" in text


def test_a_duplicate_asks_for_the_same(pages: Pages) -> None:
    """The form, filled in as a job and sent again, makes one of the same configuration, priority and metadata."""
    first = pages.submit(**EVERYTHING)
    answer = pages.post("/ui/jobs", **values(pages.get(f"/?like={first.id}")) | {"model": ""})
    assert answer.status_code == 303
    second = pages.jobs.get("default", answer.headers["location"].rpartition("/")[2])
    assert second.config == {name: value for name, value in first.config.items() if name not in ("model", "revision")} | {
        "revision": "main"
    }
    assert (second.priority, second.metadata) == (8, EVERYTHING["metadata"])


def test_a_duplicate_of_an_unknown_job_is_told(pages: Pages) -> None:
    """404 for people; markup in the id is text."""
    for name in ("job_" + "0" * 26, "%3Cb%3E"):
        assert "There is no such job." in pages.get(f"/?like={name}", status=404)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("latency", "no", False), ("permute", "yes", True), ("eval", "none", []),
        ("eval", "c4\n wikitext2 \n", ["c4", "wikitext2"]),
        ("skip", "none", ["none"]), ("metadata", "a=b=c\nd", {"a": "b=c", "d": ""}), ("sparsity", "0.3", "0.3"),
    ],
)  # fmt: skip
def test_a_field_is_read(name: str, text: str, value: Any) -> None:
    """Lines, pairs and yes or no; numbers are the schema's to check."""
    assert forms._value(forms.FIELDS[name], text) == value


def test_a_plan_is_shown_before_anything_is_queued(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time, memory, disk and what is wrong, with the form as it was."""

    async def plan(config: PruneConfig, revision: str | None) -> Outcome:
        assert (config.method, revision) == ("sparsegpt", None)
        return Outcome(sample_plan(problems=(EVIL,)), "This host cannot run it: too small")

    monkeypatch.setattr(pages.state.planner, "plan", plan)
    answer = pages.post("/ui/plan", method="sparsegpt", num_samples="16")
    assert answer.status_code == 200
    for figure in ("2 min 05 s", "3.00 GiB", "8.00 GiB free", "1 min 30 s", "Pruning blocks", "too small", "28 matrices"):
        assert figure in answer.text, figure
    assert "&lt;script&gt;" in answer.text and EVIL not in answer.text
    assert values(answer.text) | {"method": "sparsegpt", "num_samples": "16"} == values(answer.text)
    assert "data-every" not in answer.text  # the list would be fetched from /ui/plan
    assert pages.jobs.list("default")[0] == []


def test_a_plan_of_another_version_is_left_out(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs' Python may be newer: then the disk space alone is told."""

    async def plan(config: PruneConfig, revision: str | None) -> Outcome:
        return Outcome({"problems": [], "new": 1}, None)

    monkeypatch.setattr(pages.state.planner, "plan", plan)
    answer = pages.post("/ui/plan")
    assert answer.status_code == 200 and "Disk:" in answer.text


def test_a_plan_of_what_cannot_be_is_refused(pages: Pages) -> None:
    """As a submission is; asked for by its address it is the list."""
    answer = pages.post("/ui/plan", sparsity="7")
    assert answer.status_code == 422 and "<code>sparsity</code>" in answer.text
    assert pages.client.get("/ui/plan", follow_redirects=False).headers["location"] == "/"
