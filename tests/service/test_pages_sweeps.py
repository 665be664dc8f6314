"""The pages of sweeps: submitted and extended through a form, shown as a plot and a table, steered by buttons."""

from __future__ import annotations

import json
import re
import shlex
from html import unescape
from typing import Any

import pytest
import sqlalchemy as sa
from pages_kit import EVIL, Checker, Pages, begin, succeed

from llmprune_service import tables
from reports import sample_report


def submit(pages: Pages, **fields: str) -> str:
    """The address of a new sweep's page."""
    values = {"methods": "wanda, magnitude", "sparsities": "0.5 0.6", "num_samples": "8"} | fields
    answer = pages.post("/ui/sweeps", **values)
    assert answer.status_code == 303, answer.text
    return str(answer.headers["location"])


def jobs_of(pages: Pages, address: str) -> list[Any]:
    """The sweep's jobs, in its order."""
    rows = [row for row in pages.jobs.list("default", limit=100)[0] if row.sweep_id == address.rpartition("/")[2]]
    return sorted(rows, key=lambda row: row.sweep_index)


def finish(pages: Pages, row: Any, perplexity: float) -> None:
    """End a job with these values."""
    execution = begin(pages.jobs, row)
    succeed(execution, sample_report(num_blocks=1), values={"sparsity": row.sparsity, "perplexity": perplexity})


def test_a_sweep_grows_into_a_plot_and_a_table(pages: Pages) -> None:
    """A row for each point from the start, a mark for each that is done; each leads to its job, and the job to the sweep."""
    address = submit(pages)
    rows = jobs_of(pages, address)
    assert [row.point for row in rows] == ["wanda-0.5", "wanda-0.6", "magnitude-0.5", "magnitude-0.6"]
    text = pages.get(address)
    assert "<svg" not in text and text.count('class="badge queued"') == 5 and 'data-every="3"' in text
    for row, perplexity in zip(rows, (20.0, 25.0, 30.0, 40.0), strict=True):
        finish(pages, row, perplexity)
    text = pages.get(address)
    assert re.findall(r'class="point( on-front)?', text) == ["", "", " on-front", " on-front"]
    assert re.findall(r"</td><td>(★?)", text) == ["★", "★", "", ""] and "data-every" not in text
    assert all(f'href="/ui/jobs/{row.id}"' in text for row in rows) and f"/ui/compare?job={rows[0].id}&amp;job=" in text
    assert "perplexity against perplexity" not in pages.get(f"{address}?x=kl&y=bytes").lower()
    assert f'<a href="{address}">sweep</a>' in pages.get(f"/ui/jobs/{rows[0].id}")
    assert f'href="{address}">demo</a>' in pages.get("/ui/sweeps")
    command = shlex.split(unescape(re.findall(r"<pre[^>]*>(.*?)</pre>", text, re.DOTALL)[-1]))
    assert json.loads(command[-1])["sparsities"] == [0.5, 0.6] and command[1].endswith("/v1/sweeps")


def test_a_sweep_is_extended_and_steered(pages: Pages) -> None:
    """Further values add points; the verbs act on all jobs; deleted, it is gone."""
    address = submit(pages)
    assert pages.post(f"{address}/points", sparsities="0.6, 0.7").headers["location"] == address
    assert [row.point for row in jobs_of(pages, address)][4:] == ["wanda-0.7", "magnitude-0.7"]
    text = pages.get(address)
    assert re.findall(rf'action="{address}/(\w+)"', text) == ["cancel", "points"]
    pages.post(f"{address}/cancel")
    text = pages.get(address)
    assert re.findall(rf'action="{address}/(\w+)"', text) == ["resume", "delete", "points"]
    pages.post(f"{address}/resume")
    assert {row.status for row in jobs_of(pages, address)} == {"queued"}
    pages.post(f"{address}/cancel")
    assert pages.post(f"{address}/delete").headers["location"] == "/ui/sweeps"
    assert "There is no such sweep." in pages.get(address, status=404)
    assert "No sweeps yet." in pages.get("/ui/sweeps")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"methods": "", "sparsities": ""}, "methods"),
        ({"methods": "wandaa"}, "Did you mean"),
        ({"sparsities": "0.5 x"}, "sparsities"),
        ({"sparsities": ",".join(f"0.{number:04d}" for number in range(1, 99))}, "at most 100"),
        ({"methods": EVIL}, "&lt;script&gt;"),
    ],
)
def test_what_cannot_be_swept_is_told(pages: Pages, fields: dict[str, str], word: str) -> None:
    """Nothing, too much, or what no job can be: 422 with what was typed, and nothing is queued."""
    values = {"methods": "wanda, magnitude", "sparsities": "0.5"} | fields
    answer = pages.post("/ui/sweeps", **values)
    assert answer.status_code == 422 and 'class="alert"' in answer.text
    assert word in answer.text and EVIL not in answer.text
    assert pages.jobs.list("default")[0] == []


def test_pages_of_sweeps_are_strict(pages: Pages) -> None:
    """Well formed, every field named, nothing inline, markup is text."""
    address = submit(pages)
    finish(pages, jobs_of(pages, address)[0], float("inf"))
    with pages.jobs.engine.begin() as connection:
        connection.execute(sa.update(tables.sweeps).values(model=EVIL, config={"base": {"model": EVIL}}))
        connection.execute(sa.update(tables.jobs).values(point=EVIL, model=EVIL))
    for path in ("/ui/sweeps", address):
        text = pages.get(path)
        checker = Checker()
        checker.feed(text)
        checker.close()
        assert checker.faults == [] and EVIL not in text, path
    assert "not finite" in pages.get(address)
