"""Pattern ``structured``: groups of attention heads and channels of FFNs go, by Týr, FLAP or magnitude; by Týr experts too."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack, eager_experts
from llmprune.engines.flap import structural_cuts
from llmprune.engines.tyr import Round, Step, Tyr
from llmprune.engines.tyr_settings import PRESETS, TyrSettings
from llmprune.errors import ConfigError, UnsupportedModel
from llmprune.events import Event, Progress
from llmprune.measure.dispatch import dispatched
from llmprune.measure.heads import head_of
from llmprune.measure.modules import seconds_per_group
from llmprune.patterns import Structure
from llmprune.spec import PruneConfig
from llmprune.structure import FrontPoint, IterationReport, ModuleReport, Unit
from llmprune.structured.budget import Budget
from llmprune.structured.experts import Mixture
from llmprune.structured.free import describe_free_, is_free
from llmprune.structured.scores import parameters_that_go
from llmprune.structured.slicing import Cut, slice_model_
from llmprune.structured.uniform import Widths, closest, shortfall, uniform_widths
from llmprune.structured.units import Module, Part, Units, find_units, keep_experts, select_units
from llmprune.structured.widths import describe_, uniform_counts, uniform_fields
from llmprune.structuring.choice import CHECK_TOKENS, Choice, Setting, search_texts

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
        self.modules = list(self.units.parts)
        message = left_message(self.units, not_understood(config, setting.model, setting.stack))
        self.warnings = [message] if message else []
        self.state = setting.recorded() or {"done": 0, "seconds": 0.0}

    @staticmethod
    def check(config: PruneConfig, model: PreTrainedModel, stack: Stack) -> None:
        """Refuse a model of which nothing can go, and a share that cannot."""
        units = units_of(config, model, stack)
        widths = widths_of(config, model, units.modules)
        if widths is None:
            check_share(config, units)
        else:  # whose fields may say those of modules that are left whole, too
            uniform_fields(model, units.modules, {module.name: widths[0].kept(module) for module in units.modules})

    @cached_property
    def budget(self) -> Budget:
        """How much goes."""
        name = self.setting.config.budget
        return Budget.of(self.modules, self.setting.config.sparsity, name, self._costs() if name == "latency" else None)

    @cached_property
    def widths(self) -> list[Widths] | None:
        """The pairs of widths to choose from, where all layers are to be alike."""
        return widths_of(self.setting.config, self.setting.model, self.units.modules, self.budget)

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
        changed = {module.name: cut for module in self.modules if _changes(module, cut := cuts[module.name])}
        kept = {module.name: len(cuts[module.name].kept_G) for module in self.modules}
        modules = tuple(report_of(module, kept[module.name]) for module in self.modules)  # sliced ones no longer say
        removable = sum(module.num_groups * module.parameters_per_group for module in self.modules)
        gone = sum((module.num_groups - kept[module.name]) * module.parameters_per_group for module in self.modules)
        fields = self._fields(kept)
        with eager_experts(model):
            slice_model_(
                model, self.modules, changed, setting.ids_NS[:1, :CHECK_TOKENS],
                running=lambda: dispatched(model, setting.device),
            )  # fmt: skip
        stock = bool(changed) and self._describe_(fields)
        return {
            "modules": [module.model_dump() for module in modules], "left": self.units.left, "num_removable": removable,
            "num_removed": gone, "stock": stock or not changed,
        }  # fmt: skip

    def _fields(self, kept: Mapping[str, int]) -> dict[str, int] | None:
        """What the config would have to say; None where it cannot."""
        if is_free(self.setting.model.config):  # it says other widths than the model has
            return None
        try:
            return uniform_fields(self.setting.model, self.modules, kept)
        except UnsupportedModel:
            if self.setting.config.widths == "uniform":
                raise
            return None

    def _describe_(self, fields: dict[str, int] | None) -> bool:
        """Have the config describe the sliced model; whether it is one of the stock class."""
        model = self.setting.model
        if fields is not None:
            try:
                describe_(model, self.modules, fields)
            except UnsupportedModel:
                if self.setting.config.widths == "uniform":
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
            taken = closest(self.widths, self.modules, setting.config.sparsity)
            counts = taken.removed(self.modules)
            self._tell(taken)
        running = structural_cuts(
            known, setting.stack, self.units.modules, setting.record() if method == "flap" else None, setting.device,
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
            setting.stack, self.modules, self.budget, setting.record(), setting.record(texts), setting.device,
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
                state = {**self.state, "done": step.done, "seconds": seconds, "search": tyr.snapshot()}
                setting.keep(step.done, state)
            best = step.divergence if step.phase == "search" else None
            yield Progress(stage="structure", done=step.done, total=step.total, detail=detail_of(step), value=best)
        taken = next((one for one in self.widths or () if one.removed(self.modules) == tyr.counts), None)
        if taken:
            self._tell(taken)
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
            "group_seconds": self._group_seconds(),
        }
        return tyr.cuts, report

    def _tell(self, taken: Widths) -> None:
        """Warn where attention gives less than its share."""
        if message := shortfall(taken, self.modules, self.setting.config.sparsity):
            self.warnings.append(message)

    def _costs(self) -> dict[str, float]:
        """Seconds of a group by module: measured once for a run, as another measurement would be another budget."""
        if "costs" not in self.state:
            self.state = {**self.state, "costs": self.setting.agreed(self._measure_costs)}
            self.setting.keep(0, self.state)
        known: dict[str, float] = self.state["costs"]
        return known

    def _measure_costs(self) -> dict[str, float]:
        with dispatched(self.setting.model, self.setting.device):
            return seconds_per_group(self.setting.model, self.units.modules)

    def _group_seconds(self) -> dict[Unit, float]:
        """The mean of each kind's modules; empty where nothing was timed."""
        costs = self.state.get("costs", {})
        own: dict[Unit, list[float]] = {}
        for module in self.modules if costs else ():
            own.setdefault(unit_of(module), []).append(costs[module.name])
        return {unit: fmean(seconds) for unit, seconds in own.items()}


