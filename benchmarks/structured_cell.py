"""What a cell of `make bench-structured` keeps beside its quality: sizes, the search, and what the plan says of it."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune.devices import module_device
from llmprune.engines.supernet import level_bytes, racks_of
from llmprune.engines.tyr_settings import generation_tokens
from llmprune.job import Job
from llmprune.measure.timing import Run, seconds_of
from llmprune.report import Report
from llmprune.structured.budget import Budget
from llmprune.structured.levels import grid
from llmprune.structuring.choice import search_texts
from llmprune.structuring.groups import max_search_tokens, settings_of, units_of

FORWARDS = 5


class Busy:
    """What share of the time since it was made the process had processors for, times how many: on a machine that does other
    things as well, seconds of different times compare only so. 1 where an accelerator does the work.
    """

    def __init__(self) -> None:
        self.begun, self.worked = time.perf_counter(), time.process_time()

    def share(self, device: torch.device) -> float:
        """So far."""
        if device.type != "cpu":
            return 1.0
        return (time.process_time() - self.worked) / (time.perf_counter() - self.begun)


def planned(job: Job) -> dict[str, Any]:
    """Of Týr on a dense model that is in memory: the token-forwards of a generation, the seconds of one such forward, and the
    bytes of every supernet, as `llmprune plan` counts them. Nothing of any other job.
    """
    config, model = job.config, job.model
    if config.method != "tyr":
        return {}
    assert model is not None
    chunks = search_texts(job.calibration.ids_NS, max_search_tokens(config))
    modules = units_of(config, model, job.stack).modules
    budget, settings = Budget.of(modules, config.sparsity, config.budget), settings_of(config)
    racks = [
        racks_of(modules, grid(modules, budget.fit(budget.centre(), number), number))
        for number in range(1, settings.iterations + 1)
    ]
    return {
        "generation_tokens": generation_tokens(settings, sum(ids_NS.numel() for ids_NS in chunks)),
        "forward_seconds": forward_seconds(model, chunks[0]),
        "supernet_bytes": [level_bytes(own) for own in racks],
    }


@torch.no_grad()
def forward_seconds(model: PreTrainedModel, ids_NS: torch.Tensor) -> float:
    """Of a token in a plain forward of the whole model, its head included: the median of a few, in seconds of a processor where
    the model is on one.
    """
    device = module_device(model)
    ids_NS = ids_NS.to(device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    run = Run(lambda: model(input_ids=ids_NS, use_cache=False))
    return statistics.median(seconds_of(run, device, clock) for _ in range(FORWARDS)) / ids_NS.numel()


def found(report: Report, plan: dict[str, Any], busy: float) -> dict[str, Any]:
    """The part of the report that the tables need, and how busy the processors were; nothing where the job took nothing out
    whole.
    """
    structure = report.structure
    if structure is None:
        return {}
    kept = structure.model_dump(
        mode="json",
        include={
            "num_parameters_dense", "num_parameters", "num_removable", "num_removed", "stock", "kv_bytes_dense", "kv_bytes",
            "blocks_removed", "iterations",
        },
    )  # fmt: skip
    return {"structure": {**kept, "kept": [module.num_kept for module in structure.modules]}, "plan": plan, "busy": busy}
