"""A model whose blocks stay on disk: one is read when it is wanted, while the next one is already being read, and let go after.

What is not in a block (embeddings, final norm, head) is loaded for good. Names and layouts of a checkpoint become those of the
model by transformers' own conversions, and back by their reverse.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from llmprune.anatomy.blocks import Stack, find_stack
from llmprune.errors import CorruptCheckpoint, NonFiniteError, UnsupportedModel
from llmprune.io.models import Source, empty_weights, load_config
from llmprune.io.shards import Shards
from llmprune.linalg import all_finite
from llmprune.spec import Pattern, PruneConfig
from llmprune.structured.free import is_free

_CPU = torch.device("cpu")


class StreamedBlocks:
    """The weights of a model's blocks, on ``meta`` but while a block is held; a :class:`llmprune.anatomy.blocks.Weights`.

    Attributes:
        on_load: told the number of every block that comes in.
    """

    def __init__(self, model: PreTrainedModel, stack: Stack, shards: Shards, dtype: torch.dtype) -> None:
        self.on_load: Callable[[int], None] | None = None
        self._model, self._stack, self._name = model, stack, shards.model
        self._settings = LoadStateDictConfig(
            dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=get_model_conversion_mapping(model)
        )
        self._wanted = dict.fromkeys(model.state_dict(), True)
        names: list[list[str]] = [[] for _ in stack.blocks]
        rest: list[str] = []
        for name in shards.headers:
            index = self._block_of(self._target(name))
            (rest if index is None else names[index]).append(name)
        self._sources = [(shards, own) for own in names]
        self._empty = [list(_parameters(block)) for block in stack.blocks]
        self._held: set[int] = set()
        self._sound: set[int] = set()
        self._reader = ThreadPoolExecutor(1, "llmprune-read")
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._fill_rest(shards.read(rest))
        for index, block in enumerate(stack.blocks):
            block.forward = partial(self._run, index, block.forward)

    @contextmanager
    def placed(self, index: int, device: torch.device) -> Iterator[torch.device]:
        """Hold a block on ``device``: its weights are read, and gone afterwards, changed or not.

        Raises:
            CorruptCheckpoint: its tensors are missing, of other shapes, or no longer what they were.
            NonFiniteError: they hold NaN or inf.
        """
        if index in self._held:
            yield device
            return
        block, pinned = self._stack.blocks[index], device.type != "cpu"
        self._fill_block(index, self._take(index, pinned))
        try:
            block.to(device, non_blocking=pinned)
            self._held.add(index)
            if self.on_load:
                self.on_load(index)
            if index + 1 < len(self._sources):
                self._ahead = index + 1, self._reader.submit(self._read, index + 1, pinned)
            yield device
        finally:
            self._held.discard(index)
            for module, key, empty in self._empty[index]:
                module._parameters[key] = empty
            for module in block.modules():
                module._buffers = {key: None if one is None else one.to(_CPU) for key, one in module._buffers.items()}

    def export(self, index: int) -> dict[str, Tensor]:
        """The tensors of a held block as a checkpoint has them, by its names, in CPU memory."""
        own = {
            f"{self._stack.name(index)}.{name}": one.to(_CPU) for name, one in self._stack.blocks[index].state_dict().items()
        }
        return self.reverted(own)

    def reverted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the names of the model as a checkpoint has them."""
        found: dict[str, Tensor] = revert_weight_conversion(self._model, tensors)
        return found

    @property
    def rest(self) -> dict[str, Tensor]:
        """The model's tensors that are in no block, by its own names."""
        return {name: one for name, one in self._model.state_dict().items() if self._block_of(name) is None}

    def replace(self, index: int, file: Path) -> None:
        """From now on a block is what this file holds, which :meth:`export` made."""
        shards = Shards(file.name, [file])
        self._sources[index] = shards, list(shards.headers)

    def _run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block's own forward, with its weights."""
        device = next((leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), _CPU)
        with self.placed(index, device):
            return forward(*args, **kwargs)

    def _read(self, index: int, pinned: bool) -> dict[str, Tensor]:
        shards, names = self._sources[index]
        return shards.read(names, pinned=pinned)

    def _take(self, index: int, pinned: bool) -> dict[str, Tensor]:
        """What was read ahead, if it was this block."""
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[0] == index:
            return ahead[1].result()
        if ahead and not ahead[1].cancel():
            ahead[1].exception()  # it lets go of its memory before more is read
        return self._read(index, pinned)

    def _fill_block(self, index: int, tensors: dict[str, Tensor]) -> None:
        self._fill(tensors, lambda key: self._block_of(key) == index)
        if index in self._sound:
            return
        for key, parameter in self._stack.blocks[index].named_parameters():
            if parameter.is_floating_point() and not all_finite(parameter):
                raise NonFiniteError(
                    f"{self._stack.name(index)}: its weight {key} holds NaN or inf. "
                    "The checkpoint is damaged: download it again."
                )
        self._sound.add(index)

    def _fill_rest(self, tensors: dict[str, Tensor]) -> None:
        tied = set(self._model.all_tied_weights_keys)
        self._fill(tensors, lambda key: self._block_of(key) is None and key not in tied)
        self._model.tie_weights()

    def _fill(self, tensors: dict[str, Tensor], wanted: Callable[[str], bool]) -> None:
        """Put tensors of the checkpoint into the model; those whose names are ``wanted`` have to be among them."""
        with _no_bars():
            info, _ = convert_and_load_state_dict_in_model(self._model, tensors, self._settings)
        if info.mismatched_keys:
            key, stored, called_for = min(info.mismatched_keys, key=str)
            raise CorruptCheckpoint(
                f"{self._name!r} holds {key} of shape {list(stored)} where its config calls for {list(called_for)}. "
                "Download it again."
            )
        self._model._adjust_missing_and_unexpected_keys(info)
        if missing := sorted(filter(wanted, info.missing_keys)):
            raise CorruptCheckpoint(
                f"{self._name!r} lacks {len(missing)} tensors its config calls for, e.g. {missing[0]}; "
                "the model would be partly random."
            )

    def _target(self, name: str) -> str:
        """The first tensor of the model that a tensor of the checkpoint becomes, or is part of."""
        mapping = self._settings.weight_mapping or []
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        prefix = self._model.base_model_prefix
        target = str(rename_source_key(name, renamings, converters, prefix, self._wanted)[0])
        if target not in self._wanted and name in self._wanted:
            return str(rename_source_key(name, [], [], prefix, self._wanted)[0])
        return target

    def _block_of(self, name: str) -> int | None:
        """The number of the block that a tensor of the model is in."""
        inside, found, local = name.partition(f"{self._stack.path}.")
        number = local.partition(".")[0]
        return int(number) if found and not inside and number.isdigit() else None


