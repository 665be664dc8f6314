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
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import tiny

torch.set_num_threads(1)


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
    """Tests of the service that share a file run in one process: they share a running service."""
    for item in items:
        if "service" in item.path.relative_to(Path(__file__).parent).parts:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


def pytest_unconfigure() -> None:
    """Nothing is left behind."""
    shutil.rmtree(MODULES, ignore_errors=True)
    shutil.rmtree(CACHE, ignore_errors=True)
