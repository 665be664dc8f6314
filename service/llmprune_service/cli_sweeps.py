"""``llmprune sweeps`` and ``llmprune submit-auto``: many jobs of a service, and the search for the best one."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console

from llmprune.cli import prune
from llmprune.cli_options import Json, config_fields
from llmprune.cli_sweep import auto, axis_option, fractions_of, print_comparison, with_options_of
from llmprune.console import printable
from llmprune.errors import ConfigError, OutputError, one_line
from llmprune.sweep_spec import AutoConfig, values_of
from llmprune_service.cli_jobs import DEFAULT_URL, NOT_OFFERED, Key, Out, Url, complete, connected, pairs, print_json
from llmprune_service.schemas import AxisName

if TYPE_CHECKING:
    from llmprune.sweep_report import Comparison
    from llmprune_service.client import Client
    from llmprune_service.schemas import SweepPoints, SweepPointView, SweepView

SweepIdArgument = Annotated[str, typer.Argument(metavar="SWEEP", help="Id of the sweep, sweep_...")]
Methods = Annotated[str | None, axis_option("methods", "--methods", "-m")]
Patterns = Annotated[str | None, axis_option("patterns", "--patterns", "-p")]
Sparsities = Annotated[str | None, axis_option("sparsities", "--sparsities", "-s")]
Allocations = Annotated[str | None, axis_option("allocations", "--allocations")]
Efforts = Annotated[str | None, axis_option("efforts", "--efforts")]
AXES = ", ".join(get_args(AxisName))

_OF_AUTO_ALONE = {"out", "events", "as_json"}

sweeps = typer.Typer(name="sweeps", help="Sweeps of a service: many settings side by side.", no_args_is_help=True)
_errors = Console(stderr=True, soft_wrap=True)


def with_job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Put the options of ``llmprune prune`` that all jobs share in place of the command's ``**config``."""
    command = with_options_of(prune, command)
    signature = inspect.signature(command)
    offered = [option for name, option in signature.parameters.items() if name not in NOT_OFFERED]
    command.__signature__ = signature.replace(parameters=offered)  # type: ignore[attr-defined]
    return command


def with_options_of_auto(command: Callable[..., None]) -> Callable[..., None]:
    """Put the options of ``llmprune auto`` that describe a search in place of the command's ``**config``."""
    offered = inspect.signature(auto).parameters.items()
    config = [option for name, option in offered if name not in _OF_AUTO_ALONE | NOT_OFFERED]
    own = [
        option
        for option in inspect.signature(command, eval_str=True).parameters.values()
        if option.kind is not option.VAR_KEYWORD
    ]
    command.__signature__ = inspect.Signature([*config, *own])  # type: ignore[attr-defined]
    return command


@with_options_of_auto
def submit_auto(
    *,
    priority: Annotated[int, typer.Option("--priority", min=0, max=9, help="9 is served first.")] = 5,
    timeout_s: Annotated[int | None, typer.Option("--timeout-s", help="Fail the job after running for so long.")] = None,
    metadata: Annotated[list[str] | None, typer.Option("--metadata", metavar="KEY=VALUE", help="Pairs of your own.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show progress to the end, then the report.")] = False,
    out: Out = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
    **config: Any,
) -> None:
    """Queue a search for the best model within a budget; its options are those of `llmprune auto`."""
    from llmprune_service.follow import check_out

    search = {name: config.pop(name) for name in AutoConfig.model_fields if name in config}
    lists = {name: values_of(search[name]) for name in ("methods", "patterns", "allocations")}
    own: dict[str, Any] = {"priority": priority, "timeout_s": timeout_s, "metadata": pairs(metadata or [])}
    if out is not None:
        check_out(out)
    with connected(url, key) as client:
        job = client.auto(**config_fields(config), **search | lists, **own)
        if wait or out is not None:
            complete(client, job.id, out, as_json=as_json)
        elif as_json:
            print_json(job)
        else:
            typer.echo(job.id)
            _errors.print(f"Queued. Follow it with `llmprune jobs events {job.id}`.", markup=False)


