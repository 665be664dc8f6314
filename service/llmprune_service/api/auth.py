"""Who asks, and what they may do: API keys for programs, a session cookie for browsers.

Keys look like ``prn_ID_SECRET``; only their SHA-256 is stored. Verified ones are remembered for a few seconds, so that a
revoked key is refused after at most that long.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

import sqlalchemy as sa
from fastapi import Depends, Request, Response
from fastapi.security import APIKeyCookie, HTTPBearer
from starlette.concurrency import run_in_threadpool

from llmprune_service.database import now
from llmprune_service.ids import new_id
from llmprune_service.jobs import Row
from llmprune_service.problems import Problem, not_found
from llmprune_service.schemas import ApiKeyRequest, ApiKeyView
from llmprune_service.settings import Settings
from llmprune_service.tables import api_keys, sessions

COOKIE = "llmprune_session"
SESSION_SECONDS = 7 * 86400
_CODE_SECONDS = 600
_REMEMBERED_SECONDS = 3.0
_TOUCH_SECONDS = 60
_MAX_REMEMBERED = 10_000
_KEY = re.compile(r"prn_([0-9a-z]{26})_[\w-]{43}", re.ASCII)
_FIRST_KEY_LOCK = 7236402


@dataclass(frozen=True)
class Principal:
    """Who a request comes from."""

    key_id: str
    tenant: str
    scopes: frozenset[str]

    @property
    def sees(self) -> str | None:
        """The tenant whose jobs it may see; None is all of them, for administrators."""
        return None if "admin" in self.scopes else self.tenant

    @property
    def may_write(self) -> bool:
        """Whether it may submit and change jobs."""
        return bool({"write", "admin"} & self.scopes)

    def require(self, scope: str) -> None:
        """Raise Problem 403 without the scope; ``admin`` holds the others."""
        if not {scope, "admin"} & self.scopes:
            raise Problem(403, "missing-scope", f"This key lacks the scope {scope!r}; use one that has it.")


LOCAL = Principal("local", "default", frozenset({"read", "write", "admin"}))


# Keys -----------------------------------------------------------------------------------------------------------------


def create_key(engine: sa.Engine, request: ApiKeyRequest) -> ApiKeyView:
    """Make a key; the answer is the only place where it can be read."""
    with engine.begin() as connection:
        row, key = _insert_key(connection, request)
    return key_view(row).model_copy(update={"key": key})


def list_keys(engine: sa.Engine) -> list[ApiKeyView]:
    """All keys, oldest first."""
    with engine.connect() as connection:
        return [key_view(row) for row in connection.execute(sa.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id))]


def delete_key(engine: sa.Engine, key_id: str) -> None:
    """Revoke a key, and the browser sessions it opened; raises Problem 404, and 409 for the last administrator."""
    with engine.begin() as connection:
        rows = connection.execute(sa.select(api_keys).where(_valid(now(engine)))).all()
        admins = {row.id for row in rows if "admin" in row.scopes}
        if admins == {key_id}:
            raise Problem(409, "last-admin", "This is the last key with the scope 'admin'; make another one first.")
        if not connection.execute(sa.delete(api_keys).where(api_keys.c.id == key_id)).rowcount:
            raise not_found("API key")


def ensure_first_key(engine: sa.Engine, settings: Settings) -> None:
    """While there is no key at all, make one for the administrator and write it to ``settings.key_file``, mode 0600."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # of several first starts one makes the key
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_FIRST_KEY_LOCK)))
        if connection.execute(sa.select(sa.func.count()).select_from(api_keys)).scalar_one():
            return
        _, key = _insert_key(connection, ApiKeyRequest(name="first", scopes=("read", "write", "admin")))
        settings.key_file.parent.mkdir(parents=True, exist_ok=True)
        settings.key_file.unlink(missing_ok=True)
        descriptor = os.open(settings.key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(key + "\n")


def key_view(row: Row) -> ApiKeyView:
    """A key as administrators see it."""
    return ApiKeyView(
        id=row.id, tenant=row.tenant, name=row.name, scopes=tuple(row.scopes), created_at=row.created_at,
        expires_at=row.expires_at, last_used_at=row.last_used_at,
    )  # fmt: skip


def _insert_key(connection: sa.Connection, request: ApiKeyRequest) -> tuple[Row, str]:
    key_id = new_id("key")
    key = f"prn_{key_id.removeprefix('key_')}_{secrets.token_urlsafe(32)}"
    clock = now(connection)
    values = {
        "id": key_id, "tenant": request.tenant, "name": request.name, "sha256": _sha256(key),
        "scopes": list(dict.fromkeys(request.scopes)), "created_at": clock,
        "expires_at": clock + request.expires_in_s if request.expires_in_s else None,
    }  # fmt: skip
    return connection.execute(sa.insert(api_keys).values(values).returning(api_keys)).one(), key


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _valid(clock: sa.ColumnElement[float]) -> sa.ColumnElement[bool]:
    return api_keys.c.expires_at.is_(None) | (api_keys.c.expires_at > clock)


# Sessions -------------------------------------------------------------------------------------------------------------


def login_code(engine: sa.Engine, settings: Settings) -> str:
    """A code that opens a browser session of an administrator of ``default``: once, within ten minutes.

    Raises:
        Problem: 409 where no such key is left.
    """
    ensure_first_key(engine, settings)
    clock = now(engine)
    with engine.begin() as connection:
        default = (api_keys.c.tenant == "default", _valid(clock))
        rows = connection.execute(sa.select(api_keys).where(*default).order_by(api_keys.c.created_at)).all()
        key_id = next((row.id for row in rows if "admin" in row.scopes), None)
        if key_id is None:
            raise Problem(409, "no-admin", "There is no key with the scope 'admin' in the tenant 'default'.")
        return _insert_session(connection, "code", key_id, _CODE_SECONDS)


def redeem(engine: sa.Engine, code: str) -> str | None:
    """Turn a login code into the value of a session cookie; None for a code that is unknown, used or too old."""
    clock = now(engine)
    with engine.begin() as connection:
        connection.execute(sa.delete(sessions).where(sessions.c.expires_at <= clock))
        used = sa.delete(sessions).where(sessions.c.sha256 == _sha256(code), sessions.c.kind == "code")
        key_id = connection.execute(used.returning(sessions.c.key_id)).scalar()
        return None if key_id is None else _insert_session(connection, "session", key_id, SESSION_SECONDS)


def open_session(engine: sa.Engine, key: str) -> str | None:
    """The value of a session cookie for who types an API key into a form; None for a key that is not valid."""
    with engine.begin() as connection:
        row = _find_key(connection, key)
        return None if row is None else _insert_session(connection, "session", row.id, SESSION_SECONDS)


def close_session(engine: sa.Engine, cookie: str) -> None:
    """Forget a session."""
    with engine.begin() as connection:
        connection.execute(sa.delete(sessions).where(sessions.c.sha256 == _sha256(cookie)))


def _insert_session(connection: sa.Connection, kind: str, key_id: str, seconds: int) -> str:
    secret = secrets.token_urlsafe(32)
    values = {"sha256": _sha256(secret), "kind": kind, "key_id": key_id, "expires_at": now(connection) + seconds}
    connection.execute(sa.insert(sessions).values(values))
    return secret


# Requests -------------------------------------------------------------------------------------------------------------


class Credentials:
    """Verifies keys and cookies against the database, and remembers the good ones for a few seconds."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._known: dict[str, tuple[Principal, float]] = {}

    def remembered(self, secret: str) -> Principal | None:
        """Whom a secret was found to belong to a moment ago."""
        principal, until = self._known.get(_sha256(secret), (None, 0.0))
        return principal if until > time.monotonic() else None

    def verify(self, secret: str, *, cookie: bool) -> Principal | None:
        """Whom a key or a cookie belongs to; None if it is wrong, revoked or expired."""
        find = _find_session if cookie else _find_key
        with self._engine.begin() as connection:
            row = find(connection, secret)
            if row is None:
                return None
            if row.stale:
                touched = sa.update(api_keys).where(api_keys.c.id == row.id).values(last_used_at=now(connection))
                connection.execute(touched)
        principal = Principal(row.id, row.tenant, frozenset(row.scopes))
        if len(self._known) >= _MAX_REMEMBERED:
            self._known.clear()
        self._known[_sha256(secret)] = principal, time.monotonic() + _REMEMBERED_SECONDS
        return principal


def _find_key(connection: sa.Connection, key: str) -> Row | None:
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    row = connection.execute(_select_keys(now(connection)).where(api_keys.c.id == f"key_{match[1]}")).first()
    return row if row is not None and hmac.compare_digest(row.sha256, _sha256(key)) else None


def _find_session(connection: sa.Connection, cookie: str) -> Row | None:
    clock = now(connection)
    current = (sessions.c.sha256 == _sha256(cookie), sessions.c.kind == "session", sessions.c.expires_at > clock)
    return connection.execute(_select_keys(clock).join(sessions, sessions.c.key_id == api_keys.c.id).where(*current)).first()


def _select_keys(clock: sa.ColumnElement[float]) -> sa.Select[Any]:
    stale = (sa.func.coalesce(api_keys.c.last_used_at, 0.0) < clock - _TOUCH_SECONDS).label("stale")
    return sa.select(api_keys, stale).where(_valid(clock))


_bearer = HTTPBearer(auto_error=False, scheme_name="key", description="An API key, prn_...")
_cookie = APIKeyCookie(name=COOKIE, auto_error=False, scheme_name="session", description="A browser's session.")


async def identify(request: Request) -> Principal | None:
    """Whom a request comes from; None where it brings nothing valid. Raises Problem 403 for another site's request."""
    if not request.app.state.settings.auth:
        check_origin(request, needed=False)
        return LOCAL
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    cookie = request.cookies.get(COOKIE)
    if scheme:
        return await _verify(request, key.strip(), cookie=False) if scheme.lower() == "bearer" else None
    if not cookie:
        return None
    check_origin(request, needed=True)
    return await _verify(request, cookie, cookie=True)


async def _verify(request: Request, secret: str, *, cookie: bool) -> Principal | None:
    credentials: Credentials = request.app.state.credentials
    return credentials.remembered(secret) or await run_in_threadpool(credentials.verify, secret, cookie=cookie)


def check_origin(request: Request, *, needed: bool) -> None:
    """Refuse what another site's page makes a browser send; ``needed``: a browser must say where it comes from."""
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        same = site in ("same-origin", "none")
    elif origin is not None:
        same = urlsplit(origin).netloc == request.headers.get("host")
    else:
        same = not needed
    if not same:
        raise Problem(403, "cross-site", "Requests that change something must come from this service's own pages.")


async def authenticate(
    request: Request, _: Annotated[Any, Depends(_bearer)], __: Annotated[Any, Depends(_cookie)]
) -> Principal:
    """Whom the request comes from; raises Problem 401."""
    principal = await identify(request)
    if principal is None:
        raise Problem(
            401, "unauthorized", "A valid API key is needed: 'Authorization: Bearer prn_...'. The first one is in admin.key in "
            "the data directory.", headers={"WWW-Authenticate": 'Bearer realm="llmprune"'},
        )  # fmt: skip
    return principal


def _needs(scope: str) -> Callable[[Principal], Awaitable[Principal]]:
    async def allowed(principal: Annotated[Principal, Depends(authenticate)]) -> Principal:
        principal.require(scope)
        return principal

    return allowed


reader = Annotated[Principal, Depends(_needs("read"))]
writer = Annotated[Principal, Depends(_needs("write"))]
admin = Annotated[Principal, Depends(_needs("admin"))]


def with_session(response: Response, request: Request, cookie: str) -> Response:
    """Add a session's cookie to an answer."""
    secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, cookie, max_age=SESSION_SECONDS, path="/", httponly=True, samesite="strict", secure=secure)
    return response
