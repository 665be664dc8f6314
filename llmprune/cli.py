"""The command line: typer in front of the library, events drawn by rich.

With ``--json`` a command prints one JSON object on stdout; everything else goes to stderr. Exit codes: 0 done, 2 the
user's mistake (one line with the remedy), 1 ours. Torch is imported by the commands that need it, not by ``--help``.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from copy import copy
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from llmprune._version import __version__
from llmprune.cli_convert import convert
from llmprune.cli_measure import benchmark, generate
from llmprune.cli_options import (
    AllocationName,
    BatchSize,
    Budget,
    Calibration,
    Damping,
    Device,
    DtypeName,
    EffortOption,
    Eval,
    EventsFile,
    EvolutionGenerations,
    EvolutionOffspring,
    ExportName,
    IcbsBlockSize,
    IcbsHessian,
    IcbsLayersPerStep,
    IcbsPasses,
    IcbsPreset,
    IcbsSequences,
    IcbsSolver,
    Json,
    LatencyFlag,
    MaxEvalTokens,
    Method,
    Model,
    NoEval,
    NoPrompt,
    NumFewshot,
    NumGpus,
    NumSamples,
    Offload,
    PatternName,
    Permute,
    Prompt,
    Reconstruct,
    ReconstructLr,
    ReconstructRounds,
    ReconstructSteps,
    Refine,
    Revision,
    ScopeName,
    Seed,
    SeqLen,
    Sequential,
    Skip,
    Sparsity,
    StatisticsCache,
    TaskLimit,
    TaskNames,
    TasksPath,
    TrustRemoteCode,
    TyrGenerations,
    TyrHiddenWeight,
    TyrIterations,
    TyrOffspring,
    TyrPreset,
    WidthsName,
    check_streams,
    config_fields,
    error_console,
    event_sink,
    follow,
    heavy_imports,
    message_of,
    print_json,
    show,
)  # fmt: skip
from llmprune.cli_recover import recover
from llmprune.cli_report import report
from llmprune.cli_sweep import auto, compare, sweep, with_options_of
from llmprune.console import print_report, printable
from llmprune.errors import ConfigError, LlmpruneError
from llmprune.events import Downloaded, Evaluated, Finished
from llmprune.io.exports import FORMATS, export_paths, export_report
from llmprune.launching import check_count, launch, wanted
from llmprune.methods import METHODS, REFINED, STRUCTURAL
from llmprune.processes import exit_code, is_first, speaks
from llmprune.spec import BUNDLED_MODEL, PruneConfig
from llmprune.tables import print_evaluation, print_fetched, print_inspection, print_methods, print_plan

_EXPORT_REPORT = (
    f"Write the report also as {', '.join(FORMATS)}, repeatable: beside --out, or to a file whose name ends in one of them."
)

app = typer.Typer(
    name="llmprune",
    help="Prune Hugging Face causal language models after training, and report honestly what it cost and gained.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(
    epilog="Example: llmprune prune demo --out pruned --method sparsegpt --sparsity 0.5",
)
def prune(
    model: Model = BUNDLED_MODEL,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory for the checkpoint and the report.")] = None,
    effort: EffortOption = None,
    method: Method = None,
    sparsity: Sparsity = None,
    pattern: PatternName = None,
    widths: WidthsName = None,
    budget: Budget = None,
    tyr_preset: TyrPreset = None,
    tyr_iterations: TyrIterations = None,
    tyr_generations: TyrGenerations = None,
    tyr_offspring: TyrOffspring = None,
    tyr_hidden_weight: TyrHiddenWeight = None,
    scope: ScopeName = None,
    allocation: AllocationName = None,
    evolution_generations: EvolutionGenerations = None,
    evolution_offspring: EvolutionOffspring = None,
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
    prompt: Prompt = None,
    no_prompt: NoPrompt = False,
    tasks: TaskNames = None,
    tasks_path: TasksPath = None,
    task_limit: TaskLimit = None,
    num_fewshot: NumFewshot = None,
    damping: Damping = None,
    permute: Permute = None,
    reconstruct: Reconstruct = None,
    reconstruct_steps: ReconstructSteps = None,
    reconstruct_rounds: ReconstructRounds = None,
    reconstruct_lr: ReconstructLr = None,
    refine: Refine = None,
    icbs_preset: IcbsPreset = None,
    icbs_passes: IcbsPasses = None,
    icbs_layers_per_step: IcbsLayersPerStep = None,
    icbs_block_size: IcbsBlockSize = None,
    icbs_sequences: IcbsSequences = None,
    icbs_hessian: IcbsHessian = None,
    icbs_solver: IcbsSolver = None,
    export: ExportName = None,
    device: Device = None,
    offload: Offload = None,
    dtype: DtypeName = None,
    statistics_cache: StatisticsCache = None,
    seed: Seed = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = None,
    num_gpus: NumGpus = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run beside --out, if any.")] = False,
    reports: Annotated[list[str] | None, typer.Option("--export-report", help=_EXPORT_REPORT)] = None,
    events: EventsFile = None,
    as_json: Json = False,
) -> None:
    """Prune MODEL, measure what it cost, and write checkpoint and report to --out."""
    fields = config_fields(locals())
    check_streams(events, as_json)
    if wanted(num_gpus):
        _share(num_gpus)
    first = is_first()  # of several processes one speaks
    with event_sink(events if first else None) as sink:
        if out is None:
            raise ConfigError("--out DIR is missing: where should the checkpoint go?")
        config = PruneConfig.build(None, **fields)
        exports = export_paths(reports or (), out)
        check_count(num_gpus)
        with heavy_imports():
            from llmprune.api import prune_iter
        run = prune_iter(config=config, out=out, resume=resume)
        if not first:
            deque(run, maxlen=0)
            return
        last = follow(run, sink, interrupted="Interrupted. Finished blocks are kept: go on with --resume.")
    assert isinstance(last, Finished)
    exported = [path for wanted in exports for path in export_report(last.report, wanted)]
    if as_json:
        print_json(last.report)
    elif events != "-":
        console = Console()
        print_report(last.report, console)
        console.print(
            f"Checkpoint   {out.resolve()}", f"Report page  {(out / 'report.html').resolve()}",
            *(f"Report       {path.resolve()}" for path in exported), sep="\n", soft_wrap=True,
        )  # fmt: skip
    if last.report.verdict.status == "broken":
        error_console.print(last.report.verdict.text, style="bold red", markup=False)


def _share(num_gpus: int | None) -> NoReturn:
    """Do this very command in several processes."""
    assert num_gpus
    code, message = launch(sys.argv[1:], num_gpus)
    if message:
        error_console.show_cursor()  # the one that hid it may be gone
        error_console.print(f"Error: {message}", style="red", markup=False)
    raise typer.Exit(code)


@app.command(epilog="Example: llmprune evaluate pruned --against demo --eval stdlib")
def evaluate(
    model: Model = BUNDLED_MODEL,
    eval: Eval = None,
    no_eval: NoEval = False,
    against: Annotated[str | None, typer.Option("--against", help="Dense model to measure the divergence from.")] = None,
    seq_len: SeqLen = None,
    max_eval_tokens: MaxEvalTokens = None,
    tasks: TaskNames = None,
    tasks_path: TasksPath = None,
    task_limit: TaskLimit = None,
    num_fewshot: NumFewshot = None,
    latency: LatencyFlag = None,
    device: Device = None,
    offload: Offload = None,
    dtype: DtypeName = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = None,
    num_gpus: NumGpus = None,
    events: EventsFile = None,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of MODEL, and with --against its divergence from another."""
    fields = config_fields(locals())
    check_streams(events, as_json)
    if wanted(num_gpus):
        _share(num_gpus)
    first = is_first()
    with event_sink(events if first else None) as sink:
        check_count(num_gpus)
        with heavy_imports():
            from llmprune.evaluation import evaluate_iter
        run = evaluate_iter(against=against, **fields)
        if not first:
            deque(run, maxlen=0)
            return
        last = follow(run, sink)
    assert isinstance(last, Evaluated)
    if events != "-":
        show(last.evaluation, as_json, print_evaluation)


