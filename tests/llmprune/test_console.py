"""The terminal: the report's tables and the progress of a job."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable

import pytest
from rich.console import Console

from llmprune.console import LABELS, ProgressView, print_report
from llmprune.events import (
    BlockFinished,
    BlockStarted,
    Event,
    Finished,
    Progress,
    SitePruned,
    StageFinished,
    StageStarted,
    Warned,
)
from llmprune.io.render import render_html
from llmprune.report import Permutation, Reconstruction
from tests.reports import layer, sample_benchmark, sample_report

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def printed(width: int = 80, **changes: object) -> str:
    """The sample report as a terminal without colours shows it."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_report(sample_report(**changes), console)  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def job(num_blocks: int = 20, resumed_at: int = 0) -> list[Event]:
    """What a whole job says."""
    report = sample_report(num_blocks=num_blocks)
    events: list[Event] = [StageStarted(stage="load"), StageFinished(stage="load", seconds=1.5)]
    events += [StageStarted(stage="dense", total=3)]
    events += [Progress(stage="dense", done=done, total=3, detail="wikitext2 [1]") for done in (1, 2, 3)]
    events += [StageFinished(stage="dense", seconds=12.0)]
    events += [StageStarted(stage="prune", total=num_blocks, resumed_at=resumed_at)]
    for block in report.blocks[resumed_at:]:
        events += [BlockStarted(block=block.index, name=block.name, num_blocks=num_blocks)]
        events += [SitePruned(block=block.index, site=site) for site in block.sites]
        events += [BlockFinished(block=block.index, num_blocks=num_blocks, report=block)]
    events += [Warned(message="odd [red]name[/] \x1b[2J"), StageFinished(stage="prune", seconds=65.0)]
    return [*events, StageStarted(stage="save"), StageFinished(stage="save", seconds=2.0), Finished(report=report)]


def played(events: Iterable[Event], *, terminal: bool) -> str:
    """What a view of these events leaves on a console."""
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)
    with ProgressView(console) as view:
        for event in events:
            view.handle(event)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_report_shows_the_numbers() -> None:
    """Verdict, quality, sparsity, speed, stages, warnings and output are printed."""
    text = " ".join(printed().split())
    for figure in (
        "Qwen/Qwen3-0.6B: sparsegpt, unstructured, target 50 %",
        "Degraded but usable. Perplexity 20.97 -> 29.31 (1.40x)",
        "wikitext2 2048 20.97 29.31 1.40x 0.3127 74.21 %",
        "c4 2048 26.42 34.01 1.29x 0.2744 76.03 %",
        "28 pruned sites 31,520,184 62,914,560 50.10 %",
        "whole model 31,520,184 218,562,560 14.42 %",
        "prefill 1 2,048 61,250 61,012 ~1.00x",
        "decode 1 128 42.4 45.6 1.08x",
        "Pruning blocks 1 min 25 s 2.10 GiB 5.00 GiB",
        "all 1 min 57 s",
        "Warning: c4 was read from a local copy",
        "Written to pruned/qwen3-0.6b, 427.77 MiB",
    ):
        assert figure in text, figure


@pytest.mark.parametrize("num_experts", [0, 128])
def test_report_fits_80_columns(num_experts: int) -> None:
    """Long sources, huge perplexities and billions of weights stay inside the terminal, without cut numbers."""
    item = sample_report().quality[0]
    text = item.text.model_copy(update={"source": "hf:someone/a-very-long-dataset-name:config:train:text"})
    item = item.model_copy(update={"text": text, "perplexity_pruned": 87_654.321})
    shown = printed(num_blocks=48, num_experts=num_experts, quality=(item,))
    assert max(map(len, shown.splitlines())) <= 80
    assert "87,654.32" in shown
    assert "…" not in shown


