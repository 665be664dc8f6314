"""``llmprune sweep``, ``auto`` and ``compare``: many settings at once, the best within a budget, checkpoints side by side."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from llmprune.cli_options import (
    EventsFile,
    Json,
    check_streams,
    config_fields,
    error_console,
    event_sink,
    follow,
    heavy_imports,
    print_json,
)
from llmprune.console import printable
from llmprune.errors import ConfigError, OutputError, one_line
from llmprune.events import Searched, Swept
from llmprune.io.pareto import AXES, columns
from llmprune.sweep_report import AutoReport, Comparison, SweepReport
from llmprune.sweep_spec import FIELD_OF, MAX_POINTS, AutoConfig, SweepConfig, values_of
from llmprune.sweeps.budget import LABELS, QUANTITIES, quantity_text
from llmprune.sweeps.comparing import compare as compare_reports
from llmprune.sweeps.page import FORMATS, STAR, field_text, render
from llmprune.sweeps.points import plotted
from llmprune.terminal import add_row, make_table

OWN = {*FIELD_OF.values(), "out", "resume", "export_report", "num_gpus", "events", "as_json"}
"""Options of ``llmprune prune`` that a command for many jobs has otherwise, or not at all."""


def with_options_of(prune: Callable[..., None], command: Callable[..., None]) -> Callable[..., None]:
    """Put the options of ``llmprune prune`` that all jobs share in place of the command's ``**config``."""
    shared = [option for name, option in inspect.signature(prune, eval_str=True).parameters.items() if name not in OWN]
    own = [
        option
        for option in inspect.signature(command, eval_str=True).parameters.values()
        if option.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    model, *rest = shared
    options = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in (model, *own, *rest)]
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return command


def axis_option(field: str, *names: str, kind: type[SweepConfig] | type[AutoConfig] = SweepConfig) -> Any:
    """An option of several values, described by the field."""
    return typer.Option(*names, help=f"{kind.model_fields[field].description} Separated by commas.", show_default=False)


def _auto_option(field: str) -> Any:
    """An option of a search, described by its field."""
    info = AutoConfig.model_fields[field]
    return typer.Option(f"--{field.replace('_', '-')}", help=info.description, show_default=str(info.default or False))


def sweep(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the sweep, new or of one that is to go on or grow.")],
    methods: Annotated[str | None, axis_option("methods", "--methods", "-m")] = None,
    patterns: Annotated[str | None, axis_option("patterns", "--patterns", "-p")] = None,
    sparsities: Annotated[str | None, axis_option("sparsities", "--sparsities", "-s")] = None,
    allocations: Annotated[str | None, axis_option("allocations", "--allocations")] = None,
    efforts: Annotated[str | None, axis_option("efforts", "--efforts")] = None,
    keep: Annotated[
        str, typer.Option("--keep", help="Checkpoints to keep: all, best (those that no other beats) or none; reports stay.")
    ] = "all",
    max_points: Annotated[int, typer.Option("--max-points", min=1, help="Refuse a sweep of more points.")] = MAX_POINTS,
    events: EventsFile = None,
    as_json: Json = False,
    **config: Any,
) -> None:
    """Prune MODEL with every combination of methods, patterns and sparsities, and show what each is worth.

    Each point is an ordinary job in DIR/<point>/; statistics are shared. The same command goes on where it was stopped, and one
    with other points adds them. Exit code 1 where a point failed.
    """
    check_streams(events, as_json)
    with event_sink(events) as sink:
        axes = {
            "methods": values_of(methods), "patterns": values_of(patterns), "sparsities": fractions_of(sparsities),
            "allocations": values_of(allocations), "efforts": values_of(efforts),
        }  # fmt: skip
        with heavy_imports():
            from llmprune.sweeps.running import sweep_iter
        fields = config_fields(config)
        run = sweep_iter(out=out, keep=keep, max_points=max_points, **fields, **axes)  # type: ignore[arg-type]
        last = follow(run, sink, interrupted="Interrupted. Finished points are kept: the same command goes on.")
    assert isinstance(last, Swept)
    if as_json:
        print_json(last.sweep)
    elif events != "-":
        print_sweep(last.sweep, Console())
    if last.sweep.num_failed:
        error_console.print(f"{last.sweep.num_failed} of {len(last.sweep.points)} points failed.", style="red", markup=False)
        raise typer.Exit(1)


