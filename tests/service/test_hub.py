"""What the service asks of the hub before it queues anything, against a hub that speaks HTTP; and the tokens it asks with."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub
from huggingface_hub import snapshot_download

from llmprune.io import models
from llmprune_service import hub as hub_module
from llmprune_service.hub import Resolved, check_access, check_texts, resolve
from llmprune_service.problems import Problem
from llmprune_service.settings import Settings
from llmprune_service.tokens import hub_token, set_hub_token

MODEL = "org/tiny"
FILES = {"config.json": b"{}", "model.safetensors": b"w" * 1000, "tokenizer.json": b"{}", "README.md": b"#", "code.py": b"1"}
WANTED = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub, and this process allowed to ask it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with FakeHub(tmp_path / "commits") as fake:
        yield fake


@pytest.fixture
def settings(tmp_path: Path, hub: FakeHub) -> Settings:
    """Of a service that uses that hub."""
    return Settings(data_dir=tmp_path / "data", hf_endpoint=hub.url)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model as its author has it."""
    return write(tmp_path / "model", FILES)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """A directory of these files."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def refusal(settings: Settings, model: str = MODEL, revision: str | None = None, token: str | None = None) -> Problem:
    """How resolving is refused."""
    with pytest.raises(Problem) as raised:
        resolve(model, revision, token=token, settings=settings)
    return raised.value


def fetch(settings: Settings, revision: str, token: str | None = None) -> Path:
    """What a job does: the commit comes into the cache of the host."""
    cache = settings.hub_dir / "hub"
    where: dict[str, Any] = {"endpoint": settings.hf_endpoint, "token": token or False, "cache_dir": cache}
    return Path(snapshot_download(MODEL, revision=revision, allow_patterns=hub_module.WANTED, **where))


def test_a_model_is_pinned_to_its_commit(hub: FakeHub, settings: Settings, directory: Path) -> None:
    """With what will be downloaded: neither code nor the readme."""
    first = hub.add_model(MODEL, directory)
    assert resolve(MODEL, None, token=None, settings=settings) == Resolved(first, 1000, WANTED, gated=False)


def test_a_branch_that_moves_does_not_move_a_job(hub: FakeHub, settings: Settings, directory: Path) -> None:
    """What was pinned stays what it was; the branch is followed by name alone."""
    first = hub.add_model(MODEL, directory)
    write(directory, {"model.safetensors": b"w" * 2000})
    second = hub.commit(MODEL, directory)
    assert resolve(MODEL, "main", token=None, settings=settings).revision == second != first
    assert check_access(MODEL, first, token=None, settings=settings) == Resolved(first, 1000, WANTED, gated=False)


def test_a_branch_with_a_slash(hub: FakeHub, settings: Settings, directory: Path) -> None:
    """Such as that of a pull request."""
    hub.add_model(MODEL, directory)
    commit = hub.commit(MODEL, directory, branch="refs/pr/1")
    assert resolve(MODEL, "refs/pr/1", token=None, settings=settings).revision == commit


def test_a_real_model_comes_down(hub: FakeHub, settings: Settings, tiny_model_dir: Path) -> None:
    """The hub of these tests is one that huggingface_hub can download from."""
    hub.add_model(MODEL, tiny_model_dir)
    resolved = resolve(MODEL, None, token=None, settings=settings)
    folder = fetch(settings, str(resolved.revision))
    assert folder.name == resolved.revision
    assert sorted(file.name for file in folder.iterdir()) == list(resolved.files)
    assert (folder / "model.safetensors").read_bytes() == (tiny_model_dir / "model.safetensors").read_bytes()
    assert resolved.weights_bytes == (tiny_model_dir / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"w"}, "unsafe_format"),
        ({"config.json": b"{}", "onnx/model.safetensors": b"w"}, "unsafe_format"),
        ({"config.json": b"{}"}, "unsafe_format"),
        ({"model.safetensors": b"w", "sub/config.json": b"{}"}, "unknown-model"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    hub: FakeHub, settings: Settings, tmp_path: Path, files: dict[str, bytes], code: str
) -> None:
    """Before anything is downloaded, and for a directory in the same way."""
    hub.add_model(MODEL, write(tmp_path / "model", files))
    for model in (MODEL, str(tmp_path / "model")):
        problem = refusal(settings, model)
        assert (problem.status, problem.code, problem.errors[0]["pointer"]) == (422, code, "/model")
    assert not [request for request in hub.requests if "/resolve/" in request.path]


def test_what_is_not_there(hub: FakeHub, settings: Settings, directory: Path) -> None:
    """Model and revision are told apart; a private model is not there for a stranger."""
    hub.add_model(MODEL, directory)
    hub.add_model("org/secret", directory, private=True, token="hf_reader")
    hub.tokens.add("hf_stranger")
    for model in ("org/none", "org/secret", "org/name.git", "org/name."):
        for token in (None, "hf_stranger"):
            problem = refusal(settings, model, token=token)
            assert (problem.status, problem.code, problem.errors[0]["pointer"]) == (422, "unknown-model", "/model")
    problem = refusal(settings, revision="none")
    assert (problem.status, problem.code, problem.errors[0]["pointer"]) == (422, "unknown-revision", "/revision")
    assert resolve("org/secret", None, token="hf_reader", settings=settings).gated


def test_a_gated_model_needs_a_token_that_may_read_it(hub: FakeHub, settings: Settings, directory: Path) -> None:
    """Though its files are listed to everybody."""
    hub.add_model(MODEL, directory, gated=True, token="hf_reader")
    hub.tokens.add("hf_stranger")
    for token in (None, "hf_stranger", "hf_wrong"):
        problem = refusal(settings, token=token)
        assert (problem.status, problem.code) == (422, "gated_model")
        assert "licence" in problem.detail and "hf_" not in problem.detail
    assert resolve(MODEL, None, token="hf_reader", settings=settings).gated


def test_a_cached_copy_is_not_for_everybody(hub: FakeHub, settings: Settings, directory: Path) -> None:
    """One tenant fetched a gated model; the other's token is asked about all the same."""
    commit = hub.add_model(MODEL, directory, gated=True, token="hf_reader")
    fetch(settings, commit, token="hf_reader")
    assert check_access(MODEL, commit, token="hf_reader", settings=settings).revision == commit
    with pytest.raises(Problem) as raised:
        check_access(MODEL, commit, token=None, settings=settings)
    assert raised.value.code == "gated_model"


