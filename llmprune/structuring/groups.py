"""Pattern ``structured``: groups of attention heads and channels of FFNs go, by Týr, FLAP or magnitude."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack
from llmprune.devices import module_device
from llmprune.engines.flap import structural_cuts
from llmprune.engines.tyr import Round, Step, Tyr
from llmprune.engines.tyr_settings import PRESETS, TyrSettings
from llmprune.errors import UnsupportedModel
from llmprune.events import Event, Progress
from llmprune.measure.dispatch import dispatched
from llmprune.measure.modules import seconds_per_group
from llmprune.patterns import Structure
from llmprune.spec import PruneConfig
from llmprune.structure import FrontPoint, IterationReport, ModuleReport, Unit
from llmprune.structured.budget import Budget
from llmprune.structured.free import describe_free_, is_free
from llmprune.structured.slicing import Cut, check_sliced, mask_, record_masked, slice_
from llmprune.structured.uniform import Widths, closest, shortfall, uniform_widths
from llmprune.structured.units import Module, Units, find_units, select_units
from llmprune.structured.widths import describe_, uniform_counts, uniform_fields
from llmprune.structuring.choice import CHECK_TOKENS, Choice, Setting, head_of, search_texts

SEARCH_TOKENS = 8192
"""Calibration tokens that the best candidates are measured on, at most; the paper's preset has its own number."""


