"""Units: what structured pruning takes out of a decoder block whole, and every row and column that goes with it.

Two kinds of module are understood. Of an attention with plain projections the unit is a kv group: one key-value head and the
query heads that read it, so that their ratio stays; of an FFN it is a channel of the inner width. Both end in a matrix whose
input columns are the groups, the consumer, fed by matrices whose rows are, the producers.

What else depends on these widths cannot be told from shapes alone. So the search is strict: every matrix of a block must have
its place in a module, every other parameter inside a module must be known to be free of its widths, and what is not is refused
by name. That the rest holds, a forward shows (:func:`llmprune.structured.slicing.check_sliced`).

O out, I in features; G groups, C columns and R rows of a group.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack
from llmprune.anatomy.folds import VALUE, value_head_dim
from llmprune.anatomy.sites import Site
from llmprune.errors import UnsupportedModel
from llmprune.structured.levels import Kind

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_QUERY = re.compile(r"^(w?q|q_?proj|q_lin|query|q_layer)$")
_KEY = re.compile(r"^(w?k|k_?proj|k_lin|key|k_layer)$")
_FUSED = re.compile(r"^qkv_?proj$")  # queries, keys, values one below the other; other names hold them head by head
_ATTENTION_OUT = re.compile(r"^(o_?proj|out_?proj|dense|wo|o_lin|out_lin)$")
_UP = re.compile(r"^(gate_?proj|up_?proj|fc1|fc_in|c_fc|w1|w3|dense_h_to_4h)$")
_GATE_UP = re.compile(r"^gate_?up_?proj$")
_DOWN = re.compile(r"^(down_?proj|fc2|fc_out|c_proj|w2|dense_4h_to_h)$")
_HEAD_NORM = re.compile(r"^(q|k|query|key)_?(layer)?_?norm\.(weight|bias)$")


@dataclass(frozen=True)
class Producer:
    """A matrix that feeds a consumer; ``rows_GR`` are the rows of each group, int64, and all rows are in some group."""

    site: Site
    rows_GR: Tensor


@dataclass(frozen=True)
class Module:
    """An attention or an FFN of one block.

    Attributes:
        name: path of the module in the model.
        kind: ``attention``, whose groups are kv groups, or ``ffn``, whose groups are channels.
        block: index of its block.
        consumer: the matrix whose input columns are the groups, C consecutive columns each.
        group_size: C.
        num_groups: kv groups, or channels, before any went.
        producers: those that feed it.
        num_query_heads: of a kv group; 0 for an FFN.
        head_dim: of queries and keys; 0 for an FFN.
    """

    name: str
    kind: Kind
    block: int
    consumer: Site
    group_size: int
    num_groups: int
    producers: tuple[Producer, ...]
    num_query_heads: int = 0
    head_dim: int = 0

    @property
    def fused(self) -> bool:
        """Whether queries, keys and values are one matrix."""
        return self.kind == "attention" and len(self.producers) == 1

    @property
    def parameters_per_group(self) -> int:
        """What goes with one group, biases of its rows included."""
        rows = sum(part.rows_GR.shape[1] * (part.site.shape[1] + _has_bias(part.site)) for part in self.producers)
        return rows + self.group_size * self.consumer.shape[0]


@dataclass(frozen=True)
class Units:
    """The modules of a model that can be pruned, in the order of the blocks, and why those left whole are, by name."""

    modules: tuple[Module, ...]
    left: dict[str, str] = field(default_factory=dict)


def find_units(model: PreTrainedModel, stack: Stack) -> Units:
    """All attention modules and FFNs of the blocks; works on ``meta`` weights.

    An attention of a single kv group cannot lose it and is left whole.

    Raises:
        UnsupportedModel: a weight of a block is coupled in a way that is not understood; names it.
    """
    _check_unshared(model, stack)
    modules, left = [], {}
    for index, block in enumerate(stack.blocks):
        by_owner: dict[str, list[Site]] = {}
        for site in stack.sites[index]:
            if type(site.module) is not nn.Linear or site.parameter != "weight":
                raise _not_understood(site.name, f"it is held by a {type(site.module).__name__}, not by a torch.nn.Linear")
            by_owner.setdefault(site.name.rpartition(".")[0], []).append(site)
        for name, sites in by_owner.items():
            owner = block.get_submodule(name.removeprefix(stack.name(index)).removeprefix("."))
            if owner is block:
                raise _not_understood(sites[0].name, "it lies in the block itself, not in a module of an attention or an FFN")
            module = _attention(model, name, index, owner, sites) or _ffn(name, index, sites)
            if module is None:
                raise _stranger(sites)
            _check_owner(owner, module)
            if module.kind == "attention" and module.num_groups == 1:
                left[name] = "it has one key-value head, which cannot be removed"
            else:
                modules.append(module)
    return Units(tuple(modules), left)


def _attention(model: PreTrainedModel, name: str, index: int, owner: nn.Module, sites: Sequence[Site]) -> Module | None:
    """The module, if these are its projections and no others."""
    parts = [_only(sites, role) for role in (_QUERY, _KEY, VALUE)]
    fused, out = _only(sites, _FUSED), _only(sites, _ATTENTION_OUT)
    if out is None or len(sites) != (2 if fused else 4) or not (fused or all(parts)):
        return None
    head_dim = _query_head_dim(model, owner)
    value_dim = value_head_dim(owner) or head_dim
    if out.shape[1] % value_dim:
        raise _not_understood(out.name, f"its {out.shape[1]} inputs are not heads of {value_dim}")
    num_heads = out.shape[1] // value_dim
    if fused:
        spare = fused.shape[0] - num_heads * head_dim
        num_groups, rest = divmod(spare, head_dim + value_dim)
        sizes = [num_heads * head_dim, num_groups * head_dim, num_groups * value_dim]
        culprit = fused
    else:
        query, key, value = (site for site in parts if site is not None)
        num_groups, rest = divmod(value.shape[0], value_dim)
        sizes = [query.shape[0], key.shape[0], value.shape[0]]
        culprit = query if query.shape[0] != num_heads * head_dim else key
    if rest or num_groups <= 0 or sizes != [num_heads * head_dim, num_groups * head_dim, num_groups * value_dim]:
        raise _not_understood(
            culprit.name, f"{sizes} rows are not {num_heads} query heads of {head_dim} and their keys and values"
        )
    if num_heads % num_groups:
        raise _not_understood(culprit.name, f"{num_heads} query heads do not share {num_groups} key-value heads evenly")
    for names, count in ((HEAD_COUNTS, num_heads), (KV_HEAD_COUNTS, num_groups)):
        if any(getattr(owner, attribute, count) != count for attribute in names):
            raise _not_understood(
                culprit.name, f"its module counts other heads than the {num_heads} and {num_groups} of its shapes"
            )
    producers: tuple[Producer, ...]
    rows = [torch.arange(size).view(num_groups, -1) for size in sizes]
    if fused:
        starts = (0, sizes[0], sizes[0] + sizes[1])
        producers = (Producer(fused, torch.cat([part + start for part, start in zip(rows, starts, strict=True)], dim=1)),)
    else:
        producers = tuple(Producer(site, part) for site, part in zip(parts, rows, strict=True) if site is not None)
    ratio = num_heads // num_groups
    return Module(name, "attention", index, out, ratio * value_dim, num_groups, producers, ratio, head_dim)


def _ffn(name: str, index: int, sites: Sequence[Site]) -> Module | None:
    """The module, if these are a down projection and what feeds it and no others."""
    down = _only(sites, _DOWN)
    if down is None or len(sites) < 2:
        return None
    width, producers = down.shape[1], []
    for site in sites:
        if site is down:
            continue
        leaf, num_rows = _leaf(site), site.shape[0]
        if _UP.match(leaf) and num_rows == width:
            producers.append(Producer(site, torch.arange(width)[:, None]))
        elif _GATE_UP.match(leaf) and num_rows == 2 * width:
            producers.append(Producer(site, torch.arange(2 * width).view(2, width).T))
        else:
            return None
    return Module(name, "ffn", index, down, 1, width, tuple(producers))


def _check_owner(owner: nn.Module, module: Module) -> None:
    """Raise UnsupportedModel where the module holds anything beside its projections that may depend on its widths."""
    known = {id(site.module) for site in (module.consumer, *(part.site for part in module.producers))}
    for name, parameter in owner.named_parameters():
        if id(owner.get_submodule(name.rpartition(".")[0])) in known or (parameter.numel() == 1 and module.head_dim != 1):
            continue
        if not (module.kind == "attention" and _HEAD_NORM.match(name) and parameter.numel() == module.head_dim):
            raise _not_understood(f"{module.name}.{name}", f"its shape is {list(parameter.shape)}")
    for name, buffer in owner.named_buffers():
        if buffer.numel() > 1 and not name.rpartition(".")[0].endswith(("rotary_emb", "rotary_fn")):
            raise _not_understood(f"{module.name}.{name}", f"its shape is {list(buffer.shape)}")


def _check_unshared(model: PreTrainedModel, stack: Stack) -> None:
    """Raise UnsupportedModel where a block's weight, or its keys and values, serve elsewhere too."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for site in (site for sites in stack.sites for site in sites):
        if uses[id(getattr(site.module, site.parameter))] > 1:
            raise _not_understood(site.name, "it is shared with another module")
        if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
            raise _not_understood(site.name, "layers read keys and values of other layers")


