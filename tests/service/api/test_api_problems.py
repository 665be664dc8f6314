"""What clients can get wrong, what the outermost layer refuses, and what no answer tells."""

from __future__ import annotations

import gzip
import json
import logging
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from api_server import JOB, Server, Service, pointers, problem

from llmprune_service.jobs import Jobs

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"sparsity": 1}, "/sparsity", "less than 1"),
    ({"sparsity": "half"}, "/sparsity", "number"),
    ({"sparsity": None}, "/sparsity", "number"),
    ({"modle": "demo"}, "/modle", "Did you mean 'model'?"),
    ({"pattern": "9:4"}, "/pattern", "0 < n < m"),
    ({"pattern": "2:4", "sparsity": 0.7}, "/pattern", "Drop one"),
    ({"method": "wandah"}, "/method", "Did you mean 'wanda'?"),
    ({"model": "../../etc"}, "/model", "hub ID"),
    ({"model": "/etc"}, "/model", "LLMPRUNE_MODEL_ROOTS"),
    ({"trust_remote_code": True}, "/trust_remote_code", "never run"),
    ({"device": "cuda:7"}, "/device", "cuda"),
    ({"calibration": "/etc/passwd"}, "/calibration", "stdlib"),
    ({"num_samples": 10**9}, "/num_samples", "at most"),
    ({"priority": 10}, "/priority", "less than or equal to 9"),
    ({"timeout_s": 0}, "/timeout_s", "greater than or equal to 1"),
    ({"metadata": {"a b": "c"}}, "/metadata/a b", "pattern"),
    ({"metadata": {"a": 1}}, "/metadata/a", "string"),
    ({"metadata": {str(i): "" for i in range(17)}}, "/metadata", "16"),
    ({"metadata": {"a": "\x00"}}, "/metadata/a", "Control"),
    ({"skip": ["ok", 7]}, "/skip/1", "string"),
    ({"webhook": {"url": "http://127.0.0.1/"}}, "/webhook/url", "http"),
    ({"webhook": {"url": "https://e.example/", "evnts": []}}, "/webhook/evnts", "Did you mean 'events'?"),
]


@pytest.mark.parametrize(("fields", "pointer", "words"), WRONG, ids=[json.dumps(fields)[:60] for fields, _, _ in WRONG])
def test_a_wrong_field_is_named_with_its_remedy(service: Service, fields: dict[str, Any], pointer: str, words: str) -> None:
    """422 with a JSON pointer; nothing is queued."""
    errors = pointers(service.post("/v1/jobs", json=fields))
    assert words in errors[pointer]
    assert service.jobs.list(None)[0] == []


def test_all_wrong_fields_are_named_at_once(service: Service) -> None:
    """So that nobody mends them one by one."""
    wrong = {"sparsity": 2, "priority": 99, "metadata": {"a/b~c": "d"}}
    assert set(pointers(service.post("/v1/jobs", json=wrong))) == {"/sparsity", "/priority", "/metadata/a~1b~0c"}


