"""Gradients of the loss at chosen sites, one per sequence, without a weight-sized tensor per sequence.

A site's gradient of one sequence is D^T X: D its outputs' gradients, X its inputs. Both are held, and any entry of any
sequence's gradient is the sum of T products. N sequences, S tokens of each, O out, I in features, V picked entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.sites import Site
from llmprune.devices import module_device
from llmprune.engines.sharding import Shares

_PRODUCTS = 1 << 24  # of inputs and output gradients held at once while entries are summed


@dataclass
class SiteGradients:
    """What one site's gradients are made of, per sequence.

    Attributes:
        inputs: X [S, I] of every sequence, in the model's dtype.
        outputs: gradient of that sequence's scaled loss by the site's outputs, D [S, O].
        scale: what the loss was multiplied by, so that fp16 can hold D.
    """

    scale: float = 1.0
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def num_sequences(self) -> int:
        """N."""
        return len(self.inputs)

    def total(self) -> Tensor:
        """Gradient of the sum of the losses, fp32 (fp64 for an fp64 model) [O, I]; of at least one sequence."""
        total_OI = sum(wide(d_SO).T @ wide(x_SI) for d_SO, x_SI in zip(self.outputs, self.inputs, strict=True))
        assert isinstance(total_OI, Tensor)
        return total_OI / self.scale

    def at(self, row_V: Tensor, column_V: Tensor) -> Tensor:
        """Entries (row, column) of every sequence's gradient, fp32 (fp64 for an fp64 model) [N, V]."""
        sums = []
        for d_SO, x_SI in zip(self.outputs, self.inputs, strict=True):
            width = max(1, _PRODUCTS // len(x_SI))
            parts = [
                (wide(d_SO[:, rows]) * wide(x_SI[:, columns])).sum(0)
                for rows, columns in zip(row_V.split(width), column_V.split(width), strict=True)
            ]
            sums.append(torch.cat(parts))
        return torch.stack(sums) / self.scale


def can_gather(site: Site) -> bool:
    """Whether the site is a module of its own whose call shows inputs and outputs; experts fused into one parameter are
    not.
    """
    known = isinstance(site.module, nn.Linear) or type(site.module).__name__ == "Conv1D"
    return known and site.parameter == "weight"


def gather(
    model: PreTrainedModel, sites: Sequence[Site], ids_NS: Tensor, *, batch_size: int = 1, scale: float = 1.0
) -> tuple[dict[str, SiteGradients], float]:
    """Forward and backward over every sequence: gradients by site name, and the mean loss.

    The loss of a sequence is the mean cross-entropy of its next tokens. Nothing before the first of the sites is kept for
    the backward pass, and no weight's gradient is computed. A site that the model did not call has no
    sequences, and one that it called twice each of them twice.

    Args:
        model: on the device where it runs; its weights and their ``requires_grad`` are left alone.
        sites: such that :func:`can_gather`.
        ids_NS: token ids, int64.
        batch_size: sequences at once.
        scale: factor of the loss in the backward pass.
    """
    found = {site.name: SiteGradients(scale) for site in sites}
    total = 0.0
    for ids_BS in ids_NS.to(module_device(model)).split(batch_size):
        with frozen(model), _watched(sites, found, len(ids_BS)), torch.enable_grad():
            loss_B = sequence_losses(model, ids_BS)
            if loss_B.requires_grad:
                (loss_B.sum() * scale).backward()
        total += float(loss_B.detach().sum(dtype=torch.float64))
    return found, total / len(ids_NS)


def sequence_losses(model: Callable[..., Any], ids_NS: Tensor) -> Tensor:
    """Mean cross-entropy of every sequence's next tokens, from fp32 (fp64 for an fp64 model) logits [N]."""
    logits_NSV = wide(model(input_ids=ids_NS, use_cache=False).logits[:, :-1])
    losses_NS = F.cross_entropy(logits_NSV.transpose(1, 2), ids_NS[:, 1:], reduction="none")
    return losses_NS.mean(1)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, ids_NS: Tensor, *, batch_size: int = 1) -> float:
    """Mean over the sequences of :func:`sequence_losses`."""
    parts = [sequence_losses(model, ids_BS) for ids_BS in ids_NS.to(module_device(model)).split(batch_size)]
    return float(torch.cat(parts).mean(dtype=torch.float64))


@torch.no_grad()
def input_norms(
    model: PreTrainedModel, sites: Sequence[Site], ids_NS: Tensor, *, batch_size: int = 1, shares: Shares | None = None
) -> dict[str, Tensor]:
    """Euclidean norm of every input feature over all tokens, by site name, fp32 [I]; several processes share them out."""
    shares = shares or Shares.alone()
    own_NS, squares = shares.part(ids_NS), dict[str, Tensor]()

    def add(name: str, x: Tensor) -> None:
        part_I = x.detach().reshape(-1, x.shape[-1]).float().square().sum(0)
        squares[name] = squares[name] + part_I if name in squares else part_I

    def run() -> list[str]:
        handles = [
            site.module.register_forward_hook(lambda _module, args, _output, name=site.name: add(name, args[0]))
            for site in sites
        ]
        try:
            if len(own_NS):
                mean_loss(model, own_NS, batch_size=batch_size)
        finally:
            for handle in handles:
                handle.remove()
        return list(squares)

    seen = {name for names in shares.together(run) for name in names}
    norms = {}
    for site in sites:
        if site.name in seen:
            square_I = squares.get(site.name)
            square_I = torch.zeros(site.shape[1], device=site.stored.device) if square_I is None else square_I
            shares.sum_(square_I)
            norms[site.name] = square_I.sqrt()
    return norms


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient: only activations behind the first watched site do."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


@contextmanager
def _watched(sites: Sequence[Site], found: dict[str, SiteGradients], num_sequences: int) -> Iterator[None]:
    """While active, every call of a site files its inputs, and the backward pass its outputs' gradients."""

    def watch(name: str, x: Tensor, output: Tensor) -> Tensor:
        inputs = x.detach().reshape(num_sequences, -1, x.shape[-1])
        output = output if output.requires_grad else output.requires_grad_()

        def file(gradient: Tensor) -> None:
            found[name].inputs.extend(inputs)
            found[name].outputs.extend(gradient.detach().reshape(num_sequences, -1, gradient.shape[-1]))

        output.register_hook(file)
        return output.view_as(output)  # what the model does in place must not meet a leaf

    def hook(name: str) -> Any:
        return lambda _module, args, output: watch(name, args[0], output)

    handles = [site.module.register_forward_hook(hook(site.name)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def wide(x: Tensor) -> Tensor:
    """fp32, but fp64 stays."""
    return x if x.dtype == torch.float64 else x.float()
