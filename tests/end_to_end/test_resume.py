"""The journal: processes killed at any moment go on where they were, and end with the same bytes."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmprune
import tiny
from forked import Moment, at, run
from llmprune.errors import JournalError, OutputError, ResumeRefused
from llmprune.events import (
    BlockFinished,
    BlockStarted,
    Event,
    Finished,
    Progress,
    SitePruned,
    StageFinished,
    StageStarted,
    parse_event,
)
from llmprune.io import journal as journal_module
from llmprune.io.journal import Journal
from llmprune.report import BlockReport, Report

NUM_BLOCKS = 4
OWN_FILES = {"report.json", "report.html", "llmprune.json"}
"""Files that state times, and so differ from run to run."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four blocks."""
    return tiny.save(tiny.make_model(num_hidden_layers=NUM_BLOCKS), tmp_path_factory.mktemp("models") / "four")


@pytest.fixture(scope="module")
def texts(text_file: Path, eval_file: Path) -> dict[str, Any]:
    """Overrides that make a job quick and offline."""
    return {"calibration": str(text_file), "eval": str(eval_file), **tiny.QUICK}


@pytest.fixture(scope="module")
def whole(model_dir: Path, texts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What an uninterrupted run of each method writes."""
    folder = tmp_path_factory.mktemp("whole")
    for method in ("wanda", "sparsegpt"):
        llmprune.prune(model_dir, method=method, out=folder / method, **texts)
    return {method: content(folder / method) for method in ("wanda", "sparsegpt")}


def content(out: Path) -> dict[str, bytes]:
    """The files of a checkpoint that the job alone decides."""
    return {file.name: file.read_bytes() for file in out.iterdir() if file.name not in OWN_FILES}


def arguments(model_dir: Path, texts: dict[str, Any], out: Path, method: str, *more: str) -> list[str]:
    """The command line of a job, with its events going to a file beside ``out``."""
    return [
        "prune", str(model_dir), "--out", str(out), "--method", method, "--calibration", texts["calibration"], "--eval",
        texts["eval"], "--num-samples", "4", "--seq-len", "32", "--max-eval-tokens", "512", "--no-latency", "--no-prompt",
        "--events", str(out.parent / "events.jsonl"), "--resume", *more,
    ]  # fmt: skip


def resumed_at(events: list[Event], stage: str) -> int:
    return next(event.resumed_at for event in events if isinstance(event, StageStarted) and event.stage == stage)


MOMENTS: list[Moment] = [
    at(Progress, stage="load", done=1),
    at(StageFinished, stage="calibration"),
    at(Progress, stage="dense"),
    at(StageFinished, stage="dense"),
    at(BlockStarted, block=0),
    at(SitePruned, block=1),
    at(BlockFinished, block=1),
    at(BlockStarted, block=3),
    at(StageStarted, stage="pruned"),
    at(StageStarted, stage="save"),
    at(Progress, stage="save"),
]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_killed_at_every_stage_and_resumed(
    model_dir: Path, texts: dict[str, Any], whole: dict[str, dict[str, bytes]], tmp_path: Path, method: str
) -> None:
    """One job killed eleven times, each time later, ends byte for byte as one that ran through, and redoes no block."""
    rng = random.Random(method)
    out = tmp_path / "out"
    argv = arguments(model_dir, texts, out, method)
    for moment in MOMENTS:
        recorded = Journal(tmp_path / "out.work").num_blocks()
        code, events = run(argv, moment, delay=rng.choice([0, 0, 0.002, 0.01]))
        if out.exists():  # it was done before the signal came
            break
        assert code == -signal.SIGKILL
        started = [event.block for event in events if isinstance(event, BlockStarted)]
        if started:
            assert started == list(range(recorded, started[-1] + 1))
            assert resumed_at(events, "prune") == recorded
    else:
        code, events = run(argv)
        assert code == 0
        assert resumed_at(events, "prune") == NUM_BLOCKS
        assert not any(isinstance(event, BlockStarted) for event in events)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["events.jsonl", "out"]
        assert events[-1].event == "finished" and events[-1].report.resumed
    assert content(out) == whole[method]


@pytest.mark.parametrize("moment", [at(BlockFinished, block=0), at(Progress, stage="prune", done=2)], ids=["block", "midway"])
def test_killed_while_blocks_are_reconstructed(model_dir: Path, texts: dict[str, Any], tmp_path: Path, moment: Moment) -> None:
    """Killed after a block or in the middle of tuning one, and resumed: the bytes of a run that was left alone."""
    settings: dict[str, Any] = {"reconstruct": True, "reconstruct_steps": 30, "reconstruct_rounds": 2}
    llmprune.prune(model_dir, method="wanda", out=tmp_path / "whole", **texts, **settings)
    llmprune.prune(model_dir, method="wanda", out=tmp_path / "plain", **texts)
    options = ("--reconstruct", "--reconstruct-steps", "30", "--reconstruct-rounds", "2")
    argv = arguments(model_dir, texts, tmp_path / "out", "wanda", *options)
    code, _ = run(argv, moment)
    assert code == -signal.SIGKILL and 1 <= Journal(tmp_path / "out.work").num_blocks() < NUM_BLOCKS
    code, events = run(argv)
    assert code == 0 and resumed_at(events, "prune") >= 1
    report = events[-1].report  # type: ignore[union-attr]
    assert all(block.reconstruction and block.reconstruction.steps > 0 for block in report.blocks)
    weights = [content(tmp_path / name)["model.safetensors"] for name in ("out", "whole", "plain")]
    assert weights[0] == weights[1] != weights[2]


def test_killed_after_a_permuted_block(model_dir: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    """Permuted channels, of matrices that are not pruned too, come back from the journal; the dense states are the same."""
    settings: dict[str, Any] = {
        "pattern": "2:4",
        "permute": True,
        "skip": "*.up_proj",
        "reconstruct": True,
        "reconstruct_steps": 5,
    }
    llmprune.prune(model_dir, method="wanda", out=tmp_path / "whole", **texts, **settings)
    options = ("--pattern", "2:4", "--permute", "--skip", "*.up_proj", "--reconstruct", "--reconstruct-steps", "5")
    argv = arguments(model_dir, texts, tmp_path / "out", "wanda", *options)
    code, _ = run(argv, at(BlockFinished, block=1))
    assert code == -signal.SIGKILL and 1 <= Journal(tmp_path / "out.work").num_blocks() < NUM_BLOCKS
    code, events = run(argv)
    assert code == 0 and resumed_at(events, "prune") >= 1
    report = events[-1].report  # type: ignore[union-attr]
    assert all(len(block.permutations) == 2 and not any(item.reason for item in block.permutations) for block in report.blocks)
    ours, whole = content(tmp_path / "out"), content(tmp_path / "whole")
    assert ours["model.safetensors"] == whole["model.safetensors"]
    before = load_file(model_dir / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    assert not torch.equal(after[name], before[name])
    assert torch.equal(after[name].sort(0).values, before[name].sort(0).values)


def test_killed_by_the_clock_and_resumed(
    model_dir: Path, texts: dict[str, Any], whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """Killed after random times, whatever it is doing, until it gets through."""
    rng = random.Random(5)
    argv = arguments(model_dir, texts, tmp_path / "out", "sparsegpt")
    for attempt in itertools.count():
        run(argv, at(StageStarted, stage="load"), delay=rng.uniform(0.05, 0.3) * (1 + attempt))
        if (tmp_path / "out").exists():
            break
    assert attempt < 20
    assert content(tmp_path / "out") == whole["sparsegpt"]


def test_the_command_itself_stopped_by_a_supervisor(
    model_dir: Path, texts: dict[str, Any], whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """``python -m llmprune`` under SIGTERM, as a container's stop sends it, leaves a journal to resume and nothing else."""
    argv = arguments(model_dir, texts, tmp_path / "out", "wanda")
    argv[argv.index("--events") + 1] = "-"
    process = subprocess.Popen(
        [sys.executable, "-m", "llmprune", *argv], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    with process.stdout as lines:
        assert any(at(BlockFinished, block=1)(parse_event(line)) for line in lines)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert process.returncode == -signal.SIGTERM
    assert not (tmp_path / "out").exists() and (tmp_path / "out.work" / "block-00000").is_dir()
    report = llmprune.prune(model_dir, method="wanda", out=tmp_path / "out", resume=True, **texts)
    assert report.resumed
    assert content(tmp_path / "out") == whole["wanda"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def begun(model_dir: Path, texts: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A Wanda job stopped after its second block; returns what describes it."""
    job = {"model": str(Path(shutil.copytree(model_dir, tmp_path / "model"))), "method": "wanda", **texts}
    job["calibration"] = str(Path(shutil.copy(texts["calibration"], tmp_path / "calibration.txt")))
    events = llmprune.prune_iter(out=tmp_path / "out", **job)
    for event in events:
        if isinstance(event, BlockStarted) and event.block == 2:
            break
    events.close()  # type: ignore[attr-defined]
    assert Journal(tmp_path / "out.work").num_blocks() == 2
    return job


def test_an_unfinished_run_is_not_begun_again(begun: dict[str, Any], tmp_path: Path) -> None:
    """Without --resume: refused before any work, both remedies named; either of them works."""
    events = llmprune.prune_iter(out=tmp_path / "out", **begun)
    with pytest.raises(OutputError, match=r"out\.work holds an unfinished run\. Add --resume .* or delete it"):
        next(events)
    shutil.rmtree(tmp_path / "out.work")
    assert not llmprune.prune(out=tmp_path / "out", **begun).resumed


def test_resume_does_not_redo_blocks(begun: dict[str, Any], tmp_path: Path) -> None:
    """The stages say where they begin; the dense model is not measured again; earlier blocks keep their reports."""
    first = Journal(tmp_path / "out.work").read_block(0)
    events = list(llmprune.prune_iter(out=tmp_path / "out", resume=True, **begun))
    assert resumed_at(events, "prune") == 2 and resumed_at(events, "dense") == 16
    assert not any(isinstance(event, Progress) and event.stage == "dense" for event in events)
    assert [event.block for event in events if isinstance(event, BlockStarted)] == [2, 3]
    report = events[-1].report  # type: ignore[union-attr]
    assert report.resumed and report.blocks[0] == first
    assert report.sparsity == 0.5 and report.num_sites == NUM_BLOCKS * 7
    assert report.quality[0].kl > 0 and report.quality[0].ratio > 0


def test_resume_without_a_journal_begins(model_dir: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    """--resume may always be given: where there is nothing to go on with, the job begins."""
    report = llmprune.prune(model_dir, out=tmp_path / "out", resume=True, **texts)
    assert not report.resumed and report.sparsity == 0.5


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("config.sparsity = 0.5, not 0.6", {"sparsity": 0.6}),
        ("config.method = 'wanda', not 'magnitude'", {"method": "magnitude"}),
        ("config.num_samples = 4, not 3", {"num_samples": 3}),
        ("config.seed = 0, not 1", {"seed": 1}),
        ("config.skip", {"skip": "*.down_proj"}),
    ],
)
def test_another_config_is_refused(begun: dict[str, Any], tmp_path: Path, field: str, changes: dict[str, Any]) -> None:
    """A journal belongs to one config: names the field, what it was, and what it is."""
    with pytest.raises(ResumeRefused, match=field):
        llmprune.prune(out=tmp_path / "out", resume=True, **{**begun, **changes})
    assert llmprune.prune(out=tmp_path / "out", resume=True, **begun).resumed


def test_other_weights_are_refused(begun: dict[str, Any], tmp_path: Path) -> None:
    """The same directory with other weights is another revision."""
    file = Path(begun["model"]) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ResumeRefused, match="a run with revision = "):
        llmprune.prune(out=tmp_path / "out", resume=True, **begun)


def test_other_text_is_refused(begun: dict[str, Any], tmp_path: Path) -> None:
    """The same path with other text gives other tokens."""
    Path(begun["calibration"]).write_text(tiny.prose(3000, seed=9))
    with pytest.raises(ResumeRefused, match="a run with tokens = "):
        llmprune.prune(out=tmp_path / "out", resume=True, **begun)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        "block-00000/weights.safetensors", "block-00001/hidden-00000.safetensors", "block-00001/record.json", "run.json",
        "dense/hidden.safetensors", "dense/record.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flipped", "gone"])
def test_a_damaged_record_is_an_error(begun: dict[str, Any], tmp_path: Path, name: str, damage: Callable[[Path], Any]) -> None:
    """A file that is not what was written is named, never used."""
    file = tmp_path / "out.work" / name
    if (name.endswith("json") and damage is flip) or (name == "run.json" and damage is Path.unlink):
        file.write_text("[]garbage")  # one flipped bit may still be JSON; without run.json it is no journal at all
    else:
        damage(file)
    with pytest.raises(JournalError, match=f"{name} is damaged or missing; delete .* and start again"):
        llmprune.prune(out=tmp_path / "out", resume=True, **begun)
    assert not (tmp_path / "out").exists()


def test_leftovers_of_a_killed_write_are_invisible(
    begun: dict[str, Any], whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """Half a record and half a checkpoint, as a kill leaves them, are swept away."""
    for leftover in ("out.work/.tmp-block-00002", ".out.tmp", ".out.work.removed"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "weights.safetensors").write_bytes(b"half")
    assert llmprune.prune(out=tmp_path / "out", resume=True, **begun).resumed
    assert content(tmp_path / "out")["model.safetensors"] == whole["wanda"]["model.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["calibration.txt", "model", "out"]


def test_a_second_process_is_refused(model_dir: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    """While one process works on an output, another one is told so, with --resume and without."""
    events = llmprune.prune_iter(model_dir, method="wanda", out=tmp_path / "out", **texts)
    for event in events:
        if isinstance(event, BlockFinished):
            break
    for resume in (True, False):
        with pytest.raises(OutputError, match="another process works in"):
            llmprune.prune(model_dir, method="wanda", out=tmp_path / "out", resume=resume, **texts)
    code, seen = run(arguments(model_dir, texts, tmp_path / "out", "wanda"))
    assert code == 2 and [event.event for event in seen] == ["failed"]
    finished = list(events)
    assert finished[-1].event == "finished" and (tmp_path / "out").is_dir()


@pytest.fixture
def done(begun: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same job stopped between the rename of its checkpoint and the end of its journal."""
    events = llmprune.prune_iter(out=tmp_path / "out", resume=True, **begun)
    for event in events:
        if isinstance(event, StageFinished) and event.stage == "save":
            break
    events.close()  # type: ignore[attr-defined]
    assert (tmp_path / "out" / "llmprune.json").is_file() and Journal(tmp_path / "out.work").num_blocks() == NUM_BLOCKS
    return begun


def everything(out: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file of a checkpoint."""
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.iterdir()}


@pytest.mark.parametrize("left", ["journal", "half a journal", "nothing"])
def test_a_finished_run_is_resumed_by_its_report(done: dict[str, Any], tmp_path: Path, left: str) -> None:
    """Nothing is done again: one event with the report that lies there, and what the run left beside it goes."""
    if left == "half a journal":  # killed while it was removed
        (tmp_path / "out.work").rename(tmp_path / ".out.work.removed")
    elif left == "nothing":
        shutil.rmtree(tmp_path / "out.work")
    before = everything(tmp_path / "out")
    (event,) = llmprune.prune_iter(out=tmp_path / "out", resume=True, **done)
    assert isinstance(event, Finished)
    assert event.report == Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert everything(tmp_path / "out") == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["calibration.txt", "model", "out"]
    assert llmprune.prune(out=tmp_path / "out", resume=True, **done) == event.report


def test_a_process_killed_after_the_rename_ends_with_code_0(
    model_dir: Path, texts: dict[str, Any], whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """Wherever the kill falls in the last moments of a run, its next start ends it."""
    argv = arguments(model_dir, texts, tmp_path / "out", "wanda")
    run(argv, at(StageFinished, stage="save"))
    code, events = run(argv)
    assert code == 0 and isinstance(events[-1], Finished)
    assert content(tmp_path / "out") == whole["wanda"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["events.jsonl", "out"]
    assert run(argv) == (0, [events[-1]])


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("config.sparsity = 0.5, not 0.6", {"sparsity": 0.6}),
        ("config.skip = [], not ['*.down_proj']", {"skip": "*.down_proj"}),
        ("config.method = 'wanda', not 'magnitude'", {"method": "magnitude", "sparsity": 0.6}),
    ],
)
def test_a_finished_run_of_another_config_is_refused(
    done: dict[str, Any], tmp_path: Path, field: str, changes: dict[str, Any]
) -> None:
    """Names what differs, the way out, and touches neither checkpoint nor journal."""
    before = everything(tmp_path / "out")
    with pytest.raises(OutputError) as caught:
        llmprune.prune(out=tmp_path / "out", resume=True, **{**done, **changes})
    message = f"out holds the checkpoint of a run with {field}; choose another --out or delete it."
    assert str(caught.value).endswith(message)
    assert everything(tmp_path / "out") == before
    assert Journal(tmp_path / "out.work").num_blocks() == NUM_BLOCKS


def test_a_finished_run_of_other_weights_is_refused(done: dict[str, Any], tmp_path: Path) -> None:
    """The model was trained further under its name: its old result is not the answer."""
    file = Path(done["model"]) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(OutputError, match="out holds the checkpoint of a run with revision = "):
        llmprune.prune(out=tmp_path / "out", resume=True, **done)


def test_a_finished_run_is_in_the_way_of_one_that_is_not_resumed(done: dict[str, Any], tmp_path: Path) -> None:
    """Without --resume, and where what lies there is no checkpoint of a resumable run, nothing is overwritten."""
    before = everything(tmp_path / "out")
    with pytest.raises(OutputError, match="already exists and is not empty"):
        llmprune.prune(out=tmp_path / "out", **done)
    assert everything(tmp_path / "out") == before
    manifest = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    for broken in ("", "[]", json.dumps({**manifest, "fingerprint": {}}), json.dumps({**manifest, "report": {}})):
        (tmp_path / "out" / "llmprune.json").write_text(broken)
        with pytest.raises(OutputError, match="already exists and is not empty"):
            llmprune.prune(out=tmp_path / "out", resume=True, **done)


def test_a_finished_run_leaves_a_journal_that_is_in_use(done: dict[str, Any], tmp_path: Path) -> None:
    """Whoever still holds the lock is not robbed of its work directory."""
    holder = Journal(tmp_path / "out.work")
    holder.open(holder.recorded(), resume=True)
    with pytest.raises(OutputError, match="another process works in"):
        llmprune.prune(out=tmp_path / "out", resume=True, **done)
    holder.close()
    assert llmprune.prune(out=tmp_path / "out", resume=True, **done).resumed


def test_every_finished_block_names_its_file(model_dir: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    """sha256 is that of the weights in the journal, there when the event comes; without a journal there is none."""
    digests = []
    for event in llmprune.prune_iter(model_dir, out=tmp_path / "out", **texts):
        if isinstance(event, BlockFinished):
            file = tmp_path / "out.work" / f"block-{event.block:05d}" / "weights.safetensors"
            assert event.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
            digests.append(event.sha256)
    assert len(set(digests)) == NUM_BLOCKS
    events = [event for event in llmprune.prune_iter(model_dir, **texts) if isinstance(event, BlockFinished)]
    assert [event.sha256 for event in events] == [None] * NUM_BLOCKS


@pytest.fixture
def open_journal(tmp_path: Path) -> Iterator[Journal]:
    """A fresh journal, open."""
    journal = Journal(tmp_path / "work")
    journal.open({"revision": "r", "tokens": "t"}, resume=False)
    yield journal
    journal.close()


def record(journal: Journal, index: int) -> dict[str, torch.Tensor]:
    """Write a block's record; returns its weights."""
    weights = {"up.weight": torch.full((2, 3), float(index), dtype=torch.bfloat16)}
    report = BlockReport(index=index, name=f"layers.{index}", seconds=0.5, sites=())
    journal.write_block(index, report, weights, [torch.full((1, 2), float(index)), torch.zeros(1, 2)], torch.get_rng_state())
    return weights


def test_journal_gives_back_what_was_written(open_journal: Journal) -> None:
    """Report, weights, hidden states in order, and the state of the random generator."""
    torch.manual_seed(1)
    weights = record(open_journal, 0)
    expected = torch.rand(3)
    torch.manual_seed(2)
    assert open_journal.read_block(0) == BlockReport(index=0, name="layers.0", seconds=0.5, sites=())
    assert open_journal.num_zeros(0) == 6
    read = load_file(open_journal.weights_file(0))
    assert torch.equal(read["up.weight"], weights["up.weight"]) and read["up.weight"].dtype == torch.bfloat16
    first, second = open_journal.read_hidden(0)
    assert torch.equal(first, torch.zeros(1, 2)) and torch.equal(second, torch.zeros(1, 2))
    assert torch.equal(torch.rand(3), expected)


def test_journal_counts_whole_records_and_keeps_the_newest_inputs(open_journal: Journal) -> None:
    """Leading records count; only the newest one holds hidden states."""
    assert open_journal.num_blocks() == 0
    for index in range(3):
        record(open_journal, index)
    assert open_journal.num_blocks() == 3
    hidden = sorted(file.parent.name for file in open_journal.directory.rglob("hidden-00000.safetensors"))
    assert hidden == ["block-00002"]
    shutil.rmtree(open_journal.directory / "block-00001")
    assert open_journal.num_blocks() == 1


@pytest.mark.parametrize("num_synced", [0, 1])
def test_a_write_stopped_between_files_is_no_record(
    open_journal: Journal, monkeypatch: pytest.MonkeyPatch, num_synced: int
) -> None:
    """Before the rename there is nothing to see, and opening sweeps it away."""
    record(open_journal, 0)
    calls = iter(range(9))
    sync = journal_module.sync_and_hash

    def stop(file: Path) -> str:
        if next(calls) == num_synced:
            raise KeyboardInterrupt
        return sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "sync_and_hash", stop)
        with pytest.raises(KeyboardInterrupt):
            record(open_journal, 1)
    assert open_journal.num_blocks() == 1 and not open_journal.has("block-00001")
    assert (open_journal.directory / "block-00000" / "hidden-00000.safetensors").is_file()
    assert list(open_journal.directory.glob(".tmp-*"))
    open_journal.close()
    again = Journal(open_journal.directory)
    again.open({"revision": "r", "tokens": "t"}, resume=True)
    assert not list(again.directory.glob(".tmp-*"))
    record(again, 1)
    assert again.num_blocks() == 2
    again.remove()
    assert not again.directory.exists()


def test_journal_lock_ends_with_its_holder(open_journal: Journal) -> None:
    """Two may not write; the lock is free once the first one closes."""
    other = Journal(open_journal.directory)
    with pytest.raises(OutputError, match="another process works"):
        other.check(resume=True)
    open_journal.close()
    other.check(resume=True)
    with pytest.raises(ResumeRefused, match=r"revision = 'r', not 's'"):
        other.open({"revision": "s", "tokens": "t"}, resume=True)
    other.close()
