"""The OpenAPI document held against the running service, with requests nobody would think of."""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api_server import Server

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip


@pytest.fixture
def api_schema(server: Server) -> schemathesis.BaseSchema:
    """The document, with jobs in several states to be found."""
    server.succeed(server.submit(), {"config.json": b"{}", "report.html": b"<p>"})
    server.jobs.cancel(None, server.submit())
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json").exclude(path="/v1/jobs:validate")


schema = schemathesis.pytest.from_fixture("api_schema")


@schema.parametrize()
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck))
def test_answers_are_as_described(case: schemathesis.Case, server: Server) -> None:
    """No 5xx, no status, type, header or body that the document does not name."""
    if case.query and "wait" in case.query:
        case.query["wait"] = 0
    case.call_and_validate(headers=server.headers, checks=CHECKS)
