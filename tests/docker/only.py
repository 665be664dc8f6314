"""Makes this process see the packages of a lock only, as if nothing else were installed."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Sequence
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType


class _Blocker(importlib.abc.MetaPathFinder):
    def __init__(self, allowed: set[str]) -> None:
        self._packages = {
            package: distributions
            for package, distributions in packages_distributions().items()
            if not allowed & {_canonical(distribution) for distribution in distributions}
        }

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Nothing, or the error of a package that is not there."""
        if name in self._packages:
            raise ModuleNotFoundError(f"No module named {name!r}: {self._packages[name]} is not in the lock", name=name)
        return None


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def allow(lock: str) -> None:
    """Block the import of every installed package that the lock does not list, but for llmprune itself."""
    lines = Path(lock).read_text().splitlines()
    assert not any(name in sys.modules for name in ("torch", "numpy"))
    sys.meta_path.insert(0, _Blocker({"llmprune", *(_canonical(line.split("==")[0]) for line in lines)}))
