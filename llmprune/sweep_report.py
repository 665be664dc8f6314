"""What came of many jobs on one model: :class:`Comparison` and :class:`SweepReport`. Torch-free."""

from __future__ import annotations

from typing import Literal

from llmprune.spec import PruneConfig
from llmprune.speed import Part
from llmprune.sweep_spec import SweepConfig

PointStatus = Literal["done", "failed"]


class PointReport(Part):
    """One job among others.

    ``values`` are its numbers by axis (:data:`llmprune.io.pareto.AXES`), ``group`` the series that it belongs to. ``directory``
    holds its report, and the checkpoint where ``kept``. ``text`` is the sha256 of the first evaluation text: perplexities on
    different ones are not compared. ``error`` says why it failed.
    """

    name: str
    status: PointStatus = "done"
    config: PruneConfig
    group: str = ""
    values: dict[str, float] = {}
    on_front: bool = False
    directory: str | None = None
    kept: bool = False
    text: str | None = None
    seconds: float = 0.0
    error: str | None = None


class Comparison(Part):
    """Several models: the axes ``x`` and ``y`` of the plot and the front, the fields their jobs differ in, and what to mind."""

    points: tuple[PointReport, ...]
    x: str
    y: str
    differing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class SweepReport(Comparison):
    """All points of a sweep, those of earlier calls on the same directory included; the schema of ``sweep.json``."""

    config: SweepConfig
    out: str

    @property
    def num_failed(self) -> int:
        """Points that ended in an error."""
        return sum(point.status == "failed" for point in self.points)
