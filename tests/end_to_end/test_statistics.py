"""Sequential 'none' and the cache of statistics: the same bytes with it cold, warm and off, and what is not reused."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmprune
import tiny
from forked import PROCESSES
from llmprune.anatomy.blocks import Call
from llmprune.api import prune_iter
from llmprune.errors import ConfigError
from llmprune.events import BlockFinished, Warned
from llmprune.io import statistics
from llmprune.report import Report, StatisticsReport

NUM_BLOCKS = 2
Texts = dict[str, Any]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; where its records lie."""
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


@pytest.fixture
def texts(text_file: Path) -> Texts:
    """Overrides of a quick dense walk in two batches."""
    return {"calibration": str(text_file), "eval": (), **tiny.QUICK, "sequential": "none", "batch_size": 2}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one with every forward of a block on calibration text."""
    seen: list[int] = []
    run = Call.run

    def counted(self: Call, *arguments: Any) -> torch.Tensor:
        seen.append(1)
        return run(self, *arguments)

    monkeypatch.setattr(Call, "run", counted)
    yield seen


def weights(out: Path) -> bytes:
    """The checkpoint, to the last bit."""
    return (out / "model.safetensors").read_bytes()


def reused(report: Report, stage: str = "prune") -> int:
    """Blocks whose statistics that stage found."""
    return next((item.num_reused for item in report.statistics if item.stage == stage), 0)


@pytest.mark.parametrize(
    ("kind", "method"), [("llama", "wanda"), ("llama", "sparsegpt"), ("moe", "dsnot"), ("moe", "sparsegpt")]
)
def test_cold_warm_and_without_are_the_same_bytes(
    kind: str, method: str, texts: Texts, tmp_path: Path, calls: list[int], request: pytest.FixtureRequest
) -> None:
    """A warm cache spares every forward of a block, and the checkpoint and its card stay as they are."""
    model = request.getfixturevalue("moe_model_dir" if kind == "moe" else "tiny_model_dir")
    reports, forwards = {}, {}
    for name in ("off", "cold", "warm"):
        calls.clear()
        reports[name] = llmprune.prune(
            model, method=method, out=tmp_path / name, statistics_cache=name != "off", **texts
        )  # fmt: skip
        forwards[name] = len(calls)
    assert all(report.walk == "dense" and report.sparsity == 0.5 for report in reports.values())
    assert forwards == {"off": 2 * NUM_BLOCKS, "cold": 2 * NUM_BLOCKS, "warm": 0}
    assert weights(tmp_path / "off") == weights(tmp_path / "cold") == weights(tmp_path / "warm")
    assert (tmp_path / "cold" / "README.md").read_text() == (tmp_path / "warm" / "README.md").read_text()
    assert reports["off"].statistics == () and reused(reports["cold"]) == 0 and reused(reports["warm"]) == NUM_BLOCKS
    own = {"seconds", "collected"}
    cold, warm = ([block.model_dump(exclude=own) for block in reports[name].blocks] for name in ("cold", "warm"))
    assert cold == warm
    assert all(block.collected for block in reports["warm"].blocks) and not any(b.collected for b in reports["cold"].blocks)


@pytest.mark.parametrize(
    "second",
    [
        {"sparsity": 0.7},
        {"pattern": "2:4"},
        {"method": "wanda"},
        {"method": "dsnot"},
        {"method": "magnitude"},
        {"scope": "matrix"},
    ],
    ids=str,
)
def test_another_job_that_needs_no_more_reuses(
    second: dict[str, Any], tiny_model_dir: Path, texts: Texts, tmp_path: Path, calls: list[int]
) -> None:
    """What SparseGPT collected serves other sparsities, patterns and methods, as if they had collected it themselves."""
    first = {"method": "sparsegpt"}
    llmprune.prune(tiny_model_dir, **first, **texts)
    calls.clear()
    report = llmprune.prune(tiny_model_dir, out=tmp_path / "warm", **{**first, **second, **texts})
    assert reused(report) == NUM_BLOCKS and not calls
    off = llmprune.prune(tiny_model_dir, out=tmp_path / "off", statistics_cache=False, **{**first, **second, **texts})
    assert not off.statistics and len(calls) == 2 * NUM_BLOCKS
    assert weights(tmp_path / "warm") == weights(tmp_path / "off")


def test_a_job_that_needs_more_collects_and_its_record_replaces_the_lesser(
    tiny_model_dir: Path, texts: Texts, root: Path
) -> None:
    """Norms do not serve SparseGPT; its Gram matrices serve both from then on."""
    llmprune.prune(tiny_model_dir, method="wanda", **texts)
    assert {file.name.split("-")[-1] for file in root.rglob("*.safetensors")} == {"norm.safetensors"}
    assert reused(llmprune.prune(tiny_model_dir, method="sparsegpt", **texts)) == 0
    assert {file.name.split("-")[-1] for file in root.rglob("*.safetensors")} == {"gram.safetensors"}
    assert reused(llmprune.prune(tiny_model_dir, method="wanda", **texts)) == NUM_BLOCKS


@pytest.mark.parametrize(
    "other",
    [{"seq_len": 16}, {"num_samples": 3}, {"calibration": "eval"}, {"dtype": "bfloat16"}, {"batch_size": 1},
     {"skip": "*.q_proj"}, {"model": "weights"}, {"model": "config"}],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*emulate")
def test_another_model_or_calibration_does_not(
    other: dict[str, Any], tiny_model_dir: Path, texts: Texts, eval_file: Path, tmp_path: Path
) -> None:
    """Whatever a sum depends on is part of the key."""
    llmprune.prune(tiny_model_dir, **texts)
    model, fields = tiny_model_dir, {**texts, **other}
    if fields["calibration"] == "eval":
        fields["calibration"] = str(eval_file)
    if kind := fields.pop("model", None):
        model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
        if kind == "weights":
            tensors = load_file(model / "model.safetensors")
            tensors["model.norm.weight"][0] *= 2
            save_file(tensors, model / "model.safetensors", {"format": "pt"})
        else:
            text = (model / "config.json").read_text()
            assert '"rms_norm_eps": 1e-06' in text
            (model / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert reused(llmprune.prune(model, **fields)) == 0
    assert reused(llmprune.prune(tiny_model_dir, **texts)) == NUM_BLOCKS


def test_walks_that_propagate_do_not_touch_the_cache(tiny_model_dir: Path, texts: Texts, root: Path) -> None:
    """By block and by group the inputs are those of pruned blocks; channels that change places are collected anew, too."""
    llmprune.prune(tiny_model_dir, **texts)
    before = sorted(root.rglob("*"))
    for fields in ({"sequential": "block"}, {"sequential": "group"}, {"pattern": "2:4", "permute": True}):
        report = llmprune.prune(tiny_model_dir, **{**texts, **fields})
        assert report.statistics == () and report.num_sites == 14
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert llmprune.prune(model, tokenizer=tiny.train_tokenizer(), **texts).statistics == ()
    assert sorted(root.rglob("*")) == before


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def _flip(position: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[position] ^= 1
        file.write_bytes(content)

    return damage


@pytest.mark.parametrize(
    "damage",
    [_truncate, _flip(-1), _flip(300), _flip(2), lambda file: file.write_bytes(b""), lambda file: shutil.copy(
        file.with_name(file.name.replace("00000", "00001")), file)],
    ids=["truncated", "tensor", "header", "length", "empty", "another block's"],
)  # fmt: skip
def test_a_damaged_record_is_collected_again(
    damage: Callable[[Path], Any], tiny_model_dir: Path, texts: Texts, tmp_path: Path, root: Path
) -> None:
    """With a warning that names it, and the same bytes; the next job finds it whole."""
    llmprune.prune(tiny_model_dir, out=tmp_path / "cold", **texts)
    (folder,) = root.iterdir()
    damage(folder / "block-00000-norm.safetensors")
    report = llmprune.prune(tiny_model_dir, out=tmp_path / "again", **texts)
    assert reused(report) == NUM_BLOCKS - 1
    assert any("block-00000-norm.safetensors is damaged" in warning for warning in report.warnings)
    assert weights(tmp_path / "again") == weights(tmp_path / "cold")
    assert reused(llmprune.prune(tiny_model_dir, **texts)) == NUM_BLOCKS


def test_the_least_recently_used_go_first(
    tiny_model_dir: Path, texts: Texts, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for two calibrations a third one takes the place of that which was used before the other."""
    sizes = []
    for number, samples in enumerate((4, 3)):
        llmprune.prune(tiny_model_dir, **{**texts, "num_samples": samples})
        sizes.append(sum(file.stat().st_size for file in root.rglob("*.safetensors")))
        for file in root.rglob("*.safetensors"):
            os.utime(file, (1000 + number, 1000 + number))
    assert reused(llmprune.prune(tiny_model_dir, **texts)) == NUM_BLOCKS  # the older one is used once more
    monkeypatch.setenv("LLMPRUNE_CACHE_GB", str((sizes[1] + 1) / 1e9))
    llmprune.prune(tiny_model_dir, **{**texts, "num_samples": 2})
    assert sum(file.stat().st_size for file in root.rglob("*.safetensors")) <= sizes[1] + 1
    assert reused(llmprune.prune(tiny_model_dir, **texts)) == NUM_BLOCKS
    assert reused(llmprune.prune(tiny_model_dir, **{**texts, "num_samples": 3})) == 0


