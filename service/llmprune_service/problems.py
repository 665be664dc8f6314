"""Errors as RFC 9457 problem documents: what is wrong, what is allowed, the remedy; never a path or a stack trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

TYPE_PREFIX = "urn:llmprune:problem:"


class Problem(Exception):
    """An answer other than success.

    Attributes:
        status: the HTTP status.
        code: a short stable name, the end of the problem's ``type``.
        detail: one sentence with the remedy.
        errors: ``{"pointer": "/sparsity", "detail": ...}`` for each offending field of the body.
        headers: such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        errors: Sequence[Mapping[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = tuple(dict(error) for error in errors)
        self.headers = dict(headers or {})

    def document(self) -> dict[str, Any]:
        """The body of the answer, ``application/problem+json``."""
        title = HTTPStatus(self.status).phrase
        document: dict[str, Any] = {
            "type": TYPE_PREFIX + self.code,
            "title": title,
            "status": self.status,
            "detail": self.detail,
        }
        return document | ({"errors": list(self.errors)} if self.errors else {})


def not_found(kind: str) -> Problem:
    """The answer for what is not there, and for what belongs to another tenant."""
    return Problem(404, "not-found", f"There is no such {kind}.")
