"""What the pages say of a service, run: against a real `llmprune serve` whose jobs are light.

What a page says is changed in these ways alone:

- the address is that of the running service, a database's address is its database;
- names of the hub are the bundled model, and jobs get the fields of LIGHT;
- `JOB` is the last job that was submitted, once it has ended, `SWEEP` the last sweep; `key_...` the last key that was made;
- `token.txt` holds a token;
- the key file of the README's `curl` is that of the service, `LLMPRUNE_API_KEY` holds its key;
- what `--out` and `download` write goes to a folder of the page.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_service import Served, until

from documented import PAGES, ROOT, Block, Command, blocks
from llmprune_service.client import Client
from tests.conftest import Outcome

Cli = Callable[..., Outcome]
LIGHT: dict[str, Any] = {"damping": 0.02, "num_samples": 3, "latency": False}
OPTIONS = ("--damping", "0.02", "--num-samples", "3", "--no-latency")
ADDRESS = "http://127.0.0.1:8000"
HUB = re.compile(r"\b[A-Z]\w+/[\w.-]+-\d+[MB]\b")
DATABASE = re.compile(r"postgresql://[\w:@/]+")


def needing(page: Path) -> list[Block]:
    """The blocks of a page that are run here."""
    return [block for block in blocks(page) if block.language in ("sh", "python") and block.needs_service and not block.excuse]


@pytest.fixture
def key(here: Served, monkeypatch: pytest.MonkeyPatch) -> str:
    """The key of the service's first start, in the environment."""
    value = Path(here.environment["LLMPRUNE_DATA_DIR"], "admin.key").read_text().strip()
    monkeypatch.setenv("LLMPRUNE_API_KEY", value)
    return value


@pytest.fixture
def last_job(cli: Cli) -> Callable[[], str]:
    """The id of the newest job, once it has ended."""

    def find() -> str:
        job: dict[str, Any] = json.loads(cli("jobs", "list", "--limit", 1, "--json").out)["data"][0]
        until(lambda: "succeeded" in cli("jobs", "show", job["id"]).out, "the job has ended")
        return str(job["id"])

    return find


@pytest.fixture
def change(here: Served, cli: Cli, last_job: Callable[[], str]) -> Callable[[str], str]:
    """A line of a page, as it is run here."""

    def changed(text: str) -> str:
        text = HUB.sub("demo", text).replace(ADDRESS, here.url)
        text = DATABASE.sub(f"sqlite:///{here.environment['LLMPRUNE_DATA_DIR']}/llmprune.db", text)
        text = text.replace("~/.local/share/llmprune", here.environment["LLMPRUNE_DATA_DIR"])
        text = re.sub(r"(?<=-d ')\{.*?\}(?=')", lambda found: _light(json.loads(found[0])), text)
        if re.search(r"\bJOB\b", text):
            text = re.sub(r"\bJOB\b", last_job(), text)
        if re.search(r"\bSWEEP\b", text):
            text = re.sub(r"\bSWEEP\b", json.loads(cli("sweeps", "list", "--json").out)["data"][0]["id"], text)
        if "key_..." in text:
            text = text.replace("key_...", json.loads(cli("keys", "list", "--json").out)["data"][-1]["id"])
        return text

    return changed


def _light(body: dict[str, Any]) -> str:
    """The body of a submission, of a job, a sweep or a search."""
    return json.dumps({**body, "base": {**body["base"], **LIGHT}} if "base" in body else {**body, **LIGHT})


@pytest.mark.parametrize("page", [page for page in PAGES if needing(page)], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_the_page_says_of_a_service_works(
    page: Path, here: Served, key: str, change: Callable[[str], str], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command ends with exit code 0, every request is answered with 2xx, and Python raises nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token.txt").write_text("hf_" + 20 * "x" + "\n")
    for name in ("submit", "sweep"):
        call = getattr(Client, name)
        monkeypatch.setattr(Client, name, lambda client, call=call, **fields: call(client, **{**fields, **LIGHT}))
    for block in needing(page):
        if block.language == "python":
            exec(compile(change(block.text), str(block), "exec"), {})
            continue
        for command in block.commands:
            if command.words[0] == "curl":
                request(change(command.line), tmp_path)
            else:
                run(command, change, cli, monkeypatch)


def request(line: str, folder: Path) -> None:
    """By the shell and curl themselves."""
    if not shutil.which("curl"):
        pytest.skip("curl is not installed: apt-get install curl")
    line = re.sub(r"^curl ", "curl -sS --fail-with-body ", line)
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def run(command: Command, change: Callable[[str], str], cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process."""
    words = [change(word) for word in command.words[1:]]
    if {"submit", "submit-auto"} & set(words[:2]):
        words += OPTIONS
    if "--out" in words:
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    elif words[:2] == ["jobs", "download"]:
        shutil.rmtree(words[3], ignore_errors=True)
    if command.stdin_file:
        monkeypatch.setattr("sys.stdin", io.StringIO(Path(command.stdin_file).read_text()))
    outcome = cli(*words)
    assert outcome.code == 0, f"{' '.join(words)}\n{outcome.out}{outcome.err}"
