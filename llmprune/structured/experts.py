"""Experts: whole experts leave the mixtures of a model.

The router's rows of the experts that go are taken out, and its choice of the best among those that stay follows by itself. The
result is compared with the dense model whose router gives those experts no chance. Where every mixture loses as many
(:func:`remove_experts_`), it is one of the stock class.

E experts, K of them chosen for a token; N sequences, S sequence, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack, eager_experts
from llmprune.anatomy.sites import Site
from llmprune.errors import UnsupportedModel
from llmprune.structured.levels import Kind
from llmprune.structured.stock import applied, config_changes, differences, distance, rounding, stock_model

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""Fields of configs that say how many experts a mixture has."""
CHOSEN_COUNTS = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
"""Where modules and configs say how many are chosen for a token."""
GROUP_COUNTS = ("n_group", "num_group", "num_expert_group")
"""Where they say in how many groups, one after the other, the experts are for the choice."""
_EXPERTS = re.compile(r"^experts?$")
_ROUTER = re.compile(r"^(\w*router\w*|gate|gating\w*)$")
_FAILURES = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Mixture:
    """The routed experts of one block; shared ones are no part of it. A :class:`llmprune.structured.budget.Sized`, whose groups
    are the experts.

    Attributes:
        block: index of the block.
        experts: path of the module that holds them, one behind the other along the first axis of its parameters.
        router: path of the module that chooses among them.
        num_experts: E.
        top_k: K.
        route_groups: of equally many experts each, among which a token first chooses; 1 for none.
        entries: paths of all parameters and buffers with one entry an expert, and their axis of them.
        parameters_per_group: of an expert, its rows of the router included.
    """

    block: int
    experts: str
    router: str
    num_experts: int
    top_k: int
    route_groups: int
    entries: tuple[tuple[str, int], ...]
    parameters_per_group: int

    kind: ClassVar[Kind] = "experts"
    group_size: ClassVar[int] = 1
    sites: ClassVar[tuple[Site, ...]] = ()

    @property
    def name(self) -> str:
        """Path of the experts."""
        return self.experts

    @property
    def owner(self) -> str:
        """Path of the module that holds experts and router."""
        return self.experts.rpartition(".")[0]

    @property
    def names(self) -> tuple[str, ...]:
        """By which it can be skipped."""
        return self.experts, self.router, *(path for path, _ in self.entries)

    @property
    def num_groups(self) -> int:
        """E."""
        return self.num_experts

    @property
    def multiple(self) -> int:
        """As many go from every group that a token chooses among."""
        return self.route_groups

    @property
    def max_removed(self) -> int:
        """All but those that a token needs."""
        return self.num_experts - least_experts(self)


def find_experts(model: PreTrainedModel, stack: Stack) -> tuple[Mixture, ...]:
    """The mixtures of a model, in the order of its blocks; works on ``meta`` weights.

    Raises:
        UnsupportedModel: there are none, or one is held or chosen in a way that is not understood; names it.
    """
    found = [mixture for index in range(len(stack.blocks)) for mixture in experts_of(model, stack, index)]
    if not found:
        raise UnsupportedModel(f"{type(model).__name__} has no experts: no block holds a module of that name.")
    return tuple(found)


def experts_of(model: PreTrainedModel, stack: Stack, index: int) -> tuple[Mixture, ...]:
    """The mixture of one block, or none.

    Raises:
        UnsupportedModel: as :func:`find_experts` does.
    """
    names = [name for name, _ in stack.blocks[index].named_modules() if _EXPERTS.match(name.rpartition(".")[2])]
    if len(names) > 1:
        raise _not_understood(f"{stack.name(index)}.{names[1]}", f"the block has {names[0]} too")
    return tuple(_mixture(model, f"{stack.name(index)}.{name}", index) for name in names)


@torch.no_grad()
def remove_experts_(
    model: PreTrainedModel, mixtures: Sequence[Mixture], kept: Sequence[Sequence[int]], input_ids_NS: Tensor
) -> None:
    """Take experts out of every mixture, equally many, and have the config say so. ``mixtures`` no longer describe the model.

    Args:
        model: refused, it is left as it was.
        mixtures: all of them.
        kept: of each mixture, the experts that stay, rising.
        input_ids_NS: the batch to check on.

    Raises:
        UnsupportedModel: fewer stay than are chosen for a token, not equally many in every mixture or group, the config cannot
            say what is left, or the result differs from the dense model that never chooses the others.
    """
    before, after = _check_counts(mixtures, kept)
    text = model.config.get_text_config()
    names = [name for name in EXPERT_COUNTS if getattr(text, name, None) == before]
    if not names:
        raise _not_understood(mixtures[0].experts, f"the config has no field for {before} of them: {', '.join(EXPERT_COUNTS)}")
    fields = dict.fromkeys(names, after)
    stock = stock_model(model, fields)
    with eager_experts(model), ExitStack() as undo:
        with without(model, mixtures, kept):
            reference_NSV = model(input_ids=input_ids_NS, use_cache=False).logits
        for mixture, indices in zip(mixtures, kept, strict=True):
            for path, _ in mixture.entries:
                undo.callback(_put, model, path, _tensor(model, path))
            _slice_entries_(model, mixture, indices)
        changes = differences(model, stock, lambda ours, theirs: (ours, theirs) == (before, after))
        with applied([*changes, *config_changes(model, fields)]):
            _check(model, reference_NSV, input_ids_NS)
        undo.pop_all()


