"""Channel permutation of one block before it is pruned n:m: the function stays, the pattern keeps more of the score.

Only permutations that neighbouring matrices absorb are made, so that the checkpoint stays an ordinary one: see
:mod:`llmprune.anatomy.folds`. None is trusted for its names: a random permutation of its channels must leave the block's
output as it was, and permute the input of the matrix it is for.

O out, I in features; P parts of a fold, U uses and C channels of a part; T tokens, N sequences, S sequence, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from llmprune.anatomy.folds import Fold, suggest
from llmprune.anatomy.sites import Site
from llmprune.anatomy.watch import Watcher
from llmprune.channels import best_order, kept_score
from llmprune.methods import ria
from llmprune.report import BlockReport, Permutation
from llmprune.spec import Pattern
from llmprune.stats import LinearStats

CHECKED_TOKENS = 4096
"""Calibration tokens on which the input of a permuted matrix is compared, at most."""
_ROUNDINGS = 4  # of the dtype, that a reordered sum may differ by
_LEAST = 1e-5  # in fp32 and above, whose long sums lose more than that

Shot = tuple[dict[str, Tensor], Tensor]
"""Inputs of sites by name [T, I], and the block's output [N, S, H]."""


def permute_(
    block: nn.Module,
    path: str,
    sites: Sequence[Site],
    chosen: Sequence[Site],
    stats: Mapping[str, LinearStats],
    replay: Callable[[], Tensor],
    patterns: Mapping[str, Pattern],
    *,
    fixed: frozenset[str] = frozenset(),
    generator: torch.Generator,
) -> tuple[Permutation, ...]:
    """Permute the channels of those ``chosen`` sites whose neighbours take it up; one report for each that could gain.

    Args:
        block: the dense block, on the device it computes on; its name is ``path``.
        sites: all of the block.
        chosen: those that are to be pruned.
        stats: of the inputs of all sites, in the order of use; shared by sites of one input.
        replay: runs the block on one batch of calibration sequences; its hidden state [N, S, H].
        patterns: n:m of every chosen site, by name.
        fixed: sites that may not change: those used twice or shared with another block.
        generator: of the permutations the folds are tried with.
    """
    names = {site.name for site in chosen}
    suggested = {
        name: [fold for fold in folds if not fixed.intersection(_members(fold))]
        for name, folds in suggest(block, path, sites, stats).items()
        if name in names
    }
    trial = _Trial(sites, replay, generator)
    folds = trial.verified(suggested)
    reports = []
    for name in suggested:
        fold = folds.get(name)
        if not suggested[name]:
            reports.append(Permutation(site=name, reason="it or what feeds it is used more than once"))
        elif fold is None:
            reports.append(Permutation(site=name, reason="no permutation of its channels left the block's output unchanged"))
        elif fold.num_channels % (patterns[name].m or 1):
            reports.append(Permutation(site=name, reason=f"{patterns[name]} does not divide its heads of {fold.num_channels}"))
        else:
            reports.append(_reorder_(fold, stats[name], patterns[name]))
    experts = [site for site in chosen if site.expert is not None]
    if experts:
        reports.append(Permutation(site=experts[0].name, reason="experts held in one parameter keep their order"))
    return tuple(reports)


def permutation_messages(blocks: Sequence[BlockReport]) -> list[str]:
    """One line on the matrices whose channels stayed in place, with the reasons and an example of each; or none."""
    reports = [report for block in blocks for report in block.permutations]
    if not reports:
        return ["--permute found no channels that neighbouring matrices could absorb: nothing was reordered."]
    examples: dict[str, str] = {}
    for report in reports:
        if report.reason:
            examples.setdefault(report.reason, report.site)
    reasons = "; ".join(f"{reason} ({name})" for reason, name in examples.items())
    return [f"--permute left channels in place: {reasons}. The report names all."] if reasons else []


