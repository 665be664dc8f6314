"""Runs one claimed job: the phases, each an 'ensure' that a second execution finds done, and retries by cause.

The library does the work in child processes; its journal in the attempt's directory is the only resume mechanism:

    WORK/JOB/GENERATION-ATTEMPT/checkpoint.work/    the journal, while the child runs
    WORK/JOB/GENERATION-ATTEMPT/checkpoint/         the finished checkpoint, until it is in the store
    WORK/JOB/GENERATION-ATTEMPT/log.txt             what the child wrote on stderr

A new attempt links the records of the one before it into its own directory: one that was thought dead and still writes
can do no harm.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError

from llmprune.errors import UserError
from llmprune.report import Report
from llmprune.spec import PruneConfig
from llmprune_service import hub, policy
from llmprune_service.child_job import ChildFailed, ChildJob
from llmprune_service.execution import Cancelled, Draining, Execution, JobFailed
from llmprune_service.points import axis_values
from llmprune_service.problems import Problem
from llmprune_service.schemas import JobRequest
from llmprune_service.settings import Settings
from llmprune_service.store import Artifact, Store, link_or_copy, remove_tree
from llmprune_service.tokens import hub_token

MANIFEST = "llmprune.json"
CHECKPOINT = "checkpoint"
_NETWORK = frozenset({"hub_unreachable", "text_unreachable"})
_CRASHES = frozenset({"killed", "internal_error"})
_MAX_NETWORK_RETRIES = 10
_MAX_CRASHES = 3
_MAX_BACK_OFF = 300.0
T = TypeVar("T")


@dataclass
class Runner:
    """One execution of one job on this host.

    Attributes:
        devices: CUDA_VISIBLE_DEVICES of the child, None to leave it alone.
        draining: whether the worker is to end.
        step: runs a phase as a step of the engine, which remembers it.
    """

    execution: Execution
    store: Store
    settings: Settings
    devices: str | None
    draining: Callable[[], bool]
    step: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]

    def __post_init__(self) -> None:
        job = self.execution.job
        self._deadline = time.monotonic() + job.timeout_s - (job.updated_at - job.started_at)

    def run(self) -> None:
        """Do all phases; the job has ended afterwards, unless Draining or Lost is raised."""
        try:
            self._check()
            self.step("resolve", self._resolve)
            self.step("fetch", self._fetch)
            self.step("prune", self._prune)
            self.step("package", self._package)
        except Cancelled:
            self.execution.cancelled()
        except JobFailed as failure:
            self.execution.fail(failure.code, str(failure))
        finally:
            self._tidy()

    # Phases ---------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Validate again: a job may have come straight from the database."""
        try:
            self._read_config()
        except (ValidationError, UserError) as error:
            raise JobFailed("invalid_config", " ".join(str(error).split())) from None
        except Problem as problem:
            details = "; ".join(f"{error['pointer'][1:]}: {error['detail']}" for error in problem.errors)
            raise JobFailed("invalid_config", details or problem.detail) from None
        self._check_disk()

    def _read_config(self) -> None:
        job = self.execution.job
        self.config = PruneConfig.model_validate(job.config)
        policy.check(JobRequest(**job.config, priority=job.priority, metadata=job.metadata), self.settings)

    def _resolve(self) -> dict[str, Any]:
        """Pin the revision, and ask whether the submitter may have the model, even where it is on disk already."""
        self.execution.enter("resolve")
        job = self.execution.job

        def ask() -> hub.Resolved:
            token = hub_token(self.settings, job.tenant)
            try:
                hub.check_texts((self.config.calibration_source(), *self.config.eval_sources()), self.settings)
                if job.revision is not None:
                    return hub.check_access(job.model, job.revision, token=token, settings=self.settings)
                return hub.resolve(self.config.model, self.config.revision, token=token, settings=self.settings)
            except Problem as problem:
                code = problem.code.replace("-", "_")
                errors = "; ".join(error["detail"] for error in problem.errors)
                raise ChildFailed(code, errors or problem.detail) from None

        resolved = self._retrying(ask)
        self.execution.note(revision=resolved.revision)
        self.execution.flush()
        return {"revision": resolved.revision}

    def _fetch(self) -> dict[str, Any]:
        """Bring model and texts to this host; jobs that need nothing from the hub have nothing to do."""
        self.execution.enter("fetch")
        if not self._needs_hub():
            return {"fetched": False}
        self._retrying(lambda: self._child(fetch=True).run())
        return {"fetched": True}

    def _prune(self) -> dict[str, Any]:
        """The library's job in a child: prune, evaluate, benchmark."""
        self.execution.enter("prune")
        self._restore()
        self._retrying(self._prune_once)
        return {"attempt": self.execution.job.attempt}

    def _prune_once(self) -> None:
        try:
            self._child().run()
        except ChildFailed as failure:
            if failure.code not in _NETWORK or not self._needs_hub():
                raise
            # The child is offline: what it lacks was fetched on another host, or swept from the cache. Bring it here.
            self._fetch()
            self._child().run()

    def _package(self) -> dict[str, Any]:
        """Move the checkpoint to the store and end the job."""
        checkpoint = self._folder / CHECKPOINT
        if not (checkpoint / MANIFEST).is_file():  # pruned by an earlier execution
            self._prune()
        self.execution.enter("package")
        self._look()
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        artifacts = self._store(checkpoint, manifest["sha256"] | digests_of(checkpoint, (MANIFEST, *self._extra_files)))
        report = Report.model_validate(manifest["report"])
        self.execution.succeed(report, headline(report) | self._extra_facts(), artifacts)
        return {"files": len(artifacts)}

    _extra_files: ClassVar[tuple[str, ...]] = ()

    def _extra_facts(self) -> dict[str, Any]:
        return {}

    def _store(self, folder: Path, digests: dict[str, str]) -> list[Artifact]:
        job = self.execution.job
        return self.store.put(folder, digests, tenant=job.tenant, job_id=job.id, attempt=job.attempt)

    # Parts ----------------------------------------------------------------------------------------------------------

    @property
    def _folder(self) -> Path:
        job = self.execution.job
        return self._job_folder / f"{job.generation}-{job.attempt}"

    @property
    def _job_folder(self) -> Path:
        return self.settings.work_dir / str(self.execution.job.id)

    def _needs_hub(self) -> bool:
        texts = (self.config.calibration_source(), *self.config.eval_sources())
        return self.execution.job.revision is not None or any(policy.is_hub_text(text) for text in texts)

    def _child(self, *, fetch: bool = False) -> ChildJob:
        return ChildJob(
            execution=self.execution, config=self.config, folder=self._folder, settings=self.settings, devices=self.devices,
            watch=self._look, store=self.store, fetch=fetch,
        )  # fmt: skip

    def _look(self) -> None:
        """What may stop a job between two lines of its child: its owner, its time limit, the disk, the worker's end."""
        job = self.execution.job
        if self.execution.flush() == "cancelling":
            raise Cancelled
        if self.draining():
            raise Draining
        if time.monotonic() > self._deadline:
            raise JobFailed("timeout", f"The job ran longer than its timeout_s of {job.timeout_s} seconds. Raise it and retry.")
        self._check_disk()

    def _check_disk(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self._folder).free < self.settings.disk_floor_bytes:
            raise JobFailed("disk_full", "The worker's disk is full. Retry when there is room: finished blocks are kept.")

    def _retrying(self, work: Callable[[], T]) -> T:
        """Try again by cause: the network with back-off, a crash a few times, memory once with a smaller batch, else never."""
        while True:
            try:
                return work()
            except ChildFailed as failure:
                code = failure.code
                retries = dict(self.execution.job.retries)
                count = retries[code] = retries.get(code, 0) + 1
                if code in _NETWORK and count <= _MAX_NETWORK_RETRIES:
                    seconds = min(2.0**count, _MAX_BACK_OFF)
                elif code in _CRASHES and count < _MAX_CRASHES:
                    seconds = 0.0
                elif code == "out_of_memory" and count == 1:
                    seconds = 0.0
                    self._halve_batch()
                else:
                    raise JobFailed(code, str(failure)) from None
                self.execution.say("job.retrying", {"code": code, "message": str(failure), "seconds": seconds}, retries=retries)
                self._sleep(seconds)

    def _halve_batch(self) -> None:
        """The journal belongs to the old batch size, and knows it where the library chose it: start anew, half as large."""
        run = self._folder / f"{CHECKPOINT}.work" / "run.json"
        recorded = json.loads(run.read_text()).get("batch_size") if run.is_file() else None
        used = recorded or self.execution.job.batch_size or self.config.batch_size or self.config.num_samples
        remove_tree(self._folder)
        self.execution.note(batch_size=max(1, used // 2), generation=self.execution.job.generation + 1)
        self.execution.flush()

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._look()
        while time.monotonic() < deadline:
            time.sleep(min(self.settings.poll_seconds, seconds))
            self._look()

    def _restore(self) -> None:
        """Link what earlier attempts of this generation finished into this one's directory."""
        job = self.execution.job
        target = self._folder
        attempts = [int(folder.name.partition("-")[2]) for folder in self._job_folder.glob(f"{job.generation}-*")]
        for attempt in sorted(attempts, reverse=True):
            earlier = self._job_folder / f"{job.generation}-{attempt}"
            if earlier == target:
                continue
            if (earlier / CHECKPOINT / MANIFEST).is_file():
                link_tree(earlier / CHECKPOINT, target / CHECKPOINT)
                return
            if link_journal(earlier / f"{CHECKPOINT}.work", target / f"{CHECKPOINT}.work"):
                break
        if not self.store.is_local:
            self.store.pull_journal(target / f"{CHECKPOINT}.work", tenant=job.tenant, job_id=job.id, generation=job.generation)

    def _tidy(self) -> None:
        """A finished job needs its journal no more; a failed or cancelled one may be gone on with."""
        job = self.execution.job
        if job.status == "succeeded":
            remove_tree(self._job_folder)
            self.store.drop_journal(job.tenant, job.id)


def digests_of(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The sha256 of files."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def headline(report: Report) -> dict[str, Any]:
    """The numbers a list of jobs shows, on the text with the worst ratio."""
    worst = max(report.quality, key=lambda item: item.ratio or 0.0, default=None)
    dense = report.model.weights_bytes
    facts: dict[str, Any] = {
        "sparsity": report.sparsity, "verdict": report.verdict.status, "verdict_text": report.verdict.text,
        "seconds": report.seconds, "checkpoint_bytes": report.checkpoint_bytes, "dense_bytes": dense,
        "values": axis_values(report),
        "text": None, "perplexity_dense": None, "perplexity_pruned": None, "ratio": None, "kl": None, "top1_agreement": None,
    }  # fmt: skip
    if worst is not None:
        quality = json.loads(worst.model_dump_json())
        facts |= {name: quality[name] for name in ("perplexity_dense", "perplexity_pruned", "ratio", "kl", "top1_agreement")}
        facts["text"] = worst.text.source
    for phase in ("prefill", "decode"):
        facts[f"{phase}_tokens_per_second"] = _speed(report, phase)
    return facts


def _speed(report: Report, phase: str) -> dict[str, float] | None:
    """Dense and pruned at batch size 1."""
    latency = report.latency
    if latency is None:
        return None
    found = {}
    for name, speeds in (("dense", latency.dense), ("pruned", latency.pruned)):
        first = next((speed for speed in speeds if speed.phase == phase), None)
        if first is None:
            return None
        found[name] = first.tokens_per_second
    return found


def link_journal(source: Path, target: Path) -> bool:
    """Link the whole records of a journal; False if there is none. Its owner may be writing: what vanishes is tried again."""
    while (source / "run.json").is_file():
        remove_tree(target)
        target.mkdir(parents=True)
        with suppress(FileNotFoundError):
            link_or_copy(source / "run.json", target / "run.json")
            for record in sorted(source.iterdir()):
                if (record / "record.json").is_file() and not record.name.startswith("."):
                    link_tree(record, target / record.name)
            if _newest_is_whole(target):
                return True
    remove_tree(target)
    return False


def _newest_is_whole(journal: Path) -> bool:
    """Whether the last block still has its hidden states: its owner deletes them once the next block is there."""
    blocks = sorted(journal.glob("block-*"))
    if not blocks:
        return True
    named = json.loads((blocks[-1] / "record.json").read_text())["sha256"]
    return all((blocks[-1] / file).is_file() for file in named)


def link_tree(source: Path, target: Path) -> None:
    """Link the files of a directory into a new one."""
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file():
            link_or_copy(file, target / file.name)
