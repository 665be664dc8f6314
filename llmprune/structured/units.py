"""Units: what structured pruning takes out of a decoder block whole, and every row and column that goes with it.

Two kinds of module are understood. Of an attention the unit is a kv group: one key-value head and the query heads that read it,
so that their ratio stays; where all query heads read one key-value head, or keys and values come from a latent, it is a query
head. Of an FFN it is a channel of the inner width. Both end in a matrix whose input columns are the groups, the consumer, fed
by matrices whose rows are, the producers. Of a mixture it is an expert (:mod:`llmprune.structured.experts`).

What else depends on these widths cannot be told from shapes alone. So the search is strict: every matrix of a module must have
its place in it, every other parameter inside must be known to be free of its widths, and a module of which this does not hold
is left whole, with the name of the weight. Nothing outside a module reads its inner widths. That the rest holds, a forward
shows (:func:`llmprune.structured.slicing.check_sliced`).

O out, I in features; G groups, C columns and R rows of a group.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack
from llmprune.anatomy.folds import VALUE, value_head_dim
from llmprune.anatomy.sites import Site
from llmprune.errors import UnsupportedModel
from llmprune.structured.experts import Mixture, experts_of
from llmprune.structured.levels import Kind

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
_MATRICES = ("Linear", "Conv1D", "FalconLinear")
_QUERY = re.compile(r"^(w?q|q_?proj|q_lin|query|q_layer)$")
_KEY = re.compile(r"^(w?k|k_?proj|k_lin|key|k_layer)$")
_FUSED = re.compile(r"^(qkv_?proj|Wqkv|c_attn|query_key_value)$")
_BY_HEAD = re.compile(r"^query_key_value$")  # the rows of a kv group lie together; of others all queries come first
_ATTENTION_GATE = re.compile(r"^(gate_?proj|g_?proj)$")  # a factor of what heads put out: one a head, or one a channel
_LATENT = re.compile(r"^(q_a_proj|kv_a_proj_with_mqa)$")
_FROM_LATENT = re.compile(r"^kv_b_proj$")
_LATENT_QUERY = re.compile(r"^q_(b_)?proj$")
_ATTENTION_OUT = re.compile(r"^(o_?proj|out_?proj|dense|[wW]o|o_lin|out_lin|c_proj)$")
_UP = re.compile(r"^(gate_?proj|up_?proj|proj_up(_gate)?|fc1|fc_in|c_fc|w1|w3|dense_h_to_4h)$")
_GATE_UP = re.compile(r"^(gate_?up_?proj|Wi|input_linear)$")
_DOWN = re.compile(r"^(down_?proj|proj_down|fc2|fc_out|c_proj|w2|Wo|dense_4h_to_h|output_linear)$")
_HEAD_NORM = re.compile(r"^(q|k|query|key)_?(layer)?_?norm\.(weight|bias)$")
_LATENT_NORM = re.compile(r"^(q|kv)_a_(layer)?norm\.(weight|bias)$")
_PER_HEAD = ("sinks",)
_CROSS = re.compile(r"encoder_attn|cross_?att")
_HEADWISE_ARGUMENTS = ("alibi", "position_bias")


@dataclass(frozen=True)
class Producer:
    """A matrix that feeds a consumer; ``rows_GR`` are the rows of each group, int64. Rows in no group always stay."""

    site: Site
    rows_GR: Tensor


@dataclass(frozen=True)
class Module:
    """An attention or an FFN of one block.

    Attributes:
        name: path of the module in the model.
        kind: ``attention``, whose groups are kv groups or query heads, or ``ffn``, whose groups are channels.
        block: index of its block.
        consumer: the matrix whose input columns are the groups, C consecutive columns each.
        group_size: C.
        num_groups: groups before any went.
        producers: those that feed it.
        num_query_heads: of a group; 0 for an FFN.
        head_dim: of queries and keys; 0 for an FFN, and where keys come from a latent.
        multi_query: there is one key-value head, which stays; each group is a query head.
        fused: queries, keys and values are one matrix.
        inline: the matrices lie in the block itself, which ``name`` then is.
        per_head: parameters of the module that hold a number a query head, such as attention sinks.
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
    multi_query: bool = False
    fused: bool = False
    inline: bool = False
    per_head: tuple[str, ...] = ()

    @property
    def parameters_per_group(self) -> int:
        """What goes with one group, biases of its rows included."""
        rows = sum(part.rows_GR.shape[1] * (part.site.shape[1] + _has_bias(part.site)) for part in self.producers)
        return rows + self.group_size * self.consumer.shape[0] + self.num_query_heads * len(self.per_head)

    @property
    def names(self) -> tuple[str, ...]:
        """By which it can be skipped."""
        return self.name, self.consumer.name, *(part.site.name for part in self.producers)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Matrices that a level has weights of its own for: the consumer."""
        return (self.consumer,)

    @property
    def multiple(self) -> int:
        """1: its groups do not depend on each other."""
        return 1

    @property
    def max_removed(self) -> int:
        """All of them."""
        return self.num_groups


Part = Module | Mixture
"""What groups go from."""


@dataclass(frozen=True)
class Units:
    """The modules and mixtures of a model that can be pruned, in the order of the blocks, and why others are left whole, by
    name.
    """

    modules: tuple[Module, ...]
    left: dict[str, str] = field(default_factory=dict)
    mixtures: tuple[Mixture, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of them, block by block, mixtures last."""
        return tuple(sorted((*self.modules, *self.mixtures), key=lambda part: (part.block, part.kind == "experts")))