def _query_head_dim(model: PreTrainedModel, owner: nn.Module) -> int:
    """Size of a query head: what the module says, else the config, else hidden size by heads."""
    size = getattr(owner, "head_dim", None) or value_head_dim(owner)
    if not isinstance(size, int) or not size:
        config = model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size)


def _only(sites: Sequence[Site], role: re.Pattern[str]) -> Site | None:
    found = [site for site in sites if role.match(_leaf(site))]
    return found[0] if len(found) == 1 else None


def _stranger(sites: Sequence[Site]) -> UnsupportedModel:
    roles = (_QUERY, _KEY, VALUE, _FUSED, _ATTENTION_OUT, _UP, _GATE_UP, _DOWN)
    site = next((site for site in sites if not any(role.match(_leaf(site)) for role in roles)), sites[0])
    siblings = ", ".join(_leaf(other) for other in sites if other is not site) or "no other matrix"
    return _not_understood(site.name, f"beside it: {siblings}")


def _not_understood(weight: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"structured pruning does not understand what {weight} is coupled to ({why}); it takes kv groups out of attention of "
        "q, k, v and o projections, and channels out of FFNs of up, gate and down projections. Choose another pattern."
    )


def _has_bias(site: Site) -> bool:
    return getattr(site.module, "bias", None) is not None


def _leaf(site: Site) -> str:
    return site.name.rpartition(".")[2]
