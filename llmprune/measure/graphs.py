"""CUDA graphs: a forward without the time Python needs to launch it, so that kernels are measured and not the launching.

transformers' static cache keeps its length in a tensor that the graph itself advances; putting it back is a reset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from llmprune.devices import is_out_of_memory
from llmprune.errors import one_line

WARM_UPS = 3
"""Runs before a capture, as torch's documentation asks: kernels are compiled and workspaces allocated by them."""


class CaptureFailed(Exception):
    """The work cannot be captured; the message says why in one line."""


def capture(work: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """``work`` as a CUDA graph, after WARM_UPS plain runs of it; returns what replays it.

    Raises:
        CaptureFailed: something in it cannot be captured, such as a read of a value by the CPU.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    work()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                work()
            graph.replay()
            torch.cuda.synchronize()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        torch.cuda.synchronize(device)
        raise CaptureFailed(one_line(error)) from None
    return lambda: graph.replay()


class StaticState:
    """The lengths of a static cache at one moment; ``restore`` brings the cache back to it, in place."""

    def __init__(self, cache: StaticCache) -> None:
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._numbers: list[tuple[Any, str, int]] = []
        for layer in cache.layers:
            for name, value in vars(layer).items():
                if not name.endswith(("cumulative_length", "cumulative_length_int")):
                    continue
                if isinstance(value, Tensor):
                    self._tensors.append((value, value.clone()))
                else:
                    self._numbers.append((layer, name, value))

    def restore(self) -> None:
        """Forget the tokens that came since; a sliding window that moved on keeps the newer ones, which costs the same."""
        for tensor, before in self._tensors:
            tensor.copy_(before)
        for layer, name, value in self._numbers:
            setattr(layer, name, value)
