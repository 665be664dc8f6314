"""Which model this is, exactly, and how large: the head of every report."""

from __future__ import annotations

from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Stack
from llmprune.anatomy.sites import total_weights
from llmprune.io.models import Source
from llmprune.report import ModelReport

IN_MEMORY = "in memory"
"""The revision of a model that was given as an object."""


def describe_model(model: PreTrainedModel, stack: Stack, source: Source | None) -> ModelReport:
    """Name, revision and sizes of a model; without ``source`` it is one in memory."""
    parameters = list(model.parameters())
    return ModelReport(
        name=source.name if source else (getattr(model, "name_or_path", "") or type(model).__name__),
        revision=source.revision if source else IN_MEMORY,
        model_type=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        num_parameters=sum(parameter.numel() for parameter in parameters),
        num_prunable=sum(map(total_weights, stack.sites)),
        num_blocks=len(stack.blocks),
        weights_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    )
