"""Every error as ``application/problem+json``: what clients sent wrong by field, and nothing of the inside."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import DataError, DBAPIError, InterfaceError, OperationalError
from starlette.exceptions import HTTPException

from llmprune.errors import UserError
from llmprune_service import telemetry
from llmprune_service.problems import Problem
from llmprune_service.schemas import JobRequest

log = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
_CODES = {400: "bad-request", 404: "not-found", 405: "method-not-allowed", 413: "body-too-large"}
_DETAILS = {
    404: "There is nothing here; /openapi.json lists what there is.",
    405: "This method is not allowed here; the Allow header names those that are.",
    413: "The request body is too large.",
}
_WORD = re.compile(r"[a-z_]+")


def install(app: FastAPI) -> None:
    """Register the handlers."""
    handlers: Mapping[Any, Any] = {
        Problem: _problem,
        RequestValidationError: _invalid,
        HTTPException: _http,
        UserError: _user_error,
        UnicodeEncodeError: _not_storable,
        OverflowError: _not_storable,
        DataError: _not_storable,
        OperationalError: _database_away,
        InterfaceError: _database_away,
        sa.exc.TimeoutError: _database_away,
        DBAPIError: _database_error,
        Exception: _unexpected,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def respond(problem: Problem) -> JSONResponse:
    """The problem as an answer; ``instance`` holds the request id, which the log has too."""
    document = problem.document() | {"instance": f"urn:llmprune:request:{telemetry.request_id.get()}"}
    return JSONResponse(document, problem.status, headers=problem.headers, media_type=MEDIA_TYPE)


def pointer(location: Sequence[int | str]) -> str:
    """JSON Pointer (RFC 6901) of a place in the body."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in location)


async def _problem(_: Request, error: Problem) -> JSONResponse:
    return respond(error)


async def _http(request: Request, error: HTTPException) -> JSONResponse:
    status = error.status_code
    detail = _DETAILS.get(status) or str(error.detail)
    headers = dict(error.headers or {})
    if status == 405 and (methods := _methods(request)):
        headers["Allow"] = ", ".join(methods)
    return respond(Problem(status, _CODES.get(status, "http"), detail, headers=headers))


def _methods(request: Request) -> list[str]:
    """All methods of a path: the framework's Allow header names those of one of its routes."""
    path = getattr(request.scope.get("route"), "path_format", None)
    return sorted(method.upper() for method in request.app.openapi()["paths"].get(path, {}))


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    items = error.errors()
    if items[0]["type"] == "json_invalid":
        at = f"{items[0]['ctx']['error']} at character {items[0]['loc'][-1]}"
        return respond(Problem(400, "not-json", f"The body is not JSON: {at}."))
    problems = [_describe(item, request) for item in items]
    first = problems[0]
    name = first.get("pointer") or first.get("parameter") or "the body"
    more = f" ({len(problems) - 1} more below)" if len(problems) > 1 else ""
    return respond(Problem(422, "invalid", f"{name}: {first['detail']}{more}.", errors=problems))


def _describe(item: Mapping[str, Any], request: Request) -> dict[str, str]:
    """One of pydantic's errors: a pointer into the body, or the name of a parameter."""
    where, *rest = item["loc"]
    detail = str(item["msg"]).removeprefix("Value error, ")
    if where != "body":
        return {"in": str(where), "parameter": str(rest[0]) if rest else "", "detail": detail}
    if item["type"] == "extra_forbidden":
        detail = _unknown(str(rest[-1]), _fields(request, rest[:-1]))
    elif item["type"] == "model_attributes_type" and not rest:
        detail = "Input should be a JSON object"
    if rest and rest[-1] == "[key]":
        rest, detail = rest[:-1], f"Key: {detail}"
    return {"pointer": pointer(rest), "detail": detail}


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"There is no such field.{hint} Known fields: {', '.join(known)}"


def _fields(request: Request, path: Sequence[int | str]) -> list[str]:
    """Names of the fields of the model at a place in this route's body."""
    field = getattr(request.scope.get("route"), "body_field", None)
    model: Any = field.field_info.annotation if field else None
    for part in path:
        info = getattr(model, "model_fields", {}).get(part)
        model = next(_models(info.annotation), None) if info else None
    return list(getattr(model, "model_fields", ()))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield kind


async def _user_error(_: Request, error: UserError) -> JSONResponse:
    """The library's own validators: the first word of the message that is a field names the place."""
    message = " ".join(str(error).split())
    field = next((word for word in _WORD.findall(message) if word in JobRequest.model_fields), None)
    errors = [{"pointer": f"/{field}", "detail": message}] if field else []
    return respond(Problem(422, "invalid", message, errors=errors))


async def _not_storable(_: Request, error: Exception) -> JSONResponse:
    log.info("not storable: %s", type(error).__name__)
    detail = "A value cannot be stored; leave out NUL characters, lone surrogates and astronomical numbers."
    return respond(Problem(422, "invalid", detail))


async def _database_away(_: Request, error: Exception) -> JSONResponse:
    log.warning("the database does not answer: %s", " ".join(str(getattr(error, "orig", error)).split()))
    detail = "The database does not answer. Try again; a submission with the same Idempotency-Key is not made twice."
    return respond(Problem(503, "database-away", detail, headers={"Retry-After": "5"}))


async def _database_error(request: Request, error: DBAPIError) -> JSONResponse:
    if error.connection_invalidated:
        return await _database_away(request, error)
    log.error("a statement failed", exc_info=error)
    return _internal()


async def _unexpected(_: Request, __: Exception) -> JSONResponse:
    return _internal()


def _internal() -> JSONResponse:
    identifier = telemetry.request_id.get()
    detail = f"The service failed. If it happens again, tell its operator the request id {identifier}."
    return respond(Problem(500, "internal", detail))