def test_the_token_of_the_process_is_not_used(
    hub: FakeHub, settings: Settings, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant without a token is anonymous, whatever is in the service's environment."""
    hub.add_model(MODEL, directory, gated=True, token="hf_operator")
    monkeypatch.setenv("HF_TOKEN", "hf_operator")
    assert refusal(settings).code == "gated_model"
    assert {request.token for request in hub.requests} == {None}


def test_only_public_data_sets_are_fetched(hub: FakeHub, settings: Settings, directory: Path) -> None:
    """One cache serves all tenants: what a token opened for one of them would lie there for the others."""
    hub.add_model("acme/free", directory)
    hub.add_model("acme/gated", directory, gated=True, token="hf_reader")
    hub.add_model("acme/private", directory, private=True, token="hf_reader")
    check_texts(("stdlib", "hf:acme/free::train", "/data/file.txt"), settings)
    for name, code in (("gated", "gated_dataset"), ("private", "unknown-dataset"), ("none", "unknown-dataset")):
        with pytest.raises(Problem) as caught:
            check_texts((f"hf:acme/{name}:config",), settings)
        assert (caught.value.status, caught.value.code) == (422, code)
    assert all(request.token is None for request in hub.requests)


def test_a_model_too_large_to_download(hub: FakeHub, settings: Settings, directory: Path) -> None:
    """All files count that would be downloaded, and no others."""
    hub.add_model(MODEL, directory)
    fits = settings.model_copy(update={"max_download_bytes": 1004})
    assert resolve(MODEL, None, token=None, settings=fits).weights_bytes == 1000
    problem = refusal(settings.model_copy(update={"max_download_bytes": 1003}))
    assert (problem.status, problem.code, problem.errors[0]["pointer"]) == (422, "model-too-large", "/model")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_unwell(hub: FakeHub, settings: Settings, directory: Path, status: int) -> None:
    """Is to be asked again later."""
    hub.add_model(MODEL, directory)
    hub.status = status
    problem = refusal(settings)
    assert (problem.status, problem.code) == (503, "hub-unreachable") and int(problem.headers["Retry-After"]) > 0


def test_a_hub_that_does_not_answer(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody there, or somebody who says nothing: a submission waits for neither."""
    monkeypatch.setattr(hub_module, "_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        assert refusal(settings.model_copy(update={"hf_endpoint": endpoint})).code == "hub-unreachable"
        assert time.monotonic() - began < 8
    assert refusal(settings.model_copy(update={"hf_endpoint": endpoint})).code == "hub-unreachable"


@pytest.mark.parametrize("answer", ["<html>Log in to the network</html>", "[]", "{}", '{"id": "org/tiny"}'])
def test_something_that_is_no_hub(hub: FakeHub, settings: Settings, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """Such as the login page of a network."""
    monkeypatch.setattr(hub, "answer", lambda request: ({}, answer.encode()))
    assert refusal(settings).code == "hub-unreachable"


def test_offline_only_the_cache_is_used(
    hub: FakeHub, settings: Settings, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was fetched is there, by commit or without; what was not is refused."""
    first = hub.add_model(MODEL, directory)
    fetch(settings, first)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    for revision in (first, None):
        assert resolve(MODEL, revision, token=None, settings=settings) == Resolved(first, 1000, WANTED, gated=False)
    for model, revision in (("org/other", None), (MODEL, "main"), (MODEL, "f" * 40)):
        problem = refusal(settings, model, revision)
        assert (problem.status, problem.code) == (422, "hub-offline")
    empty = settings.model_copy(update={"data_dir": settings.data_dir / "empty"})
    assert refusal(empty).code == "hub-offline" and len(hub.requests) == asked


@pytest.mark.parametrize("kind", ["gated", "private"])
def test_offline_a_gated_model_is_nobodys(
    hub: FakeHub, settings: Settings, directory: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As nobody can be asked who may have it; one that was opened since is free."""
    commit = hub.add_model(MODEL, directory, token="hf_reader", **{kind: True})
    check_access(MODEL, commit, token="hf_reader", settings=settings)
    fetch(settings, commit, token="hf_reader")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal(settings, revision=commit, token="hf_reader").code == "gated_model"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.open_to_all(MODEL)
    check_access(MODEL, commit, token=None, settings=settings)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve(MODEL, commit, token=None, settings=settings).revision == commit


def test_models_of_the_host_need_no_hub(hub: FakeHub, settings: Settings, directory: Path) -> None:
    """The bundled one and a directory have no revision to pin."""
    bundled = resolve("demo", "main", token=None, settings=settings)
    weights = models.BUNDLED_PATH / "model.safetensors"
    assert (bundled.revision, bundled.weights_bytes, bundled.gated) == (None, weights.stat().st_size, False)
    assert resolve(str(directory), None, token=None, settings=settings) == Resolved(None, 1000, WANTED, gated=False)
    assert refusal(settings, str(directory / "none")).errors[0]["pointer"] == "/model"
    assert hub.requests == []


def test_the_library_downloads_the_same_files() -> None:
    """What is counted and judged here is what a job fetches."""
    assert models._WANTED == hub_module.WANTED


def test_tokens_are_kept_by_tenant(tmp_path: Path) -> None:
    """In files of their owner's; the operator's own token is the default tenant's alone."""
    settings = Settings(data_dir=tmp_path, hf_token="hf_operator")
    assert (hub_token(settings, "default"), hub_token(settings, "team-a")) == ("hf_operator", None)
    set_hub_token(settings, "team-a", "hf_old")
    set_hub_token(settings, "team-a", "hf_new")
    set_hub_token(settings, "default", "hf_own")
    assert (hub_token(settings, "default"), hub_token(settings, "team-a")) == ("hf_own", "hf_new")
    files = sorted((tmp_path / "tokens").iterdir())
    assert [(file.name, file.stat().st_mode & 0o777) for file in files] == [("default", 0o600), ("team-a", 0o600)]
    assert (tmp_path / "tokens").stat().st_mode & 0o077 == 0
    assert "hf_operator" not in repr(settings)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_token_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    """In words without the token or its path."""
    settings = Settings(data_dir=tmp_path)
    set_hub_token(settings, "default", "hf_secret")
    (tmp_path / "tokens" / "default").chmod(mode)
    with pytest.raises(Problem) as raised:
        hub_token(settings, "default")
    assert raised.value.status == 500 and "chmod 600" in raised.value.detail
    assert "hf_secret" not in raised.value.detail and str(tmp_path) not in raised.value.detail


@pytest.mark.parametrize("tenant", ["../default", "", "A", "a/b", "a\n"])
def test_a_tenant_is_no_path(tmp_path: Path, tenant: str) -> None:
    """Neither for reading nor for writing."""
    settings = Settings(data_dir=tmp_path)
    with pytest.raises(ValueError, match="not a name"):
        hub_token(settings, tenant)
    with pytest.raises(ValueError, match="not a name"):
        set_hub_token(settings, tenant, "hf_x")


@pytest.mark.parametrize("token", ["", "hf x", "hf\r\nX: y", "hf_é", "a" * 513])
def test_what_cannot_be_a_token(tmp_path: Path, token: str) -> None:
    """Is not written, and not used where somebody else wrote it."""
    settings = Settings(data_dir=tmp_path)
    with pytest.raises(ValueError, match="hub token"):
        set_hub_token(settings, "default", token)
    set_hub_token(settings, "default", "hf_x")
    (tmp_path / "tokens" / "default").write_text(token)
    with pytest.raises(Problem):
        hub_token(settings, "default")