def units_of(config: PruneConfig, model: PreTrainedModel, stack: Stack) -> Units:
    """The modules that the job may take groups from.

    Raises:
        UnsupportedModel: there are none.
    """
    units = select_units(_found_units(config, model, stack), config.skip)
    if not units.parts:
        name, why = next(iter(units.left.items()))
        raise UnsupportedModel(
            f"nothing to take out: all {len(units.left)} modules are left whole, by --skip or as they are not understood, e.g. "
            f"{name}: {why}."
        )
    return units


def _found_units(config: PruneConfig, model: PreTrainedModel, stack: Stack) -> Units:
    """All there are, experts where the method and its budget know what to do with them."""
    units = find_units(model, stack, experts=config.method == "tyr")
    if config.widths == "uniform":
        return keep_experts(units, "its experts stay where all layers keep the same widths; use --widths free")
    if config.budget == "latency":
        return keep_experts(units, "its experts cost no time: a token goes through as many, however many there are")
    return units


def not_understood(config: PruneConfig, model: PreTrainedModel, stack: Stack) -> dict[str, str]:
    """Why modules are left whole that no glob of ``--skip`` names, by name."""
    left = _found_units(config, model, stack).left
    return {name: why for name, why in left.items() if not any(fnmatchcase(name, glob) for glob in config.skip)}


def left_message(units: Units, others: Mapping[str, str]) -> str | None:
    """What to tell of modules that are left whole though nobody asked for it; None where there are none."""
    if not others:
        return None
    kinds = {part.kind for part in units.parts}
    what = {"ffn": "FFNs are sliced, no attention", "attention": "attention is sliced, no FFN", "experts": "experts go"}
    only = f"only {what[min(kinds)]}: "
    number = "1 module is" if len(others) == 1 else f"{len(others)} modules are"
    name, why = next(iter(others.items()))
    return f"{only if len(kinds) == 1 else ''}{number} left whole, e.g. {name}: {why}."


def widths_of(
    config: PruneConfig, model: PreTrainedModel, modules: Sequence[Module], budget: Budget | None = None
) -> list[Widths] | None:
    """The pairs of widths that every layer may have alike; None where layers may differ. Without a ``budget`` one of latency is
    taken for one of parameters: seconds are not known without the weights.

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
    return uniform_widths(budget or budget_of_shapes(config, modules), counts)


def check_share(config: PruneConfig, units: Units) -> None:
    """Refuse a share that cannot go, or that leaves nothing to run.

    Raises:
        ConfigError: names what can go.
    """
    if config.method == "flap":
        parameters_that_go(units.modules, config.sparsity)
        return
    counts = budget_of_shapes(config, units.parts).centre()
    if not units.left and all(count == module.num_groups for count, module in zip(counts, units.parts, strict=True)):
        raise ConfigError(f"sparsity {config.sparsity:g} takes out all groups of all modules. Use a lower --sparsity.")


def budget_of_shapes(config: PruneConfig, modules: Sequence[Part]) -> Budget:
    """The job's, but parameters in place of seconds, which are not known before the model runs."""
    return Budget.of(modules, config.sparsity, "parameters" if config.budget == "latency" else config.budget)


def settings_of(config: PruneConfig) -> TyrSettings:
    """The preset's, where no field says otherwise."""
    preset = PRESETS[config.tyr_preset]
    changes: dict[str, Any] = {
        "iterations": config.tyr_iterations, "generations": config.tyr_generations, "offspring": config.tyr_offspring
    }  # fmt: skip
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(
        preset, **given, hidden_weight=config.tyr_hidden_weight, damping=config.damping,
        sequential=config.sequential == "group", seed=config.seed,
    )  # fmt: skip


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


def unit_of(module: Part) -> Unit:
    """What one of its groups is."""
    if isinstance(module, Mixture):
        return "expert"
    return "channel" if module.kind == "ffn" else "query head" if module.multi_query else "kv group"


def report_of(module: Part, num_kept: int) -> ModuleReport:
    """What the report says of a module before it is sliced."""
    return ModuleReport(
        name=module.name, block=module.block, unit=unit_of(module), num_groups=module.num_groups, num_kept=num_kept,
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


def _changes(module: Part, cut: Cut) -> bool:
    return len(cut.kept_G) < module.num_groups or cut.weight_OK is not None or cut.bias_O is not None
