"""The API's description: complete, true to the routes, and with examples that run."""

from __future__ import annotations

from typing import Any

import pytest
from api_server import PROBLEM, Service

from llmprune_service.schemas import JobRequest

PUBLIC = {"/healthz", "/readyz"}


@pytest.fixture
def document(service: Service) -> dict[str, Any]:
    """/openapi.json, which needs no key."""
    answer = service.client.get("/openapi.json")
    assert answer.status_code == 200
    schema: dict[str, Any] = answer.json()
    return schema


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """By path and method."""
    return {(path, method): item for path, methods in document["paths"].items() for method, item in methods.items()}


def test_every_route_says_what_it_is_and_how_it_fails(document: dict[str, Any]) -> None:
    """Tag, summary, description; every error as a problem document; a key wherever one is needed."""
    found = operations(document)
    assert len(found) > 25
    for (path, method), operation in found.items():
        where = f"{method} {path}"
        assert operation["tags"] and operation["summary"] and operation["description"], where
        wanted = {"400", "421", "422", "500", "503"} | (set() if path in PUBLIC else {"401", "403"})
        wanted |= {"404"} if "{" in path else set()
        assert wanted <= set(operation["responses"]), where
        for status, response in operation["responses"].items():
            if status >= "400":
                assert list(response["content"]) == [PROBLEM], (where, status)
        assert ("security" in operation) == (path not in PUBLIC), where
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_the_surface_is_the_designed_one(document: dict[str, Any]) -> None:
    """Each row of the table, by path."""
    job, sweep, hook = "/v1/jobs/{job_id}", "/v1/sweeps/{sweep_id}", "/v1/webhooks/{webhook_id}"
    wanted = {
        "/v1/jobs": "get post", "/v1/jobs:validate": "post", job: "get patch delete", f"{job}/cancel": "post",
        f"{job}/resume": "post", f"{job}/retry": "post", f"{job}/events": "get", f"{job}/checkpoints": "get",
        f"{job}/report": "get", f"{job}/report.html": "get", f"{job}/artifacts": "get", f"{job}/artifacts/{{name}}": "get head",
        "/v1/pareto": "get", "/v1/methods": "get", "/v1/workers": "get", "/v1/workers/{worker_id}/drain": "post",
        "/v1/auto": "post", "/v1/sweeps": "get post", sweep: "get delete", f"{sweep}/points": "get post",
        f"{sweep}/points.csv": "get",
        f"{sweep}/pareto.svg": "get", f"{sweep}/cancel": "post", f"{sweep}/resume": "post", f"{sweep}/retry": "post",
        "/v1/webhooks": "get post", "/v1/webhooks/secret": "get", hook: "delete", f"{hook}/rotate": "post",
        f"{hook}/test": "post", "/v1/api-keys": "get post", "/v1/api-keys/{key_id}": "delete", "/healthz": "get",
        "/readyz": "get", "/metrics": "get", "/v1/models/{organisation}/{name}/compat": "get",
    }  # fmt: skip
    assert {path: set(methods) for path, methods in document["paths"].items()} == {
        path: set(methods.split()) for path, methods in wanted.items()
    }


def test_the_examples_are_taken(service: Service, document: dict[str, Any]) -> None:
    """The one that needs no network is accepted as it stands."""
    examples = operations(document)["/v1/jobs", "post"]["requestBody"]["content"]["application/json"]["examples"]
    for example in examples.values():
        JobRequest.model_validate(example["value"])
    assert service.post("/v1/jobs", json=examples["bundled"]["value"]).status_code == 202
    examples = operations(document)["/v1/auto", "post"]["requestBody"]["content"]["application/json"]["examples"]
    assert service.post("/v1/auto", json=examples["bundled"]["value"]).json()["kind"] == "auto"
    examples = operations(document)["/v1/sweeps", "post"]["requestBody"]["content"]["application/json"]["examples"]
    sweep = service.post("/v1/sweeps", json=examples["bundled"]["value"])
    assert (sweep.status_code, sweep.json()["num_points"]) == (202, 6)


def test_conditions_and_ranges_are_described(document: dict[str, Any]) -> None:
    """Headers of requests and of answers, and the statuses that go with them."""
    download = operations(document)["/v1/jobs/{job_id}/artifacts/{name}", "get"]
    headers = {parameter["name"] for parameter in download["parameters"] if parameter["in"] == "header"}
    assert {"range", "if-range", "if-none-match"} <= headers
    assert {"200", "206", "304", "416"} <= set(download["responses"])
    assert {"ETag", "Repr-Digest", "Content-Range"} <= set(download["responses"]["206"]["headers"])
    events = operations(document)["/v1/jobs/{job_id}/events", "get"]
    assert set(events["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "last-event-id" in {parameter["name"] for parameter in events["parameters"]}
