"""A small hub on 127.0.0.1 that huggingface_hub can talk to: models and data sets, with commits, gated and private ones.

Where the real hub surprises, so does this one: it lists the files of a gated model to everybody and refuses them one by
one, and to a stranger a private model is not there.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

_VERBS = "revision|tree|auth-check"
_API = re.compile(
    rf"/api/(?:models|datasets)/(?P<id>[^/]+(?:/(?!(?:{_VERBS})(?:/|$))[^/]+)?)(?:/(?P<verb>{_VERBS})(?:/(?P<revision>[^/]+))?)?"
)
_FILE = re.compile(r"/(?P<id>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class Request(NamedTuple):
    """What was asked: method, path with query, and the token, None for an anonymous request."""

    method: str
    path: str
    token: str | None


@dataclass
class _Model:
    id: str
    gated: bool
    private: bool
    readers: set[str]
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Path] = field(default_factory=dict)


class _Refusal(Exception):
    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class FakeHub:
    """``with FakeHub(directory) as hub``: point HF_ENDPOINT or ``endpoint=`` at ``hub.url``; ``root`` holds its commits.

    Attributes:
        url: the endpoint.
        requests: everything that was asked, in order.
        tokens: tokens of known accounts; those that may read a model are added by :meth:`add_model`.
        status: a status such as 503 that everything is answered with, or None.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[Request] = []
        self.tokens: set[str] = set()
        self.status: int | None = None
        self._models: dict[str, _Model] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add_model(
        self, id: str, directory: Path, *, gated: bool = False, private: bool = False, token: str | None = None
    ) -> str:
        """Publish a directory as branch ``main``; ``token`` may read it where it is gated or private. Returns the commit."""
        readers = {token} if token else set()
        self.tokens |= readers
        self._models[id] = _Model(id, gated, private, readers)
        return self.commit(id, directory)

    def commit(self, id: str, directory: Path, branch: str = "main") -> str:
        """Move a branch to what a directory holds now; returns the commit."""
        model = self._models[id]
        sha = hashlib.sha1(f"{id} {branch} {len(model.commits)}".encode()).hexdigest()
        shutil.copytree(directory, self.root / sha)
        model.commits[sha] = self.root / sha
        model.branches[branch] = sha
        return sha

    def open_to_all(self, id: str) -> None:
        """Make a gated or private model free."""
        self._models[id].gated = self._models[id].private = False

    def answer(self, request: Request) -> tuple[dict[str, str], bytes]:
        """Headers and body for a request; raises what the handler turns into a refusal."""
        self.requests.append(request)
        if self.status is not None:
            raise _Refusal(self.status, None, "The hub is unwell.")
        if request.token is not None and request.token not in self.tokens:
            raise _Refusal(401, None, "Invalid credentials in Authorization header")
        path = urlsplit(request.path).path
        if match := _FILE.fullmatch(path):
            return self._file(match, request.token)
        match = _API.fullmatch(path)
        if match is None:
            raise _Refusal(404, None, "No such route.")
        return {"Content-Type": "application/json"}, json.dumps(self._api(match, request)).encode()

    def _api(self, match: re.Match[str], request: Request) -> Any:
        model = self._visible(match["id"], request.token)
        if match["verb"] == "auth-check":
            self._check_gate(model, request.token)
            return {}
        sha = _commit(model, match["revision"])
        files = dict(_files(model.commits[sha]))
        if match["verb"] == "tree":
            return [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _sha1(file)} for name, file in files.items()
            ]
        with_sizes = "blobs" in parse_qs(urlsplit(request.path).query)
        siblings = [
            {"rfilename": name} | ({"size": file.stat().st_size, "blobId": _sha1(file)} if with_sizes else {})
            for name, file in files.items()
        ]
        gated = "manual" if model.gated else False
        return {"id": model.id, "sha": sha, "gated": gated, "private": model.private, "siblings": siblings, "tags": []}

    def _file(self, match: re.Match[str], token: str | None) -> tuple[dict[str, str], bytes]:
        model = self._visible(match["id"], token)
        self._check_gate(model, token)
        sha = _commit(model, match["revision"])
        file = dict(_files(model.commits[sha])).get(unquote(match["file"]))
        if file is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{_sha1(file)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        return headers, file.read_bytes()

    def _visible(self, id: str, token: str | None) -> _Model:
        model = self._models.get(id)
        if model is None or (model.private and token not in model.readers):
            raise _Refusal(401 if token is None else 404, "RepoNotFound", "Repository not found")
        return model

    def _check_gate(self, model: _Model, token: str | None) -> None:
        if model.gated and token not in model.readers:
            raise _Refusal(401 if token is None else 403, "GatedRepo", f"Access to model {model.id} is restricted.")


def _commit(model: _Model, revision: str | None) -> str:
    revision = unquote(revision or "main")
    sha = model.branches.get(revision, revision)
    if sha not in model.commits:
        raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return sha


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    return ((file.relative_to(folder).as_posix(), file) for file in sorted(folder.rglob("*")) if file.is_file())


def _sha1(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _handler_of(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            try:
                headers, body = hub.answer(Request(self.command, self.path, token))
            except _Refusal as refusal:
                self._send(refusal.status, _refusal_headers(refusal), json.dumps({"error": str(refusal)}).encode())
                return
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if asked is None:
                self._send(200, headers, body)
            else:
                span = f"bytes {asked[1]}-{len(body) - 1}/{len(body)}"
                self._send(206, headers | {"Content-Range": span}, body[int(asked[1]) :])

        do_HEAD = do_GET

        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def _refusal_headers(refusal: _Refusal) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "X-Error-Message": str(refusal)}
    return headers | ({"X-Error-Code": refusal.code} if refusal.code else {})
