"""Packed weights in a model in memory: which matrices can be packed, in which format, and swapping the layers for packed ones.

O out, I in features.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmprune.anatomy.blocks import find_stack
from llmprune.anatomy.sites import Site
from llmprune.anatomy.watch import SharedInputs
from llmprune.errors import CorruptCheckpoint
from llmprune.spec import PackedFormat, PackFormat
from llmprune_kernels import FLOATS, two_four
from llmprune_kernels.linear import BitmaskLinear, PackedLinear, SparseLinear24

_SAVES_SPEED = 0.75
"""A 2:4 weight goes to the bitmask format only where that is this much smaller: the 2:4 kernels read a byte faster."""
_WORTH_IT = 0.9
"""Share of the dense bytes that a packed weight may take: below, what is saved is not worth what unpacking costs."""
_WRITTEN_OUT_LINEAR = ("FalconLinear",)  # x @ weight.T + bias, as nn.Linear computes it


def sizes(weight_OI: Tensor) -> dict[PackedFormat, int]:
    """Bytes of a weight in each format that can hold it: bitmask always, 2:4 where no group of four has three non-zeros."""
    num_rows, num_columns = weight_OI.shape
    itemsize = weight_OI.element_size()
    bits = num_rows * -(-num_columns // 8)
    num_stored = _num_stored(weight_OI)
    found: dict[PackedFormat, int] = {"bitmask": bits + num_stored * itemsize + 8 * (-(-num_rows // 16) + 1)}
    if num_columns % 4 == 0 and two_four.is_two_four(weight_OI):
        found["2:4"] = bits + weight_OI.numel() // 2 * itemsize
    return found


def choose_format(weight_OI: Tensor, wanted: PackFormat = "auto") -> PackedFormat | None:
    """The format to store a weight [O, I] in; None where it takes more than nine tenths of the dense weight's bytes.

    ``auto`` takes 2:4 where it fits, unless the bitmask is much smaller (1:4, say); else the bitmask. A named format is taken
    where it fits and saves as much. bf16, fp16 and fp32 can be packed.
    """
    if weight_OI.dtype not in FLOATS or weight_OI.dim() != 2 or not weight_OI.numel():
        return None
    found = sizes(weight_OI)
    if wanted == "auto" and "2:4" in found:
        wanted = "bitmask" if found["bitmask"] < _SAVES_SPEED * found["2:4"] else "2:4"
    name: PackedFormat = "bitmask" if wanted == "auto" else wanted
    return name if found.get(name, weight_OI.nbytes) <= _WORTH_IT * weight_OI.nbytes else None


def num_nonzeros(weight_OI: Tensor) -> int:
    """Number of weights that are not 0.0 or -0.0, NaN among them; bf16, fp16 or fp32."""
    return int(torch.count_nonzero(_bits(weight_OI) << 1))  # without the sign; ten times as fast as comparing floats


def num_negative_zeros(weight_OI: Tensor) -> int:
    """Number of -0.0 in a weight."""
    return _num_stored(weight_OI) - num_nonzeros(weight_OI)


def packable(model: nn.Module) -> tuple[dict[str, Site], dict[str, list[str]]]:
    """The sites of the decoder blocks whose module can be swapped for a packed one, by the module's path, and the names of
    the others by the reason. Works on ``meta`` weights.

    Raises UnsupportedModel where there is no decoder stack.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # on meta they are not tied yet
    shared = {*tied.keys(), *tied.values()}
    able: dict[str, Site] = {}
    others: dict[str, list[str]] = {}
    for site in (site for sites in find_stack(model).sites for site in sites):
        is_shared = uses[id(getattr(site.module, site.parameter))] > 1 or f"{site.name}.weight" in shared
        reason = _why_not(site, is_shared=is_shared)
        if reason is None:
            able[site.name] = site
        elif site.declared:
            others.setdefault(reason, []).append(site.name)
    return able, others


def _why_not(site: Site, *, is_shared: bool) -> str | None:
    if site.expert is not None:
        return "experts of one fused parameter"
    if site.parameter != "weight" or not _computes_linear(site.module):
        return f"not an ordinary Linear but {type(site.module).__name__}"
    return "weights that several modules share" if is_shared else None


def _computes_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward or type(module).__name__ in _WRITTEN_OUT_LINEAR
    return isinstance(module, Conv1D)


def pack_(model: nn.Module, format: PackFormat = "auto") -> dict[str, PackedFormat]:
    """Swap the layers of the decoder blocks that packing makes smaller, one after the other; returns their formats by path.

    Experts of fused parameters, embeddings, head and routers stay as they are. To save the model as a packed checkpoint
    write it dense and use :func:`llmprune.convert`.
    """
    done: dict[str, PackedFormat] = {}
    for path, site in packable(model)[0].items():
        chosen = choose_format(site.weight_OI, format)
        if chosen is not None:
            swap_(model, path, pack_layer(site.module, chosen))
            done[path] = chosen
    return done