@torch.no_grad()
def slice_experts_(model: PreTrainedModel, mixture: Mixture, indices: Sequence[int]) -> None:
    """Take the other experts out of one mixture, whatever the others keep, and out of what its modules remember of their
    number; the config stays. ``mixture`` no longer describes the model.

    Args:
        indices: experts that stay, rising.
    """
    _check_indices(mixture, indices)
    _slice_entries_(model, mixture, indices)
    for path in {mixture.owner, mixture.router, *(path.rpartition(".")[0] for path, _ in mixture.entries)}:
        module = model.get_submodule(path)
        for name in (*EXPERT_COUNTS, *(("out_features",) if isinstance(module, nn.Linear) else ())):
            if vars(module).get(name) == mixture.num_experts:
                setattr(module, name, len(indices))


@contextmanager
def without(model: PreTrainedModel, mixtures: Sequence[Mixture], kept: Sequence[Sequence[int]]) -> Iterator[None]:
    """While active the routers of a dense model give the experts that are not kept no chance."""
    with ExitStack() as undo:
        for mixture, indices in zip(mixtures, kept, strict=True):
            muted = Muted(mixture, model)
            undo.callback(muted.hold_, ())
            muted.hold_([index for index in range(mixture.num_experts) if index not in set(indices)])
        yield


class Muted:
    """Experts of one mixture that its router gives no chance, by logits and biases of nearly the least number there is; the
    weights of the mixture stay, so others are muted, or none, in no time.

    Args:
        root: what the mixture is in, the model or a part of it.
        name: path of that part in the model.
    """

    def __init__(self, mixture: Mixture, root: nn.Module, name: str = "") -> None:
        self.mixture, self._root, self._name = mixture, root, name
        self._undo = ExitStack()

    def module(self, path: str) -> nn.Module:
        """A module of the mixture by its path in the model."""
        return self._root.get_submodule(path.removeprefix(f"{self._name}."))

    @torch.no_grad()
    def hold_(self, gone: Sequence[int]) -> None:
        """Mute these and no others; with none the mixture is as it was."""
        self._undo.close()
        if not gone:
            return
        masking, router = _Masking(self.mixture.num_experts, list(gone)), self.module(self.mixture.router)
        running = ExitStack()

        def enter(*_: Any) -> None:
            running.enter_context(masking)

        self._undo.callback(router.register_forward_pre_hook(enter).remove)
        self._undo.callback(router.register_forward_hook(lambda *_: running.close(), always_call=True).remove)
        for path, axis in self.mixture.entries:
            if path.endswith("bias") and not path.startswith(f"{self.mixture.experts}."):
                tensor = self._bias(path)
                self._undo.callback(self._restore_, path, tensor.clone())
                tensor.index_fill_(axis, torch.tensor(gone, device=tensor.device), _no_chance(tensor))

    def _bias(self, path: str) -> Tensor:
        owner, _, leaf = path.rpartition(".")
        found = getattr(self.module(owner), leaf)  # anew each time: a block that was moved has other buffers
        assert isinstance(found, Tensor)
        return found.data

    def _restore_(self, path: str, before: Tensor) -> None:
        self._bias(path).copy_(before)


class _Masking(TorchFunctionMode):
    """While active gives the logits of some experts, as a linear map of a router makes them, no chance."""

    def __init__(self, num_experts: int, gone: list[int]) -> None:
        super().__init__()
        self.num_experts, self.gone = num_experts, gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.linear and output.shape[-1] == self.num_experts:
            output = output.index_fill(-1, torch.tensor(self.gone, device=output.device), _no_chance(output))
        return output


def _mixture(model: PreTrainedModel, path: str, index: int) -> Mixture:
    experts = model.get_submodule(path)
    own = dict(experts.named_parameters(recurse=False))
    if not any(parameter.dim() == 3 for parameter in own.values()) or len(own) != len(list(experts.named_parameters())):
        raise _not_understood(path, f"a {type(experts).__name__} that holds them not as matrices one behind the other")
    sizes = {len(parameter) for parameter in own.values()}
    if len(sizes) > 1:
        raise _not_understood(path, f"its parameters count {' and '.join(map(str, sorted(sizes)))} of them")
    num_experts = sizes.pop()
    parent = path.rpartition(".")[0]
    owner = model.get_submodule(parent)
    routers = {name: child for name, child in owner.named_children() if _ROUTER.match(name) and _rows(child, num_experts)}
    if len(routers) != 1:
        raise _not_understood(path, f"beside it {len(routers)} modules look like a router of {num_experts} experts")
    leaf, router = next(iter(routers.items()))
    entries = [(f"{path}.{name}", 0) for name in own]
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        entries += _entry(f"{parent}.{leaf}.{name}", tensor, num_experts)
    for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
        entries += _entry(f"{parent}.{name}", tensor, num_experts) if tensor.dim() == 1 else []
    places = (router, owner, model.config.get_text_config())
    top_k, num_groups = _count(places, CHOSEN_COUNTS), _count(places, GROUP_COUNTS)
    if top_k is None:
        raise _not_understood(path, f"nothing says how many are chosen for a token: {', '.join(CHOSEN_COUNTS)}")
    sizes_of = {f"{parent}.{name}": parameter.numel() for name, parameter in owner.named_parameters()}
    per_expert = sum(sizes_of.get(path, 0) for path, _ in entries) // num_experts
    return Mixture(index, path, f"{parent}.{leaf}", num_experts, top_k, num_groups or 1, tuple(entries), per_expert)


