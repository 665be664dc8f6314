"""Logs of one line a record, with request and job ids and without secrets; OpenTelemetry where OTEL_* asks for it."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import sys
import time
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any

from fastapi.telemetry import TelemetryConfig

from llmprune_service.settings import Settings

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
job_id: ContextVar[str | None] = ContextVar("job_id", default=None)

_SECRETS = (
    (re.compile(r"\bprn_[\w-]{8,}"), "prn_***"),
    (re.compile(r"\bhf_\w{8,}"), "hf_***"),
    (re.compile(r"\bwhsec_[\w+/=-]{8,}"), "whsec_***"),
    (re.compile(r"(://[^\s:/@'\"]*):[^\s@'\"]+@"), r"\1:***@"),
    (re.compile(r"(authorization['\"]?\s*[:=,]\s*(?:b?['\"])?)(?:(?:bearer|basic)\s+)?[^\s'\",]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(llmprune_session=|[?&]code=)[^\s;&'\"]+"), r"\1***"),
)
PROBES = ("/healthz", "/health", "/readyz", "/v2/health/", "/metrics")


def configure_logging(settings: Settings) -> None:
    """Send every logger's records to stderr, as JSON or as text; uvicorn's and the job engine's among them."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("dbos", "alembic", "httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)


def redact(text: str) -> str:
    """The text without API keys, hub tokens, webhook secrets, passwords in URLs, and credentials of headers and cookies."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}  # the last is uvicorn's


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what a record got as ``extra`` lies beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, redacted."""
        entry: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_context(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        # Redacted before it is encoded: quotes inside a value would be escaped, and hide a secret from the patterns.
        return json.dumps(
            {key: redact(value) if isinstance(value, str) else value for key, value in entry.items()}, default=str
        )


class TextFormatter(logging.Formatter):
    """For people: time, level, logger, message, then ``name=value`` pairs."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The message with its pairs."""
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in _context(record).items())])

    def format(self, record: logging.LogRecord) -> str:
        """The record, redacted."""
        return redact(super().format(record))


def _context(record: logging.LogRecord) -> dict[str, Any]:
    """The ids of the request under way, and what the record got as ``extra``."""
    ids = {"request_id": request_id.get(), "job_id": job_id.get()}
    given = {name: value for name, value in vars(record).items() if name not in _RECORD}
    return {name: value for name, value in ids.items() if value} | given


def tracing() -> TelemetryConfig:
    """FastAPI's own OpenTelemetry hooks: spans and metrics of requests if OTEL_* names an exporter, else nothing."""
    wanted = any(name.startswith("OTEL_EXPORTER_") for name in os.environ)
    if not wanted or importlib.util.find_spec("opentelemetry.sdk") is None:
        return {"tracing": False, "metrics": False, "logs": False}
    os.environ.setdefault("OTEL_SERVICE_NAME", "llmprune")
    # Logs would carry exception texts past the redaction.
    return {"auto_configure": True, "logs": False, "exclude": _untraced}


def _untraced(scope: MutableMapping[str, Any]) -> bool:
    """Probes are noise; a span holds the query, and thereby a login code or a key sent where it should not be."""
    return scope["path"].startswith((*PROBES, "/login")) or b"prn_" in scope.get("query_string", b"")