@app.command(epilog="Example: llmprune fetch HuggingFaceTB/SmolLM2-135M --calibration c4")
def fetch(
    model: Model = BUNDLED_MODEL,
    calibration: Calibration = None,
    eval: Eval = None,
    no_eval: NoEval = False,
    tasks: TaskNames = None,
    tasks_path: TasksPath = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = None,
    events: EventsFile = None,
    as_json: Json = False,
) -> None:
    """Download what pruning MODEL needs, so that the same job then runs offline; loads no weights."""
    fields = config_fields(locals())
    check_streams(events, as_json)
    with event_sink(events) as sink:
        with heavy_imports():
            from llmprune.fetching import fetch_iter
        last = follow(fetch_iter(**fields), sink)
    assert isinstance(last, Downloaded)
    if events != "-":
        show(last.fetched, as_json, print_fetched)


@app.command(epilog="Example: llmprune plan meta-llama/Llama-3.1-8B --method sparsegpt --pattern 2:4")
def plan(
    model: Model = BUNDLED_MODEL,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the checkpoint would go.")] = Path(),
    effort: EffortOption = None,
    method: Method = None,
    sparsity: Sparsity = None,
    pattern: PatternName = None,
    widths: WidthsName = None,
    budget: Budget = None,
    tyr_preset: TyrPreset = None,
    tyr_iterations: TyrIterations = None,
    tyr_generations: TyrGenerations = None,
    tyr_offspring: TyrOffspring = None,
    tyr_hidden_weight: TyrHiddenWeight = None,
    scope: ScopeName = None,
    allocation: AllocationName = None,
    evolution_generations: EvolutionGenerations = None,
    evolution_offspring: EvolutionOffspring = None,
    sequential: Sequential = None,
    skip: Skip = None,
    calibration: Calibration = None,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = None,
    eval: Eval = None,
    no_eval: NoEval = False,
    max_eval_tokens: MaxEvalTokens = None,
    permute: Permute = None,
    reconstruct: Reconstruct = None,
    reconstruct_steps: ReconstructSteps = None,
    reconstruct_rounds: ReconstructRounds = None,
    refine: Refine = None,
    icbs_preset: IcbsPreset = None,
    icbs_passes: IcbsPasses = None,
    icbs_layers_per_step: IcbsLayersPerStep = None,
    icbs_block_size: IcbsBlockSize = None,
    icbs_sequences: IcbsSequences = None,
    icbs_hessian: IcbsHessian = None,
    icbs_solver: IcbsSolver = None,
    export: ExportName = None,
    device: Device = None,
    dtype: DtypeName = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = None,
    as_json: Json = False,
) -> None:
    """Say what pruning MODEL would do and need, from its config and headers alone; exit 2 if it cannot fit."""
    fields = config_fields(locals())
    with heavy_imports():
        from llmprune.planning import plan as make_plan
        from llmprune.planning import require_fit
    result = make_plan(config=PruneConfig.build(None, **fields), out=out)
    show(result, as_json, print_plan)
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
    with heavy_imports():
        from llmprune.inspection import inspect as look
    show(look(**fields), as_json, print_inspection)


