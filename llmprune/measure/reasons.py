"""Why packed weights bring no speed where they bring none, in words: facts of the device, the model and the measurement."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from llmprune.speed import LayerSpeed, ModelSpeed, pair

SPARSE_CORES = (8, 0)
"""Compute capability from which NVIDIA GPUs multiply 2:4 matrices in hardware."""
LAUNCH_BOUND = 0.25
"""Below this share of the copy bandwidth the time of a decode step is not spent on reading weights."""
FEW_PACKED = 0.5


@dataclass(frozen=True)
class DeviceFacts:
    """What of a device decides how packed weights are multiplied on it; ``capability`` is that of an NVIDIA GPU."""

    kind: str
    capability: tuple[int, int] | None = None
    has_triton: bool = True

    @classmethod
    def of(cls, device: torch.device) -> DeviceFacts:
        """Ask torch and the installation."""
        nvidia = device.type == "cuda" and not torch.version.hip
        capability = torch.cuda.get_device_capability(device) if nvidia else None
        return cls(device.type, capability, find_spec("triton") is not None)


def explain(
    facts: DeviceFacts,
    subject: ModelSpeed,
    dense: ModelSpeed | None,
    layers: Iterable[LayerSpeed] = (),
    *,
    zeros: float,
) -> tuple[str, ...]:
    """Sentences on what holds a speed-up back; empty where nothing does.

    Args:
        facts: of the device.
        subject, dense: what was measured; dense is None where the model was measured alone.
        layers: the picks.
        zeros: fraction of zeros in the model's dense matrices.
    """
    if not subject.num_packed:
        return (_not_packed(zeros),)
    if facts.kind == "cpu":
        return (
            "On a CPU packed weights are expanded to dense at every call and multiplied densely: no sparse arithmetic is "
            "done, so packing saves memory and disk here, not time. `llmprune convert DIR --to dense` gives the fastest "
            "model for a CPU. These numbers say nothing about GPUs.",
        )
    pairs = pair(dense, subject)
    slow_decode = any(item.packed.phase == "decode" and not (item.clear and item.ratio > 1) for item in pairs)
    slow_prefill = any(item.packed.phase == "prefill" and not (item.clear and item.ratio > 1) for item in pairs)
    said = [_of_device(facts)]
    if slow_decode and dense is not None:
        said += [_launch_bound(dense), _few_packed(subject, dense)]
    if slow_prefill:
        said.append(
            "Prefill is compute-bound: arithmetic sets the time, not the weights read, and packed weights are made dense "
            "before a large product."
        )
    said.append(_picked_dense(layers))
    return tuple(filter(None, said))


def _not_packed(zeros: float) -> str:
    if zeros < 0.01:
        return "This model is dense: there is nothing sparse in it that could make it faster."
    return (
        f"This checkpoint stores its zeros ({100 * zeros:.0f} % of its matrices) in dense tensors, which brings neither speed "
        "nor memory: every zero is read and multiplied, and a difference to its dense original is noise. "
        "`llmprune convert DIR --to packed` packs it."
    )


def _of_device(facts: DeviceFacts) -> str:
    if facts.capability is None:
        return "No sparse tensor cores that packed weights could use are on this device: they are expanded to be multiplied."
    if not facts.has_triton:
        return "Triton is not installed, so PyTorch expands packed weights at every call: `pip install triton`."
    if facts.capability < SPARSE_CORES:
        major, minor = facts.capability
        return (
            f"This GPU has compute capability {major}.{minor}; sparse tensor cores came with 8.0. Packed weights are expanded "
            "in the kernel, which saves reading but not arithmetic."
        )
    return ""


def _launch_bound(dense: ModelSpeed) -> str:
    shares = [speed.copy_share for speed in dense.speeds if speed.phase == "decode" and speed.copy_share is not None]
    if not shares or shares[0] >= LAUNCH_BOUND:
        return ""
    return (
        f"Decode is launch-bound: the dense model reads its weights at {100 * shares[0]:.0f} % of this device's copy "
        "bandwidth, so fewer bytes cannot save much. Its layers are too small for this device."
    )


def _few_packed(subject: ModelSpeed, dense: ModelSpeed) -> str:
    share = 1 - (subject.weights_bytes - subject.packed_bytes) / dense.weights_bytes
    return f"Only {100 * share:.0f} % of the weights are packed; the rest is read in full." if share < FEW_PACKED else ""


def _picked_dense(layers: Iterable[LayerSpeed]) -> str:
    slower = [f"{layer.shape[0]} x {layer.shape[1]}" for layer in layers if layer.pick == "dense"]
    if not slower:
        return ""
    shown = ", ".join(slower[:4]) + (f" and {len(slower) - 4} more" if len(slower) > 4 else "")
    return f"Layers that are not faster packed at the fewest tokens, and better left dense: {shown}."
