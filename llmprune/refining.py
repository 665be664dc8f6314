"""The stage ``refine``: the mask that a method left is improved against the loss of the whole model (engines/icbs.py)."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack
from llmprune.anatomy.sites import Site, select
from llmprune.devices import free_bytes, module_device
from llmprune.engines.gradients import can_gather
from llmprune.engines.icbs import Refinement, RefineSettings, RefineStep
from llmprune.engines.sharding import Shares
from llmprune.errors import ConfigError, DoesNotFit, UnsupportedModel
from llmprune.events import Event, Progress, Warned
from llmprune.io.journal import Journal
from llmprune.measure.dispatch import WORKING_SHARE, dispatched
from llmprune.measure.quality import windows_per_batch
from llmprune.report import MAX_POINTS, BlockReport, RefinementPoint, RefinementReport
from llmprune.spec import MAX_EXACT_BLOCK, MAX_EXHAUSTIVE_BLOCK, Pattern, PruneConfig, Scope

RECORD = "refine"
_STATE = "state.safetensors"
SNAPSHOT_SECONDS = 60.0
"""Time between two records in the journal."""
MAX_EXACT_PARAMETERS = 500_000_000
"""Size of the largest model whose exact Hessian is taken."""
PASS_TOKENS = 2048
"""Tokens of one forward and backward; a pass takes as many of them as it has sequences."""
_EXACT_BLOCK = 128  # where the block size is not said

PRESETS: dict[str, RefineSettings] = {
    "default": RefineSettings(
        num_epochs=None, steps_per_epoch=None, max_passes=50, block_size=1024, num_sequences=32, ridge=0.001, min_steps=1,
        layers_per_step=14, solver="greedy", patience=10, retries=3,
    ),
    "paper": RefineSettings(adapt_ridge=False, tolerance=math.inf),
}  # fmt: skip
"""What ``icbs_preset`` names. The paper's keeps every step; the held-out loss is measured for the report alone."""


