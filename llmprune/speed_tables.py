"""Tables for the terminal of what was measured of speed, and texts side by side. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from llmprune.io.render import NOTHING, brief, capitalized, count, how_measured, number, percent, rate, size, times
from llmprune.report import Generated, Generation
from llmprune.speed import Benchmark, BenchmarkSpeed, ModelSpeed, SpeedPair, point_of
from llmprune.terminal import add_row, make_table, printable

STYLES = {"faster": "bold green", "same": "bold", "slower": "bold yellow", "alone": "bold"}


def print_benchmark(benchmark: Benchmark, console: Console) -> None:
    """The verdict, then whole models, memory, single layers and what was done otherwise than asked; fits 80 columns."""
    versus = f" against {benchmark.against}" if benchmark.against else ""
    console.print(Text(printable(f"{benchmark.model}{versus} on {benchmark.environment.device}"), style="bold"))
    head, colon, rest = benchmark.verdict.text.partition(":")
    console.print(Text.assemble((printable(head), STYLES[benchmark.verdict.status]), printable(colon + rest)))
    if benchmark.subject.speeds:
        console.print(_whole(benchmark))
    console.print(_memory(benchmark))
    if benchmark.layers:
        console.print(_layers(benchmark))
    for line in (how_measured(benchmark), *map(capitalized, benchmark.notes)):
        console.print(Text(printable(line), style="dim"))


def _whole(benchmark: Benchmark) -> Table:
    pairs = {point_of(item.packed): item for item in benchmark.pairs}
    mixed = {point_of(speed): speed for speed in benchmark.mixed.speeds} if benchmark.mixed else {}
    compared = [] if benchmark.dense is None else ["dense"]
    names = [*compared, "packed" if benchmark.subject.num_packed else "model"]
    names += [*(["ratio"] if compared else []), *(["picked"] if mixed else []), "GB/s", "of copy"]
    table = make_table("Tokens per second", "size", *names)
    for speed in benchmark.subject.speeds:
        pair = pairs.get(point_of(speed))
        cells = [speed.phase, f"{count(speed.num_tokens)} tok" if speed.phase == "prefill" else f"batch {speed.batch_size}"]
        cells += [] if not compared else [rate(pair.dense.tokens_per_second) if pair else NOTHING]
        cells += [rate(speed.tokens_per_second), *([ratio_of(pair)] if compared else [])]
        if mixed:
            found = mixed.get(point_of(speed))
            cells.append(rate(found.tokens_per_second) if found else NOTHING)
        add_row(table, *cells, *_bandwidth(speed))
    return table


def ratio_of(pair: SpeedPair | None) -> str:
    """Packed over dense; ``~`` marks a ratio within the spread of the runs."""
    return NOTHING if pair is None else ("" if pair.clear else "~") + times(pair.ratio)


def _bandwidth(speed: BenchmarkSpeed) -> tuple[str, str]:
    return number(speed.gigabytes_per_second, 1), percent(speed.copy_share, 0)


def _memory(benchmark: Benchmark) -> Table:
    table = make_table("Memory", "weights", "of them packed", "peak")
    named: list[tuple[str, ModelSpeed | None]] = [
        ("dense", benchmark.dense),
        ("packed" if benchmark.subject.num_packed else "model", benchmark.subject),
        ("picked", benchmark.mixed),
    ]
    for name, model in named:
        if model is not None:
            packed = size(model.packed_bytes) if model.num_packed else NOTHING
            add_row(table, name, size(model.weights_bytes), packed, size(model.peak_bytes))
    return table


def _layers(benchmark: Benchmark) -> Table:
    table = make_table("Layers", "tokens", "dense", "packed", "ratio", "pick")
    for layer in benchmark.layers:
        name = f"{layer.num_layers} x {layer.format} {count(layer.shape[0])} x {count(layer.shape[1])}"
        for item in layer.times:
            cells = (
                count(item.num_tokens),
                brief(item.dense_seconds),
                brief(item.packed_seconds),
                times(item.ratio),
                item.pick,
            )
            add_row(table, name, *cells)
            name = ""
    return table


def side_by_side(texts: Sequence[tuple[str, str]]) -> RenderableType:
    """Columns of equal width, each a title and a text; control characters are made visible."""
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in texts:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*(Text(printable(title), style="bold") for title, _ in texts))
    table.add_row(*(Text(printable(text, keep="\n\t")) for _, text in texts))
    return table


def print_generation_numbers(generation: Generation, console: Console) -> None:
    """Tokens and speed of each model, how many tokens agree, and notes."""
    for item in (generation.generated, generation.compared):
        if item is not None:
            console.print(Text(printable(_numbers(item, titled=generation.compared is not None)), style="dim"))
    if generation.compared is not None and generation.num_agreeing is not None:
        longest = max(generation.generated.num_tokens, generation.compared.num_tokens)
        alike = generation.generated.tokens == generation.compared.tokens
        said = f"All {longest} tokens agree." if alike else f"{generation.num_agreeing} leading tokens of {longest} agree."
        console.print(Text(said, style="dim"))
    items = (item for item in (generation.generated, generation.compared) if item is not None)
    for note in dict.fromkeys(note for item in items for note in item.notes):
        console.print(Text(printable(f"Note: {note}"), style="yellow"))


def _numbers(item: Generated, *, titled: bool) -> str:
    speed = "" if item.tokens_per_second is None else f", {rate(item.tokens_per_second)} tokens/s"
    ended = ", ended by itself" if item.finished else ""
    prefill = f", first after {brief(item.prefill_seconds)}" if item.tokens else ""
    return f"{item.model + ': ' if titled else ''}{item.num_tokens} tokens{prefill}{speed}{ended}"
