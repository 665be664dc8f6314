"""Keys, scopes, tenants, sessions: who gets in, and what stays out of sight."""

from __future__ import annotations

import stat
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from api_server import JOB, Service, bearer, problem

from llmprune_service import tables
from llmprune_service.api import auth

ORIGIN = "http://127.0.0.1"


def test_the_first_start_writes_one_key_for_its_owner_only(make_service: Callable[..., Service]) -> None:
    """Mode 0600, works, is an administrator's; a second start makes no other."""
    service = make_service()
    file = service.settings.key_file
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    first = file.read_text()
    again = make_service()
    assert file.read_text() == first
    keys = again.get("/v1/api-keys").json()["data"]
    assert [key["scopes"] for key in keys] == [["read", "write", "admin"]]


def test_only_the_digest_of_a_key_is_stored(service: Service) -> None:
    """Nothing in the row gives the key away."""
    key = service.key("read")
    with service.engine.connect() as connection:
        rows = connection.execute(sa.select(tables.api_keys)).all()
    assert len(rows) == 2
    assert key.rpartition("_")[2] not in repr(rows)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer prn_nonsense"},
        {"Authorization": "Basic YTpi"},
        {"Cookie": "llmprune_session=made-up"},
    ],
)
def test_without_a_valid_key_nobody_gets_in(service: Service, headers: dict[str, str]) -> None:
    """401 with a challenge."""
    answer = service.client.get("/v1/jobs", headers=headers)
    problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith("Bearer")


def test_a_right_id_with_a_wrong_secret_is_refused(service: Service) -> None:
    """The id part of a key is no key."""
    key = service.key("read")
    wrong = key[:-43] + "A" * 43
    assert service.get("/v1/jobs", key=key).status_code == 200
    problem(service.get("/v1/jobs", key=wrong), 401)


def test_an_expired_key_is_refused(service: Service) -> None:
    """Keys may have an end."""
    key = service.key("read", expires_in_s=100)
    with service.engine.begin() as connection:
        connection.execute(sa.update(tables.api_keys).where(tables.api_keys.c.expires_at.is_not(None)).values(expires_at=1.0))
    problem(service.get("/v1/jobs", key=key), 401)


