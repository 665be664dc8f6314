"""Logs: a line a request, with its ids and without secrets; and traces only where they are asked for."""

from __future__ import annotations

import gzip
import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from api_server import JOB, Service

from llmprune_service import telemetry
from llmprune_service.settings import Settings
from llmprune_service.telemetry import JsonFormatter, TextFormatter, configure_logging, redact, tracing

KEY = "prn_01hzzzzzzzzzzzzzzzzzzzzzzz_" + "A1-_" * 10 + "abc"
Attach = Callable[[logging.Formatter], io.StringIO]
SECRETS = {
    f"key {KEY} used": KEY,
    "token hf_AbCdEfGhIjKlMnOp": "hf_AbCdEfGhIjKlMnOp",
    "secret whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw==": "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "postgresql://user:pa$$w0rd@db:5432/x": "pa$$w0rd",
    "Authorization: Bearer abc.def": "abc.def",
    "{'authorization': 'Basic dXNlcjpwYXNz'}": "dXNlcjpwYXNz",
    "(b'authorization', b'Bearer opaque')": "opaque",
    "Cookie: llmprune_session=topsecret; a=b": "topsecret",
    "GET /login?code=onetime HTTP/1.1": "onetime",
}


@pytest.fixture
def log() -> Iterator[Attach]:
    """Everything that is logged, through a formatter."""
    root = logging.getLogger()
    level, added = root.level, []

    def attach(formatter: logging.Formatter) -> io.StringIO:
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        added.append(handler)
        root.addHandler(handler)
        root.setLevel(logging.DEBUG)
        return stream

    yield attach
    root.setLevel(level)
    for handler in added:
        root.removeHandler(handler)


@pytest.mark.parametrize(("text", "secret"), SECRETS.items())
def test_secrets_are_redacted(text: str, secret: str) -> None:
    """Whatever stands around them."""
    assert secret in text
    assert secret not in redact(text)
    assert (
        redact("nothing here: http://host:80/a hf_x prn_ authorization")
        == "nothing here: http://host:80/a hf_x prn_ authorization"
    )


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()], ids=["json", "text"])
def test_no_secret_of_a_request_is_logged(
    service: Service,
    log: Attach,
    monkeypatch: pytest.MonkeyPatch,
    formatter: logging.Formatter,
) -> None:
    """Neither where it succeeds nor where it fails with the secret in an exception."""
    key = service.key("read", "write", "admin")
    stream = log(formatter)

    def fail(*_: object) -> None:
        raise RuntimeError(f"could not use {key} at postgresql://u:hunter2@db/x")

    service.post("/v1/jobs", json=JOB, key=key)
    service.client.get(f"/v1/jobs?key={key}")
    service.client.get(f"/{key}")
    service.client.get("/login?code=onetime-code")
    monkeypatch.setattr(service.jobs, "workers", fail)
    assert service.get("/v1/workers", key=key).status_code == 500
    text = stream.getvalue()
    assert "RuntimeError" in text
    for secret in (key, key.rpartition("_")[2], "hunter2", "onetime-code"):
        assert secret not in text


def test_a_line_has_the_ids_of_request_and_job(service: Service, log: Attach) -> None:
    """As JSON; what a route itself logs has them too."""
    stream = log(JsonFormatter())
    job_id = service.submit()
    service.get(f"/v1/jobs/{job_id}", headers={"X-Request-ID": "req-7"})
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    line = next(line for line in lines if line["message"] == "request")
    assert {"request_id": "req-7", "job_id": job_id, "method": "GET", "status": 200, "level": "info"}.items() <= line.items()
    assert line["path"] == f"/v1/jobs/{job_id}"
    assert telemetry.request_id.get() is None


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()], ids=["json", "text"])
def test_a_line_has_what_its_record_got_beside_the_message(log: Attach, formatter: logging.Formatter) -> None:
    """And nothing of the record itself."""
    stream = log(formatter)
    logging.getLogger("llmprune_service").warning("a worker is lost", extra={"worker": "host-1"})
    line = stream.getvalue().strip()
    if isinstance(formatter, JsonFormatter):
        assert set(json.loads(line)) == {"time", "level", "logger", "message", "worker"}
    else:
        assert line.endswith("a worker is lost worker=host-1")


def test_a_path_cannot_forge_a_line(service: Service, log: Attach) -> None:
    """Line breaks of a path stay escaped."""
    stream = log(TextFormatter())
    service.get("/x%0aERROR forged")
    lines = stream.getvalue().splitlines()
    assert any("path=/x%0AERROR%20forged" in line for line in lines)
    assert not any(line.startswith("ERROR") for line in lines)


def test_the_format_is_chosen(make_settings: Callable[..., Settings]) -> None:
    """JSON unless somebody watches."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        for chosen, kind in (("json", JsonFormatter), ("text", TextFormatter), ("auto", JsonFormatter)):
            configure_logging(make_settings(log_format=chosen))
            assert [type(handler.formatter) for handler in root.handlers] == [kind]
    finally:
        root.handlers[:] = before
        root.setLevel(level)


def test_traces_are_made_only_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """OTEL_EXPORTER_*; never of probes, and never with a secret in the query."""
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)
    assert tracing() == {"tracing": False, "metrics": False, "logs": False}
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    config = tracing()
    assert config["auto_configure"]
    exclude = config["exclude"]
    assert exclude is not None
    assert [exclude({"path": path, "query_string": b""}) for path in ("/healthz", "/login", "/v1/jobs")] == [True, True, False]
    assert exclude({"path": "/v1/jobs", "query_string": b"key=prn_x"})


TRACED = """
import pathlib, sys
from starlette.testclient import TestClient
from llmprune_service.api.app import create_app
from llmprune_service.settings import Settings
settings = Settings(data_dir=pathlib.Path(sys.argv[1]))
with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
    key = settings.key_file.read_text().strip()
    assert client.get("/v1/methods", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    client.get(f"/v1/pareto?key={key}")
    client.get("/healthz")
"""


def test_requests_are_traced(make_settings: Callable[..., Settings]) -> None:
    """Spans of requests reach the collector that OTEL_* names; keys do not."""
    pytest.importorskip("opentelemetry.sdk")
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    settings = make_settings()
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        environment = {"PYTHONPATH": ":".join(sys.path), "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        command = [sys.executable, "-c", TRACED, str(settings.data_dir)]
        subprocess.run(command, check=True, env=environment, timeout=60)
        collector.shutdown()
    spans = b"".join(body for path, body in received if path == "/v1/traces")
    assert b"GET /v1/methods" in spans
    assert b"llmprune" in spans
    assert b"/healthz" not in spans
    assert settings.key_file.read_bytes().strip()[-20:] not in b"".join(body for _, body in received)


def test_the_web_process_never_imports_torch(tmp_path: Path) -> None:
    """Nor transformers, with every route loaded."""
    code = (
        "import sys, pathlib; from llmprune_service.settings import Settings; from llmprune_service.api.app import create_app; "
        f"create_app(Settings(data_dir=pathlib.Path({str(tmp_path)!r}))).openapi(); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)}, timeout=60)
