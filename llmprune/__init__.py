"""llmprune: prune a Hugging Face causal language model after training, and report honestly what it cost and gained.

    >>> import llmprune
    >>> report = llmprune.prune("demo", method="sparsegpt", sparsity=0.5, out="pruned")  # doctest: +SKIP
    >>> report.verdict.text  # doctest: +SKIP

Importing this package does not import torch; the first call does. After it, transformers loads packed checkpoints too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmprune._version import __version__
from llmprune.errors import LlmpruneError, UserError
from llmprune.registration import register as _register
from llmprune.report import Benchmark, Conversion, Evaluation, Fetched, Generation, Inspection, Plan, Recovery, Report
from llmprune.spec import PruneConfig
from llmprune.sweep_report import AutoReport, Comparison, SweepReport
from llmprune.sweep_spec import AutoConfig, SweepConfig

if TYPE_CHECKING:
    from llmprune.api import (
        auto,
        auto_iter,
        benchmark,
        compare,
        convert,
        evaluate,
        export_report,
        fetch,
        generate,
        inspect,
        load,
        plan,
        prune,
        prune_iter,
        read_report,
        recover,
        recover_iter,
        sweep,
        sweep_iter,
    )

_LAZY = (
    "auto", "auto_iter", "benchmark", "compare", "convert", "evaluate", "export_report", "fetch", "generate", "inspect", "load",
    "plan", "prune", "prune_iter", "read_report", "recover", "recover_iter", "sweep", "sweep_iter",
)  # fmt: skip

__all__ = [
    "AutoConfig", "AutoReport", "Benchmark", "Comparison", "Conversion", "Evaluation", "Fetched", "Generation", "Inspection",
    "LlmpruneError", "Plan", "PruneConfig", "Recovery", "Report", "SweepConfig", "SweepReport", "UserError", "__version__",
    "auto", "auto_iter", "benchmark", "compare", "convert", "evaluate", "export_report", "fetch", "generate", "inspect", "load",
    "plan", "prune", "prune_iter", "read_report", "recover", "recover_iter", "sweep", "sweep_iter",
]  # fmt: skip


_register()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import llmprune.api

        return getattr(llmprune.api, name)
    raise AttributeError(f"module 'llmprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