def can_pack(model: nn.Module) -> bool:
    """Whether :func:`pack_` would pack anything."""
    return any(choose_format(site.weight_OI) for site in packable(model)[0].values())


def pack_layer(module: nn.Module, format: PackedFormat) -> PackedLinear:
    """A packed copy of a Linear or Conv1D. Raises ValueError where the weight is not 2:4."""
    transposed = isinstance(module, Conv1D)
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    weight_OI = weight.detach().T.contiguous() if transposed else weight.detach()
    kind = SparseLinear24 if format == "2:4" else BitmaskLinear
    return _marked(kind.from_weight(weight_OI, bias).train(module.training), transposed)


def put_empty_(
    model: nn.Module, path: str, format: PackedFormat, shape: tuple[int, int], num_values: int | None, dtype: torch.dtype
) -> None:
    """Swap a Linear or Conv1D for a packed layer on ``meta``, which a loader fills.

    Raises CorruptCheckpoint where the model has no such layer, or of another shape.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    weight = getattr(module, "weight", None)
    transposed = isinstance(module, Conv1D)
    if module is None or not isinstance(weight, Tensor) or tuple(weight.shape) != (shape[::-1] if transposed else shape):
        found = f"one of {list(weight.shape)}" if isinstance(weight, Tensor) else "none"
        raise CorruptCheckpoint(f"config.json names a packed layer {path} of shape {list(shape)}; the model has {found}.")
    bias = getattr(module, "bias", None) is not None
    layer: PackedLinear
    if format == "2:4":
        layer = SparseLinear24(shape[1], shape[0], bias, dtype=dtype, device="meta")
    else:
        layer = BitmaskLinear(shape[1], shape[0], bias, num_values=num_values or 0, dtype=dtype, device="meta")
    swap_(model, path, _marked(layer.train(module.training), transposed))


def checked(layer: PackedLinear) -> PackedLinear:
    """The layer, if its metadata is in order; a bitmask is checked when it is prepared. Raises ValueError."""
    if isinstance(layer, SparseLinear24) and layer.layout == "canonical":
        two_four.check_meta(layer.meta.detach(), layer.in_features)
    return layer


def unpack_(model: nn.Module) -> list[str]:
    """Swap every packed layer for the ordinary one, one after the other; returns their paths. Bits are kept exactly."""
    paths = list(packed_layers(model))
    for path in paths:
        layer = model.get_submodule(path)
        assert isinstance(layer, PackedLinear)
        if isinstance(layer, SparseLinear24):
            layer.unfuse()
        swap_(model, path, _unpacked(layer))
    return paths


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}


def is_transposed(layer: PackedLinear) -> bool:
    """Whether the layer stands in place of a Conv1D, whose dense weight is [I, O]."""
    return bool(getattr(layer, "transposed", False))


def format_of(layer: PackedLinear) -> PackedFormat:
    """The format of a packed layer."""
    return "2:4" if isinstance(layer, SparseLinear24) else "bitmask"


def _unpacked(layer: PackedLinear) -> nn.Module:
    if not is_transposed(layer):
        return layer.to_linear()
    dense: Any = Conv1D.__new__(Conv1D)  # its constructor would draw random weights
    nn.Module.__init__(dense)
    dense.nf, dense.nx = layer.out_features, layer.in_features
    dense.weight = nn.Parameter(layer.dense_weight().T.contiguous())
    assert layer.bias is not None
    dense.bias = nn.Parameter(layer.bias.detach().clone())
    dense.train(layer.training)
    assert isinstance(dense, nn.Module)
    return dense


@torch.no_grad()
def input_groups(model: nn.Module, input_ids_NS: Tensor) -> list[list[str]]:
    """Paths of the packed layers that read the very same tensor in a forward pass, two or more a group, in calling order."""
    groups: list[list[str]] = []
    shared: SharedInputs[list[str]] = SharedInputs()

    def watch(path: str, x: Tensor) -> None:
        group = shared.get(x)
        if group is None:
            group = []
            groups.append(group)
            shared.put(x, group)
        group.append(path)

    handles = [
        layer.register_forward_pre_hook(lambda _module, args, path=path: watch(path, args[0]) if args else None)
        for path, layer in packed_layers(model).items()
    ]
    try:
        model(input_ids=input_ids_NS, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    calls = Counter(path for group in groups for path in group)
    return [group for group in groups if len(group) > 1 and all(calls[path] == 1 for path in group)]


def _marked(layer: PackedLinear, transposed: bool) -> PackedLinear:
    if transposed:
        layer.transposed = True  # type: ignore[assignment]
    return layer


def swap_(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the one at a path."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent).register_module(name, module)


def _num_stored(weight_OI: Tensor) -> int:
    """Number of weights whose bits are not all zero: a -0.0 is stored."""
    return int(torch.count_nonzero(_bits(weight_OI)))


def _bits(weight_OI: Tensor) -> Tensor:
    return weight_OI.detach().view(torch.int16 if weight_OI.element_size() == 2 else torch.int32)
