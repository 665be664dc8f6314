"""What was taken out whole: the part of the report on structured pruning. Torch-free.

Parameters are counted as they are in memory, shared ones once; bytes of the KV cache are those of one more token in all layers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import computed_field

from llmprune.patterns import Structure
from llmprune.speed import Part

Unit = Literal["kv group", "query head", "channel", "expert"]


class ModuleReport(Part):
    """An attention, FFN or set of experts of one block, and how many of its groups stay."""

    name: str
    block: int
    unit: Unit
    num_groups: int
    num_kept: int
    parameters_per_group: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        """Share of its groups that are gone."""
        return 1 - self.num_kept / self.num_groups if self.num_groups else 0.0


class FrontPoint(Part):
    """The best that dynamic programming makes of a budget: parameters left in the whole model, and the KL from the dense one.

    ``kl_predicted`` is the sum of what each module costs alone, ``kl_measured`` that of all together where it was measured;
    both in nats, on calibration tokens.
    """

    num_parameters: int
    kl_predicted: float
    kl_measured: float | None = None


class IterationReport(Part):
    """One supernet and the search on it.

    ``steps`` are groups from one level to the next, by kind of module; ``curve`` is (generation, KL) whenever it fell, on the
    same tokens for all generations.
    """

    steps: dict[str, int]
    curve: tuple[tuple[int, float], ...]
    num_generations: int
    num_evaluated: int
    supernet_seconds: float
    supernet_bytes: int
    supernet_on_disk: bool
    generation_seconds: float | None = None


class BlockChoice(Part):
    """A set of blocks that was tried, and the KL without it in nats, on calibration tokens."""

    blocks: tuple[int, ...]
    kl: float


class StructureReport(Part):
    """What a structured method took out, what the model is now, and what the search cost.

    ``num_removable`` are the parameters of everything that could be taken out, ``num_removed`` those that were;
    ``num_parameters`` counts biases that FLAP adds, too. ``left`` says why modules stayed whole. ``group_seconds`` are what one
    group adds to a request, as measured for a budget of latency, the mean of its kind's modules. ``stock`` says that the
    checkpoint is one of its class in transformers; else it brings its own modelling code.
    """

    structure: Structure
    method: str
    num_parameters_dense: int
    num_parameters: int
    num_removable: int
    num_removed: int
    stock: bool
    kv_bytes_dense: int | None = None
    kv_bytes: int | None = None
    modules: tuple[ModuleReport, ...] = ()
    blocks_removed: tuple[int, ...] = ()
    block_scores: tuple[float, ...] = ()
    choices: tuple[BlockChoice, ...] = ()
    left: dict[str, str] = {}
    front: tuple[FrontPoint, ...] = ()
    iterations: tuple[IterationReport, ...] = ()
    settled: bool | None = None
    group_seconds: dict[Unit, float] = {}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        """Share of the removable parameters that are gone."""
        return self.num_removed / self.num_removable if self.num_removable else 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity_of_model(self) -> float:
        """Share of all parameters that are gone."""
        return 1 - self.num_parameters / self.num_parameters_dense

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity_of_seconds(self) -> float | None:
        """Share that is gone of the seconds of all groups, by what one was measured to add; None where none was."""
        seconds = [(self.group_seconds.get(module.unit, 0.0), module) for module in self.modules]
        total = sum(each * module.num_groups for each, module in seconds)
        return sum(each * (module.num_groups - module.num_kept) for each, module in seconds) / total if total else None