def test_a_known_field_list_belongs_to_the_place(service: Service) -> None:
    """The webhook's own fields for a field of the webhook."""
    errors = pointers(service.post("/v1/jobs", json={"webhook": {"url": "https://e.example/", "colour": "red"}}))
    assert errors["/webhook/colour"].endswith("Known fields: url, events")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b'{"sparsity": 0.5,}', 400),
        (b"\xff\xfe", 400),
        (b"[" * 60_000, 400),
        (b"[]", 422),
        (b'"demo"', 422),
        (b"null", 422),
        (b"", 422),
        (b'{"metadata": {"a": "\\ud800"}}', 422),
        (b'{"sparsity": NaN}', 422),
        (b'{"sparsity": 1e999}', 422),
        (b'{"num_samples": ' + b"9" * 4000 + b"}", 422),
        (b'{"num_samples": ' + b"9" * 5000 + b"}", 400),
        (b'{"pattern": "2:4", "sparsity": ' + b"9" * 400 + b"}", 422),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_body_that_is_no_job(service: Service, body: bytes, status: int) -> None:
    """400 for what is not JSON, 422 for what is not a job."""
    problem(service.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"}), status)


@pytest.mark.parametrize(
    ("path", "parameter"),
    [
        ("/v1/jobs?limit=0", "limit"),
        ("/v1/jobs?limit=101", "limit"),
        ("/v1/jobs?limit=ten", "limit"),
        ("/v1/jobs?status=sleeping", "status"),
        ("/v1/jobs/{id}?wait=61", "wait"),
        ("/v1/jobs/{id}?wait=nan", "wait"),
        ("/v1/jobs/{id}/events?after=-1", "after"),
        ("/v1/jobs/{id}/events?after=99999999999999999999", "after"),
        ("/v1/pareto", "model"),
    ],
)
def test_a_wrong_parameter_is_named(service: Service, path: str, parameter: str) -> None:
    """422 with where it was."""
    errors = problem(service.get(path.format(id=service.submit())), 422)["errors"]
    assert [(error["in"], error["parameter"]) for error in errors] == [("query", parameter)]


@pytest.mark.parametrize("id", ["x", "job_", "job_" + "i" * 26, "JOB_" + "0" * 26, "%00", f"job_{'0' * 26}%0a", "é"])
def test_what_is_no_id_is_not_found(service: Service, id: str) -> None:
    """404, never a hint at how ids look."""
    problem(service.get(f"/v1/jobs/{id}"), 404)
    problem(service.get(f"/v1/jobs?after={id}"), 404)


def test_what_is_not_there_and_what_is_not_allowed(service: Service) -> None:
    """Also as problem documents; Allow names all methods of the path."""
    problem(service.get("/v1/nothing"), 404, "not-found")
    answer = service.request("PUT", "/v1/jobs")
    problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "GET, POST"


def test_a_body_over_the_limit(server: Server) -> None:
    """413 by its stated length, and when it turns out to be longer than anybody said."""
    big = b"x" * (server.settings.max_body_bytes + 1)
    headers = {"Content-Type": "application/json"}
    problem(server.client.post("/v1/jobs", content=big, headers=headers), 413, "body-too-large")

    def chunks() -> Iterator[bytes]:
        for _ in range(3):
            yield b" " * (server.settings.max_body_bytes // 2)

    problem(server.client.post("/v1/jobs", content=chunks(), headers=headers), 413, "body-too-large")


def test_a_compressed_body_is_refused(service: Service) -> None:
    """415: a small one could be anything."""
    body = gzip.compress(json.dumps(JOB).encode())
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    problem(service.post("/v1/jobs", content=body, headers=headers), 415, "compressed-body")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
def test_a_body_must_say_that_it_is_json(service: Service, kind: str) -> None:
    """415: these are what another site's page can send without asking."""
    problem(service.post("/v1/jobs", content=json.dumps(JOB).encode(), headers={"Content-Type": kind}), 415, "not-json")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil:80", "[::2]", "", "a b", "[1"])
def test_another_name_is_refused(service: Service, host: str) -> None:
    """421: a page whose name points at this machine is no page of ours."""
    problem(service.get("/healthz", headers={"Host": host}), 421, "wrong-host")


@pytest.mark.parametrize("host", ["localhost", "LocalHost:8000", "127.0.0.1:1", "[::1]:8000"])
def test_the_loopback_names_are_ours(service: Service, host: str) -> None:
    """With any port."""
    assert service.get("/healthz", headers={"Host": host}).status_code == 200


def test_allowed_hosts(make_service: Callable[..., Service]) -> None:
    """Names of the operator's; all of them for '*'; any address when listening on all of them."""

    def status(service: Service, host: str) -> int:
        return service.get("/healthz", headers={"Host": host}).status_code

    named = make_service(allowed_hosts=("prune.example",))
    assert [status(named, host) for host in ("Prune.Example:443", "other.example", "10.1.2.3")] == [200, 421, 421]
    assert status(make_service(allowed_hosts=("*",)), "whatever.example") == 200
    public = make_service(host="0.0.0.0")
    assert [status(public, host) for host in ("10.1.2.3:8000", "[fe80::1]", "evil.example")] == [200, 200, 421]


@pytest.mark.parametrize("path", ["/healthz", "/v1/jobs", "/nothing", "/openapi.json", "/login"])
def test_security_headers_are_on_everything(service: Service, path: str) -> None:
    """Errors and pages among it."""
    for headers in ({}, {"Host": "evil.example"}):
        answer = service.client.get(path, headers=headers)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] in ("no-referrer", "same-origin")
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"


def test_request_ids(service: Service) -> None:
    """A sane one is taken over, anything else is replaced."""
    assert service.get("/healthz", headers={"X-Request-ID": "abc-1.2_3"}).headers["x-request-id"] == "abc-1.2_3"
    for strange in ("a b", "x" * 65, "<script>", ""):
        made = service.get("/healthz", headers={"X-Request-ID": strange}).headers["x-request-id"]
        assert made.startswith("req_")


def test_a_failure_tells_nothing_of_the_inside(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """500 with the request id, under which the log has the rest."""

    def fail(*_: object) -> None:
        raise RuntimeError("secret of /srv/inside")

    monkeypatch.setattr(Jobs, "get", fail)
    with caplog.at_level(logging.ERROR):
        answer = service.get(f"/v1/jobs/{service.submit()}", headers={"X-Request-ID": "find-me"})
    assert "find-me" in problem(answer, 500, "internal")["detail"]
    assert "inside" not in answer.text and "RuntimeError" not in answer.text
    assert "secret of /srv/inside" in caplog.text


def test_a_database_that_is_away_is_503(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Retry-After, and without its address; liveness does not ask it."""
    job_id = service.submit()

    def away(*_: object, **__: object) -> None:
        raise sa.exc.OperationalError("SELECT", {}, sqlite3.OperationalError("postgresql://user:pw@db/x is down"))

    monkeypatch.setattr(service.engine, "connect", away)
    answer = service.get(f"/v1/jobs/{job_id}")
    problem(answer, 503, "database-away")
    assert answer.headers["retry-after"]
    assert "user" not in answer.text
    problem(service.get("/readyz"), 503)
    assert service.get("/healthz").status_code == 200


def test_readiness_needs_the_schema_and_room_on_the_disk(make_service: Callable[..., Service]) -> None:
    """503 problems that say which."""
    service = make_service()
    assert service.client.get("/v2/health/ready").json() == {"status": "ready"}
    assert service.client.get("/v2/health/live").json() == service.client.get("/health").json() == {"status": "ok"}
    with service.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0000'"))
    problem(service.client.get("/readyz"), 503, "schema")
    full = make_service(data_dir=service.settings.data_dir.with_name("full"), disk_floor_bytes=2**60)
    problem(full.client.get("/readyz"), 503, "disk-full")
