"""The client against services that cannot be trusted or reached; its keys; and submission without a service."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stranger import Stranger

from llmprune.errors import ConfigError
from llmprune.spec import PruneConfig
from llmprune_service.client import ApiError, Client, ServiceError, ServiceUnreachable, enqueue
from llmprune_service.database import make_engine
from llmprune_service.jobs import Jobs
from llmprune_service.settings import Settings

# Services that cannot be trusted --------------------------------------------------------------------------------------


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    stranger = Stranger()
    yield stranger
    stranger.close()


def artifact(name: str, content: bytes, sha256: str | None = None) -> dict[str, Any]:
    """A page with one file."""
    digest = sha256 or hashlib.sha256(content).hexdigest()
    entry = {"name": name, "bytes": len(content), "sha256": digest, "media_type": "a/b", "url": "http://elsewhere.test/x"}
    return {"data": [entry], "has_more": False, "new_field": 1}


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "..", ".", "", "a\\b", "C:evil", "a\nb", ".bashrc", "a\0b"])
def test_names_that_lead_elsewhere_are_refused(stranger: Stranger, tmp_path: Path, name: str) -> None:
    """Before anything is written."""
    stranger.says("/v1/jobs/j/artifacts", artifact(name, b"x"))
    with Client(stranger.url, "prn_x") as client, pytest.raises(ServiceError, match="refused as a file name"):
        client.download("j", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("body", [b"wrong", b"more than was said"])
def test_content_that_is_not_what_was_announced_is_not_kept(stranger: Stranger, tmp_path: Path, body: bytes) -> None:
    """However it differs; nothing is left of it."""
    stranger.says("/v1/jobs/j/artifacts", artifact("a.bin", b"right"))
    stranger.says("/v1/jobs/j/artifacts/a.bin", body)
    with Client(stranger.url, "prn_x", patience=1) as client, pytest.raises(ServiceError, match="sha256"):
        client.download("j", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_range_that_is_not_understood_is_skipped(stranger: Stranger, tmp_path: Path) -> None:
    """Something on the way answers with all of it: what is there already is not written twice."""
    stranger.says("/v1/jobs/j/artifacts", artifact("a.bin", b"0123456789"))
    stranger.says("/v1/jobs/j/artifacts/a.bin", b"0123456789")
    (tmp_path / "a.bin.part").write_bytes(b"0123")
    with Client(stranger.url, "prn_x") as client:
        client.download("j", tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == b"0123456789"
    assert stranger.asked[-1][1]["Range"] == "bytes=4-"


def test_the_key_is_sent_to_no_other_host(stranger: Stranger) -> None:
    """A redirect is an error that says where to."""
    other = Stranger()
    stranger.says("/v1/jobs/j", b"", 307, Location=f"{other.url}/v1/jobs/j")
    with Client(stranger.url, "prn_secret") as client, pytest.raises(ApiError, match=other.url):
        client.get("j")
    other.close()
    assert other.asked == []
    assert stranger.asked[0][1]["Authorization"] == "Bearer prn_secret"


def test_a_proxy_of_the_environment_does_not_see_the_key_of_this_host(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTP_PROXY is for other hosts."""
    other = Stranger()
    monkeypatch.setenv("HTTP_PROXY", other.url)
    monkeypatch.setenv("http_proxy", other.url)
    stranger.says("/readyz", {})
    with Client(stranger.url, "prn_secret") as client:
        client.check()
    other.close()
    assert (len(stranger.asked), other.asked) == (1, [])


def test_a_busy_service_is_asked_again_when_it_says(stranger: Stranger) -> None:
    """Retry-After is a lower bound; without patience the problem is raised."""
    problem = {"type": "urn:llmprune:problem:database-away", "detail": "The database does not answer."}
    stranger.says("/v1/methods", problem, 503, Retry_After="1")
    stranger.says("/v1/methods", {"data": [{"name": "wanda"}]})
    began = time.monotonic()
    with Client(stranger.url) as client:
        assert client.methods() == ({"name": "wanda"},)
    assert 1 <= time.monotonic() - began < 15
    stranger.answers["/v1/methods"] = [(503, {"Retry-After": "90"}, json.dumps(problem).encode())]
    with Client(stranger.url, patience=60) as client, pytest.raises(ApiError, match="database does not answer") as away:
        client.methods()
    assert (away.value.code, away.value.retry_after, away.value.exit_code) == ("database-away", 90.0, 1)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"data": 1}', b"\xff"])