def test_a_revoked_key_is_refused_once_it_is_forgotten(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """After at most the seconds a verified key is remembered, which are under five."""
    assert auth._REMEMBERED_SECONDS < 5
    monkeypatch.setattr(auth, "_REMEMBERED_SECONDS", 0.0)
    made = service.post("/v1/api-keys", json={"name": "short", "scopes": ["read"]}).json()
    assert service.get("/v1/jobs", key=made["key"]).status_code == 200
    assert service.request("DELETE", f"/v1/api-keys/{made['id']}").status_code == 204
    problem(service.get("/v1/jobs", key=made["key"]), 401)


def test_a_verified_key_is_remembered_and_its_use_noted(service: Service) -> None:
    """A second request does not ask the database; last_used_at is set."""
    key = service.key("read")
    service.get("/v1/jobs", key=key)
    credentials: auth.Credentials = service.app.state.credentials
    assert credentials.remembered(key) is not None
    used = {entry["id"]: entry["last_used_at"] for entry in service.get("/v1/api-keys").json()["data"]}
    assert used[f"key_{key.split('_')[1]}"] is not None


@pytest.mark.parametrize(
    ("scopes", "method", "path", "missing"),
    [
        (("read",), "POST", "/v1/jobs", "write"),
        (("write",), "GET", "/v1/jobs", "read"),
        (("read", "write"), "GET", "/v1/workers", "admin"),
        (("read", "write"), "GET", "/metrics", "admin"),
    ],
)
def test_a_missing_scope_is_named(service: Service, scopes: tuple[str, ...], method: str, path: str, missing: str) -> None:
    """403, not 401: the key is known."""
    body = {"json": JOB} if method == "POST" else {}
    answer = service.request(method, path, key=service.key(*scopes), **body)
    assert repr(missing) in problem(answer, 403, "missing-scope")["detail"]


def test_what_belongs_to_another_tenant_is_not_there(service: Service) -> None:
    """Every route that names a job answers 404, word for word as for a job that never was."""
    job_id = service.submit(tenant="acme")
    other = service.key("read", "write", tenant="rival")
    never = job_id[:-4] + "zzzz"
    routes = [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("POST", "/resume"), ("POST", "/retry")]
    routes += [("GET", path) for path in ("/events", "/checkpoints", "/report", "/report.html", "/artifacts", "/artifacts/a")]
    for method, path in routes:
        details = [problem(service.request(method, f"/v1/jobs/{id}{path}", key=other), 404)["detail"] for id in (job_id, never)]
        assert details[0] == details[1], path
    patch = service.request("PATCH", f"/v1/jobs/{job_id}", key=other, json={"priority": 9})
    problem(patch, 404)
    assert service.get("/v1/jobs", key=other).json()["data"] == []
    stream = service.get(f"/v1/jobs/{job_id}/events", key=other, headers={"Accept": "text/event-stream"})
    problem(stream, 404)
    assert service.jobs.get("acme", job_id).status == "queued"


def test_an_administrator_sees_all_tenants(service: Service) -> None:
    """And a tenant only its own."""
    mine, theirs = service.submit(), service.submit(tenant="acme")
    assert {job["id"] for job in service.get("/v1/jobs").json()["data"]} == {mine, theirs}
    seen = service.get("/v1/jobs", key=service.key("read", tenant="acme")).json()["data"]
    assert [job["id"] for job in seen] == [theirs]


def test_a_key_in_the_query_is_refused(service: Service) -> None:
    """It would end up in logs; even a right one is not accepted."""
    key = service.key("read")
    problem(service.client.get(f"/v1/jobs?api_key={key}"), 400, "key-in-query")
    problem(service.get(f"/v1/jobs?q={key}"), 400, "key-in-query")


def test_keys_are_made_listed_and_revoked(service: Service) -> None:
    """The key is shown once; the last administrator's stays."""
    made = service.post("/v1/api-keys", json={"name": "ci", "tenant": "acme", "expires_in_s": 60})
    assert made.status_code == 201
    key = made.json()
    assert key["key"].startswith("prn_")
    assert key["expires_at"] == pytest.approx(key["created_at"] + 60, abs=1)
    listed = service.get("/v1/api-keys").json()["data"]
    assert [entry["key"] for entry in listed] == [None, None]
    assert service.request("DELETE", f"/v1/api-keys/{key['id']}").status_code == 204
    problem(service.request("DELETE", f"/v1/api-keys/{key['id']}"), 404)
    problem(service.request("DELETE", f"/v1/api-keys/{listed[0]['id']}"), 409, "last-admin")


def test_a_login_code_opens_one_session(service: Service) -> None:
    """HttpOnly, SameSite=Strict; used up by the first visit."""
    code = auth.login_code(service.engine, service.settings)
    answer = service.client.get(f"/login?code={code}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and "Path=/" in cookie
    assert service.client.get("/v1/jobs").status_code == 200
    assert auth.redeem(service.engine, code) is None


def test_codes_and_sessions_end(service: Service) -> None:
    """An old code opens nothing, and a session ends with its time or its key."""
    code = auth.login_code(service.engine, service.settings)
    cookie = auth.redeem(service.engine, auth.login_code(service.engine, service.settings))
    assert cookie is not None
    credentials = auth.Credentials(service.engine)
    assert credentials.verify(cookie, cookie=True) is not None
    assert credentials.verify(code, cookie=True) is None, "a code is no session"
    with service.engine.begin() as connection:
        connection.execute(sa.update(tables.sessions).values(expires_at=1.0))
    assert auth.redeem(service.engine, code) is None
    assert credentials.verify(cookie, cookie=True) is None


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 202),
        ({"Origin": ORIGIN}, 202),
    ],
)
def test_a_cookie_changes_nothing_for_another_sites_page(service: Service, headers: dict[str, str], status: int) -> None:
    """Browsers send cookies by themselves, so they must say whose page asks."""
    cookie = auth.redeem(service.engine, auth.login_code(service.engine, service.settings))
    answer = service.client.post("/v1/jobs", json=JOB, headers=headers | {"Cookie": f"{auth.COOKIE}={cookie}"})
    assert answer.status_code == status
    assert len(service.get("/v1/jobs").json()["data"]) == (status == 202)


def test_without_keys_everybody_is_the_administrator_but_no_other_sites_page(make_service: Callable[..., Service]) -> None:
    """LLMPRUNE_AUTH=false; a page in the user's browser still cannot submit."""
    service = make_service(auth=False)
    assert not service.settings.key_file.exists()
    assert service.client.post("/v1/jobs", json=JOB).status_code == 202
    assert service.client.get("/metrics").status_code == 200
    problem(service.client.post("/v1/jobs", json=JOB, headers={"Origin": "http://evil.example"}), 403, "cross-site")


def test_a_cookie_does_not_help_a_wrong_key(service: Service) -> None:
    """What the header says counts."""
    cookie = auth.redeem(service.engine, auth.login_code(service.engine, service.settings))
    headers = bearer("prn_wrong") | {"Cookie": f"{auth.COOKIE}={cookie}"}
    problem(service.client.get("/v1/jobs", headers=headers), 401)
