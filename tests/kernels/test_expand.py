"""The portable 2:4 kernels in Triton's interpreter against fp64 and the format's own unpacking, and their machine code."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from aot import Report, as_parameters
from expand_cases import BUILDS, CASES, UNPACKS, Build, Case, Unpack
from mma_sp_cases import Result

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
SCRIPT = "expand_cases.py"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64(case: Case, results: dict[str, Any]) -> None:
    """The kernel rounds an fp32 sum once, is no worse than torch, and has Inf and NaN where the dense product has them."""
    result = Result(**results[str(case)])
    assert result.same_nonfinite
    assert result.excess <= 0
    assert result.ours <= 2 * result.torchs + 1e-6


@pytest.mark.parametrize("case", UNPACKS, ids=str)
def test_unpacks_every_bit(case: Unpack, results: dict[str, Any]) -> None:
    """Random bit patterns, NaN payloads among them, come back where the metadata says; all else is +0.0."""
    assert results[str(case)] == {"equal": True, "out": True}


@pytest.mark.parametrize("build", as_parameters(BUILDS))
def test_machine_code(build: Build, reports: dict[str, Any]) -> None:
    """No spills, registers within the budget, 128-bit loads of values and stores of weights, the right arithmetic."""
    sass = Report(**reports[str(build)])
    assert (sass.spills, sass.stack) == (0, 0)
    assert sass.registers <= build.max_registers
    if build.kernel == "linear":
        tensor_cores = sum(number for name, number in sass.loop.items() if "MMA" in name)
        assert (tensor_cores == 0) == (build.dtype == "fp32")
        assert sass.count("FFMA") >= 128 or build.dtype != "fp32"
        assert sass.count("LDGSTS.E.BYPASS.128") >= 4
    else:
        assert sass.count("STG.E.128", whole=True) == sass.count("STG", whole=True) >= 4
        loads = sass.count("LDG.E.128", whole=True)
        assert loads >= 2
        assert sass.count("LDG", whole=True) - loads == (1 if build.kernel == "unpack_fragments" else 4)
