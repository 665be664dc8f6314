"""Slicing: groups really leave a model, and what is left is checked against the same model with zeros in their place.

A cut says which groups of a module stay. :func:`mask_` writes zeros, :func:`slice_` makes the matrices smaller, and
:func:`slice_model_` does one after the other and compares. Where all layers are cut to the same widths the config can say so
(:mod:`llmprune.structured.widths`), and the checkpoint is one for the stock class; else the config lists every shape
(:mod:`llmprune.structured.free`).

O out, I in features; K columns kept, G groups kept, S sequence, N sequences, H hidden.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig, PreTrainedModel

from llmprune.anatomy.blocks import HIDDEN
from llmprune.anatomy.sites import Site
from llmprune.devices import module_device
from llmprune.errors import UnsupportedModel
from llmprune.structured.experts import Mixture, slice_experts_, without
from llmprune.structured.modeling import NoAttention, NoFFN
from llmprune.structured.path import columns_of
from llmprune.structured.stock import distance, rounding
from llmprune.structured.units import HEAD_COUNTS, KV_HEAD_COUNTS, Module, Part
from llmprune.structured.widths import FFN_WIDTHS, fields_of

_HEAD_WIDTHS = ("split_size", "embed_dim", "kv_dim")  # of all heads together
_FUSED_WIDTHS = ("hidden_size",)  # likewise, where queries, keys and values are one matrix
_FAILURES = (AttributeError, IndexError, TypeError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Cut:
    """What stays of a module or a mixture; of a mixture there is nothing but the experts that do.

    Attributes:
        kept_G: indices of the groups, rising, int64; none of them takes the whole module out.
        weight_OK: the consumer's weights for their columns, or None for those it has.
        bias_O: the consumer's bias, also where it had none, or None for the one it has.
    """

    kept_G: Tensor
    weight_OK: Tensor | None = None
    bias_O: Tensor | None = None


@dataclass(frozen=True)
class Reference:
    """What the modules of a masked model were given and put out on a batch of tokens, by name."""

    input_ids_NS: Tensor
    hidden: dict[str, Tensor]
    outputs: dict[str, Any]


@torch.no_grad()
def mask_(module: Module, cut: Cut) -> None:
    """Write zeros into the consumer's columns of the groups that go, and its new weights and bias; no shape changes."""
    weight_OI = module.consumer.weight_OI
    columns_K = _kept_columns(module, cut).to(weight_OI.device)
    kept_OK = weight_OI[:, columns_K] if cut.weight_OK is None else cut.weight_OK.to(weight_OI)
    weight_OI.zero_()
    weight_OI[:, columns_K] = kept_OK
    _set_bias_(module.consumer, cut.bias_O)


@contextmanager
def masked(model: PreTrainedModel, parts: Sequence[Part], cuts: Mapping[str, Cut]) -> Iterator[None]:
    """While active the model does without what goes: modules have zeros there, which stay, and routers choose among the experts
    that are kept.
    """
    for part in parts:
        if isinstance(part, Module):
            mask_(part, cuts[part.name])
    mixtures = [part for part in parts if isinstance(part, Mixture)]
    with without(model, mixtures, [cuts[mixture.name].kept_G.tolist() for mixture in mixtures]):
        yield


@torch.no_grad()
def slice_(model: PreTrainedModel, module: Part, cut: Cut) -> None:
    """Take the other groups out of every matrix of the module, and out of what the module knows of its widths.

    The model then computes what it would with zeros in their place; its config still says the old widths. A module of which
    nothing stays is replaced by :class:`NoAttention` or :class:`NoFFN`, but for FFNs that add the residual themselves or lie in
    the block itself: they keep matrices of width 0. ``module`` no longer describes the model.

    Raises:
        UnsupportedModel: a mixture would be left with too few experts.
    """
    if isinstance(module, Mixture):
        slice_experts_(model, module, cut.kept_G.tolist())
        return
    columns_K = _kept_columns(module, cut)
    owner = model.get_submodule(module.name)
    _set_bias_(module.consumer, cut.bias_O)
    if not len(cut.kept_G) and not (module.kind == "ffn" and (module.inline or "residual" in _arguments(owner))):
        bias_O = module.consumer.module.bias
        assert bias_O is None or isinstance(bias_O, nn.Parameter)
        layer_idx = getattr(owner, "layer_idx", getattr(owner, "layer_id", None))
        model.set_submodule(module.name, NoAttention(bias_O, layer_idx) if module.kind == "attention" else NoFFN(bias_O))
        return
    weight_OI = module.consumer.weight_OI
    kept_OK = weight_OI[:, columns_K.to(weight_OI.device)] if cut.weight_OK is None else cut.weight_OK.to(weight_OI)
    _set_weight_(module.consumer, kept_OK)
    gone_G = torch.ones(module.num_groups, dtype=torch.bool)
    gone_G[cut.kept_G.cpu()] = False
    for part in module.producers:
        stays_O = torch.ones(part.site.shape[0], dtype=torch.bool)
        stays_O[part.rows_GR[gone_G].reshape(-1)] = False
        _keep_rows_(part.site, stays_O.nonzero()[:, 0])
    for name in module.per_head:
        own = getattr(owner, name)
        kept = own.detach().view(module.num_groups, -1)[cut.kept_G.to(own.device)].reshape(-1)
        setattr(owner, name, nn.Parameter(kept, own.requires_grad))
    _recount_(owner, module, len(cut.kept_G))


