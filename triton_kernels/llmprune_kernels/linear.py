"""Linear layers with packed weights: `SparseLinear24` (2:4) and `BitmaskLinear` (any pattern).

A state_dict holds the canonical layout, whatever layout a module computes with: 2:4 weights of 16 bits or of int8 lie in the
fragment order of the sparse tensor cores on CUDA GPUs that have them, and in the canonical layout elsewhere.

Dimension letters: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from llmprune_kernels import bitmask, dispatch, fragments, ops, tuning, two_four
from llmprune_kernels._bits import FLOATS, HALVES
from llmprune_kernels.int8 import dequantize, quantize
from llmprune_kernels.layer import PackedLinear, check_loaded, frozen

__all__ = ["BitmaskLinear", "Layout", "PackedLinear", "SparseLinear24", "prepare_", "tune_"]

Layout = Literal["canonical", "fragments"]


class SparseLinear24(PackedLinear):
    """A Linear whose weight has at most two non-zeros in every four consecutive inputs.

    Parameters (none is trained), in the canonical layout: `values` [O, I/2], `meta` uint8 [O, ceil(I/8)], `bias` [O] or None;
    with int8 values also `scale` fp32 [O]. In the fragment layout `values` and `meta` are int32 (`fragments.py`).

    Args:
        in_features: I, divisible by 4.
        out_features: O.
        bias: whether there is one.
        int8: keep the values as 8-bit integers with a scale per row.
        dtype: of the values, of x and of y: bf16, fp16 or fp32.
        device: where; "meta" for a layer that a state_dict fills later.

    Raises:
        ValueError: if I is not divisible by 4, or the dtype is none of the three.
    """

    values: nn.Parameter
    meta: nn.Parameter
    scale: nn.Parameter | None
    _cusparselt: Tensor | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        int8: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype, device)
        if in_features % 4:
            raise ValueError(f"2:4 needs in_features divisible by 4, got {in_features}. Leave this layer dense")
        kind = torch.int8 if int8 else self._dtype
        self.values = frozen(torch.zeros(out_features, in_features // 2, dtype=kind, device=device))
        meta = torch.full((out_features, -(-in_features // 8)), 0x44, dtype=torch.uint8, device=device)
        if in_features % 8:
            meta[:, -1] = 0x04
        self.meta = frozen(meta)
        self.scale = frozen(torch.ones(out_features, device=device, dtype=torch.float32)) if int8 else None
        self._fused: Any = None  # set by fuse_()
        self._cusparselt_from = 0

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, int8: bool = False) -> Self:
        """Pack an nn.Linear whose weight is 2:4 already.

        Raises:
            ValueError: if the weight is not 2:4; names the first offending row and group.
        """
        return cls.from_weight(linear.weight, linear.bias, int8=int8).train(linear.training)

    @classmethod
    def from_weight(cls, weight_OI: Tensor, bias: Tensor | None = None, *, int8: bool = False) -> Self:
        """Pack a 2:4 weight [O, I]; that of a GPT-2 Conv1D is passed transposed.

        Raises:
            ValueError: if the weight is not 2:4; names the first offending row and group.
        """
        with torch.no_grad():
            packed = two_four.pack(weight_OI.detach())
            layer = cls._empty(weight_OI, bias, int8=int8)
            values, scale = quantize(packed.values) if int8 else (packed.values, None)
            layer.values, layer.meta = frozen(values), frozen(packed.meta)
            layer.scale = None if scale is None else frozen(scale)
            layer.bias = None if bias is None else frozen(bias.detach().clone())
        return layer.prepare()

    @classmethod
    def _empty(cls, weight_OI: Tensor, bias: Tensor | None, *, int8: bool) -> Self:
        num_rows, num_columns = weight_OI.shape
        return cls(num_columns, num_rows, bias is not None, int8=int8, dtype=weight_OI.dtype, device="meta")

    @property
    def dtype(self) -> torch.dtype:
        """Of x and of y; of the values too, unless they are int8."""
        return self.values.dtype if self.values.is_floating_point() else self._dtype

    @property
    def layout(self) -> Layout:
        """What `values` and `meta` hold now."""
        return "fragments" if self.values.dim() == 5 else "canonical"

    @property
    def op(self) -> str:
        """The op that forward calls: by layout and kind of the values."""
        if self.layout == "canonical":
            return "linear_24"
        return "linear_24_int8" if self.is_int8 else "linear_24_mma"

    @property
    def is_int8(self) -> bool:
        """Whether the values are 8-bit integers."""
        return self.scale is not None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to y [..., O], both in the dtype of the layer.

        Raises:
            ValueError: if shape, dtype or device of x does not fit.
        """
        self._check_input(x)
        if self._cusparselt is not None and x.numel() >= self._cusparselt_from * self.in_features:
            return nn.functional.linear(x, self._cusparselt, self.bias)
        if self._fused is not None:
            part = self._fused.part_of(self, x)
            if part is not None:
                return part  # type: ignore[no-any-return]
        return self.multiply(x, self.values, self.meta, self.scale, self.bias, self.out_features)

    def multiply(
        self, x: Tensor, values: Tensor, meta: Tensor, scale: Tensor | None, bias: Tensor | None, out_features: int
    ) -> Tensor:
        """x times the given rows in the layer's layout: its own, or those of all layers it is fused with."""
        if values.dim() == 5 and scale is not None:
            return ops.linear_24_int8(x, values, meta, scale, bias, out_features)
        if values.dim() == 5:
            return ops.linear_24_mma(x, values, meta, bias, out_features)
        if scale is None:
            return ops.linear_24(x, values, meta, bias)
        # no kernel reads canonical int8: GPUs with sparse tensor cores hold fragments, elsewhere this is the reference
        y = ops.linear_24(x.float(), values.float(), meta) * scale
        return (y if bias is None else y + bias).to(x.dtype)

    def relayout(self, layout: Layout) -> Self:
        """Bring the weight into the named layout, in place; exact, on any device.

        Raises:
            ValueError: if the layout has no such dtype (fragments hold 16-bit values or int8) or is unknown.
        """
        if layout not in ("canonical", "fragments"):
            raise ValueError(f"there is no layout {layout!r}; choose 'canonical' or 'fragments'")
        if layout == self.layout:
            return self
        self._leave_fused()
        if layout == "fragments":
            self._dtype = self.dtype
            values, meta = fragments.to_fragments(self.values.detach(), self.meta.detach(), check=False)
        else:
            values, meta = self._canonical_pair()
        self.values, self.meta = frozen(values), frozen(meta)
        return self

    def prepare(self) -> Self:
        """Freeze the parameters and lay them out for the device they are on.

        Call it after setting `values` and `meta` by hand; `.to()` and `load_state_dict` do it by themselves.

        Raises:
            ValueError: if `meta` names columns that do not ascend.
        """
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        if self._is_complete() and self.layout == "canonical":
            two_four.check_meta(self.meta, self.in_features)
        return self._lay_out()

    def _is_complete(self) -> bool:
        return len({parameter.device for parameter in self.parameters()}) == 1 and not self.values.is_meta

    def _lay_out(self) -> Self:
        if self._is_complete():
            self.relayout("fragments" if self.dtype in HALVES and _has_sparse_cores(self.values.device) else "canonical")
        return self

    def dense_weight(self) -> Tensor:
        """The dense weight [O, I] in the dtype of the layer; int8 values times their scale, rounded to it."""
        if self.values.is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        values, meta = self._canonical_pair()
        if self.scale is not None:
            values = dequantize(values, self.scale, self.dtype)
        return two_four.unpack(values, meta, check=False)

    def canonical(self) -> dict[str, Tensor]:
        """`values` and `meta` in the canonical layout, whatever the module computes with."""
        values, meta = self._canonical_pair()
        return {"values": values, "meta": meta}

    def _canonical_pair(self) -> tuple[Tensor, Tensor]:
        if self.layout == "canonical":
            return self.values.detach(), self.meta.detach()
        dtype = torch.int8 if self.is_int8 else self._dtype
        return fragments.from_fragments(self.values, self.meta, self.out_features, self.in_features, dtype)

    def extra_repr(self) -> str:
        """Like that of nn.Linear, with the layout."""
        return super().extra_repr() + f", {self.layout}{', int8' if self.is_int8 else ''}"

    def add_cusparselt(self, from_tokens: int | None = None) -> bool:
        """Keep a second copy of the weight for cuSPARSELt, which then multiplies where there are many tokens.

        It costs as much memory again as the packed weight. Moving, casting or loading the layer drops it, and so does setting
        `values` or `meta`; writing into them does not. A deepcopy has none.

        Args:
            from_tokens: how many are many; by default what was measured (`tuning.cusparselt_from`).

        Returns:
            Whether there is one now: not on a CPU, nor for int8, nor where torch or the shape does not allow it, nor where
            it was measured and never the fastest.
        """
        self._cusparselt = None
        if self.is_int8 or not tuning.has_cusparselt(self.device):
            return False
        if from_tokens is None:
            from_tokens = tuning.cusparselt_from(self.out_features, self.in_features, self.dtype, self.device)
        if from_tokens is not None:
            self._cusparselt_from, self._cusparselt = from_tokens, tuning.compress(self.dense_weight())
        return self._cusparselt is not None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("values", "meta"):
            object.__setattr__(self, "_cusparselt", None)
        super().__setattr__(name, value)

    def unfuse(self) -> Self:
        """End the sharing of launches that `fuse_` began, with parameters of the layer's own again."""
        if self._fused is not None:
            self._leave_fused()
            for name, parameter in list(self.named_parameters(recurse=False)):
                setattr(self, name, frozen(parameter.detach().clone()))
        return self

    def _leave_fused(self) -> None:
        if self._fused is not None:
            self._fused.leave()
            self._fused = None

    def _copied_dict(self) -> dict[str, Any]:
        return self.__dict__ | {"_fused": None, "_cusparselt": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast in the canonical layout, then lay out for the new device. A scale stays fp32."""
        self._leave_fused()
        self._cusparselt = None
        self.relayout("canonical")
        scale = None if self.scale is None else self.scale.detach().clone()
        self._dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scale is not None:
            device = self.values.device
            self.scale = frozen(torch.empty_like(scale, device=device) if scale.is_meta else scale.to(device))
        return self._lay_out()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        self._check_version(prefix, local_metadata)
        self._check_all(prefix, {name: state_dict.get(prefix + name) for name in ("values", "meta", "scale")})
        self._leave_fused()
        self._cusparselt = None
        self.relayout("canonical")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        self._lay_out()

    def _check_all(self, prefix: str, loaded: Mapping[str, Tensor | None]) -> None:
        kind = (torch.int8,) if self.is_int8 else FLOATS
        meta_shape = (self.out_features, -(-self.in_features // 8))
        check_loaded(prefix, "values", loaded["values"], (self.out_features, self.in_features // 2), kind)
        check_loaded(prefix, "meta", loaded["meta"], meta_shape, (torch.uint8,))
        check_loaded(prefix, "scale", loaded["scale"], (self.out_features,), (torch.float32,))
        if loaded["meta"] is not None and not loaded["meta"].is_meta:
            try:
                two_four.check_meta(loaded["meta"], self.in_features)
            except ValueError as error:
                raise ValueError(f"{prefix}meta: {error}") from None


class BitmaskLinear(PackedLinear):
    """A Linear of any sparsity pattern: a bit per weight says what is kept, and the kept weights follow one another.

    Parameters (none is trained): `bits` uint8 [O, ceil(I/8)], `values` [num_values] row by row, `offsets` int64
    [ceil(O/16) + 1], `bias` [O] or None.

    Args:
        in_features: I.
        out_features: O.
        bias: whether there is one.
        num_values: number of kept weights; a layer made empty learns it from the state_dict it loads.
        dtype: of the values, of x and of y: bf16, fp16 or fp32.
        device: where; "meta" for a layer that a state_dict fills later.

    Raises:
        ValueError: if the dtype is none of the three, or num_values is not between 0 and O * I.
    """

    bits: nn.Parameter
    values: nn.Parameter
    offsets: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        num_values: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype, device)
        if not 0 <= num_values <= in_features * out_features:
            raise ValueError(f"{out_features} x {in_features} weights cannot have {num_values} kept ones")
        self._row_starts: Tensor | None = None
        self.bits = frozen(torch.zeros(out_features, -(-in_features // 8), dtype=torch.uint8, device=device))
        self.values = frozen(torch.zeros(num_values, dtype=self._dtype, device=device))
        self.offsets = frozen(torch.zeros(-(-out_features // 16) + 1, dtype=torch.int64, device=device))

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Pack an nn.Linear, whose zeros may lie anywhere."""
        return cls.from_weight(linear.weight, linear.bias).train(linear.training)

    @classmethod
    def from_weight(cls, weight_OI: Tensor, bias: Tensor | None = None) -> Self:
        """Pack a weight [O, I]; that of a GPT-2 Conv1D is passed transposed."""
        with torch.no_grad():
            packed = bitmask.pack(weight_OI.detach())
            num_rows, num_columns = weight_OI.shape
            layer = cls(
                num_columns, num_rows, bias is not None, num_values=len(packed.values), dtype=weight_OI.dtype, device="meta"
            )
            layer.bits, layer.values, layer.offsets = map(frozen, packed)
            layer.bias = None if bias is None else frozen(bias.detach().clone())
        return layer.prepare()

    @property
    def dtype(self) -> torch.dtype:
        """Of the values, of x and of y."""
        return self.values.dtype

    @property
    def op(self) -> str:
        """The op that forward calls."""
        return "linear_bitmask"

    @property
    def density(self) -> float:
        """Fraction of the weights that are kept."""
        return self.values.numel() / (self.in_features * self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] to y [..., O], both in the dtype of the layer.

        Raises:
            ValueError: if shape, dtype or device of x does not fit, or bits and values do not belong together.
        """
        self._check_input(x)
        return ops.linear_bitmask(x, self.bits, self.values, self.row_starts(), self.bias)

    def row_starts(self) -> Tensor:
        """int32 [O, ceil(I/256)]: where in `values` each run of 256 columns of a row starts; made once.

        Raises:
            ValueError: if the bits do not count as many values as there are.
        """
        starts = self._row_starts
        if starts is None or starts.device != self.bits.device:
            self.prepare()
            starts = self._row_starts
            assert starts is not None
        return starts

    def prepare(self) -> Self:
        """Freeze the parameters and derive the row starts, unless the weights are not there yet.

        Raises:
            ValueError: if bits, values and offsets do not belong together.
        """
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        if not any(parameter.is_meta for parameter in self.parameters()):
            bitmask.check_parts(self.bits, self.values, self.offsets, self.in_features)
            self._row_starts = bitmask.row_starts(self.bits.detach())
        return self

    def dense_weight(self) -> Tensor:
        """The dense weight [O, I] in the dtype of the layer."""
        if self.values.is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        return bitmask.unpack(self.bits.detach(), self.values.detach(), self.offsets.detach(), self.in_features)

    def canonical(self) -> dict[str, Tensor]:
        """`bits`, `values` and `offsets` as they are."""
        return {name: getattr(self, name).detach() for name in ("bits", "values", "offsets")}

    def extra_repr(self) -> str:
        """Like that of nn.Linear, with the density."""
        return super().extra_repr() + f", density={self.density:.3f}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bits":
            object.__setattr__(self, "_row_starts", None)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_checked = self._row_starts is not None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._row_starts = bitmask.row_starts(self.bits.detach()) if was_checked and not self.bits.is_meta else None
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        self._check_version(prefix, local_metadata)
        check_loaded(prefix, "bits", state_dict.get(prefix + "bits"), tuple(self.bits.shape), (torch.uint8,))
        check_loaded(prefix, "offsets", state_dict.get(prefix + "offsets"), tuple(self.offsets.shape), (torch.int64,))
        values = state_dict.get(prefix + "values")
        if values is not None:
            check_loaded(prefix, "values", values, (values.numel(),), FLOATS)
            if values.shape != self.values.shape:  # their number is data, not shape
                self.values = frozen(torch.empty_like(self.values, memory_format=None).resize_(values.numel()))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        self._row_starts = None
        if all(prefix + name in state_dict for name in ("bits", "values", "offsets")):
            self.prepare()


def prepare_(model: nn.Module) -> nn.Module:
    """Prepare every packed layer of a model whose parameters a loader has set one by one; returns the model."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.prepare()
    return model


def tune_(model: nn.Module, token_counts: Sequence[int] = dispatch.BUCKETS) -> dict[str, Any]:
    """Measure the kernels for the packed layers that a model has on CUDA (see `tuning.tune`); returns the entries."""
    jobs: dict[tuple[str, torch.dtype, torch.device], list[tuple[int, int]]] = {}
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.device.type == "cuda":
            shape = (module.out_features, module.in_features)
            jobs.setdefault((module.op, module.dtype, module.device), []).append(shape)
    entries: dict[str, Any] = {}
    for (op, dtype, device), shapes in jobs.items():
        entries |= tuning.tune(shapes, op=op, dtype=dtype, device=device, token_counts=token_counts)
    return entries


def _has_sparse_cores(device: torch.device) -> bool:
    """Whether mma.sp runs there: an NVIDIA GPU of compute capability 8.0 or more, and Triton to compile for it."""
    if device.type != "cuda" or torch.version.hip or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
