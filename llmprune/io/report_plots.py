"""The plots of a report, by name: its page and the service's show the same ones. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmprune.io.course import Course
from llmprune.io.formats import brief, count, number, percent, rate, small, times
from llmprune.io.grid import MIN_COLOUR_RANGE, Grid, Group, Shade, make_grid
from llmprune.io.plots import Bars, Cell, Line, bars_svg, curve_svg, heat_svg
from llmprune.io.structure_text import front_course, search_course, widths_of
from llmprune.report import Benchmark, Latency, Report, Speed, StructureReport
from llmprune.speed import pair_speeds


@dataclass(frozen=True)
class Plot:
    """One plot: its name in addresses, a heading, what it shows in a sentence, and the SVG."""

    name: str
    title: str
    note: str
    svg: str


def plots_of(report: Report) -> dict[str, Plot]:
    """By name, in the order of reading; what was not measured has none."""
    grid = make_grid(report.blocks)
    found = [
        _sparsity(grid, report.config.sparsity) if grid.rows and not report.structure else None,
        _widths(report.structure) if report.structure else None,
        _errors(grid),
        _speed(report.latency) if report.latency else None,
        _benchmark(report.benchmark) if report.benchmark else None,
        _refinement(report),
        _allocation(report),
        *(_structure(report.structure) if report.structure else ()),
    ]
    return {plot.name: plot for plot in found if plot is not None}


def error_svg(points: Sequence[tuple[float, float]], num_blocks: int) -> str | None:
    """Output errors of blocks, (block, error); None below two."""
    label = f"Output error of {len(points)} of {num_blocks} blocks; the table has the numbers"
    lines = [Line("output error", points)]
    return curve_svg(lines, label=label, x_label="block", y_label="output error", x_text=_whole, y_text=small)


def course_svg(points: Sequence[tuple[float, float]], *, label: str, x: str, y: str, seconds: bool = False) -> str | None:
    """What something was brought down to, against steps or seconds; None below two points."""
    return curve_svg(
        [Line(y, points)], label=label, x_label=x, y_label=y, x_text=_seconds if seconds else _whole,
        y_text=lambda value: number(value, 4),
    )  # fmt: skip


def _whole(value: float) -> str:
    """A place on an axis of counts: no mark between two of them says more than its number."""
    return f"{value:,.6g}"


def _seconds(value: float) -> str:
    return brief(value) if 0 < value < 1 else f"{value:,.6g} s"


def _sparsity(grid: Grid, target: float) -> Plot:
    cells = [cell for row in grid.rows for cell in row.cells if cell is not None]
    shade = Shade.of([cell.sparsity for cell in cells], MIN_COLOUR_RANGE)
    lines = _lines(grid, lambda cell: Cell(shade.place(cell.sparsity), percent(cell.sparsity)))
    whole = [Cell(shade.place(row.block.sparsity), percent(row.block.sparsity)) for row in grid.rows]
    lowest, highest = (percent(pick(row.block.sparsity for row in grid.rows)) for pick in (min, max))
    svg = heat_svg(
        [*grid.labels, "all"], [f"block {row.block.index}" for row in grid.rows], [*lines, whole],
        label=f"Sparsity of each block and site, blocks from {lowest} to {highest}; the table has the numbers",
    )  # fmt: skip
    scale = f"{percent(shade.low, 1)} to {percent(shade.high, 1)}"
    return Plot(
        "sparsity", "Sparsity", f"Zeros of each site; the target is {percent(target)}, the colour runs from {scale}.", svg
    )


def _lines(grid: Grid, make: Callable[[Group], Cell | None]) -> list[list[Cell | None]]:
    """A row of the heat map for each column of the grid."""
    columns = zip(*(row.cells for row in grid.rows), strict=True)
    return [[None if cell is None else make(cell) for cell in column] for column in columns]


def _widths(structure: StructureReport) -> Plot | None:
    units, rows = widths_of(structure)
    if not rows:
        return None
    cells = [
        [
            None if module is None else Cell(module.sparsity, f"{count(module.num_kept)} of {count(module.num_groups)} left")
            for module in column
        ]
        for column in zip(*(row.modules for row in rows), strict=True)
    ]
    label = "What is gone of each block; the table has the numbers"
    svg = heat_svg([f"{unit}s" for unit in units], [f"block {row.block}" for row in rows], cells, label=label)
    return Plot("widths", "Structure", "Share of each block's groups that is gone: the darker, the more.", svg)


def _errors(grid: Grid) -> Plot | None:
    points = [(float(row.block.index), row.output_error) for row in grid.rows if row.output_error is not None]
    svg = error_svg(points, len(grid.rows))
    note = "Largest ||(W − W′)X||² / ||WX||² of each block's sites, on the calibration inputs."
    return Plot("errors", "Output error by layer", note, svg) if svg else None


def _speed(latency: Latency) -> Plot:
    groups = [
        Bars(_point(dense), [_rate(dense), _rate(pruned, dense)])
        for dense, pruned in pair_speeds(latency.dense, latency.pruned)
    ]
    label = "Tokens per second of the dense and the pruned model; the table has the numbers"
    note = f"Tokens per second on {latency.device}, medians; each pair has its own scale."
    return Plot("speed", "Speed", note, bars_svg(groups, ("dense", "pruned"), label=label))


def _benchmark(benchmark: Benchmark) -> Plot | None:
    if benchmark.dense is None:
        return None
    pairs = pair_speeds(benchmark.dense.speeds, benchmark.subject.speeds)
    groups = [Bars(_point(dense), [_rate(dense), _rate(packed, dense)]) for dense, packed in pairs]
    label = "Tokens per second of the dense and the packed model; the table has the numbers"
    note = f"Tokens per second on {benchmark.environment.device}, medians; each pair has its own scale."
    return Plot("packed-speed", "Speed, packed", note, bars_svg(groups, ("dense", "packed"), label=label))


def _point(speed: Speed) -> str:
    sizes = f"batch {speed.batch_size}"
    return f"{speed.phase}, {sizes}, {count(speed.num_tokens)}"


def _rate(speed: Speed | None, dense: Speed | None = None) -> tuple[float, str] | None:
    if speed is None:
        return None
    ratio = f" ({times(speed.tokens_per_second / dense.tokens_per_second)})" if dense and dense.tokens_per_second else ""
    return speed.tokens_per_second, f"{rate(speed.tokens_per_second)}{ratio}"


def _refinement(report: Report) -> Plot | None:
    refinement = report.refinement
    if refinement is None:
        return None
    points = [(point.seconds, point.loss) for point in refinement.points]
    svg = course_svg(points, label="Held-out loss against seconds", x="seconds", y="held-out loss", seconds=True)
    held_out = f"{count(refinement.num_held_out)} calibration sequences that judged the steps"
    return Plot("refinement", "Refinement", f"Mean cross-entropy on the {held_out}, against seconds.", svg) if svg else None


def _allocation(report: Report) -> Plot | None:
    search = report.allocation.search if report.allocation else None
    if search is None:
        return None
    points = [(float(generation), kl) for generation, kl in search.curve]
    if points and points[-1][0] < search.generations:
        points.append((float(search.generations), points[-1][1]))
    svg = course_svg(points, label="KL of the best allocation against generations", x="generations", y="KL from dense")
    note = f"KL from the dense model of the best allocation found, on {count(search.num_tokens)} calibration tokens."
    return Plot("allocation", "Search of the allocation", note, svg) if svg else None


def _structure(structure: StructureReport) -> list[Plot | None]:
    search, front = search_course(structure), front_course(structure)
    return [
        _of_course(search, "search", "Search", "KL against generations", "generations",
                   "KL from the dense model on the calibration tokens that judge the candidates, against generations."),
        _of_course(front, "front", "Size against divergence", "KL against parameters taken out", "parameters taken out",
                   "What dynamic programming makes of other budgets, from the curves that were measured before the search: an "
                   "estimate of what a smaller or a larger model would cost in KL."),
    ]  # fmt: skip


def _of_course(course: Course | None, name: str, title: str, label: str, x: str, note: str) -> Plot | None:
    svg = course_svg(course.points, label=label, x=x, y="KL from dense") if course else None
    return Plot(name, title, note, svg) if svg else None