def slice_model_(
    model: PreTrainedModel,
    modules: Sequence[Part],
    cuts: Mapping[str, Cut],
    input_ids_NS: Tensor,
    *,
    running: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Slice every module that has a cut, and check the model against its masked self on a batch of tokens.

    Args:
        running: entered around each of the two forwards, to have the model where it runs.

    Raises:
        UnsupportedModel: they differ; the model in memory is then of no use.
    """
    chosen = [module for module in modules if module.name in cuts]
    with masked(model, chosen, cuts), running():
        reference = record_masked(model, chosen, input_ids_NS.to(module_device(model)))
    for module in chosen:
        slice_(model, module, Cut(cuts[module.name].kept_G))
    with running():
        check_sliced(model, reference)


@torch.no_grad()
def record_masked(model: PreTrainedModel, modules: Iterable[Part], input_ids_NS: Tensor) -> Reference:
    """Run a masked model and keep what :func:`check_sliced` compares a sliced one with.

    Raises:
        UnsupportedModel: a module is not called, so that nothing could be compared; names it.
    """
    reference = Reference(input_ids_NS, {}, {})
    # Of a mixture what holds it is compared: the numbers of experts that it is handed change.
    names = list(dict.fromkeys(part.owner if isinstance(part, Mixture) else part.name for part in modules))

    def before(name: str, args: Any, kwargs: Any) -> None:
        reference.hidden[name] = _hidden(args, kwargs).clone()

    def after(name: str, output: Any) -> None:  # a copy, as some blocks add to it in place
        reference.outputs[name] = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, output)

    with _hooked(model, names, before, after):
        model(input_ids=input_ids_NS, use_cache=False)
    for name in names:
        if name not in reference.outputs:
            raise UnsupportedModel(f"{name} is not called in a forward: without its output it cannot be sliced and checked.")
    return reference


@torch.no_grad()
def check_sliced(model: PreTrainedModel, reference: Reference) -> None:
    """Compare every module of a sliced model with the masked one: given the same hidden state it must put out the same, to
    :func:`llmprune.structured.stock.rounding` of the norm over the batch.

    Raises:
        UnsupportedModel: a module differs, or does not run; names it.
    """
    current = "the model"

    def before(name: str, args: Any, kwargs: Any) -> Any:
        nonlocal current
        current = name
        hidden_NSH = reference.hidden[name]  # so that a difference is the module's own
        if args and isinstance(args[0], Tensor):
            return (hidden_NSH, *args[1:]), kwargs
        key = next(key for key in HIDDEN if key in kwargs)
        return args, {**kwargs, key: hidden_NSH}

    def after(name: str, output: Any) -> None:
        nonlocal current
        ours_NSH, theirs_NSH = _first(output), _first(reference.outputs[name])
        if type(output) is not type(reference.outputs[name]) or ours_NSH.shape != theirs_NSH.shape:
            raise _differs(name, "something of another shape")
        away, allowed = distance(ours_NSH, theirs_NSH), rounding(theirs_NSH.dtype)
        if not away <= allowed:
            raise _differs(name, f"values that are {away:.1e} away, where {allowed:.1e} is rounding")
        current = f"what follows {name}"

    with _hooked(model, reference.outputs, before, after):
        try:
            model(input_ids=reference.input_ids_NS, use_cache=False)
        except _FAILURES as error:
            raise UnsupportedModel(
                f"{current} does not run once groups are taken out ({error}); nothing can be sliced."
            ) from error


def _recount_(owner: nn.Module, module: Module, kept: int) -> None:
    """Bring what a module remembers of its widths up to date; heads per key-value head stay as they are, if there are many."""
    if module.kind == "ffn":
        known = [name for name in FFN_WIDTHS if hasattr(owner, name)]
        _replace_(owner, known or ["hidden_size"], module.num_groups, kept)
        return
    num_heads, width = module.num_groups * module.num_query_heads, module.num_groups * module.group_size
    _replace_(owner, HEAD_COUNTS, num_heads, kept * module.num_query_heads)
    _replace_(owner, ("num_key_value_groups",) if module.multi_query else KV_HEAD_COUNTS, module.num_groups, kept)
    _replace_(owner, _HEAD_WIDTHS, width, kept * module.group_size)
    config = getattr(owner, "config", None)
    if module.fused:
        _replace_(owner, _FUSED_WIDTHS, width, kept * module.group_size)
    if module.fused and isinstance(config, PreTrainedConfig):  # which may tell queries, keys and values apart
        config = copy.copy(config)
        for field, value in fields_of(config, module, kept).items():
            setattr(config, field, value)
        owner.config = config  # of its own, as layers may differ


def _arguments(owner: nn.Module) -> Iterable[str]:
    return inspect.signature(owner.forward).parameters


def _replace_(owner: nn.Module, names: Sequence[str], before: int, after: int) -> None:
    for name in names:
        if getattr(owner, name, None) == before:
            setattr(owner, name, after)


def _kept_columns(module: Module, cut: Cut) -> Tensor:
    kept = cut.kept_G.tolist()
    assert kept == sorted(set(kept)) and all(0 <= group < module.num_groups for group in kept), "groups of the module, rising"
    columns_K = columns_of(cut.kept_G.cpu(), module.group_size)
    assert cut.weight_OK is None or cut.weight_OK.shape == (module.consumer.shape[0], len(columns_K)), "weights of the columns"
    return columns_K


def _set_weight_(site: Site, weight_OI: Tensor) -> None:
    owner = site.module
    stored = weight_OI.T if site.transposed else weight_OI
    before = getattr(owner, site.parameter)
    setattr(owner, site.parameter, nn.Parameter(stored.clone(memory_format=torch.contiguous_format), before.requires_grad))
    for name, count in zip(("nf", "nx") if site.transposed else ("out_features", "in_features"), weight_OI.shape, strict=True):
        setattr(owner, name, count)


def _set_bias_(site: Site, bias_O: Tensor | None) -> None:
    if bias_O is not None:
        weight_OI = site.weight_OI
        assert bias_O.shape == weight_OI.shape[:1], "a bias of the outputs"
        site.module.bias = nn.Parameter(bias_O.to(weight_OI, copy=True), getattr(site.module, site.parameter).requires_grad)


def _keep_rows_(site: Site, rows_R: Tensor) -> None:
    bias_O = site.module.bias
    weight_OI = site.weight_OI
    rows_R = rows_R.to(weight_OI.device)
    _set_weight_(site, weight_OI[rows_R])
    if isinstance(bias_O, nn.Parameter):
        site.module.bias = nn.Parameter(bias_O.detach()[rows_R].clone(), bias_O.requires_grad)


@contextmanager
def _hooked(model: PreTrainedModel, names: Iterable[str], before: Any, after: Any) -> Iterator[None]:
    """While active ``before(name, args, kwargs)`` runs before each module, ``after(name, output)`` after it."""
    with ExitStack() as handles:
        for name in names:
            owner = model.get_submodule(name)
            pre = owner.register_forward_pre_hook(
                lambda _module, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
            )
            post = owner.register_forward_hook(lambda _module, _args, output, name=name: after(name, output))
            handles.callback(pre.remove)
            handles.callback(post.remove)
        yield


def _hidden(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    found = args[0] if args else next((kwargs[key] for key in HIDDEN if key in kwargs), None)
    if not isinstance(found, Tensor):
        raise UnsupportedModel(
            f"a module is called without a hidden state: looked for a first argument or a keyword of {HIDDEN}."
        )
    return found


def _first(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(found, Tensor)
    return found


def _differs(name: str, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{name} puts out {what} once groups are taken out rather than zeroed: what depends on its widths is not understood, "
        "and the model cannot be sliced."
    )
