"""Which whole blocks to take out of a model: by how little they turn the hidden state (ShortGPT, arXiv 2403.03853), by what
the model loses without each of them, or by a quadratic model of what it loses without several (arXiv 2602.00161).

Everything is streamed block by block over recorded inputs. Models that lack different blocks travel together and share their
forwards up to the first block in which they differ, so what each of L blocks alone is worth costs about L^2 / 2 block forwards,
and what each pair is worth L^3 / 6. Of several processes each has some of the sequences, and sums over tokens are added up.

L blocks, M of them removed, R sets of blocks; N sequences of S tokens, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.anatomy.blocks import Recording, Stack
from llmprune.engines.divergence import Head
from llmprune.engines.sharding import Shares
from llmprune.errors import NonFiniteError, UnsupportedModel
from llmprune.solvers.anneal import anneal
from llmprune.solvers.problem import BlockProblem

DepthMethod = Literal["shortgpt", "drop-one", "block-qubo"]
Blocks = tuple[int, ...]
"""Numbers of blocks, rising."""
_MAX_STATES = 200_000  # tried one by one; beyond it the annealer and swaps of its answers
_NUM_SEEDS = 5
_WORST = 1e4  # nats: a model that is further away, or broken, is as bad as one at this


@dataclass(frozen=True)
class DepthChoice:
    """Which blocks go, and what that was decided by.

    Attributes:
        removed: the blocks.
        kl: mean KL(dense || model without them) over the tokens, nats.
        scores: of every block alone: 1 - cosine of its output with its input for ``shortgpt``, else the KL without it.
        tried: every set of that many blocks whose KL was measured, and its KL, the least first.
    """

    removed: Blocks
    kl: float
    scores: tuple[float, ...]
    tried: tuple[tuple[Blocks, float], ...]


def choose_blocks(
    method: DepthMethod,
    stack: Stack,
    recording: Recording,
    device: torch.device,
    head: Head,
    count: int,
    *,
    num_measured: int = 20,
    seed: int = 0,
    shares: Shares | None = None,
) -> Generator[int, None, DepthChoice]:
    """Choose ``count`` blocks to remove; yields the steps done, of :func:`num_steps`, and returns the choice.

    Args:
        method: ``shortgpt`` and ``drop-one`` remove those of the least score; ``block-qubo`` minimises its quadratic model over
            all sets of that many blocks, measures the best of them, and takes the one of the least KL.
        stack: probed.
        recording: of the tokens to measure on, or of this process's.
        device: where the blocks run.
        head: the model's own, on the last block's outputs.
        count: M, from 1 to L - 1.
        num_measured: sets that ``block-qubo`` measures: its energies tell good sets from bad ones, not the best of the good.
        seed: of the annealer, for sets too many to try all.
        shares: of several processes what this one does.

    Raises:
        ValueError: ``count`` is out of range.
        UnsupportedModel: blocks hand on more than the hidden state.
        NonFiniteError: NaN or inf in the dense model's outputs.
    """
    num_blocks = len(stack.blocks)
    if not 0 < count < num_blocks:
        raise ValueError(f"{count} of {num_blocks} blocks cannot be removed; choose 1 to {num_blocks - 1}.")
    if method == "shortgpt":
        scores = yield from block_influence(stack, recording, device, shares)
        sets = [_least(scores, count)]
    elif method == "drop-one":
        scores = yield from drop_one(stack, recording, device, head, shares)
        sets = [_least(scores, count)]
    else:
        problem, scores = yield from block_qubo(stack, recording, device, head, count, shares)
        sets = lowest_states(problem, count, num_measured, seed=seed)
    done = num_steps(method, num_blocks, count) - num_blocks
    losses = yield from divergences(stack, recording, device, head, sets, start=done, shares=shares)
    tried = sorted(zip(sets, losses.tolist(), strict=True), key=lambda one: one[1])
    return DepthChoice(*tried[0], tuple(scores.tolist()), tuple(tried))


def num_steps(method: DepthMethod, num_blocks: int, count: int) -> int:
    """Passes of a block that :func:`choose_blocks` makes, each for all the models that travel together."""
    return num_blocks * (num_blocks + 1 if method == "block-qubo" and count > 1 else 2)


def block_influence(
    stack: Stack, recording: Recording, device: torch.device, shares: Shares | None = None
) -> Generator[int, None, Tensor]:
    """ShortGPT's block influence BI = 1 - mean over tokens of cos(x, block(x)), fp64 [L]; yields the number of blocks done."""
    found = yield from (shares or Shares.alone()).gathered(_influences(stack, recording, device))
    num_tokens = sum(count for _, count in found)
    return torch.tensor([sum(parts) / num_tokens for parts in zip(*(totals for totals, _ in found), strict=True)]).double()


