"""The products y = x @ W.T + bias of packed weights, as custom ops of torch: `torch.ops.llmprune.linear_24` and its siblings.

On CUDA an op runs the kernel that `dispatch` picks; on any other device it runs the PyTorch reference. Each op has a fake
implementation, so that torch.compile, export and CUDA graphs take it whole. The ops are for inference: their backward raises.

Dimension letters: O out features, I in features, T tokens (all leading dimensions of x, flattened).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from llmprune_kernels import dispatch, reference
from llmprune_kernels._bits import FLOATS, HALVES
from llmprune_kernels.fragments import COLUMNS, ROWS

NO_GRADIENT = (
    "packed weights are for inference and have no gradient. Run under torch.no_grad(), "
    "or train a dense copy: module.to_linear(), or `llmprune convert DIR --to dense`"
)


def linear_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by a 2:4 weight in the canonical layout.

    Args:
        x: [..., I], bf16, fp16 or fp32; made contiguous if it is not.
        values: [O, I/2] in the dtype of x.
        meta: uint8 [O, ceil(I/8)]; trusted, see `two_four.check_meta`.
        bias: [O] in the dtype of x, or None.

    Returns:
        [..., O] in the dtype of x; sums of 16-bit inputs are fp32.

    Raises:
        ValueError: on a shape, dtype or device that does not fit.
    """
    return cast(Tensor, torch.ops.llmprune.linear_24(x, values, meta, bias))


