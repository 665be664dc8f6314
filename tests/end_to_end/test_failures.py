"""How a run that fails says so: the last event, the exit code, and memory that ran out."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import llmprune
import tiny
from forked import PROCESSES
from llmprune import errors
from llmprune.cli import main
from llmprune.devices import is_out_of_memory, memory_errors
from llmprune.errors import LlmpruneError, OutOfMemory, TextError, UserError
from llmprune.events import Event, Failed, StageStarted, parse_event
from llmprune.io.journal import Journal

Cli = Callable[..., Any]
QUICK = ("--num-samples", 4, "--seq-len", 32, "--max-eval-tokens", 512, "--no-latency", "--no-prompt")


@pytest.fixture
def quick(text_file: Path) -> tuple[object, ...]:
    """Options that make a job on a tiny model quick and offline."""
    return ("--calibration", text_file, "--no-eval", *QUICK)


def parsed(lines: str) -> list[Event]:
    """The events in a text of one a line, and nothing else."""
    return [parse_event(line) for line in lines.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune", "demo"), "--out DIR is missing: where should the checkpoint go?"),
        (("prune", "demo", "-o", "x", "-s", "1"), "sparsity: Input should be less than 1, got 1.0"),
        (("evaluate", "demo", "--eval", "synthetic"), "'synthetic' is for calibration only"),
        (("evaluate", "demo", "--dtype", "int8"), "dtype: Input should be"),
        (("fetch", "demo", "--calibration", "wikitext"), "Did you mean 'wikitext2'"),
        (("fetch", "./nowhere", "--calibration", "stdlib", "--no-eval"), "'./nowhere' is neither a directory nor a hub ID"),
    ],
)
def test_errors_before_the_first_event_are_events_too(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    """Class and message as on stderr, in one line, on stdout or in a file."""
    monkeypatch.chdir(tmp_path)
    outcome = cli(*arguments, "--events", "-")
    assert outcome.code == 2
    failed = parsed(outcome.out)[-1]
    assert isinstance(failed, Failed) and failed.exit_code == 2 and message in failed.message
    assert issubclass(getattr(errors, failed.error), UserError)
    assert outcome.err.splitlines()[-1] == f"Error: {failed.message}"
    assert not [event for event in parsed(outcome.out)[:-1] if event.event != "stage_started"]
    outcome = cli(*arguments, "--events", "events.jsonl")
    assert (outcome.code, outcome.out) == (2, "")
    assert parsed(Path("events.jsonl").read_text())[-1] == failed
    assert [file.name for file in tmp_path.iterdir()] == ["events.jsonl"]


def test_an_error_in_the_middle_ends_the_events(
    cli: Cli, tiny_model_dir: Path, quick: tuple[object, ...], tmp_path: Path
) -> None:
    """What was done comes first; our own errors have exit code 1."""
    tensors = load_file(tiny.save(tiny.make_model(), tmp_path / "model") / "model.safetensors")
    for leaf in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{leaf}.weight"] *= 1e30
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    outcome = cli("prune", tmp_path / "model", "--out", tmp_path / "out", *quick, "--events", "-")
    *events, failed = parsed(outcome.out)
    assert outcome.code == 1 and "block_finished" in {event.event for event in events}
    assert isinstance(failed, Failed)
    assert (failed.error, failed.exit_code) == ("NonFiniteError", 1) and "model.layers.1" in failed.message
    assert not any(isinstance(event, Failed) for event in events)


def test_a_message_of_several_lines_is_one(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a library put into it."""

    def fail(*_: object, **__: object) -> None:
        raise TextError("one\n  two\r\nthree ")

    monkeypatch.setattr("llmprune.io.text.fetch", fail)
    outcome = cli("fetch", "demo", "--events", "-")
    assert parsed(outcome.out)[-1] == Failed(error="TextError", message="one two three", exit_code=2)


