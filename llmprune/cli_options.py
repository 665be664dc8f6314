"""What all commands share: options named and described by the config's fields, events drawn and written, errors as one line."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console

from llmprune.console import ProgressView
from llmprune.errors import ConfigError, LlmpruneError
from llmprune.events import Event, Failed
from llmprune.spec import PruneConfig

error_console = Console(stderr=True, soft_wrap=True)


def config_option(field: str, *names: str) -> Any:
    """An option whose help is the config field's own description."""
    return typer.Option(*names, help=PruneConfig.model_fields[field].description, show_default=_default(field))


def _default(field: str) -> str | bool:
    default = PruneConfig.model_fields[field].default
    return str(default) if default not in (None, (), False, True) else False


Model = Annotated[str, typer.Argument(help=PruneConfig.model_fields["model"].description)]
Revision = Annotated[str | None, config_option("revision", "--revision")]
EffortOption = Annotated[str | None, config_option("effort", "--effort")]
Method = Annotated[str | None, config_option("method", "--method", "-m")]
Sparsity = Annotated[float | None, config_option("sparsity", "--sparsity", "-s")]
PatternName = Annotated[str | None, config_option("pattern", "--pattern", "-p")]
WidthsName = Annotated[str | None, config_option("widths", "--widths")]
Budget = Annotated[str | None, config_option("budget", "--budget")]
TyrPreset = Annotated[str | None, config_option("tyr_preset", "--tyr-preset")]
TyrIterations = Annotated[int | None, config_option("tyr_iterations", "--tyr-iterations")]
TyrGenerations = Annotated[int | None, config_option("tyr_generations", "--tyr-generations")]
TyrOffspring = Annotated[int | None, config_option("tyr_offspring", "--tyr-offspring")]
TyrHiddenWeight = Annotated[float | None, config_option("tyr_hidden_weight", "--tyr-hidden-weight")]
ScopeName = Annotated[str | None, config_option("scope", "--scope")]
AllocationName = Annotated[str | None, config_option("allocation", "--allocation")]
EvolutionGenerations = Annotated[int | None, config_option("evolution_generations", "--evolution-generations")]
EvolutionOffspring = Annotated[int | None, config_option("evolution_offspring", "--evolution-offspring")]
Sequential = Annotated[str | None, config_option("sequential", "--sequential")]
Skip = Annotated[list[str] | None, config_option("skip", "--skip")]
Calibration = Annotated[str | None, config_option("calibration", "--calibration", "-c")]
NumSamples = Annotated[int | None, config_option("num_samples", "--num-samples")]
SeqLen = Annotated[int | None, config_option("seq_len", "--seq-len")]
BatchSize = Annotated[int | None, config_option("batch_size", "--batch-size")]
Eval = Annotated[list[str] | None, config_option("eval", "--eval", "-e")]
NoEval = Annotated[bool, typer.Option("--no-eval", help="Evaluate on nothing.")]
MaxEvalTokens = Annotated[int | None, config_option("max_eval_tokens", "--max-eval-tokens")]
Prompt = Annotated[list[str] | None, config_option("prompt", "--prompt")]
NoPrompt = Annotated[bool, typer.Option("--no-prompt", help="Let the models write nothing.")]
TaskNames = Annotated[list[str] | None, config_option("tasks", "--tasks")]
TasksPath = Annotated[str | None, config_option("tasks_path", "--tasks-path")]
TaskLimit = Annotated[int | None, config_option("task_limit", "--task-limit")]
NumFewshot = Annotated[int | None, config_option("num_fewshot", "--num-fewshot")]
LatencyFlag = Annotated[bool | None, config_option("latency", "--latency/--no-latency")]
Damping = Annotated[float | None, config_option("damping", "--damping")]
Permute = Annotated[bool | None, config_option("permute", "--permute/--no-permute")]
Reconstruct = Annotated[bool | None, config_option("reconstruct", "--reconstruct/--no-reconstruct")]
ReconstructSteps = Annotated[int | None, config_option("reconstruct_steps", "--reconstruct-steps")]
ReconstructRounds = Annotated[int | None, config_option("reconstruct_rounds", "--reconstruct-rounds")]
ReconstructLr = Annotated[float | None, config_option("reconstruct_lr", "--reconstruct-lr")]
Refine = Annotated[str | None, config_option("refine", "--refine")]
IcbsPreset = Annotated[str | None, config_option("icbs_preset", "--icbs-preset")]
IcbsPasses = Annotated[int | None, config_option("icbs_passes", "--icbs-passes")]
IcbsLayersPerStep = Annotated[int | None, config_option("icbs_layers_per_step", "--icbs-layers-per-step")]
IcbsBlockSize = Annotated[int | None, config_option("icbs_block_size", "--icbs-block-size")]
IcbsSequences = Annotated[int | None, config_option("icbs_sequences", "--icbs-sequences")]
IcbsHessian = Annotated[str | None, config_option("icbs_hessian", "--icbs-hessian")]
IcbsSolver = Annotated[str | None, config_option("icbs_solver", "--icbs-solver")]
Device = Annotated[str | None, config_option("device", "--device")]
Offload = Annotated[str | None, config_option("offload", "--offload")]
DtypeName = Annotated[str | None, config_option("dtype", "--dtype")]
ExportName = Annotated[str | None, config_option("export", "--export")]
StatisticsCache = Annotated[bool | None, config_option("statistics_cache", "--statistics-cache/--no-statistics-cache")]
Seed = Annotated[int | None, config_option("seed", "--seed")]
TrustRemoteCode = Annotated[bool | None, config_option("trust_remote_code", "--trust-remote-code")]
NumGpus = Annotated[
    int | None, typer.Option("--num-gpus", min=1, help="Share the job among this many GPUs; with --device cpu, processes.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
EventsFile = Annotated[str | None, typer.Option("--events", help="Write events as JSON lines to a file, or - for stdout.")]


def config_fields(arguments: dict[str, Any]) -> dict[str, Any]:
    """The config fields among a command's arguments; what was not given is None and takes the default."""
    fields = {name: value for name, value in arguments.items() if name in PruneConfig.model_fields}
    for name in ("skip", "eval", "prompt", "tasks"):
        if fields.get(name):
            fields[name] = tuple(fields[name])
        elif name in fields:
            fields[name] = None
    for name in ("eval", "prompt"):
        if arguments.get(f"no_{name}"):
            fields[name] = ()
    return fields


def check_streams(events: str | None, as_json: bool) -> None:
    """Raise ConfigError where two things are to be printed on stdout."""
    if as_json and events == "-":
        raise ConfigError("--json and --events - both want stdout; write the events to a file: --events events.jsonl.")


def follow(run: Iterator[Event], sink: IO[str] | None, interrupted: str = "Interrupted.") -> Event | None:
    """Draw the events as they come, write them where asked, and return the last."""
    last = None
    with ProgressView() as view:
        try:
            for event in run:
                _freeze_what_is_imported()
                view.handle(event)
                _write(event, sink)
                last = event
        except KeyboardInterrupt:
            view.console.print(interrupted, markup=False)
            raise typer.Exit(130) from None
    return last


@functools.cache
def _freeze_what_is_imported() -> None:
    """Once a process, at the first event: every stage collects garbage, and need not walk all that torch is made of for it."""
    gc.freeze()


@contextmanager
def event_sink(events: str | None) -> Iterator[IO[str] | None]:
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
        return Failed(error=type(error).__name__, message=message_of(error), exit_code=error.exit_code)
    return Failed(error="InternalError", message=type(error).__name__, exit_code=1)


def message_of(error: LlmpruneError) -> str:
    """The whole message on one line."""
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


def show(result: BaseModel, as_json: bool, draw: Any) -> None:
    """Print a result on stdout: as JSON, or drawn."""
    if as_json:
        print_json(result)
    else:
        draw(result, Console())


def print_json(result: BaseModel) -> None:
    """Print a result as one JSON object."""
    typer.echo(result.model_dump_json(indent=1))


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch and transformers with a word to the user, and keep their own bars off the screen."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with error_console.status("Starting") if error_console.is_terminal else ExitStack():
        yield
    _quiet_transformers()


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
