"""One structured job: choose, record, take out, check, report."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack, eager_experts
from llmprune.devices import module_device
from llmprune.errors import UnsupportedModel
from llmprune.events import Event, Warned
from llmprune.measure.dispatch import dispatched
from llmprune.patterns import Pattern
from llmprune.report import StructureReport
from llmprune.spec import PruneConfig
from llmprune.structured.free import is_free
from llmprune.structured.sizes import kv_bytes_per_token, num_parameters
from llmprune.structuring.blocks import Depth
from llmprune.structuring.choice import Choice, Chooser, Setting
from llmprune.structuring.experts import Experts
from llmprune.structuring.groups import Groups

RECORD = "structured"
_TENSORS = "choice.safetensors"
_CHOOSERS: dict[str, type[Groups] | type[Depth] | type[Experts]] = {"structured": Groups, "blocks": Depth, "experts": Experts}


def check_structure(config: PruneConfig, model: PreTrainedModel, stack: Stack) -> None:
    """Refuse what can be known before anything is measured; nothing where the job takes nothing out whole.

    Raises:
        UnsupportedModel: what is coupled to a weight is not understood, or there is nothing to take out.
        ConfigError: the target cannot be reached.
    """
    structure = Pattern.parse(config.pattern).structure
    if structure in ("blocks", "experts") and is_free(model.config):
        raise UnsupportedModel(
            f"layers of this model have widths of their own, which its config describes by layer: take {structure} out of the "
            "dense model first, and groups afterwards."
        )
    if structure:
        _CHOOSERS[structure].check(config, model, stack)


@dataclass
class Structuring:
    """The stage of one job; afterwards the model is smaller, and its stack has to be found again."""

    setting: Setting

    def __post_init__(self) -> None:
        structure = Pattern.parse(self.setting.config.pattern).structure
        assert structure
        self.chooser: Chooser = _CHOOSERS[structure](self.setting)
        self.finished = bool(self.setting.journal and self.setting.journal.has(RECORD))

    @property
    def total(self) -> int:
        """Steps of the stage."""
        return 1 if self.finished else self.chooser.total

    @property
    def done(self) -> int:
        """Steps that an earlier process recorded."""
        return self.total if self.finished else self.chooser.done

    def run(self) -> Generator[Event, None, tuple[StructureReport, float]]:
        """Choose and take out, with progress; returns the report and the seconds it took, those of earlier processes too."""
        model, config = self.setting.model, self.setting.config
        before = self._sizes()
        if self.finished:
            choice = self._recorded()
        else:
            with eager_experts(model):
                choice = yield from self.chooser.choose()
            self._record(choice)
        for message in choice.warnings:
            yield Warned(message=message)
        begun = time.perf_counter()
        parts: dict[str, Any] = {**choice.data.get("report", {}), **self.chooser.apply_(choice)}
        now = self._sizes()
        report = StructureReport(
            structure=self.chooser.structure,
            method=config.method,
            num_parameters_dense=before[0],
            num_parameters=now[0],
            kv_bytes_dense=before[1],
            kv_bytes=now[1],
            **parts,
        )
        return report, choice.data["seconds"] + time.perf_counter() - begun

    def _sizes(self) -> tuple[int, int | None]:
        model = self.setting.model
        with dispatched(model, self.setting.device):
            return num_parameters(model), kv_bytes_per_token(model)

    def _record(self, choice: Choice) -> None:
        if self.setting.journal:
            data = {**choice.data, "warnings": choice.warnings}
            self.setting.journal.write(RECORD, data, {_TENSORS: choice.tensors} if choice.tensors else {})

    def _recorded(self) -> Choice:
        journal = self.setting.journal
        assert journal is not None
        data = journal.read(RECORD, [])
        tensors = {}
        if data["sha256"]:
            data = journal.read(RECORD, [_TENSORS])
            device = module_device(self.setting.model)
            tensors = {name: tensor.to(device) for name, tensor in journal.tensors(RECORD, _TENSORS).items()}
        return Choice(data, tensors, tuple(data["warnings"]))
