"""Fetching: what a job needs comes from a hub once, and then the same job runs without one."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import constants

import llmprune
import tiny
from llmprune.errors import CorruptCheckpoint, TextError, UnsafeModel
from llmprune.events import Downloaded, Event, Failed, Finished, Progress, StageFinished, StageStarted, parse_event
from llmprune.fetching import fetch_iter
from llmprune.io import models
from llmprune.report import Fetched
from llmprune.spec import PruneConfig

MODEL = "org/tiny"
COMMIT = "c" * 40
CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: train, path: wikitext-2-raw-v1/train-*}
  - {split: validation, path: wikitext-2-raw-v1/validation-*}
  - {split: test, path: wikitext-2-raw-v1/test-*}
---
"""


class _Handler(BaseHTTPRequestHandler):
    """Answers for the repositories below ``root``, folders KIND/OWNER/NAME of one commit each; logs what was asked."""

    root: Path
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status, content, headers = self._find(urlsplit(self.path).path.strip("/").split("/"))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def _find(self, parts: list[str]) -> tuple[int, bytes, dict[str, str]]:
        if parts[0] == "api":
            folder, what = self.root / "/".join(parts[1:4]), parts[4:5]
            if not folder.is_dir():
                return 404, b"", {"X-Error-Code": "RepoNotFound"}
            tree = [
                {"type": "file" if path.is_file() else "directory", "path": str(path.relative_to(folder)), "oid": path.name,
                 "size": path.stat().st_size}
                for path in sorted((folder / "/".join(parts[6:])).rglob("*"))
            ]  # fmt: skip
            if what == ["tree"]:
                return 200, json.dumps(tree).encode(), {}
            siblings = [{"rfilename": entry["path"]} for entry in tree if entry["type"] == "file"]
            return 200, json.dumps({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings}).encode(), {}
        where = parts.index("resolve")
        kind = [] if where == 3 else ["models"]
        file = self.root / "/".join([*kind, *parts[:where], *parts[where + 2 :]])
        if not file.is_file():
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        content = file.read_bytes()
        return 200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}

    def log_message(self, *_: object) -> None:
        pass


