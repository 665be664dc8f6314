"""Watching the matrix products of a forward pass: the moment a site's input is complete is the moment before its product.

One mechanism for Linear, Conv1D and the fused 3-D expert parameters of transformers 5, whose experts have no module to
hook. T tokens, I in features, E experts.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmprune.anatomy.sites import Site

T = TypeVar("T")
OnInput = Callable[[Site, Tensor], None]

# For each product: the positions of its two factors, and whether the second one is [in, out].
_PRODUCTS: dict[Any, tuple[int, int, bool]] = {
    F.linear: (0, 1, False),
    torch.matmul: (0, 1, True),
    torch.Tensor.matmul: (0, 1, True),
    torch.Tensor.__matmul__: (0, 1, True),
    torch.mm: (0, 1, True),
    torch.Tensor.mm: (0, 1, True),
    torch.bmm: (0, 1, True),
    torch.Tensor.bmm: (0, 1, True),
    torch.addmm: (1, 2, True),
    torch.baddbmm: (1, 2, True),
}
_NAMES = {0: ("input", "self"), 1: ("weight", "mat2", "other", "batch1", "mat1"), 2: ("mat2", "batch2")}


class Watcher(TorchFunctionMode):
    """While active, calls ``on_input(site, x)`` before every product of a site with its input ``x`` [..., I].

    The callback may change the site's weight: the product then sees the new one.
    """

    def __init__(self, sites: Iterable[Site], on_input: OnInput) -> None:
        super().__init__()
        self.on_input = on_input
        self.orientation: dict[str, bool] = {}
        self.watch(sites)

    def watch(self, sites: Iterable[Site]) -> None:
        """Watch these sites, whose weights are in memory now, instead of those before."""
        self._sites: dict[int, list[tuple[int, int, Site]]] = defaultdict(list)
        for site in sites:
            stored = site.stored
            start = stored.data_ptr()
            end = start + stored.numel() * stored.element_size()
            self._sites[stored.untyped_storage().data_ptr()].append((start, end, site))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = _PRODUCTS.get(func)
        if product is not None:
            left, right = _operand(args, kwargs, product[0]), _operand(args, kwargs, product[1])
            if isinstance(left, Tensor) and isinstance(right, Tensor):
                self._see(right, left, weight_is_IO=product[2])
                if product[2] and left.dim() > 1 and right.dim() > 1:  # W @ x is x^T @ W^T
                    self._see(left, right.mT, weight_is_IO=False)
        return func(*args, **kwargs)

    def _see(self, weight: Tensor, x: Tensor, *, weight_is_IO: bool) -> None:
        for site, index in self._matches(weight):
            self.orientation[site.name] = weight_is_IO == (weight.stride(-1) == 1)
            if index is not None:
                x_TI = x[index].reshape(-1, x.shape[-1])
                self.on_input(site, x_TI[x_TI.any(-1)])  # an expert is fed zeros for tokens routed elsewhere
            else:
                self.on_input(site, x)

    def _matches(self, weight: Tensor) -> Iterator[tuple[Site, int | None]]:
        """The sites an operand is (part of), each with its index if the operand is a batch of them."""
        candidates = self._sites.get(weight.untyped_storage().data_ptr())
        if weight.dim() == 4 and weight.shape[1] == 1:  # broadcast over the batch
            weight = weight.squeeze(1)
        if not candidates or weight.dim() not in (2, 3):
            return
        start = weight.data_ptr()
        if weight.dim() == 2:
            for low, high, site in candidates:
                if low <= start < high and weight.numel() <= site.numel:
                    yield site, None
            return
        end = start + weight.numel() * weight.element_size()
        for low, high, site in candidates:
            if site.expert is not None and start <= low and high <= end:
                yield site, site.expert


def orient(sites: Iterable[Site], observed: dict[str, bool]) -> list[Site]:
    """The true sites, the way round their products showed: raw parameters that no product used are dropped; all experts
    of one parameter share what was seen of any.
    """
    by_parameter = {(id(site.module), site.parameter): observed[site.name] for site in sites if site.name in observed}
    return [
        replace(site, transposed=by_parameter.get((id(site.module), site.parameter), site.transposed))
        for site in sites
        if site.declared or (id(site.module), site.parameter) in by_parameter
    ]


class SharedInputs(Generic[T]):
    """What was computed from an activation, found again while that very activation is alive: same memory, same version."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], T]] = {}

    def get(self, x: Tensor) -> T | None:
        """The value remembered for ``x``, or None."""
        self._entries = {key: entry for key, entry in self._entries.items() if entry[0]() is not None}
        entry = self._entries.get(self._key(x))
        return entry[1] if entry else None

    def put(self, x: Tensor, value: T) -> None:
        """Remember ``value`` for as long as ``x`` lives unchanged."""
        self._entries[self._key(x)] = (weakref.ref(x), value)

    @staticmethod
    def _key(x: Tensor) -> tuple[Any, ...]:
        return (x.data_ptr(), x.shape, x.stride(), x._version)


def _operand(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> Any:
    if position < len(args):
        return args[position]
    return next((kwargs[name] for name in _NAMES[position] if name in kwargs), None)
