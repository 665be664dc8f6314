"""Several processes of which one is killed in the walk: who it was is said, and those that go on write the same bytes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load, load_file

import forked
import tiny
from llmprune.events import BlockFinished, parse_event

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, text_file: Path, eval_file: Path) -> dict[str, Any]:
    """A walk of some blocks."""
    model = tiny.save(tiny.make_model(num_hidden_layers=6), tmp_path_factory.mktemp("models") / "deep")
    quick = {"calibration": str(text_file), "eval": str(eval_file), **tiny.QUICK, "device": "cpu"}
    return {"model": str(model), "method": "sparsegpt", **quick}


def arguments(job: dict[str, Any], out: Path, *more: str) -> list[str]:
    """The command line of the job."""
    given = {name: value for name, value in job.items() if name not in ("model", "latency")}
    options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["prune", job["model"], "--out", str(out), "--no-latency", "--no-prompt", *options, *more]


def command(argv: list[str]) -> None:
    """The command line."""
    from llmprune.cli import main

    sys.argv = ["llmprune", *argv]
    main()


@pytest.fixture(scope="module")
def undisturbed(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What two processes write."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert forked.run_several(2, folder / "store", partial(command, arguments(job, folder / "out"))) == [0, 0]
    return (folder / "out" / "model.safetensors").read_bytes()


def test_a_process_killed_in_the_walk_is_named(
    job: dict[str, Any], undisturbed: bytes, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """--num-gpus: SIGKILL of the second ends all with its name last; one process is refused; two go on to the same bytes."""
    out, events = tmp_path / "out", tmp_path / "events.jsonl"
    events.touch()
    argv = arguments(job, out, "--events", str(events))
    launcher = subprocess.Popen(
        [sys.executable, "-m", "llmprune", *argv, "--num-gpus", "2"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with events.open() as stream:
        line = ""
        while not (line.endswith("\n") and isinstance(event := parse_event(line), BlockFinished) and event.block == 1):
            line = ("" if line.endswith("\n") else line) + stream.readline()
            assert launcher.poll() is None, launcher.stderr and launcher.stderr.read()
            time.sleep(0 if line.endswith("\n") else 0.002)
    second = next(child for child in psutil.Process(launcher.pid).children() if child.environ()["RANK"] == "1")
    second.kill()
    _, said = launcher.communicate(timeout=200)
    assert launcher.returncode == 1
    last = said.strip().splitlines()[-1]
    assert last == (
        "Error: process 1 of 2 was killed (SIGKILL), and the others with it. What was recorded is kept: go on with --resume."
    )
    assert said.count("Error") == 1
    alone = cli(*arguments(job, out, "--resume"))
    assert alone.code == 2 and "num_processes = 2, not 1" in alone.err
    assert forked.run_several(2, tmp_path / "store", partial(command, [*argv, "--resume"])) == [0, 0]
    assert (out / "model.safetensors").read_bytes() == undisturbed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["events.jsonl", "out", "store", "store.0", "store.1"]


@pytest.mark.parametrize(("lost", "offload"), [(0, "auto"), (1, "disk")])
def test_killed_inside_a_write(lost: int, offload: str, job: dict[str, Any], undisturbed: bytes, tmp_path: Path) -> None:
    """The first one with the others' hidden states written, or another one with nothing: the record before is gone on from.

    With weights on disk each reads the blocks that are pruned from their records.
    """
    argv = arguments(job, tmp_path / "out", "--resume", "--offload", offload)
    work = partial(command, argv)
    codes = forked.run_several(2, tmp_path / "a", work, before={lost: partial(forked.die_while_writing, "block-00003")})
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 1
    assert f"process {lost} of 2 died" in (tmp_path / f"a.{1 - lost}").read_text()
    assert (tmp_path / "out.work" / "block-00002").is_dir() and not (tmp_path / "out.work" / "block-00003").exists()
    assert forked.run_several(2, tmp_path / "b", work) == [0, 0]
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == (7 if offload == "disk" else 1)
    whole, parts = load(undisturbed), [load_file(shard) for shard in shards]
    assert whole.keys() == {name for part in parts for name in part}
    assert all(torch.equal(whole[name], tensor) for part in parts for name, tensor in part.items())


def test_one_that_lost_its_hidden_states_goes_through_the_blocks_again(
    job: dict[str, Any], undisturbed: bytes, tmp_path: Path
) -> None:
    """As one on another machine does, which does not see the work directory."""
    out = tmp_path / "out"
    work = partial(command, arguments(job, out, "--resume"))
    before = {1: partial(forked.die_while_writing, "block-00002")}
    assert forked.run_several(2, tmp_path / "a", work, before=before)[1] == -signal.SIGKILL
    own = tmp_path / "out.work" / "process-00001"
    assert own.is_dir()
    (own / "block-00001").rename(tmp_path / "elsewhere")
    assert forked.run_several(2, tmp_path / "b", work) == [0, 0]
    assert (out / "model.safetensors").read_bytes() == undisturbed


def _see_nothing() -> None:
    """As on a machine whose disk is another one."""
    from llmprune.job import measuring

    measuring.own_place = lambda *_: None


def test_weights_stay_on_a_disk_that_all_see(job: dict[str, Any], tmp_path: Path) -> None:
    """One that does not find the first one's folder could not read what is pruned: all stop, and one says why."""
    work = partial(command, arguments(job, tmp_path / "out", "--offload", "disk"))
    assert forked.run_several(2, tmp_path / "store", work, before={1: _see_nothing}) == [2, 2]
    assert "where every process sees the folder of --out" in (tmp_path / "store.0").read_text()
    assert not (tmp_path / "store.1").read_text() and not (tmp_path / "out.work").exists()


def _agent(argv: list[str], endpoint: str, log: str) -> None:
    """One machine's torchrun, with one process."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with Path(log).open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    host, _, port = endpoint.rpartition(":")
    config = LaunchConfig(
        min_nodes=2, max_nodes=2, nproc_per_node=1, rdzv_backend="c10d", rdzv_endpoint=f"{host}:{port}", run_id="one",
        start_method="fork", max_restarts=0, local_addr=host, monitor_interval=0.05,
    )  # fmt: skip
    elastic_launch(config, command)(argv)


@pytest.mark.skipif(sys.platform != "linux", reason="needs loopback by name and fork")
def test_two_machines_that_meet_at_a_rendezvous(job: dict[str, Any], undisturbed: bytes, tmp_path: Path) -> None:
    """Two torchrun agents, each of which believes that it is a machine of its own: the bytes of two processes on one."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{one.getsockname()[1]}"
    argv = arguments(job, tmp_path / "out")
    agents = [
        forked.PROCESSES.Process(target=_agent, args=(argv, endpoint, str(tmp_path / f"agent{number}"))) for number in range(2)
    ]
    for agent in agents:
        agent.start()
    for agent in agents:
        agent.join(60)
        agent.kill()
    assert [agent.exitcode for agent in agents] == [0, 0], (tmp_path / "agent0").read_text()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == undisturbed
