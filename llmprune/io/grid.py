"""The sites of a report as a grid of blocks x columns, and values as shades of its cells. Torch-free."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.report import BlockReport, SiteReport

MIN_COLOUR_RANGE = 0.1


@dataclass(frozen=True)
class Group:
    """The sites of one block that share a column: one matrix, or a parameter's experts."""

    sites: tuple[SiteReport, ...]

    @property
    def num_weights(self) -> int:
        """Weights of all sites."""
        return sum(site.numel for site in self.sites)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return sum(site.num_zeros for site in self.sites) / max(self.num_weights, 1)

    @property
    def output_error(self) -> float | None:
        """The worst of the experts'."""
        return max((site.output_error for site in self.sites if site.output_error is not None), default=None)


@dataclass(frozen=True)
class Row:
    """One block of the table: a cell per column, None where the block has no such pruned site."""

    block: BlockReport
    cells: tuple[Group | None, ...]

    @property
    def output_error(self) -> float | None:
        """The largest error of the row's cells, where any was measured."""
        errors = [cell.output_error for cell in self.cells if cell is not None and cell.output_error is not None]
        return max(errors, default=None)


@dataclass(frozen=True)
class Grid:
    """All sites as blocks x columns; a column is labelled by the shortest ending of its path that no other has."""

    labels: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def totals(self) -> list[tuple[str, Group]]:
        """(label, its sites in all blocks) per column."""
        columns = zip(*(row.cells for row in self.rows), strict=True)
        merged = [Group(tuple(site for cell in column if cell for site in cell.sites)) for column in columns]
        return list(zip(self.labels, merged, strict=True))


def make_grid(blocks: Sequence[BlockReport]) -> Grid:
    """Arrange the sites of all blocks."""
    grouped = [_columns(block) for block in blocks]
    paths = tuple(dict.fromkeys(path for columns in grouped for path in columns))
    rows = (
        Row(block, tuple(Group(tuple(columns[path])) if path in columns else None for path in paths))
        for block, columns in zip(blocks, grouped, strict=True)
    )
    return Grid(_shortest_labels(paths), tuple(rows))


def _columns(block: BlockReport) -> dict[str, list[SiteReport]]:
    """The block's sites by path inside the block, expert indices taken out."""
    local = [(site.name.removeprefix(f"{block.name}."), site) for site in block.sites]
    siblings = Counter((name.rpartition(".")[0], site.shape) for name, site in local if _ends_in_index(name))
    columns: dict[str, list[SiteReport]] = {}
    for name, site in local:
        index = _expert_position(name, is_slice=siblings[name.rpartition(".")[0], site.shape] > 1)
        parts = name.split(".")
        path = name if index is None else ".".join(parts[:index] + parts[index + 1 :])
        columns.setdefault(path, []).append(site)
    return columns


def _ends_in_index(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()


def _expert_position(name: str, *, is_slice: bool) -> int | None:
    """Which part of a name is the expert's index: a number after ``experts``, or the last part of a 3-D parameter's."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit() and any("expert" in before for before in parts[:position]):
            return position
    return len(parts) - 1 if is_slice and _ends_in_index(name) else None


def _shortest_labels(paths: Sequence[str]) -> tuple[str, ...]:
    uses = Counter(ending for path in paths for ending in _endings(path))
    return tuple(next((ending for ending in _endings(path) if uses[ending] == 1), path) for path in paths)


def _endings(path: str) -> list[str]:
    """``a.b.c`` as c, b.c, a.b.c."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


@dataclass(frozen=True)
class ExpertTokens:
    """How many calibration tokens each expert of a block saw; parameters with the same counts share an entry."""

    labels: tuple[str, ...]
    tokens: tuple[tuple[int, int], ...]

    @property
    def num_unseen(self) -> int:
        """Experts that no calibration token reached."""
        return sum(tokens == 0 for _, tokens in self.tokens)


def expert_tokens(grid: Grid, row: Row) -> list[ExpertTokens]:
    """The token counts of a block's experts, for every column that holds more than one site."""
    found: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for label, cell in zip(grid.labels, row.cells, strict=True):
        if cell is not None and len(cell.sites) > 1:
            tokens = tuple((_expert_index(site.name, row.block.name), site.num_tokens) for site in cell.sites)
            found.setdefault(tokens, []).append(label)
    return [ExpertTokens(tuple(labels), tokens) for tokens, labels in found.items()]


def _expert_index(name: str, block: str) -> int:
    local = name.removeprefix(f"{block}.")
    position = _expert_position(local, is_slice=True)
    assert position is not None, name
    return int(local.split(".")[position])


@dataclass(frozen=True)
class Shade:
    """Values mapped to 0..1 for the colour of a cell; equal values stay in the middle of the scale."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], min_range: float) -> Shade:
        """The scale of ``values``, at least ``min_range`` wide."""
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        spare = max(0.0, min_range - (max(finite) - min(finite))) / 2
        return cls(min(finite) - spare, max(finite) + spare)

    def place(self, value: float) -> float:
        """Where a value lies on the scale, 0 to 1."""
        if not math.isfinite(value):
            return 1.0
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5

    def __call__(self, value: float) -> str:
        """The place for a style attribute."""
        return "0.5" if self.high == self.low and math.isfinite(value) else f"{self.place(value):.2f}"
