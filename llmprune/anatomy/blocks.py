"""Decoder blocks: found by structure, recorded by an identity-stub pass, replayed one at a time.

N sequences of one batch, S sequence, H hidden.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Cache, PreTrainedModel

from llmprune.anatomy.sites import Site, find_sites, never_pruned
from llmprune.anatomy.watch import Watcher, orient
from llmprune.devices import module_device, placed
from llmprune.errors import UnsupportedModel
from llmprune.hidden import HiddenStates

HIDDEN = ("hidden_states", "x", "hidden")
"""Keywords by which blocks and their modules are handed the hidden state, where it is not the first argument."""
_TOWER = re.compile(r"vision|visual|image|audio|speech|encoder\.(?!layer)", re.IGNORECASE)
_MIN_REACH = 0.99


class Weights(Protocol):
    """The weights of blocks that lie on disk, and on ``meta`` but while a block is held.

    Attributes:
        on_load: told the number of every block that comes in.
    """

    on_load: Callable[[int], None] | None

    def placed(self, index: int, device: torch.device) -> AbstractContextManager[torch.device]:
        """Hold a block on ``device``; what was changed in it is gone afterwards."""

    def export(self, index: int) -> dict[str, Tensor]:
        """The tensors of a held block as a checkpoint has them, in CPU memory."""

    def replace(self, index: int, file: Path) -> None:
        """From now on a block is what this file of exported tensors holds."""


@dataclass(frozen=True)
class Stack:
    """The decoder blocks of a model, in the order they are called.

    ``rests[i]`` is what block i returns beside the hidden state: None where it returns a bare tensor, else the other
    members of its tuple, as seen on a short probe. ``repeated`` names the sites used more than once in a forward. ``weights``
    brings the blocks' weights where they lie on disk; None where the model holds them.
    """

    path: str
    blocks: tuple[nn.Module, ...]
    rests: tuple[tuple[Any, ...] | None, ...] = ()
    sites: tuple[tuple[Site, ...], ...] = ()
    repeated: frozenset[str] = frozenset()
    weights: Weights | None = None

    def name(self, index: int) -> str:
        """Path of a block in the model."""
        return f"{self.path}.{index}"

    @contextmanager
    def placed(self, index: int, device: torch.device) -> Iterator[torch.device]:
        """Hold a block where it can run, and give that device: ``device`` for a block that lies in CPU memory or on disk."""
        if self.weights is not None:
            with self.weights.placed(index, device) as where:
                yield where
            return
        home = module_device(self.blocks[index])
        where = device if home.type == "cpu" else home
        with placed(self.blocks[index], where):
            yield where


@dataclass
class Call:
    """How the model called one block: its own args and kwargs, the hidden state left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_key: str | None

    def run(self, block: nn.Module, hidden_NSH: Tensor) -> Tensor:
        """Call the block again with this hidden state; arguments follow it to its device."""
        args, kwargs = tree_map(partial(_to, hidden_NSH.device), (self.args, self.kwargs))
        if self.hidden_key is None:
            output = block(hidden_NSH, *args, **kwargs)
        else:
            output = block(*args, **{**kwargs, self.hidden_key: hidden_NSH})
        return _split(output)[0]


@dataclass
class Recording:
    """Everything needed to replay the stack: per batch the first block's input, and per batch and block the call."""

    hidden: HiddenStates = field(default_factory=HiddenStates)
    calls: list[list[Call]] = field(default_factory=list)

    @property
    def stateful(self) -> bool:
        """Whether blocks are handed a mutable object that earlier blocks fill, such as shared keys and values: then a
        block can be replayed only after all blocks before it.
        """
        plain = (Tensor, str, int, float, torch.dtype, type(None))
        leaves = (leaf for calls in self.calls[:1] for call in calls for leaf in tree_leaves((call.args, call.kwargs)))
        return any(not isinstance(leaf, plain) for leaf in leaves)


