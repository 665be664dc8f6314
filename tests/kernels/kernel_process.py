"""Run a script of kernel cases in a process of its own: the interpreter is chosen when kernels are imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def run_cases(script: str, mode: str, cache: Path) -> dict[str, Any]:
    """What tests/kernels/<script> prints as JSON, run with `mode`, "interpret" or "compile-90" for sm_90, as its argument."""
    paths = [str(REPOSITORY / "triton_kernels"), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    environment.pop("TRITON_INTERPRET", None)
    if mode == "interpret":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(Path(__file__).with_name(script)), mode]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))
