"""What a terminal shows: the report as compact tables, and one progress bar per stage. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from llmprune.continuations import Continuations
from llmprune.events import (
    BlockFinished,
    BlockStarted,
    Event,
    PointFinished,
    PointStarted,
    Progress,
    Stage,
    StageFinished,
    StageStarted,
    Warned,
)
from llmprune.io.course import refinement_line
from llmprune.io.render import (
    NOTHING,
    change_of,
    count,
    duration,
    number,
    percent,
    permutation_line,
    rate,
    recipe,
    reconstruction_line,
    size,
    small,
    statistics_lines,
    target_percent,
    times,
    verdict_parts,
    with_error,
)
from llmprune.io.structure_text import latency_line, removed_units, search_line
from llmprune.report import Latency, Packed, Report, Speed, StructureReport, TaskReport
from llmprune.speed import overlap, pair_speeds
from llmprune.speed_tables import print_benchmark
from llmprune.terminal import add_row, make_table
from llmprune.terminal import printable as printable

LABELS: dict[Stage, str] = {
    "fetch": "Downloading",
    "load": "Loading model",
    "calibration": "Calibration text",
    "dense": "Measuring dense model",
    "allocate": "Sharing sparsity",
    "prune": "Pruning blocks",
    "structure": "Choosing what goes",
    "refine": "Refining the mask",
    "reconstruct": "Tuning kept weights",
    "pruned": "Measuring pruned model",
    "save": "Writing checkpoint",
    "benchmark": "Measuring speed",
    "generate": "Writing",
    "convert": "Converting weights",
    "recover": "Training kept weights",
}
STYLES = {"good": "bold green", "degraded": "bold yellow", "broken": "bold red", "unmeasured": "bold"}
PLAIN_STEP = 0.1
_TOLD: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("sparsity", "sparsity", percent), ("perplexity", "perplexity", number), ("kl", "KL", small)
)  # fmt: skip


def print_report(report: Report, console: Console) -> None:
    """Print verdict, quality, sparsity, speed and stages; fits 80 columns."""
    word, sentence = verdict_parts(report.verdict)
    config = report.config
    title = f"{report.model.name}: {recipe(config)}, {config.pattern}, target {target_percent(config.sparsity)}"
    console.print(Text(printable(title), style="bold"))
    console.print(Text.assemble((word, STYLES[report.verdict.status]), ". ", printable(sentence)))
    if report.quality:
        console.print(_quality(report))
    console.print(_structure(report, report.structure) if report.structure else _sparsity(report))
    for line in (search_line(report.structure), latency_line(report.structure)) if report.structure else ():
        if line:
            console.print(Text(line))
    if report.refinement:
        console.print(Text(refinement_line(report.refinement, duration(report.refinement.seconds))))
    for line in (*statistics_lines(report), permutation_line(report), reconstruction_line(report)):
        if line:
            console.print(Text(line))
    if report.tasks:
        print_tasks(report.tasks, console)
    if report.continuations:
        _print_writing(report.continuations, console)
    if report.latency:
        console.print(_speed(report.latency))
        if report.latency.note:
            console.print(Text(printable(report.latency.note), style="dim"))
    if report.benchmark:
        print_benchmark(report.benchmark, console)
    if report.stages:
        console.print(_stages(report))
    for warning in report.warnings:
        console.print(_warning(warning))
    if report.packed:
        console.print(_packed_line(report.packed))
    if report.out is not None:
        where = (printable(report.out), "bold")
        console.print(Text.assemble("Written to ", where, f", {size(report.checkpoint_bytes)}"), overflow="fold")


def _packed_line(packed: Packed) -> Text:
    formats = f"{count(packed.num_two_four)} as 2:4, {count(packed.num_bitmask)} as bitmask"
    ratio = f", in {percent(packed.ratio, 1)} of their dense bytes" if packed.ratio is not None else ""
    return Text(f"Packed {count(packed.num_sites)} matrices ({formats}){ratio}")


def _quality(report: Report) -> Table:
    table = make_table("Perplexity", "seq_len", "dense", "pruned", "ratio", "KL", "top-1")
    for item in report.quality:
        add_row(
            table,
            item.text.source,
            str(item.text.seq_len),
            number(item.perplexity_dense),
            number(item.perplexity_pruned),
            times(item.ratio),
            number(item.kl, 4),
            percent(item.top1_agreement),
        )
    return table


def _sparsity(report: Report) -> Table:
    table = make_table("Sparsity", "zeros", "weights", "fraction")
    sites = [site for block in report.blocks for site in block.sites]
    num_zeros, numel = sum(site.num_zeros for site in sites), sum(site.numel for site in sites)
    add_row(table, f"{count(report.num_sites)} pruned sites", count(num_zeros), count(numel), percent(report.sparsity))
    model = report.model.num_parameters
    if report.allocation:
        lowest, highest = percent(report.allocation.min_sparsity), percent(report.allocation.max_sparsity)
        add_row(table, f"  {report.allocation.name}, per matrix", "", "", f"{lowest} - {highest}")
        for pattern, num_sites in Counter(report.allocation.patterns.values()).most_common():
            add_row(table, f"  {pattern}", "", "", f"{num_sites} sites")
        if search := report.allocation.search:
            add_row(table, "  KL of the allocation, dp and found", "", "", f"{search.kl_start:.4f} - {search.kl_end:.4f}")
    add_row(table, "whole model", count(report.num_zeros_model), count(model), percent(report.sparsity_of_model))
    return table


def _structure(report: Report, structure: StructureReport) -> Table:
    table = make_table("Taken out", "before", "now", "fraction")
    for item in removed_units(structure, report.model.num_blocks):
        add_row(table, item.unit, count(item.num_before), count(item.num_kept), percent(item.sparsity))
    before, now = structure.num_removable, structure.num_removable - structure.num_removed
    add_row(table, "parameters of all that could go", count(before), count(now), percent(structure.sparsity))
    before, now = structure.num_parameters_dense, structure.num_parameters
    add_row(table, "parameters of the model", count(before), count(now), percent(structure.sparsity_of_model))
    if structure.kv_bytes_dense and structure.kv_bytes is not None:
        gone = percent(1 - structure.kv_bytes / structure.kv_bytes_dense)
        add_row(table, "KV cache, bytes a token", count(structure.kv_bytes_dense), count(structure.kv_bytes), gone)
    return table


def print_tasks(tasks: TaskReport, console: Console) -> None:
    """One row for each metric; a model evaluated alone has one column of scores."""
    compared = any(score.dense is not None for score in tasks.scores)
    table = make_table("Task", "metric", "n", *(("dense", "pruned", "change") if compared else ("score",)))
    for score in tasks.scores:
        cells = [with_error(score.pruned, score.pruned_stderr)]
        if compared:
            cells = [with_error(score.dense, score.dense_stderr), *cells, change_of(score)]
        add_row(table, score.task, score.metric, NOTHING if score.num_samples is None else count(score.num_samples), *cells)
    console.print(table)
    if tasks.limit:
        console.print(Text(f"The first {count(tasks.limit)} examples of each task: for trying, not for quoting.", style="dim"))


def _print_writing(writing: Continuations, console: Console) -> None:
    table = make_table("Continuations", "distinct-1", "distinct-2", "distinct-3", "repeated", "longest loop")
    for name, item in (("dense", writing.diversity_dense), ("pruned", writing.diversity_pruned)):
        if item is not None:
            shares = (number(share, 3) for share in (item.distinct_1, item.distinct_2, item.distinct_3))
            add_row(table, name, *shares, percent(item.repeated, 1), f"{item.longest_loop} tokens")
    if table.row_count:
        console.print(table)
    style = "yellow" if writing.verdict.status == "degenerate" else "dim"
    console.print(Text(printable(writing.verdict.text), style=style))


def _speed(latency: Latency) -> Table:
    table = make_table("Tokens per second", "batch", "tokens", "dense", "pruned", "ratio")
    for dense, pruned in pair_speeds(latency.dense, latency.pruned):
        sizes = (str(dense.batch_size), count(dense.num_tokens))
        add_row(table, dense.phase, *sizes, rate(dense.tokens_per_second), *_pruned_speed(dense, pruned))
    return table


def _pruned_speed(dense: Speed, pruned: Speed | None) -> tuple[str, str]:
    """Speed and ratio; ``~`` marks a ratio within the spread of the runs."""
    if pruned is None or not dense.tokens_per_second:
        return NOTHING, NOTHING
    ratio = times(pruned.tokens_per_second / dense.tokens_per_second)
    return rate(pruned.tokens_per_second), ("~" if overlap(dense, pruned) else "") + ratio


def _stages(report: Report) -> Table:
    table = make_table("Stage", "time", "peak CPU", "peak GPU")
    labels = {str(stage): label for stage, label in LABELS.items()}
    for stage in report.stages:
        label = labels.get(stage.name, stage.name)
        add_row(table, label, duration(stage.seconds), size(stage.peak_cpu_bytes), size(stage.peak_gpu_bytes))
    add_row(table, "all", duration(report.seconds), "", "")
    return table


def _point_line(event: PointFinished) -> Text:
    """What came of one job among many."""
    point = event.point
    name = printable(point.name)
    if point.error is not None:
        return Text.assemble((f"{name}: failed: ", "red"), printable(point.error))
    told = [f"{label} {form(point.values[key])}" for key, label, form in _TOLD if key in point.values]
    taken = "done before" if event.reused else duration(point.seconds)
    return Text(f"{name}: {', '.join([*told, taken])}")


def _warning(message: str) -> Text:
    return Text.assemble(("Warning: ", "yellow"), printable(message))


class ProgressView:
    """Draws the events of a running job on stderr: bars on a terminal, plain lines elsewhere.

    Use as ``with ProgressView() as view: ... view.handle(event)``; leaving the block gives the terminal back.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        kind: type[_BarView | _LineView] = _BarView if self.console.is_terminal else _LineView
        self._view = kind(self.console)

    def __enter__(self) -> Self:
        self._view.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._view.stop()

    def handle(self, event: Event) -> None:
        """Show one event; events that say nothing new to a reader are ignored."""
        match event:
            case StageStarted():
                self._view.begin(event.stage, event.total, event.resumed_at)
            case Progress():
                self._view.advance(event.stage, event.done, event.total, event.detail)
            case BlockStarted():
                self._view.advance("prune", event.block, event.num_blocks, event.name)
            case BlockFinished():
                self._view.advance("prune", event.block + 1, event.num_blocks, event.report.name)
            case StageFinished():
                self._view.end(event.stage, event.seconds)
            case PointStarted():
                self._view.point(event.name, event.index, event.total)
            case PointFinished():
                self.console.print(_point_line(event), soft_wrap=True)
            case Warned():
                self.console.print(_warning(event.message))
            case _:
                pass


