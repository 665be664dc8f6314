"""Low-rank updates that fill no zeros: W + (W != 0) * s * B A, masked in the forward, so that merging loses nothing.

The adapters (Hu et al. 2021, arXiv 2106.09685), their injection and their merging are peft's, which is imported when they are
wanted; what is ours is the mask, and that the weight of the forward is bit for bit the one that merging stores. They sit on
parameters, not on modules, so that Linear, transposed and stacked expert weights are all one case.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from llmprune.anatomy.sites import Site
from llmprune.errors import ConfigError, UnsupportedModel

SCALE = 2
"""s: the alpha of LoRA over its rank."""


def require_peft() -> None:
    """Raise ConfigError where peft is not installed."""
    if find_spec("peft") is None:
        raise ConfigError("--mode lora needs peft: pip install 'llmprune[recover]', or choose --mode full.")


def add_adapters_(model: PreTrainedModel, sites: Sequence[Site], *, rank: int, seed: int) -> tuple[Any, list[str]]:
    """Put a low-rank update, in fp32 and zero so far, on the parameters that hold these sites; all else is frozen.

    Returns peft's tuner, whose ``merge_and_unload()`` makes the model a plain one again, and the names of the parameters that
    are left as they are: those which several places of the model share.

    Raises:
        UnsupportedModel: no parameter is left to train.
    """
    from peft import LoraConfig

    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    owners = {names[id(getattr(site.module, site.parameter))][0]: site for site in sites}
    shared = [name for name, site in owners.items() if len(names[id(getattr(site.module, site.parameter))]) > 1]
    targets = {name: site for name, site in owners.items() if name not in shared}
    if not targets:
        raise UnsupportedModel("nothing to train: the blocks have no matrix of their own. Use --mode full.")
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=[], target_parameters=list(targets))
    tuner_class, wrapper_class = _masked_classes()
    config._register_custom_module({type(site.module): wrapper_class for site in targets.values()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner = tuner_class(model, config, "default")
    for parameter in tuner.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return tuner, shared


@cache
def _masked_classes() -> tuple[type[nn.Module], type[nn.Module]]:
    """The tuner and the wrapper of a parameter; made when they are wanted, as peft may not be installed."""
    from peft.tuners import lora

    class MaskedLora(lora.LoraModel):  # type: ignore[misc]
        """peft's, but for one refusal."""

        def _check_target_module_compatiblity(self, *args: Any) -> None:
            """peft refuses what is read from outside of its module, as Mamba does; here that is the tuned weight too."""

    class ParamWrapper(lora.ParamWrapper):  # type: ignore[misc]
        """A parameter with an update of its nonzero weights. By the name of the class peft knows that they may be nested."""

        def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
            """The update in the parameter's shape and dtype, zero where the parameter is."""
            weight: Tensor = self.get_param()
            with torch.autocast(weight.device.type, enabled=False):
                delta: Tensor = super().get_delta_weight(adapter_name, *args, **kwargs)
                return torch.where(weight != 0, delta, 0)

        def _tuned(self) -> Tensor:
            """Exactly what merging will store."""
            tuned: Tensor = self.get_param() + self.get_delta_weight(self.active_adapters[0])
            return tuned

        @property
        def weight(self) -> Tensor:
            """As whoever reads it from outside of the layer is to find it."""
            return self._tuned() if self.parameter_name == "weight" else self.base_layer.weight

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name == "base_layer":
                    raise
                return self._tuned() if name == self.parameter_name else getattr(self.base_layer, name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """The layer with its tuned weight."""
            layer, path = self.base_layer, self.parameter_name
            while isinstance(layer, lora.ParamWrapper):
                layer, path = layer.base_layer, f"base_layer.{path}"
            return functional_call(self.base_layer, {path: self._tuned()}, args, kwargs)

    return MaskedLora, ParamWrapper
