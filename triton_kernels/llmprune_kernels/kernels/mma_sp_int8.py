"""y = x (s W)^T + b with int8 values of a 2:4 weight and a scale per row: 5 bits per dense weight instead of 9.

The kernel of `mma_sp` with one step more: a lane's 16 int8 of two k-steps become 16-bit floats in registers, exactly (integers
up to 128 in magnitude), and go through the same sparse tensor core instruction; the sums are scaled once at the end in fp32.
"""

from __future__ import annotations

from torch import Tensor

from llmprune_kernels.kernels.mma_sp import Tile, launch


def linear(
    x_TI: Tensor,
    values_frag: Tensor,
    meta_frag: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    *,
    row_tiles: int = 1,
    token_tiles: int = 1,
    num_warps: int = 4,
    splits: int = 1,
    shuffle_x: bool = False,
) -> Tensor:
    """x (s W)^T + b, fp32 sums.

    Args:
        x_TI: bf16 or fp16 [T, I], contiguous; I a multiple of 4.
        values_frag: int32 [ceil(O/16), ceil(I/256), 4, 32, 4], four int8 in each.
        meta_frag: int32 [ceil(O/16), ceil(I/256), 32, 4].
        scale: fp32 [O].
        bias: [O] of any float dtype, or None.
        out_features: O.
        row_tiles: as in `mma_sp.linear`, like all that follow.
        token_tiles: tiles of 8 tokens per CTA.
        num_warps: warps per CTA.
        splits: CTAs per row.
        shuffle_x: copy x to the order of the fragments first.

    Returns:
        [T, O] in the dtype of x.

    Raises:
        ValueError: an illegal tile.
    """
    tile = Tile(row_tiles, token_tiles, num_warps, splits, shuffle_x)
    return launch(x_TI, values_frag, meta_frag, scale, bias, out_features, tile)