class Hub:
    """A hub on this machine that answers over HTTP until it is closed."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, list[str]()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"root": root, "asked": self.asked}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(tiny_model_dir: Path, tmp_path: Path) -> Iterator[Hub]:
    """A hub with one model, C4's first training shard, and WikiText-2."""
    root = tmp_path / "hub"
    model = Path(shutil.copytree(tiny_model_dir, root / "models" / MODEL))
    (model / "modeling_own.py").write_text("raise SystemExit('run')")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    shard = root / "datasets" / "allenai" / "c4" / "en" / "c4-train.00000-of-01024.json.gz"
    shard.parent.mkdir(parents=True)
    documents = [{"text": tiny.prose(200, seed=seed), "url": "u"} for seed in range(20)]
    shard.write_bytes(gzip.compress("\n".join(map(json.dumps, documents)).encode()))
    wikitext = root / "datasets" / "Salesforce" / "wikitext"
    (wikitext / "wikitext-2-raw-v1").mkdir(parents=True)
    (wikitext / "README.md").write_text(CARD)
    for seed, split in enumerate(("train", "validation", "test")):
        table = pyarrow.table({"text": tiny.prose(2000, seed=seed).splitlines()})
        pyarrow.parquet.write_table(table, wikitext / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet")
    serving = Hub(root)
    yield serving
    serving.close()


def run(*arguments: object, **environment: str) -> tuple[int, list[Event], str]:
    """The command in a process of its own: exit code, the events on its stdout, and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "llmprune", *map(str, arguments), "--events", "-"],
        env={**os.environ, "NO_COLOR": "1", **environment}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return done.returncode, [parse_event(line) for line in done.stdout.splitlines()], done.stderr


def test_what_was_fetched_is_pruned_without_a_hub(hub: Hub, tmp_path: Path) -> None:
    """Model, C4 and WikiText-2 in one process; in another, with the hub gone, the same job finds all of it."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    code, events, said = run("fetch", MODEL, **environment, HF_HUB_OFFLINE="0")
    assert code == 0, said
    assert events[0] == StageStarted(stage="fetch", total=3)
    assert [event.detail for event in events if isinstance(event, Progress)] == [MODEL, "c4", "wikitext2"]
    assert isinstance(events[-2], StageFinished) and events[-2].seconds > 0
    size = (hub.root / "models" / MODEL / "model.safetensors").stat().st_size
    fetched = Fetched(model=MODEL, revision=COMMIT, weights_bytes=size, texts=("c4", "wikitext2"))
    assert events[-1] == Downloaded(fetched=fetched)
    assert any(path.endswith("/model.safetensors") for path in hub.asked)
    assert not any(path.endswith((".py", ".bin")) for path in hub.asked if MODEL in path)
    hub.close()
    quick = ("--num-samples", 4, "--seq-len", 32, "--max-eval-tokens", 512, "--no-latency")
    code, events, said = run("prune", MODEL, "--out", tmp_path / "out", *quick, **environment, HF_HUB_OFFLINE="1")
    assert code == 0, said
    assert isinstance(events[-1], Finished)
    report = events[-1].report
    assert report.model.revision == COMMIT and report.sparsity == 0.5
    assert report.calibration is not None and report.calibration.source == "c4"
    assert [item.text.source for item in report.quality] == ["wikitext2"]


@pytest.fixture
def cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub library of this process asks the hub of this test and has an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMIT])
def test_a_revision_is_found_offline_by_the_name_it_was_fetched_by(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    """A branch, a tag, a commit or none: the cache knows it afterwards, and what it stands for."""
    config = PruneConfig(model=MODEL, revision=revision, calibration="stdlib", eval=())
    assert models.known_revision(config) is None
    assert llmprune.fetch(config=config).revision == COMMIT
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert models.known_revision(config) == COMMIT
    again = llmprune.fetch(config=config)
    assert again.revision == COMMIT and again.texts == ("stdlib",) and not hub.asked


def test_code_is_fetched_only_where_it_may_run(hub: Hub, cache: Path) -> None:
    """The very rules of a job: python files come with --trust-remote-code alone, pickles never."""
    llmprune.fetch(MODEL, calibration="stdlib", eval=())
    assert not [file for file in cache.rglob("*") if file.suffix in (".py", ".bin")]
    llmprune.fetch(MODEL, calibration="stdlib", eval=(), trust_remote_code=True)
    assert [file.name for file in cache.rglob("*") if file.suffix in (".py", ".bin")] == ["modeling_own.py"]


def test_texts_are_judged_before_anything_is_downloaded(hub: Hub, cache: Path) -> None:
    """A misspelt text costs no download."""
    with pytest.raises(TextError, match="Did you mean 'wikitext2'"):
        next(iter(fetch_iter(MODEL, eval="wikitext")))
    with pytest.raises(TextError, match="for calibration only"):
        next(iter(fetch_iter(MODEL, eval="synthetic")))
    assert not hub.asked


def test_no_weights_are_loaded(tiny_model_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a model nor a tokenizer is made, and nothing is sampled for 'synthetic'."""
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_, **__: pytest.fail("a module was made"))
    fetched = llmprune.fetch(tiny_model_dir, calibration="synthetic", eval=[str(text_file), "stdlib"])
    assert fetched.texts == ("synthetic", str(text_file), "stdlib")


def test_a_local_model_is_described_as_a_job_does(tiny_model_dir: Path, text_file: Path) -> None:
    """Name, revision and size are those of the report."""
    texts = {"calibration": str(text_file), "eval": ()}
    fetched = llmprune.fetch(tiny_model_dir, **texts)
    report = llmprune.prune(tiny_model_dir, **texts, **tiny.QUICK)
    assert (fetched.model, fetched.revision) == (report.model.name, report.model.revision)
    assert fetched.weights_bytes == (tiny_model_dir / "model.safetensors").stat().st_size


def test_fetch_prints_a_table_or_one_object(cli: Callable[..., Any], tiny_model_dir: Path, text_file: Path) -> None:
    """In words and as JSON; without evaluation texts only the calibration text is there."""
    outcome = cli("fetch", "demo", "--calibration", text_file, "--eval", text_file)
    assert outcome.code == 0 and "Fetched demo" in outcome.out and "MiB" in outcome.out
    assert "Downloading: done" in outcome.err
    outcome = cli("fetch", tiny_model_dir, "--calibration", text_file, "--no-eval", "--json")
    assert outcome.code == 0
    assert Fetched.model_validate_json(outcome.out).texts == (str(text_file),)


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        (CorruptCheckpoint, lambda model: (model / "model.safetensors").write_bytes(b"1234567890")),
        (UnsafeModel, lambda model: (model / "model.safetensors").rename(model / "model.bin")),
        (TextError, lambda model: None),
    ],
    ids=["weights", "pickles", "text"],
)
def test_fetch_refuses_what_a_job_would(
    cli: Callable[..., Any],
    tiny_model_dir: Path,
    tmp_path: Path,
    kind: type[Exception],
    damage: Callable[[Path], Any],
) -> None:
    """Through both doors: the error's class, and as the last event its name and message."""
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    damage(model)
    (tmp_path / "text.jsonl").write_text("{}")
    with pytest.raises(kind) as caught:
        llmprune.fetch(model, calibration=str(tmp_path / "text.jsonl"), eval=())
    outcome = cli("fetch", model, "--calibration", tmp_path / "text.jsonl", "--no-eval", "--events", "-")
    assert outcome.code == 2
    assert parse_event(outcome.out.splitlines()[-1]) == Failed(error=kind.__name__, message=str(caught.value), exit_code=2)
