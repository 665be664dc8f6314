"""Fixtures of the kernel tests: what a module's script of cases (``SCRIPT``) prints, run once for the module."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_process import run_cases


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the interpreter computed."""
    return run_cases(request.module.SCRIPT, "interpret", tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the compiler made."""
    return run_cases(request.module.SCRIPT, "compile", tmp_path_factory.mktemp("triton"))