class _NotUnderstood(Exception):
    """A module has to stay whole; the message says why."""


def find_units(model: PreTrainedModel, stack: Stack, *, experts: bool = False) -> Units:
    """All attention modules and FFNs of the blocks that are understood; works on ``meta`` weights.

    The others are left whole: state space and convolution mixers, and what has a weight that is coupled in a way that is not
    known. So are mixtures of experts, but with ``experts`` those that can lose some.

    Raises:
        UnsupportedModel: nothing is understood; names a weight.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    modules: list[Module] = []
    mixtures: list[Mixture] = []
    left: dict[str, str] = {}
    for index, block in enumerate(stack.blocks):
        for name, sites in _by_owner(stack.sites[index], stack.name(index)).items():
            owner = block.get_submodule(name.removeprefix(stack.name(index)).removeprefix("."))
            try:
                modules.append(_module(model, name, index, owner, sites, inline=owner is block, uses=uses))
            except _NotUnderstood as reason:
                left[name] = str(reason)
        if experts:
            try:
                mixtures += _mixtures(model, stack, index, left, uses)
            except UnsupportedModel as reason:
                left[stack.name(index)] = str(reason)
    if not modules and not mixtures:
        name, why = next(iter(left.items()))
        raise UnsupportedModel(
            f"structured pruning understands no module of {type(model).__name__}; e.g. {name}: {why}. It takes heads out of "
            "attention of q, k, v and o projections, and channels out of FFNs of up, gate and down projections. Choose another "
            "pattern."
        )
    return Units(tuple(modules), left, tuple(mixtures))


def select_units(units: Units, skip: Sequence[str]) -> Units:
    """Those units of which no glob matches the module's name or that of one of its matrices; the others are left whole."""
    left = dict(units.left)

    def stays(part: Part) -> bool:
        glob = next((glob for glob in skip if any(fnmatchcase(name, glob) for name in part.names)), None)
        if glob is not None:
            left[part.name] = f"it is skipped by {glob}"
        return glob is None

    modules, mixtures = tuple(filter(stays, units.modules)), tuple(filter(stays, units.mixtures))
    return Units(modules, left, mixtures)


def keep_experts(units: Units, why: str) -> Units:
    """The units without the mixtures, which are left whole for this reason."""
    return Units(units.modules, units.left | {mixture.name: why for mixture in units.mixtures})