@torch.no_grad()
def _influences(stack: Stack, recording: Recording, device: torch.device) -> Generator[int, None, tuple[list[float], int]]:
    """Of every block the sum over tokens, and their number."""
    totals = []
    streams = list(recording.hidden)
    for index, block in enumerate(stack.blocks):
        total = 0.0
        with stack.placed(index, device) as here:
            for chunk, before_NSH in enumerate(streams):
                before_NSH = before_NSH.to(here)
                after_NSH = recording.calls[chunk][index].run(block, before_NSH)
                total += float(influence(before_NSH, after_NSH).sum(dtype=torch.float64))
                streams[chunk] = after_NSH.to(streams[chunk].device)
        totals.append(total)
        yield index + 1
    return totals, sum(before_NSH.shape[:-1].numel() for before_NSH in streams)


def influence(before_TH: Tensor, after_TH: Tensor) -> Tensor:
    """1 - cos(x, y) of every token, fp32, in [0, 2]."""
    return 1 - F.cosine_similarity(before_TH.float(), after_TH.float(), dim=-1)


def drop_one(
    stack: Stack, recording: Recording, device: torch.device, head: Head, shares: Shares | None = None
) -> Generator[int, None, Tensor]:
    """KL(dense || model without block l) for every l, fp64 [L]; yields the number of blocks done."""
    sets = [(index,) for index in range(len(stack.blocks))]
    return (yield from divergences(stack, recording, device, head, sets, shares=shares))


def divergences(
    stack: Stack, recording: Recording, device: torch.device, head: Head, sets: Sequence[Blocks], *, start: int = 0,
    shares: Shares | None = None,
) -> Generator[int, None, Tensor]:  # fmt: skip
    """Mean KL(dense || model without these blocks) over the tokens, fp64 [R]; yields ``start`` plus the number of blocks done.

    A model whose logits are not finite is inf away.
    """
    found = yield from (shares or Shares.alone()).gathered(_divergences(stack, recording, device, head, sets, start))
    sums_R = torch.stack([part_R for part_R, _ in found]).sum(0)
    return torch.where(sums_R.isnan(), torch.inf, sums_R / sum(count for _, count in found)).clamp(min=0)


@torch.no_grad()
def _divergences(
    stack: Stack, recording: Recording, device: torch.device, head: Head, sets: Sequence[Blocks], start: int
) -> Generator[int, None, tuple[Tensor, int]]:
    """Of every set the sum over tokens, fp64 [R], and their number."""
    outputs = yield from _outputs(stack, recording, device, [(), *sets], start)
    sums_R = torch.zeros(len(sets), dtype=torch.float64)
    num_tokens = 0
    with head() as logits:
        for chunk in range(len(recording.hidden)):
            dense_TV = _log_probs(logits(chunk, outputs[(), chunk]))
            num_tokens += len(dense_TV)
            for number, one in enumerate(sets):
                sums_R[number] += float(_kl(dense_TV, _log_probs(logits(chunk, outputs[one, chunk]))))
    return sums_R, num_tokens


def block_qubo(
    stack: Stack, recording: Recording, device: torch.device, head: Head, count: int, shares: Shares | None = None
) -> Generator[int, None, tuple[BlockProblem, Tensor]]:
    """The quadratic model of what the model loses without several blocks; yields steps done (see :func:`num_steps`), returns
    the problem with ``count`` blocks to remove, and the KL without each alone, fp64 [L].

    With one gate a block, at 1 in the dense model, the paper expands the loss to second order in the gates by its derivatives.
    Here the coefficients are measured with the gates closed: E(x) = sum of KL_i x_i + sum over pairs of (KL_ij - KL_i - KL_j)
    x_i x_j is exact for one block and for two, and ranks larger sets better than derivatives at open gates do. The pairs cost
    about L^2 / 6 forwards of the model; only the streams of one first block are in memory at a time.
    """
    num_blocks = len(stack.blocks)
    alone_L = yield from drop_one(stack, recording, device, head, shares)
    pair_LL = torch.zeros(num_blocks, num_blocks, dtype=torch.float64)
    for first in range(num_blocks - 1 if count > 1 else 0):
        sets = [(first, second) for second in range(first + 1, num_blocks)]
        losses = yield from divergences(stack, recording, device, head, sets, start=(first + 1) * num_blocks, shares=shares)
        pair_LL[first, first + 1 :] = losses
    return quadratic(alone_L, pair_LL, count), alone_L


