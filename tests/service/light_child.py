"""Stands in for the library where the job engine is tested: called like ``llmprune prune`` or ``auto``, without torch.

It keeps the library's protocol (journal, events, checkpoint; a test runs the real one through the same worker) and costs
what it is told to. What its bytes are depends on ``--seed`` and on every block having been built on the one before.

    --num-samples N    blocks
    --damping S        seconds a block takes
    --skip WORD        what goes wrong:
        gated          the hub wants a licence accepted
        oom            out of memory unless --batch-size is given; ``oom-always`` in any case; ``oom-N`` with a journal that
                       has the batch size N
        network-N      the hub does not answer the first N processes of the job
        crash-B[-N]    death before block B, of the first N processes or of all
        hang-B[-N]     block B takes an hour, in the first N processes or in all
        unmet          nothing that a search tries is within its budget

Every process appends what it does to ``light.log`` in the service's data directory, a JSON object a line.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from llmprune.errors import (
    BudgetNotMet,
    GatedModel,
    HubUnreachable,
    JournalError,
    LlmpruneError,
    OutOfMemory,
    OutputError,
    ResumeRefused,
)
from llmprune.events import (
    BlockFinished,
    BlockStarted,
    Event,
    Failed,
    Finished,
    PointFinished,
    PointStarted,
    Progress,
    Searched,
    SitePruned,
    StageFinished,
    StageStarted,
)
from llmprune.report import BlockReport, Environment, ModelReport, Report, SiteReport, StageReport
from llmprune.spec import PruneConfig
from llmprune.sweep_report import AutoReport, Comparison, PointReport, Trial
from llmprune.sweep_spec import AutoConfig

LOG = "light.log"
_WORK, _OUT, _TRIED = Path("checkpoint.work"), Path("checkpoint"), Path("checkpoint.auto")
_WEIGHTS, _HIDDEN = "weights.safetensors", "hidden-00000.safetensors"
_WEIGHT_BYTES = 4096


def main() -> None:
    """Parse the command line as a worker writes it, and prune."""
    assert sys.argv[1:4] == ["-P", "-m", "llmprune"] and sys.argv[4] in ("prune", "auto"), sys.argv
    told = {name for name in os.environ if name.startswith("LLMPRUNE_")}
    assert told == {"LLMPRUNE_CACHE", "LLMPRUNE_CACHE_GB"}, "the service's settings are no job's business"
    assert Path(os.environ["LLMPRUNE_CACHE"]).parent == Path(os.environ["HF_HOME"]).with_name("cache"), "later jobs find it"
    options = _parse(sys.argv[5:])
    assert options.resume == (sys.argv[4] == "prune"), "a search goes on by itself"
    try:
        (Pruning if sys.argv[4] == "prune" else Searching)(options).run()
    except LlmpruneError as error:
        _say(Failed(error=type(error).__name__, message=str(error), exit_code=error.exit_code))
        sys.exit(error.exit_code)


def checkpoint_bytes(num_blocks: int, seed: int = 0) -> bytes:
    """The weights of a finished checkpoint."""
    hidden, weights = _first(seed), b""
    for block in range(num_blocks):
        weights += _weights(hidden)
        hidden = _next(hidden, block)
    return weights


class Pruning:
    """One process of a job."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = Path.cwd()
        self.log = Path(os.environ["HF_HOME"]).parent / LOG
        self.blocks: list[BlockReport] = []

    def run(self) -> None:
        """Do the job, or what is left of it."""
        self.note("start")
        if (_OUT / "llmprune.json").is_file():
            _say(Finished(report=Report.model_validate(json.loads((_OUT / "llmprune.json").read_text())["report"])))
            return
        self.fail_early()
        with self.open_journal():
            self.prune()
            self.save()

    def note(self, what: str, block: int | None = None) -> None:
        """Tell the tests, in one write."""
        line = {"what": what, "block": block, "job": self.folder.parent.name, "attempt": self.folder.name, "pid": os.getpid()}
        with self.log.open("a") as file:
            file.write(json.dumps({**line, "time": time.time()}) + "\n")

    def num_starts(self) -> int:
        """Processes of this job so far, this one included."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return sum(line["what"] == "start" and line["job"] == self.folder.parent.name for line in lines)

    # What goes wrong ------------------------------------------------------------------------------------------------

    def fail_early(self) -> None:
        """Raise what was asked for."""
        batch_size = self.options.batch_size
        for word in self.options.skip:
            kind, _, number = word.partition("-")
            if kind == "gated":
                raise GatedModel("demo is gated: accept its licence and log in.")
            if word == "oom-always" or (word == "oom" and batch_size is None):
                raise OutOfMemory(f"the device has no memory for a batch of {batch_size}; use a smaller --batch-size.")
            if kind == "oom" and number.isdigit() and batch_size is None:  # of the size the library chose by itself
                _WORK.mkdir(exist_ok=True)
                _write_durably(_WORK / "run.json", json.dumps({"batch_size": int(number)}).encode())
                raise OutOfMemory(f"the device has no memory for a batch of {number}; use a smaller --batch-size.")
            if kind == "network" and self.num_starts() <= int(number):
                raise HubUnreachable("the hub did not answer.")

    def is_troubled(self, kind: str, block: int) -> bool:
        """Whether this process is to crash or hang at the block."""
        words = [word.split("-") for word in self.options.skip]
        limits = [
            int(numbers[1]) if len(numbers) > 1 else math.inf
            for name, *numbers in words
            if name == kind and int(numbers[0]) == block
        ]
        return any(self.num_starts() <= limit for limit in limits)

    # The journal ----------------------------------------------------------------------------------------------------

    def open_journal(self) -> Any:
        """Take its lock; go on only with a run of the same options."""
        _WORK.mkdir(exist_ok=True)
        lock = (_WORK / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"another process works in {_WORK}.") from None
        fingerprint = {name: getattr(self.options, name) for name in ("num_samples", "seed", "batch_size", "damping")}
        if not (_WORK / "run.json").exists():
            _write_durably(_WORK / "run.json", json.dumps(fingerprint).encode())
        elif json.loads((_WORK / "run.json").read_text()) != fingerprint:
            raise ResumeRefused(f"{_WORK} belongs to another run.")
        if not (_WORK / "dense").exists():
            _record("dense", {}, {"hidden.safetensors": b"dense"})
        _read("dense", "hidden.safetensors")
        return lock

    def prune(self) -> None:
        """All blocks that are not recorded, each on the outputs of the one before."""
        start = 0
        while (_WORK / f"block-{start:05d}").exists():
            record = json.loads((_WORK / f"block-{start:05d}" / "record.json").read_text())
            self.blocks.append(BlockReport.model_validate(record["report"]))
            start += 1
        hidden = _read(f"block-{start - 1:05d}", _HIDDEN) if start else _first(self.options.seed)
        num_blocks = self.options.num_samples
        _say(StageStarted(stage="prune", total=num_blocks, resumed_at=start))
        for block in range(start, num_blocks):
            if self.is_troubled("crash", block):
                print(f"no way on at block {block}", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            self.note("begin", block)
            _say(BlockStarted(block=block, name=f"blocks.{block}", num_blocks=num_blocks))
            time.sleep(3600 if self.is_troubled("hang", block) else self.options.damping)
            digest = self.finish_block(block, hidden)
            hidden = _next(hidden, block)
            self.note("done", block)
            _say(BlockFinished(block=block, num_blocks=num_blocks, report=self.blocks[block], sha256=digest))
        _say(StageFinished(stage="prune", seconds=1.0))

    def finish_block(self, block: int, hidden: bytes) -> str:
        """Record a block; returns the digest of its weights."""
        site = SiteReport(name=f"blocks.{block}.up", shape=(64, 64), numel=4096, num_zeros=2048, output_error=0.25)
        _say(SitePruned(block=block, site=site))
        report = BlockReport(index=block, name=f"blocks.{block}", seconds=self.options.damping, sites=(site,))
        self.blocks.append(report)
        files = {_WEIGHTS: _weights(hidden), _HIDDEN: _next(hidden, block)}
        digests = _record(f"block-{block:05d}", {"report": report.model_dump()}, files)
        if block:
            (_WORK / f"block-{block - 1:05d}" / _HIDDEN).unlink(missing_ok=True)
        return digests[_WEIGHTS]

    # The end --------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Evaluate, and write the checkpoint from what the journal holds."""
        for stage in ("pruned", "save"):
            _say(StageStarted(stage=stage, total=2))
            _say(Progress(stage=stage, done=1, total=2, detail="latency" if stage == "pruned" and self.options.latency else ""))
        weights = b"".join(_read(f"block-{block:05d}", _WEIGHTS) for block in range(self.options.num_samples))
        temporary = Path(".checkpoint.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        report = self.report(len(weights))
        files = {"model.safetensors": weights, "report.json": report.model_dump_json().encode()}
        digests = {name: _write_durably(temporary / name, content) for name, content in files.items()}
        manifest = {"schema_version": 1, "fingerprint": {}, "sha256": digests, "report": report.model_dump(mode="json")}
        _write_durably(temporary / "llmprune.json", json.dumps(manifest).encode())
        temporary.rename(_OUT)
        shutil.rmtree(_WORK)
        self.note("end")
        _say(Finished(report=report))

    def report(self, size: int) -> Report:
        """A report with nothing but the blocks in it."""
        num_blocks = self.options.num_samples
        names = ("num_samples", "seed", "batch_size", "damping", "skip")
        return Report(
            config=PruneConfig.model_validate({name: getattr(self.options, name) for name in names}),
            model=ModelReport(
                name="demo", revision="light", model_type="light", dtype="float32", num_parameters=4096 * num_blocks,
                num_prunable=4096 * num_blocks, num_blocks=num_blocks, weights_bytes=size,
            ),
            environment=Environment(llmprune="0", torch="0", transformers="0", python="3", device="cpu", num_threads=1),
            calibration=None, scope="row", walk="replay", blocks=tuple(self.blocks), quality=(), latency=None,
            stages=(StageReport(name="prune", seconds=1.0),), num_zeros_model=2048 * num_blocks, checkpoint_bytes=size,
        )  # fmt: skip


class Searching(Pruning):
    """One process of a search: every block of it is a job that is tried, the last one the best, which is then written."""

    def run(self) -> None:
        """Search, or find it done."""
        self.note("start")
        if (_OUT / "auto.json").is_file():
            _say(Searched(search=AutoReport.model_validate_json((_OUT / "auto.json").read_bytes())))
            return
        self.fail_early()
        self.prune()
        self.save()

    def prune(self) -> None:
        """Try what was not tried before."""
        _TRIED.mkdir(exist_ok=True)
        for number in range(self.options.num_samples):
            name, done = f"wanda-0.{number}", _TRIED / f"proxy-{number}.json"
            _say(PointStarted(name=name, index=number))
            if not (reused := done.exists()):
                self.note("begin", number)
                if self.is_troubled("crash", number):
                    os.kill(os.getpid(), signal.SIGKILL)
                _say(StageStarted(stage="prune", total=2))
                _say(Progress(stage="prune", done=1, total=2))
                time.sleep(3600 if self.is_troubled("hang", number) else self.options.damping)
                _write_durably(done, b"{}")
                self.note("done", number)
            _say(PointFinished(point=self.point(name), index=number, reused=reused))

    def save(self) -> None:
        """Write what was found: the best as a checkpoint, with the search beside it."""
        found = self.search()
        if found.best is None:
            _write(_TRIED, found)
            _say(Searched(search=found))
            raise BudgetNotMet(found.text)
        _OUT.mkdir()
        files = {"model.safetensors": _weights(_first(self.options.seed)), "report.json": b"{}"}
        digests = {name: _write_durably(_OUT / name, content) for name, content in files.items()}
        report = self.report(_WEIGHT_BYTES)
        manifest = {"schema_version": 1, "fingerprint": {}, "sha256": digests, "report": report.model_dump(mode="json")}
        _write_durably(_OUT / "llmprune.json", json.dumps(manifest).encode())
        _write(_OUT, found)
        self.note("end")
        _say(Searched(search=found))

    def point(self, name: str) -> PointReport:
        """What was tried."""
        return PointReport(name=name, config=PruneConfig(), group="wanda", values={"sparsity": 0.5, "perplexity": math.inf})

    def search(self) -> AutoReport:
        """A report with nothing but the trials in it."""
        budgets = {name: getattr(self.options, name) for name in ("max_kl", "max_perplexity_increase")}
        trials = [Trial(kind="proxy", point=self.point(f"wanda-0.{number}")) for number in range(self.options.num_samples)]
        met = "unmet" not in self.options.skip
        return AutoReport(
            config=AutoConfig(**budgets), objective="sparsity", best=trials[-1] if met else None,
            trials=tuple(trials), tried=Comparison(points=(), x="sparsity", y="kl"), out="checkpoint", seconds=1.0,
            text="wanda-0.1 is the sparsest within the budget." if met else "Nothing met the budget; the nearest is wanda-0.1.",
        )  # fmt: skip


def _write(folder: Path, found: AutoReport) -> None:
    _write_durably(folder / "auto.html", b"<p>")
    _write_durably(folder / "auto.json", found.model_dump_json().encode())


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=["demo"])
    for name, kind, default in (("num-samples", int, 4), ("damping", float, 0.1), ("seed", int, 0), ("batch-size", int, None)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    for name in ("method", "sparsity", "pattern", "sequential"):  # what the points of a sweep differ in
        parser.add_argument(f"--{name}")
    parser.add_argument("--skip", action="append", default=[])
    parser.add_argument("--latency", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", choices=["checkpoint"], required=True)
    parser.add_argument("--events", choices=["-"], required=True)
    parser.add_argument("--resume", action="store_true")
    for name in ("max-kl", "max-perplexity-increase"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--methods")
    return parser.parse_args(arguments)


def _say(event: Event) -> None:
    print(event.model_dump_json(), flush=True)


def _first(seed: int) -> bytes:
    return hashlib.sha256(f"seed {seed}".encode()).digest()


def _next(hidden: bytes, block: int) -> bytes:
    return hashlib.sha256(hidden + bytes([block])).digest()


def _weights(hidden: bytes) -> bytes:
    return random.Random(hidden).randbytes(_WEIGHT_BYTES)


def _record(name: str, data: dict[str, Any], files: dict[str, bytes]) -> dict[str, str]:
    """A record of the journal, whole or not there."""
    temporary = _WORK / f".tmp-{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    digests = {file: _write_durably(temporary / file, content) for file, content in files.items()}
    _write_durably(temporary / "record.json", json.dumps({**data, "sha256": digests}).encode())
    temporary.rename(_WORK / name)
    return digests


def _read(name: str, file: str) -> bytes:
    content = (_WORK / name / file).read_bytes()
    if hashlib.sha256(content).hexdigest() != json.loads((_WORK / name / "record.json").read_text())["sha256"][file]:
        raise JournalError(f"{name}/{file} is damaged.")
    return content


def _write_durably(file: Path, content: bytes) -> str:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    main()