def _reorder_(fold: Fold, stats: LinearStats, pattern: Pattern) -> Permutation:
    """Give the fold the order in which the pattern keeps most of RIA's score."""
    score_OI = ria.score(fold.consumer.weight_OI, stats, generator=torch.Generator())
    whole = float(score_OI.sum(dtype=torch.float64))
    if not 0 < whole < math.inf:  # the walk says what is wrong with inputs that overflow
        return Permutation(site=fold.consumer.name, reason="its scores are all zero, or overflow")
    parts = fold.columns_PUC.to(score_OI.device)
    order_PC = torch.stack([best_order(score_OI[:, columns_UC].flatten(0, 1), pattern) for columns_UC in parts])
    before = kept_score(score_OI, pattern)
    after = kept_score(score_OI[:, fold.moved(order_PC).to(score_OI.device)], pattern)
    fold.permute_(order_PC)
    return Permutation(site=fold.consumer.name, kept_before=before / whole, kept_after=after / whole)


class _Trial:
    """Tries folds by random permutations, which are undone."""

    def __init__(self, sites: Sequence[Site], replay: Callable[[], Tensor], generator: torch.Generator) -> None:
        self.sites, self.replay, self.generator = sites, replay, generator

    def verified(self, suggested: Mapping[str, Sequence[Fold]]) -> dict[str, Fold]:
        """The folds that hold, by the site they are for: the likeliest of all at once, and if that fails one by one."""
        first = {name: folds[0] for name, folds in suggested.items() if folds}
        if not first:
            return {}
        self.dense = self._shot()
        if self._holds(list(first.values())):
            return first
        found = {}
        for name, folds in suggested.items():
            holding = next((fold for fold in folds if self._holds([fold])), None)
            if holding is not None:
                found[name] = holding
        return found

    def _holds(self, folds: Sequence[Fold]) -> bool:
        """Whether a random permutation of each leaves the block's output and permutes the inputs it should permute."""
        orders = [
            torch.stack([torch.randperm(fold.num_channels, generator=self.generator) for _ in fold.columns_PUC])
            for fold in folds
        ]
        for fold, order_PC in zip(folds, orders, strict=True):
            fold.permute_(order_PC)
        try:
            seen, output_NSH = self._shot()
        finally:
            for fold, order_PC in reversed(list(zip(folds, orders, strict=True))):  # they may share a producer
                fold.permute_(order_PC.argsort(dim=1))
        expected, dense_NSH = self.dense
        moved = {fold.consumer.name: fold.moved(order) for fold, order in zip(folds, orders, strict=True)}
        for name, x_TI in expected.items():
            wanted_TI = x_TI[:, moved[name].to(x_TI.device)] if name in moved else x_TI
            if name not in seen or not _close(seen[name], wanted_TI):
                return False
        return _close(output_NSH, dense_NSH)

    def _shot(self) -> Shot:
        inputs: dict[str, Tensor] = {}

        def on_input(site: Site, x_TI: Tensor) -> None:
            if site.name not in inputs and site.expert is None:
                inputs[site.name] = x_TI.reshape(-1, x_TI.shape[-1])[:CHECKED_TOKENS].clone()

        with Watcher(self.sites, on_input):
            output_NSH = self.replay()
        return inputs, output_NSH


def _members(fold: Fold) -> set[str]:
    return {fold.consumer.name, *(site.name for site, _ in fold.producers)}


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors [..., C] differ by no more than a reordered sum in their dtype, every channel on its own scale."""
    if ours.shape != theirs.shape:
        return False
    theirs_TC = theirs.float().flatten(0, -2)
    error_C = (ours.float().flatten(0, -2) - theirs_TC).norm(dim=0)
    allowed = max(_ROUNDINGS * torch.finfo(theirs.dtype).eps, _LEAST)
    scale_C = theirs_TC.norm(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
    return bool((error_C / scale_C).square().mean().sqrt() <= allowed)