def _mixtures(
    model: PreTrainedModel, stack: Stack, index: int, left: dict[str, str], uses: Counter[int]
) -> tuple[Mixture, ...]:
    """The mixture of a block, or none; of what is ``left`` around it only what stands beside its experts still is."""
    found = experts_of(model, stack, index)
    for mixture in found:
        own = dict(model.get_submodule(mixture.owner).named_parameters(prefix=mixture.owner))
        shared = next((path for path, _ in mixture.entries if path in own and uses[id(own[path])] > 1), None)
        if shared:
            raise UnsupportedModel(f"{shared} is shared with another module")
        others = [site.name for site in stack.sites[index] if site.expert is None and site.name.startswith(f"{mixture.owner}.")]
        if mixture.experts in left:
            del left[mixture.experts]
        elif mixture.owner in left:
            del left[mixture.owner]
            if others:
                left[mixture.owner] = f"its experts can go, what stands beside them stays ({', '.join(others)})"
    return found


def _by_owner(sites: Sequence[Site], block: str) -> dict[str, list[Site]]:
    """The matrices by the module that holds them. Those of a mixture of experts, shared ones too, are one module's."""
    mixtures = set()
    for site in sites:
        if site.expert is not None:
            path = site.name.rpartition(".")[0].removesuffix(f".{site.parameter}")
            parent = path.rpartition(".")[0]
            mixtures.add(path if parent == block else parent)
    owners: dict[str, list[Site]] = {}
    for site in sites:
        mixture = next((path for path in mixtures if site.name.startswith(f"{path}.")), None)
        owners.setdefault(mixture or site.name.rpartition(".")[0], []).append(site)
    return owners


def _module(
    model: PreTrainedModel, name: str, index: int, owner: nn.Module, sites: Sequence[Site], *, inline: bool, uses: Counter[int]
) -> Module:
    for site in sites:
        if type(site.module).__name__ not in _MATRICES or site.parameter != "weight":
            raise _NotUnderstood(f"{site.name} is held by a {type(site.module).__name__}, not by a torch.nn.Linear")
        if uses[id(getattr(site.module, site.parameter))] > 1:
            raise _NotUnderstood(f"{site.name} is shared with another module")
    module = None if inline else _attention(model, name, index, owner, sites) or _latent_attention(name, index, owner, sites)
    module = module or _ffn(name, index, owner, sites, inline=inline)
    if module is None:
        roles = (_QUERY, _KEY, VALUE, _FUSED, _ATTENTION_OUT, _UP, _GATE_UP, _DOWN)
        stranger = next((site for site in sites if not any(role.match(_leaf(site)) for role in roles)), sites[0])
        siblings = ", ".join(_leaf(other) for other in sites if other is not stranger) or "no other matrix"
        raise _NotUnderstood(f"what {stranger.name} is coupled to is not understood (beside it: {siblings})")
    _check_owner(owner, module)
    if module.kind == "attention":
        _check_attention(model, owner, module)
    return module