@sweeps.command()
@with_job_options
def submit(
    *,
    methods: Methods = None,
    patterns: Patterns = None,
    sparsities: Sparsities = None,
    allocations: Allocations = None,
    efforts: Efforts = None,
    priority: Annotated[int, typer.Option("--priority", min=0, max=9, help="9 is served first.")] = 5,
    timeout_s: Annotated[int | None, typer.Option("--timeout-s", help="Fail a job after running for so long.")] = None,
    metadata: Annotated[list[str] | None, typer.Option("--metadata", metavar="KEY=VALUE", help="Pairs of your own.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for its jobs, then show them side by side.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
    **config: Any,
) -> None:
    """Queue a job for every combination of methods, patterns and sparsities; other options are those of `llmprune prune`."""
    own: dict[str, Any] = {"priority": priority, "timeout_s": timeout_s, "metadata": pairs(metadata or [])}
    axes = _axes(methods, patterns, sparsities, allocations, efforts)
    with connected(url, key) as client:
        sweep = client.sweep(**config_fields(config), **axes, **own)
        if wait:
            _complete(client, sweep.id, as_json=as_json)
        elif as_json:
            print_json(sweep)
        else:
            typer.echo(sweep.id)
            _errors.print(f"{sweep.num_points} jobs are queued. See them by `llmprune sweeps show {sweep.id}`.", markup=False)


@sweeps.command("list")
def list_(
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many, newest first.")] = 20,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List sweeps, newest first."""
    from itertools import islice

    with connected(url, key) as client:
        found = list(islice(client.sweeps.list(), limit))
    if as_json:
        typer.echo(json.dumps({"data": [sweep.model_dump(mode="json") for sweep in found]}, indent=1))
    else:
        for sweep in found:
            typer.echo(f"{sweep.id}  {_progress(sweep)}  {printable(sweep.model)}")


@sweeps.command()
def show(
    sweep: SweepIdArgument,
    x: Annotated[str | None, typer.Option("--x", help=f"Axis of the front: {AXES}. Default: what differs.")] = None,
    y: Annotated[str | None, typer.Option("--y", help="The other axis. Default: perplexity, or kl without one.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write the plot to this file, as SVG.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show what a sweep came to so far, and which of its points no other beats."""
    axes = {"x": _axis(x), "y": _axis(y)}
    with connected(url, key) as client:
        if plot is not None:
            _write(plot, client.sweeps.plot(sweep, **axes))
        if csv:
            typer.echo(client.sweeps.csv(sweep, **axes), nl=False)
            return
        found = client.sweeps.get(sweep)
        points = client.sweeps.points(sweep, **axes)
    if as_json:
        print_json(points)
        return
    typer.echo(f"{found.id}  {_progress(found)}  {printable(found.model)}")
    print_comparison(_comparison(points), Console())
    for point in points.data:
        if point.status != "succeeded":
            typer.echo(printable(f"{point.name}: {point.status}, {point.job_id}"))


@sweeps.command()
def extend(
    sweep: SweepIdArgument,
    methods: Methods = None,
    patterns: Patterns = None,
    sparsities: Sparsities = None,
    allocations: Allocations = None,
    efforts: Efforts = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Add values of axes to a sweep; what is there already stays as it is."""
    axes = _axes(methods, patterns, sparsities, allocations, efforts)
    with connected(url, key) as client:
        extension = client.sweeps.extend(sweep, **{axis: values for axis, values in axes.items() if values})
    if as_json:
        print_json(extension)
    else:
        typer.echo(
            f"Added: {', '.join(extension.added) or 'nothing'}. There already: {', '.join(extension.known) or 'nothing'}."
        )


@sweeps.command()
def cancel(sweep: SweepIdArgument, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Stop the jobs of a sweep that have not ended; their finished blocks are kept."""
    with connected(url, key) as client:
        _print(client.sweeps.cancel(sweep), as_json)


@sweeps.command()
def resume(sweep: SweepIdArgument, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Go on with the cancelled jobs of a sweep."""
    with connected(url, key) as client:
        _print(client.sweeps.resume(sweep), as_json)


@sweeps.command()
def retry(sweep: SweepIdArgument, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Try the failed jobs of a sweep again."""
    with connected(url, key) as client:
        _print(client.sweeps.retry(sweep), as_json)


@sweeps.command()
def delete(sweep: SweepIdArgument, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Delete a sweep with its jobs and their files, once all have ended."""
    with connected(url, key) as client:
        client.sweeps.delete(sweep)
    typer.echo(json.dumps({"deleted": sweep}) if as_json else f"{printable(sweep)} is deleted.")


def _complete(client: Client, sweep_id: str, *, as_json: bool) -> None:
    """Wait for all jobs and show them; exit code 1 where one has not succeeded. Ctrl-C leaves the sweep alone."""
    try:
        sweep = client.sweeps.wait(sweep_id)
    except KeyboardInterrupt:
        _errors.print(f"The sweep goes on. Stop it with `llmprune sweeps cancel {sweep_id}`.", markup=False)
        raise typer.Exit(130) from None
    points = client.sweeps.points(sweep_id)
    if as_json:
        print_json(points)
    else:
        print_comparison(_comparison(points), Console())
    if sweep.status != "succeeded":
        _errors.print(f"{sweep.id} {_progress(sweep)}. Try again with `llmprune sweeps retry {sweep.id}`.", markup=False)
        raise typer.Exit(1)


def _axes(
    methods: str | None, patterns: str | None, sparsities: str | None, allocations: str | None, efforts: str | None
) -> Any:
    return {
        "methods": values_of(methods), "patterns": values_of(patterns), "sparsities": fractions_of(sparsities),
        "allocations": values_of(allocations), "efforts": values_of(efforts),
    }  # fmt: skip


def _axis(name: str | None) -> Any:
    if name is not None and name not in get_args(AxisName):
        raise ConfigError(f"{name!r} is no axis; it is one of {AXES}.")
    return name


def _comparison(points: SweepPoints) -> Comparison:
    """As the library has it: those that have succeeded or failed."""
    from llmprune.sweep_report import Comparison

    reports = tuple(_report(point) for point in points.data if point.status in ("succeeded", "failed"))
    return Comparison(points=reports, x=points.x, y=points.y, differing=points.differing, notes=points.notes)


def _report(point: SweepPointView) -> Any:
    from llmprune.spec import PruneConfig
    from llmprune.sweep_report import PointReport

    values = {key: math.inf if value is None else value for key, value in point.values.items()}
    return PointReport(
        name=point.name, status="done" if point.error is None else "failed", config=PruneConfig.model_validate(point.config),
        values=values, on_front=point.on_front, error=point.error.message if point.error else None,
    )  # fmt: skip


def _print(sweep: SweepView, as_json: bool) -> None:
    if as_json:
        print_json(sweep)
    else:
        typer.echo(f"{sweep.id}  {_progress(sweep)}")


def _progress(sweep: SweepView) -> str:
    counts = ", ".join(f"{number} {status}" for status, number in sorted(sweep.counts.items()))
    return f"{sweep.status} ({counts})"


def _write(file: Path, content: str) -> None:
    try:
        file.write_text(content, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--plot {file} cannot be written ({one_line(error)}). Choose another file.") from None
