"""One job of several processes: the bytes of one process, one voice, and nobody left waiting."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

import llmprune
import tiny
from forked import PROCESSES
from llmprune.events import Finished, Progress, StageStarted, parse_event
from llmprune.io.checkpoint import read_manifest
from llmprune.io.journal import Journal

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)
TYR: dict[str, Any] = {"method": "tyr", "tyr_iterations": 1, "tyr_generations": 4, "tyr_offspring": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, text_file: Path, eval_file: Path) -> dict[str, Any]:
    """A quick and offline search."""
    model = tiny.make_model(num_key_value_heads=4, num_attention_heads=4, intermediate_size=96)
    folder = tiny.save(model, tmp_path_factory.mktemp("models") / "wide")
    return {"model": str(folder), "calibration": str(text_file), "eval": str(eval_file), **tiny.QUICK, "num_samples": 16, **TYR}


@pytest.fixture(scope="module")
def alone(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What one process writes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    llmprune.prune(**job, out=out)
    return (out / "model.safetensors").read_bytes()


def arguments(job: dict[str, Any], out: Path, *more: str) -> list[str]:
    """The command line of the job."""
    given = {name: value for name, value in job.items() if name not in ("model", "latency")}
    options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["prune", job["model"], "--out", str(out), "--no-latency", *options, *more]


def test_torchrun_writes_what_one_process_writes(job: dict[str, Any], alone: bytes, tmp_path: Path) -> None:
    """Two processes under torchrun: the same weights, events and words of the first alone, nothing left beside them."""
    argv = arguments(job, tmp_path / "out", "--events", str(tmp_path / "events.jsonl"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llmprune", *argv]
    names = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(launch, env=os.environ | names, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Taken out") == 1 and "Error" not in done.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == alone
    events = [parse_event(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event.stage for event in events if isinstance(event, StageStarted)].count("structure") == 1
    assert isinstance(events[-1], Finished)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["events.jsonl", "out"]


def _one_of_two(rank: int, store: str, argv: Sequence[str], work: Callable[[], None] | None) -> None:
    names = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in names.items()}, GLOO_SOCKET_IFNAME="lo")
    gc.freeze()
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    if work:
        work()
    with Path(f"{store}.{rank}").open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    from llmprune.cli import main

    sys.argv = ["llmprune", *argv]
    main()


def _stop_in_the_search() -> None:
    """Have this process end, without a word, at the second generation."""
    from llmprune.engines.tyr import Tyr

    inner, calls = Tyr.snapshot, iter(range(99))

    def snapshot(self: Tyr) -> dict[str, Any]:
        if next(calls) == 1:
            os._exit(9)
        return inner(self)

    Tyr.snapshot = snapshot  # type: ignore[method-assign]


def run(argv: Sequence[str], store: Path, works: Sequence[Callable[[], None] | None] = (None, None)) -> list[int | None]:
    """The command in two processes; their exit codes, None for one that does not end."""
    started: list[BaseProcess] = [
        PROCESSES.Process(target=_one_of_two, args=(rank, str(store), argv, works[rank]), daemon=True) for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(100)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes


@pytest.mark.parametrize("lost", [0, 1])
def test_one_that_dies_ends_the_others(lost: int, job: dict[str, Any], alone: bytes, tmp_path: Path) -> None:
    """The other one says so and ends; both together go on where the first had recorded, to the same bytes."""
    argv = arguments(job, tmp_path / "out", "--resume", "--events", str(tmp_path / "events.jsonl"))
    works = [None, None]
    works[lost] = _stop_in_the_search  # type: ignore[call-overload]
    codes = run(argv, tmp_path / "first", works)
    assert codes[lost] == 9 and codes[1 - lost] == 1
    assert f"process {lost} of 2 died" in (tmp_path / f"first.{1 - lost}").read_text()
    work = Journal(tmp_path / "out.work")
    assert work.has("dense") and work.latest("structure") and not (tmp_path / "out").exists()
    assert run(argv, tmp_path / "second") == [0, 0]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == alone
    assert not work.directory.exists() and not (tmp_path / "second.1").read_text()
    events = [parse_event(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    starts = [event for event in events if isinstance(event, StageStarted) and event.stage == "structure"]
    assert len(starts) == 2 and starts[0].resumed_at == 0 < starts[1].resumed_at
    assert any(isinstance(event, Progress) and event.stage == "structure" for event in events)
    assert run(argv, tmp_path / "third") == [0, 0]  # done: the first has the report, and the other one hears of it
    assert run(arguments(job, tmp_path / "out"), tmp_path / "fourth") == [2, 2]


def test_what_was_chosen_is_carried_out_by_the_first(job: dict[str, Any], alone: bytes, tmp_path: Path) -> None:
    """A run of one process, stopped after its choice, goes on with two: the other one has nothing to do."""
    events = llmprune.prune_iter(**job, out=tmp_path / "out")
    assert any(isinstance(event, StageStarted) and event.stage == "pruned" for event in events)
    events.close()  # type: ignore[attr-defined]
    assert Journal(tmp_path / "out.work").has("structured")
    assert run(arguments(job, tmp_path / "out", "--resume"), tmp_path / "store") == [0, 0]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == alone


def test_all_have_the_seconds_that_the_first_measured(job: dict[str, Any], tmp_path: Path) -> None:
    """A budget of latency is one budget: with one of their own the processes would search for different things."""
    assert run(arguments(job, tmp_path / "out", "--budget", "latency"), tmp_path / "store") == [0, 0]
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and manifest[1].structure is not None
    assert set(manifest[1].structure.group_seconds) == {"kv group", "channel"}


def test_blocks_are_the_work_of_one_process(
    job: dict[str, Any], tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is nothing to share out, several processes are refused before any work."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = cli("prune", job["model"], "--out", tmp_path / "out", "--pattern", "blocks")
    assert outcome.code == 2 and "pattern blocks is the work of one process" in outcome.err
    assert not (tmp_path / "out").exists()