def _attention(model: PreTrainedModel, name: str, index: int, owner: nn.Module, sites: Sequence[Site]) -> Module | None:
    """The module, if these are its projections and no others."""
    query, key, value = (_only(sites, role) for role in (_QUERY, _KEY, VALUE))
    fused, gate, out = (_only(sites, role) for role in (_FUSED, _ATTENTION_GATE, _ATTENTION_OUT))
    found = [site for site in (fused, query, key, value, gate, out) if site is not None]
    if out is None or len(found) != len(sites) or len(found) - (gate is not None) not in ((2,) if fused else (4,)):
        return None
    head_dim = _query_head_dim(model, owner)
    value_dim = value_head_dim(owner) or head_dim
    num_heads, rest = divmod(out.shape[1], value_dim)
    if rest:
        raise _NotUnderstood(f"the {out.shape[1]} inputs of {out.name} are not heads of {value_dim}")
    if fused:
        num_groups, rest = divmod(fused.shape[0] - num_heads * head_dim, head_dim + value_dim)
        sizes = [num_heads * head_dim, num_groups * head_dim, num_groups * value_dim]
    else:
        assert query is not None and key is not None and value is not None
        num_groups, rest = divmod(value.shape[0], value_dim)
        sizes = [query.shape[0], key.shape[0], value.shape[0]]
    # A head's queries and its gate may lie one below the other.
    wanted = [[factor * num_heads * head_dim, num_groups * head_dim, num_groups * value_dim] for factor in (1, 2)]
    if rest or num_groups <= 0 or sizes not in wanted or num_heads % num_groups:
        rows_of = (fused or query or out).name
        raise _NotUnderstood(
            f"{sizes} rows ({rows_of}) are not {num_heads} query heads of {head_dim} and their keys and values"
        )
    if gate is not None and gate.shape[0] not in (num_heads, num_heads * value_dim):
        raise _NotUnderstood(f"the {gate.shape[0]} rows of {gate.name} are not those of {num_heads} heads")
    for names, count in ((HEAD_COUNTS, num_heads), (KV_HEAD_COUNTS, num_groups)):
        if any(getattr(owner, attribute, count) != count for attribute in names):
            raise _NotUnderstood(f"{name} counts other heads than the {num_heads} and {num_groups} of its shapes")
    if num_heads == 1:
        raise _NotUnderstood("it has one head, which cannot be removed")
    multi_query = num_groups == 1
    units = num_heads if multi_query else num_groups
    producers = []
    if fused:
        producers.append(Producer(fused, _fused_rows(fused, owner, sizes, num_groups, units)))
    else:
        parts = (query, gate) if multi_query else (query, key, value, gate)
        producers = [Producer(site, _even_rows(site.shape[0], units)) for site in parts if site is not None]
    if fused and gate is not None:
        producers.append(Producer(gate, _even_rows(gate.shape[0], units)))
    ratio = num_heads // units
    return Module(
        name, "attention", index, out, ratio * value_dim, units, tuple(producers), ratio, head_dim, multi_query=multi_query,
        fused=fused is not None, per_head=_per_head(owner, num_heads),
    )  # fmt: skip


def _fused_rows(fused: Site, owner: nn.Module, sizes: Sequence[int], num_groups: int, units: int) -> Tensor:
    if num_groups == 1:
        return _even_rows(sizes[0], units)
    if _BY_HEAD.match(_leaf(fused)) or getattr(owner, "multi_query", None) is False:
        return _even_rows(fused.shape[0], units)
    starts = (0, sizes[0], sizes[0] + sizes[1])
    return torch.cat([_even_rows(size, units) + start for size, start in zip(sizes, starts, strict=True)], dim=1)


def _latent_attention(name: str, index: int, owner: nn.Module, sites: Sequence[Site]) -> Module | None:
    """The module, if its heads' keys and values, and perhaps queries, come from latents that all of them share."""
    query, spread, out = (_only(sites, role) for role in (_LATENT_QUERY, _FROM_LATENT, _ATTENTION_OUT))
    num_latents = sum(bool(_LATENT.match(_leaf(site))) for site in sites)
    value_dim, num_heads = value_head_dim(owner), getattr(owner, "num_heads", 0)
    if query is None or spread is None or out is None or len(sites) != 3 + num_latents or not value_dim:
        return None
    if num_heads <= 1 or out.shape[1] != num_heads * value_dim or query.shape[0] % num_heads or spread.shape[0] % num_heads:
        raise _NotUnderstood(f"the {out.shape[1]} inputs of {out.name} are not {num_heads} heads of {value_dim}")
    producers = tuple(Producer(site, _even_rows(site.shape[0], num_heads)) for site in (query, spread))
    return Module(name, "attention", index, out, value_dim, num_heads, producers, 1, per_head=_per_head(owner, num_heads))