def find_stack(model: nn.Module) -> Stack:
    """The ModuleList that holds most of the 2-D and 3-D weights; works on ``meta`` weights.

    Raises:
        UnsupportedModel: encoder-decoder, or no such list.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModel(f"{type(model).__name__} is an encoder-decoder; llmprune prunes decoder-only causal models.")
    weights = {
        name: _num_matrix_weights(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not _TOWER.search(name)
    }
    total = _num_matrix_weights(model)
    path = max(weights, key=lambda name: (weights[name], -name.count(".")), default=None)
    if path is None or not weights[path]:
        raise UnsupportedModel(
            f"{type(model).__name__} has no decoder stack: looked for the torch.nn.ModuleList that holds most of the "
            f"{total:,} matrix weights and found {len(weights)} lists with none in them."
        )
    stacked = model.get_submodule(path)
    assert isinstance(stacked, nn.ModuleList)
    blocks = tuple(stacked)
    seen: set[tuple[int, int | None]] = set()  # blocks may share a parameter; it is a site of the first one
    sites = []
    for index, block in enumerate(blocks):
        found = [
            (site, (id(getattr(site.module, site.parameter)), site.expert)) for site in find_sites(block, f"{path}.{index}")
        ]
        sites.append(tuple(site for site, key in found if key not in seen))
        seen.update(key for _, key in found)
    return Stack(path, blocks, sites=tuple(sites))


@torch.no_grad()
def probe(model: PreTrainedModel, stack: Stack, input_ids_NS: Tensor) -> Stack:
    """Run the model once on a few tokens and complete the stack with what only a forward shows: what each block returns
    beside the hidden state, and which way round raw parameters are stored.

    Raises:
        UnsupportedModel: a block was not called exactly once and in order; something beside the hidden state depends on
            earlier blocks; or weights are used in a way that is not understood.
    """
    order: list[int] = []
    rests: dict[int, tuple[Any, ...] | None] = {}

    def watch(index: int, output: Any) -> None:
        order.append(index)
        rests[index] = _split(output)[1]

    handles = [
        block.register_forward_hook(lambda _module, _args, output, index=index: watch(index, output))
        for index, block in enumerate(stack.blocks)
    ]
    uses: Counter[str] = Counter()
    held = [] if stack.weights else [site for sites in stack.sites for site in sites]
    watcher = Watcher(held, lambda site, _: uses.update([site.name]))
    if stack.weights is not None:
        stack.weights.on_load = lambda index: watcher.watch(stack.sites[index])
    try:
        with watcher, eager_experts(model):
            model(input_ids=input_ids_NS, use_cache=False)
    finally:
        if stack.weights is not None:
            stack.weights.on_load = None
        for handle in handles:
            handle.remove()
    if order != list(range(len(stack.blocks))):
        raise UnsupportedModel(
            f"{type(model).__name__} does not call the {len(stack.blocks)} blocks of {stack.path} once each and in order "
            f"(calls: {order[:12]}); llmprune replays a plain stack of blocks."
        )
    sites = tuple(tuple(orient(list(sites), watcher.orientation)) for sites in stack.sites)
    repeated = frozenset(name for name, count in uses.items() if count > 1)
    done = replace(stack, rests=tuple(rests[i] for i in range(len(stack.blocks))), sites=sites, repeated=repeated)
    _check_reach(model, done)
    _check_independence(model, done, input_ids_NS)
    return done


def _check_reach(model: PreTrainedModel, stack: Stack) -> None:
    """Raise UnsupportedModel where more than 1 % of the blocks' matrix weights are neither sites nor known exceptions."""
    reached = {id(getattr(site.module, site.parameter)) for sites in stack.sites for site in sites}
    missed: dict[str, int] = {}
    total = 0
    for index, block in enumerate(stack.blocks):
        for name, parameter in block.named_parameters():
            owner = block.get_submodule(name.rpartition(".")[0])
            if parameter.dim() < 2 or never_pruned(name, owner, has_experts=True):
                continue
            total += parameter.numel()
            if id(parameter) not in reached:
                missed[f"{stack.name(index)}.{name}"] = parameter.numel()
    if sum(missed.values()) > (1 - _MIN_REACH) * total:
        raise UnsupportedModel(
            f"{type(model).__name__} uses {len(missed)} weights in a way llmprune does not understand, e.g. "
            f"{max(missed, key=lambda name: missed[name])}; looked for matrix products (linear, matmul, bmm, addmm)."
        )


