"""Block reconstruction: the kept weights of a pruned block, tuned so that it puts out what the dense block did.

Minimises ||f(X; W * M) - Y||_F^2 over the kept weights by Adam (arXiv 1412.6980), where f is the whole block, X its inputs as
the pruned blocks before it leave them, M the fixed support and Y the dense model's hidden states after this block. Block-wise
targets are those of BRECQ (arXiv 2102.05426, eq. 10). Norms, biases, convolutions and routers stay as they are.

Of several processes each has some sequences of every batch: errors and gradients, which are sums over sequences, are added up,
and all take the step that one process with all sequences would take.

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
from llmprune.engines.sharding import Shares
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


@dataclass(frozen=True)
class _Fit:
    """What is minimised: the distance of the block's outputs from the targets, over the sequences of all processes.

    Attributes:
        parts: for each batch, which of ``targets`` has this process's sequences of it; None where it has none.
    """

    block: nn.Module
    tuned: Sequence[_Tuned]
    replay: Replay
    targets: Sequence[Tensor]
    parts: Sequence[int | None]
    shares: Shares

    def norms(self) -> list[float]:
        """||Y||_F^2 of each batch."""
        found = self.shares.together(lambda: [self._norm(part) for part in self.parts])
        return [sum(squares) for squares in zip(*found, strict=True)]

    @torch.no_grad()
    def lost(self, batches: range) -> float:
        """||f(X; W) - Y||_F^2 over some batches."""
        own = [part for part in self.parts[batches.start : batches.stop] if part is not None]
        return sum(self.shares.together(lambda: sum(float(self._square_error(part)) for part in own)))

    def gradients(self, batch: int, masters: Sequence[Tensor], unit: float) -> list[Tensor | None] | None:
        """Of ``unit`` times the square error of one batch, by each master; None where it depends on none of them: only experts
        that no token of this batch reached.
        """
        part = self.parts[batch]
        found: list[Tensor | None] = [None] * len(masters)

        def differentiate() -> list[bool]:
            if part is not None:
                with torch.enable_grad():
                    loss = self._square_error(part) * unit
                    if loss.requires_grad:
                        found[:] = torch.autograd.grad(loss, masters, allow_unused=True)
            return [gradient is not None for gradient in found]

        reached = [any(flags) for flags in zip(*self.shares.together(differentiate), strict=True)]
        for number, (master, anywhere) in enumerate(zip(masters, reached, strict=True)):
            if anywhere and self.shares.size > 1:
                gradient = found[number]
                found[number] = gradient = torch.zeros_like(master) if gradient is None else gradient.contiguous()
                self.shares.sum_(gradient)
        return found if any(reached) else None

    def _norm(self, part: int | None) -> float:
        return 0.0 if part is None else float(self.targets[part].float().square().sum(dtype=torch.float64))

    def _square_error(self, part: int) -> Tensor:
        """||f(X; W) - Y||_F^2 of this process's sequences of one batch, fp32."""
        weights = {item.name: item.weight() for item in self.tuned}
        output_NSH = self.replay(lambda *args, **kwargs: functional_call(self.block, weights, args, kwargs), part)
        return (output_NSH.float() - self.targets[part].to(output_NSH.device).float()).square().sum()


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
    parts: Sequence[int | None] | None = None,
    shares: Shares | None = None,
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
        targets: per batch what the block should put out, [N, S, H]; of several processes the sequences of this one.
        steps: Adam steps at most, of one batch each.
        lr: relative size of the first steps.
        generator: CPU generator that shuffles the batches.
        parts: for each batch the number of its part in ``targets``, None for a batch that this process has no sequence of; by
            default every target is a batch.
        shares: of several processes that tune the block together, each with a copy, this one's.
    """
    begun = time.perf_counter()
    tuned, shares = _tuned(block, sites), shares or Shares.alone()
    fit = _Fit(block, tuned, replay, targets, range(len(targets)) if parts is None else parts, shares)
    num_batches = len(fit.parts)
    first_held_out = num_batches - num_held_out(num_batches)
    held_out, norms = range(first_held_out, num_batches), fit.norms()
    whole = sum(norms[first_held_out:])

    def measure() -> float:
        """||f(X; W) - Y||_F^2 / ||Y||_F^2 over the held-out batches."""
        return fit.lost(held_out) / whole if whole > 0 else 0.0

    before = best = measure()
    masters = [item.master.requires_grad_() for item in tuned]
    kept = [master.detach().clone() for master in masters]
    rates = [lr * _rms(item) for item in tuned]
    every = -(-steps // NUM_CHECKS)
    order: list[int] = []
    falls = iter(RATE_FALLS)
    optimizer, factor = _adam(masters, rates), next(falls)
    done = stale = 0
    while done < steps and before > 0:
        order = order or torch.randperm(first_held_out, generator=generator).tolist()
        batch = order.pop()
        gradients = fit.gradients(batch, masters, _unit(before * norms[batch], targets[0].shape[-1]))
        if gradients is None:
            break
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient  # zero where not kept: those weights do not depend on it
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor * (1 + math.cos(math.pi * done / steps)) / 2
        optimizer.step()
        done += 1
        if done % every == 0 or done == steps:
            error = measure()
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
            shares.give_(item.parameter.detach(), 0)  # other hardware rounds otherwise
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


def _unit(square: float, width: int) -> float:
    """The scale of a batch's loss, about ``square``, that makes the gradients of the weights of about one: inside the range of
    fp16.
    """
    return math.sqrt(width / max(square, 1e-30)) / 2