def settings_of(config: PruneConfig, *, seq_len: int, vocab_size: int) -> RefineSettings:
    """The settings of a job: the preset's, where no field says otherwise."""
    preset = PRESETS[config.icbs_preset]
    solver = config.icbs_solver or preset.solver
    most = MAX_EXHAUSTIVE_BLOCK if solver == "exhaustive" else _EXACT_BLOCK if config.icbs_hessian == "exact" else None
    changes: dict[str, Any] = {
        "max_passes": config.icbs_passes,
        "layers_per_step": config.icbs_layers_per_step,
        "block_size": config.icbs_block_size or (most and min(most, preset.block_size)),
        "num_sequences": config.icbs_sequences,
    }
    return replace(
        preset,
        **{name: value for name, value in changes.items() if value is not None},
        num_epochs=None if config.icbs_passes else preset.num_epochs,
        hessian=config.icbs_hessian,
        solver=solver,
        batch_size=max(1, min(windows_per_batch(seq_len, vocab_size), PASS_TOKENS // seq_len)),
        seed=config.seed,
    )


def check_refinement(config: PruneConfig, model: PreTrainedModel, sites: Sequence[Site]) -> None:
    """Refuse what can be known once the model is there; nothing where the job refines no mask.

    Raises:
        UnsupportedModel: none of the sites can be refined.
        ConfigError: an exact Hessian of a model too large or of half precision.
    """
    if config.refine == "none":
        return
    if not any(can_gather(site) for site in sites):
        raise UnsupportedModel(
            f"nothing to refine: none of the {len(sites)} sites is a module of its own (experts fused into one parameter are "
            "not). Drop --refine."
        )
    if config.icbs_hessian != "exact":
        return
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if num_parameters > MAX_EXACT_PARAMETERS:
        raise ConfigError(
            f"icbs_hessian 'exact' takes up to {MAX_EXACT_BLOCK} passes a block and is for models of at most "
            f"{MAX_EXACT_PARAMETERS:,} parameters, got {num_parameters:,}. Use --icbs-hessian fisher."
        )
    if model.dtype.itemsize < 4:
        raise ConfigError(
            f"icbs_hessian 'exact' needs more digits than {str(model.dtype).removeprefix('torch.')} has. Use --dtype float32."
        )


@dataclass
class Refining:
    """One refinement of a job; N sequences of S tokens.

    Attributes:
        model: as a method left it; afterwards with the refined mask.
        dense: weights [O, I] of the sites from before, by name, on the CPU.
        ids_NS: the calibration tokens, all sequences.
        journal: where the state is kept from time to time, and found again; None keeps nothing.
        shares: of several processes, of which the first alone has a journal, what this one does.
    """

    model: PreTrainedModel
    stack: Stack
    config: PruneConfig
    dense: Mapping[str, Tensor]
    ids_NS: Tensor
    device: torch.device
    journal: Journal | None = None
    shares: Shares = field(default_factory=Shares.alone)

    def __post_init__(self) -> None:
        vocab_size = self.model.config.get_text_config().vocab_size
        self.settings = settings_of(self.config, seq_len=self.ids_NS.shape[1], vocab_size=vocab_size)
        self.sites = [site for sites in self.stack.sites for site in select(sites, self.config.skip)]
        self.num_held_out = self.config.num_held_out
        self.scope: Scope = "row" if self.config.scope == "row" else "matrix"
        self.before = self.shares.by_first(self._recorded)

    @property
    def total(self) -> int:
        """Passes at most."""
        return self.settings.passes(sum(can_gather(site) for site in self.sites)) or 0

    @property
    def done(self) -> int:
        """Passes that an earlier process recorded."""
        return len(self.before[1]["history"]) - 1 if self.before else 0

    @property
    def seconds_before(self) -> float:
        """What they took."""
        return float(self.before[1]["history"][-1]["seconds"]) if self.before else 0.0

    def run(self) -> Generator[Event, None, RefinementReport]:
        """Refine the model in place, with a word after every pass; returns the report. Closing it leaves a valid mask.

        Raises:
            DoesNotFit: the device cannot hold the whole model.
            NonFiniteError: gradients stay NaN or inf.
        """
        self.shares.together(self._require_room)
        with dispatched(self.model, self.device):
            refinement = self._start()
            for message in self._messages(refinement):
                yield Warned(message=message)
            recorded = time.perf_counter()
            for step in refinement.run():
                detail, passes = f"held-out loss {step.held_out:.4f}", len(refinement.history) - 1
                yield Progress(stage="refine", done=passes, total=self.total, detail=detail, value=step.held_out)
                recorded = self.shares.by_first(partial(self._record_when_due, refinement, recorded))
            self.shares.by_first(partial(self._record, refinement))
        return self._report(refinement)

    def _start(self) -> Refinement:
        device = module_device(self.model)
        ids_NS = self.ids_NS.to(device)
        refinement = Refinement.of(
            self.model, self.sites, self.dense, ids_NS[: -self.num_held_out], ids_NS[-self.num_held_out :], self.settings,
            pattern=Pattern.parse(self.config.pattern), scope=self.scope, shares=self.shares,
        )  # fmt: skip
        if self.before:
            name, data = self.before
            refinement.restore_(data, self.shares.by_first(lambda: self.journal.tensors(name, _STATE) if self.journal else {}))
        return refinement

    def _recorded(self) -> tuple[str, dict[str, Any]] | None:
        """The newest state that an earlier process left: its name and plain data."""
        name = self.journal.latest(RECORD) if self.journal else None
        return (name, self.journal.read(name, [_STATE])) if self.journal and name else None

    def _record_when_due(self, refinement: Refinement, recorded: float) -> float:
        """Keep the state if that was last done, ``recorded``, too long ago; when it was last done."""
        if time.perf_counter() - recorded <= SNAPSHOT_SECONDS:
            return recorded
        self._record(refinement)
        return time.perf_counter()

    def _record(self, refinement: Refinement) -> None:
        if self.journal:
            data, tensors = refinement.snapshot()
            self.journal.write_latest(RECORD, len(refinement.history) - 1, data, {_STATE: tensors})

    def _require_room(self) -> None:
        """A mask is changed where it lies: weights that accelerate spreads over several places cannot be refined."""
        if self.device.type == "cpu" or module_device(self.model).type != "cpu":
            return
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        if size > WORKING_SHARE * free_bytes(self.device):
            raise DoesNotFit(
                f"refine needs the whole model ({size / 1e9:.2f} GB) on {self.device} at once. Use --device cpu, a smaller "
                "--dtype, or drop --refine."
            )

    def _messages(self, refinement: Refinement) -> list[str]:
        messages = []
        if left := len(self.sites) - len(refinement.states):
            messages.append(
                f"{left} of {len(self.sites)} sites keep the mask of the method: they are not modules of their own, or the "
                "model did not call them."
            )
        if crowded := refinement.crowded:
            messages.append(
                f"{crowded[0]}{f' and {len(crowded) - 1} more sites' if len(crowded) > 1 else ''}: fewer weights are free than "
                f"a block has ({self.settings.block_size}), so that each block takes all of them. A smaller --icbs-block-size "
                "tries them in turn."
            )
        return messages

    def _report(self, refinement: Refinement) -> RefinementReport:
        settings, history = refinement.settings, refinement.history
        assert isinstance(settings.solver, str)
        return RefinementReport(
            name="icbs",
            preset=self.config.icbs_preset,
            hessian=settings.hessian,
            solver=settings.solver,
            block_size=settings.block_size,
            layers_per_step=min(settings.layers_per_step or len(refinement.states), len(refinement.states)),
            num_sequences=min(settings.num_sequences, len(refinement.ids_NS)),
            num_held_out=self.num_held_out,
            scope=str(Pattern.parse(self.config.pattern)) if Pattern.parse(self.config.pattern).m else self.scope,
            num_sites=len(refinement.states),
            points=tuple(points_of(history)),
            stopped=refinement.stopped,
        )


def copy_weights(sites: Sequence[Site]) -> dict[str, Tensor]:
    """The sites' weights [O, I] by name, in CPU memory."""
    return {site.name: site.weight_OI.to("cpu", copy=True) for site in sites}


def put_back(sites: Sequence[Site], dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make the sites dense again, in place; which weights they had kept, bool [O, I] by name."""
    supports = {}
    for site in sites:
        supports[site.name] = site.weight_OI != 0
        site.weight_OI.copy_(dense[site.name])
    return supports


def tuned_report(pruned: BlockReport, tuned: BlockReport) -> BlockReport:
    """One report of a block that was pruned and, in a later walk, tuned: scores of the one, zeros of the other."""
    zeros = {site.name: site.num_zeros for site in tuned.sites}
    sites = tuple(site.model_copy(update={"num_zeros": zeros[site.name]}) for site in pruned.sites)
    seconds = pruned.seconds + tuned.seconds
    return pruned.model_copy(update={"sites": sites, "seconds": seconds, "reconstruction": tuned.reconstruction})


def points_of(history: Sequence[RefineStep]) -> list[RefinementPoint]:
    """The course of a refinement in at most MAX_POINTS points, first and last among them; numbers count from the start."""
    every = max(1, math.ceil((len(history) - 1) / (MAX_POINTS - 1)))
    points, num_swaps, num_accepted = [], 0, 0
    for number, step in enumerate(history):
        num_swaps += step.num_swaps
        num_accepted += step.accepted and number > 0
        if number % every == 0 or number == len(history) - 1:
            points.append(
                RefinementPoint(
                    num_passes=number, num_blocks=step.step, num_accepted=num_accepted, num_swaps=num_swaps,
                    loss=step.held_out, seconds=step.seconds,
                )
            )  # fmt: skip
    return points
