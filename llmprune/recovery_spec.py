"""What a user asks of ``llmprune recover``: :class:`RecoverConfig`. Torch-free."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmprune.errors import ConfigError
from llmprune.spec import Dtype, Names, PruneConfig, describe

Mode = Literal["lora", "full"]

NO_TEACHER = "none"
LEARNING_RATES: dict[Mode, float] = {"lora": 2e-3, "full": 3e-4}


def _shared(field: str) -> str:
    return str(PruneConfig.model_fields[field].description)


class RecoverConfig(BaseModel):
    """One recovery. Every field but ``model`` has a default; None is taken from the report beside the checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="Directory or hub ID of a pruned checkpoint that is not packed.")
    data: str | None = Field(
        None, description="Text to train on, same names as calibration. Default: the calibration text of the pruning."
    )
    teacher: str | None = Field(
        None,
        description="Dense model to learn from, with the same tokenizer, or 'none' for the text alone. Default: the model that "
        "was pruned, where it is still to be found.",
    )
    distill: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="Weight of the divergence from the teacher in the loss; the rest is the text's cross-entropy."
    )
    mode: Mode = Field(
        "lora", description="What is trained: 'lora', low-rank updates of the blocks' matrices, or 'full', all parameters."
    )
    rank: Annotated[int, Field(ge=1)] = Field(16, description="Rank of the low-rank updates.")
    steps: Annotated[int, Field(ge=1)] = Field(200, description="Optimiser steps.")
    lr: Annotated[float, Field(gt=0, lt=math.inf)] | None = Field(
        None,
        description=f"Highest learning rate of AdamW. Default: {LEARNING_RATES['lora']:g} for lora, "
        f"{LEARNING_RATES['full']:g} for full.",
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(8, description="Sequences per forward of each process.")
    accumulate: Annotated[int, Field(ge=1)] = Field(1, description="Forwards whose gradients make one step.")
    num_samples: Annotated[int, Field(ge=2)] = Field(512, description="Sequences of the text; an eighth of them is held out.")
    seq_len: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Tokens per sequence and evaluation window. Default: as for the pruning."
    )
    eval: Names | None = Field(None, description="Evaluation texts. Default: those of the pruning.")
    max_eval_tokens: Annotated[int, Field(ge=2)] | None = Field(None, description=_shared("max_eval_tokens"))
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps ...: where the model is trained and evaluated.")
    dtype: Dtype = Field("auto", description=_shared("dtype"))
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description=_shared("seed"))
    revision: str | None = Field(None, description=_shared("revision"))
    trust_remote_code: bool = Field(False, description=_shared("trust_remote_code"))

    @classmethod
    def build(cls, **fields: Any) -> RecoverConfig:
        """Validate once, at the boundary; None means default. Raises ConfigError with one line per offending field."""
        try:
            return cls.model_validate({name: value for name, value in fields.items() if value is not None})
        except ValidationError as error:
            raise ConfigError(describe(error, cls.model_fields)) from None

    @property
    def learning_rate(self) -> float:
        """As asked, else the mode's."""
        return self.lr or LEARNING_RATES[self.mode]

    @property
    def num_held_out(self) -> int:
        """Sequences, the last ones, that are never trained on: they decide which weights are kept."""
        return max(1, self.num_samples // 8)

    def loading(self, model: str, revision: str | None) -> PruneConfig:
        """What loading a model needs to know, as for all commands."""
        return PruneConfig.build(
            model=model, revision=revision, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code
        )
