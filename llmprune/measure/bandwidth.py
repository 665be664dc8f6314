"""The device's own copy bandwidth: what no reading of weights can be expected to beat."""

from __future__ import annotations

import statistics
import time

import torch

from llmprune.devices import free_bytes
from llmprune.measure.timing import Clock, Run, seconds_of

_BUFFER_BYTES = {"cpu": 1 << 26}
"""On a CPU 64 MiB: beyond the caches of most; elsewhere 512 MiB, beyond the L2 of all."""
_DEFAULT_BUFFER_BYTES = 1 << 29
_REPEATS = 9


@torch.no_grad()
def copy_bandwidth(device: torch.device, *, num_bytes: int | None = None, clock: Clock = time.perf_counter) -> float:
    """GB/s (1e9 bytes) of copying a buffer to another one on the device, bytes read and written both counted; the median."""
    wanted = num_bytes or _BUFFER_BYTES.get(device.type, _DEFAULT_BUFFER_BYTES)
    size = max(1 << 12, min(wanted, free_bytes(device) // 8))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    run = Run(lambda: target.copy_(source))
    seconds_of(run, device, clock)
    median = statistics.median(seconds_of(run, device, clock) for _ in range(_REPEATS))
    return 2 * size / median / 1e9


def cache_bytes(device: torch.device) -> int:
    """How many bytes must lie between two uses of a weight so that no cache still holds it: twice the L2, on a CPU 64 MiB."""
    if device.type == "cuda":
        return 2 * int(torch.cuda.get_device_properties(device).L2_cache_size)
    return 1 << 26
