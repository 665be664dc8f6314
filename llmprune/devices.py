"""Where things run: one device by name, what is free on it, and how much a stage took.

No device is named here: whichever accelerator torch reports is used.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar
from weakref import WeakSet

import psutil
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import get_max_memory
from safetensors import SafetensorError
from torch import nn

from llmprune._version import __version__
from llmprune.errors import ConfigError, OutOfMemory, one_line
from llmprune.processes import TIMEOUT, launched, meet, num_here
from llmprune.report import Environment

_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "_alloc_failed")


def pick_device(name: str) -> torch.device:
    """The named device; ``auto`` is the accelerator if there is one, else the CPU. Raises ConfigError."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not a device name; use auto, cpu, cuda, cuda:1, mps ...") from None
    if device.type == "cpu":
        return device
    count = torch.accelerator.device_count() if accelerator else 0
    if accelerator is None or device.type != accelerator.type or (device.index or 0) >= count:
        found = f"{count} {accelerator.type} device(s)" if accelerator else "none"
        raise ConfigError(f"device {name!r} is not on this machine (accelerators found: {found}). Use --device cpu or auto.")
    return device


def own_device(name: str) -> torch.device:
    """The device of this one of several processes, of the kind that is named; opens their means of communication.

    Raises:
        ConfigError: there is no device for each process, or they cannot talk to each other from there.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    device = pick_device("cpu" if name == "auto" and on_cpu else name)
    if name == "auto" and device.type == "cpu" and launched():
        raise ConfigError(
            f"--num-gpus {num_here()} needs as many GPUs, and this machine has none. Use --device cpu, or start one."
        )
    if device.index is not None:
        raise ConfigError(f"several processes take a device each, got device {name!r}. Use --device {device.type}.")
    here = num_here()
    if device.type != "cpu" and here > (count := torch.accelerator.device_count()):
        raise ConfigError(
            f"{here} processes need a device each, and this machine has {count}. Start fewer, or use --device cpu."
        )
    state = PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
    if not torch.distributed.is_initialized():
        raise ConfigError(f"processes on {device.type!r} cannot talk to each other. Start one, or use --device cpu.")
    meet()
    own: torch.device = state.device
    return own


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: cgroup-aware on the CPU, where the processes of one job have a share each."""
    if device.type == "cpu":
        return min(psutil.virtual_memory().available, *_cgroup_free()) // num_here()
    memory = get_max_memory()
    index = device.index if device.index is not None else torch.accelerator.current_device_index()
    return int(memory.get(index, memory.get(device.type, 0)))


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn 'out of memory' from any layer, the device's or the machine's, into OutOfMemory."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"memory ran out ({one_line(error)}). Use a smaller --batch-size or --seq-len; "
            "`llmprune plan` says what a job needs."
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's own error, the accelerator's, or what the CPU's allocator and mmap raise."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = str(error).lower()
    return isinstance(error, (RuntimeError, OSError, SafetensorError)) and any(sign in said for sign in _OUT_OF_MEMORY)


def device_name(device: torch.device) -> str:
    """A name for reports, such as 'NVIDIA H200' or 'CPU (2 threads)'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def environment(device: torch.device) -> Environment:
    """Versions and device of this process."""
    return Environment(
        llmprune=__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        device=device_name(device),
        num_threads=torch.get_num_threads(),
    )


def module_device(module: nn.Module) -> torch.device:
    """Device of a module's first parameter, of those that are not on disk."""
    return next((one.device for one in module.parameters() if not one.is_meta), torch.device("meta"))


@contextmanager
def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Hold a module on ``device`` for a while, then put it back where it was."""
    home = module_device(module)
    if home == device:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


class PeakMemory:
    """Peak memory of one stage: resident set of the process and allocations on the accelerator, in bytes.

    Stages may lie inside one another: the counters are the process's, so an inner one's start is noted by those around it.
    Without ``collect`` it starts at once, garbage that only a collection would find included.
    """

    _open: ClassVar[WeakSet[PeakMemory]] = WeakSet()

    def __init__(self, *, collect: bool = True) -> None:
        self._kept: tuple[int, int] = (0, 0)
        for other in self._open:
            other._kept = other.cpu_bytes, other.gpu_bytes or 0
        return_free_memory(collect=collect)
        self._resettable = _reset_peak_rss()
        if torch.accelerator.is_available():
            torch.accelerator.reset_peak_memory_stats()
        self._open.add(self)

    @property
    def cpu_bytes(self) -> int:
        """Highest resident set since construction (since the process started where Linux cannot reset it)."""
        return max(self._kept[0], self._rss_bytes())

    def _rss_bytes(self) -> int:
        if self._resettable:
            status = Path("/proc/self/status").read_text()
            line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
            if line:
                return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    @property
    def gpu_bytes(self) -> int | None:
        """Highest allocation on the current accelerator; None without one."""
        return max(self._kept[1], int(torch.accelerator.max_memory_allocated())) if torch.accelerator.is_available() else None


def return_free_memory(*, collect: bool) -> None:
    """Give what the C allocator holds back to the system, so that one stage's leavings are not the next one's peak."""
    if collect:
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc only
    if trim is not None:
        trim(0)


def _reset_peak_rss() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _cgroup_free() -> list[int]:
    found = []
    for limit_file, usage_file in _CGROUP_FILES:
        try:
            limit, usage = Path(limit_file).read_text().strip(), Path(usage_file).read_text().strip()
            if limit != "max":
                found.append(int(limit) - int(usage))
        except (OSError, ValueError):
            continue
    return found or [sys.maxsize]