def _rows(module: nn.Module, num_experts: int) -> bool:
    return any(parameter.dim() == 2 and len(parameter) == num_experts for parameter in module.parameters())


def _entry(path: str, tensor: Tensor, num_experts: int) -> list[tuple[str, int]]:
    """The tensor's axis of experts, if it has one."""
    axes = [axis for axis, size in enumerate(tensor.shape) if size == num_experts]
    if not tensor.is_floating_point() or len(axes) > 1:
        raise _not_understood(path, f"a router's tensor of {list(tensor.shape)}, {tensor.dtype}")
    return [(path, axis) for axis in axes]


def _count(places: Sequence[Any], names: Sequence[str]) -> int | None:
    values = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _check_counts(mixtures: Sequence[Mixture], kept: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Experts of a mixture before and after."""
    after = len(kept[0])
    for mixture, indices in zip(mixtures, kept, strict=True):
        one = list(indices)
        if mixture.num_experts != mixtures[0].num_experts or len(one) != after:
            raise UnsupportedModel(
                f"{mixture.experts} would have {len(one)} of {mixture.num_experts} experts and {mixtures[0].experts} {after} "
                f"of {mixtures[0].num_experts}; a config has one number for all blocks. Keep equally many."
            )
        _check_indices(mixture, one)
    return mixtures[0].num_experts, after


def _check_indices(mixture: Mixture, indices: Sequence[int]) -> None:
    """Raise UnsupportedModel where a token would find too few experts, or not equally many in every group."""
    one, groups = list(indices), mixture.route_groups
    assert one == sorted(set(one)) and set(one) <= set(range(mixture.num_experts)), "experts of the mixture, rising"
    if len(one) < least_experts(mixture):
        raise UnsupportedModel(
            f"{mixture.experts} chooses {mixture.top_k} experts for a token, of {groups} groups: {len(one)} are too few. "
            f"At most {mixture.max_removed} of {mixture.num_experts} can go."
        )
    size = mixture.num_experts // groups
    if len({sum(index // size == group for index in one) for group in range(groups)}) > 1:
        raise UnsupportedModel(f"{mixture.experts} is chosen from by groups: keep equally many in each of {groups}.")


def least_experts(mixture: Mixture) -> int:
    """The least number of experts that can stay: as many as are chosen, and where they are grouped a multiple of the groups,
    such that one group has as many, and two, by which groups are compared.
    """
    if mixture.route_groups == 1:
        return mixture.top_k
    return mixture.route_groups * max(2, mixture.top_k)


def _check(model: PreTrainedModel, reference_NSV: Tensor, input_ids_NS: Tensor) -> None:
    """Raise UnsupportedModel where the model's logits are not the reference's."""
    try:
        logits_NSV = model(input_ids=input_ids_NS, use_cache=False).logits
    except _FAILURES as error:
        raise UnsupportedModel(f"{type(model).__name__} does not run without these experts ({error}).") from error
    away, allowed = distance(logits_NSV, reference_NSV), rounding(reference_NSV.dtype)
    if not away <= allowed:
        raise UnsupportedModel(
            f"{type(model).__name__} without these experts puts out logits that are {away:.1e} away from those of a router "
            f"that never chooses them, where {allowed:.1e} is rounding: how it chooses is not understood."
        )


def _tensor(model: nn.Module, path: str) -> Tensor:
    owner, _, leaf = path.rpartition(".")
    tensor = getattr(model.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def _put(model: nn.Module, path: str, tensor: Tensor) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, tensor)


def _slice_entries_(model: nn.Module, mixture: Mixture, indices: Sequence[int]) -> None:
    for path, axis in mixture.entries:
        _put(model, path, _slice(_tensor(model, path), axis, indices))


def _slice(tensor: Tensor, axis: int, indices: Sequence[int]) -> Tensor:
    part = tensor.detach().index_select(axis, torch.tensor(indices, device=tensor.device))
    return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


def _no_chance(tensor: Tensor) -> float:
    """Finite, as some routers divide by their logits; halved, as some add to them."""
    return torch.finfo(tensor.dtype).min / 4


def _not_understood(path: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{path} cannot lose experts: {why}. Experts are taken out of mixtures that hold them as matrices one behind the "
        "other, chosen by one router beside them. Choose another pattern."
    )
