"""The command line: help, streams, exit codes, and the numbers it prints."""

from __future__ import annotations

import gc
import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import llmprune
import tiny
from llmprune import cli as command_line
from llmprune import cli_options
from llmprune.events import Evaluated, Event, Finished, Progress, parse_event
from llmprune.methods import METHODS
from llmprune.report import Evaluation, Inspection, Plan, Report
from llmprune.spec import PruneConfig

Cli = Callable[..., Any]
COMMANDS = (
    "auto", "benchmark", "compare", "convert", "evaluate", "fetch", "generate", "inspect", "methods", "plan", "prune",
    "recover", "report", "sweep",
)  # fmt: skip
QUICK = ("--num-samples", 4, "--seq-len", 32, "--max-eval-tokens", 512, "--no-latency", "--no-prompt")
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@pytest.fixture
def quick(text_file: Path, eval_file: Path) -> tuple[object, ...]:
    """Options that make a job on a tiny model quick and offline."""
    return ("--calibration", text_file, "--eval", eval_file, *QUICK)


@pytest.fixture(scope="module")
def pruned(tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned checkpoint."""
    out = tmp_path_factory.mktemp("cli") / "pruned"
    llmprune.prune(tiny_model_dir, out=out, calibration=str(text_file), eval=(), **tiny.QUICK)
    return out


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "NO_COLOR": "1", **environment}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_commands_are_the_documented_ones() -> None:
    """These, no more."""
    assert tuple(command_line.known_commands()) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_documents_every_option(cli: Cli, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """--help names every option of the command with a sentence, and gives an example."""
    monkeypatch.setenv("COLUMNS", "200")
    outcome = cli(command, "--help")
    shown = ANSI.sub("", outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    function = getattr(command_line, command)
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        (info,) = parameter.annotation.__metadata__
        assert info.help, parameter.name
        for name in info.param_decls or ():
            for part in name.split("/"):
                assert part in shown, name
        assert " ".join(info.help.split()[:4]) in " ".join(shown.split()), parameter.name
    assert inspect.getdoc(function).split(".")[0].split(",")[0] in shown  # type: ignore[union-attr]
    assert f"llmprune {command}" in shown


def test_every_config_field_is_an_option_of_prune() -> None:
    """What Python can ask for, the command line can ask for."""
    assert set(PruneConfig.model_fields) <= set(inspect.signature(command_line.prune).parameters)


def test_no_command_shows_the_help(cli: Cli) -> None:
    """``llmprune`` alone lists its commands."""
    outcome = cli()
    assert all(command in outcome.out + outcome.err for command in COMMANDS)


def test_version(cli: Cli) -> None:
    """--version prints it and exits 0."""
    assert cli("--version") == (0, f"{llmprune.__version__}\n", "")


def test_prune_prints_the_report_and_where_things_are(
    cli: Cli, tiny_model_dir: Path, quick: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report on stdout, progress on stderr, paths of the checkpoint and the page; parents of --out are made."""
    monkeypatch.chdir(tmp_path)
    outcome = cli("prune", tiny_model_dir, "--out", "runs/first", "-m", "wanda", "-s", "0.5", *quick)
    assert outcome.code == 0
    assert "50.00 %" in outcome.out and "Perplexity" in outcome.out
    assert f"Checkpoint   {tmp_path / 'runs' / 'first'}" in outcome.out
    assert f"Report page  {tmp_path / 'runs' / 'first' / 'report.html'}" in outcome.out
    assert "Pruning blocks: started" in outcome.err and "started" not in outcome.out
    assert json.loads((tmp_path / "runs" / "first" / "report.json").read_text())["out"] == "runs/first"


def test_prune_json_is_one_object(cli: Cli, tiny_model_dir: Path, quick: tuple[object, ...], tmp_path: Path) -> None:
    """--json: stdout is the report and nothing else."""
    outcome = cli("prune", tiny_model_dir, "-o", tmp_path / "out", "--json", *quick)
    assert outcome.code == 0
    report = Report.model_validate_json(outcome.out)
    assert report == Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert report.sparsity == 0.5 and report.num_sites == 14


def test_every_option_reaches_the_config(
    cli: Cli, tiny_model_dir: Path, text_file: Path, eval_file: Path, tmp_path: Path
) -> None:
    """All options together end up in the report's config."""
    outcome = cli(
        "prune", tiny_model_dir, "--out", tmp_path / "out", "--method", "sparsegpt", "--pattern", "2:4", "--scope", "row",
        "--sequential", "block", "--skip", "*.down_proj", "--skip", "*.up_proj", "--calibration", text_file,
        "--num-samples", 3, "--seq-len", 24, "--batch-size", 2, "--eval", eval_file, "--eval", text_file,
        "--max-eval-tokens", 240, "--latency", "--damping", 0.02, "--permute", "--reconstruct",
        "--reconstruct-steps", 5, "--reconstruct-rounds", 2,
        "--reconstruct-lr", 0.01, "--device", "cpu", "--dtype", "float32", "--seed", 7,
        "--revision", "main", "--trust-remote-code", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    report = Report.model_validate_json(outcome.out)
    assert report.config == PruneConfig(
        model=str(tiny_model_dir), method="sparsegpt", pattern="2:4", scope="row", sequential="block",
        skip=("*.down_proj", "*.up_proj"), calibration=str(text_file), num_samples=3, seq_len=24, batch_size=2,
        eval=(str(eval_file), str(text_file)), max_eval_tokens=240, latency=True, damping=0.02, permute=True, reconstruct=True,
        reconstruct_steps=5, reconstruct_rounds=2, reconstruct_lr=0.01, device="cpu",
        dtype="float32", seed=7, revision="main", trust_remote_code=True,
    )  # fmt: skip
    assert report.num_sites == 10 and report.walk == "two-pass" and report.latency is not None


def test_events_on_stdout_are_json_lines_only(
    cli: Cli, tiny_model_dir: Path, quick: tuple[object, ...], tmp_path: Path
) -> None:
    """--events -: every line of stdout is an event, the last one carries the report; for evaluate too."""
    outcome = cli("prune", tiny_model_dir, "-o", tmp_path / "out", "--events", "-", *quick)
    assert outcome.code == 0
    events = [parse_event(line) for line in outcome.out.splitlines()]
    assert len(events) > 20 and isinstance(events[-1], Finished)
    outcome = cli("evaluate", tmp_path / "out", "--events", "-", *quick[2:4], *QUICK[2:-1])
    assert outcome.code == 0
    events = [parse_event(line) for line in outcome.out.splitlines()]
    assert len(events) > 2 and isinstance(events[-1], Evaluated)


def test_events_to_a_file_leave_stdout_to_json(
    cli: Cli, tiny_model_dir: Path, quick: tuple[object, ...], tmp_path: Path
) -> None:
    """--events FILE --json: lines in the file, the report on stdout; both on stdout is refused."""
    log = tmp_path / "events.jsonl"
    outcome = cli("prune", tiny_model_dir, "-o", tmp_path / "out", "--events", log, "--json", *quick)
    assert outcome.code == 0
    last = parse_event(log.read_text().splitlines()[-1])
    assert isinstance(last, Finished) and last.report == Report.model_validate_json(outcome.out)
    for command in ("prune", "evaluate"):
        outcome = cli(command, tiny_model_dir, "--events", "-", "--json", *quick[2:4])
        assert outcome.code == 2 and outcome.out == "" and "both want stdout" in outcome.err
    outcome = cli("prune", tiny_model_dir, "-o", tmp_path / "other", "--events", tmp_path / "no" / "log", *quick)
    assert outcome.code == 2 and "cannot be written (No such file or directory)" in outcome.err
    assert not (tmp_path / "other").exists()


def test_broken_verdict_is_called_out_on_stderr(
    cli: Cli, trained_model_dir: Path, quick: tuple[object, ...], tmp_path: Path
) -> None:
    """A broken model is said on stderr whatever stdout carries; the exit code is that of a job done."""
    outcome = cli("prune", trained_model_dir, "-o", tmp_path / "out", "-m", "magnitude", "-s", "0.95", "--json", *quick)
    assert outcome.code == 0
    assert json.loads(outcome.out)["verdict"]["status"] == "broken"
    assert re.search(r"Broken: perplexity [\d.]+ -> [\d.]+ \([\d.]+x\) on .*more than 2x", outcome.err)


def test_no_eval_measures_nothing(cli: Cli, tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """--no-eval needs no evaluation text and says that the quality is unknown."""
    outcome = cli("prune", tiny_model_dir, "-o", tmp_path / "out", "-c", text_file, "--no-eval", *QUICK)
    assert outcome.code == 0 and "quality of this checkpoint is unknown" in " ".join(outcome.out.split())


def test_reports_in_other_formats(cli: Cli, tiny_model_dir: Path, quick: tuple[object, ...], tmp_path: Path) -> None:
    """Beside the checkpoint and where they are wanted, and again from the finished one, with the same bytes."""
    out, table = tmp_path / "out", tmp_path / "tables" / "one.csv"
    outcome = cli("prune", tiny_model_dir, "-o", out, "--export-report", "md", "--export-report", table, *quick)
    assert outcome.code == 0
    beside = tmp_path / "out-report.md"
    for file in (beside, table, table.with_name("one-summary.csv")):
        assert f"Report       {file}" in outcome.out and file.is_file()
    assert len(table.read_text().splitlines()) == 15
    assert cli("report", out, "--format", "md") == (0, beside.read_text(), "")
    assert cli("report", out / "report.json", "-o", tmp_path / "again", "-f", "md") == (0, f"{tmp_path / 'again.md'}\n", "")
    assert (tmp_path / "again.md").read_bytes() == beside.read_bytes()
    assert "Perplexity" in cli("report", out).out
    assert cli("report", out, "-f", "pdf").code == cli("prune", "demo", "-o", tmp_path / "x", "--export-report", "x").code == 2


def test_evaluate_prints_a_table_or_one_object(cli: Cli, pruned: Path, tiny_model_dir: Path, quick: tuple[object, ...]) -> None:
    """Alone a perplexity; with --against the divergence as well."""
    options = (*quick[2:4], *QUICK[2:-1])
    outcome = cli("evaluate", pruned, *options)
    assert outcome.code == 0 and "perplexity" in outcome.out
    outcome = cli("evaluate", pruned, "--against", tiny_model_dir, "--json", *options)
    assert outcome.code == 0
    evaluation = Evaluation.model_validate_json(outcome.out)
    assert evaluation.against == str(tiny_model_dir)
    assert evaluation.quality[0].kl is not None and evaluation.quality[0].kl > 0
    assert evaluation.quality[0].ratio is not None


def test_evaluate_measures_speed_unless_told_not_to(cli: Cli, pruned: Path, quick: tuple[object, ...]) -> None:
    """Prefill and decode of the model as it lies there."""
    outcome = cli("evaluate", pruned, *quick[2:4], "--seq-len", 32, "--max-eval-tokens", 64)
    assert outcome.code == 0
    assert re.search(r"prefill: .*tokens/s", outcome.out) and re.search(r"decode: .*tokens/s", outcome.out)


def test_plan_prints_a_table_or_one_object(cli: Cli, tiny_model_dir: Path, quick: tuple[object, ...]) -> None:
    """Plan in words and as JSON."""
    outcome = cli("plan", tiny_model_dir, *quick[:-2])
    assert outcome.code == 0 and "CPU memory" in outcome.out
    outcome = cli("plan", tiny_model_dir, "--json", *quick[:-2])
    assert outcome.code == 0
    assert Plan.model_validate_json(outcome.out).num_sites == 14


def test_plan_that_cannot_fit_exits_2_with_the_flag(cli: Cli, tiny_model_dir: Path, quick: tuple[object, ...]) -> None:
    """A calibration set beyond any memory: the plan is printed, the error names the flag that lowers it."""
    outcome = cli("plan", tiny_model_dir, *quick[:4], "--num-samples", 10**9, "--seq-len", 64, "--json")
    assert outcome.code == 2
    plan = Plan.model_validate_json(outcome.out)
    assert not plan.fits and any("CPU memory" in problem for problem in plan.problems)
    assert "Use --num-samples 250000000 or --seq-len" in outcome.err


def test_inspect_prints_a_table_or_one_object(cli: Cli, pruned: Path) -> None:
    """Blocks of one kind are folded into one table; JSON lists every site."""
    outcome = cli("inspect", pruned)
    assert outcome.code == 0 and "Blocks 0-1" in outcome.out and "50.00 %" in outcome.out
    outcome = cli("inspect", pruned, "--json")
    assert outcome.code == 0
    assert sum(map(len, Inspection.model_validate_json(outcome.out).blocks)) == 14


def test_methods_lists_the_registry(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every registered method, as a table and as one object."""
    monkeypatch.setenv("COLUMNS", "160")
    outcome = cli("methods")
    assert outcome.code == 0 and all(name in outcome.out for name in METHODS)
    outcome = cli("methods", "--json")
    assert outcome.code == 0
    assert [method["name"] for method in json.loads(outcome.out)["methods"]] == list(METHODS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune", "demo"), "--out DIR is missing"),
        (("prune", "demo", "-o", "x", "--sparsity", "1"), "sparsity: Input should be less than 1, got 1.0"),
        (("prune", "demo", "-o", "x", "--pattern", "4:2"), "0 < n < m"),
        (("prune", "demo", "-o", "x", "--pattern", "2:4", "-s", "0.7"), "2:4 means sparsity 0.5"),
        (("evaluate", "demo", "--dtype", "int8"), "dtype: Input should be"),
        (("prune", "demo", "--no-such-option"), "No such option: --no-such-option"),
        (("prune", "demo", "-o", "x", "--num-samples", "many"), "Invalid value for '--num-samples': "),
        (("prnue",), "No such command 'prnue'"),
    ],
)
def test_mistakes_exit_2(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    """A user's mistake: exit code 2, the reason on stderr, nothing on stdout, nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in ANSI.sub("", outcome.err)
    assert not list(tmp_path.iterdir())


def test_our_own_errors_exit_1(cli: Cli, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is not the user's: exit code 1, one line even where the message has several."""
    from llmprune import inspection
    from llmprune.errors import JournalError

    def fail(**_: object) -> None:
        raise JournalError("a record\n  is \x1b[31mdamaged")

    monkeypatch.setattr(inspection, "inspect", fail)
    assert cli("inspect", tiny_model_dir) == (1, "", "Error: a record is \N{REPLACEMENT CHARACTER}[31mdamaged\n")


def test_interrupt_says_how_to_go_on(
    cli: Cli, tiny_model_dir: Path, quick: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C: exit code 130, one line, no output directory, and a journal that --resume takes up."""
    from llmprune.io.journal import Journal

    write_block = Journal.write_block

    def interrupt(self: Journal, index: int, *arguments: Any) -> None:
        write_block(self, index, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write_block", interrupt)
    outcome = cli("prune", tiny_model_dir, "-o", tmp_path / "out", *quick)
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == "Interrupted. Finished blocks are kept: go on with --resume."
    assert [file.name for file in tmp_path.iterdir()] == ["out.work"]
    monkeypatch.undo()
    outcome = cli("prune", tiny_model_dir, "-o", tmp_path / "out", "--resume", *quick)
    assert outcome.code == 0 and "resumed at 1/2" in outcome.err


def test_a_process_of_its_own_keeps_streams_and_codes(tiny_model_dir: Path, tmp_path: Path) -> None:
    """``python -m llmprune``: JSON alone on stdout with exit 0; one line on stderr with exit 2."""
    done = python("-W", "error", "-m", "llmprune", "inspect", tiny_model_dir, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert Inspection.model_validate_json(done.stdout).stack == "model.layers"
    failed = python("-m", "llmprune", "prune", tiny_model_dir)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("\n") == 1 and failed.stderr.startswith("Error: ")
    assert not list(tmp_path.iterdir())


def a_command(app: typer.Typer) -> None:
    """What an installed package's entry point names."""

    @app.command()
    def hello(name: str = "you") -> None:
        """Greet."""
        typer.echo(f"hello {name}")

    app.add_typer(typer.Typer(help="Many commands."), name="many")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a package without code that registers these entry points, by name."""

    def install(**points: str) -> None:
        folder = tmp_path / "site" / "plugins-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (folder / "entry_points.txt").write_text("\n".join(["[llmprune.commands]", *lines]))
        monkeypatch.syspath_prepend(folder.parent)

    return install


def test_installed_packages_add_commands(cli: Cli, installed: Callable[..., None]) -> None:
    """They are in the help and run, as often as main is called; a package that cannot be imported is left out."""
    installed(broken="no_such_package_at_all:register", good=f"{__name__}:a_command", other="llmprune.no_such_module:register")
    for _ in range(2):
        shown = ANSI.sub("", cli("--help").out)
        assert all(name in shown for name in ("hello", "Greet.", "many", "Many commands.", *COMMANDS))
        assert shown.count("Greet.") == 1
        assert cli("hello", "--name", "there") == (0, "hello there\n", "")
    assert tuple(command_line.known_commands()) == COMMANDS


def test_a_plugin_that_is_wrong_is_not_hidden(cli: Cli, installed: Callable[..., None]) -> None:
    """Only a missing import is forgiven: other errors are the package's to mend."""
    installed(wrong=f"{__name__}:COMMANDS")
    with pytest.raises(TypeError):
        cli("methods")


def test_plugins_cost_the_help_nothing_worth_noticing() -> None:
    """Looking for entry points takes less than 50 ms (best of five)."""
    seconds = []
    for _ in range(5):
        begun = time.process_time()
        command_line.with_plugins()
        seconds.append(time.process_time() - begun)
    assert min(seconds) < 0.05


_IMPORT = """
import sys, time
begun = time.process_time()
import llmprune
seconds = time.process_time() - begun
heavy = {"torch", "transformers", "numpy", "datasets", "huggingface_hub", "rich", "typer"}.intersection(sys.modules)
assert not heavy, heavy
assert llmprune.PruneConfig().model == "demo"
print(seconds)
"""


def test_import_is_quick_and_does_not_import_torch() -> None:
    """``import llmprune`` takes less than 0.3 s of the processor (best of five) and no heavy package."""
    seconds = []
    for _ in range(5):
        done = python("-c", _IMPORT)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
        if seconds[-1] < 0.3:
            return
    pytest.fail(f"import llmprune took {min(seconds):.2f} s at best")


def test_garbage_is_not_sought_in_what_was_imported() -> None:
    """From a command's first event on: a stage begins with a collection, and torch alone takes a quarter of a second each."""
    cli_options._freeze_what_is_imported.cache_clear()
    gc.unfreeze()
    counts = []

    def events() -> Iterator[Event]:
        counts.append(gc.get_freeze_count())
        yield Progress(stage="load", done=1, total=1)
        counts.append(gc.get_freeze_count())

    cli_options.follow(events(), None)
    assert counts[0] == 0 and counts[1] > 10_000


_METHODS = """
import sys
from llmprune.cli import app
app(["methods", "--json"], standalone_mode=False)
assert "torch" not in sys.modules
"""


def test_light_commands_do_not_import_torch() -> None:
    """``methods``, and with it every --help, answers without the seconds torch takes."""
    done = python("-c", _METHODS)
    assert done.returncode == 0, done.stderr
    assert "wanda" in done.stdout