def auto(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="New directory for the checkpoint of the best model.")],
    max_perplexity_increase: Annotated[str | None, _auto_option("max_perplexity_increase")] = None,
    max_kl: Annotated[float | None, _auto_option("max_kl")] = None,
    min_speedup: Annotated[float | None, _auto_option("min_speedup")] = None,
    max_size: Annotated[str | None, _auto_option("max_size")] = None,
    speed_of: Annotated[str | None, _auto_option("speed_of")] = None,
    methods: Annotated[str | None, axis_option("methods", "--methods", "-m", kind=AutoConfig)] = None,
    patterns: Annotated[str | None, axis_option("patterns", "--patterns", "-p", kind=AutoConfig)] = None,
    allocations: Annotated[str | None, axis_option("allocations", "--allocations", kind=AutoConfig)] = None,
    min_sparsity: Annotated[float | None, _auto_option("min_sparsity")] = None,
    max_sparsity: Annotated[float | None, _auto_option("max_sparsity")] = None,
    step: Annotated[float | None, _auto_option("step")] = None,
    proxy_windows: Annotated[int | None, _auto_option("proxy_windows")] = None,
    max_trials: Annotated[int | None, _auto_option("max_trials")] = None,
    events: EventsFile = None,
    as_json: Json = False,
    **config: Any,
) -> None:
    """Find the best MODEL within a budget: the sparsest within bounds on quality, or the best one that is small or fast enough.

    At least one of --max-perplexity-increase, --max-kl, --min-speedup, --max-size. What is found is an ordinary checkpoint;
    where nothing meets the budget, the error says how close the nearest came. The same command goes on where it was stopped.
    """
    own = {name: value for name, value in locals().items() if name in AutoConfig.model_fields and name != "base"}
    own |= {"methods": values_of(methods), "patterns": values_of(patterns), "allocations": values_of(allocations)}
    check_streams(events, as_json)
    with event_sink(events) as sink:
        with heavy_imports():
            from llmprune.sweeps.auto import auto_iter, require_found
        run = auto_iter(out=out, **config_fields(config), **own)
        last = follow(run, sink, interrupted="Interrupted. Jobs that are done are kept: the same command goes on.")
        assert isinstance(last, Searched)
        if as_json:
            print_json(last.search)
        elif events != "-":
            print_search(last.search, Console())
        require_found(last.search)


def print_search(search: AutoReport, console: Console) -> None:
    """All that was tried, held against the budgets; what was found, and where it is."""
    budgets = search.config.budgets
    table = make_table("Tried", "windows", *(LABELS[QUANTITIES[name]] for name in budgets), "sparsity", "")
    for trial in search.trials:
        cells = (quantity_text(name, trial.worst.get(QUANTITIES[name])) for name in budgets)
        sparsity = AXES["sparsity"].text(trial.point.values.get("sparsity"))
        kind = "all" if trial.kind == "confirmed" else "few"
        add_row(
            table,
            trial.point.name,
            kind,
            *cells,
            sparsity,
            "failed" if trial.point.error else "" if trial.missed else "meets it",
        )
    console.print(table)
    if search.best is None:
        return
    console.print(Text(printable(search.text)), soft_wrap=True)
    where = Path(search.out).resolve()
    console.print(
        Text(f"Checkpoint  {printable(str(where))}\nPage        {printable(str(where / 'auto.html'))}"), soft_wrap=True
    )


def compare(
    directories: Annotated[
        list[Path], typer.Argument(help="Directories of finished checkpoints, or of sweeps, which stand for their points.")
    ],
    format: Annotated[str, typer.Option("--format", "-f", help=f"What is printed: {', '.join(FORMATS)}.")] = "table",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write a page with table and plot to this file.")] = None,
    x: Annotated[str | None, typer.Option("--x", help=f"Axis of the plot: {', '.join(AXES)}. Default: what differs.")] = None,
    y: Annotated[str | None, typer.Option("--y", help="The other axis. Default: perplexity, or kl without one.")] = None,
) -> None:
    """Show finished checkpoints side by side, and which of them no other beats."""
    if format not in FORMATS:
        raise ConfigError(f"--format {format!r} is unknown; it is one of {', '.join(FORMATS)}.")
    result = compare_reports(*directories, x=x, y=y)
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(render(result, "html", base=out.parent), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"--out {out} cannot be written ({one_line(error)}). Choose another file.") from None
    if format == "table":
        console = Console()
        print_comparison(result, console)
        if out is not None:
            console.print(Text(f"Page {printable(str(out.resolve()))}"), soft_wrap=True)
    else:
        typer.echo(render(result, format), nl=False)


def print_sweep(sweep: SweepReport, console: Console) -> None:
    """All points, and where they are."""
    print_comparison(sweep, console)
    console.print(Text(f"Page  {printable(str((Path(sweep.out) / 'sweep.html').resolve()))}"), soft_wrap=True)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """A row for each point, a star before those on the front, then the fields that they differ in, and what to mind."""
    keys = [key for key in columns(plotted(comparison.points)) if key in _SHOWN or key in (comparison.x, comparison.y)]
    table = make_table("", *(AXES[key].short or AXES[key].label for key in keys))
    for point in comparison.points:
        name = f"{STAR if point.on_front else ' '} {point.name}"
        add_row(table, printable(name), *(AXES[key].text(point.values.get(key)) for key in keys))
    console.print(table)
    front = f"{STAR} no other has both a better {AXES[comparison.x].label} and a better {AXES[comparison.y].label}."
    console.print(Text(front, style="dim"))
    told = [name for name in comparison.differing if name not in FIELD_OF.values()]
    for name in told:
        values = ", ".join(f"{point.name} {field_text(point, name)}" for point in comparison.points)
        console.print(Text(printable(f"{name}: {values}")), soft_wrap=True)
    for note in comparison.notes:
        console.print(Text.assemble(("Mind: ", "yellow"), printable(note)), soft_wrap=True)
    for point in comparison.points:
        if point.error:
            console.print(Text.assemble((f"{printable(point.name)}: failed: ", "red"), printable(point.error)), soft_wrap=True)


_SHOWN = ("perplexity", "kl", "sparsity", "bytes", "decode_speedup")


def fractions_of(text: str | None) -> tuple[float, ...] | None:
    """``0.4,0.5`` or ``40%,50%`` as fractions."""
    if text is None:
        return None
    try:
        return tuple(float(word[:-1]) / 100 if word.endswith("%") else float(word) for word in values_of(text) or ())
    except ValueError:
        raise ConfigError(f"--sparsities {text!r} is not a list of numbers; give them as 0.4,0.5,0.6.") from None
