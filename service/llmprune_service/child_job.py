"""One child process of a job: start it, turn its events into the job's, stop it when the job must stop."""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmprune.events import (
    BlockFinished,
    Downloaded,
    Event,
    Failed,
    Finished,
    PointFinished,
    Progress,
    Searched,
    Stage,
    StageFinished,
    StageStarted,
    Warned,
    parse_event,
)
from llmprune.report import BlockReport
from llmprune.spec import PruneConfig
from llmprune.sweep_spec import AutoConfig
from llmprune_service import processes
from llmprune_service.commands import arguments, auto_arguments, fetch_arguments
from llmprune_service.execution import Draining, Execution
from llmprune_service.points import finite
from llmprune_service.schemas import Phase
from llmprune_service.settings import Settings
from llmprune_service.store import Store
from llmprune_service.tokens import hub_token

log = logging.getLogger(__name__)
_LAST_WORDS = 4000  # bytes
_PHASES: dict[Stage, Phase] = {"pruned": "evaluate", "benchmark": "benchmark", "save": "package"}
_LATENCY = "latency"
_SAY_EVERY = 1.0
# Nothing else of the worker's environment reaches a job: no database address, no keys, no tokens.
_PASSED_ON = (
    "PATH", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE",
)  # fmt: skip
_TO_FETCH = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "HF_HUB_OFFLINE")