def test_report_without_measurements() -> None:
    """A report with nothing measured prints its verdict and sparsity."""
    shown = printed(quality=(), latency=None, stages=(), warnings=(), out=None, blocks=(), calibration=None)
    assert "Not measured" in shown
    assert "0 pruned sites" in shown
    assert "None" not in shown


def test_report_shows_a_benchmark() -> None:
    """Verdict, speeds with ratio and bandwidth, memory, layers with picks, protocol and notes."""
    text = " ".join(printed(benchmark=sample_benchmark()).split())
    for figure in (
        "pruned-packed against pruned on NVIDIA H200",
        "Faster on NVIDIA H200: decode at batch 1 1.50x",
        "prefill 2,048 tok 42,000 40,000 0.95x – –",
        "decode batch 1 240.0 360.0 1.50x 3,240.0 81 %",
        "dense 13.97 GiB – 14.90 GiB",
        "packed 8.38 GiB 7.36 GiB 9.31 GiB",
        "64 x 2:4 14,336 x 4,096 1 30.2 µs 17.9 µs 1.69x packed",
        "64 x bitmask 1,024 x 4,096 1 5.00 µs 6.00 µs 0.83x dense",
        "Medians of up to 20 runs in 1 min 01 s, both models taking turns; CUDA graphs.",
        "Prefill stops at the model's maximum of 2048 tokens (asked: 8192).",
    ):
        assert figure in text, figure


def test_benchmark_with_a_mixed_model_fits_80_columns() -> None:
    """The widest table, of large numbers and a long name, is not cut."""
    benchmark = sample_benchmark()
    kinds = (layer("2:4 int8", (151_936, 18_944), 128, packed_seconds=0.123, dense_seconds=0.234, tokens=2048),)
    shown = printed(benchmark=sample_benchmark(mixed=benchmark.subject, layers=kinds, model="x" * 90))
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown and "picked" in shown


def test_names_are_literal() -> None:
    """Square brackets are no markup and control characters do not reach the terminal."""
    model = sample_report().model.model_copy(update={"name": "[bold]x[/] \x1b[2J"})
    shown = printed(model=model, warnings=("[/oops]",), out="[blue]dir")
    assert "[bold]x[/] \N{REPLACEMENT CHARACTER}[2J" in shown
    assert "[/oops]" in shown
    assert "[blue]dir" in shown
    assert "\x1b" not in shown


def test_lines_without_a_terminal() -> None:
    """A log gets a line per stage begun and ended and about one per tenth."""
    assert played(job(), terminal=False).splitlines() == [
        "Loading model: started",
        "Loading model: done in 1.5 s",
        "Measuring dense model: started",
        "Measuring dense model: 1/3 (33 %)",
        "Measuring dense model: 2/3 (67 %)",
        "Measuring dense model: done in 12.0 s",
        "Pruning blocks: started",
        *(f"Pruning blocks: {done}/20 ({5 * done} %)" for done in range(2, 20, 2)),
        "Warning: odd [red]name[/] \N{REPLACEMENT CHARACTER}[2J",
        "Pruning blocks: done in 1 min 05 s",
        "Writing checkpoint: started",
        "Writing checkpoint: done in 2.0 s",
    ]


def test_lines_of_a_resumed_job() -> None:
    """Work done before is not announced again."""
    lines = played(job(resumed_at=15), terminal=False).splitlines()
    pruning = [line for line in lines if line.startswith("Pruning")]
    assert pruning == [
        "Pruning blocks: resumed at 15/20",
        "Pruning blocks: 17/20 (85 %)",
        "Pruning blocks: 19/20 (95 %)",
        "Pruning blocks: done in 1 min 05 s",
    ]


def test_many_small_steps_make_few_lines() -> None:
    """A thousand steps make nine lines, not a thousand."""
    events: list[Event] = [StageStarted(stage="pruned", total=1000)]
    events += [Progress(stage="pruned", done=done, total=1000) for done in range(1, 1001)]
    assert len(played(events, terminal=False).splitlines()) == 1 + 9


