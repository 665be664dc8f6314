"""Folds: matrices whose input channels may change places, because the matrices that put them out can change with them.

A channel of the MLP's inner width is a column of the down projection and a row of the gate and up projections; a channel of an
attention head is a column of the output projection for every query head, and a row of the value projection. The shapes of
neighbouring Linears suggest a fold; whether it holds only a forward shows (:mod:`llmprune.engines.permute`).

O out, I in features; P parts that keep to themselves (key-value heads, or one), C channels of a part, U uses of a channel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.anatomy.sites import Site

VALUE = re.compile(r"^(w?v|v_?proj|v_lin|value|v_layer)$")
_FUSED = re.compile(r"^w?qkv(_?proj)?$|^query_key_value$|^c_attn$|^w_?pack$", re.IGNORECASE)
_HEAD_DIM = ("v_head_dim", "head_dim", "head_size", "attention_head_size", "d_head")


@dataclass(frozen=True)
class Fold:
    """One matrix and those that feed it.

    Attributes:
        consumer: its columns are the channels.
        columns_PUC: which columns hold channel c of part p, int64.
        producers: the matrices whose rows are the channels, each with its rows [P, U, C].
    """

    consumer: Site
    columns_PUC: Tensor
    producers: tuple[tuple[Site, Tensor], ...]

    @property
    def num_channels(self) -> int:
        """Channels of a part."""
        return self.columns_PUC.shape[2]

    def moved(self, order_PC: Tensor) -> Tensor:
        """Which column each column of the consumer is taken from, int64 [I]."""
        return _moved(self.columns_PUC, order_PC, self.consumer.shape[1])

    def permute_(self, order_PC: Tensor) -> None:
        """Put channel ``order[p, c]`` in place c, in the consumer and in everything that feeds it."""
        weight_OI = self.consumer.weight_OI
        weight_OI.copy_(weight_OI[:, self.moved(order_PC).to(weight_OI.device)])
        for site, rows_PUC in self.producers:
            weight_OI = site.weight_OI
            taken_O = _moved(rows_PUC, order_PC, len(weight_OI)).to(weight_OI.device)
            weight_OI.copy_(weight_OI[taken_O])
            bias_O = getattr(site.module, "bias", None)
            if bias_O is not None:
                bias_O.detach().copy_(bias_O.detach()[taken_O])


def _moved(places_PUC: Tensor, order_PC: Tensor, size: int) -> Tensor:
    taken = torch.arange(size)
    index_PUC = order_PC.cpu()[:, None].expand(places_PUC.shape)
    taken[places_PUC.reshape(-1)] = places_PUC.gather(2, index_PUC).reshape(-1)
    return taken


def suggest(block: nn.Module, path: str, sites: Sequence[Site], inputs: Mapping[str, object]) -> dict[str, list[Fold]]:
    """For every site that neighbours seem to feed, the folds worth trying, the likeliest first; by site.

    Args:
        block: one block, ``path`` its name in the model.
        sites: of the block.
        inputs: for each site that was used, in the order of use, something that sites with the same input share.
    """
    position = {name: number for number, name in enumerate(inputs)}
    by_parent: dict[str, list[Site]] = {}
    for site in sites:
        if site.name in position and site.expert is None and site.parameter == "weight":
            by_parent.setdefault(site.name.rpartition(".")[0], []).append(site)
    folds = {}
    for parent, siblings in by_parent.items():
        size = value_head_dim(block.get_submodule(parent.removeprefix(path).removeprefix(".")))
        for consumer in siblings:
            feeding = [
                site
                for site in siblings
                if position[site.name] < position[consumer.name] and inputs[site.name] is not inputs[consumer.name]
            ]
            if found := list(_suggest(consumer, feeding, size)):
                folds[consumer.name] = found
    return folds


def _suggest(consumer: Site, feeding: Sequence[Site], head_dim: int) -> Iterator[Fold]:
    width = consumer.shape[1]
    values = [site for site in feeding if VALUE.match(_leaf(site))]
    fused = [site for site in feeding if _FUSED.match(_leaf(site))]
    if values or fused:
        if head_dim and width % head_dim == 0:
            yield from (_heads(consumer, site, rows_PC) for site, rows_PC in _value_rows(width, values, fused, head_dim))
        return
    columns_PUC = torch.arange(width).view(1, 1, width)
    whole = [site for site in feeding if site.shape[0] == width]
    if whole:
        yield Fold(consumer, columns_PUC, tuple((site, columns_PUC) for site in whole))
    for site in feeding:
        if site.shape[0] == 2 * width:  # gate and up as one matrix: one below the other, or alternating
            yield Fold(consumer, columns_PUC, ((site, torch.arange(2 * width).view(1, 2, width)),))
            yield Fold(consumer, columns_PUC, ((site, torch.arange(2 * width).view(1, width, 2).mT),))


def _value_rows(width: int, values: Iterable[Site], fused: Iterable[Site], head_dim: int) -> Iterator[tuple[Site, Tensor]]:
    """Matrices that may hold the value projection, each with its rows by key-value head [P, C]."""
    for site in values:
        num_rows = site.shape[0]
        if num_rows % head_dim == 0 and width % num_rows == 0:
            yield site, torch.arange(num_rows).view(-1, head_dim)
    for site in fused:
        num_rows, spare = site.shape[0], (site.shape[0] - width) // 2
        if spare <= 0 or spare % head_dim or width % spare or width + 2 * spare != num_rows:
            continue
        yield site, torch.arange(num_rows - spare, num_rows).view(-1, head_dim)  # queries, keys, values one below the other
        yield site, torch.arange(num_rows).view(spare // head_dim, -1)[:, -head_dim:]  # or in turn for each key-value head


def _heads(consumer: Site, producer: Site, rows_PC: Tensor) -> Fold:
    """The fold of an output projection whose query heads follow their key-value heads, P of them in ``rows_PC``."""
    columns_PUC = torch.arange(consumer.shape[1]).view(len(rows_PC), -1, rows_PC.shape[1])
    return Fold(consumer, columns_PUC, ((producer, rows_PC[:, None]),))


def value_head_dim(module: nn.Module) -> int:
    """What an attention module says the size of a head's values is; 0 for other modules."""
    return next((size for name in _HEAD_DIM if isinstance(size := getattr(module, name, None), int)), 0)


def _leaf(site: Site) -> str:
    return site.name.rpartition(".")[2]
