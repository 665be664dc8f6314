"""Fixtures of the kernel tests: what a module's script of cases (``SCRIPT``) prints, run once whichever processes ask."""

from __future__ import annotations

import fcntl
import json
import os
from typing import Any

import pytest
from kernel_process import run_cases


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the interpreter computed."""
    return _once(request.module.SCRIPT, "interpret", tmp_path_factory)


@pytest.fixture
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, build: Any) -> dict[str, Any]:
    """What the compiler made of the builds for the architecture of `build`."""
    return _once(request.module.SCRIPT, f"compile-{build.arch}", tmp_path_factory)


def _once(script: str, mode: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the cases, or take what another process of this test run has printed: a module may be shared out among them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the run's own; each of its processes has a folder in there
    with (folder / f"{script}-{mode}.json").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if printed := file.read():
            return dict(json.loads(printed))
        results = run_cases(script, mode, tmp_path_factory.mktemp("triton"))
        json.dump(results, file)
        return results
