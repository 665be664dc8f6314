"""8-bit values on top of 2:4: int8 [O, I/2] and one fp32 scale per row; the metadata stays what it is.

O out features, I in features. 5 bits per weight instead of 9 (bf16 2:4) or 16 (dense bf16).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune_kernels._bits import check_dtype, check_weight

LIMIT = 127
"""Largest magnitude of a quantised value; -128 is not used, so that the range is symmetric."""


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round the kept weights of every row to a common grid of 255 steps: ``value ~ int8 * scale``.

    Symmetric, nearest, ties to even; ``scale = amax / 127``, 1.0 for a row of zeros, and never below the smallest
    normal fp32, so that no row divides by a number that a GPU flushes to zero.

    Args:
        values: bf16, fp16 or fp32 [O, I/2], as in ``two_four.TwoFour``.

    Returns:
        int8 [O, I/2] in -127..127 and fp32 [O].

    Raises:
        ValueError: not a matrix, empty, another dtype, or a NaN or infinity (the first row is named).
    """
    check_weight(values)
    wide = values.detach().to(torch.float32)
    largest_O = wide.abs().amax(dim=1)
    if not bool(largest_O.isfinite().all()):
        row = int((~largest_O.isfinite()).nonzero()[0])
        raise ValueError(
            f"cannot quantise row {row}: it holds NaN or infinity. Keep this layer in 16 bits, or mend the checkpoint."
        )
    scale_O = (largest_O / LIMIT).clamp(min=torch.finfo(torch.float32).tiny)
    scale_O = torch.where(largest_O == 0, torch.ones_like(scale_O), scale_O)
    return (wide / scale_O[:, None]).round_().to(torch.int8), scale_O


def dequantize(quantized: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that int8 [O, I/2] and fp32 [O] stand for, computed in fp32 and rounded to ``dtype`` once.

    Raises ValueError on other dtypes or on shapes that do not belong together.
    """
    check_dtype(quantized, "quantised values", (torch.int8,))
    check_dtype(scale, "scale", (torch.float32,))
    if quantized.ndim != 2 or list(scale.shape) != [quantized.shape[0]]:
        raise ValueError(
            f"int8 values [out_features, in_features / 2] need a scale [out_features], got {list(quantized.shape)} and "
            f"{list(scale.shape)}. Make both with int8.quantize."
        )
    return (quantized.to(torch.float32) * scale[:, None]).to(dtype)