class _Remaining(ProgressColumn):
    """Time left while a stage runs; what it took once it is over."""

    def __init__(self) -> None:
        super().__init__()
        self._left = TimeRemainingColumn(compact=True)

    def render(self, task: Task) -> Text:
        taken: float | None = task.fields["seconds"]
        return self._left.render(task) if taken is None else Text(duration(taken), style="green")


class _BarView:
    """One bar per stage, drawn by rich."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            _Remaining(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
            console=console,
        )
        self._tasks: dict[Stage, TaskID] = {}
        self._points: TaskID | None = None

    def start(self) -> None:
        self._bars.start()

    def stop(self) -> None:
        self._bars.stop()

    def begin(self, stage: Stage, total: int, resumed_at: int) -> None:
        detail = f"resumed at {resumed_at}" if resumed_at else ""
        # A total of None makes the bar pulse until a Progress event brings the number.
        self._tasks[stage] = self._bars.add_task(
            LABELS[stage], total=total or None, completed=resumed_at, detail=detail, seconds=None
        )

    def point(self, name: str, index: int, total: int) -> None:
        """Another job begins: its stages take the place of the last one's."""
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks = {}
        if self._points is None:
            self._points = self._bars.add_task("Jobs", total=total or None, detail="", seconds=None)
        self._bars.update(self._points, completed=index, total=total or None, detail=printable(name))

    def advance(self, stage: Stage, done: int, total: int, detail: str) -> None:
        if stage not in self._tasks:
            self.begin(stage, total, 0)
        shown = printable(detail)
        self._bars.update(self._tasks[stage], completed=done, total=total or None, detail=shown)

    def end(self, stage: Stage, seconds: float) -> None:
        if stage not in self._tasks:
            self.begin(stage, 0, 0)
        task = next(task for task in self._bars.tasks if task.id == self._tasks[stage])
        total = task.total or 1
        self._bars.update(task.id, completed=total, total=total, detail="", seconds=seconds)


class _LineView:
    """A line per stage begun and ended, and one for about every tenth of it, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[Stage, float] = {}

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def begin(self, stage: Stage, total: int, resumed_at: int) -> None:
        self._shown[stage] = resumed_at / total if total else 0.0
        self._print(stage, f"resumed at {resumed_at}/{total}" if resumed_at else "started")

    def point(self, name: str, index: int, total: int) -> None:
        of = f" of {total}" if total else ""
        self._console.print(Text(f"Job {index + 1}{of}: {printable(name)}"), soft_wrap=True)

    def advance(self, stage: Stage, done: int, total: int, detail: str) -> None:  # noqa: ARG002
        """Print where a tenth was passed since the last line; the end of the stage has a line of its own."""
        fraction = done / total if total else 0.0
        if fraction < 1 and fraction - self._shown.get(stage, 0.0) >= PLAIN_STEP - 1e-9:
            self._shown[stage] = fraction
            self._print(stage, f"{done}/{total} ({percent(fraction, 0)})")

    def end(self, stage: Stage, seconds: float) -> None:
        self._print(stage, f"done in {duration(seconds)}")

    def _print(self, stage: Stage, text: str) -> None:
        self._console.print(Text(f"{LABELS[stage]}: {text}"), soft_wrap=True)
