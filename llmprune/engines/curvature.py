"""The exact second derivatives of the loss by the weights of one block, for small models. V weights, N sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from llmprune.anatomy.sites import Site
from llmprune.devices import module_device
from llmprune.engines.gradients import frozen, sequence_losses, wide


def exact_hessian(
    model: PreTrainedModel, site: Site, ids_NS: Tensor, row_V: Tensor, column_V: Tensor, *, batch_size: int = 1
) -> Tensor:
    """Hessian of the mean loss by chosen weights of one site, symmetric, fp32 (fp64 for an fp64 model) [V, V].

    A row each is the gradient of one entry of the gradient: V backward passes through a forward and backward pass, for every
    batch. Attention runs as plain operations, because its fused kernels have no second derivative.

    Args:
        model: on one device; left as it is.
        site: a module of its own (:func:`llmprune.engines.gradients.can_gather`).
        ids_NS: token ids, int64.
        row_V, column_V: which weights [O, I].
        batch_size: sequences at once.
    """
    first_V, second_V = (column_V, row_V) if site.transposed else (row_V, column_V)
    stored, name = site.stored, f"{site.name}.{site.parameter}"
    hessian_VV = torch.zeros(len(row_V), len(row_V), dtype=wide(stored[:0]).dtype, device=stored.device)
    for ids_BS in ids_NS.to(module_device(model)).split(batch_size):
        with frozen(model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            entries_V = stored[first_V, second_V].requires_grad_()
            changed = {name: stored.index_put((first_V, second_V), entries_V)}

            def call(changed: dict[str, Tensor] = changed, **kwargs: Any) -> Any:
                return functional_call(model, changed, (), kwargs)

            total = sequence_losses(call, ids_BS).sum()
            (gradient_V,) = torch.autograd.grad(total, entries_V, create_graph=True)
            if not gradient_V.requires_grad:
                continue  # the loss is linear in these weights
            for index in range(len(row_V)):
                (row,) = torch.autograd.grad(gradient_V[index], entries_V, retain_graph=True, allow_unused=True)
                if row is not None:
                    hessian_VV[index] += wide(row)
    hessian_VV /= len(ids_NS)
    return (hessian_VV + hessian_VV.T) / 2


def positive_factor(hessian_VV: Tensor) -> tuple[Tensor, float]:
    """(A [V, V], m >= 0) such that A^T A = H + m I, with the least m that makes this positive semidefinite.

    In a block problem m / 2 is taken off the ridge again: d^T (H + m I) d / 2 - m ||d||^2 / 2 is d^T H d / 2.
    """
    values_V, vectors_VV = torch.linalg.eigh(hessian_VV.double())
    shift = max(0.0, -float(values_V[0]))
    factor_VV = (values_V + shift).clamp(min=0).sqrt()[:, None] * vectors_VV.T
    return factor_VV.to(hessian_VV.dtype), shift
