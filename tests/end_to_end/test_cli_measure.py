"""``llmprune benchmark`` and ``llmprune generate``: streams, exit codes, what a terminal shows."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import llmprune
import tiny
from llmprune import cli_measure
from llmprune.cli_measure import numbers
from llmprune.errors import ConfigError
from llmprune.events import Benchmarked, Failed, parse_event
from llmprune.report import Benchmark, Generation

Cli = Callable[..., Any]
TINY = ("--prefill-tokens", "8", "--batch-sizes", "1,2", "--repeats", 3, "--seconds", 10, "--device", "cpu")


@pytest.fixture(scope="module")
def pair(tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A 2:4 checkpoint, packed and dense."""
    folder = tmp_path_factory.mktemp("measure")
    llmprune.prune(tiny_model_dir, out=folder / "pruned", pattern="2:4", calibration=str(text_file), eval=(), **tiny.QUICK)
    llmprune.convert(folder / "pruned", to="packed", out=folder / "packed")
    return folder / "packed", folder / "pruned"


def test_benchmark_prints_tables(cli: Cli, pair: tuple[Path, Path]) -> None:
    """The verdict and its reason, both models, memory, layers with picks, the protocol; progress on stderr."""
    outcome = cli("benchmark", pair[0], "--against", pair[1], *TINY)
    assert outcome.code == 0, outcome.err
    shown = " ".join(outcome.out.split())
    for words in ("weights 0.", "expanded to dense at every call", "These numbers say nothing about GPUs.", "decode batch 1",
                  "decode batch 2", "prefill 8 tok", "of copy", "Memory weights of them packed peak", "2:4 64 x 64",
                  "both models taking turns; no CUDA graphs"):  # fmt: skip
        assert words in shown, words
    assert "Measuring speed: started" in outcome.err and "started" not in outcome.out


def test_benchmark_of_a_dense_checkpoint_alone(cli: Cli, pair: tuple[Path, Path]) -> None:
    """Its speeds, and that zeros in dense tensors bring nothing."""
    outcome = cli("benchmark", pair[1], *TINY)
    assert outcome.code == 0, outcome.err
    shown = " ".join(outcome.out.split())
    assert "in dense tensors, which brings neither speed nor memory" in shown
    assert "ratio" not in shown and "Layers" not in shown


def test_benchmark_json_is_one_object(cli: Cli, pair: tuple[Path, Path]) -> None:
    """--json: the benchmark and nothing else."""
    outcome = cli("benchmark", pair[0], "--against", pair[1], "--json", *TINY)
    assert outcome.code == 0, outcome.err
    benchmark = Benchmark.model_validate_json(outcome.out)
    assert benchmark.subject.num_packed == 14 and len(benchmark.pairs) == 3
    assert benchmark.protocol.batch_sizes == (1, 2) and benchmark.protocol.repeats == 3