def _ffn(name: str, index: int, owner: nn.Module, sites: Sequence[Site], *, inline: bool) -> Module | None:
    """The module, if these are a down projection and what feeds it and no others."""
    down = _only(sites, _DOWN)
    if down is None or len(sites) < 2:
        return None
    if getattr(owner, "activation_sparsity", 0):
        raise _NotUnderstood(f"which channels feed {down.name} depends on all of them (activation sparsity)")
    width, producers = down.shape[1], []
    for site in sites:
        if site is down:
            continue
        leaf, num_rows = _leaf(site), site.shape[0]
        if _UP.match(leaf) and num_rows == width:
            producers.append(Producer(site, _even_rows(width, width)))
        elif _GATE_UP.match(leaf) and num_rows == 2 * width:
            producers.append(Producer(site, torch.arange(2 * width).view(2, width).T))
        else:
            return None
    return Module(name, "ffn", index, down, 1, width, tuple(producers), inline=inline)


def _check_owner(owner: nn.Module, module: Module) -> None:
    """Raise where the module holds anything beside its projections that may depend on its widths."""
    known = {id(site.module) for site in (module.consumer, *(part.site for part in module.producers))}
    for name, parameter in owner.named_parameters(recurse=not module.inline):
        parent = owner.get_submodule(name.rpartition(".")[0])
        if id(parent) in known or name in module.per_head or (parameter.numel() == 1 and module.head_dim != 1):
            continue
        if module.kind == "attention":
            if _HEAD_NORM.match(name) and parameter.numel() == module.head_dim:
                continue
            if module.multi_query and (_KEY.match(leaf := name.rpartition(".")[0]) or VALUE.match(leaf)):
                continue
            if not module.head_dim and (_LATENT_NORM.match(name) or _LATENT.match(name.rpartition(".")[0])):
                continue
        raise _NotUnderstood(f"what {module.name}.{name} of shape {list(parameter.shape)} depends on is not understood")
    for name, buffer in owner.named_buffers(recurse=not module.inline):
        positions = name == "embed_positions" and not module.fused
        causal = name == "bias" and buffer.dim() == 4 and buffer.shape[:2] == (1, 1)
        if buffer.numel() > 1 and not (positions or causal or name.rpartition(".")[0].endswith(("rotary_emb", "rotary_fn"))):
            raise _NotUnderstood(f"what {module.name}.{name} of shape {list(buffer.shape)} depends on is not understood")


def _check_attention(model: PreTrainedModel, owner: nn.Module, module: Module) -> None:
    """Raise where heads are told apart outside of the module, or it reads an encoder."""
    config = model.config.get_text_config()
    if _CROSS.search(module.name):
        raise _NotUnderstood("it attends to an encoder")
    if getattr(config, "num_kv_shared_layers", 0):
        raise _NotUnderstood("layers read keys and values of other layers")
    arguments = inspect.signature(owner.forward).parameters
    if "cycle_offset" in arguments:
        raise _NotUnderstood("it is run more than once a token, with a cache each time")
    argument = next((name for name in _HEADWISE_ARGUMENTS if name in arguments), None)
    if argument is not None and getattr(config, "alibi", True):
        raise _NotUnderstood(f"it is handed {argument}, of which every head has its own, from outside")


def _query_head_dim(model: PreTrainedModel, owner: nn.Module) -> int:
    """Size of a query head: what the module says, else the config, else hidden size by heads."""
    size = getattr(owner, "head_dim", None) or getattr(owner, "head_size", None) or value_head_dim(owner)
    if not isinstance(size, int) or not size:
        config = model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size)


def _per_head(owner: nn.Module, num_heads: int) -> tuple[str, ...]:
    own = dict(owner.named_parameters(recurse=False))
    return tuple(name for name in _PER_HEAD if name in own and own[name].shape == (num_heads,))


def _even_rows(num_rows: int, num_groups: int) -> Tensor:
    """Rows of groups that lie one below the other."""
    return torch.arange(num_rows).view(num_groups, -1)


def _only(sites: Sequence[Site], role: re.Pattern[str]) -> Site | None:
    found = [site for site in sites if role.match(_leaf(site))]
    return found[0] if len(found) == 1 else None


def _has_bias(site: Site) -> bool:
    return getattr(site.module, "bias", None) is not None


def _leaf(site: Site) -> str:
    return site.name.rpartition(".")[2]