class ChildFailed(Exception):
    """The child ended without a result; ``code`` is the cause, in snake case."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class ChildJob:
    """``llmprune prune`` (``auto``, ``fetch``) for one job. ``watch`` raises what stops it; ``config`` is a search's base."""

    execution: Execution
    config: PruneConfig
    folder: Path
    settings: Settings
    devices: str | None
    watch: Callable[[], None]
    store: Store
    fetch: bool = False
    search: AutoConfig | None = None
    _lines: queue.SimpleQueue[bytes | None] = field(default_factory=queue.SimpleQueue)
    _failure: Failed | None = None
    _finished: bool = False
    _last_said: float = 0.0
    _unpushed: set[int] = field(default_factory=set)
    _newest_pushed: int | None = None

    def run(self) -> None:
        """Run it to the end; raises ChildFailed, or what ``watch`` raises once the child is gone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "tmp").mkdir(exist_ok=True)
        log_file = self.folder / "log.txt"
        with log_file.open("ab") as stderr:
            begins = stderr.tell()
            process = processes.spawn(
                self._command(), env=self._environment(), cwd=self.folder, stdout=-1, stderr=stderr,
                memory_bytes=self.settings.child_memory_bytes,
            )  # fmt: skip
            assert process.stdout is not None
            reader = processes.read_lines(process.stdout, self._lines.put)
            try:
                self._follow(lambda: _is_over(process, reader))
            finally:
                processes.end(process)
                process.stdout.close()
        if not self._finished:
            failure = self._cause(process.returncode)
            if failure.code in ("internal_error", "killed"):
                log.error(
                    "the job's process failed",
                    extra={"job": self.execution.job.id, "last_words": _last_words(log_file, begins)},
                )
            raise failure

    def _follow(self, is_over: Callable[[], bool]) -> None:
        """Handle lines and look around until the child is over."""
        interval = self.settings.poll_seconds
        looked = drain_until = 0.0
        stop: Draining | None = None
        while not is_over() or not self._lines.empty():
            try:
                line = self._lines.get(timeout=interval / 4)
            except queue.Empty:
                line = None
            finished_block = self._handle(line) if line else False
            if stop is not None and (finished_block or time.monotonic() > drain_until):
                raise stop
            if stop is None and time.monotonic() - looked >= interval:
                looked = time.monotonic()
                try:
                    self.watch()
                except Draining as reason:
                    stop, drain_until = reason, time.monotonic() + self.settings.drain_seconds

    def _handle(self, line: bytes) -> bool:
        """File one event; True if it ends a block."""
        try:
            event = parse_event(line)
        except ValidationError:
            return False  # not ours: a library that prints to stdout
        match event:
            case StageStarted():
                self._begin(event)
            case Progress(detail=detail, stage="pruned") if detail == _LATENCY and self.search is None:
                self.execution.enter("benchmark")
            case Progress():
                self._progress(event.stage, event.done, event.total, event.detail, value=event.value)
            case StageFinished():
                self.execution.say("job.metric", {"name": "stage", **event.model_dump(exclude={"event"})})
            case BlockFinished():
                if self.search is None:  # its jobs have blocks, it has none
                    self._block(event)
                return True
            case PointFinished():
                self._point(event)
            case Warned():
                self.execution.say("job.log", {"level": "warning", "message": self._clean(event.message)})
            case _:
                self._end(event)
        return False

    def _end(self, event: Event) -> None:
        if isinstance(event, Failed):
            self._failure = event
        elif isinstance(event, Finished | Downloaded):
            self._finished = True
        elif isinstance(event, Searched):
            self._finished = event.search.best is not None
        if isinstance(event, Finished):  # in an earlier attempt, perhaps, whose worker could tell nothing of it
            self._file_missing([(report, None) for report in event.report.blocks], len(event.report.blocks))

    def _begin(self, event: StageStarted) -> None:
        if not self.fetch and self.search is None:
            self.execution.enter(_PHASES.get(event.stage, "prune"))
        if event.stage == "prune" and event.resumed_at and self.search is None:
            self._file_missing(self._recorded(event.resumed_at), event.total)
        self._began = self.execution.job.updated_at
        self._resumed_at = event.resumed_at
        self._progress(event.stage, event.resumed_at, event.total, "", always=True)

    def _progress(
        self, stage: Stage, done: int, total: int, detail: str, *, value: float | None = None, always: bool = False
    ) -> None:
        """The current state always goes to the job's row, an event about once a second."""
        progress = {"stage": stage, "done": done, "total": total, "began": self._began, "resumed_at": self._resumed_at}
        if always or time.monotonic() - self._last_said >= _SAY_EVERY:
            self._last_said = time.monotonic()
            facts: dict[str, Any] = {"stage": stage, "done": done, "total": total, "detail": detail}
            if value is not None and math.isfinite(value):
                facts["value"] = value
            self.execution.say("job.progress", facts, progress=progress)
        else:
            self.execution.note(progress=progress)

    _began = 0.0
    _resumed_at = 0

    def _block(self, event: BlockFinished) -> None:
        # First the row, which a worker that lost the job is refused; then the store, which would take it.
        self._file(event.report, event.num_blocks, event.sha256)
        if not self.store.is_local:
            self._push(event.block)
        self._progress("prune", event.block + 1, event.num_blocks, event.report.name)

    def _point(self, event: PointFinished) -> None:
        """One job of a search is over."""
        point = event.point
        facts = {"index": event.index, "name": point.name, "group": point.group, "reused": event.reused, "error": point.error}
        self.execution.say("job.point", facts | {"values": finite(point.values), "seconds": point.seconds})

    def _file(self, report: BlockReport, num_blocks: int, sha256: str | None) -> None:
        facts = {
            "block": report.index, "name": report.name, "sparsity": report.sparsity, "error": _mean_error(report),
            "seconds": report.seconds, "sha256": sha256,
        }  # fmt: skip
        self.execution.add_block(facts, num_blocks)

    def _file_missing(self, blocks: Iterable[tuple[BlockReport, str | None]], num_blocks: int) -> None:
        """File what an earlier attempt's child did while its worker could not file it any more."""
        filed = self.execution.filed_blocks()
        for report, sha256 in blocks:
            if report.index not in filed:
                self._file(report, num_blocks, sha256)

    def _recorded(self, num_blocks: int) -> Iterator[tuple[BlockReport, str]]:
        """The journal's first blocks: reports, and digests of their weights."""
        for block in range(num_blocks):
            index = self.folder / "checkpoint.work" / _block(block) / "record.json"
            with suppress(FileNotFoundError):  # a child that is done has taken its journal away
                record = json.loads(index.read_text())
                yield BlockReport.model_validate(record["report"]), record["sha256"]["weights.safetensors"]

    def _push(self, block: int) -> None:
        """Copy what the journal has new to the shared store, so that another host can go on from here.

        The child may be a block further and delete the hidden states of this one meanwhile. Then the store keeps those of the
        block before, until a later block is there with its own.
        """
        job = self.execution.job
        where = {"tenant": job.tenant, "job_id": job.id, "generation": job.generation}
        journal = self.folder / "checkpoint.work"
        if self._newest_pushed is None:
            # All that is there, the records of earlier attempts on other hosts too: pushing one again changes nothing.
            self._unpushed.update(range(block))
            for record in (journal / "run.json", journal / "dense"):
                if record.exists():
                    self.store.push_record(record, **where)
        self._unpushed.add(block)
        if not self.store.push_record(journal / _block(block), whole=True, **where):
            return
        for earlier in self._unpushed - {block}:
            self.store.push_record(journal / _block(earlier), **where)
        if self._newest_pushed is not None:
            self._unpushed.add(self._newest_pushed)
        for older in self._unpushed - {block}:
            self.store.drop_from_record(_block(older), "hidden-*", **where)
        self._unpushed.clear()
        self._newest_pushed = block

    def _command(self) -> list[str]:
        job = self.execution.job
        changes = {"revision": job.revision} | ({"batch_size": job.batch_size} if job.batch_size else {})
        config = PruneConfig.model_validate(self.config.model_dump(exclude_unset=True) | changes)
        python = [str(self.settings.job_python), "-P", "-m", "llmprune"]
        if self.fetch:
            return [*python, "fetch", *fetch_arguments(config), "--events", "-"]
        if self.search is not None:
            search = self.search.model_copy(update={"base": config})
            return [*python, "auto", *auto_arguments(search), "--out", "checkpoint", "--events", "-"]
        return [*python, "prune", *arguments(config), "--out", "checkpoint", "--resume", "--events", "-"]

    def _environment(self) -> dict[str, str]:
        names = (*_PASSED_ON, *_TO_FETCH) if self.fetch else _PASSED_ON
        environment = {name: os.environ[name] for name in names if name in os.environ}
        environment |= {"HOME": str(self.folder), "TMPDIR": str(self.folder / "tmp"), "HF_HOME": str(self.settings.hub_dir)}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1", "TERM": "dumb"}
        if self.settings.hf_endpoint:
            environment["HF_ENDPOINT"] = self.settings.hf_endpoint
        if self.fetch:
            token = hub_token(self.settings, self.execution.job.tenant)
            environment |= {"HF_TOKEN": token} if token else {}
        else:
            environment |= {"HF_HUB_OFFLINE": "1", **self._cache()}
        if self.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices
        return environment

    def _cache(self) -> dict[str, str]:
        """Statistics are shared by the jobs of one tenant: a report says what was found there, and when it was collected.

        They give way to what jobs need: half of the free space is the most they take.
        """
        free = max(0, shutil.disk_usage(self.folder).free - self.settings.disk_floor_bytes)
        gigabytes = min(self.settings.cache_gb, free / 2e9)
        return {
            "LLMPRUNE_CACHE": str(self.settings.cache_dir / self.execution.job.tenant),
            "LLMPRUNE_CACHE_GB": f"{gigabytes:.3f}",
        }

    def _cause(self, returncode: int) -> ChildFailed:
        if self._failure is not None:
            return ChildFailed(_snake(self._failure.error), self._clean(self._failure.message))
        if returncode < 0:
            name = signal.Signals(-returncode).name
            return ChildFailed("killed", f"The job's process was ended by {name}, as a host without memory left does.")
        return ChildFailed("internal_error", f"The job's process ended with exit code {returncode}; the worker's log says why.")

    def _clean(self, message: str) -> str:
        """Without the paths of this host."""
        return message.replace(f"{self.folder}/", "").replace(str(self.settings.data_dir), "DATA_DIR")


def _last_words(log_file: Path, begins: int) -> str:
    """The end of what a process wrote on stderr, from where its part of the file begins: a traceback, say."""
    return log_file.read_bytes()[begins:][-_LAST_WORDS:].decode(errors="replace").strip()


def _block(index: int) -> str:
    """Name of a block's record in a journal."""
    return f"block-{index:05d}"


def _is_over(process: subprocess.Popen[bytes], reader: threading.Thread) -> bool:
    """Whether the child has ended and all it said is read; what it left behind would hold the pipe open."""
    if process.poll() is None:
        return False
    processes.signal_group(process, signal.SIGKILL)
    return not reader.is_alive()


def _mean_error(report: BlockReport) -> float | None:
    errors = [site.output_error for site in report.sites if site.output_error is not None]
    return sum(errors) / len(errors) if errors else None


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
