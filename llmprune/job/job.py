"""The job: load, calibrate, measure, prune, measure again, write. A generator of events; closing it cancels.

Everything a front end needs comes out as events; everything a resumed run needs lies in the journal.

Several processes may do one job (:mod:`llmprune.processes`): all of them load the model and hold the same weights after every
stage, and the first alone reads texts, keeps the journal and writes. A job of pattern structured shares out the candidates of
its search, the others share calibration sequences, and the sites where there are (:mod:`llmprune.engines.sharding`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from llmprune.devices import memory_errors, own_device, pick_device
from llmprune.engines.sharding import Shares
from llmprune.errors import FactorizationError, LlmpruneError, NonFiniteError, OutputError
from llmprune.events import Event, Finished
from llmprune.io import checkpoint
from llmprune.io.journal import difference
from llmprune.io.models import known_revision, local_directory
from llmprune.io.text import check_source
from llmprune.job.calibrating import calibrate, open_journal
from llmprune.job.loading import load
from llmprune.job.measuring import benchmark, measure_dense, measure_pruned
from llmprune.job.pruning import allocate, prune, reconstruct, refine, structure, structuring_of
from llmprune.job.saving import save
from llmprune.job.state import JobState, config_fields
from llmprune.methods import method_of
from llmprune.processes import is_first, several, wait_for_all
from llmprune.report import Report
from llmprune.spec import Pattern


class Job(JobState):
    """One run. ``run()`` may be called once."""

    def run(self) -> Iterator[Event]:
        """Do the job; the last event is Finished, and the only one where a resumed job turns out to be done."""
        self._join()
        if report := self.agreed(self._already_done):
            yield Finished(report=report)
            return
        self._check()
        self.agreed(self._check_output)
        try:
            with checkpoint.disk_errors(self.out or Path.cwd()), memory_errors():
                yield from load(self)
                yield from calibrate(self)
                self.batch_size = self.agreed(partial(open_journal, self))
                if not self.first and self.shares is None:
                    yield from self._follow()
                    return
                yield from measure_dense(self)
                if Pattern.parse(self.config.pattern).structure:
                    yield from structure(self)
                else:
                    yield from allocate(self)
                    yield from prune(self)
                    yield from refine(self)
                    yield from reconstruct(self)
                yield from measure_pruned(self)
                yield from self._by_first(benchmark(self))
                yield from self._by_first(save(self))
                yield self._finished(self.report)
        except (NonFiniteError, FactorizationError):
            if self.journal:
                self.journal.remove()  # the same run would stop here again, and another one may not go on with it
            raise
        finally:
            for statistics in self.opened:
                statistics.close()
            if self.journal:
                self.journal.close()

    def _join(self) -> None:
        """One of several processes takes a device of its own; all but the first leave ``out`` to it."""
        config = self.config
        structure = Pattern.parse(config.pattern).structure
        self.shared = several()
        self.first = is_first() or not self.shared
        if self.shared:
            self.device = own_device(config.device)
        self.shares = Shares.of(self.device) if self.shared and structure is None else None
        if not self.first:
            self.out = None

    def _by_first(self, stage: Iterator[Event]) -> Iterator[Event]:
        """A stage that the first alone does of several processes that walk together; an error that ends it there ends all."""
        if self.shares is None:
            yield from stage
            return
        failure: LlmpruneError | None = None
        if self.first:
            try:
                with checkpoint.disk_errors(self.out or Path.cwd()), memory_errors():
                    yield from stage
            except LlmpruneError as error:
                failure = error

        def outcome() -> None:
            if failure is not None:
                raise failure

        self.agreed(outcome)

    def _already_done(self) -> Report | None:
        """The report of this very run, if it was killed after its checkpoint took its place: then what it left goes.

        Raises OutputError where the checkpoint is another run's.
        """
        if self.out is None or not self.resume:
            return None
        manifest = checkpoint.read_manifest(self.out)
        if manifest is None:
            return None
        before, report = manifest
        config = {key: value for key, value in before.items() if key.startswith("config.")}
        other = difference(config, config_fields(self.config))
        if not other and (revision := known_revision(self.config)):
            other = difference({"revision": before["revision"]}, {"revision": revision})
        if other:
            raise OutputError(f"{self.out} holds the checkpoint of a run with {other}; choose another --out or delete it.")
        journal = self.journal_of(self.out)
        if journal.directory.exists():
            journal.open(before, resume=True)
        journal.remove()
        return report

    def _check(self) -> None:
        """Everything that can be refused before a byte is read."""
        config = self.config
        method_of(config)
        if not self.shared:
            self.device = pick_device(config.device)
        self.in_memory = self.model is not None
        self.calibration_source = config.calibration_source(in_memory=self.in_memory)
        self.eval_sources = config.eval_sources(in_memory=self.in_memory) if self.first or self.shares else ()
        self.agreed(self._check_sources)

    def _check_sources(self) -> None:
        check_source(self.calibration_source)
        for source in self.eval_sources:
            check_source(source, evaluation=True)

    def _check_output(self) -> None:
        """That the checkpoint, and the journal, may go where they are to go."""
        if self.out is not None:
            checkpoint.check_output(self.out, None if self.in_memory else local_directory(self.config.model))
            if not self.in_memory:
                self.journal_of(self.out).check(resume=self.resume)

    def _follow(self) -> Iterator[Event]:
        """What one of several processes does that is not the first: choose with it, and wait for its report."""
        structuring = structuring_of(self)
        if not structuring.finished:  # else the first has it from the journal
            yield from structuring.run()
        wait_for_all()
        yield self._finished(None)

    def _finished(self, report: Report | None) -> Finished:
        """The last event: of all processes the first one's report."""
        report = self.agreed(lambda: report)
        assert report is not None
        return Finished(report=report)
