"""One job of several processes: the bytes of one process, one voice, and nobody left waiting."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

import forked
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
    return ["prune", job["model"], "--out", str(out), "--no-latency", "--no-prompt", *options, *more]


def _accelerate(argv: list[str], log: str) -> None:
    """``accelerate launch`` in this process; what it starts are processes of their own."""
    from accelerate.commands import launch

    with Path(log).open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    sys.argv = ["accelerate-launch", "--multi_gpu", "--num_processes", "2", "-m", "llmprune", *argv]
    launch.main()


def test_accelerate_launches_a_walk(text_file: Path, eval_file: Path, tmp_path: Path) -> None:
    """Two processes under accelerate's launcher, which is torchrun's: words of the first alone, nothing left beside them."""
    out, log = tmp_path / "out", tmp_path / "log"
    model = tiny.save(tiny.make_model(), tmp_path / "model")
    job = {"model": str(model), "calibration": str(text_file), "eval": str(eval_file), **tiny.QUICK, "device": "cpu"}
    argv = arguments({**job, "effort": "balanced", "reconstruct_steps": 4}, out, "--events", str(tmp_path / "events.jsonl"))
    launcher = PROCESSES.Process(target=_accelerate, args=(argv, str(log)))
    launcher.start()
    launcher.join(200)
    launcher.kill()
    assert launcher.exitcode == 0, log.read_text()
    assert log.read_text().count("Reconstruction of 2 blocks") == 1 and "Error" not in log.read_text()
    events = [parse_event(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event.stage for event in events if isinstance(event, StageStarted)].count("prune") == 1
    assert isinstance(events[-1], Finished) and all(block.reconstruction for block in events[-1].report.blocks)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["events.jsonl", "log", "model", "out"]


def _stop_in_the_search() -> None:
    """Have this process end, without a word, at the second generation."""
    from llmprune.engines.tyr import Tyr

    inner, calls = Tyr.snapshot, iter(range(99))

    def snapshot(self: Tyr) -> dict[str, Any]:
        if next(calls) == 1:
            os._exit(9)
        return inner(self)

    Tyr.snapshot = snapshot  # type: ignore[method-assign]


def run(argv: Sequence[str], store: Path, before: Mapping[int, Callable[[], None]] = MappingProxyType({})) -> list[int | None]:
    """The command in two processes; their exit codes, None for one that does not end."""
    return forked.run_several(2, store, partial(_main, list(argv)), before=before)


def _main(argv: list[str]) -> None:
    from llmprune.cli import main

    sys.argv = ["llmprune", *argv]
    main()


def test_two_processes_evaluate_as_one_does(eval_file: Path, text_file: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    """Each some of the windows, of a text that has one window too: the numbers of one process, once."""
    models = [tiny.save(tiny.make_model(seed=seed), tmp_path / str(seed)) for seed in (0, 1)]
    short = tmp_path / "short.txt"
    short.write_text(" ".join(text_file.read_text().split()[:48]))
    texts = ["--eval", eval_file, "--eval", short, "--seq-len", "32", "--max-eval-tokens", "512"]
    argv = [str(part) for part in ("evaluate", models[0], "--against", models[1], *texts, "--no-latency", "--device", "cpu")]
    argv += ["--json"]
    assert run(argv, tmp_path / "store") == [0, 0], (tmp_path / "store.0").read_text()
    assert not (tmp_path / "store.1").read_text()
    said = (tmp_path / "store.0").read_text()
    ours, theirs = json.loads(said[said.index("{") :]), json.loads(cli(*argv).out)
    assert len(ours["quality"]) == len(theirs["quality"]) == 2
    for mine, its in zip(ours["quality"], theirs["quality"], strict=True):
        for key in ("perplexity_dense", "perplexity_pruned", "kl", "top1_agreement"):
            assert mine[key] == pytest.approx(its[key], rel=1e-5), key
    assert ours["quality"][0]["kl"] > 0


@pytest.mark.parametrize("lost", [0, 1])
def test_one_that_dies_ends_the_others(lost: int, job: dict[str, Any], alone: bytes, tmp_path: Path) -> None:
    """The other one says so and ends; both together go on where the first had recorded, to the same bytes."""
    argv = arguments(job, tmp_path / "out", "--resume", "--events", str(tmp_path / "events.jsonl"))
    codes = run(argv, tmp_path / "first", {lost: _stop_in_the_search})
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
    if lost:
        return
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


def _prune_each(jobs: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    for name, job in jobs.items():
        llmprune.prune(**job, out=folder / name)


def test_blocks_and_experts_go_by_the_scores_of_all(text_file: Path, tmp_path: Path) -> None:
    """Whole blocks by three scores, of which one reads a single sequence, and experts: the bytes and scores of one process."""
    llama = tiny.save(tiny.make_model(num_hidden_layers=4), tmp_path / "llama")
    mixtral = tiny.save(tiny.make_model("mixtral"), tmp_path / "mixtral")
    quick = {"calibration": str(text_file), "eval": (), **tiny.QUICK, "device": "cpu"}
    blocks = {"model": str(llama), "pattern": "blocks", "sparsity": 0.5, **quick}
    jobs = {
        "shortgpt": {**blocks, "method": "shortgpt"},
        "qubo": {**blocks, "method": "block-qubo"},
        "one": {**blocks, "method": "drop-one", "num_samples": 1},
        "experts": {"model": str(mixtral), "pattern": "experts", "sparsity": 0.5, **quick, "num_samples": 5},
    }
    _prune_each(jobs, tmp_path / "alone")
    work = partial(_prune_each, jobs, tmp_path / "several")
    assert forked.run_several(2, tmp_path / "store", work) == [0, 0], (tmp_path / "store.0").read_text()
    for name in jobs:
        ours, theirs = (tmp_path / which / name for which in ("several", "alone"))
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes(), name
        (_, report), (_, before) = (read_manifest(folder) or pytest.fail() for folder in (ours, theirs))
        assert report.structure and before.structure and report.structure.num_removed > 0
        assert report.structure.block_scores == pytest.approx(before.structure.block_scores, rel=1e-4, abs=1e-6)
        assert report.structure.blocks_removed == before.structure.blocks_removed