@dataclass
class Groups:
    """The choice of groups of one job."""

    setting: Setting
    structure: Structure = "structured"

    def __post_init__(self) -> None:
        setting, config = self.setting, self.setting.config
        self.units = units_of(config, setting.model, setting.stack)
        self.modules = list(self.units.modules)
        self.warnings: list[str] = []
        self.widths = widths_of(config, setting.model, self.modules)
        self.state = setting.recorded() or {"done": 0, "seconds": 0.0}

    @staticmethod
    def check(config: PruneConfig, model: PreTrainedModel, stack: Stack) -> None:
        """Refuse a model of which nothing can go, and a share that cannot."""
        modules = units_of(config, model, stack).modules
        widths_of(config, model, modules)

    @property
    def total(self) -> int:
        """Steps of the choice."""
        return self.tyr.total if self.setting.config.method == "tyr" else len(self.setting.stack.blocks)

    @property
    def done(self) -> int:
        """Steps that an earlier process recorded."""
        return int(self.state["done"])

    def choose(self) -> Generator[Event, None, Choice]:
        """Which groups stay of every module, and their weights."""
        begun = time.perf_counter()
        if self.setting.config.method == "tyr":
            cuts, report = yield from self._search()
        else:
            cuts, report = yield from self._baseline()
        tensors = {}
        for name, cut in cuts.items():
            for part in ("kept_G", "weight_OK", "bias_O"):
                if (tensor := getattr(cut, part)) is not None:
                    tensors[f"{name}:{part}"] = tensor
        seconds = self.state["seconds"] + time.perf_counter() - begun
        return Choice({"report": report, "seconds": seconds}, tensors, tuple(self.warnings))

    def apply_(self, choice: Choice) -> dict[str, Any]:
        """Slice the model; the sliced modules are compared with the masked ones on calibration tokens."""
        setting, model = self.setting, self.setting.model
        cuts = cuts_of(choice.tensors)
        chosen = [module for module in self.modules if _changes(module, cuts[module.name])]
        kept = {module.name: len(cuts[module.name].kept_G) for module in self.modules}
        modules = tuple(report_of(module, kept[module.name]) for module in self.modules)  # sliced ones no longer say
        removable = sum(module.num_groups * module.parameters_per_group for module in self.modules)
        gone = sum((module.num_groups - kept[module.name]) * module.parameters_per_group for module in self.modules)
        fields = self._fields(kept)
        ids_NS = setting.ids_NS[:1, :CHECK_TOKENS]
        for module in chosen:
            mask_(module, cuts[module.name])
        with dispatched(model, setting.device):
            reference = record_masked(model, chosen, ids_NS.to(module_device(model)))
        for module in chosen:
            cut = cuts[module.name]
            slice_(model, module, Cut(cut.kept_G))
        with dispatched(model, setting.device):
            check_sliced(model, reference)
        stock = bool(chosen) and self._describe_(fields)
        return {
            "modules": [module.model_dump() for module in modules], "left": self.units.left, "num_removable": removable,
            "num_removed": gone, "stock": stock or not chosen,
        }  # fmt: skip

    def _fields(self, kept: Mapping[str, int]) -> dict[str, int] | None:
        """What the config would have to say; None where it cannot."""
        if is_free(self.setting.model.config):  # it says other widths than the model has
            return None
        try:
            return uniform_fields(self.setting.model, self.modules, kept)
        except UnsupportedModel:
            if self.widths:
                raise
            return None

    def _describe_(self, fields: dict[str, int] | None) -> bool:
        """Have the config describe the sliced model; whether it is one of the stock class."""
        model = self.setting.model
        if fields is not None:
            try:
                describe_(model, self.modules, fields)
            except UnsupportedModel:
                if self.widths:
                    raise
            else:
                return True
        describe_free_(model)
        return False

    def _baseline(self) -> Generator[Event, None, tuple[dict[str, Cut], dict[str, Any]]]:
        setting, method = self.setting, self.setting.config.method
        assert method in ("flap", "magnitude")
        known: Literal["flap", "magnitude"] = "flap" if method == "flap" else "magnitude"
        counts = None
        if self.widths:
            counts = closest(self.widths, self.modules, setting.config.sparsity).removed(self.modules)
        running = structural_cuts(
            known, setting.stack, self.modules, setting.record() if method == "flap" else None, setting.device,
            sparsity=setting.config.sparsity, counts=counts, with_bias=self.widths is None,
        )  # fmt: skip
        while True:
            try:
                block = next(running)
            except StopIteration as stop:
                cuts: dict[str, Cut] = stop.value
                return cuts, {}
            yield Progress(stage="structure", done=block, total=self.total, detail=setting.stack.name(block - 1))

    @cached_property
    def tyr(self) -> Tyr:
        """The search, ready to run."""
        setting, config = self.setting, self.setting.config
        texts = search_texts(setting.ids_NS, max_search_tokens(config))
        return Tyr(
            setting.stack, self.modules, self._budget(), setting.record(), setting.record(texts), setting.device,
            head_of(setting.model, setting.stack, texts, setting.device), settings_of(config), self.widths,
            setting.directory,
        )  # fmt: skip

    def _search(self) -> Generator[Event, None, tuple[dict[str, Cut], dict[str, Any]]]:
        setting, tyr, before = self.setting, self.tyr, self.state["seconds"]
        if "search" in self.state:
            tyr.restore_(self.state["search"])
        begun = time.perf_counter()
        for step in tyr.run():
            if step.phase == "search":
                seconds = before + time.perf_counter() - begun
                setting.keep(step.done, {"done": step.done, "seconds": seconds, "search": tyr.snapshot()})
            yield Progress(stage="structure", done=step.done, total=step.total, detail=detail_of(step))
        taken = next((one for one in self.widths or () if one.removed(self.modules) == tyr.counts), None)
        if taken and (message := shortfall(taken, self.modules, setting.config.sparsity)):
            self.warnings.append(message)
        others = sum(parameter.numel() for parameter in setting.model.parameters()) - sum(
            module.num_groups * module.parameters_per_group for module in self.modules
        )
        report = {
            "iterations": [iteration_of(one).model_dump() for one in tyr.rounds],
            "front": [
                FrontPoint(
                    num_parameters=others + point.num_parameters, kl_predicted=point.predicted, kl_measured=point.measured
                ).model_dump()
                for point in tyr.front
            ],
            "settled": None if tyr.settled is None else tyr.settled <= tyr.divergence,
        }
        return tyr.cuts, report

    def _budget(self) -> Budget:
        setting, name = self.setting, self.setting.config.budget
        costs = None
        if name == "latency":
            with dispatched(setting.model, setting.device):
                costs = seconds_per_group(setting.model, self.modules)
        return Budget.of(self.modules, setting.config.sparsity, name, costs)


