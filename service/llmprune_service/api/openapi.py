"""What /openapi.json says beside the routes themselves: problems, headers, and how to present a key."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from llmprune_service.api.errors import MEDIA_TYPE

Responses = dict[int | str, dict[str, Any]]

_PROBLEM = {
    "title": "Problem",
    "description": "RFC 9457: what is wrong, what is allowed, the remedy.",
    "type": "object",
    "required": ["type", "title", "status", "detail", "instance"],
    "properties": {
        "type": {"type": "string", "format": "uri", "examples": ["urn:llmprune:problem:invalid"]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string", "description": "Holds the request id, as the X-Request-ID header does."},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["detail"],
                "properties": {
                    "pointer": {"type": "string", "description": "JSON Pointer into the body."},
                    "in": {"type": "string", "enum": ["path", "query", "header", "cookie"]},
                    "parameter": {"type": "string"},
                    "detail": {"type": "string"},
                },
            },
        },
    },
}
_MEANINGS = {
    400: "The request cannot be read: not JSON, or an API key in the URL.",
    401: "No valid API key.",
    403: "The key lacks the scope, or another site's page sent the request.",
    404: "There is none, or it belongs to another tenant.",
    409: "Not in the state the job is in.",
    413: "The body is too large.",
    415: "The body is compressed, or not application/json.",
    416: "The range lies behind the end.",
    421: "The Host header names somebody else.",
    422: "A field or parameter makes no sense; `errors` names it.",
    429: "Too much at a time.",
    500: "The service failed; nothing of the inside is told.",
    503: "The database or the hub does not answer.",
    507: "No space left, in the quota or on the disk.",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
_HEADERS = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    416: {"Content-Range": {"schema": {"type": "string"}}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}


def problems(*statuses: int) -> Responses:
    """Responses with these statuses, as problem documents."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": _MEANINGS[status], "content": content, "headers": _HEADERS.get(status, {})}
        for status in statuses
    }


# What any request can be answered with, and any request with a key.
ANY = problems(400, 413, 415, 421, 422, 500, 503)
KEYED = ANY | problems(401, 403)


def header(description: str, kind: str = "string") -> dict[str, Any]:
    """A response header's description."""
    return {"description": description, "schema": {"type": kind}}


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document."""
    schema = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    components["Problem"] = _PROBLEM
    for unused in ("HTTPValidationError", "ValidationError"):
        components.pop(unused, None)
    return schema