def linear_24_mma(x: Tensor, values_frag: Tensor, meta_frag: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Multiply by a 2:4 weight of 16 bits in fragment order (`fragments.to_fragments`).

    The fragments know neither the dtype they hold nor their width before padding: the caller answers for both.

    Args:
        x: [..., I], bf16 or fp16, in the dtype that the fragments hold.
        values_frag: int32 [ceil(O/16), ceil(I/256), 8, 32, 4].
        meta_frag: int32 [ceil(O/16), ceil(I/256), 32, 4].
        bias: [O] in the dtype of x, or None.
        out_features: O.

    Returns:
        [..., O] in the dtype of x; sums are fp32.

    Raises:
        ValueError: on a shape, dtype or device that does not fit.
    """
    return cast(Tensor, torch.ops.llmprune.linear_24_mma(x, values_frag, meta_frag, bias, out_features))


def linear_24_int8(
    x: Tensor, values_frag: Tensor, meta_frag: Tensor, scale: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Multiply by a 2:4 weight of 8-bit integers and one scale a row, in fragment order.

    Args:
        x: [..., I], bf16 or fp16.
        values_frag: int32 [ceil(O/16), ceil(I/256), 4, 32, 4], four 8-bit values each.
        meta_frag: int32 [ceil(O/16), ceil(I/256), 32, 4].
        scale: fp32 [O]; row o of the weight is scale[o] times its integers.
        bias: [O] in the dtype of x, or None.
        out_features: O.

    Returns:
        [..., O] in the dtype of x; sums are fp32.

    Raises:
        ValueError: on a shape, dtype or device that does not fit.
    """
    return cast(Tensor, torch.ops.llmprune.linear_24_int8(x, values_frag, meta_frag, scale, bias, out_features))


def linear_bitmask(x: Tensor, bits: Tensor, values: Tensor, row_starts: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by an unstructured sparse weight.

    Args:
        x: [..., I], bf16, fp16 or fp32; made contiguous if it is not.
        bits: uint8 [O, ceil(I/8)]; bit j of byte b is column 8b + j.
        values: [kept] in the dtype of x, row by row.
        row_starts: int32 [O, ceil(I/256)] of `bitmask.row_starts(bits)`; trusted.
        bias: [O] in the dtype of x, or None.

    Returns:
        [..., O] in the dtype of x; sums of 16-bit inputs are fp32.

    Raises:
        ValueError: on a shape, dtype or device that does not fit.
    """
    return cast(Tensor, torch.ops.llmprune.linear_bitmask(x, bits, values, row_starts, bias))


@torch.library.custom_op("llmprune::linear_24", mutates_args=())
def _linear_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_24(x, values, meta, bias)
    return reference.linear_24(x.contiguous(), values, meta, bias)


@torch.library.custom_op("llmprune::linear_24_mma", mutates_args=())
def _linear_24_mma(x: Tensor, values_frag: Tensor, meta_frag: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    _check_fragments(x, values_frag, meta_frag, bias, out_features, num_steps=8)
    return reference.linear_24_mma(x.contiguous(), values_frag, meta_frag, bias, out_features)


@torch.library.custom_op("llmprune::linear_24_int8", mutates_args=())
def _linear_24_int8(
    x: Tensor, values_frag: Tensor, meta_frag: Tensor, scale: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    _check_int8(x, values_frag, meta_frag, scale, bias, out_features)
    return reference.linear_24_int8(x.contiguous(), values_frag, meta_frag, scale, bias, out_features)


@torch.library.custom_op("llmprune::linear_bitmask", mutates_args=())
def _linear_bitmask(x: Tensor, bits: Tensor, values: Tensor, row_starts: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_bitmask(x, bits, values, row_starts, bias)
    return reference.linear_bitmask(x.contiguous(), bits, values, row_starts, bias)


@_linear_24.register_kernel("cuda")
def _(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_24(x, values, meta, bias)
    return _launch("linear_24", x, values.shape[0], (values, meta), bias)


@_linear_24_mma.register_kernel("cuda")
def _(x: Tensor, values_frag: Tensor, meta_frag: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    _check_fragments(x, values_frag, meta_frag, bias, out_features, num_steps=8)
    return _launch("linear_24_mma", x, out_features, (values_frag, meta_frag), bias)


@_linear_24_int8.register_kernel("cuda")
def _(x: Tensor, values_frag: Tensor, meta_frag: Tensor, scale: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    _check_int8(x, values_frag, meta_frag, scale, bias, out_features)
    return _launch("linear_24_int8", x, out_features, (values_frag, meta_frag, scale), bias)


@_linear_bitmask.register_kernel("cuda")
def _(x: Tensor, bits: Tensor, values: Tensor, row_starts: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_bitmask(x, bits, values, row_starts, bias)
    return _launch("linear_bitmask", x, bits.shape[0], (bits, values, row_starts), bias)


@_linear_24.register_fake
def _(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_24(x, values, meta, bias)
    return x.new_empty(*x.shape[:-1], values.shape[0])


@_linear_24_mma.register_fake
def _(x: Tensor, values_frag: Tensor, meta_frag: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    _check_fragments(x, values_frag, meta_frag, bias, out_features, num_steps=8)
    return x.new_empty(*x.shape[:-1], out_features)


@_linear_24_int8.register_fake
def _(x: Tensor, values_frag: Tensor, meta_frag: Tensor, scale: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    _check_int8(x, values_frag, meta_frag, scale, bias, out_features)
    return x.new_empty(*x.shape[:-1], out_features)


@_linear_bitmask.register_fake
def _(x: Tensor, bits: Tensor, values: Tensor, row_starts: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_bitmask(x, bits, values, row_starts, bias)
    return x.new_empty(*x.shape[:-1], bits.shape[0])


def _refuse_backward(*_: object) -> None:
    raise RuntimeError(NO_GRADIENT)


for _op in (_linear_24, _linear_24_mma, _linear_24_int8, _linear_bitmask):
    _op.register_autograd(_refuse_backward)


def _launch(op: str, x: Tensor, out_features: int, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Flatten x to [T, I], run what dispatch chooses, and give y the leading shape of x."""
    x_TI = x.reshape(-1, x.shape[-1]).contiguous()
    if not len(x_TI):
        return x.new_empty(*x.shape[:-1], out_features)
    if x_TI.data_ptr() % 16:  # the kernels load 16 bytes at a time
        x_TI = x_TI.clone()
    choice = dispatch.choose(op, len(x_TI), out_features, x_TI.shape[1], x.dtype, x.device)
    y_TO = dispatch.launch(op, choice, x_TI, weights, bias, out_features)
    return y_TO.view(*x.shape[:-1], out_features)


def _check_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> None:
    _check_x(x, FLOATS)
    if values.dim() != 2 or values.dtype != x.dtype:
        raise ValueError(f"values must be a matrix [O, I/2] of {x.dtype} like x, got {_say(values)}. Cast x or the weights")
    num_rows, num_kept = values.shape
    _check_width(x, 2 * num_kept)
    _check_tensor("meta", meta, (num_rows, -(-num_kept // 4)), torch.uint8)
    _check_rest(x, (values, meta), bias, num_rows)


def _check_fragments(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, out_features: int, *, num_steps: int
) -> None:
    _check_x(x, HALVES)
    if x.shape[-1] % 4:
        raise ValueError(f"2:4 needs in_features divisible by 4, got x of shape {tuple(x.shape)}")
    num_tiles, num_chunks = -(-out_features // ROWS), -(-x.shape[-1] // COLUMNS)
    what = f"for {out_features} out features and {x.shape[-1]} in features"
    _check_tensor("values_frag", values, (num_tiles, num_chunks, num_steps, 32, 4), torch.int32, what)
    _check_tensor("meta_frag", meta, (num_tiles, num_chunks, 32, 4), torch.int32, what)
    _check_rest(x, (values, meta), bias, out_features)


def _check_int8(x: Tensor, values: Tensor, meta: Tensor, scale: Tensor, bias: Tensor | None, out_features: int) -> None:
    _check_fragments(x, values, meta, bias, out_features, num_steps=4)
    _check_tensor("scale", scale, (out_features,), torch.float32)
    _check_rest(x, (scale,), None, out_features)


def _check_bitmask(x: Tensor, bits: Tensor, values: Tensor, row_starts: Tensor, bias: Tensor | None) -> None:
    _check_x(x, FLOATS)
    if bits.dim() != 2 or bits.dtype != torch.uint8:
        raise ValueError(f"bits must be a matrix [O, ceil(I/8)] of torch.uint8, got {_say(bits)}")
    if values.dim() != 1 or values.dtype != x.dtype:
        raise ValueError(f"values must be one row of {x.dtype} like x, got {_say(values)}. Cast x or the weights")
    if -(-x.shape[-1] // 8) != bits.shape[1]:
        raise ValueError(f"x of shape {tuple(x.shape)} has {x.shape[-1]} in features, but bits of {bits.shape[1]} bytes a row")
    _check_tensor("row_starts", row_starts, (bits.shape[0], -(-x.shape[-1] // COLUMNS)), torch.int32)
    _check_rest(x, (bits, values, row_starts), bias, bits.shape[0])


def _check_x(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        raise ValueError(f"x must be one of {', '.join(map(str, dtypes))}, got {x.dtype}. Cast it to the weights' dtype")
    if x.dim() == 0:
        raise ValueError("x must have the in features as its last dimension, got a scalar")


def _check_width(x: Tensor, in_features: int) -> None:
    if x.shape[-1] != in_features:
        raise ValueError(f"x of shape {tuple(x.shape)} does not fit a weight of {in_features} in features")


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, what: str = "") -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        wanted = f"{name} must be {dtype} {list(shape)}{' ' + what if what else ''}"
        raise ValueError(f"{wanted}, got {_say(tensor)}")


def _check_rest(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, out_features: int) -> None:
    """Bias, devices, contiguity: the same for every op."""
    if bias is not None:
        _check_tensor("bias", bias, (out_features,), x.dtype)
    for tensor in (*weights, *([] if bias is None else [bias])):
        if tensor.device != x.device:
            raise ValueError(f"x is on {x.device}, but a part of the weights on {tensor.device}. Move them to one device")
        if not tensor.is_contiguous():
            raise ValueError(f"packed weights must be contiguous, got {_say(tensor)} with strides {tensor.stride()}")


def _say(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
