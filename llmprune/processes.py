"""Several processes that do one job, as `accelerate launch` or torchrun start them. Torch is imported when they talk.

Each runs the whole job on a device of its own, and they share out what takes long. The first speaks for all: it alone draws
progress, keeps the journal and writes the checkpoint, and what could differ between them is what it says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from llmprune.errors import LlmpruneError, one_line

if TYPE_CHECKING:
    import torch

A = TypeVar("A")
B = TypeVar("B")

TIMEOUT = timedelta(hours=6)
"""How long a process waits for the others, which it does while the first measures and writes alone. A launcher ends them all
as soon as one has died."""


def several() -> bool:
    """Whether this is one of several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_first() -> bool:
    """Whether this process speaks: it is the first one, or alone."""
    return not several() or os.environ.get("RANK", "0") == "0"


def num_here() -> int:
    """Processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if several() else 1


def first_says(work: Callable[[], A]) -> A:
    """What ``work()`` returns in the first process, for all of them; an error of ours that ends it there ends it in all.

    Has to be called by all processes; the others do not work. What is returned has to be picklable.
    """
    if not several():
        return work()
    from accelerate.utils import broadcast_object_list

    said: list[tuple[A | None, LlmpruneError | None]] = [(None, None)]
    if is_first():
        try:
            said = [(work(), None)]
        except LlmpruneError as error:
            said = [(None, error)]
    with _peers():
        broadcast_object_list(said)
    value, failure = said[0]
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


def wait_for_all() -> None:
    """Go on when all processes are here."""
    if several():
        from accelerate import PartialState

        with _peers():
            PartialState().wait_for_everyone()


def spread(items: Sequence[A], work: Callable[[Sequence[A]], list[B]], device: torch.device) -> list[B]:
    """``work(items)``, whose result for an item does not depend on the other ones: every process works on each n-th item, and
    all of them return the same list. Has to be called by all processes, with the same items. One process just works.

    Args:
        device: what the processes work on; tells which means of communication they open, if none is yet.
    """
    if not several():  # no state is made for one: that would look for devices
        return work(items)
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=device.type == "cpu")
    rank, size = state.process_index, state.num_processes
    own = items[rank::size]
    done = list(zip(range(rank, len(items), size), work(own) if own else [], strict=True))
    with _peers():
        pairs = gather_object([done])
    found = dict(pair for part in pairs for pair in part)
    return [found[number] for number in range(len(items))]


@contextmanager
def _peers() -> Iterator[None]:
    """An error while processes talk is another one's end."""
    try:
        yield
    except RuntimeError as error:
        raise LlmpruneError(
            f"another of the {os.environ['WORLD_SIZE']} processes stopped, and this one with it ({one_line(error)}). What was "
            "recorded is kept: go on with --resume."
        ) from None