def test_what_is_no_llmprune_is_said(stranger: Stranger, body: bytes) -> None:
    """Rather than a traceback of a parser."""
    stranger.says("/v1/jobs", body)
    with Client(stranger.url) as client, pytest.raises(ServiceError, match="not one of llmprune's"):
        next(client.list())


# Where, and with which key --------------------------------------------------------------------------------------------


def test_nothing_that_answers_is_said_with_the_remedy() -> None:
    """After the patience is over; a host that refuses is not waited for without any."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}", patience=0.5) as client:
        began = time.monotonic()
        with pytest.raises(ServiceUnreachable, match="llmprune serve") as error:
            client.get("j")
        assert 0.1 < time.monotonic() - began < 15
        assert error.value.exit_code == 2
        with pytest.raises(ServiceUnreachable):
            client.check()


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://a", "http://", "/v1"])
def test_what_is_no_url_is_refused(url: str) -> None:
    """At once, and by its name."""
    with pytest.raises(ConfigError, match="is not the URL of a service"):
        Client(url)


def test_where_the_key_comes_from(stranger: Stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument, then LLMPRUNE_API_KEY, then the file of this host, for this host alone."""
    stranger.says("/readyz", {})
    monkeypatch.setenv("LLMPRUNE_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("LLMPRUNE_API_KEY", raising=False)

    def sent(key: str | None = None) -> str | None:
        with Client(stranger.url, key) as client:
            client.check()
        return stranger.asked[-1][1].get("Authorization")

    assert sent() is None
    (tmp_path / "admin.key").write_text("prn_file\n")
    assert sent() == "Bearer prn_file"
    monkeypatch.setenv("LLMPRUNE_API_KEY", "prn_environment")
    assert sent() == "Bearer prn_environment"
    assert sent("prn_argument") == "Bearer prn_argument"
    with pytest.raises(ConfigError, match="no key has"):
        sent("prn_a b")
    monkeypatch.delenv("LLMPRUNE_API_KEY")
    with Client("http://service.test") as elsewhere:
        assert "authorization" not in elsewhere._transport._http.headers


# Without HTTP ---------------------------------------------------------------------------------------------------------


def test_enqueue_writes_to_the_queue(database_url: str) -> None:
    """On both databases; the same key is the same job."""
    fields = {"method": "magnitude", "sparsity": 0.25}
    own: dict[str, Any] = {"priority": 9, "metadata": {"a": "b"}, "timeout_s": 60, "tenant": "team", "idempotency_key": "k"}
    job_id = enqueue(database_url, fields, **own)
    assert enqueue(database_url, fields, **own) == job_id

    other = enqueue(database_url, PruneConfig(seed=4))
    engine = make_engine(database_url)
    jobs = Jobs(engine, None, Settings())  # type: ignore[arg-type]
    row = jobs.get("team", job_id)
    assert (row.status, row.config, row.priority, row.metadata, row.timeout_s) == ("queued", fields, 9, {"a": "b"}, 60)
    assert [event.type for event in jobs.events("team", job_id)] == ["job.queued"]
    assert jobs.get("default", other).config == {"seed": 4}
    engine.dispose()


def test_enqueue_refuses_what_no_worker_would_take(sqlite_url: str) -> None:
    """Bad configs, and a key that was used."""
    with pytest.raises(ConfigError, match="sparsity"):
        enqueue(sqlite_url, {"sparsity": 2})
    with pytest.raises(ConfigError, match="unknown field 'colour'"):
        enqueue(sqlite_url, {"colour": "red"})
    enqueue(sqlite_url, idempotency_key="k")
    with pytest.raises(ApiError) as reused:
        enqueue(sqlite_url, {"seed": 1}, idempotency_key="k")
    assert reused.value.code == "idempotency-key-reused"


def test_enqueue_says_what_is_wrong_with_a_database(tmp_path: Path) -> None:
    """And makes none where there is none."""
    missing = tmp_path / "missing.db"
    with pytest.raises(ConfigError, match="llmprune migrate"):
        enqueue(f"sqlite:///{missing}")
    assert not missing.exists()
    missing.touch()
    with pytest.raises(ConfigError, match="llmprune migrate"):
        enqueue(f"sqlite:///{missing}")
    with pytest.raises(ConfigError, match="no database URL"):
        enqueue("nonsense")
    with pytest.raises(ServiceUnreachable, match=r"postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/x does not answer"):
        enqueue("postgresql://me:secret@127.0.0.1:1/x")
