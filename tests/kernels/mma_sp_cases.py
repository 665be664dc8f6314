"""The mma.sp kernels in Triton's interpreter over awkward shapes: run as a script, prints JSON {case: Result}.

A process of its own, as the interpreter is chosen when the kernels are imported. Everything around the inputs is poisoned:
what lies behind x, the values and the metadata, and every output and workspace before a kernel writes it.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """One launch; `kind` bf16, fp16 or int8 (with bf16 or fp16 activations), `special` what is odd about the data."""

    kind: str
    tokens: int
    out_features: int
    in_features: int
    bias: bool
    row_tiles: int
    token_tiles: int
    num_warps: int
    splits: int = 1
    shuffle_x: bool = False
    special: str = ""

    def __str__(self) -> str:
        """Name of the test."""
        flags = ["bias"] * self.bias + ["shuffled"] * self.shuffle_x + [self.special] * bool(self.special)
        shape = f"{self.kind}-T{self.tokens}-O{self.out_features}-I{self.in_features}"
        return "-".join([shape, f"{self.row_tiles}x{self.token_tiles}x{self.num_warps}x{self.splits}", *flags])


class Result(NamedTuple):
    """`excess`: by how much |ours - fp64| exceeds one rounding of an fp32 sum, as a fraction of what is allowed; 0 is best.

    `ours`, `torchs`: relative Frobenius errors against fp64, ours and torch's. `same_nonfinite`: NaN and Inf where the dense
    product has them and nowhere else.
    """

    excess: float
    ours: float
    torchs: float
    same_nonfinite: bool


CASES = [
    Case("bf16", 1, 1, 4, True, 1, 1, 1),
    Case("bf16", 1, 16, 256, False, 1, 1, 4),
    Case("bf16", 3, 17, 8, True, 2, 1, 2),
    Case("bf16", 7, 15, 60, False, 4, 1, 4),
    Case("bf16", 8, 100, 252, True, 2, 1, 8),
    Case("bf16", 9, 16, 260, True, 1, 2, 2),
    Case("bf16", 16, 17, 1024, False, 2, 2, 4),
    Case("bf16", 17, 33, 260, True, 4, 2, 2, 1, True),
    Case("bf16", 40, 16, 256, True, 1, 4, 1),
    Case("bf16", 64, 17, 252, True, 1, 8, 1, 1, True),
    Case("bf16", 70, 16, 60, False, 1, 8, 1),
    Case("bf16", 70, 17, 8, True, 2, 4, 1),
    Case("bf16", 1, 160, 1000, True, 2, 1, 4, 3),
    Case("bf16", 3, 16, 1024, False, 1, 1, 2, 2),
    Case("bf16", 5, 40, 1024, True, 1, 1, 4, 2, True),
    Case("bf16", 2, 16, 256, True, 1, 1, 2, 3),
    Case("bf16", 8, 16, 1024, True, 1, 1, 1, special="odd address"),
    Case("bf16", 3, 20, 260, False, 1, 1, 2, 1, True, special="odd address"),
    Case("bf16", 4, 33, 260, True, 2, 1, 4, special="inf and nan"),
    Case("bf16", 9, 16, 1024, True, 1, 2, 2, 2, True, special="inf and nan"),
    Case("fp16", 1, 17, 1000, True, 1, 1, 4),
    Case("fp16", 7, 100, 256, False, 4, 1, 2),
    Case("fp16", 9, 15, 260, True, 2, 2, 1, 2),
    Case("fp16", 17, 16, 60, True, 4, 4, 1),
    Case("fp16", 33, 16, 8, False, 2, 8, 1, 1, True),
    Case("fp16", 3, 17, 252, True, 1, 1, 2, special="inf and nan"),
    Case("int8 bf16", 1, 1, 4, True, 1, 1, 1),
    Case("int8 bf16", 7, 100, 1000, True, 2, 1, 4),
    Case("int8 bf16", 9, 17, 260, False, 1, 2, 2, 2),
    Case("int8 bf16", 16, 16, 256, True, 1, 2, 1, 1, True),
    Case("int8 bf16", 70, 16, 60, True, 1, 8, 1),
    Case("int8 fp16", 3, 33, 1024, True, 4, 1, 8),
    Case("int8 fp16", 17, 15, 252, True, 2, 4, 1, 1, True),
    Case("int8 fp16", 8, 16, 260, False, 1, 1, 2, 3),
]


def two_four_weight(out_features: int, in_features: int, generator: torch.Generator) -> Tensor:
    """A random 2:4 weight whose groups keep any two, one or none of their columns."""
    weight = torch.randn(out_features, in_features // 4, 4, generator=generator)
    keep = torch.rand(weight.shape, generator=generator).argsort(-1) < 2
    keep &= torch.rand(weight.shape, generator=generator) < 0.9
    return torch.where(keep, weight, 0.0).view(out_features, in_features)


def before_poison(tensor: Tensor, offset: int = 0) -> Tensor:
    """`tensor` as a view that starts `offset` elements into a larger buffer with poison behind it."""
    poison = float("nan") if tensor.is_floating_point() else -1  # as metadata, -1 is not ascending; as values, NaN
    buffer = torch.full((offset + tensor.numel() + 4096,), poison, dtype=tensor.dtype)
    view = buffer[offset : offset + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def run(case: Case, seed: int) -> Result:
    """Launch the kernel of `case` in the interpreter and compare."""
    from llmprune_kernels import fragments, int8, two_four
    from llmprune_kernels.kernels import mma_sp, mma_sp_int8

    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float16 if case.kind.endswith("fp16") else torch.bfloat16
    weight = two_four_weight(case.out_features, case.in_features, generator).to(dtype)
    if case.special == "inf and nan":
        kept = weight.view(case.out_features, -1).nonzero()
        for (row, column), value in zip(
            kept[:: max(1, len(kept) // 4)], (float("inf"), float("nan"), float("-inf")), strict=False
        ):
            weight[row, column] = value
    x = torch.randn(case.tokens, case.in_features, generator=generator).to(dtype)
    bias = torch.randn(case.out_features, generator=generator).to(dtype) if case.bias else None

    values, meta = two_four.pack(weight)
    tile = case._asdict()
    tile = {name: tile[name] for name in ("row_tiles", "token_tiles", "num_warps", "splits", "shuffle_x")}
    x_view = before_poison(x, offset=int(case.special == "odd address"))
    if case.kind.startswith("int8"):
        quantized, scale = int8.quantize(values)
        values_frag, meta_frag = (before_poison(part) for part in fragments.to_fragments(quantized, meta))
        exact = two_four.unpack(quantized.double().float(), meta).double() * scale.double()[:, None]
        y = mma_sp_int8.linear(x_view, values_frag, meta_frag, scale, bias, case.out_features, **tile)
    else:
        values_frag, meta_frag = (before_poison(part) for part in fragments.to_fragments(values, meta))
        exact = weight.double()
        y = mma_sp.linear(x_view, values_frag, meta_frag, bias, case.out_features, **tile)
    return compare(x, exact, bias, y)


def compare(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Result:
    """`y` against the fp64 product; allowed are one rounding to its dtype and 2^-20 of the sum of all magnitudes."""
    exact = x.double() @ weight.T
    magnitude = x.double().abs() @ weight.T.abs()
    if bias is not None:
        exact += bias.double()
        magnitude += bias.double().abs()
    finite = exact.isfinite()
    unit = torch.finfo(y.dtype).eps / 2
    allowed = unit * exact.abs() + 2**-20 * magnitude + torch.finfo(y.dtype).smallest_normal
    error = (y.double() - exact).abs()
    rounded = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
    norm = exact[finite].norm().clamp_min(1e-30)
    return Result(
        excess=float((error / allowed)[finite].nan_to_num(float("inf"), float("inf")).max()) - 1,
        ours=float(error[finite].norm() / norm),
        torchs=float((rounded.double() - exact)[finite].norm() / norm),
        same_nonfinite=bool(torch.equal(y.double()[~finite].nan_to_num(0.5), exact[~finite].nan_to_num(0.5)))
        and bool(y[finite].isfinite().all()),
    )


def poison_new_tensors() -> None:
    """Let `new_empty` hand out NaN, so that what a kernel forgets to write shows."""
    real = torch.Tensor.new_empty

    def new_empty(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tensor = real(self, *args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    torch.Tensor.new_empty = new_empty  # type: ignore[method-assign,assignment]


def main() -> None:
    """Every case, and that the int8 expansion is exact for each of the 256 bytes."""
    import interpreter
    import numpy as np

    interpreter.install()
    poison_new_tensors()
    torch.set_num_threads(1)
    results: dict[str, Any] = {str(case): run(case, seed)._asdict() for seed, case in enumerate(CASES)}

    from llmprune_kernels.kernels import mma_sp

    every_byte = np.arange(-128, 128, dtype=np.int8).view(np.uint32).reshape(16, 4)
    for dtype, torch_dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        asm = mma_sp._expand_asm(dtype)
        words = interpreter.evaluate(asm, mma_sp._EXPAND_CONSTRAINTS.value, [every_byte], 4)
        wide = np.concatenate([word.reshape(16, 4) for word in words], axis=1)  # [thread, 8 words of two]
        results[f"expand {dtype}"] = torch.from_numpy(wide.copy()).view(torch_dtype).view(-1).tolist()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
