"""``llmprune submit`` and ``llmprune jobs``: the client on the command line."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from llmprune.cli import prune
from llmprune.cli_options import Json, config_fields
from llmprune.console import printable
from llmprune.errors import ConfigError
from llmprune.io.render import number, percent, target_percent
from llmprune.spec import PruneConfig

if TYPE_CHECKING:
    from pydantic import BaseModel

    from llmprune_service.client import Client
    from llmprune_service.schemas import JobView

DEFAULT_URL = "http://127.0.0.1:8000"
NOT_OFFERED = frozenset({"trust_remote_code"})  # a service never runs code of a model

Url = Annotated[str, typer.Option("--url", envvar="LLMPRUNE_URL", help="Where the service listens.")]
Key = Annotated[
    str | None,
    typer.Option("--key", help="API key, better given as LLMPRUNE_API_KEY. For a service of this host: its own key file."),
]
JobIdArgument = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job, job_...")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Directory to download the checkpoint to; waits for it.")]

jobs = typer.Typer(name="jobs", help="Look at jobs of a service, and steer them.", no_args_is_help=True)
_errors = Console(stderr=True, soft_wrap=True)


def with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Put the options of ``llmprune prune`` that describe a job in place of the command's ``**config``."""
    offered = {*PruneConfig.model_fields, "no_eval", "no_prompt"} - NOT_OFFERED
    config = [option for name, option in inspect.signature(prune, eval_str=True).parameters.items() if name in offered]
    own = [
        option
        for option in inspect.signature(command, eval_str=True).parameters.values()
        if option.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    command.__signature__ = inspect.Signature([*config, *own])  # type: ignore[attr-defined]
    return command


@contextmanager
def connected(url: str, key: str | None) -> Iterator[Client]:
    """A client; raises at once where nothing answers."""
    from llmprune_service.client import ApiError, Client

    with Client(url, key) as client:
        try:
            client.check()
        except ApiError:
            pass  # it answers, and will say itself what it cannot do
        yield client


@with_config_options
def submit(
    *,
    priority: Annotated[int, typer.Option("--priority", min=0, max=9, help="9 is served first.")] = 5,
    timeout_s: Annotated[int | None, typer.Option("--timeout-s", help="Fail the job after running for so long.")] = None,
    metadata: Annotated[list[str] | None, typer.Option("--metadata", metavar="KEY=VALUE", help="Pairs of your own.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show progress to the end, then the report.")] = False,
    out: Out = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    database_url: Annotated[
        str | None, typer.Option("--database-url", help="Queue in the service's database itself, without HTTP.")
    ] = None,
    as_json: Json = False,
    **config: Any,
) -> None:
    """Queue a job at a service; its options are those of `llmprune prune`."""
    fields = config_fields(config)
    own: dict[str, Any] = {"priority": priority, "timeout_s": timeout_s, "metadata": pairs(metadata or [])}
    if database_url is not None:
        _enqueue(database_url, fields, own, as_json=as_json, wait=wait or out is not None)
        return
    from llmprune_service.follow import check_out

    if out is not None:
        check_out(out)
    with connected(url, key) as client:
        job = client.submit(**fields, **own)
        if wait or out is not None:
            complete(client, job.id, out, as_json=as_json)
        elif as_json:
            print_json(job)
        else:
            typer.echo(job.id)
            _errors.print(f"Queued. Follow it with `llmprune jobs events {job.id}`.", markup=False)


def _enqueue(database_url: str, fields: dict[str, Any], own: dict[str, Any], *, as_json: bool, wait: bool) -> None:
    from llmprune_service.client import enqueue

    if wait:
        raise ConfigError("--database-url only queues the job; leave out --wait and --out, or give --url instead.")
    given = {name: value for name, value in fields.items() if value is not None}
    job_id = enqueue(database_url, given, **own)
    typer.echo(json.dumps({"id": job_id}) if as_json else job_id)


def complete(client: Client, job_id: str, out: Path | None, *, as_json: bool = False) -> None:
    """Follow a job to its end, download its files, and print the report; Ctrl-C leaves the job alone."""
    from llmprune_service import follow

    try:
        job = follow.follow(client, job_id)
        follow.require_success(job)
        if out is not None:
            follow.fetch(client, job_id, out)
    except KeyboardInterrupt:
        _errors.print(
            f"The job goes on. Follow it with `llmprune jobs events {job_id}`, stop it with `llmprune jobs cancel {job_id}`.",
            markup=False,
        )
        raise typer.Exit(130) from None
    report = client.report(job_id)
    if as_json:
        print_json(report)
    else:
        follow.show_report(report, out)


@jobs.command("list")
def list_(
    status: Annotated[str | None, typer.Option("--status", help="queued, running, succeeded, failed, cancelled ...")] = None,
    model: Annotated[str | None, typer.Option("--model", help="As it was submitted.")] = None,
    method: Annotated[str | None, typer.Option("--method")] = None,
    sweep: Annotated[str | None, typer.Option("--sweep", help="Id of the sweep that they are points of.")] = None,
    metadata: Annotated[list[str] | None, typer.Option("--metadata", metavar="KEY=VALUE", help="All must match.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many, newest first.")] = 20,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    from itertools import islice

    with connected(url, key) as client:
        filters = {"status": status, "model": model, "method": method, "sweep": sweep, "metadata": pairs(metadata or [])}
        found = list(islice(client.list(**filters), limit))  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps({"data": [job.model_dump(mode="json") for job in found]}, indent=1))
    else:
        _print_table(found)


@jobs.command()
def show(job: JobIdArgument, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Show a job: where it is, and what came of it."""
    with connected(url, key) as client:
        found = client.get(job)
    _print_job(found, as_json)


@jobs.command()
def events(
    job: JobIdArgument,
    after: Annotated[int, typer.Option("--after", min=0, help="Only events after this one.")] = 0,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Print what happens to a job, as it happens, to its end; with --json one object a line."""
    with connected(url, key) as client:
        for event in client.events(job, after):
            line = f"{event.seq:5} {event.type:14} {json.dumps(event.data, ensure_ascii=False)}"
            typer.echo(event.model_dump_json() if as_json else printable(line))


@jobs.command()
def cancel(job: JobIdArgument, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Stop a job within a second or so; its finished blocks are kept."""
    with connected(url, key) as client:
        _print_job(client.cancel(job), as_json)


@jobs.command()
def resume(job: JobIdArgument, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Go on with a cancelled job."""
    with connected(url, key) as client:
        _print_job(client.resume(job), as_json)


@jobs.command()
def retry(
    job: JobIdArgument,
    from_start: Annotated[bool, typer.Option("--from-start", help="Forget the finished blocks.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Try a failed job again."""
    with connected(url, key) as client:
        _print_job(client.retry(job, from_start=from_start), as_json)


@jobs.command()
def delete(job: JobIdArgument, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Delete a finished job with its files."""
    with connected(url, key) as client:
        client.delete(job)
    typer.echo(json.dumps({"deleted": job}) if as_json else f"{printable(job)} is deleted.")


@jobs.command()
def download(
    job: JobIdArgument,
    directory: Annotated[Path, typer.Argument(help="Where to; what broke off is gone on with.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Download the checkpoint and the report of a job, each file checked by its sha256."""
    from llmprune_service.follow import fetch

    with connected(url, key) as client:
        fetch(client, job, directory)
    typer.echo(json.dumps({"directory": str(directory.resolve())}) if as_json else f"Checkpoint {directory.resolve()}")


@jobs.command()
def report(job: JobIdArgument, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Print the report of a job that succeeded."""
    from llmprune_service.follow import show_report

    with connected(url, key) as client:
        found = client.report(job)
    if as_json:
        print_json(found)
    else:
        show_report(found, None)


def _print_job(job: JobView, as_json: bool) -> None:
    """The facts of a job, one a line."""
    if as_json:
        print_json(job)
        return
    facts = {
        "Job": job.id, "Model": job.model, "Config": json.dumps(job.config, ensure_ascii=False), "Status": _status(job),
        "Error": f"{job.error.code}: {job.error.message}" if job.error else None,
        "Result": _result(job) or None, "Priority": str(job.priority),
        "Metadata": json.dumps(job.metadata, ensure_ascii=False) if job.metadata else None,
    }  # fmt: skip
    for name, value in facts.items():
        if value is not None:
            typer.echo(f"{name:9} {printable(value)}")


def _print_table(jobs: Sequence[JobView]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in ("Job", "status", "model", "method", "sparsity", "result"):
        table.add_column(name, no_wrap=name == "Job", overflow="fold")
    for job in jobs:
        cells = (job.id, _status(job), job.model, *_what(job), _result(job))
        table.add_row(*(Text(printable(cell)) for cell in cells))
    Console().print(table)


def _what(job: JobView) -> tuple[str, str]:
    """Method and sparsity; what a search is to find, its result says."""
    if job.kind == "auto":
        return "auto", ""
    config = PruneConfig.model_validate(job.config)
    return config.method, target_percent(config.sparsity) if ":" not in config.pattern else config.pattern


def _status(job: JobView) -> str:
    progress = job.progress
    if job.status != "running" or progress is None or not progress.total:
        return job.status
    return f"{job.status}, {progress.stage} {progress.done}/{progress.total}"


def _result(job: JobView) -> str:
    """The headline: what the sparsity did to the perplexity."""
    if not job.result:
        return ""
    before, after = job.result.get("perplexity_dense"), job.result.get("perplexity_pruned")
    change = f", perplexity {number(float(before))} -> {number(float(after))}" if before and after else ""
    return f"{percent(job.result['sparsity'])} zeros{change}"


def print_json(model: BaseModel) -> None:
    """One JSON object on stdout."""
    typer.echo(model.model_dump_json(indent=1))


def pairs(given: list[str]) -> dict[str, str]:
    """``KEY=VALUE`` options as a mapping; raises ConfigError."""
    for pair in given:
        if "=" not in pair:
            raise ConfigError(f"--metadata {pair!r} is not KEY=VALUE; write it such as --metadata team=nlp.")
    return {key: value for key, _, value in (pair.partition("=") for pair in given)}
