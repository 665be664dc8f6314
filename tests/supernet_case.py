"""A tiny model with its modules, recordings and levels, for what is built on the supernet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import tiny
from llmprune.allocate.evolution import Stage
from llmprune.anatomy.blocks import find_stack, probe, record
from llmprune.engines.divergence import Divergence, Logits
from llmprune.engines.supernet import Supernet, racks_of
from llmprune.engines.tyr import Tyr
from llmprune.engines.tyr_settings import TyrSettings
from llmprune.measure.quality import replay_tail
from llmprune.structured.budget import Budget, BudgetName
from llmprune.structured.levels import centres, grid
from llmprune.structured.slicing import Cut, mask_
from llmprune.structured.units import find_units

CPU = torch.device("cpu")
SETTINGS = TyrSettings(
    iterations=2, generations=3, offspring=8, stages=(Stage(64, 2), Stage(None, 1)), curve_tokens=64, settle=True
)


def ids(seed: int = 0) -> Tensor:
    """Tokens of six sequences of 32."""
    return torch.randint(3, 100, (6, 32), generator=torch.Generator().manual_seed(seed))


class Case:
    """A model of two blocks, its recordings, and the levels of an iteration at a sparsity."""

    def __init__(self, model: PreTrainedModel, sparsity: float = 0.5, iteration: int = 1) -> None:
        self.model = model
        self.stack = probe(model, find_stack(model), ids()[:1])
        self.modules = find_units(model, self.stack).modules
        self.calibration = record(model, self.stack, list(ids().split(4)))
        self.texts = record(model, self.stack, list(ids(1).split(3)))
        self.counts = centres(self.modules, sparsity)
        self.racks = racks_of(self.modules, grid(self.modules, self.counts, iteration))
        self.before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def supernet(self, **fields: Any) -> Supernet:
        """With all levels in it."""
        made = Supernet(self.stack, self.racks, **fields)
        assert list(made.fill(self.calibration, CPU)) == [1, 2]
        return made

    def fitness(self, net: Supernet) -> Divergence:
        """On all of the texts, or a part."""
        return Divergence(self.stack, net, self.texts, CPU, self.head)

    def unchanged(self) -> bool:
        """Whether the model is dense."""
        return all(torch.equal(parameter, self.before[name]) for name, parameter in self.model.named_parameters())

    @contextmanager
    def head(self) -> Iterator[Logits]:
        """The model's own, on the texts."""
        yield lambda chunk, hidden_NSH: replay_tail(
            self.model, self.stack, ids(1).split(3)[chunk][: len(hidden_NSH), : hidden_NSH.shape[1]], hidden_NSH
        )

    def tyr(
        self,
        sparsity: float = 0.25,
        budget: BudgetName = "kinds",
        costs: Mapping[str, float] | None = None,
        widths: Any = None,
        **settings: Any,
    ) -> Tyr:
        """A small search."""
        wanted = Budget.of(self.modules, sparsity, budget, costs)
        own = replace(SETTINGS, **settings)
        return Tyr(self.stack, self.modules, wanted, self.calibration, self.texts, CPU, self.head, own, widths)

    @torch.no_grad()
    def kl(self, cuts: Mapping[str, Cut] | None = None) -> float:
        """Of the model on the texts, with the cuts masked into it if there are any, by whole forwards; the weights stay."""

        def log_probs() -> Tensor:
            return F.log_softmax(self.model(input_ids=ids(1), use_cache=False).logits.float(), dim=-1)

        current = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        for module in self.modules if cuts else ():
            mask_(module, (cuts or {})[module.name])
        ours_NSV = log_probs()
        self._load(self.before)
        dense_NSV = log_probs()
        self._load(current)
        return float(F.kl_div(ours_NSV, dense_NSV, log_target=True, reduction="none").sum(-1).mean())

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])


def make_case(*, kv_heads: int = 4, **fields: Any) -> Case:
    """Of a Llama of two blocks."""
    return Case(tiny.make_model(num_key_value_heads=kv_heads), **fields)
