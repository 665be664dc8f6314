"""What the three structures have in common: a choice is made, kept in the journal, and then carried out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.blocks import Recording, Stack
from llmprune.engines.sharding import Shares
from llmprune.events import Event
from llmprune.io.journal import Journal
from llmprune.patterns import Structure
from llmprune.processes import first_says
from llmprune.spec import PruneConfig
from llmprune.walking import record_batches

A = TypeVar("A")

STATE = "structure"
CHUNK_TOKENS = 2048
"""Of a forward of the candidates of a search."""
CHECK_TOKENS = 512
"""Of the batch on which what is left is compared."""


@dataclass(frozen=True)
class Setting:
    """What a choice is made on; N sequences of S tokens.

    Attributes:
        model: dense; a choice leaves it so, or with zeros where groups will go.
        ids_NS: the calibration tokens, all sequences.
        batch_size: of them per forward.
        journal: where a search is recorded from time to time, and found again; None keeps nothing.
        directory: where what does not fit in memory goes; None for the system's own place.
        shared: whether several processes do this job, of which the first alone has a journal.
    """

    model: PreTrainedModel
    stack: Stack
    config: PruneConfig
    ids_NS: Tensor
    batch_size: int
    device: torch.device
    journal: Journal | None = None
    directory: Path | None = None
    shared: bool = False

    @property
    def shares(self) -> Shares:
        """What this process does of it."""
        return Shares.of(self.device) if self.shared else Shares.alone()

    def agreed(self, work: Callable[[], A]) -> A:
        """What ``work()`` returns in this process, or in the first of those that do this job: all have to call this."""
        return first_says(work) if self.shared else work()

    def record(self, batches: Sequence[Tensor] | None = None) -> Recording:
        """Every block's arguments on these batches [N, S], or on those of all calibration sequences."""
        batches = self.ids_NS.split(self.batch_size) if batches is None else batches
        return record_batches(self.model, self.stack, batches, self.device) if batches else Recording()

    def recorded(self) -> dict[str, Any] | None:
        """The newest state of a search that an earlier run left."""
        return self.agreed(self._newest)

    def _newest(self) -> dict[str, Any] | None:
        name = self.journal.latest(STATE) if self.journal else None
        return self.journal.read(name, []) if self.journal and name else None

    def keep(self, number: int, state: Mapping[str, Any]) -> None:
        """Record the state of a search, the ``number``-th, in place of the one before."""
        if self.journal:
            self.journal.write_latest(STATE, number, state, {})


@dataclass(frozen=True)
class Choice:
    """What goes.

    Attributes:
        data: fields of the StructureReport that are known already, as JSON has them, and what :meth:`Chooser.apply_` needs.
        tensors: by name.
        warnings: for the report.
    """

    data: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Chooser(Protocol):
    """One structure."""

    structure: Structure

    @property
    def total(self) -> int:
        """Steps of a choice."""

    @property
    def done(self) -> int:
        """Steps that an earlier process recorded."""

    def choose(self) -> Generator[Event, None, Choice]:
        """Choose, with progress."""

    def apply_(self, choice: Choice) -> dict[str, Any]:
        """Take it out of the model and check what is left; returns more fields of the report.

        Raises:
            UnsupportedModel: what is left does not compute what the masked model does; the model is then of no use.
        """


def search_texts(ids_NS: Tensor, most: int, shares: Shares | None = None) -> tuple[Tensor, ...]:
    """The first calibration sequences, about ``most`` tokens of them, in chunks of about CHUNK_TOKENS; with ``shares`` those of
    them that are this process's, which may be none.
    """
    texts = ids_NS[: max(1, most // ids_NS.shape[1])]
    texts = shares.part(texts) if shares else texts
    chunks: tuple[Tensor, ...] = texts.split(max(1, CHUNK_TOKENS // ids_NS.shape[1])) if len(texts) else ()
    return chunks