def test_bars_on_a_terminal() -> None:
    """The last frame holds one full bar per stage with its seconds; warnings stay above; names are literal."""
    shown = ANSI.sub("", played(job(), terminal=True))
    frame = shown.replace("\r", "\n").splitlines()[-5:]
    for label, steps, seconds in (
        ("Loading model", "1/1", "1.5 s"),
        ("Measuring dense model", "3/3", "12.0 s"),
        ("Pruning blocks", "20/20", "1 min 05 s"),
        ("Writing checkpoint", "1/1", "2.0 s"),
    ):
        assert any(label in line and steps in line and seconds in line for line in frame), (label, frame)
    assert "Warning: odd [red]name[/] \N{REPLACEMENT CHARACTER}" in shown


def test_bar_of_a_resumed_stage_starts_there() -> None:
    """A resumed stage's bar begins where the earlier run stopped."""
    shown = ANSI.sub("", played([StageStarted(stage="prune", total=20, resumed_at=15)], terminal=True))
    assert "15/20" in shown
    assert "resumed at 15" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_view_ends_with_the_job_that_fails(terminal: bool) -> None:
    """An error passes through the view and leaves what was done on screen."""
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)
    with pytest.raises(RuntimeError, match="boom"), ProgressView(console) as view:
        view.handle(StageStarted(stage="prune", total=4))
        raise RuntimeError("boom")
    assert "Pruning blocks" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("terminal", [True, False])
def test_view_takes_events_of_a_stage_that_was_not_announced(terminal: bool) -> None:
    """A viewer that joins a running job late still shows its stages."""
    events: list[Event] = [Progress(stage="dense", done=5, total=10), StageFinished(stage="save", seconds=2.0)]
    shown = ANSI.sub("", played(events, terminal=terminal))
    assert "5/10" in shown
    assert "2.0 s" in shown


def test_default_console_is_stderr() -> None:
    """Progress leaves stdout to results."""
    assert ProgressView().console.stderr


def test_every_stage_has_a_label() -> None:
    """No stage of the event schema goes without words."""
    stages = StageStarted.model_fields["stage"].annotation.__args__  # type: ignore[union-attr]
    assert set(LABELS) == set(stages)


def test_permutation_is_one_line() -> None:
    """The mean shares of the matrices whose channels moved; those that stayed do not count."""
    report = sample_report(num_blocks=2)
    done = (
        Permutation(site="a", kept_before=0.7, kept_after=0.72),
        Permutation(site="b", kept_before=0.8, kept_after=0.82),
        Permutation(site="c", reason="held"),
    )
    blocks = (report.blocks[0].model_copy(update={"permutations": done}), report.blocks[1])
    shown = " ".join(printed(blocks=blocks).split())
    assert "Channels of 2 matrices reordered: mean share of the score kept 75.0 % -> 77.0 %" in shown
    assert "mean share of the score kept 75.0 %" in render_html(report.model_copy(update={"blocks": blocks}))
    assert "reordered" not in printed()


def test_reconstruction_is_one_line() -> None:
    """Mean errors, what was rolled back and what it cost; nothing where there was none."""
    report = sample_report(num_blocks=2)
    done = [
        Reconstruction(error_before=0.2, error_after=0.1, steps=120, seconds=40.0),
        Reconstruction(error_before=0.1, error_after=0.1, steps=50, seconds=20.0, rolled_back=True),
    ]
    pairs = zip(report.blocks, done, strict=True)
    blocks = tuple(block.model_copy(update={"reconstruction": item}) for block, item in pairs)
    shown = " ".join(printed(blocks=blocks).split())
    assert "Reconstruction of 2 blocks: mean held-out error 15.00 % -> 10.00 %, 1 rolled back" in shown
    assert "mean held-out error 15.00 %" in render_html(report.model_copy(update={"blocks": blocks}))
    assert "econstruction" not in printed()
