"""Several processes that do one job, as `accelerate launch` or torchrun start them. Torch is imported when they talk.

Each runs the whole job on a device of its own, and they share out what takes long. The first speaks for all: it alone draws
progress, keeps the journal and writes the checkpoint, and what could differ between them is what it says.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import psutil

from llmprune.errors import LlmpruneError, ProcessLost, one_line

if TYPE_CHECKING:
    import torch

A = TypeVar("A")
B = TypeVar("B")

TIMEOUT = timedelta(hours=6)
"""How long a process waits for the others, which it does while the first measures and writes alone. A launcher ends them all
as soon as one has died."""
LAUNCHED = "LLMPRUNE_NUM_GPUS"
"""Set in processes that ``--num-gpus`` started: their launcher knows which one died, and says it."""
LOST_EXIT_CODE = 79
"""Of those of them that end because another one did."""
_DYING_SECONDS = 2.0
"""A process whose connections are closed is gone, or will be after so long."""
_LOST = "llmprune/lost"
_members: list[tuple[str, int]] = []  # host and process ID of each, once they have met


def several() -> bool:
    """Whether this is one of several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_first() -> bool:
    """Whether this process speaks: it is the first one, or alone."""
    return not several() or os.environ.get("RANK", "0") == "0"


def is_first_here() -> bool:
    """Whether this is the first process of the job on this machine."""
    return not several() or os.environ.get("LOCAL_RANK", "0") == "0"


def num_processes() -> int:
    """Processes of the job, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_number() -> int:
    """Which of them this is; the first is 0."""
    return int(os.environ.get("RANK", "0")) if several() else 0


def launched() -> bool:
    """Whether ``--num-gpus`` started this process."""
    return several() and LAUNCHED in os.environ


def exit_code(error: LlmpruneError) -> int:
    """What the command returns for an error."""
    return LOST_EXIT_CODE if launched() and isinstance(error, ProcessLost) else error.exit_code


def speaks(error: LlmpruneError) -> bool:
    """Whether it is for this process to tell the user of an error: each does of its own, one a machine of a bad request."""
    if launched() and isinstance(error, ProcessLost):
        return False
    if is_first():
        return True
    return not error.told and (error.exit_code == 1 or is_first_here())


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
    with peers():
        broadcast_object_list(said)
    value, failure = said[0]
    if failure is not None:
        failure.told = not is_first()
        raise failure
    return value  # type: ignore[return-value]


def together(work: Callable[[], A]) -> list[A]:
    """What ``work()`` returns in each process, in their order, for all of them; an error that ends it in one ends it in all.

    Has to be called by all processes. What is returned has to be picklable.
    """
    if not several():
        return [work()]
    from torch.distributed import all_gather_object

    own: tuple[A | None, LlmpruneError | None]
    bug: Exception | None = None
    try:
        own = (work(), None)
    except LlmpruneError as error:
        own = (None, error)
    except Exception as error:
        said = what_ended(own_number(), num_processes(), f"stopped ({one_line(error)})")
        bug, own = error, (None, LlmpruneError(said))
    found: list[tuple[A | None, LlmpruneError | None]] = [own] * num_processes()
    with peers():
        all_gather_object(found, own)
    if bug is not None:
        raise bug
    for number, (_, failure) in enumerate(found):
        if failure is not None:
            failure.told = number != own_number()
            raise failure
    return [value for value, _ in found]  # type: ignore[misc]


def what_ended(number: int, count: int, how: str) -> str:
    """What is told of a process that ended before its work."""
    return f"process {number} of {count} {how}, and the others with it. What was recorded is kept: go on with --resume."


def meet() -> None:
    """Let all processes know one another, so that those left can say which one died. Has to be called by all."""
    _members[:] = together(lambda: (socket.gethostname(), os.getpid()))


def wait_for_all() -> None:
    """Go on when all processes are here."""
    if several():
        from accelerate import PartialState

        with peers():
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
    with peers():
        pairs = gather_object([done])
    found = dict(pair for part in pairs for pair in part)
    return [found[number] for number in range(len(items))]


@contextmanager
def peers() -> Iterator[None]:
    """An error while processes talk is another one's end."""
    try:
        yield
    except RuntimeError as error:
        lost = _lost()
        if lost is not None:
            raise ProcessLost(what_ended(lost, num_processes(), "died")) from None
        raise ProcessLost(
            f"another of the {num_processes()} processes stopped, and this one with it ({one_line(error)}). What was "
            "recorded is kept: go on with --resume."
        ) from None


def _lost() -> int | None:
    """The process that died first: what one that noticed has left word of, or one of this machine that is there no more."""
    from torch.distributed.distributed_c10d import _get_default_store

    here, deadline = socket.gethostname(), time.monotonic() + _DYING_SECONDS
    while time.monotonic() < deadline:
        gone = next((number for number, (host, pid) in enumerate(_members) if host == here and not _runs(pid)), None)
        try:
            store = _get_default_store()
            if gone is not None:  # those that noticed before have ended by now, too: the first word counts
                return int(store.compare_set(_LOST, "", str(gone)))
            if store.check([_LOST]):
                return int(store.get(_LOST))
        except RuntimeError:  # it is kept by the first process, or by its launcher
            return gone
        time.sleep(0.05)
    return None


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
