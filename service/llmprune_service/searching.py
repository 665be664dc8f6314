"""Runs a search for the best model within a budget: one job, whose child is ``llmprune auto``.

WORK/JOB/GENERATION-ATTEMPT/checkpoint.auto/    the reports of all that was tried, and the best checkpoint so far
WORK/JOB/GENERATION-ATTEMPT/checkpoint.work/    the journal of the one that is being confirmed
WORK/JOB/GENERATION-ATTEMPT/checkpoint/         the one that was confirmed last; at the end the best, with auto.json
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmprune.sweep_spec import AutoConfig
from llmprune_service import policy
from llmprune_service.child_job import ChildFailed, ChildJob
from llmprune_service.runner import CHECKPOINT, MANIFEST, Runner, digests_of, link_journal, link_tree
from llmprune_service.schemas import AutoRequest
from llmprune_service.store import link_or_copy, remove_tree

FOUND, PAGE = "auto.json", "auto.html"
_TRIED = f"{CHECKPOINT}.auto"
_NOT_MET = "budget_not_met"


class SearchRunner(Runner):
    """One execution of a search; its config is the base of what it tries."""

    _extra_files = (FOUND, PAGE)

    def _read_config(self) -> None:
        job = self.execution.job
        self.search = AutoConfig.model_validate(job.config)
        self.config = self.search.base
        policy.check_auto(AutoRequest(**job.config, priority=job.priority, metadata=job.metadata), self.settings)

    def _child(self, *, fetch: bool = False) -> ChildJob:
        child = super()._child(fetch=fetch)
        child.search = self.search
        return child

    def _prune_once(self) -> None:
        try:
            super()._prune_once()
        except ChildFailed as failure:
            tried = self._folder / _TRIED
            if failure.code == _NOT_MET and (tried / FOUND).is_file():
                self.execution.file(self._store(tried, digests_of(tried, self._extra_files)))
            raise

    def _extra_facts(self) -> dict[str, Any]:
        found = json.loads((self._folder / CHECKPOINT / FOUND).read_bytes())
        facts = {name: found[name] for name in ("text", "objective", "binding")}
        return {"search": facts | {"num_trials": len(found["trials"])}}

    def _restore(self) -> None:
        """Link what the newest earlier attempt of this generation has tried."""
        job = self.execution.job
        attempts = [int(folder.name.partition("-")[2]) for folder in self._job_folder.glob(f"{job.generation}-*")]
        earlier = [number for number in attempts if number < job.attempt]
        if earlier:
            _link_search(self._job_folder / f"{job.generation}-{max(earlier)}", self._folder)


def _link_search(source: Path, target: Path) -> None:
    """Link what is whole: reports, checkpoints, a journal. Its owner may be writing; what vanishes meanwhile is done again."""
    (target / _TRIED).mkdir(parents=True, exist_ok=True)
    for file in sorted((source / _TRIED).glob("[!.]*.json")):
        with suppress(FileNotFoundError):
            link_or_copy(file, target / _TRIED / file.name)
    for folder in (f"{_TRIED}/best", CHECKPOINT):
        if (source / folder / MANIFEST).is_file():
            try:
                link_tree(source / folder, target / folder)
            except FileNotFoundError:
                remove_tree(target / folder)
    link_journal(source / f"{CHECKPOINT}.work", target / f"{CHECKPOINT}.work")
