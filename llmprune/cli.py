"""The command line: typer in front of the library, events drawn by rich.

With ``--json`` a command prints one JSON object on stdout; everything else goes to stderr. Exit codes: 0 done, 2 the
user's mistake (one line with the remedy), 1 ours. Torch is imported by the commands that need it, not by ``--help``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console

from llmprune._version import __version__
from llmprune.console import ProgressView, print_report, printable
from llmprune.errors import ConfigError, LlmpruneError
from llmprune.events import Downloaded, Evaluated, Event, Failed, Finished
from llmprune.methods import METHODS
from llmprune.spec import BUNDLED_MODEL, PruneConfig
from llmprune.tables import print_evaluation, print_fetched, print_inspection, print_methods, print_plan

app = typer.Typer(
    name="llmprune",
    help="Prune Hugging Face causal language models after training, and report honestly what it cost and gained.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_errors = Console(stderr=True, soft_wrap=True)


def _option(field: str, *names: str) -> Any:
    """An option whose help is the config field's own description."""
    return typer.Option(*names, help=PruneConfig.model_fields[field].description, show_default=_default(field))


def _default(field: str) -> str | bool:
    default = PruneConfig.model_fields[field].default
    return str(default) if default not in (None, (), False, True) else False


Model = Annotated[str, typer.Argument(help=PruneConfig.model_fields["model"].description)]
Revision = Annotated[str | None, _option("revision", "--revision")]
Method = Annotated[str | None, _option("method", "--method", "-m")]
Sparsity = Annotated[float | None, _option("sparsity", "--sparsity", "-s")]
PatternName = Annotated[str | None, _option("pattern", "--pattern", "-p")]
ScopeName = Annotated[str | None, _option("scope", "--scope")]
Sequential = Annotated[str | None, _option("sequential", "--sequential")]
Skip = Annotated[list[str] | None, _option("skip", "--skip")]
Calibration = Annotated[str | None, _option("calibration", "--calibration", "-c")]
NumSamples = Annotated[int | None, _option("num_samples", "--num-samples")]
SeqLen = Annotated[int | None, _option("seq_len", "--seq-len")]
BatchSize = Annotated[int | None, _option("batch_size", "--batch-size")]
Eval = Annotated[list[str] | None, _option("eval", "--eval", "-e")]
NoEval = Annotated[bool, typer.Option("--no-eval", help="Evaluate on nothing.")]
MaxEvalTokens = Annotated[int | None, _option("max_eval_tokens", "--max-eval-tokens")]
LatencyFlag = Annotated[bool | None, _option("latency", "--latency/--no-latency")]
Damping = Annotated[float | None, _option("damping", "--damping")]
Device = Annotated[str | None, _option("device", "--device")]
DtypeName = Annotated[str | None, _option("dtype", "--dtype")]
Seed = Annotated[int | None, _option("seed", "--seed")]
TrustRemoteCode = Annotated[bool | None, _option("trust_remote_code", "--trust-remote-code")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
EventsFile = Annotated[str | None, typer.Option("--events", help="Write events as JSON lines to a file, or - for stdout.")]


@app.command(
    epilog="Example: llmprune prune demo --out pruned --method sparsegpt --sparsity 0.5",
)
def prune(
    model: Model = BUNDLED_MODEL,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory for the checkpoint and the report.")] = None,
    method: Method = None,
    sparsity: Sparsity = None,
    pattern: PatternName = None,
    scope: ScopeName = None,
    sequential: Sequential = None,
    skip: Skip = None,
    calibration: Calibration = None,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = None,
    eval: Eval = None,
    no_eval: NoEval = False,
    max_eval_tokens: MaxEvalTokens = None,
    latency: LatencyFlag = None,
    damping: Damping = None,
    device: Device = None,
    dtype: DtypeName = None,
    seed: Seed = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run beside --out, if any.")] = False,
    events: EventsFile = None,
    as_json: Json = False,
) -> None:
    """Prune MODEL, measure what it cost, and write checkpoint and report to --out."""
    fields = config_fields(locals())
    _check_streams(events, as_json)
    with _event_sink(events) as sink:
        if out is None:
            raise ConfigError("--out DIR is missing: where should the checkpoint go?")
        config = PruneConfig.build(None, **fields)
        with _heavy_imports():
            from llmprune.api import prune_iter
        run = prune_iter(config=config, out=out, resume=resume)
        last = _follow(run, sink, interrupted="Interrupted. Finished blocks are kept: go on with --resume.")
    assert isinstance(last, Finished)
    if as_json:
        _print_json(last.report)
    elif events != "-":
        console = Console()
        print_report(last.report, console)
        console.print(
            f"Checkpoint   {out.resolve()}", f"Report page  {(out / 'report.html').resolve()}", sep="\n", soft_wrap=True
        )
    if last.report.verdict.status == "broken":
        _errors.print(last.report.verdict.text, style="bold red", markup=False)


@app.command(epilog="Example: llmprune evaluate pruned --against demo --eval stdlib")
def evaluate(
    model: Model = BUNDLED_MODEL,
    eval: Eval = None,
    against: Annotated[str | None, typer.Option("--against", help="Dense model to measure the divergence from.")] = None,
    seq_len: SeqLen = None,
    max_eval_tokens: MaxEvalTokens = None,
    latency: LatencyFlag = None,
    device: Device = None,
    dtype: DtypeName = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = None,
    events: EventsFile = None,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of MODEL, and with --against its divergence from another."""
    fields = config_fields(locals())
    _check_streams(events, as_json)
    with _event_sink(events) as sink:
        with _heavy_imports():
            from llmprune.evaluation import evaluate_iter
        last = _follow(evaluate_iter(against=against, **fields), sink)
    assert isinstance(last, Evaluated)
    if events != "-":
        _show(last.evaluation, as_json, print_evaluation)


@app.command(epilog="Example: llmprune fetch HuggingFaceTB/SmolLM2-135M --calibration c4")
def fetch(
    model: Model = BUNDLED_MODEL,
    calibration: Calibration = None,
    eval: Eval = None,
    no_eval: NoEval = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = None,
    events: EventsFile = None,
    as_json: Json = False,
) -> None:
    """Download what pruning MODEL needs, so that the same job then runs offline; loads no weights."""
    fields = config_fields(locals())
    _check_streams(events, as_json)
    with _event_sink(events) as sink:
        with _heavy_imports():
            from llmprune.fetching import fetch_iter
        last = _follow(fetch_iter(**fields), sink)
    assert isinstance(last, Downloaded)
    if events != "-":
        _show(last.fetched, as_json, print_fetched)


@app.command(epilog="Example: llmprune plan meta-llama/Llama-3.1-8B --method sparsegpt --pattern 2:4")
def plan(
    model: Model = BUNDLED_MODEL,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the checkpoint would go.")] = Path(),
    method: Method = None,
    sparsity: Sparsity = None,
    pattern: PatternName = None,
    scope: ScopeName = None,
    sequential: Sequential = None,
    skip: Skip = None,
    calibration: Calibration = None,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = None,
    eval: Eval = None,
    no_eval: NoEval = False,
    max_eval_tokens: MaxEvalTokens = None,
    device: Device = None,
    dtype: DtypeName = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = None,
    as_json: Json = False,
) -> None:
    """Say what pruning MODEL would do and need, from its config and headers alone; exit 2 if it cannot fit."""
    fields = config_fields(locals())
    with _heavy_imports():
        from llmprune.planning import plan as make_plan
        from llmprune.planning import require_fit
    result = make_plan(config=PruneConfig.build(None, **fields), out=out)
    _show(result, as_json, print_plan)
    require_fit(result)


@app.command(epilog="Example: llmprune inspect demo")
def inspect(
    model: Model = BUNDLED_MODEL,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = None,
    as_json: Json = False,
) -> None:
    """Show MODEL's blocks and sites, which of them share an input, and how sparse they already are."""
    fields = config_fields(locals())
    with _heavy_imports():
        from llmprune.inspection import inspect as look
    _show(look(**fields), as_json, print_inspection)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the pruning methods."""
    if as_json:
        table = [
            {
                "name": method.name, "scope": method.scope, "needs": method.needs.name.lower(),
                "updates_weights": method.updates_weights, "summary": method.summary, "paper": method.paper,
            }
            for method in METHODS.values()
        ]  # fmt: skip
        typer.echo(json.dumps({"methods": table}, indent=1))
    else:
        print_methods(METHODS.values(), Console())


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line, with the commands of installed packages; every error of ours is one line on stderr."""
    try:
        with_plugins()()
    except LlmpruneError as error:
        _errors.print(f"Error: {printable(_message(error))}", style="red", markup=False)
        sys.exit(error.exit_code)


def with_plugins() -> typer.Typer:
    """The commands of this module and those that installed packages add: entry points of the group ``llmprune.commands``.

    Each is a callable that takes the typer app. One that cannot be imported is left out, as its package's extra is not
    installed.
    """
    whole = copy(app)
    whole.registered_commands, whole.registered_groups = list(app.registered_commands), list(app.registered_groups)
    for plugin in entry_points(group="llmprune.commands"):
        with suppress(ImportError):
            plugin.load()(whole)
    return whole


def config_fields(arguments: dict[str, Any]) -> dict[str, Any]:
    """The config fields among a command's arguments; what was not given is None and takes the default."""
    fields = {name: value for name, value in arguments.items() if name in PruneConfig.model_fields}
    for name in ("skip", "eval"):
        if fields.get(name):
            fields[name] = tuple(fields[name])
        elif name in fields:
            fields[name] = None
    if arguments.get("no_eval"):
        fields["eval"] = ()
    return fields


def _check_streams(events: str | None, as_json: bool) -> None:
    if as_json and events == "-":
        raise ConfigError("--json and --events - both want stdout; write the events to a file: --events events.jsonl.")


def _follow(run: Iterator[Event], sink: IO[str] | None, interrupted: str = "Interrupted.") -> Event | None:
    """Draw the events as they come, write them where asked, and return the last."""
    last = None
    with ProgressView() as view:
        try:
            for event in run:
                view.handle(event)
                _write(event, sink)
                last = event
        except KeyboardInterrupt:
            view.console.print(interrupted, markup=False)
            raise typer.Exit(130) from None
    return last


@contextmanager
def _event_sink(events: str | None) -> Iterator[IO[str] | None]:
    """Where ``--events`` wants them, or None; an error that ends the block is written there as its last line."""
    sink = _open_sink(events)
    try:
        yield sink
    except typer.Exit:
        raise
    except Exception as error:
        with suppress(OSError):  # a full disk or a reader that is gone must not hide the error
            _write(_failure(error), sink)
        raise
    finally:
        if sink and sink is not sys.stdout:
            with suppress(OSError):  # every line was flushed: only one that did not get through is left
                sink.close()


def _failure(error: Exception) -> Failed:
    if isinstance(error, LlmpruneError):
        return Failed(error=type(error).__name__, message=_message(error), exit_code=error.exit_code)
    return Failed(error="InternalError", message=type(error).__name__, exit_code=1)


def _message(error: LlmpruneError) -> str:
    return " ".join(str(error).split())


def _write(event: Event, sink: IO[str] | None) -> None:
    if sink:
        sink.write(event.model_dump_json() + "\n")
        sink.flush()


def _open_sink(events: str | None) -> IO[str] | None:
    if events is None or events == "-":
        return sys.stdout if events else None
    try:
        return Path(events).open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--events {events} cannot be written ({error.strerror}); choose another file.") from None


def _show(result: BaseModel, as_json: bool, draw: Any) -> None:
    if as_json:
        _print_json(result)
    else:
        draw(result, Console())


def _print_json(result: BaseModel) -> None:
    typer.echo(result.model_dump_json(indent=1))


@contextmanager
def _heavy_imports() -> Iterator[None]:
    """Import torch and transformers with a word to the user, and keep their own bars off the screen."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with _errors.status("Starting") if _errors.is_terminal else ExitStack():
        yield
    _quiet_transformers()


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def known_commands() -> Iterable[str]:
    """Names of all commands, for the documentation test."""
    return sorted(str(command.name or command.callback.__name__) for command in app.registered_commands if command.callback)
