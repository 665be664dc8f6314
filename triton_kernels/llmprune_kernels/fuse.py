"""One launch for layers that read the same tensor: q, k and v; gate and up.

The rows of the layers are put one after another in one buffer, of which each layer's parameters become views: there is no
second copy of the weights. Within one forward of their parent, the first layer that is called with some x computes all rows
and hands the others their parts when they are called with the very same x. Everything else a layer multiplies by its own rows.

"The very same x" is the same tensor object, not written to since (nor the weights), on the same stream and in the same thread.
Where that cannot be told (tensors of inference mode keep no count of writes) or must not be (torch.compile, tensor subclasses)
every layer computes alone. The bounds of the parent's forward keep a CUDA graph from fetching a part that another graph, or
none, computes. Writes through `x.data` are not counted by torch and not seen here.

A fused layer's y is a view of a wider tensor: with more than one token its rows do not follow one another.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmprune_kernels.fragments import ROWS
from llmprune_kernels.layer import frozen
from llmprune_kernels.linear import SparseLinear24

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Names that layers of one parent have in the models of transformers, where they read the same tensor."""

MAX_WASTED = 3  # launches in a row of which some part was not fetched, after which the layers stay apart


def fuse_(layers: Sequence[SparseLinear24], parent: nn.Module) -> bool:
    """Let layers that read the same tensor share one launch.

    Moving, casting, loading or laying out a layer anew ends the sharing for its whole group; a deepcopy is not fused.

    Args:
        layers: two or more, in any order; one that is fused already leaves its old group.
        parent: the module whose forward calls them all, with one tensor.

    Returns:
        Whether they are fused. They are not, and stay as they are, if they differ in in_features, dtype, device, layout, int8
        or having a bias, if one appears twice or is on meta, or if in fragment order one but the last has out_features that
        16 does not divide.
    """
    if not _fits(layers):
        return False
    for layer in layers:
        layer.unfuse()
    with torch.inference_mode(False), torch.no_grad():
        Group(layers, parent)
    return True


def fuse_siblings_(model: nn.Module) -> int:
    """Fuse q/k/v and gate/up of a whole model by their usual names; returns how many groups were fused."""
    count = 0
    for module in model.modules():
        for names in SIBLINGS:
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), SparseLinear24)]
            count += len(layers) == len(names) and fuse_(layers, module)
    return count


class Group:
    """The rows of several layers in one buffer. In fragment order a row of the buffer is a block of 16."""

    def __init__(self, layers: Sequence[SparseLinear24], parent: nn.Module) -> None:
        self.values = torch.cat([layer.values for layer in layers])
        self.meta = torch.cat([layer.meta for layer in layers])
        self.scale = _cat([layer.scale for layer in layers])
        self.bias = _cat([layer.bias for layer in layers])
        self.sizes = [layer.out_features for layer in layers]
        self.is_whole = True
        self.num_wasted = 0
        self.calls = _Calls()
        self.handles = [
            parent.register_forward_pre_hook(Boundary(self, opens=True)),
            parent.register_forward_hook(Boundary(self, opens=False), always_call=True),
        ]
        self.pointers: list[tuple[int, ...]] = []
        begin = row = 0
        for index, layer in enumerate(layers):
            end, next_row = begin + len(layer.values), row + layer.out_features
            layer.values, layer.meta = frozen(self.values[begin:end]), frozen(self.meta[begin:end])
            layer.scale = None if self.scale is None else frozen(self.scale[row:next_row])
            layer.bias = None if self.bias is None else frozen(self.bias[row:next_row])
            layer._fused = Member(self, index)
            self.pointers.append(_pointers(layer))
            begin, row = end, next_row

    def dissolve(self) -> None:
        """Let all members compute alone from now on."""
        self.is_whole = False
        for handle in self.handles:
            handle.remove()

    def part_of(self, layer: SparseLinear24, index: int, x: Tensor) -> Tensor | None:
        """The part that waits for the layer, or that of a new launch; None where the layer must compute alone."""
        calls = self.calls
        if not (self.is_whole and calls.depth and type(x) in (Tensor, nn.Parameter)):
            return None
        if x.is_inference() or torch.is_inference_mode_enabled() or _pointers(layer) != self.pointers[index]:
            return None
        stamp = self._stamp(x)
        if calls.pending is not None:
            part = calls.pending.take(index, x, stamp)
            if part is not None:
                return part
            self.finish()
            if not self.is_whole:
                return None
        y: Tensor = layer.multiply(x, self.values, self.meta, self.scale, self.bias, sum(self.sizes))
        parts: dict[int, Tensor] = dict(enumerate(y.split(self.sizes, dim=-1)))
        own = parts.pop(index)
        calls.pending = Pending(x, stamp, parts)
        return own

    def finish(self) -> None:
        """Forget the parts that nobody fetched, and give up where that has become the rule."""
        pending, self.calls.pending = self.calls.pending, None
        if pending is not None:
            self.num_wasted = self.num_wasted + 1 if pending.waiting else 0
            if self.num_wasted >= MAX_WASTED:
                self.dissolve()

    def _stamp(self, x: Tensor) -> tuple[object, ...]:
        """What must not have changed between a launch and the fetching of a part."""
        versions = tuple(tensor._version for tensor in (x, self.values, self.meta, self.scale, self.bias) if tensor is not None)
        if x.device.type == "cuda":
            return (*versions, torch.cuda.current_stream(x.device), torch.cuda.is_current_stream_capturing())
        return versions


