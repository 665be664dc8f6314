"""scripts/setup.sh: the pip calls it makes for a checkout and for each image, recorded by a Python that only says yes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from dockerfile import ROOT

RECORDER = """#!/bin/sh
case "$*" in
  -c*) exit 1 ;;  # no torch here
  *+cpu*) echo "$@" >> "$CALLS"; exit "$NO_CPU_FILE" ;;
  *) echo "$@" >> "$CALLS" ;;
esac
"""
PIP = "-m pip --disable-pip-version-check --quiet "
TORCH = next(line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("torch=="))


def _setup(folder: Path, *steps: str, cpu_file: bool = True, **environment: str) -> tuple[list[str], str]:
    """Run the script into a stub environment: its pip calls, and the packages it asked for."""
    calls, venv = folder / "calls", folder / "venv"
    (venv / "bin").mkdir(parents=True)
    for name in ("python", "pip"):
        (venv / "bin" / name).write_text(RECORDER)
        (venv / "bin" / name).chmod(0o755)
    calls.touch()
    variables = {"VENV": str(venv), "PYTHON": sys.executable, "CALLS": str(calls), "NO_CPU_FILE": str(int(not cpu_file))}
    subprocess.run(
        ["bash", ROOT / "scripts" / "setup.sh", *steps], check=True, capture_output=True, text=True, timeout=60,
        env={"PATH": os.environ["PATH"], **variables, **environment},
    )  # fmt: skip
    asked = venv / "requirements.txt"
    made = [line.removeprefix(PIP).replace(str(asked), "PACKAGES") for line in calls.read_text().splitlines()]
    return made, asked.read_text() if asked.exists() else ""


@pytest.mark.parametrize(("parts", "last"), [("all", "--editable ."), ("worker", ".")])
def test_torch_comes_first_in_its_cpu_build(parts: str, last: str, tmp_path: Path) -> None:
    """For a checkout and for the worker image alike; then the other locked packages, then llmprune."""
    calls, packages = _setup(tmp_path, PARTS=parts, TORCH="cpu")
    assert calls == [f"install {TORCH}+cpu", "install -r PACKAGES", f"install --no-deps --no-build-isolation {last}"]
    lock = ROOT / ("requirements.lock" if parts == "all" else "requirements-worker.lock")
    assert packages == lock.read_text().replace(TORCH + "\n", "")


def test_without_a_file_of_the_cpu_build_its_index_is_asked(tmp_path: Path) -> None:
    """PyTorch's own, which has no CUDA packages."""
    calls, _ = _setup(tmp_path, "packages", PARTS="worker", TORCH="cpu", cpu_file=False)
    assert calls[1] == f"install {TORCH} --index-url https://download.pytorch.org/whl/cpu"


def test_the_gpu_build_is_the_default_of_pypi(tmp_path: Path) -> None:
    """With the CUDA packages it depends on."""
    calls, _ = _setup(tmp_path, "packages", PARTS="worker", TORCH="gpu")
    assert calls == [f"install {TORCH}", "install -r PACKAGES"]


@pytest.mark.parametrize("torch", ["cpu", "gpu"])
def test_web_gets_no_torch(torch: str, tmp_path: Path) -> None:
    """Whatever TORCH says."""
    calls, packages = _setup(tmp_path, PARTS="web", TORCH=torch)
    assert calls == ["install -r PACKAGES", "install --no-deps --no-build-isolation ."]
    assert packages == (ROOT / "requirements-web.lock").read_text()


def test_the_last_step_installs_llmprune_alone(tmp_path: Path) -> None:
    """Into the environment the first step made, so it needs no Python of its own."""
    calls, _ = _setup(tmp_path, "llmprune", PARTS="web", PYTHON="no-such-python")
    assert calls == ["install --no-deps --no-build-isolation ."]


@pytest.mark.parametrize(
    ("variable", "value", "allowed"), [("TORCH", "cuda", "cpu or gpu"), ("PARTS", "api", "all, worker or web")]
)
def test_a_wrong_word_is_refused(variable: str, value: str, allowed: str, tmp_path: Path) -> None:
    """In one line that says what is allowed, before anything is installed."""
    with pytest.raises(subprocess.CalledProcessError) as failed:
        _setup(tmp_path, **{variable: value})
    assert re.fullmatch(f"{variable} is {allowed}, not '{value}'.\n", failed.value.stderr)
    assert (tmp_path / "calls").read_text() == ""
