"""The OpenAPI document held against the running service, with requests nobody would think of."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis
import pytest
import schemathesis
from api_server import Server
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

SETTINGS = hypothesis.settings(max_examples=8, suppress_health_check=list(hypothesis.HealthCheck))
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_answers_are_as_described(server: Server, mode: GenerationMode) -> None:
    """No 5xx, no status, type, header or body that the document does not name."""
    server.succeed(server.submit(), {"config.json": b"{}", "report.html": b"<p>"})
    server.jobs.cancel(None, server.submit())
    server.client.post("/v1/sweeps", json={"methods": ["wanda", "magnitude"]}).raise_for_status()
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json").exclude(path="/v1/jobs:validate")
    tried: Counter[int] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        try:
            check(operation.as_strategy(generation_mode=mode), server, tried)
        except hypothesis.errors.Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE, operation.label  # it takes nothing that could be wrong
    assert tried.total() > 100
    assert len(tried) >= 4, tried


def check(cases: Any, server: Server, tried: Counter[int]) -> None:
    """Send cases of one operation, and count the answers by status."""

    @SETTINGS
    @hypothesis.given(cases)
    def probe(case: schemathesis.Case) -> None:
        if case.query and case.query.get("wait"):
            case.query["wait"] = 0
        tried[case.call_and_validate(headers=server.headers, checks=CHECKS).status_code] += 1

    probe()
