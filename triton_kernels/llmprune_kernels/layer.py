"""What the packed layers share: a Linear whose weight is not stored densely and is not trained.

Dimension letters: O out features, I in features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from llmprune_kernels._bits import FLOATS

VERSION = 1  # of the names, shapes and meanings in a state_dict


class PackedLinear(nn.Module):
    """What the packed layers share: a Linear whose weight is not stored densely and is not trained."""

    _version = VERSION
    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"a layer needs at least one in and one out feature, got {in_features} and {out_features}")
        self.in_features, self.out_features = in_features, out_features
        self._dtype = dtype or torch.get_default_dtype()
        if self._dtype not in FLOATS:
            raise ValueError(f"packed weights are of {', '.join(map(str, FLOATS))}, got {self._dtype}")
        self.bias = frozen(torch.zeros(out_features, dtype=self._dtype, device=device)) if bias else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, of x and of y."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def op(self) -> str:
        """The op that forward calls, as `dispatch` names it."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense weight [O, I], made anew each time: for code that looks at `linear.weight`, not for computing with."""
        return self.dense_weight()

    def dense_weight(self) -> Tensor:
        """The dense weight [O, I] in the dtype of the layer."""
        raise NotImplementedError

    def canonical(self) -> dict[str, Tensor]:
        """The tensors of the weight as a checkpoint holds them, without the bias."""
        raise NotImplementedError

    def prepare(self) -> Self:
        """Bring freshly loaded tensors into the form that the device computes with; may be called at any time.

        `.to()` and `load_state_dict` do it by themselves. A loader that sets the parameters one by one calls it at the end.
        """
        raise NotImplementedError

    def to_linear(self) -> nn.Linear:
        """A dense copy of the layer, which can be trained and pickled."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", self.dtype)
        linear.weight = nn.Parameter(self.dense_weight())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Like that of nn.Linear."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _check_input(self, x: Tensor) -> None:
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x of shape {tuple(x.shape)} does not fit a layer of {self.in_features} in features")
        if x.dtype != self.dtype:
            raise ValueError(
                f"x is {x.dtype}, but the layer {self.dtype}. Cast one of them: x.to(layer.dtype) or layer.to(x.dtype)"
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.canonical().items():
            destination[prefix + name] = tensor
        for name in self._parameters:  # fused layers share storage, which files would save whole and for each
            tensor = destination.get(prefix + name)
            if tensor is not None and tensor.untyped_storage().nbytes() != tensor.nbytes:
                destination[prefix + name] = tensor.detach().clone()

    def _check_version(self, prefix: str, local_metadata: Mapping[str, Any]) -> None:
        version = local_metadata.get("version", VERSION)  # a safetensors file has none
        if version != VERSION:
            raise ValueError(
                f"{prefix.rstrip('.') or 'the layer'} was saved in version {version} of the packed format; "
                f"this package reads version {VERSION}. Update llmprune"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self._copied_dict(), memo))
        return new

    def _copied_dict(self) -> dict[str, Any]:
        return self.__dict__

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} is not pickled: its runtime layout belongs to one device and one version. "
            "Save state_dict() (torch.save or safetensors) and load it into a new layer, or pickle to_linear()"
        )


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that is not trained."""
    return nn.Parameter(tensor, requires_grad=False)


def check_loaded(
    prefix: str, name: str, tensor: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise ValueError unless a loaded tensor, if there is one, has the layer's shape and one of the dtypes."""
    if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype not in dtypes):
        raise ValueError(
            f"{prefix}{name} must be {' or '.join(map(str, dtypes))} of shape {list(shape)}, "
            f"got {tensor.dtype} {list(tensor.shape)}. The state_dict is of another layer or format"
        )
