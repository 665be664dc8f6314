"""What became of a model: its quality by llmprune's evaluator, its zeros counted, and where two results differ.

O out, I in features.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.anatomy.blocks import find_stack, probe
from llmprune.measure.quality import replay_head, score_text

Weights = dict[str, Tensor]


class Judge:
    """Holds a dense model, and judges checkpoints made of it on the same windows [N, S]; ``losses`` are the dense model's."""

    def __init__(self, dense: str, ids_NS: Tensor) -> None:
        self.ids_NS = ids_NS
        self.model = _load(dense)
        self.stack = probe(self.model, find_stack(self.model), ids_NS[:1, :16])
        self.sites = [site.name for sites in self.stack.sites for site in sites]
        self.hidden: list[Tensor] = []
        self.losses = [math.log(_score(self.model, ids, keep=self.hidden).perplexity) for ids in ids_NS.split(1)]

    def quality(self, folder: Path) -> dict[str, Any]:
        """Mean loss and KL(dense || pruned) of every window, and the zeros of the pruned matrices."""
        weights = weights_of(folder, self.sites)
        zeros = sum(int((weight == 0).sum()) for weight in weights.values())
        total = sum(weight.numel() for weight in weights.values())
        model = _load(str(folder))
        scores = [
            _score(model, ids, dense=lambda _batch, ids, kept=kept: replay_head(self.model, self.stack, ids, kept))
            for ids, kept in zip(self.ids_NS.split(1), self.hidden, strict=True)
        ]
        return {
            "losses": [math.log(one.perplexity) for one in scores], "kls": [one.kl for one in scores],
            "num_zeros": zeros, "num_weights": total,
        }  # fmt: skip


def weights_of(folder: Path, names: list[str]) -> Weights:
    """The matrices of a checkpoint by the names of their modules."""
    found: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return {name: found[f"{name}.weight"] for name in names}


def agreement(one: Weights, other: Weights) -> dict[str, Any]:
    """Of two results: the share of weights that both keep or both prune, by matrix, and how far kept weights lie apart.

    ``first`` is of the first block, where both have pruned from the same inputs; ``worst`` of the matrix that agrees least;
    ``distance`` is ||one - other|| / ||one|| of the first block.
    """
    shares = {name: ((one[name] == 0) == (other[name] == 0)).double().mean().item() for name in one}
    depths = {name: _block(name) for name in one}
    first = [name for name, depth in depths.items() if depth == min(depths.values())]
    apart = sum((one[name].double() - other[name].double()).square().sum() for name in first)
    whole = sum(one[name].double().square().sum() for name in first)
    return {
        "mean": statistics.fmean(shares.values()), "first": statistics.fmean(shares[name] for name in first),
        "worst": min(shares.values()), "distance": float((torch.as_tensor(apart / whole)).sqrt()),
    }  # fmt: skip


def _block(name: str) -> int:
    """The number of the block that a matrix is of: the first number in its name."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def _load(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _score(model: PreTrainedModel, ids_NS: Tensor, **how: Any) -> Any:
    scoring = score_text(model, ids_NS, **how)
    while True:
        try:
            next(scoring)
        except StopIteration as stop:
            return stop.value