def units_of(config: PruneConfig, model: PreTrainedModel, stack: Stack) -> Units:
    """The modules that the job may take groups from.

    Raises:
        UnsupportedModel: there are none.
    """
    units = select_units(find_units(model, stack), config.skip)
    if not units.modules:
        raise UnsupportedModel(f"nothing to take out: all modules are left whole by --skip, e.g. {next(iter(units.left))}.")
    return units


def widths_of(config: PruneConfig, model: PreTrainedModel, modules: Sequence[Module]) -> list[Widths] | None:
    """The pairs of widths that every layer may have alike; None where layers may differ.

    Raises:
        UnsupportedModel: layers differ already, or the config has no field for their widths.
        ConfigError: the share cannot go.
    """
    if config.widths == "free":
        return None
    if is_free(model.config):
        raise UnsupportedModel(
            "layers of this model have widths of their own already, which no other config can say. Use --widths free."
        )
    attention = next((module for module in modules if module.kind == "attention"), None)
    counts = uniform_counts(model, attention) if attention else ()
    name = "parameters" if config.budget == "latency" else config.budget
    return uniform_widths(Budget.of(modules, config.sparsity, name), counts)


def settings_of(config: PruneConfig) -> TyrSettings:
    """The preset's, where no field says otherwise."""
    preset = PRESETS[config.tyr_preset]
    changes: dict[str, Any] = {
        "iterations": config.tyr_iterations, "generations": config.tyr_generations, "offspring": config.tyr_offspring
    }  # fmt: skip
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(
        preset, **given, hidden_weight=config.tyr_hidden_weight, sequential=config.sequential == "group", seed=config.seed
    )


def max_search_tokens(config: PruneConfig) -> int:
    """Calibration tokens that the best candidates are measured on, at most."""
    return PRESETS[config.tyr_preset].stages[-1].num_tokens or SEARCH_TOKENS


def cuts_of(tensors: Mapping[str, Tensor]) -> dict[str, Cut]:
    """The cuts of a choice by module."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(":")
        parts.setdefault(name, {})[part] = tensor
    return {name: Cut(**own) for name, own in parts.items()}


def report_of(module: Module, num_kept: int) -> ModuleReport:
    """What the report says of a module before it is sliced."""
    unit: Unit = "channel" if module.kind == "ffn" else "query head" if module.multi_query else "kv group"
    return ModuleReport(
        name=module.name, block=module.block, unit=unit, num_groups=module.num_groups, num_kept=num_kept,
        parameters_per_group=module.parameters_per_group,
    )  # fmt: skip


def iteration_of(one: Round) -> IterationReport:
    """What the report says of an iteration."""
    return IterationReport(
        steps=one.steps, curve=tuple(one.curve), num_generations=one.num_generations, num_evaluated=one.num_evaluated,
        supernet_seconds=one.seconds_supernet, supernet_bytes=one.supernet_bytes, supernet_on_disk=one.on_disk,
        generation_seconds=one.seconds_per_generation or None,
    )  # fmt: skip


def detail_of(step: Step) -> str:
    """What goes on, in a few words."""
    words = {"supernet": "levels of the blocks", "curves": "curves of the blocks", "search": "search", "settle": "settling"}
    text = f"{words[step.phase]}, iteration {step.iteration}" if step.iteration else words[step.phase]
    return text if step.divergence is None else f"{text}: KL {step.divergence:.4f}"


def _changes(module: Module, cut: Cut) -> bool:
    return len(cut.kept_G) < module.num_groups or cut.weight_OK is not None or cut.bias_O is not None
