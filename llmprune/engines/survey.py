"""The survey: one pass over the dense model that gathers what an allocation must know of every site.

For allocations by scores: the Wanda scores' outliers and PQ index. For allocations by curves: how much each site distorts
the model's output at several sparsities, as

    distortion(s) = KL(target) * error(s) / error(target)

error(s) is the relative squared output error of the site pruned by the job's own method on the dense calibration inputs (no
forward is needed for it, the Gram matrix gives it); KL(target) is measured: the site alone is pruned to the target, and a
few calibration sequences are carried through the rest of the dense model to its logits. A small change of a layer's output
changes KL by a quadratic form in it (the first-order term vanishes at the dense model), so one measured KL fixes the scale
of a curve whose shape the output error gives. All perturbed streams travel together, so a block is brought to the device
once.

O out, I in features; N sequences of S tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmprune.allocate import Facts, SiteFacts
from llmprune.allocate.budget import Budget
from llmprune.allocate.mixed import Menu
from llmprune.allocate.owl import OUTLIER_FACTOR
from llmprune.allocate.pqi import P, Q
from llmprune.anatomy.blocks import Call, Recording, Stack
from llmprune.anatomy.sites import Site, select, write_
from llmprune.devices import module_device
from llmprune.engines.layerwise import MIN_EXPERT_TOKENS, Statistics, Walk, relative_output_error
from llmprune.engines.sharding import Shares
from llmprune.events import Progress
from llmprune.methods import Method, get_method
from llmprune.spec import Need, Pattern, PruneConfig, Target
from llmprune.stats import LinearStats

PROBE_TOKENS = 4096
"""Calibration tokens on which a site's effect on the model's output is measured, about."""
_BELOW, _ABOVE = 0.3, 0.3
_STEPS_A_SIDE = 4

Logits = Callable[[int, Tensor], Tensor]
"""(index of a probe sequence, the last block's output [1, S, H]) -> logits [1, S, V]."""


@dataclass
class Survey:
    """One survey of a recorded model; the model is as before afterwards.

    Attributes:
        recording: the calibration batches.
        probe: the few sequences of one batch whose divergence is measured; None unless curves are asked for.
        statistics: where statistics of the dense model may be found, and are put.
        facts: what was found, in the order of the sites; whole once ``run`` (with curves ``measure`` too) is done.
        shares: what one of several processes does, which has some of the batches.
    """

    stack: Stack
    recording: Recording
    config: PruneConfig
    device: torch.device
    needs: Facts
    probe: Recording | None = None
    statistics: Statistics | None = None
    facts: list[SiteFacts] = field(default_factory=list)
    shares: Shares | None = None

    def __post_init__(self) -> None:
        self._streams = _Streams(self.stack, self.probe) if self.probe else None

    @torch.no_grad()
    def run(self) -> Iterator[Progress]:
        """Gather the facts, one step a block; curves are relative errors until :meth:`measure` scales them.

        Raises:
            NonFiniteError: NaN or inf in a block's output; names the block.
            FactorizationError: names the site.
        """
        blocks = self.stack.blocks
        walk = surveyor(self.stack, self.recording, self.config, self.device, self.shares)
        walk.needs, walk.statistics = surveyed_need(self.needs), self.statistics
        total = len(blocks) + (len(self.probe.hidden[0]) if self.probe else 0)
        for index, block in enumerate(blocks):
            sites = select(self.stack.sites[index], self.config.skip)
            with self.stack.placed(index, self.device):
                stats = walk.collect(index, block, {site.name: site for site in sites}, whole=True, keep=True)
                if self.needs == "scores":
                    self.facts += _scores_of(index, sites, stats)
                else:
                    assert self._streams is not None
                    groups = groups_of(sites)
                    curves = self._curves(walk, list(groups.values()), stats)
                    for (group, members), curve in zip(groups.items(), curves, strict=True):
                        targets = targets_of(self.config, members[0])
                        if anchor := anchor_of(targets, self.config.sparsity):
                            self._streams.branch(group, index, block, _pruned(walk, members, stats, anchor))
                        self.facts += [SiteFacts(site.name, index, site.shape, group=group, curve=curve) for site in members]
                    self._streams.advance(index, block)
            yield Progress(stage="allocate", done=index + 1, total=total, detail=self.stack.name(index))

    def _curves(
        self, walk: Walk, groups: Sequence[Sequence[Site]], stats: Mapping[str, LinearStats]
    ) -> list[tuple[tuple[float, float], ...]]:
        """The relative errors of each group; of several processes each finds those of some."""
        shares = self.shares or Shares.alone()
        own = range(shares.rank, len(groups), shares.size)

        def work() -> dict[int, tuple[tuple[float, float], ...]]:
            return {
                number: _errors_of(walk, groups[number], stats, targets_of(self.config, groups[number][0])) for number in own
            }

        found = {number: curve for part in shares.together(work) for number, curve in part.items()}
        return [found[number] for number in range(len(groups))]

    @torch.no_grad()
    def measure(self, logits: Logits) -> Iterator[Progress]:
        """Turn the curves into nats, by the divergence of every group's stream; one step a probe sequence."""
        assert self._streams is not None and self.probe is not None
        num_probes = len(self.probe.hidden[0])
        total = len(self.stack.blocks) + num_probes
        divergence: dict[str, float] = dict.fromkeys(self._streams.branches, 0.0)
        for number in range(num_probes):
            self._streams.add_divergence_(divergence, number, logits)
            yield Progress(stage="allocate", done=len(self.stack.blocks) + number + 1, total=total, detail="divergence")
        for number, fact in enumerate(self.facts):
            anchors = [level for level, _ in fact.curve if level > 0]
            if anchors and fact.group in divergence:
                anchor = min(anchors, key=lambda level: abs(level - self.config.sparsity))
                self.facts[number] = _scaled(fact, divergence[fact.group] / num_probes, anchor)


def surveyed_need(needs: Facts) -> Need:
    """The statistics that the facts are taken from."""
    return Need.GRAM if needs == "curves" else Need.NORM


def shapes_of(stack: Stack, skip: Sequence[str]) -> list[SiteFacts]:
    """What is known of the sites without looking at weights or inputs."""
    return [
        SiteFacts(site.name, index, site.shape, group_of(site))
        for index, sites in enumerate(stack.sites)
        for site in select(sites, skip)
    ]


def surveyor(
    stack: Stack, recording: Recording, config: PruneConfig, device: torch.device, shares: Shares | None = None
) -> Walk:
    """A walk that prunes as the job does, or as the method does that stands in for a slow one."""
    walk = Walk(stack, recording, config.model_copy(update={"reconstruct": False}), device, shares=shares)
    walk.method = surveyed_by(config)
    return walk


def surveyed_by(config: PruneConfig) -> Method:
    """The method that sites are pruned by to see what it costs: the job's own, or a faster one in its place."""
    own = get_method(config.method)
    return get_method(own.surveyed_by) if own.surveyed_by else own


def check_budget(config: PruneConfig, sites: Sequence[Site]) -> None:
    """Raise ConfigError where the allocation's budget cannot be met, naming the closest one that can."""
    if Pattern.parse(config.pattern).mixed:
        Menu.of([_menu_fact(config, site) for site in sites], config.sparsity)
    elif config.allocation != "uniform":
        scope = config.target(get_method(config.method).scope).scope
        budget = Budget.of([site.shape for site in sites], config.sparsity, scope)
        budget.apportion(budget.shift([config.sparsity] * len(sites)))


def _menu_fact(config: PruneConfig, site: Site) -> SiteFacts:
    """A site whose choices are known, but not what they cost."""
    curve = tuple((target.sparsity, 0.0) for target in targets_of(config, site))
    return SiteFacts(site.name, 0, site.shape, group_of(site), curve=curve)


def targets_of(config: PruneConfig, site: Site) -> tuple[Target, ...]:
    """What the site is pruned to in the survey: sparsities around the job's, or under ``mixed`` the patterns it may have."""
    target = config.target(get_method(config.method).scope)
    if target.pattern.mixed:
        return config.choices(site.shape[1], target.scope)
    return tuple(replace(target, sparsity=level) for level in levels(config.sparsity))


def anchor_of(targets: Sequence[Target], sparsity: float) -> Target | None:
    """The one whose divergence is measured: nearest to the job's sparsity; None where the site can only stay dense."""
    pruned = [target for target in targets if target.sparsity > 0]
    return min(pruned, key=lambda target: abs(target.sparsity - sparsity), default=None)


def levels(sparsity: float) -> list[float]:
    """The sparsities at which a site's error is measured: the target and four on each side of it."""
    low, high = max(0.0, sparsity - _BELOW), sparsity + min(_ABOVE, 0.8 * (1 - sparsity))
    below = [low + (sparsity - low) * step / _STEPS_A_SIDE for step in range(_STEPS_A_SIDE)]
    above = [sparsity + (high - sparsity) * step / _STEPS_A_SIDE for step in range(1, _STEPS_A_SIDE + 1)]
    return sorted({*below, sparsity, *above})


def probe_sequences(num_samples: int, seq_len: int) -> int:
    """How many calibration sequences the divergence is measured on."""
    return max(1, min(num_samples, PROBE_TOKENS // seq_len))


def group_of(site: Site) -> str:
    """The name that the experts of one parameter share; a site's own name for any other."""
    if site.expert is not None:
        return site.name.rpartition(".")[0]
    return re.sub(r"(experts?)\.\d+(?=\.)", r"\1", site.name)


def pq_index(score_OI: Tensor) -> float:
    """1 - d^(1/Q - 1/P) ||x||_P / ||x||_Q of d scores; 0 where all are zero."""
    score = score_OI.double()
    one, other = float(score.pow(P).sum()) ** (1 / P), float(score.pow(Q).sum()) ** (1 / Q)
    return max(0.0, 1 - score.numel() ** (1 / Q - 1 / P) * one / other) if other > 0 else 0.0


def groups_of(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """The sites of every group, in order."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(group_of(site), []).append(site)
    return groups


def _scores_of(index: int, sites: Sequence[Site], stats: Mapping[str, LinearStats]) -> list[SiteFacts]:
    """Outliers and PQ index of each site; an outlier is one against the mean of the whole block's scores."""
    total = sum(float(_wanda(site, stats.get(site.name)).sum(dtype=torch.float64)) for site in sites)
    threshold = OUTLIER_FACTOR * total / max(1, sum(site.numel for site in sites))
    facts = []
    for site in sites:
        score_OI = _wanda(site, stats.get(site.name))
        num_outliers = int((score_OI > threshold).sum())
        facts.append(SiteFacts(site.name, index, site.shape, group_of(site), num_outliers, pq_index(score_OI)))
    return facts


def _wanda(site: Site, stats: LinearStats | None) -> Tensor:
    """|W_ij| ||x_j|| / sqrt(T), fp32 [O, I]: per token, so that the experts of a block compare; of a site that hardly any
    token reached |W_ij|.
    """
    score_OI = site.weight_OI.float().abs()
    if stats is None or (site.expert is not None and stats.num_tokens < MIN_EXPERT_TOKENS):
        return score_OI
    return score_OI * (stats.sq_I / stats.num_tokens).sqrt()


def _errors_of(
    walk: Walk, members: Sequence[Site], stats: Mapping[str, LinearStats], targets: Sequence[Target]
) -> tuple[tuple[float, float], ...]:
    """(sparsity, mean relative error of the members) at every target."""
    return tuple(
        (target.sparsity, sum(_error(walk, site, stats, target) for site in members) / len(members)) for target in targets
    )


def _error(walk: Walk, site: Site, stats: Mapping[str, LinearStats], target: Target) -> float:
    """Relative squared error of the site's output, of its weights where its input was not seen."""
    if target.sparsity == 0:
        return 0.0
    pruned_OI, used, _ = walk.solve(site, stats.get(site.name), target)
    error = relative_output_error(site.weight_OI, pruned_OI, used)
    if error is not None:
        return error
    dense_OI = site.weight_OI.float()
    whole = float(dense_OI.square().sum(dtype=torch.float64))
    return float((dense_OI - pruned_OI.float()).square().sum(dtype=torch.float64)) / whole if whole else 0.0


def _pruned(walk: Walk, members: Sequence[Site], stats: Mapping[str, LinearStats], target: Target) -> list[tuple[Site, Tensor]]:
    return [(site, walk.solve(site, stats.get(site.name), target)[0]) for site in members]


def _scaled(fact: SiteFacts, divergence: float, sparsity: float) -> SiteFacts:
    """The curve in nats: its errors times the divergence over the error at the target."""
    errors = dict(fact.curve)
    scale = max(divergence, 0.0) / errors[sparsity] if errors[sparsity] > 0 else 0.0
    return replace(fact, curve=tuple((level, error * scale) for level, error in fact.curve))


class _Streams:
    """The probe sequences on their way through the dense blocks: unperturbed, and once for every pruned group."""

    def __init__(self, stack: Stack, probe: Recording) -> None:
        self.stack = stack
        self.stateful = probe.stateful
        self.dense_NSH = probe.hidden[0]
        self.calls = probe.calls[0]
        self.branches: dict[str, tuple[Tensor, list[Call]]] = {}

    def branch(self, group: str, index: int, block: nn.Module, pruned: list[tuple[Site, Tensor]]) -> None:
        """Start a stream at block ``index``: its output with the group pruned, which is undone."""
        # A mutable object that blocks hand on belongs to one stream.
        calls = copy.deepcopy(self.calls) if self.stateful else self.calls
        dense = [site.stored.clone() for site, _ in pruned]
        try:
            for site, weight_OI in pruned:
                write_(site, weight_OI)
            self.branches[group] = (self._forward(index, block, self.dense_NSH, calls), calls)
        finally:
            for (site, _), stored in zip(pruned, dense, strict=True):
                site.stored.copy_(stored)

    def advance(self, index: int, block: nn.Module) -> None:
        """Carry all streams that began at an earlier block through this one."""
        self.dense_NSH = self._forward(index, block, self.dense_NSH, self.calls)
        here = {group_of(site) for site in self.stack.sites[index]}
        for group, (hidden_NSH, calls) in self.branches.items():
            if group not in here:
                self.branches[group] = (self._forward(index, block, hidden_NSH, calls), calls)

    def add_divergence_(self, divergence: dict[str, float], number: int, logits: Logits) -> None:
        """Add each stream's mean KL(dense || pruned) over the tokens of one probe sequence, in nats."""
        dense_SV = F.log_softmax(logits(number, self.dense_NSH[number : number + 1])[0].float(), dim=-1)
        for group, (hidden_NSH, _) in self.branches.items():
            other_SV = F.log_softmax(logits(number, hidden_NSH[number : number + 1])[0].float(), dim=-1)
            kl_S = F.kl_div(other_SV, dense_SV, log_target=True, reduction="none").sum(-1)
            divergence[group] += float(kl_S.mean(dtype=torch.float64).nan_to_num(nan=1e9, posinf=1e9))

    def _forward(self, index: int, block: nn.Module, hidden_NSH: Tensor, calls: list[Call]) -> Tensor:
        return calls[index].run(block, hidden_NSH.to(module_device(block))).to(hidden_NSH.device)
