"""Block reconstruction: the kept weights of a pruned block, tuned so that it puts out what the dense block did.

Minimises ||f(X; W * M) - Y||_F^2 over the kept weights by Adam (arXiv 1412.6980), where f is the whole block, X its inputs as
the pruned blocks before it leave them, M the fixed support and Y the dense model's hidden states after this block. Block-wise
targets are those of BRECQ (arXiv 2102.05426, eq. 10). Norms, biases, convolutions and routers stay as they are.

N sequences of one batch, S sequence, H hidden.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmprune.anatomy.sites import Site
from llmprune.report import Reconstruction

Replay = Callable[[Callable[..., Any], int], Tensor]
"""``replay(block, batch)``: call the block the way the model does, on the inputs of that batch; its hidden state [N, S, H]."""

HELD_OUT = 1 / 8
"""Share of the batches, the last ones, that are never trained on: they decide which weights are kept."""
NUM_CHECKS = 12
"""How often the held-out error is measured in a full run."""
PATIENCE = 2
"""Checks in a row without a lower error after which the best weights so far come back, and the rate falls."""
RATE_FALLS = (1.0, 1 / 4, 1 / 16, 1 / 64)
"""Factors of the rate, one after another; tuning ends when patience does at the last."""
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class _Tuned:
    """One parameter of the block, its kept weights in fp32; the parameter itself is only read until the end."""

    name: str
    parameter: nn.Parameter
    keep: Tensor  # bool, the parameter's shape: the nonzero weights of the sites
    master: Tensor  # fp32, the parameter's shape; zero where not kept

    def weight(self) -> Tensor:
        """The parameter in its own dtype, differentiable in ``master``: exactly what would be stored."""
        return torch.where(self.keep, self.master.to(self.parameter.dtype), self.parameter.detach())


def num_held_out(num_batches: int) -> int:
    """How many of the batches are held out: at least one of at least two."""
    assert num_batches > 1, "PruneConfig and the choice of the batch see to it"
    return max(1, round(num_batches * HELD_OUT))


def reconstruct_(
    block: nn.Module,
    sites: Sequence[Site],
    replay: Replay,
    targets: Sequence[Tensor],
    *,
    steps: int,
    lr: float,
    generator: torch.Generator,
) -> Generator[int, None, Reconstruction]:
    """Tune the nonzero weights of the block's sites in place; zeros stay zeros. Yields the number of steps done.

    Weights are held in fp32 and cast to their own dtype in every forward, so that the error that is measured is the error of
    what is stored. A step moves a weight by about ``lr`` times the root mean square of its parameter's kept weights; the rate
    falls to zero as half a cosine. Where the error on the held-out batches stops falling, the weights of its lowest come back
    and the rate is quartered: a block that is nearly at its best already needs smaller steps than one pruned by magnitude.
    What is stored in the end are the weights of the lowest error; the block stays as it was unless that is below the error it
    began with. Closing the generator leaves it as it was.

    Args:
        block: the pruned block, on the device it computes on.
        sites: those whose weights may move; at least one.
        replay: runs the block on one batch.
        targets: per batch what the block should put out, [N, S, H].
        steps: Adam steps at most, of one batch each.
        lr: relative size of the first steps.
        generator: CPU generator that shuffles the batches.
    """
    begun = time.perf_counter()
    tuned = _tuned(block, sites)
    first_held_out = len(targets) - num_held_out(len(targets))
    held_out = range(first_held_out, len(targets))
    before = best = _error(block, tuned, replay, targets, held_out)
    masters = [item.master.requires_grad_() for item in tuned]
    kept = [master.detach().clone() for master in masters]
    rates = [lr * _rms(item) for item in tuned]
    every = -(-steps // NUM_CHECKS)
    order: list[int] = []
    unit = [_unit(before, targets[batch]) for batch in range(first_held_out)]
    falls = iter(RATE_FALLS)
    optimizer, factor = _adam(masters, rates), next(falls)
    done = stale = 0
    while done < steps and before > 0:
        order = order or torch.randperm(first_held_out, generator=generator).tolist()
        batch = order.pop()
        with torch.enable_grad():
            loss = _square_error(block, tuned, replay, targets[batch], batch) * unit[batch]
            if not loss.requires_grad:
                break  # only experts that this batch did not reach
            gradients = torch.autograd.grad(loss, masters, allow_unused=True)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient  # zero where not kept: those weights do not depend on it
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor * (1 + math.cos(math.pi * done / steps)) / 2
        optimizer.step()
        done += 1
        if done % every == 0 or done == steps:
            error = _error(block, tuned, replay, targets, held_out)
            if error < best:  # never true of NaN
                best, stale = error, 0
                _copy_(kept, masters)
            else:
                stale += 1
            if stale == PATIENCE or not math.isfinite(error):
                factor, stale = next(falls, 0.0), 0
                if not factor:
                    break
                _copy_(masters, kept)
                optimizer = _adam(masters, rates)
        yield done
    if best < before:
        _copy_(masters, kept)
        for item in tuned:
            weight = item.weight().detach()
            item.parameter.data.copy_(torch.where(item.keep & (weight == 0), 0.0, weight))  # a cast's zeros are +0.0
    return Reconstruction(
        error_before=before,
        error_after=best,
        steps=done,
        seconds=time.perf_counter() - begun,
        rolled_back=not best < before and done > 0,
    )


@torch.no_grad()
def _tuned(block: nn.Module, sites: Sequence[Site]) -> list[_Tuned]:
    """The parameters that hold sites, in the order of the block, each with the support of its sites."""
    by_parameter: dict[int, list[Site]] = {}
    for site in sites:
        by_parameter.setdefault(id(getattr(site.module, site.parameter)), []).append(site)
    tuned = []
    for name, parameter in block.named_parameters():
        if not (own := by_parameter.get(id(parameter))):
            continue
        keep = torch.zeros_like(parameter, dtype=torch.bool)
        for site in own:
            part = keep if site.num_experts is None else keep.unflatten(0, (site.num_experts, -1))
            part = part if site.expert is None else part[site.expert]
            part.copy_(site.stored != 0)
        master = torch.where(keep, parameter.detach().float(), 0.0)
        tuned.append(_Tuned(name, parameter, keep, master))
    return tuned


def _adam(masters: Sequence[Tensor], rates: Sequence[float]) -> torch.optim.Adam:
    """An optimiser without a past; each parameter a group with a rate of its own."""
    groups: list[dict[str, Any]] = [{"params": [master], "lr": rate} for master, rate in zip(masters, rates, strict=True)]
    return torch.optim.Adam(groups, betas=_BETAS, eps=1e-10)


@torch.no_grad()
def _copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _rms(item: _Tuned) -> float:
    count = int(item.keep.sum())
    return math.sqrt(float(item.master.detach().square().sum(dtype=torch.float64)) / count) if count else 0.0


def _unit(error: float, target_NSH: Tensor) -> float:
    """The scale of a batch's loss that makes the gradients of the weights of about one: inside the range of fp16."""
    square = error * float(target_NSH.float().square().sum(dtype=torch.float64))
    return math.sqrt(target_NSH.shape[-1] / max(square, 1e-30)) / 2


def _square_error(block: nn.Module, tuned: Sequence[_Tuned], replay: Replay, target_NSH: Tensor, batch: int) -> Tensor:
    """||f(X; W) - Y||_F^2 of one batch, fp32."""
    weights = {item.name: item.weight() for item in tuned}
    output_NSH = replay(lambda *args, **kwargs: functional_call(block, weights, args, kwargs), batch)
    return (output_NSH.float() - target_NSH.to(output_NSH.device).float()).square().sum()


@torch.no_grad()
def _error(block: nn.Module, tuned: Sequence[_Tuned], replay: Replay, targets: Sequence[Tensor], batches: range) -> float:
    """||f(X; W) - Y||_F^2 / ||Y||_F^2 over some batches."""
    lost = sum(float(_square_error(block, tuned, replay, targets[batch], batch)) for batch in batches)
    whole = sum(float(targets[batch].float().square().sum(dtype=torch.float64)) for batch in batches)
    return lost / whole if whole > 0 else 0.0