def test_an_internal_error_names_its_type_alone(
    tiny_model_dir: Path,
    quick: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What it says may hold anything, so only the type is in the event; the exception itself goes on its way."""

    def fail(*_: object) -> None:
        raise LookupError("a secret")

    monkeypatch.setattr(Journal, "write_block", fail)
    argv = ["llmprune", "prune", tiny_model_dir, "--out", tmp_path / "out", *quick, "--events", "-"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    with pytest.raises(LookupError, match="a secret"):
        main()
    out = capsys.readouterr().out
    assert parsed(out)[-1] == Failed(error="InternalError", message="LookupError", exit_code=1)
    assert "secret" not in out


def test_an_interrupt_is_no_failure(
    cli: Cli, tiny_model_dir: Path, quick: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the events where they are."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write_block", interrupt)
    outcome = cli("prune", tiny_model_dir, "--out", tmp_path / "out", *quick, "--events", "-")
    assert outcome.code == 130
    assert not any(isinstance(event, Failed) for event in parsed(outcome.out))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_sink_that_takes_nothing_does_not_hide_the_error(cli: Cli, tiny_model_dir: Path, quick: tuple[object, ...]) -> None:
    """The user's mistake is still one line with its exit code; a job whose events get lost stops."""
    outcome = cli("prune", tiny_model_dir, "--events", "/dev/full")
    assert (outcome.code, outcome.err.splitlines()[-1][:20]) == (2, "Error: --out DIR is ")
    with pytest.raises(OSError, match="No space left"):
        cli("evaluate", tiny_model_dir, "--eval", quick[1], *QUICK[2:-1], "--events", "/dev/full")


def test_a_traceback_goes_to_stderr_and_not_to_the_events(tiny_model_dir: Path, text_file: Path) -> None:
    """In a process of its own: one JSON line at the end of stdout, the traceback on stderr, exit code 1."""
    code = (
        "import sys, llmprune.fetching as f; from llmprune.cli import main\n"
        "f.resolve = lambda config: {}['secret']\n"
        f"sys.argv = ['llmprune', 'fetch', {str(tiny_model_dir)!r}, '-c', {str(text_file)!r}, '--no-eval', '--events', '-']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert [event.event for event in parsed(done.stdout)] == ["stage_started", "failed"]
    assert "secret" not in done.stdout and "KeyError: 'secret'" in done.stderr and "Traceback" in done.stderr


@pytest.mark.parametrize(
    "event",
    [Failed(error="OutOfMemory", message="m", exit_code=2), Failed(error="InternalError", message="KeyError", exit_code=1)],
)
def test_failed_reads_back(event: Failed) -> None:
    """What is written is what is parsed."""
    assert parse_event(event.model_dump_json()) == event


def _allocate_host() -> object:
    return bytearray(2**62)


def _allocate_numpy() -> object:
    return np.empty(2**59)


def _allocate_torch() -> object:
    return torch.empty(2**58)


@pytest.mark.parametrize("allocate", [_allocate_host, _allocate_numpy, _allocate_torch])
def test_allocations_that_really_fail_are_out_of_memory(allocate: Callable[[], object]) -> None:
    """Python's, numpy's and torch's allocators, asked for more than there is anywhere."""
    message = r"^memory ran out \(.+\)\. Use a smaller --batch-size or --seq-len; `llmprune plan` says what a job needs\.$"
    with pytest.raises(OutOfMemory, match=message), memory_errors():
        allocate()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.cuda.OutOfMemoryError("HIP out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: ..."), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."), True),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), True),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (TextError("the file memoirs-of-memory.txt is out of memory"), False),
    ],
    ids=str,
)
def test_errors_are_told_apart(error: Exception, expected: bool) -> None:
    """By type, and RuntimeError by what it says; everything else passes as it is."""
    assert is_out_of_memory(error) == expected
    with pytest.raises(OutOfMemory if expected else type(error)) as caught, memory_errors():
        raise error
    assert expected or caught.value is error


def starve(job: dict[str, Any], out: Path, answer: Any) -> None:
    """Run a job whose process may not grow any more once it prunes; sends what it raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        for event in llmprune.prune_iter(out=out, **job):
            if isinstance(event, StageStarted) and event.stage == "prune":
                resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**22, hard))
        answer.send(None)
    except LlmpruneError as error:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        answer.send((type(error).__name__, str(error), error.exit_code))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds an address space")
def test_a_process_that_may_not_grow_runs_out_of_memory(tmp_path: Path) -> None:
    """For real: the allocator refuses in the middle of a job; what is finished is kept, and with memory it is resumed."""
    # 16384 tokens, 1024 wide: 64 MiB, which malloc takes from the system and not from what it holds.
    model = tiny.save(tiny.make_model(intermediate_size=1024), tmp_path / "wide")
    text = tmp_path / "long.txt"
    text.write_text(tiny.prose(35_000, seed=4))
    job: dict[str, Any] = {"model": str(model), "calibration": str(text), "eval": (), "latency": False, "num_samples": 64}
    job |= {"seq_len": 256, "batch_size": 64, "sequential": "group"}
    answer, send = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=starve, args=(job, tmp_path / "out", send))
    process.start()
    send.close()
    name, message, exit_code = answer.recv()
    process.join(60)
    assert (name, exit_code, process.exitcode) == ("OutOfMemory", 2, 0)
    assert re.search(r"memory ran out \(.*allocate.*--batch-size or --seq-len", message)
    assert not (tmp_path / "out").exists() and Journal(tmp_path / "out.work").has("dense")
    report = llmprune.prune(out=tmp_path / "out", resume=True, **job)
    assert report.resumed and report.sparsity == 0.5