def test_benchmark_events(cli: Cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    """--events -: JSON lines, the last carries the numbers; with --json that is refused; a failure is the last line."""
    outcome = cli("benchmark", tiny_model_dir, "--events", "-", *TINY)
    assert outcome.code == 0, outcome.err
    events = [parse_event(line) for line in outcome.out.splitlines()]
    assert len(events) > 5 and isinstance(events[-1], Benchmarked)
    assert "both want stdout" in cli("benchmark", tiny_model_dir, "--events", "-", "--json", *TINY).err
    log = tmp_path / "events"
    assert cli("benchmark", tiny_model_dir, "--events", log, *TINY, "--repeats", 0).code == 2
    assert isinstance(parse_event(log.read_text().splitlines()[-1]), Failed)


@pytest.mark.parametrize(("text", "found"), [("1,4, 16", (1, 4, 16)), ("8", (8,)), ("none", ()), ("", ()), (None, None)])
def test_lists_of_numbers(text: str | None, found: tuple[int, ...] | None) -> None:
    """Commas between whole numbers, or none."""
    assert numbers(text, "--batch-sizes") == found


def test_lists_that_are_none() -> None:
    """Named with the option."""
    with pytest.raises(ConfigError, match="--batch-sizes '1;2' is not a list"):
        numbers("1;2", "--batch-sizes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("benchmark", "demo", "--batch-sizes", "many"), "--batch-sizes 'many' is not a list of whole numbers"),
        (("benchmark", "demo", "--batch-sizes", "0"), "batch_sizes.0: Input should be greater than or equal to 1"),
        (("benchmark", "demo", "--seconds", "0"), "seconds: Input should be greater than 0"),
        (("benchmark", "no/such/model/at/all"), "neither a directory nor a hub ID"),
        (("generate", "demo"), "--prompt TEXT is missing"),
        (("generate", "demo", "-p", "x", "--greedy", "-t", "0.5"), "contradict each other"),
        (("generate", "demo", "-p", "x", "-n", "0"), "max_new_tokens is 0"),
        (("generate", "demo", "-p", "x", "--chat"), "has no chat template"),
    ],
)
def test_mistakes_exit_2(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    """Exit code 2 and one line with the remedy."""
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err.splitlines()[-1]


def test_generate_streams_to_stdout(cli: Cli, trained_model_dir: Path) -> None:
    """The text alone on stdout, numbers on stderr."""
    outcome = cli("generate", trained_model_dir, "--prompt", "the model", "-n", 8, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    wanted = llmprune.generate(trained_model_dir, "the model", max_new_tokens=8, device="cpu").generated.text
    assert outcome.out == wanted + "\n"
    assert "8 tokens, first after" in outcome.err and "tokens/s" in outcome.err


def test_generate_reads_stdin(cli: Cli, trained_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--prompt -: what is piped in, without the last line's end."""
    options = ("-n", 4, "--json", "--device", "cpu")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the model\n"))
    outcome = cli("generate", trained_model_dir, "--prompt", "-", *options)
    assert outcome.code == 0, outcome.err
    generation = Generation.model_validate_json(outcome.out)
    assert generation.prompt == "the model"
    assert generation == generation.model_copy(update={"prompt": "the model"})
    other = Generation.model_validate_json(cli("generate", trained_model_dir, "-p", "the model", *options).out)
    assert other.generated.tokens == generation.generated.tokens


def test_generate_compares_one_below_the_other(cli: Cli, pair: tuple[Path, Path]) -> None:
    """Without a terminal: each text under its model's name; speeds, agreement and the note on stderr."""
    outcome = cli("generate", pair[0], "--compare", pair[1], "-p", "the model", "-n", 6, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert f"{pair[0]}:\n" in outcome.out and f"{pair[1]}:\n" in outcome.out
    shown = " ".join(outcome.err.split())
    assert "All 6 tokens agree." in shown
    assert "Note: on a CPU packed weights are expanded at every call" in shown


class Terminal(Console):
    """A terminal of some width that keeps what it shows."""

    def __init__(self, width: int) -> None:
        super().__init__(file=io.StringIO(), force_terminal=True, width=width, height=30, color_system=None)

    @property
    def shown(self) -> str:
        return self.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [100, 79])
def test_generate_compares_side_by_side_where_there_is_room(
    cli: Cli, pair: tuple[Path, Path], trained_model_dir: Path, monkeypatch: pytest.MonkeyPatch, width: int, tmp_path: Path
) -> None:
    """Two columns on a wide terminal, one below the other on a narrow one."""
    (tmp_path / "one").symlink_to(pair[0])
    (tmp_path / "two").symlink_to(pair[1])
    monkeypatch.chdir(tmp_path)
    terminal = Terminal(width)
    monkeypatch.setattr(cli_measure, "Console", lambda: terminal)
    outcome = cli("generate", "one", "--compare", "two", "-p", "the model", "-n", 6, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    last = [line for line in terminal.shown.splitlines() if "two" in line][-1]
    assert ("one" in last) == (width >= 80)


def test_control_characters_do_not_reach_the_terminal(cli: Cli, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model writes cannot clear the screen; line ends and tabs pass."""
    from llmprune import generation as module

    def hostile(*_: Any, **__: Any) -> str:
        return "a\x1b[2Jb\n\tc\x07"

    monkeypatch.setattr(module, "text_after", hostile)
    outcome = cli("generate", tiny_model_dir, "-p", "the", "-n", 1, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert outcome.out == "a\N{REPLACEMENT CHARACTER}[2Jb\n\tc\N{REPLACEMENT CHARACTER}\n"


def test_interrupt_exits_130(cli: Cli, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the model writes."""
    from llmprune import generation as module

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write", interrupt)
    outcome = cli("generate", tiny_model_dir, "-p", "the", "--device", "cpu")
    assert outcome.code == 130 and outcome.err.splitlines()[-1] == "Interrupted."
