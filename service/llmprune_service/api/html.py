"""Pages as HTML: the templates' environment, their headers, and errors for people."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llmprune._version import __version__
from llmprune.io.render import count, duration, percent, size, small
from llmprune_service.api.auth import COOKIE, Principal
from llmprune_service.api.page_text import describe, stage_label, target
from llmprune_service.problems import Problem

FOLDER = Path(__file__).parent
# Without a referrer at all, browsers send "Origin: null" with a form, and it would be taken for another site's.
_HEADERS = {"Referrer-Policy": "same-origin", "Vary": "Accept, Cookie"}


def iso(time: float) -> str:
    """Unix seconds as ISO 8601 in UTC."""
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds")


def ago(seconds: float) -> str:
    """An age in its largest unit: ``3 min ago``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"


def clock(seconds: float) -> str:
    """Time since the submission: ``2:05`` or ``1:02:05``."""
    hours, rest = divmod(max(0, int(seconds)), 3600)
    minutes = f"{rest // 60:02d}" if hours else str(rest // 60)
    return f"{f'{hours}:' if hours else ''}{minutes}:{rest % 60:02d}"


def _environment() -> Environment:
    env = Environment(loader=FileSystemLoader(FOLDER / "templates"), autoescape=True, undefined=StrictUndefined)
    env.trim_blocks = env.lstrip_blocks = True
    for function in (ago, clock, count, describe, duration, iso, percent, size, small, stage_label, target):
        env.filters[function.__name__] = function
    env.globals["version"] = __version__
    return env


_env = _environment()


def render(
    request: Request, name: str, principal: Principal | None, *, status: int = 200, csp: str | None = None, **values: Any
) -> HTMLResponse:
    """A page; ``csp`` replaces the policy that every answer has."""
    signed_in = COOKIE in request.cookies and request.app.state.settings.auth
    text = _env.get_template(name).render(principal=principal, signed_in=signed_in, **{"here": None, **values})
    return HTMLResponse(text, status, headers=_HEADERS | ({"Content-Security-Policy": csp} if csp else {}))


def error_page(request: Request, problem: Problem) -> Response:
    """A problem for people; who is not signed in is asked to."""
    if problem.status == HTTPStatus.UNAUTHORIZED:
        return RedirectResponse("/login", 303)
    title = HTTPStatus(problem.status).phrase
    answer = render(request, "error.html", None, status=problem.status, problem=problem, title=title)
    answer.headers.update(problem.headers)
    return answer


class PageRoute(APIRoute):
    """A route whose problems are pages where the client takes HTML."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """The framework's handler with problems caught."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except Problem as problem:
                if "text/html" not in request.headers.get("accept", ""):
                    raise
                return error_page(request, problem)

        return handle
