"""What every expert of a mixture is worth: its router-weighted activation (REAP, arXiv 2510.13999), and how often it is chosen.

E experts, K chosen for a token, T tokens, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.anatomy.blocks import Recording, Stack
from llmprune.engines.sharding import Shares
from llmprune.errors import NonFiniteError, UnsupportedModel
from llmprune.structured.experts import Mixture, Muted


@dataclass(frozen=True)
class ExpertScores:
    """The experts of one mixture.

    Attributes:
        saliency_E: mean over the tokens an expert was chosen for of gate * ||output||, fp64; 0 where it never was.
        count_E: tokens it was chosen for, int64.
    """

    saliency_E: Tensor
    count_E: Tensor


def expert_scores(
    stack: Stack, mixtures: Sequence[Mixture], recording: Recording, device: torch.device, shares: Shares | None = None
) -> Generator[int, None, tuple[ExpertScores, ...]]:
    """Score all experts on the calibration tokens; yields the number of blocks done, returns the scores of every mixture.

    REAP's S_j = mean over the tokens routed to j of g_j(x) ||f_j(x)||_2, with g the weight by which the family adds the
    expert's output to the others': after its softmax or sigmoid, its normalisation over the chosen ones where it has one, and
    its scale. The authors' release normalises it over the chosen ones in every family. Of several processes each has recorded
    some of the sequences; their sums are added up.

    Raises:
        UnsupportedModel: a mixture is not handed tokens, chosen experts and their weights; names it.
        NonFiniteError: NaN or inf in an expert's output; names the mixture.
    """
    found = yield from (shares or Shares.alone()).gathered(_sums(stack, mixtures, recording, device))
    return tuple(
        _scores(*(torch.stack(sums).sum(0) for sums in zip(*parts, strict=True))) for parts in zip(*found, strict=True)
    )


@torch.no_grad()
def _sums(
    stack: Stack, mixtures: Sequence[Mixture], recording: Recording, device: torch.device
) -> Generator[int, None, list[tuple[Tensor, Tensor]]]:
    """Of every mixture what :func:`_scores` is of."""
    by_block = {mixture.block: mixture for mixture in mixtures}
    calls = copy.deepcopy(recording.calls) if recording.stateful else recording.calls
    streams = list(recording.hidden)
    found = []
    for index, block in enumerate(stack.blocks):
        mixture = by_block.get(index)
        with stack.placed(index, device) as here:
            tally = Tally(Muted(mixture, block, stack.name(index))) if mixture else None
            try:
                for chunk, before_NSH in enumerate(streams):
                    streams[chunk] = calls[chunk][index].run(block, before_NSH.to(here)).to(before_NSH.device)
            finally:
                if tally:
                    tally.handle.remove()
        if tally:
            found.append((tally.sum_E, tally.count_E))
        yield index + 1
    return found


def _scores(sum_E: Tensor, count_E: Tensor) -> ExpertScores:
    return ExpertScores(sum_E / count_E.clamp(min=1), count_E)


def best_experts(score_E: Tensor, count: int, num_groups: int = 1) -> list[int]:
    """The ``count`` experts of the highest score, rising; equally many of each group of consecutive ones, of equals the first.

    Raises:
        ValueError: the groups do not divide the count.
    """
    if count % num_groups:
        raise ValueError(f"{count} experts are not equally many of {num_groups} groups; keep a multiple of {num_groups}.")
    score_GM = score_E.view(num_groups, -1)
    order_GM = score_GM.argsort(dim=1, descending=True, stable=True)[:, : count // num_groups]
    starts_G = torch.arange(num_groups, device=score_E.device) * score_GM.shape[1]
    return sorted((order_GM + starts_G[:, None]).flatten().tolist())


class Tally:
    """Adds up what the experts of a mixture put out, one by one, each time their module is called.

    Args:
        place: where the mixture is.
        outputs: whether they are run for it; else only how often they are chosen is counted.
    """

    def __init__(self, place: Muted, *, outputs: bool = True) -> None:
        self.mixture, self.outputs = place.mixture, outputs
        self.sum_E = torch.zeros(self.mixture.num_experts, dtype=torch.float64)
        self.count_E = torch.zeros(self.mixture.num_experts, dtype=torch.int64)
        self.inside = False
        self.handle = place.module(self.mixture.experts).register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.inside:
            return
        given = [*args, *kwargs.values()]
        if len(given) != 3 or given[1].is_floating_point() or given[1].shape != given[2].shape:
            raise UnsupportedModel(
                f"{self.mixture.experts} is not handed tokens, the experts chosen for them, and their weights."
            )
        hidden_TH = given[0].reshape(-1, given[0].shape[-1])
        index_TK, gate_TK = (one.reshape(len(hidden_TH), -1) for one in given[1:])
        self.inside = True
        try:
            for expert in index_TK.unique().tolist():
                if expert < self.mixture.num_experts:  # beyond it is a token that chooses none
                    self._add(experts, expert, hidden_TH, index_TK, gate_TK)
        finally:
            self.inside = False

    def _add(self, experts: nn.Module, expert: int, hidden_TH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> None:
        token_T, slot_T = torch.where(index_TK == expert)
        self.count_E[expert] += len(token_T)
        if not self.outputs:
            return
        alone_T1 = index_TK.new_full((len(token_T), 1), expert)
        output_TH = experts(hidden_TH[token_T], alone_T1, gate_TK.new_ones(len(token_T), 1))
        worth_T = gate_TK[token_T, slot_T].float() * output_TH.reshape(len(token_T), -1).float().norm(dim=-1)
        if not bool(worth_T.isfinite().all()):
            raise NonFiniteError(f"expert {expert} of {self.mixture.experts} puts out NaN or inf.")
        self.sum_E[expert] += float(worth_T.sum(dtype=torch.float64))

    def scores(self) -> ExpertScores:
        """Of what was seen so far."""
        return _scores(self.sum_E, self.count_E)
