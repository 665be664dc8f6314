"""Packed checkpoints in transformers: its public registry of quantizers calls what is here.

Imported while transformers is only half imported, so nothing here imports more of it than quantizers at the top.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmprune.spec import PACKING_METHOD

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmprune_kernels.linear import PackedLinear


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of config.json, as transformers hands it over and writes it back."""

    def __init__(
        self, *, quant_method: str = PACKING_METHOD, format_version: Any = None, modules: Any = None, **_others: Any
    ) -> None:
        self.quant_method = quant_method
        self.format_version = format_version
        self.modules = modules


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps layers for packed ones before the weights are loaded into them, and saves them as they were."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Put empty packed layers where config.json says.

        Raises:
            UnsupportedModel: the checkpoint is of another format version.
            CorruptCheckpoint: config.json names a layer that the model does not have, or of another shape.
        """
        from llmprune.io.packed import guard_of, read_packing
        from llmprune.io.tensor_names import module_paths
        from llmprune.packing import put_empty_

        packing = read_packing(self.quantization_config.to_dict(), model.name_or_path)
        paths = module_paths(model, [f"{path}.weight" for path in packing.modules])
        if packing.modules:
            guard = guard_of(packing.modules)
            names = {guard, f"{paths.get(guard, min(packing.modules))}.weight"}  # in the file, and in the model
            before = set(model._keys_to_ignore_on_load_unexpected or ())
            model._keys_to_ignore_on_load_unexpected = before | set(map(re.escape, names))
        dtype = kwargs.get("dtype") or model.dtype
        for path, tensor in packing.modules.items():
            put_empty_(model, paths.get(f"{path}.weight", path), tensor.format, tensor.shape, tensor.num_values, dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_kwargs: Any) -> PreTrainedModel:
        """Check the metadata and lay the weights out for their device. Raises CorruptCheckpoint."""
        from llmprune.io.packed import kernel_errors
        from llmprune.packing import checked, packed_layers

        for path, layer in packed_layers(model).items():
            with kernel_errors(path, model.name_or_path):
                checked(layer).prepare()
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from llmprune.packing import unpack_

        unpack_(model)
        return model if dtype is None or dtype == model.dtype else model.to(dtype)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Called before the model is saved: brings the entry of config.json up to date with the layers, and adds the guard."""
        from llmprune.io.packed import guard_of
        from llmprune.packing import packed_layers

        model.config.quantization_config = describe_packing(model)
        state = model.state_dict()
        if layers := packed_layers(model):
            guard = guard_of(layers)
            state[guard] = state[guard.removesuffix("weight") + "values"].new_empty(0)
        return state, {}

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """A packed model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights are not trained."""
        return False


def describe_packing(model: PreTrainedModel) -> PackedConfig:
    """The entry of config.json for a model as its layers are now."""
    from llmprune.io.packed import Packing
    from llmprune.io.tensor_names import saved_names
    from llmprune.packing import packed_layers

    layers = packed_layers(model)
    names = saved_names(model, [f"{path}.values" for path in layers])
    modules = {names[f"{path}.values"].removesuffix(".values"): _describe(layer) for path, layer in layers.items()}
    return PackedConfig(**Packing(modules=modules).model_dump(mode="json", exclude_none=True))


def _describe(layer: PackedLinear) -> Any:
    from llmprune.io.packed import PackedTensor
    from llmprune.packing import format_of, is_transposed

    chosen = format_of(layer)
    return PackedTensor.model_validate(
        {
            "format": chosen,
            "shape": (layer.out_features, layer.in_features),
            "dtype": str(layer.dtype).removeprefix("torch."),
            "transposed": is_transposed(layer),
            "num_values": layer.get_parameter("values").numel() if chosen == "bitmask" else None,
        }
    )


def _register() -> None:
    """Once, however often this module is executed."""
    if PACKING_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(PACKING_METHOD)(PackedConfig)
        register_quantizer(PACKING_METHOD)(PackedQuantizer)


_register()
