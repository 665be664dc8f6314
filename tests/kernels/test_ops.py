"""The custom ops: right on CPU, whole for torch.compile, clear about what they do not take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune_kernels import bitmask, fragments, int8, ops, two_four

O, I = 37, 300  # neither fills the fragments  # noqa: E741
OPS = ("linear_24", "linear_24_mma", "linear_24_int8", "linear_bitmask")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Compiled code counts against a limit per function, which all tests together would exceed."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def sparse_weight(dtype: torch.dtype = torch.bfloat16, *, seed: int = 0) -> Tensor:
    weight_OI = torch.randn(O, I, generator=torch.Generator().manual_seed(seed))
    groups = weight_OI.unflatten(1, (-1, 4))
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.abs().topk(2, 2).indices, True)
    return torch.where(kept, groups, 0.0).flatten(1).to(dtype)


def arguments(op: str, *, dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = (2, 3), bias: bool = True) -> list[Any]:
    """The op's arguments in order, and a weight that makes the expected y."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, I, generator=generator).to(dtype)
    bias_O = torch.randn(O, generator=generator).to(dtype) if bias else None
    values, meta = two_four.pack(sparse_weight(dtype))
    if op == "linear_24":
        return [x, values, meta, bias_O]
    if op == "linear_24_mma":
        return [x, *fragments.to_fragments(values, meta), bias_O, O]
    if op == "linear_24_int8":
        integers, scale = int8.quantize(values)
        return [x, *fragments.to_fragments(integers, meta), scale, bias_O, O]
    packed = bitmask.pack(sparse_weight(dtype))
    return [x, packed.bits, packed.values, bitmask.row_starts(packed.bits), bias_O]


def expected(op: str, dtype: torch.dtype, x: Tensor, bias_O: Tensor | None) -> Tensor:
    weight_OI = sparse_weight(dtype)
    if op == "linear_24_int8":
        values, meta = two_four.pack(weight_OI)
        weight_OI = two_four.unpack(int8.dequantize(*int8.quantize(values)), meta)
    y = x.double() @ weight_OI.double().T
    return y if bias_O is None else y + bias_O.double()


def call(op: str) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(ops, op)
    return function


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (5, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("op", OPS)
def test_ops_agree_with_fp64(op: str, dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    """Within twice what PyTorch loses, for any leading shape."""
    if dtype == torch.float32 and op in ("linear_24_mma", "linear_24_int8"):
        pytest.skip("fragments are multiplied with 16-bit tokens")
    inputs = arguments(op, dtype=dtype, shape=shape, bias=bias)
    bias_O = inputs[-1] if inputs[-1] is None or isinstance(inputs[-1], Tensor) else inputs[-2]
    wanted = expected(op, dtype, inputs[0], bias_O)
    y = call(op)(*inputs)
    assert y.shape == (*shape, O)
    assert y.dtype == dtype
    torch_error = (wanted.to(dtype).double() - wanted).abs().max()
    assert (y.double() - wanted).abs().max() <= 2 * torch_error + 1e-4


@pytest.mark.parametrize("op", OPS)
def test_ops_pass_opcheck(op: str) -> None:
    """Schema, fake implementation, autograd registration and dynamic shapes, as torch checks them."""
    torch.library.opcheck(getattr(torch.ops.llmprune, op).default, tuple(arguments(op)))
    torch.library.opcheck(getattr(torch.ops.llmprune, op).default, tuple(arguments(op, shape=(), bias=False)))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("op", OPS)
def test_ops_compile_whole(op: str, backend: str) -> None:
    """fullgraph=True, and the same numbers."""
    inputs = arguments(op)
    compiled = torch.compile(lambda *a: call(op)(*a) * 2, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*inputs), call(op)(*inputs) * 2, rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_ops_run_on_meta(op: str) -> None:
    """Shape and dtype without data."""
    inputs = [value.to("meta") if isinstance(value, Tensor) else value for value in arguments(op)]
    y = call(op)(*inputs)
    assert y.device.type == "meta"
    assert y.shape == (2, 3, O)


@pytest.mark.parametrize("op", OPS)
def test_x_that_is_not_contiguous_is_right(op: str) -> None:
    """A transposed, strided or expanded x gives what its copy gives."""
    x, *rest = arguments(op, shape=(4, 6))
    for view in (x.transpose(0, 1), x[:, ::2], x[:1].expand(3, -1, -1), x.transpose(1, 2).contiguous().transpose(1, 2)):
        y = call(op)(view, *rest)
        assert y.is_contiguous()
        torch.testing.assert_close(y, call(op)(view.clone(memory_format=torch.contiguous_format), *rest), rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_no_tokens_give_no_rows(op: str) -> None:
    """T = 0 is not an error."""
    inputs = arguments(op, shape=(2, 0))
    assert call(op)(*inputs).shape == (2, 0, O)


@pytest.mark.parametrize("op", OPS)
def test_backward_says_that_there_is_none(op: str) -> None:
    """No silent gradient: the error names the way out."""
    x, *rest = arguments(op)
    y = call(op)(x.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match=r"inference and have no gradient.*to_linear"):
        y.sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[..., :-4], "in features|must be"),
        (lambda x: x[..., :-44], "in features|must be"),
        (lambda x: x.double(), r"x must be one of torch.bfloat16.*got torch.float64"),
        (lambda x: x.int(), r"got torch.int32"),
        (lambda x: x[0, 0, 0], "scalar"),
        (lambda x: x.to("meta"), "Move them to one device"),
    ],
    ids=["narrow", "narrower", "double", "int", "scalar", "device"],
)
def test_bad_x_is_a_value_error(op: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    """What it is, what is allowed."""
    x, *rest = arguments(op)
    if op in ("linear_24_mma", "linear_24_int8") and change(x).shape[-1:] == (I - 4,):
        pytest.skip("fragments are padded: the layer knows the exact width")
    with pytest.raises(ValueError, match=message):
        call(op)(change(x), *rest)


@pytest.mark.parametrize("op", OPS)
def test_bad_weights_are_value_errors(op: str) -> None:
    """Every tensor in turn: cut, of another dtype, transposed in memory, and a bias of another length."""
    inputs = arguments(op)
    tried = 0
    for index, value in enumerate(inputs):
        if index == 0 or not isinstance(value, Tensor):
            continue
        bad = [value[:-1], value.double() if value.is_floating_point() else value.to(torch.int16)]
        if value.dim() > 1:
            bad += [value.transpose(0, -1).contiguous().transpose(0, -1), value.unsqueeze(0)]
        for wrong in bad:
            if op == "linear_bitmask" and index == 2 and wrong.dtype == value.dtype:
                continue  # their number is checked against the bits when the layer is loaded
            with pytest.raises(ValueError, match="must be|must have|do not|does not fit|got"):
                call(op)(*inputs[:index], wrong, *inputs[index + 1 :])
            tried += 1
    assert tried >= 9