def test_statistics_that_do_not_fit_are_not_kept(
    tiny_model_dir: Path, texts: Texts, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning; a cache of which only the first blocks were kept serves those, and the result is the same."""
    off = llmprune.prune(tiny_model_dir, out=tmp_path / "off", method="sparsegpt", statistics_cache=False, **texts)
    monkeypatch.setenv("LLMPRUNE_CACHE_GB", "0.00005")
    first = llmprune.prune(tiny_model_dir, out=tmp_path / "first", method="sparsegpt", **texts)
    assert sum("LLMPRUNE_CACHE_GB (5e-05)" in warning for warning in first.warnings) == 1
    monkeypatch.setenv("LLMPRUNE_CACHE_GB", "0")
    assert llmprune.prune(tiny_model_dir, **texts).statistics == ()
    assert not list(root.rglob("*.safetensors")) and off.num_sites == first.num_sites == 14
    monkeypatch.setenv("LLMPRUNE_CACHE_GB", "much")
    with pytest.raises(ConfigError, match="LLMPRUNE_CACHE_GB must be a number of gigabytes, 0 for no cache, got 'much'"):
        llmprune.prune(tiny_model_dir, **texts)
    assert weights(tmp_path / "first") == weights(tmp_path / "off")


def test_a_disk_that_fills_up_fails_nothing(
    tiny_model_dir: Path, texts: Texts, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second block's record meets a full disk: a warning, no half of a file, and the same weights."""
    llmprune.prune(tiny_model_dir, out=tmp_path / "off", statistics_cache=False, **texts)
    write = statistics.TensorWriter.write
    count = []

    def full(self: Any, *arguments: Any) -> None:
        count.append(1)
        if len(count) > 5:  # four inputs a block
            raise OSError(28, "No space left on device")
        write(self, *arguments)

    monkeypatch.setattr(statistics.TensorWriter, "write", full)
    report = llmprune.prune(tiny_model_dir, out=tmp_path / "full", **texts)
    assert [warning for warning in report.warnings if "not kept for later jobs" in warning and "No space left" in warning]
    assert [file.name for file in root.rglob("*") if file.is_file()] == ["block-00000-norm.safetensors"]
    monkeypatch.undo()
    monkeypatch.setenv("LLMPRUNE_CACHE", str(root.parent))
    assert reused(llmprune.prune(tiny_model_dir, out=tmp_path / "next", **texts)) == 1
    assert weights(tmp_path / "full") == weights(tmp_path / "off") == weights(tmp_path / "next")


def test_a_cache_that_cannot_be_written_is_left_alone(
    tiny_model_dir: Path, texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file where the directory should be: a warning."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "file"))
    report = llmprune.prune(tiny_model_dir, **texts)
    assert report.num_sites == 14 and any("not kept for later jobs" in warning for warning in report.warnings)


def _prune_in_a_process(model: Path, out: Path, texts: Texts, cache: Path) -> None:
    os.environ["LLMPRUNE_CACHE"] = str(cache)  # what the server had when it started is another test's
    torch.set_num_threads(1)
    llmprune.prune(model, out=out, **texts)


def test_two_processes_at_once(tiny_model_dir: Path, texts: Texts, tmp_path: Path, root: Path) -> None:
    """Both write the same records: they are whole, and there is one of each."""
    workers = [
        PROCESSES.Process(target=_prune_in_a_process, args=(tiny_model_dir, tmp_path / str(number), texts, root.parent))
        for number in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(file.name for file in root.rglob("*") if file.is_file()) == [
        f"block-{index:05d}-norm.safetensors" for index in range(NUM_BLOCKS)
    ]
    report = llmprune.prune(tiny_model_dir, out=tmp_path / "warm", **texts)
    assert reused(report) == NUM_BLOCKS and not report.warnings
    assert weights(tmp_path / "0") == weights(tmp_path / "1") == weights(tmp_path / "warm")


@pytest.mark.parametrize(
    ("begun", "left"),
    [("off", "nothing"), ("cold", "nothing"), ("cold", "all"), ("warm", "all"), ("warm", "nothing"), ("warm", "the first")],
)
def test_killed_after_a_block_and_resumed(
    begun: str, left: str, tiny_model_dir: Path, texts: Texts, tmp_path: Path, root: Path
) -> None:
    """Whatever became of the cache in between, the result is that of a run that was not stopped."""
    llmprune.prune(tiny_model_dir, out=tmp_path / "whole", statistics_cache=False, **texts)
    fields = {**texts, "statistics_cache": begun != "off"}
    if begun == "warm":
        llmprune.prune(tiny_model_dir, **fields)
    events = prune_iter(tiny_model_dir, out=tmp_path / "out", **fields)
    next(event for event in events if isinstance(event, BlockFinished))
    events.close()
    if left != "all":
        for file in list(root.rglob("*.safetensors")):
            if left == "nothing" or "00001" in file.name:
                file.unlink()
    report = llmprune.prune(tiny_model_dir, out=tmp_path / "out", resume=True, **fields)
    assert report.resumed and report.num_sites == 14
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize("allocation", ["owl", "dp", "evolution"])
def test_surveys_of_an_allocation_reuse(
    allocation: str, tiny_model_dir: Path, texts: Texts, tmp_path: Path, calls: list[int]
) -> None:
    """A second job surveys and prunes on what the first one collected; the allocation and the weights are the same."""
    fields = {**texts, "method": "sparsegpt", "allocation": allocation, "evolution_generations": 2, "evolution_offspring": 4}
    off = llmprune.prune(tiny_model_dir, out=tmp_path / "off", statistics_cache=False, **fields)
    cold = llmprune.prune(tiny_model_dir, out=tmp_path / "cold", **fields)
    warm = llmprune.prune(tiny_model_dir, out=tmp_path / "warm", **fields)
    assert not off.statistics and not reused(cold, "allocate")
    assert reused(warm, "allocate") == reused(warm) == NUM_BLOCKS
    if allocation != "owl":  # which surveys norms; the others leave Gram matrices behind
        assert reused(cold) == NUM_BLOCKS
    if allocation == "evolution":
        assert reused(cold, "allocate, candidates") == NUM_BLOCKS
    assert off.allocation and cold.allocation and warm.allocation
    assert off.allocation.sparsities == cold.allocation.sparsities == warm.allocation.sparsities
    assert weights(tmp_path / "off") == weights(tmp_path / "cold") == weights(tmp_path / "warm")


def test_a_survey_reuses_under_any_walk(tiny_model_dir: Path, texts: Texts) -> None:
    """It looks at the dense model, whatever the walk after it does."""
    fields = {**texts, "sequential": "block", "allocation": "owl"}
    llmprune.prune(tiny_model_dir, **fields)
    report = llmprune.prune(tiny_model_dir, **{**fields, "sparsity": 0.6})
    (found,) = report.statistics
    assert isinstance(found, StatisticsReport) and (found.stage, found.num_reused) == ("allocate", NUM_BLOCKS)


def test_a_refined_mask_starts_from_the_dense_walk(tiny_model_dir: Path, texts: Texts, tmp_path: Path) -> None:
    """The mask comes from reused statistics, the refinement is the same."""
    fields = {**texts, "method": "icbs", "icbs_passes": 2}
    off = llmprune.prune(tiny_model_dir, out=tmp_path / "off", statistics_cache=False, **fields)
    llmprune.prune(tiny_model_dir, **fields)
    warm = llmprune.prune(tiny_model_dir, out=tmp_path / "warm", **fields)
    assert reused(warm) == NUM_BLOCKS and off.refinement and warm.refinement
    assert weights(tmp_path / "off") == weights(tmp_path / "warm")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reconstruct": True}, "Use --sequential block or group, or drop --reconstruct"),
        ({"effort": "balanced"}, "Use --sequential block or group, or drop --reconstruct"),
        ({"pattern": "structured"}, "Drop --sequential"),
    ],
    ids=str,
)
def test_what_a_dense_walk_cannot_do(fields: dict[str, Any], words: str) -> None:
    """Refused before anything is read, with the remedy."""
    with pytest.raises(ConfigError, match=words):
        llmprune.PruneConfig.build(sequential="none", **fields)


def test_the_command_line_says_what_was_reused(
    cli: Callable[..., Any], tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """In the summary and on the report page; --no-statistics-cache reads and keeps nothing."""
    options = (
        "--sequential",
        "none",
        "--calibration",
        text_file,
        "--no-eval",
        "--num-samples",
        4,
        "--seq-len",
        32,
        "--no-latency",
        "--no-prompt",
    )
    for number, more in enumerate(((), (), ("--no-statistics-cache",))):
        outcome = cli("prune", tiny_model_dir, "--out", tmp_path / str(number), *options, *more)
        assert outcome.code == 0
        page = (tmp_path / str(number) / "report.html").read_text()
        line = "Statistics of 2 of 2 blocks reused from an earlier job or stage"
        assert (line in " ".join(outcome.err.split() + outcome.out.split())) == (line in page) == (number == 1)


def _killed_in_a_write(model: Path, out: Path, texts: Texts, cache: Path) -> None:
    def die(self: Any, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    statistics.TensorWriter.write = die  # type: ignore[method-assign]
    _prune_in_a_process(model, out, texts, cache)


def test_a_killed_write_leaves_nothing_that_is_read(tiny_model_dir: Path, texts: Texts, tmp_path: Path, root: Path) -> None:
    """SIGKILL in the middle of a record: the next job collects it, and old leftovers go."""

    worker = PROCESSES.Process(target=_killed_in_a_write, args=(tiny_model_dir, tmp_path / "killed", texts, root.parent))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    (left,) = [file for file in root.rglob("*") if file.is_file()]
    assert left.name.startswith(".tmp-")
    os.utime(left, (1000, 1000))
    report = llmprune.prune(tiny_model_dir, **texts)
    assert reused(report) == 0 and not report.warnings and not left.exists()


def test_a_warning_is_an_event_too(tiny_model_dir: Path, texts: Texts, root: Path) -> None:
    """A front end hears of a damaged record."""
    llmprune.prune(tiny_model_dir, **texts)
    for file in root.rglob("*.safetensors"):
        _truncate(file)
    messages = [event.message for event in prune_iter(tiny_model_dir, **texts) if isinstance(event, Warned)]
    assert len(messages) == NUM_BLOCKS and all("is damaged" in message for message in messages)


def test_blocks_that_are_streamed_from_disk(tiny_model_dir: Path, texts: Texts, tmp_path: Path, calls: list[int]) -> None:
    """Weights are read, pruned on reused statistics and written, and no block runs."""
    fields = {**texts, "offload": "disk", "method": "sparsegpt"}
    llmprune.prune(tiny_model_dir, out=tmp_path / "off", statistics_cache=False, **fields)
    cold = llmprune.prune(tiny_model_dir, out=tmp_path / "cold", **fields)
    calls.clear()
    warm = llmprune.prune(tiny_model_dir, out=tmp_path / "warm", **fields)
    assert (reused(cold), reused(warm), len(calls)) == (0, NUM_BLOCKS, 0) and warm.sparsity == 0.5
    files = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("off", "cold", "warm")]
    contents = [[file.read_bytes() for file in found] for found in files]
    assert len(files[0]) == NUM_BLOCKS + 1 and contents[0] == contents[1] == contents[2]
