"""The outermost layer: request ids, what is refused before anything reads it, security headers, one log line a request."""

from __future__ import annotations

import ipaddress
import logging
import re
import time
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmprune_service import telemetry
from llmprune_service.api import errors
from llmprune_service.ids import JOB_ID, new_id
from llmprune_service.problems import Problem
from llmprune_service.settings import Settings

log = logging.getLogger(__name__)
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY_IN_QUERY = re.compile(rb"prn_[a-z0-9]{26}(_|%5f)", re.IGNORECASE)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Guard:
    """Wraps the whole application, the framework's own error handling included."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._max_body_bytes = settings.max_body_bytes
        self._hosts = _LOOPBACK | {settings.host.lower(), *(host.lower() for host in settings.allowed_hosts)}
        self._any_address = settings.host in ("0.0.0.0", "::")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        identifier = asked if _REQUEST_ID.fullmatch(asked) else new_id("req")
        job = JOB_ID.search(scope["path"])
        tokens = telemetry.request_id.set(identifier), telemetry.job_id.set(job[0] if job else None)
        began, status = time.perf_counter(), 0

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _harden(MutableHeaders(scope=message), identifier)
            await send(message)

        try:
            refused = self._refusal(scope, headers)
            await (errors.respond(refused) if refused else self._app)(scope, receive, send_guarded)
        except ClientDisconnect:
            pass
        except Exception:
            log.exception("the request failed")  # it was answered with 500, or cut off in the middle
        finally:
            milliseconds = round((time.perf_counter() - began) * 1000, 1)
            fields = {"method": scope["method"], "path": quote(scope["path"]), "status": status, "ms": milliseconds}
            level = logging.DEBUG if scope["path"].startswith(telemetry.PROBES) else logging.INFO
            log.log(level, "request", extra=fields)
            telemetry.request_id.reset(tokens[0])
            telemetry.job_id.reset(tokens[1])

    def _refusal(self, scope: Scope, headers: Headers) -> Problem | None:
        """Why a request is not even looked at, or None."""
        if not self._is_ours(headers.get("host", "")):
            return Problem(
                421, "wrong-host", "This service does not go by the name in the Host header. Use its address, or let its "
                "operator add the name to LLMPRUNE_ALLOWED_HOSTS.",
            )  # fmt: skip
        if _KEY_IN_QUERY.search(scope.get("query_string", b"")):
            return Problem(
                400, "key-in-query", "An API key in a URL ends up in logs. Send it as 'Authorization: Bearer KEY', and "
                "replace this one.",
            )  # fmt: skip
        length = headers.get("content-length", "0")
        if headers.get("content-encoding", "identity").lower() != "identity":
            return Problem(415, "compressed-body", "Compressed request bodies are not accepted; send the body as it is.")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return Problem(
                413, "body-too-large", f"The request body has {length} bytes; at most {self._max_body_bytes} are read."
            )
        has_body = length != "0" or "transfer-encoding" in headers
        if has_body and scope["path"].startswith("/v1/") and not _is_json(headers.get("content-type", "")):
            return Problem(415, "not-json", "Send the body with 'Content-Type: application/json'.")
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a browser may know us by that name: otherwise any page could, by a name it points at this machine."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return "*" in self._hosts or name in self._hosts or (self._any_address and _is_address(name))


def _is_address(name: str) -> bool:
    """Whether it is an IP address rather than a name somebody else's DNS can point here."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _harden(headers: MutableHeaders, identifier: str) -> None:
    headers["X-Request-ID"] = identifier
    for name, value in _HEADERS.items():
        headers.setdefault(name, value)
    if "cache-control" not in headers and "etag" not in headers:
        headers["Cache-Control"] = "no-store"
