"""What came of many jobs on one model: :class:`Comparison`, :class:`SweepReport` and :class:`AutoReport`. Torch-free."""

from __future__ import annotations

from typing import Literal

from llmprune.spec import PruneConfig
from llmprune.speed import Part
from llmprune.sweep_spec import AutoConfig, SweepConfig

PointStatus = Literal["done", "failed"]
TrialKind = Literal["proxy", "confirmed"]


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


class Trial(Part):
    """One job of a search: on a few windows (``proxy``), or on the whole text (``confirmed``).

    ``measured`` are the quantities that budgets bound (``perplexity_increase`` and ``kl`` of the worst text, ``speedup``,
    ``size``); ``unseen`` is the quality on the windows of a confirmation that the search had not looked at. ``missed`` are the
    budgets that they break: all, where the job failed.
    """

    kind: TrialKind
    point: PointReport
    measured: dict[str, float] = {}
    unseen: dict[str, float] = {}
    missed: tuple[str, ...] = ()

    @property
    def worst(self) -> dict[str, float]:
        """What is held against the budgets: of quality the worse of all windows and of those that were not seen."""
        return self.measured | {key: max(value, self.measured[key]) for key, value in self.unseen.items()}


class AutoReport(Part):
    """What a search found and all that it tried; the schema of ``auto.json``.

    ``best`` is None where nothing met the budget; ``nearest`` is what came closest then. ``binding`` are the budgets that the
    next step beyond the best one breaks. ``objective``: what of the models within the budget the best one is best in.
    """

    config: AutoConfig
    objective: Literal["sparsity", "kl"]
    best: Trial | None
    nearest: Trial | None = None
    binding: tuple[str, ...] = ()
    trials: tuple[Trial, ...]
    tried: Comparison
    text: str
    out: str
    seconds: float
