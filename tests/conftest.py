"""Fixtures every test may use: tiny models on disk, text for them, and the command line run in this process."""

from __future__ import annotations

import os
import shutil
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
# Code that comes with a checkpoint is copied there: processes of the tests would write over one another's.
MODULES = os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="llmprune-test-modules-")

# A cache that other runs do not fill.
CACHE = os.environ["LLMPRUNE_CACHE"] = tempfile.mkdtemp(prefix="llmprune-test-cache-")

import gc
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch

import tiny

torch.set_num_threads(1)

# The same examples in every run, however slow the machine is today.
hypothesis.settings.register_profile("llmprune", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("llmprune")

TESTS = Path(__file__).parent
LONGEST_FIRST = ("service", "end_to_end", "kernels", "llmprune", "the others", "contract")


class Outcome(NamedTuple):
    """What a command did: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module", autouse=True)
def _freeze_what_is_here() -> None:
    """A job collects garbage at every stage: let it not walk all the tests, nor what earlier modules have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks with its tokenizer; read only."""
    return tiny.save(tiny.make_model(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def moe_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of two blocks with four experts each; read only."""
    return tiny.save(tiny.make_model("mixtral"), tmp_path_factory.mktemp("models") / "moe")


@pytest.fixture(scope="session")
def trained_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that has learnt the text, so that pruning can hurt it; read only."""
    return tiny.save(tiny.train_(tiny.make_model()), tmp_path_factory.mktemp("models") / "trained")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text of a few thousand tokens."""
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text(tiny.prose(3000, seed=1))
    return file


@pytest.fixture(scope="session")
def eval_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluation text, other than the calibration text."""
    file = tmp_path_factory.mktemp("text") / "evaluation.txt"
    file.write_text(tiny.prose(2000, seed=2))
    return file


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a small file system needs privileges this machine does not give")
    yield mount
    subprocess.run(["umount", mount], check=True)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run the command line in this process."""

    def run(*arguments: object) -> Outcome:
        from llmprune.cli import main

        monkeypatch.setattr(sys, "argv", ["llmprune", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        return Outcome(code, *capsys.readouterr())

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of a file run in one process: what they share, a service or a pruned model, is made once.

    Files of the service, which mostly wait, take turns with the longest of those that compute; last come the contracts, which
    share nothing: whichever process is free takes one of them.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    waiting, working = [], []
    for file in sorted(files, key=_rank):  # stable: the order within a folder stays random
        folder = file.relative_to(TESTS).parts[0]
        if folder != "contract":
            for item in files[file]:
                item.add_marker(pytest.mark.xdist_group(str(file.relative_to(TESTS))))
        (waiting if folder == "service" else working).append(file)
    turns = [file for pair in itertools.zip_longest(waiting, working) for file in pair if file is not None]
    items[:] = [item for file in turns for item in files[file]]


def _rank(file: Path) -> int:
    """Folders by how long their files take, the longest first."""
    folder = file.relative_to(TESTS).parts[0]
    return LONGEST_FIRST.index(folder if folder in LONGEST_FIRST else "the others")


def pytest_unconfigure() -> None:
    """Nothing is left behind."""
    shutil.rmtree(MODULES, ignore_errors=True)
    shutil.rmtree(CACHE, ignore_errors=True)
