"""Packed checkpoints load through transformers: our quantizer is registered the moment transformers has its registry.

``import llmprune`` must not import transformers or torch, so where they are not there yet, an import hook waits for the one
module that holds the registry.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Register now where transformers is imported already, else as soon as it is."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Leaves finding to the finders behind it; only has the registry's module register us at the end of its execution."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """As the import system asks; ``path`` and ``target`` are for the finders behind."""
        del path, target
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    if importlib.util.find_spec("torch") is not None:  # transformers can be imported without it, but loads no model then
        importlib.import_module("llmprune.io.quantizer")