def not_streamed(config: PruneConfig, out: Path | None) -> str | None:
    """Why a job cannot leave the weights on disk, with the remedy; None where it can."""
    if Pattern.parse(config.pattern).structure:
        return f"for pattern {config.pattern}, which takes the model apart as a whole. Use --offload cpu"
    if config.refine != "none":
        return f"while {config.refine} refines the mask, which runs the whole model. Use --offload cpu, or --refine none"
    if config.calibration == "synthetic":
        return "while the model writes its own calibration text. Use --offload cpu, or another --calibration"
    if out is None:
        return "without a checkpoint to write the pruned ones to. Use --out, or --offload cpu"
    return None


def load_streamed(source: Source, config: PruneConfig) -> tuple[PreTrainedModel, StreamedBlocks]:
    """A model in evaluation mode whose blocks are on ``meta``, and what brings them, in the dtypes that
    :func:`llmprune.io.models.load_model` gives.

    Raises:
        CorruptCheckpoint: tensors are missing, unreadable or of other shapes.
        UnsupportedModel: blocks share weights, or the checkpoint is not made of ordinary tensors.
    """
    shards = Shards(source.name, _files(source))
    transformers_config = load_config(source.path, config)
    if getattr(transformers_config, "quantization_config", None) or is_free(transformers_config):
        raise _not_streamed(source, "its tensors are packed, or of free widths")
    dtype = getattr(torch, config.dtype) if config.dtype != "auto" else transformers_config.dtype or shards.dtype
    with empty_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            transformers_config, dtype=dtype, trust_remote_code=config.trust_remote_code
        )
    model.config.name_or_path = str(source.path)
    model.tie_weights()  # what is shared was taken apart on its way to meta
    stack = find_stack(model)
    owners = Counter(id(parameter) for _, _, parameter in _parameters(model))
    shared = [name for block in stack.blocks for name, one in block.named_parameters() if owners[id(one)] > 1]
    if shared or not shards.readable:
        raise _not_streamed(source, f"blocks share weights ({shared[0]})" if shared else "it does not hold ordinary tensors")
    return model.eval(), StreamedBlocks(model, stack, shards, dtype)


def _not_streamed(source: Source, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"{source.name!r} cannot be streamed from disk: {why}. Use --offload cpu.")


def _files(source: Source) -> list[Path]:
    """The files that make the model: a repository may hold the same weights once more in another format."""
    index = source.path / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [source.path / name for name in sorted(names)]
    single = source.path / "model.safetensors"
    return [single] if single.is_file() else source.weight_files


def _parameters(module: nn.Module) -> Iterable[tuple[nn.Module, str, nn.Parameter]]:
    """Every place a parameter is held at: its owner, its name there, and itself."""
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                yield owner, key, parameter


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws a bar for every block otherwise."""
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()