class Member:
    """A layer's place in its group."""

    def __init__(self, group: Group, index: int) -> None:
        self.group = group
        self.place = index

    def part_of(self, layer: SparseLinear24, x: Tensor) -> Tensor | None:
        """The layer's y, if it may come from a shared launch."""
        if torch.compiler.is_compiling():
            return None
        return self.group.part_of(layer, self.place, x)

    def leave(self) -> None:
        """The layer's weights become others: they can no longer be computed with the group's."""
        self.group.dissolve()


class Pending:
    """Parts of one launch that wait for their layers."""

    def __init__(self, x: Tensor, stamp: tuple[object, ...], parts: dict[int, Tensor]) -> None:
        self.stamp = stamp
        self.parts = parts
        self.waiting = set(parts)
        self.x = weakref.ref(x, lambda _: parts.clear())  # nobody can ask for them any more

    def take(self, index: int, x: Tensor, stamp: tuple[object, ...]) -> Tensor | None:
        """A part, once."""
        if self.x() is not x or self.stamp != stamp:
            return None
        self.waiting.discard(index)
        return self.parts.pop(index, None)


class _Calls(threading.local):
    """What a thread is in the middle of."""

    depth = 0
    pending: Pending | None = None


class Boundary:
    """A hook at the begin or the end of the parent's forward. It is copied with the parent, but not its group."""

    def __init__(self, group: Group | None, *, opens: bool) -> None:
        self.group, self.opens = group, opens

    def __call__(self, *_: Any) -> None:
        """Parts are handed over only between the two."""
        if self.group is None or torch.compiler.is_compiling():
            return
        self.group.finish()
        self.group.calls.depth += 1 if self.opens else -1

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(None, opens=self.opens)


def _pointers(layer: SparseLinear24) -> tuple[int, ...]:
    """Where the parameters of a layer are: other addresses are other weights."""
    return tuple(t.data_ptr() for t in (layer.values, layer.meta, layer.scale, layer.bias) if t is not None)


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(found) if found else None


def _fits(layers: Sequence[SparseLinear24]) -> bool:
    kinds = {(layer.in_features, layer.dtype, layer.layout, layer.is_int8, layer.bias is None) for layer in layers}
    devices = {parameter.device for layer in layers for parameter in layer.parameters()}
    if len(layers) < 2 or len(kinds) > 1 or len(devices) > 1 or len({id(layer) for layer in layers}) < len(layers):
        return False
    if layers[0].values.is_meta:
        return False
    return layers[0].layout == "canonical" or all(layer.out_features % ROWS == 0 for layer in layers[:-1])
