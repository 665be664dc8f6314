"""Every operation in plain PyTorch: what a CPU runs, and what the kernels are tested against.

O out features, I in features, leading dimensions of x are arbitrary.

Each function unpacks the weight and calls ``torch.nn.functional.linear``; a kernel must agree to within what PyTorch
itself loses. They take the same arguments as the operators of ``llmprune_kernels.ops``, which check them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llmprune_kernels import bitmask, fragments, two_four


def linear_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times the transposed canonical 2:4 weight [O, I], plus bias [O]: [..., O] in x.dtype."""
    return F.linear(x, two_four.unpack(values, meta), bias)


def linear_24_mma(x: Tensor, values_frag: Tensor, meta_frag: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """``linear_24`` with the weight in fragment order, in the 16-bit dtype of x."""
    values, meta = fragments.from_fragments(values_frag, meta_frag, out_features, x.shape[-1], x.dtype)
    return linear_24(x, values, meta, bias)


def linear_24_int8(
    x: Tensor, values_frag: Tensor, meta_frag: Tensor, scale: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """``linear_24`` with int8 values in fragment order and a scale [O]; scaled and biased in fp32, rounded once."""
    values, meta = fragments.from_fragments(values_frag, meta_frag, out_features, x.shape[-1], torch.int8)
    y = F.linear(x.float(), two_four.unpack(values, meta).float()) * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear_bitmask(x: Tensor, bits: Tensor, values: Tensor, row_starts: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times the transposed bitmask weight [O, I], plus bias [O]: [..., O] in x.dtype.

    ``row_starts`` follows from ``bits``: the kernels rely on it, this only checks it.
    """
    in_features = x.shape[-1]
    offsets = bitmask.check_bits(bits, in_features)
    bitmask.check_values(values, int(offsets[-1]))
    if not torch.equal(row_starts, bitmask.row_starts(bits)):
        raise ValueError("row_starts does not belong to these bits. Make it with bitmask.row_starts(bits).")
    return F.linear(x, bitmask.expand(bits, values, in_features), bias)