sweep = with_options_of(prune, sweep)
app.command(epilog="Example: llmprune sweep demo --methods wanda,sparsegpt --sparsities 0.4,0.5,0.6 --out sweep")(sweep)
auto = with_options_of(prune, auto)
app.command(epilog="Example: llmprune auto demo --max-perplexity-increase 5% --out best")(auto)
app.command(epilog="Example: llmprune compare pruned other-pruned --out comparison.html")(compare)
app.command(epilog="Example: llmprune convert pruned --to packed")(convert)
app.command(epilog="Example: llmprune recover pruned --out recovered")(recover)
app.command(epilog="Example: llmprune report pruned --format csv --out results/pruned.csv")(report)


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
        structural = [
            {"name": method.name, "pattern": method.structure, "summary": method.summary, "paper": method.paper}
            for method in STRUCTURAL.values()
        ]
        typer.echo(json.dumps({"methods": table, "refined": REFINED, "structural": structural}, indent=1))
    else:
        print_methods([*METHODS.values(), *STRUCTURAL.values()], Console())


app.command(epilog="Example: llmprune benchmark pruned-packed --against pruned --device cpu")(benchmark)
app.command(epilog="Example: llmprune generate demo --prompt 'def main(' --max-new-tokens 64")(generate)


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
        if speaks(error):
            error_console.print(f"Error: {printable(message_of(error))}", style="red", markup=False)
        sys.exit(exit_code(error))


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


def known_commands() -> Iterable[str]:
    """Names of all commands, for the documentation test."""
    return sorted(str(command.name or command.callback.__name__) for command in app.registered_commands if command.callback)
