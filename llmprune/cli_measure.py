"""Commands that look at what a packed model is worth: ``llmprune benchmark`` and ``llmprune generate``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import IO, Annotated

import typer
from rich.console import Console
from rich.live import Live

from llmprune.cli_options import (
    Device,
    DtypeName,
    EventsFile,
    Json,
    Model,
    Revision,
    Seed,
    TrustRemoteCode,
    check_streams,
    config_fields,
    error_console,
    event_sink,
    follow,
    heavy_imports,
    print_json,
    show,
)  # fmt: skip
from llmprune.errors import ConfigError
from llmprune.events import Benchmarked, Event, StageStarted, TextGenerated, TextPiece
from llmprune.report import Generation
from llmprune.spec import BUNDLED_MODEL
from llmprune.speed_tables import print_benchmark, print_generation_numbers, side_by_side
from llmprune.terminal import printable

WIDE = 80
"""Columns of a terminal from which on two texts stand side by side."""


def benchmark(
    model: Model = BUNDLED_MODEL,
    against: Annotated[str | None, typer.Option("--against", help="Dense original to compare with, run by turns.")] = None,
    prefill_tokens: Annotated[
        str | None, typer.Option("--prefill-tokens", help="Prompt lengths to read, at batch 1. Default: 128,512,2048.")
    ] = None,
    batch_sizes: Annotated[
        str | None, typer.Option("--batch-sizes", help="Batch sizes to decode at, a token at a time. Default: 1,4,16,64.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option("--repeats", help="At most so many timed runs of a point. Default: 20.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="About how long all of it may take, without loading. Default: 60.")
    ] = None,
    device: Device = None,
    dtype: DtypeName = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = None,
    events: EventsFile = None,
    as_json: Json = False,
) -> None:
    """Measure the speed of MODEL, whole and layer by layer, and with --against whether being packed makes it faster.

    Prefill (reading a prompt) and decode (writing, a token at a time) are different things: the first is bound by arithmetic,
    the second by reading the weights, which is where packed weights can help. Numbers are medians and quartiles of runs after
    a warm-up; a difference within the quartiles is called none. What is said holds for this device alone.
    """
    fields = config_fields(locals())
    check_streams(events, as_json)
    with event_sink(events) as sink:
        prefill, batches = numbers(prefill_tokens, "--prefill-tokens"), numbers(batch_sizes, "--batch-sizes")
        with heavy_imports():
            from llmprune.benchmarking import benchmark_iter
        run = benchmark_iter(
            against=against, prefill_tokens=prefill, batch_sizes=batches, repeats=repeats, seconds=seconds, **fields
        )
        last = follow(run, sink)
    assert isinstance(last, Benchmarked)
    if events != "-":
        show(last.benchmark, as_json, print_benchmark)


def generate(
    model: Model = BUNDLED_MODEL,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to go on with, or - to read it from stdin.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option("--compare", help="Another model, such as the dense one, to write too.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Write at most so many tokens.")] = 128,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="Draw tokens; higher is wilder, 0.7 is usual. Default: greedy.")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most probable token (the default).")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")] = False,
    seed: Seed = None,
    device: Device = None,
    dtype: DtypeName = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = None,
    as_json: Json = False,
) -> None:
    """Let MODEL write, shown as it comes, and with --compare another model after it, side by side.

    With the same prompt, greedy, a packed model and the same model in dense weights write the same but for rounding; a pruned
    model and its dense original part ways sooner or later, and the number of leading tokens that agree says when.
    """
    fields = config_fields({name: value for name, value in locals().items() if name != "prompt"})  # a job's are several
    if greedy and temperature:
        raise ConfigError("--greedy and --temperature contradict each other; give one of them.")
    text = _prompt(prompt)
    with heavy_imports():
        from llmprune.generation import generate_iter
    run = generate_iter(
        fields.pop("model"), text, compare=compare, max_new_tokens=max_new_tokens, temperature=temperature or 0.0, chat=chat,
        **{name: value for name, value in fields.items() if value is not None},
    )  # fmt: skip
    console = Console()
    try:
        if as_json:
            print_json(_last(run))
        elif compare is not None and console.is_terminal and console.width >= WIDE:
            _show_side_by_side(run, console)
        else:
            _show_as_it_comes(run, console, titled=compare is not None)
    except KeyboardInterrupt:
        error_console.print("\nInterrupted.", markup=False)
        raise typer.Exit(130) from None


def numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """``1,4,16`` as integers; ``none`` or nothing for none at all. Raises ConfigError."""
    if text is None:
        return None
    if text.strip() in ("", "none"):
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a list of whole numbers; give them as 1,4,16, or none.") from None


def _prompt(given: str | None) -> str:
    if given is None:
        raise ConfigError("--prompt TEXT is missing: what is the model to go on with? Use - to read it from stdin.")
    if given != "-":
        return given
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt on stdin is not {error.encoding} text.") from None


def _last(run: Iterator[Event]) -> Generation:
    *_, last = run
    assert isinstance(last, TextGenerated)
    return last.generation


def _show_as_it_comes(run: Iterator[Event], console: Console, *, titled: bool) -> None:
    """Text on stdout as it is written, under the name of its model where there are two; numbers and notes on stderr."""
    writing = False
    generation = None
    loading = error_console.status("Loading model") if error_console.is_terminal else nullcontext()
    with loading:
        first = [next(run), next(run)]  # loading begins and ends
    for event in (*first, *run):
        if isinstance(event, StageStarted):
            if writing:
                console.print("\n")
            writing = False
        elif isinstance(event, TextPiece):
            if titled and not writing:
                console.print(f"{printable(event.model)}:", style="bold", markup=False, soft_wrap=True)
            writing = True
            _write(console.file, event.text)
        elif isinstance(event, TextGenerated):
            generation = event.generation
    console.print()
    console.file.flush()
    assert generation is not None
    print_generation_numbers(generation, error_console)


def _show_side_by_side(run: Iterator[Event], console: Console) -> None:
    """Two columns that fill one after the other, drawn anew while they do."""
    texts: list[tuple[str, str]] = []
    generation = None
    with Live(console=console, transient=True, vertical_overflow="ellipsis", refresh_per_second=8) as live:
        for event in run:
            if isinstance(event, StageStarted) and event.stage == "generate":
                texts.append(("", ""))
            elif isinstance(event, TextPiece):
                texts[-1] = (event.model, texts[-1][1] + event.text)
                live.update(side_by_side([*texts, ("", "")][:2]))
            elif isinstance(event, TextGenerated):
                generation = event.generation
    assert generation is not None and generation.compared is not None
    both = (generation.generated, generation.compared)
    console.print(side_by_side([(item.model, item.text) for item in both]))
    print_generation_numbers(generation, error_console)


def _write(stream: IO[str], text: str) -> None:
    stream.write(printable(text, keep="\n\t"))
    stream.flush()