@torch.no_grad()
def _check_independence(model: PreTrainedModel, stack: Stack, input_ids_NS: Tensor) -> None:
    """Raise UnsupportedModel where a block's arguments depend on what earlier blocks put out, other than by the hidden
    state: the recorded ones would be stale in a replay. Seen by recording twice, with blocks that scale by 1 and by 2.
    """
    plain: list[Call] = []
    scaled: list[Call] = []
    rests = {id(value) for rest in stack.rests for value in _tensors(rest or ())}
    for calls, factor in ((plain, 1.0), (scaled, 2.0)):
        try:
            with stubbed(stack, calls, factor=factor):
                model(input_ids=input_ids_NS, use_cache=False)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UnsupportedModel(
                f"{type(model).__name__} does not run with the blocks of {stack.path} replaced by identities ({error}); "
                "llmprune replays stacks in which the hidden state is all that one block hands to the next."
            ) from error
    for index, (one, two) in enumerate(zip(plain, scaled, strict=True)):
        ours, theirs = _tensors((one.args, one.kwargs)), _tensors((two.args, two.kwargs))
        passed_on = any(id(value) in rests for value in ours)
        changed = any(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        if passed_on or changed:
            raise UnsupportedModel(
                f"{type(model).__name__} passes more than the hidden state from block to block (into {stack.name(index)}); "
                "llmprune replays stacks in which the hidden state is all that one block hands to the next."
            )


@torch.no_grad()
def record(model: PreTrainedModel, stack: Stack, batches: Iterable[Tensor], hidden: HiddenStates | None = None) -> Recording:
    """Run the model's own forward over ``batches`` (each input_ids [N, S]) with every block an identity.

    No block is computed. Arguments that are equal in two batches are kept once; a KV cache is never kept. The first block's
    inputs go to ``hidden``, by default on the device they are on.

    Raises:
        UnsupportedModel: the model changes the hidden state between blocks, so block i+1's input is not block i's output.
    """
    recording = Recording(HiddenStates() if hidden is None else hidden)
    for number, input_ids_NS in enumerate(batches):
        calls: list[Call] = []
        inputs: list[Tensor] = []
        with stubbed(stack, calls, inputs):
            model(input_ids=input_ids_NS, use_cache=False)
        for index, later in enumerate(inputs[1:], start=1):
            if later is not inputs[0] and not torch.equal(later, inputs[0]):
                raise UnsupportedModel(
                    f"{type(model).__name__} changes the hidden state between {stack.name(index - 1)} and "
                    f"{stack.name(index)}; llmprune replays stacks in which a block's input is its predecessor's output."
                )
        if number:
            calls = [_share(call, first) for call, first in zip(calls, recording.calls[0], strict=True)]
        recording.hidden.append(inputs[0])
        recording.calls.append(calls)
    return recording


@contextmanager
def stubbed(
    stack: Stack, calls: list[Call] | None = None, inputs: list[Tensor] | None = None, *, factor: float = 1.0
) -> Iterator[None]:
    """While active every block returns its input (times ``factor``); its calls and inputs are appended to the lists."""

    def stub(rest: tuple[Any, ...] | None) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call, hidden = _record_call(args, kwargs)
            if calls is not None:
                calls.append(call)
            if inputs is not None:
                inputs.append(hidden)
            output = hidden if factor == 1 else hidden * factor
            return output if rest is None else (output, *rest)

        return forward

    saved = [block.__dict__.get("forward") for block in stack.blocks]
    try:
        for block, rest in zip(stack.blocks, stack.rests, strict=True):
            block.forward = stub(rest)
        yield
    finally:
        for block, forward in zip(stack.blocks, saved, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


@contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """While active, fused experts run one by one, as plain products that can be watched."""
    before = getattr(model.config, "_experts_implementation", None)
    if before in (None, "eager"):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _record_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Tensor]:
    args = tuple(None if isinstance(value, Cache) else value for value in args)
    kwargs = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
    if args and isinstance(args[0], Tensor):
        return Call(args[1:], kwargs, None), args[0]
    for key in HIDDEN:
        if isinstance(kwargs.get(key), Tensor):
            return Call(args, {name: value for name, value in kwargs.items() if name != key}, key), kwargs[key]
    raise UnsupportedModel(
        f"a block is called without a hidden state: looked for a first positional tensor or a keyword of {HIDDEN}, "
        f"found {[type(value).__name__ for value in args]} and {sorted(kwargs)}."
    )


def _share(call: Call, first: Call) -> Call:
    """``call`` with every tensor that equals its counterpart in ``first`` replaced by it."""
    pool = _tensors((first.args, first.kwargs))

    def pick(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for other in pool:
            if other is value or (other.shape == value.shape and other.dtype == value.dtype and torch.equal(other, value)):
                return other
        return value

    args, kwargs = tree_map(pick, (call.args, call.kwargs))
    return Call(args, kwargs, call.hidden_key)


def _to(device: torch.device, value: Any) -> Any:
    """Tensors move; anything else is passed as it is: some models share a mutable object between blocks."""
    return value.to(device) if isinstance(value, Tensor) else value


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda value: found.append(value) if isinstance(value, Tensor) else None, tree)
    return found


def _split(output: Any) -> tuple[Tensor, tuple[Any, ...] | None]:
    """(hidden state, what comes with it): None for a bare tensor."""
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0], tuple(output[1:])
    raise UnsupportedModel(f"a block returns {type(output).__name__}; expected a tensor or a tuple that starts with one.")


def _num_matrix_weights(module: nn.Module) -> int:
    return sum(
        parameter.numel()
        for child in module.modules()
        if not isinstance(child, nn.Embedding)
        for parameter in child.parameters(recurse=False)
        if parameter.dim() in (2, 3)
    )
