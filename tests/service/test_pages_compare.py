"""Finished jobs side by side: the address is the choice, and what it names in vain is told."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import pytest
from pages_kit import Pages, begin, serving, succeed

from llmprune.report import Report
from llmprune_service.api import auth
from llmprune_service.api.compare_page import MAX_COMPARED
from llmprune_service.jobs import Row
from llmprune_service.schemas import ApiKeyRequest
from reports import sample_report


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    """Shared by tests that only look, each at jobs of its own."""
    with serving(tmp_path_factory.mktemp("pages"), allowed_hosts=("testserver",)) as found:
        yield found


def report_of(method: str, sparsity: float, perplexity: float, **changes: Any) -> Report:
    """A report with these numbers."""
    report = sample_report(num_blocks=1)
    quality = report.quality[0].model_copy(update={"perplexity_pruned": perplexity, **changes})
    sites = report.blocks[0].sites
    zeros = tuple(site.model_copy(update={"num_zeros": round(sparsity * site.numel)}) for site in sites)
    block = report.blocks[0].model_copy(update={"sites": zeros})
    config = report.config.model_copy(update={"method": method, "sparsity": sparsity})
    return report.model_copy(update={"config": config, "quality": (quality,), "blocks": (block,)})


def finish(pages: Pages, method: str, sparsity: float, perplexity: float, **changes: Any) -> Row:
    """A job that ended with these numbers."""
    row = pages.submit(model="org/model", method=method, sparsity=sparsity)
    succeed(begin(pages.jobs, row), report_of(method, sparsity, perplexity, **changes))
    return row


def link(*rows: Row, **axes: str) -> str:
    """The address that compares them."""
    return "/ui/compare?" + "&".join([*(f"job={row.id}" for row in rows), *(f"{key}={value}" for key, value in axes.items())])


def test_jobs_are_points_and_rows(pages: Pages) -> None:
    """Each links to its job; the front is marked in plot and table; the axes are what the address says."""
    rows = [finish(pages, "wanda", 0.5, 24.0), finish(pages, "sparsegpt", 0.5, 22.0), finish(pages, "sparsegpt", 0.6, 30.0)]
    text = pages.get(link(*rows))
    for row in rows:
        assert len(re.findall(rf'<a href="/ui/jobs/{row.id}"', text)) == 2
    assert "sparsegpt 60 % unstructured" in text and "perplexity 24.00" in text
    assert re.findall(r"</a></th><td>(★?)", text) == ["", "★", "★"]
    text = pages.get(link(*rows, x="kl", y="decode_ms"))
    assert re.findall(r'<option value="(\w+)" selected>', text) == ["kl", "decode_ms"]
    assert "decode, ms a token (smaller is better)" in text
    assert all(f'value="{row.id}" checked' in text for row in rows)


def test_files_hold_the_same(pages: Pages) -> None:
    """The plot as SVG, the table as CSV, under the very choice of the page."""
    rows = [finish(pages, "wanda", 0.5, 24.0), finish(pages, "wanda", 0.5, 25.0)]
    text = pages.get(link(*rows))
    files = [found.replace("&amp;", "&") for found in re.findall(r'<a download href="(/ui/compare\.[^"]+)"', text)]
    svg, table = (pages.client.get(file) for file in files)
    assert ElementTree.fromstring(svg.text).tag.endswith("svg")
    lines = list(csv.DictReader(io.StringIO(table.text)))
    assert [float(line["perplexity"]) for line in lines] == [24.0, 25.0]
    labels = [line["label"] for line in lines]
    assert labels == [f"wanda 50 % unstructured …{row.id[-4:]}" for row in rows]  # alike but for the end of the id


def test_what_a_link_names_in_vain_is_told(pages: Pages) -> None:
    """Unknown, unfinished and misspelt jobs, too many of them, an unknown axis: a page with what is left, never an error."""
    row, queued = finish(pages, "wanda", 0.5, 24.0), pages.submit(model="org/queued")
    names = ["job_" + "0" * 26, "%3Cscript%3E", queued.id, row.id, row.id]
    text = pages.get("/ui/compare?" + "&".join(f"job={name}" for name in names) + "&x=nonsense")
    assert "There is no job &#39;job_00000000000000000000000000&#39; here" in text and "&lt;script&gt;" in text
    assert f"The job {queued.id} (org/queued) has no report to compare: it is queued." in text
    assert "There is no axis &#39;nonsense&#39;; there are perplexity," in text
    assert len(re.findall(rf'<a href="/ui/jobs/{row.id}"', text)) == 2
    many = pages.get("/ui/compare?" + "&".join(f"job={number}" for number in range(MAX_COMPARED + 2)))
    assert "the last 2 of this link are left out" in many


def test_an_empty_choice_offers_what_is_finished(pages: Pages) -> None:
    """Without a plot."""
    row = finish(pages, "wanda", 0.5, 24.0)
    text = pages.get("/ui/compare")
    assert f'<input type="checkbox" name="job" value="{row.id}">' in text and "<svg" not in text
    assert f'form="pick" name="job" id="pick-{row.id}"' in pages.get("/")


def test_different_texts_are_told(pages: Pages) -> None:
    """Perplexities on them mean nothing beside each other."""
    text = sample_report().quality[1].text
    rows = [finish(pages, "wanda", 0.5, 24.0), finish(pages, "wanda", 0.6, 24.0, text=text)]
    assert "evaluated on different texts" in pages.get(link(*rows))
    assert "evaluated on different texts" not in pages.get(link(rows[0]))


def test_what_was_not_measured_is_not_in_the_plot(pages: Pages) -> None:
    """An infinite perplexity has a row."""
    rows = [finish(pages, "wanda", 0.5, 24.0), finish(pages, "magnitude", 0.9, float("inf"))]
    text = pages.get(link(*rows))
    assert "1 without a finite value on both axes: not shown" in text and "not finite" in text


def test_another_tenants_job_is_not_there(guarded: Pages) -> None:
    """It is told as one that does not exist."""
    foreign = finish(guarded, "wanda", 0.5, 24.0)
    key = auth.create_key(guarded.state.engine, ApiKeyRequest(tenant="team", name="reader", scopes=("read",))).key
    assert key is not None
    guarded.post("/login", key=key)
    text = guarded.get(link(foreign))
    assert f"There is no job &#39;{foreign.id}&#39; here" in text and "<svg" not in text
