"""Answers with an ETag, and what is sent to who has them already."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

from fastapi import Header, Response
from pydantic import BaseModel

from llmprune_service.api.openapi import header

IfNoneMatch = Annotated[str | None, Header(description="ETag of what you have.")]
_ETAG = {"ETag": header("Changes with what it shows.")}
TAGGED: dict[int | str, dict[str, Any]] = {
    200: {"headers": _ETAG},
    304: {"description": "Not changed since.", "headers": _ETAG},
}


def tagged(view: BaseModel) -> tuple[str, str]:
    """A view as JSON, and its digest as a strong ETag."""
    body = view.model_dump_json()
    return body, f'"{hashlib.sha256(body.encode()).hexdigest()[:32]}"'


def matches(tag: str, condition: str) -> bool:
    """Whether If-None-Match names the tag (RFC 9110, weak comparison)."""
    return condition.strip() == "*" or tag in (part.strip().removeprefix("W/") for part in condition.split(","))


def unless_known(body: str, tag: str, if_none_match: str | None) -> Response:
    """The body, or 304."""
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if if_none_match is not None and matches(tag, if_none_match):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")
