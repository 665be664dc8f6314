"""What was taken out whole, in words and rows, for the terminal, the page and the card. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.io.course import Course
from llmprune.report import StructureReport
from llmprune.structure import ModuleReport

MAX_SHOWN_KL = 2.0
"""Nats; beyond it the front's curve ends."""


@dataclass(frozen=True)
class Removed:
    """One kind of what goes whole: how many there were and how many are left."""

    unit: str
    num_before: int
    num_kept: int

    @property
    def sparsity(self) -> float:
        """Share that is gone."""
        return 1 - self.num_kept / self.num_before if self.num_before else 0.0


def removed_units(structure: StructureReport, num_blocks: int) -> list[Removed]:
    """One entry for each kind of unit, in the order they appear in a block."""
    if structure.structure == "blocks":
        return [Removed("blocks", num_blocks, num_blocks - len(structure.blocks_removed))]
    units = dict.fromkeys(module.unit for module in structure.modules)
    return [
        Removed(
            f"{unit}s",
            sum(module.num_groups for module in structure.modules if module.unit == unit),
            sum(module.num_kept for module in structure.modules if module.unit == unit),
        )
        for unit in units
    ]


def structure_line(structure: StructureReport, num_blocks: int) -> str:
    """What went and what is left, in one sentence."""
    gone = ", ".join(
        f"{item.num_before - item.num_kept:,} of {item.num_before:,} {item.unit}"
        for item in removed_units(structure, num_blocks)
    )
    share = f"{100 * structure.sparsity_of_model:.2f} %"
    line = f"Taken out: {gone or 'nothing'}; {structure.num_parameters:,} parameters left, {share} fewer"
    if structure.kv_bytes_dense and structure.kv_bytes is not None:
        line += f"; KV cache {structure.kv_bytes_dense:,} -> {structure.kv_bytes:,} bytes a token"
    return line


def search_line(structure: StructureReport) -> str | None:
    """What the search gained and what it cost; None where there was none."""
    done = [one for one in structure.iterations if one.curve]
    if not done:
        return None
    most = max(done, key=lambda one: one.supernet_bytes)
    where = "on disk" if most.supernet_on_disk else "in memory"
    seconds = [one.generation_seconds for one in done if one.generation_seconds is not None]
    pace = f", {max(seconds):.1f} s each" if seconds else ""
    supernets = "1 supernet" if len(done) == 1 else f"{len(done)} supernets"
    return (
        f"Searched: KL {done[0].curve[0][1]:.4f} -> {done[-1].curve[-1][1]:.4f} on calibration tokens; {supernets} "
        f"of up to {most.supernet_bytes / 1e6:,.1f} MB {where}, {sum(one.num_generations for one in done)} generations{pace}, "
        f"{sum(one.num_evaluated for one in done):,} candidates"
    )


@dataclass(frozen=True)
class Widths:
    """One block's modules by unit, None where it has no such module."""

    block: int
    modules: tuple[ModuleReport | None, ...]


def widths_of(structure: StructureReport) -> tuple[list[str], list[Widths]]:
    """A column for each unit, a row for each block."""
    units = list(dict.fromkeys(module.unit for module in structure.modules))
    blocks = sorted({module.block for module in structure.modules})
    found = {(module.block, module.unit): module for module in structure.modules}
    return [str(unit) for unit in units], [Widths(block, tuple(found.get((block, unit)) for unit in units)) for block in blocks]


def search_course(structure: StructureReport) -> Course | None:
    """The search's KL against generations, its supernets one after the other."""
    points: list[tuple[float, float]] = []
    start = 0
    for one in structure.iterations:
        points += [(start + generation, kl) for generation, kl in one.curve]
        start += one.num_generations
        if one.curve:
            points.append((start, one.curve[-1][1]))
    return Course.through(points)


def front_course(structure: StructureReport) -> Course | None:
    """Measured KL, predicted where it was not, against parameters taken out, as far as the model is of any use."""
    most = max((point.num_parameters for point in structure.front), default=0)
    points: Sequence[tuple[float, float]] = sorted(
        (most - point.num_parameters, point.kl_predicted if point.kl_measured is None else point.kl_measured)
        for point in structure.front
    )
    return Course.through([point for point in points if point[1] <= MAX_SHOWN_KL])
