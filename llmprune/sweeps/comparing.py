"""``llmprune compare``: finished checkpoints side by side, from the reports beside their weights. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmprune.errors import ConfigError
from llmprune.io.exports import REPORT, read_report
from llmprune.io.pareto import AXES
from llmprune.sweep_report import Comparison
from llmprune.sweeps.points import comparison, done_point


def compare(*directories: str | Path, x: str | None = None, y: str | None = None) -> Comparison:
    """The reports of finished checkpoints as points, with those marked that no other beats.

    Args:
        directories: of ``llmprune prune --out``, or of a sweep, which stands for all its points.
        x: axis of the front, by name (:data:`llmprune.io.pareto.AXES`); chosen by what differs where not given.
        y: the other axis, likewise.

    Raises:
        ConfigError: nothing to compare, the same directory twice, one without a report, or an unknown axis.
    """
    for axis in (x, y):
        if axis is not None and axis not in AXES:
            raise ConfigError(f"axis {axis!r} is unknown; known axes: {', '.join(AXES)}.")
    folders = [folder for given in directories for folder in _folders(Path(given))]
    if not folders:
        raise ConfigError("nothing to compare: give the directories of finished checkpoints.")
    resolved = [folder.resolve() for folder in folders]
    if twice := next((folder for folder in resolved if resolved.count(folder) > 1), None):
        raise ConfigError(f"{twice} is given twice. Give every directory once.")
    reports = [read_report(folder) for folder in folders]
    points = [
        done_point(report, name, directory=str(folder), kept=has_weights(folder))
        for report, name, folder in zip(reports, _names(resolved), folders, strict=True)
    ]
    return comparison(points, x, y)


def has_weights(folder: Path) -> bool:
    """Whether the checkpoint is there, and not its report alone."""
    return any(folder.glob("*.safetensors"))


def _folders(given: Path) -> list[Path]:
    """The directory, or of a sweep the directories of its points."""
    if (given / REPORT).is_file() or not (given / "sweep.json").is_file():
        return [given]
    return sorted(file.parent for file in given.glob(f"*/{REPORT}"))


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = [str(Path(*folder.parts[-length:])) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
