"""The names tensors have in a model's files, which are not always those in the model: transformers renames while loading."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)


def module_paths(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """For tensors named ``<...>.weight`` in a file: the path of the module that each is the weight of.

    Left out is what becomes part of another tensor while it is loaded. Works on ``meta`` weights.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    paths = {}
    for name in names:
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, converted = name, None
        if renamed in known and converted is None and name.endswith(".weight"):
            paths[name] = renamed.removesuffix(".weight")
    return paths


def saved_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """For tensors of the model: the names save_pretrained gives them."""
    found = {}
    for name in names:
        (found[name],) = revert_weight_conversion(model, {name: torch.empty(0)})
    return found
