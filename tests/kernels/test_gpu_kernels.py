"""On a GPU: every kernel against fp64, as `make bench-gpu` checks it before it times anything."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_checks
from llmprune_kernels import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.timeout(900),
]


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_case_is_green(op: str) -> None:
    """Awkward shapes, real ones, every tile."""
    todo = [case for case in gpu_checks.cases(small=False) if case.op == op]
    outcomes = gpu_checks.check_all(todo, "cuda")
    assert len(outcomes) > 200
    assert [(outcome.name, outcome.red) for outcome in outcomes if outcome.red] == []


def test_layers_are_green() -> None:
    """Moved, laid out, saved, fused, and in CUDA graphs."""
    outcomes = gpu_checks.check_modules("cuda")
    assert any("in a graph" in outcome.name for outcome in outcomes)
    assert [(outcome.name, outcome.red) for outcome in outcomes if outcome.red] == []
