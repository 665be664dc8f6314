"""The bitmask kernels in Triton's interpreter against fp64 and the format itself, and their machine code."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from aot import Report, as_parameters
from bitmask_cases import BUILDS, CASES, WEIGHTS_PER_LANE, Build, Case
from mma_sp_cases import Result

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
SCRIPT = "bitmask_cases.py"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64(case: Case, results: dict[str, Any]) -> None:
    """The kernel rounds an fp32 sum once, is no worse than torch, and has Inf and NaN where the dense product has them."""
    result = Result(**{name: value for name, value in results[str(case)].items() if name != "unpacked"})
    assert result.same_nonfinite
    assert result.excess <= 0
    assert result.ours <= 2 * result.torchs + 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unpacks_every_bit(case: Case, results: dict[str, Any]) -> None:
    """Random weights and random bit patterns, NaN payloads among them, come back where the bits say; all else is +0.0."""
    assert results[str(case)]["unpacked"] is True


@pytest.mark.parametrize("build", as_parameters(BUILDS))
def test_machine_code(build: Build, reports: dict[str, Any]) -> None:
    """No spills, registers and instructions per weight within the budget, one 16-bit load per weight, wide ones otherwise."""
    sass = Report(**reports[str(build)])
    assert (sass.spills, sass.stack) == (0, 0)
    assert sass.registers <= build.max_registers
    linear = build.kernel == "linear"
    size = sum(sass.loop.values()) if linear else sum(sass.total.values())
    assert size <= build.max_instructions * WEIGHTS_PER_LANE
    if build.dtype != "fp32":
        assert sass.count("LDG.E.U16.CONSTANT", whole=True) == WEIGHTS_PER_LANE
    if linear:
        assert sass.count("HMMA.16816") == 16 * build.tokens // 8
        assert sass.count("LDG.E.128") == build.tokens
        assert sass.loop_conversions == 0
    else:
        assert (
            sass.count("STG.E.128", whole=True)
            == sass.count("STG", whole=True)
            == WEIGHTS_PER_LANE * (4 if build.dtype == "fp32" else 2) // 16
        )