def quadratic(alone_L: Tensor, pair_LL: Tensor, count: int) -> BlockProblem:
    """E(x) = sum of a_i x_i + sum over i < j of (p_ij - a_i - a_j) x_i x_j, to be minimised with ``count`` of the x at 1; all
    p at 0 means that pairs are not known, and only the first sum is there.

    As x_i^2 = x_i, what makes the matrix of the pairs positive semidefinite is added to its diagonal and taken from the linear
    term.
    """
    alone_L, pair_LL = alone_L.clamp(max=_WORST), pair_LL.clamp(max=_WORST)
    coupled_LL = torch.zeros_like(pair_LL)
    if bool(pair_LL.any()):
        coupled_LL = torch.triu(pair_LL - alone_L[:, None] - alone_L, diagonal=1)
        coupled_LL = coupled_LL + coupled_LL.T
    values_L, vectors_LL = torch.linalg.eigh(coupled_LL)
    lift = (-values_L[0]).clamp(min=0)
    factor_LL = (values_L + lift).clamp(min=0).sqrt()[:, None] * vectors_LL.T
    pruned_L = torch.zeros(len(alone_L), dtype=torch.bool)
    pruned_L[alone_L.argsort(stable=True)[:count]] = True
    return BlockProblem(factor_LL, alone_L - 0.5 * lift, pruned_L)


def lowest_states(problem: BlockProblem, count: int, number: int, *, seed: int = 0) -> list[Blocks]:
    """The ``number`` sets of least energy, the least first: of all sets where they are few, else of what the annealer finds
    and the swaps of it.
    """
    num_blocks = problem.num_variables
    if comb(num_blocks, count) <= _MAX_STATES:
        states = list(combinations(range(num_blocks), count))
    else:
        found = {_blocks(anneal(problem, seed=seed + offset)) for offset in range(_NUM_SEEDS)}
        swapped = {
            tuple(sorted({*state, new} - {old}))
            for state in found
            for old in state
            for new in set(range(num_blocks)) - {*state}
        }
        states = sorted(found | swapped)
    pruned_RL = torch.zeros(len(states), num_blocks, dtype=torch.bool)
    pruned_RL.scatter_(1, torch.tensor(states), True)
    order_R = problem.energy(pruned_RL).argsort(stable=True)[:number]
    return [states[index] for index in order_R.tolist()]


def _outputs(
    stack: Stack, recording: Recording, device: torch.device, sets: Sequence[Blocks], start: int
) -> Generator[int, None, dict[tuple[Blocks, int], Tensor]]:
    """The last block's output [N, S, H] of the model without each set of blocks, on every chunk."""
    if recording.stateful:
        raise UnsupportedModel("blocks of this model hand on more than the hidden state: none can be taken out.")
    chunks = range(len(recording.hidden))
    streams: dict[tuple[Blocks, int], Tensor] = {((), chunk): hidden for chunk, hidden in enumerate(recording.hidden)}
    for index, block in enumerate(stack.blocks):
        before, streams = streams, {}
        with stack.placed(index, device) as here:
            for gone in dict.fromkeys(tuple(one for one in whole if one <= index) for whole in sets):
                for chunk in chunks:
                    if gone and gone[-1] == index:
                        streams[gone, chunk] = before[gone[:-1], chunk]
                        continue
                    hidden_NSH = before[gone, chunk]
                    output_NSH = recording.calls[chunk][index].run(block, hidden_NSH.to(here))
                    streams[gone, chunk] = output_NSH.to(hidden_NSH.device)
        if any(not bool(streams[(), chunk].isfinite().all()) for chunk in chunks if ((), chunk) in streams):
            raise NonFiniteError(f"{stack.name(index)} puts out NaN or inf.")
        yield start + index + 1
    return streams


def _log_probs(logits_NSV: Tensor) -> Tensor:
    return F.log_softmax(logits_NSV.float().flatten(0, -2), dim=-1)


def _kl(dense_TV: Tensor, other_TV: Tensor) -> Tensor:
    """Sum over tokens of KL, fp64."""
    return F.kl_div(other_TV, dense_TV, log_target=True, reduction="none").sum(dtype=torch.float64)


def _least(scores_L: Tensor, count: int) -> Blocks:
    return tuple(sorted(scores_L.argsort(stable=True)[:count].tolist()))


def _blocks(pruned_L: Tensor) -> Blocks:
    return tuple(pruned_L.nonzero()[:, 0].tolist())
