"""Kills at random moments: a job SIGKILLed again and again, also inside a write, ends with the weights of one left alone.

Every process of these tests is a real one, forked from a server that has imported what it needs, and every kill is SIGKILL.
Three kinds take turns, their places drawn from a seed: inside the write of a file, of which the first bytes or none are then on
the disk, at an operation on files (a folder made, a record renamed, an old one deleted ...), and by the clock.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import llmprune
import tiny
from forked import PROCESSES
from llmprune.events import BlockStarted, parse_event
from llmprune.io.journal import Journal

NUM_BLOCKS = 3
TUNED = {"reconstruct": True, "reconstruct_steps": 4}
JOBS: dict[str, dict[str, Any]] = {
    "one-pass": {"method": "wanda", "sequential": "group"},
    "batches-owl": {"method": "wanda", "sequential": "group", "batch_size": 2, "allocation": "owl"},
    "two-pass-tuned": {"method": "sparsegpt", "batch_size": 2, **TUNED},
    "two-pass-dp": {"method": "sparsegpt", "allocation": "dp"},
    "icbs": {"method": "wanda", "refine": "icbs", "icbs_passes": 3, "icbs_block_size": 16, **TUNED},
    "experts": {"method": "sparsegpt", "sequential": "group"},
}
"""What a job does beside the walk itself is recorded too: surveys, masks on the way, blocks tuned later."""
VARIANTS: dict[str, dict[str, Any]] = {"resident": {}, "streamed": {"offload": "disk"}}
"""How the model is held meanwhile."""
CASES = [(name, "resident") for name in JOBS] + [(name, "streamed") for name in ("batches-owl", "two-pass-tuned", "experts")]
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "open")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model of a job: a Llama of three blocks, or a Mixtral of as many."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(family: str) -> Path:
        return tiny.save(tiny.make_model(family, num_hidden_layers=NUM_BLOCKS), folder / family)

    return lambda name: make("mixtral" if name == "experts" else "llama")


def weights(out: Path) -> dict[str, str]:
    """sha256 of the files of tensors of a checkpoint."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.glob("*.safetensors")}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_changes(count: int, folder: Path, then: Callable[[], object]) -> None:
    """Call ``then`` right before the ``count``-th change of what lies in the folder: made, opened to write, renamed, gone."""
    seen = 0
    own = str(folder)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or not str(arguments[0]).startswith(own) or (event == "open" and arguments[1] in ("r", None)):
            return
        seen += 1
        if seen == count:
            then()

    sys.addaudithook(watch)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_limit(_signal: int) -> None:
    die()


def limit_files(num_bytes: int) -> None:
    """From here on the kernel writes that much of a file and no more: whoever goes on writing dies there and then."""
    ctypes.CDLL(None).signal(int(signal.SIGXFSZ), _on_limit)  # Python's own handler would wait for the write to come back
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def work(job: Mapping[str, Any], out: Path, arm: Callable[[], object] | None) -> None:
    """One process: the job from where it was; the blocks that it began go to a file."""
    gc.freeze()  # a job collects garbage at every stage: not what the server imported
    if arm:
        arm()
    with (out.parent / "events.jsonl").open("w", buffering=1) as log:
        for event in llmprune.prune_iter(out=out, resume=True, **job):
            if isinstance(event, BlockStarted):
                log.write(event.model_dump_json() + "\n")


def run(job: Mapping[str, Any], out: Path, arm: Callable[[], object] | None = None, seconds: float = 60) -> int | None:
    """The exit code of a process that works on the job, SIGKILLed after that many seconds."""
    (out.parent / "events.jsonl").unlink(missing_ok=True)
    process = PROCESSES.Process(target=work, args=(job, out, arm))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def begun(out: Path) -> list[int]:
    """The blocks that the last process began."""
    log = out.parent / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    events = [parse_event(line) for line in lines if line.endswith("\n")]
    return [event.block for event in events if isinstance(event, BlockStarted)]


@pytest.mark.skipif(sys.platform != "linux", reason="kills inside a write need Linux's bound on the size of files")
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_killed_again_and_again(
    name: str, variant: str, models: Callable[[str], Path], text_file: Path, eval_file: Path, tmp_path: Path
) -> None:
    """However often it is killed, wherever: the weights of an uninterrupted run, no block done twice, nothing left behind."""
    rng = random.Random(f"{name} {variant}")
    common = {"model": str(models(name)), "calibration": str(text_file), "eval": str(eval_file), **tiny.QUICK}
    job = {**common, **JOBS[name], **VARIANTS[variant]}
    began = time.perf_counter()
    llmprune.prune(out=tmp_path / "whole", **job)
    seconds = time.perf_counter() - began
    alone = tmp_path / "alone"
    alone.mkdir()
    out, journal = alone / "out", Journal(alone / "out.work")
    kills = []
    for kind in ("write", "change", "clock", "write", "change", "clock"):
        recorded = journal.num_blocks()
        then = functools.partial(limit_files, rng.randrange(1000, 140_000)) if kind == "write" else die
        arm = functools.partial(after_changes, rng.randrange(6, 22), alone, then)
        within = rng.uniform(0.05, 0.7) * seconds
        code = run(job, out, None if kind == "clock" else arm, within if kind == "clock" else 60)
        if name != "icbs" and kind != "clock":  # which walks twice
            assert begun(out) == list(range(recorded, NUM_BLOCKS))[: len(begun(out))]
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills.append(kind)
        if kind == "write":
            assert [path for path in alone.rglob("*") if ".tmp" in path.name]
        assert not out.exists() or weights(out) == weights(tmp_path / "whole")
    assert len(kills) > 1 and "write" in kills
    assert run(job, out) == 0
    assert weights(out) == weights(tmp_path / "whole")
    assert sorted(file.name for file in alone.iterdir()) == ["events.jsonl", "out"]
