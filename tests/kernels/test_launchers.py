"""From an op to its kernel and back as on CUDA, but in the interpreter: what dispatch launches is what the kernels take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmprune_kernels import dispatch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
import interpreter
interpreter.install()
import torch
from benchmarks import gpu_checks
from benchmarks.gpu_checks import Case
from llmprune_kernels import dispatch, ops

gpu = dispatch.Gpu("NVIDIA H200", (9, 0), 4, 2**20, "3.6.0")
dispatch.choose = lambda op, T, O, I, dtype, device: dispatch.heuristic(op, T, O, I, gpu)
chosen = []

def launch(case, x_TI, weights, bias):
    chosen.append(dispatch.heuristic(case.op, len(x_TI), *case.shape, gpu).kernel)
    x = x_TI.unsqueeze(0).transpose(0, 1)  # another leading shape
    return ops._launch(case.op, x, case.shape[0], weights, bias).flatten(0, 1)

through_kernel = gpu_checks.multiply
outcomes = []
for op in dispatch.OPS:
    gpu_checks.multiply = launch
    for dtype, num_tokens in (("bfloat16", 3), ("float16", 9), ("bfloat16", 40), ("bfloat16", 130)):
        outcome = gpu_checks.check(Case(op, dtype, (40, 520), num_tokens, bias=num_tokens != 9), torch.device("cpu"))
        outcomes.append([outcome.name, chosen[-1], outcome.red])
    gpu_checks.multiply = through_kernel
    for kernel in dispatch.LAUNCHERS[op]:
        outcome = gpu_checks.check(Case(op, "bfloat16", (24, 260), 2, kernel=kernel), torch.device("cpu"))
        outcomes.append([outcome.name, kernel, outcome.red])
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes() -> list[list[str]]:
    """(case, kernel, what is wrong) of every launch."""
    paths = (ROOT, ROOT / "triton_kernels", ROOT / "tests" / "kernels")
    environment: dict[str, Any] = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_launcher_is_right(op: str, outcomes: list[list[str]]) -> None:
    """Each kernel of the op, and what the heuristic chooses for few and for many tokens, against fp64."""
    mine = [outcome for outcome in outcomes if outcome[0].startswith(f"{op} ")]
    assert [outcome for outcome in mine if outcome[2]] == []
    assert {kernel for _, kernel, _ in mine} == set(dispatch.LAUNCHERS[op])
    assert [kernel for _, kernel, _ in mine[:4]] == [dispatch.KERNELS[op]] * 3 + ["dense"]
