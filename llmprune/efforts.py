"""Presets a user can remember: how much time a job may take for a better model. One line of the table each. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Effort:
    """One preset: the config fields it sets where the user does not.

    Attributes:
        name: what the user types.
        summary: one sentence.
        fields: for every pattern.
        unstructured: more of them, where zeros may lie anywhere.
        n_to_m: more of them for the other patterns.
    """

    name: str
    summary: str
    fields: dict[str, Any]
    unstructured: dict[str, Any] = field(default_factory=dict)
    n_to_m: dict[str, Any] = field(default_factory=dict)

    def of(self, pattern: str) -> dict[str, Any]:
        """The fields for a pattern."""
        return self.fields | (self.unstructured if pattern == "unstructured" else self.n_to_m)


_TABLE = (
    Effort("fast", "SparseGPT in one pass.", {"method": "sparsegpt", "sequential": "group"}),
    Effort("balanced", "ALPS, then each block tuned against the dense model.", {"method": "alps", "reconstruct": True}),
    Effort(
        "best", "ALPS with each block pruned and tuned in rounds, for n:m after its channels are put in order.",
        {"method": "alps", "reconstruct": True, "reconstruct_steps": 240},
        unstructured={"reconstruct_rounds": 3}, n_to_m={"reconstruct_rounds": 2, "permute": True},
    ),
)  # fmt: skip
EFFORTS: dict[str, Effort] = {effort.name: effort for effort in _TABLE}
