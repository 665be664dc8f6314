"""Searches within a budget over HTTP."""

from __future__ import annotations

from typing import Any

import pytest
from api_server import Service, pointers, problem

AUTO = {"base": {"num_samples": 8}, "max_perplexity_increase": "5%"}


def test_a_search_is_a_job(service: Service) -> None:
    """Of a kind of its own; the list finds it, and the same key makes it once."""
    headers = {"Idempotency-Key": "abc-1"}
    answer = service.post("/v1/auto", json={**AUTO, "priority": 7}, headers=headers)
    job = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, f"/v1/jobs/{job['id']}")
    assert (job["kind"], job["status"], job["priority"], job["model"]) == ("auto", "queued", 7, "demo")
    assert job["config"] == {"base": {"num_samples": 8}, "max_perplexity_increase": 0.05}
    again = service.post("/v1/auto", json={**AUTO, "priority": 7}, headers=headers)
    assert again.json() == job and again.headers["idempotent-replayed"] == "true"
    problem(service.post("/v1/jobs", json={"num_samples": 8}, headers=headers), 422, "idempotency-key-reused")
    assert [job["id"] for job in service.get("/v1/jobs", params={"method": "auto"}).json()["data"]] == [job["id"]]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "no budget"),
        ({"max_kl": 0.1, "base": {"sparsity": 0.5}}, "auto finds the sparsity"),
        ({"min_speedup": 1.5, "patterns": ["unstructured"]}, "unstructured zeros run no faster"),
        ({"max_kl": 0.1, "min_sparsity": 0.8, "max_sparsity": 0.2}, "is not below"),
    ],
)
def test_budgets_that_contradict_are_refused(service: Service, body: dict[str, Any], detail: str) -> None:
    """With the way out; nothing is queued."""
    assert detail in problem(service.post("/v1/auto", json=body), 422)["detail"]
    assert service.get("/v1/jobs").json()["data"] == []


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"methods": ["wanda", "wonder"]}, "/methods"),
        ({"base": {"method": "wonder"}}, "/base/method"),
        ({"base": {"model": "../etc"}}, "/base/model"),
        ({"base": {"effort": "fast"}}, "/base/effort"),
        ({"timeout_s": 10**8}, "/timeout_s"),
        ({"max_kll": 1}, "/max_kll"),
        ({"max_kl": -1}, "/max_kl"),
        ({"methods": ["wanda"] * 101}, "/methods"),
    ],
)
def test_what_is_wrong_is_pointed_at(service: Service, fields: dict[str, Any], pointer: str) -> None:
    """Where it stands in the search."""
    assert list(pointers(service.post("/v1/auto", json={**AUTO, **fields}))) == [pointer]


def test_a_search_has_a_page(service: Service) -> None:
    """With its budget, and the request that makes it again."""
    job = service.post("/v1/auto", json={**AUTO, "max_kl": 0.25}).json()
    for path in ("/", f"/ui/jobs/{job['id']}"):
        page = service.get(path)
        assert page.status_code == 200 and "max_perplexity_increase 0.05, max_kl 0.25" in page.text
    assert "/v1/auto" in page.text and "llmprune submit " not in page.text
    assert "Duplicate" not in page.text  # the form is of another kind of job
