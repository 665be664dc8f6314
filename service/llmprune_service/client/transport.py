"""HTTP to the service: the key, the errors, and how long to go on trying, each in one place."""

from __future__ import annotations

import ipaddress
import os
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from llmprune.errors import ConfigError, LlmpruneError
from llmprune_service.schemas import Page
from llmprune_service.settings import Settings

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0
_TRY_LATER = frozenset({429, 502, 503, 504})
_KEY = re.compile(r"[!-~]+")
_BROKEN = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError, httpx2.SSEError)
M = TypeVar("M", bound=BaseModel)


class ServiceError(LlmpruneError):
    """The service did not do what it was asked; ``temporary`` if the same request may succeed later."""

    temporary = False
    retry_after = 0.0


class ServiceUnreachable(ServiceError):
    """No answer, or one that broke off."""

    temporary = True
    exit_code = 2


class ApiError(ServiceError):
    """The service answered with a problem document.

    Attributes:
        status: the HTTP status.
        code: a short stable name, such as ``not-found``.
        detail: one sentence with the remedy.
        errors: ``{"pointer": "/sparsity", "detail": ...}`` for each offending field.
    """

    def __init__(
        self, status: int, code: str, detail: str, errors: Sequence[Mapping[str, str]] = (), retry_after: float = 0.0
    ) -> None:
        fields = (f"{error.get('pointer') or error.get('parameter', '')}: {error.get('detail', '')}" for error in errors)
        super().__init__("; ".join([detail.rstrip("."), *(field for field in fields if field not in detail)]))
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = tuple(dict(error) for error in errors)
        self.retry_after = retry_after
        self.temporary = status in _TRY_LATER
        self.exit_code = 2 if status < 500 else 1


class Patience:
    """Pauses before the next try, each twice as long, until ``seconds`` have gone by without success."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        """Something came through: begin anew."""
        self._deadline: float | None = None
        self._pause = _FIRST_PAUSE

    def wait(self, error: ServiceError) -> None:
        """Sleep until the next try is due; raises the error where it is for good, or the time is over."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._seconds
        pause = max(error.retry_after, self._pause * random.uniform(0.5, 1))  # many clients must not come back at once
        if not error.temporary or now + pause > self._deadline:
            raise error
        time.sleep(pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


class Transport:
    """One service at one URL. No redirect is followed, so the key goes to no other host."""

    def __init__(self, url: str, key: str | None, *, timeout: float, patience: float) -> None:
        is_here = _is_loopback(_host(url))
        key = key or os.environ.get("LLMPRUNE_API_KEY") or (_key_of_this_host() if is_here else None)
        headers = {"User-Agent": "llmprune"} | ({"Authorization": f"Bearer {_checked(key)}"} if key else {})
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.patience = patience
        # A proxy that the environment names is for other hosts: it must not see the key of this one.
        self._http = httpx2.Client(
            base_url=self.url, headers=headers, timeout=timeout, follow_redirects=False, trust_env=not is_here
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def request(
        self, method: str, path: str, *, retry: bool = False, hold_seconds: float = 0.0, **options: Any
    ) -> httpx2.Response:
        """Ask and return the answer; ``retry`` where doing it twice is doing it once.

        Raises:
            ApiError: any other answer than success.
            ServiceUnreachable: none.
        """
        patience = Patience(self.patience if retry else 0.0)
        while True:
            try:
                with self._errors():
                    response = self._http.request(method, path, timeout=self.timeout + hold_seconds, **options)
                    return _successful(response)
            except ServiceError as error:
                patience.wait(error)

    @contextmanager
    def stream(self, path: str, *, headers: Mapping[str, str], silence_seconds: float) -> Iterator[httpx2.Response]:
        """GET an answer piece by piece; errors, also those while reading, are raised as by :meth:`request`."""
        timeout = max(self.timeout, silence_seconds)
        with self._errors(), self._http.stream("GET", path, headers=dict(headers), timeout=timeout) as response:
            if not response.is_success:
                response.read()
            yield _successful(response)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except _BROKEN as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            raise ServiceUnreachable(
                f"The service at {self.url} does not answer ({cause}). Start one with `llmprune serve`, or name another URL."
            ) from None


def pages(transport: Transport, model: type[M], path: str, **params: str) -> Iterator[M]:
    """The entries of a list, page after page as they are needed."""
    page_of: type[Page[M]] = Page[model]  # type: ignore[valid-type]
    while True:
        page = parse(page_of, transport.request("GET", path, retry=True, params=params).content)
        yield from page.data
        if not page.has_more or page.next is None:
            return
        params = params | {"after": page.next}


def parse(model: type[M], content: bytes | str) -> M:
    """Read an answer; fields that a newer service adds are ignored. Raises ServiceError for what is none of llmprune's."""
    try:
        return model.model_validate_json(content, extra="ignore")
    except ValidationError:
        raise ServiceError("The answer is not one of llmprune's. Check the URL, and the version of the service.") from None


def _successful(response: httpx2.Response) -> httpx2.Response:
    if response.is_success:
        return response
    if response.is_redirect:
        where = response.headers.get("location", "another URL")
        raise ApiError(response.status_code, "redirect", f"The service sends on to {where}. Give its own URL.")
    try:
        document = response.json()
        code, detail = str(document["type"]).rpartition(":")[2], str(document["detail"])
        errors = document.get("errors", ())
    except (ValueError, TypeError, KeyError):
        code, detail, errors = "http", f"The service answered {response.status_code} {response.reason_phrase}.", ()
    raise ApiError(response.status_code, code, detail, errors, _seconds(response.headers.get("retry-after", "")))


def _seconds(retry_after: str) -> float:
    return float(retry_after) if retry_after.isdecimal() else 0.0


def _host(url: str) -> str:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"{url!r} is not the URL of a service; give one such as http://127.0.0.1:8000.")
    return parsed.host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key.strip()):
        raise ConfigError("The API key holds spaces or other characters no key has; it looks like prn_...")
    return key.strip()


def _key_of_this_host() -> str | None:
    try:
        return Settings().key_file.read_text().strip() or None
    except OSError:
        return None
