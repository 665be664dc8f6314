"""Work that several processes share, as `accelerate launch` or torchrun start them: each does a part, all get everything."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

A = TypeVar("A")
B = TypeVar("B")


def spread(items: Sequence[A], work: Callable[[Sequence[A]], list[B]], device: torch.device) -> list[B]:
    """``work(items)``, whose result for an item does not depend on the other ones: every process works on each n-th item, and
    all of them return the same list. Has to be called by all processes, with the same items. One process just works.

    Args:
        device: what the processes work on; tells which means of communication they open, if none is yet.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":  # no state is made for one: that would look for devices
        return work(items)
    state = PartialState(cpu=device.type == "cpu")
    rank, size = state.process_index, state.num_processes
    own = items[rank::size]
    pairs = gather_object([list(zip(range(rank, len(items), size), work(own) if own else [], strict=True))])
    found = dict(pair for part in pairs for pair in part)
    return [found[number] for number in range(len(items))]
