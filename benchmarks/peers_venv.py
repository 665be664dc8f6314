"""The environment of `make bench-peers`: llm-compressor beside what llmprune needs, made once, by pip.

Both tools run in it, so that torch, transformers and all else are the same for both: torch in the version and the build of the
environment that runs the benchmark, transformers in the newest version that llm-compressor takes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import torch

from benchmarks.quality import ROOT

PEER = "llmcompressor==0.14.0.1"
TORCH_INDEX = "https://download.pytorch.org/whl/"


def python() -> Path:
    """The interpreter of the environment; it is made where it is not there yet, in a folder named by what goes into it."""
    wanted = {"torch": torch.__version__, "packages": packages(), "python": sys.version_info[:2]}
    name = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmprune" / "peers" / name
    interpreter = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        install_torch(interpreter, torch.__version__)
        constraints = folder / "constraints.txt"
        constraints.write_text(f"torch=={torch.__version__.split('+')[0]}\n")  # never another one
        _pip(interpreter, "--constraint", str(constraints), *packages())
        (folder / "ready").touch()
    return interpreter


def packages() -> list[str]:
    """What is installed beside torch: the peer, and what llmprune needs."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return [PEER, *(need for need in needs if not need.startswith("torch"))]


def install_torch(interpreter: Path, version: str) -> None:
    """This very build if pip's own sources have it, else from PyTorch's index; a version without a build's name from PyPI."""
    release, _, build = version.partition("+")
    if not build:
        _pip(interpreter, f"torch=={release}")
        return
    try:
        _pip(interpreter, f"torch=={version}")
    except subprocess.CalledProcessError:
        _pip(interpreter, f"torch=={release}", "--index-url", TORCH_INDEX + build)


def _pip(interpreter: Path, *arguments: str) -> None:
    subprocess.run([interpreter, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", *arguments], check=True)
