"""The job: load, calibrate, measure, prune, measure again, write. A generator of events; closing it cancels.

Everything a front end needs comes out as events; everything a resumed run needs lies in the journal.

Several processes may do one job (:mod:`llmprune.processes`): all of them load the model and hold the same weights after every
stage, and the first alone reads texts, keeps the journal and writes. A job of pattern structured shares out the candidates of
its search, one that leaves zeros the calibration sequences and the sites (:mod:`llmprune.engines.sharding`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune import memory
from llmprune._version import __version__
from llmprune.allocation import Sharing, targets_of_sites
from llmprune.anatomy.blocks import Recording, Stack, find_stack, probe
from llmprune.anatomy.sites import Site, check_pattern, select, total_weights
from llmprune.conversion import pack_folder_, packing_warnings
from llmprune.description import describe_model
from llmprune.devices import device_name, environment, free_bytes, memory_errors, module_device, own_device, pick_device
from llmprune.engines.layerwise import Walk, block_messages, shared_sites
from llmprune.engines.permute import permutation_messages
from llmprune.engines.sharding import Shares
from llmprune.engines.survey import check_budget
from llmprune.errors import ConfigError, FactorizationError, LlmpruneError, NonFiniteError, OutputError, UnsupportedModel
from llmprune.events import BlockFinished, Event, Finished, Progress, Stage, Warned
from llmprune.hidden import HiddenStates, Place
from llmprune.io import checkpoint
from llmprune.io.journal import Journal, difference
from llmprune.io.models import Source, known_revision, load_model, load_tokenizer, local_directory, resolve
from llmprune.io.statistics import Statistics, statistics_of
from llmprune.io.streaming import StreamedBlocks, load_streamed, not_streamed
from llmprune.io.text import TokenSet, check_source, load_calibration, load_evaluation
from llmprune.measure.benchmark import benchmark_models
from llmprune.measure.dispatch import dispatched
from llmprune.measure.latency import DENSE_NOTE
from llmprune.methods import method_of
from llmprune.packing import can_pack, pack_, packable, swap_, unpack_
from llmprune.processes import first_says, is_first, several, wait_for_all
from llmprune.refining import Refining, check_refinement, copy_weights, put_back, tuned_report
from llmprune.report import (
    AllocationReport,
    Benchmark,
    BlockReport,
    Latency,
    Packed,
    Quality,
    RefinementReport,
    Report,
    Speed,
    StageReport,
    StatisticsReport,
    StructureReport,
)
from llmprune.scoring import Scores, Scoring
from llmprune.spec import Need, Pattern, PruneConfig, default_seq_len
from llmprune.stages import StageClock
from llmprune.structuring.choice import Setting
from llmprune.structuring.stage import Structuring, check_structure
from llmprune.walking import JournaledWalk, own_place, record_batches

_A = TypeVar("_A")
_E = TypeVar("_E", bound=Event)

_DENSE = "dense"
_HIDDEN = "hidden.safetensors"
_ALLOCATION = "allocation"
_TUNED = "tuned"


@dataclass
class Job:
    """One run. ``run()`` may be called once.

    Attributes:
        config: what is asked for.
        model, tokenizer: given for a model in memory (pruned in place); None to load ``config.model``.
        out: where the checkpoint goes; None writes nothing.
        resume: go on with the journal beside ``out``.
    """

    config: PruneConfig
    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    out: Path | None = None
    resume: bool = False
    source: Source | None = None
    streamed: StreamedBlocks | None = None
    journal: Journal | None = None
    own: Journal | None = None
    warnings: list[str] = field(default_factory=list)
    stages: list[StageReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    statistics: list[StatisticsReport] = field(default_factory=list)
    opened: list[Statistics] = field(default_factory=list)
    resumed: bool = False
    allocation: AllocationReport | None = None
    refinement: RefinementReport | None = None
    structure: StructureReport | None = None
    packed: Packed | None = None
    benchmark: Benchmark | None = None
    report: Report | None = None

    def run(self) -> Iterator[Event]:
        """Do the job; the last event is Finished, and the only one where a resumed job turns out to be done."""
        self._join()
        if report := self._agreed(self._already_done):
            yield Finished(report=report)
            return
        self._check()
        self._agreed(self._check_output)
        try:
            with checkpoint.disk_errors(self.out or Path.cwd()), memory_errors():
                yield from self._load()
                yield from self._calibrate()
                self.batch_size = self._agreed(self._open_journal)
                if not self.first and self.shares is None:
                    yield from self._follow()
                    return
                yield from self._measure_dense()
                if Pattern.parse(self.config.pattern).structure:
                    yield from self._structure()
                else:
                    yield from self._allocate()
                    yield from self._prune()
                    yield from self._by_first(self._refine())
                    self._same_weights()
                    yield from self._reconstruct()
                yield from self._measure_pruned()
                yield from self._by_first(self._benchmark())
                yield from self._by_first(self._save())
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
        self.shared = several() and structure in (None, "structured")
        self.first = is_first() or not self.shared
        if self.shared:
            self.device = own_device(config.device)
        self.shares = Shares.of(self.device) if self.shared and structure is None else None
        if self.shares and config.reconstruct:
            raise ConfigError("reconstruct is the work of one process. Start one, or several with --no-reconstruct.")
        if not self.first:
            self.out = None

    def _agreed(self, work: Callable[[], _A]) -> _A:
        """What ``work()`` returns in this process, or in the first of several."""
        return first_says(work) if self.shared else work()

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

        self._agreed(outcome)

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
        other = difference(config, _config_fields(self.config))
        if not other and (revision := known_revision(self.config)):
            other = difference({"revision": before["revision"]}, {"revision": revision})
        if other:
            raise OutputError(f"{self.out} holds the checkpoint of a run with {other}; choose another --out or delete it.")
        journal = self._journal_of(self.out)
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
        self._agreed(self._check_sources)

    def _check_sources(self) -> None:
        check_source(self.calibration_source)
        for source in self.eval_sources:
            check_source(source, evaluation=True)

    def _check_output(self) -> None:
        """That the checkpoint, and the journal, may go where they are to go."""
        if self.out is not None:
            checkpoint.check_output(self.out, None if self.in_memory else local_directory(self.config.model))
            if not self.in_memory:
                self._journal_of(self.out).check(resume=self.resume)

    # Stages ---------------------------------------------------------------------------------------------------------

    def _load(self) -> Iterator[Event]:
        clock = self._clock("load")
        yield clock.started(3)
        if self.model is None:
            self.source = resolve(self.config)
            yield Progress(stage="load", done=1, total=3, detail=str(self.source.name))
            if self.out is not None:
                checkpoint.check_output(self.out, self.source.path)
                checkpoint.check_disk(self.out, (3 if self.config.export == "packed" else 2) * self.source.dense_bytes)
            self.tokenizer = self.tokenizer or load_tokenizer(self.source.path, self.config)
            place = self._place()
            if place == "disk":
                self.model, self.streamed = load_streamed(self.source, self.config)
            else:
                self.model = load_model(self.source, self.config, self.device if place == "device" else torch.device("cpu"))
        elif module_device(self.model).type != "cpu":
            self.device = module_device(self.model)
        if self.tokenizer is None:
            raise ConfigError("a model in memory needs its tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...).")
        yield Progress(stage="load", done=2, total=3)
        self.model.eval()
        if self.device.type == "cpu" and self.model.dtype in (torch.float16, torch.bfloat16):
            yield self._warn(
                f"most CPUs emulate {str(self.model.dtype).removeprefix('torch.')}; --dtype float32 can be many times faster."
            )
        text_config = self.model.config.get_text_config()
        self.seq_len = self.config.seq_len or default_seq_len(text_config)
        self.stack = self._probe()
        self._check_sites(self.stack)
        if not self.streamed:  # which is checked as it comes
            _check_finite(self.stack)
        self.model_report = describe_model(self.model, self.stack, self.source)
        yield clock.finished()

    def _calibrate(self) -> Iterator[Event]:
        clock = self._clock("calibration")
        yield clock.started(1 + len(self.eval_sources))
        assert self.model is not None and self.tokenizer is not None
        self.calibration = self._agreed(self._load_calibration)
        yield Progress(stage="calibration", done=1, total=1 + len(self.eval_sources), detail=self.calibration_source)
        self.texts: list[TokenSet] = []
        for source in self.eval_sources:
            load = partial(self._load_evaluation, source)
            self.texts.append(first_says(load) if self.shares else load())
            done = 1 + len(self.texts)
            yield Progress(stage="calibration", done=done, total=1 + len(self.eval_sources), detail=source)
        if self.calibration_source in self.eval_sources and Path(self.calibration_source).exists():
            yield self._warn(f"{self.calibration_source} serves for calibration and evaluation: the perplexity is optimistic.")
        if few := self._too_few_tokens():
            yield self._warn(few)
        self.batch_size = self.config.batch_size or self._choose_batch_size()
        yield clock.finished()

    def _load_calibration(self) -> TokenSet:
        assert self.model is not None and self.tokenizer is not None
        with dispatched(self.model, self.device) if self.calibration_source == "synthetic" else nullcontext():
            return load_calibration(
                self.calibration_source, self.tokenizer, num_samples=self.config.num_samples, seq_len=self.seq_len,
                seed=self.config.seed, model=self.model,
            )  # fmt: skip

    def _load_evaluation(self, source: str) -> TokenSet:
        assert self.tokenizer is not None
        return load_evaluation(source, self.tokenizer, seq_len=self.seq_len, max_tokens=self.config.max_eval_tokens)

    def _open_journal(self) -> int:
        """Only jobs that can be started again from a name keep a journal. Returns the batch size of the run."""
        if self.out is None or self.source is None:
            return self.batch_size
        self.fingerprint = {
            "revision": self.source.revision,
            "tokens": self.calibration.report.sha256,
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "streamed": self.streamed is not None,
            "llmprune": __version__,
            "torch": torch.__version__,
            **_config_fields(self.config),
        }
        self.journal = self._journal_of(self.out)
        if Pattern.parse(self.config.pattern).structure is None:  # another number of them has other hidden states
            self.fingerprint["num_processes"] = self.shares.size if self.shares else 1
        self.resumed = self.resume and self.journal.exists
        if self.resumed:  # the batch that fits may have changed since; the run's own one is kept
            self.fingerprint["batch_size"] = self.batch_size = self.journal.recorded()["batch_size"]
        self.journal.open(self.fingerprint, resume=self.resume)
        return self.batch_size

    def _measure_dense(self) -> Iterator[Event]:
        clock = self._clock("dense")
        scoring = self._scoring()
        if self.shares:
            directory = first_says(lambda: self.journal.directory if self.journal else None)
            self.own = own_place(directory, self.shares)
        if data := self._recorded_dense():
            yield clock.started(scoring.num_windows, resumed_at=scoring.num_windows)
            self.dense = Scores(
                tuple(Quality.model_validate(item) for item in data["quality"]),
                tuple(Speed.model_validate(item) for item in data["speed"]),
            )
            yield clock.finished(data["seconds"])
            return
        yield clock.started(scoring.num_windows)
        self.dense = yield from self._noted(scoring.run("dense"))
        if self.own:
            self.own.write(_DENSE, {}, {_HIDDEN: dict(self.dense.hidden)})
        if self.shares:
            wait_for_all()  # the record says that all have theirs
        if self.journal:
            self.journal.write(
                _DENSE,
                {
                    "quality": [item.model_dump(mode="json") for item in self.dense.quality],
                    "speed": [item.model_dump(mode="json") for item in self.dense.speed],
                    "seconds": clock.seconds,
                },
                {_HIDDEN: dict(self.dense.hidden)},
            )
        if self.journal or self.own:
            self.dense = replace(self.dense, hidden={})  # read again, from the disk, when they are wanted
        yield clock.finished()

    def _recorded_dense(self) -> dict[str, Any] | None:
        """What an earlier run recorded of the dense model; of several processes where each finds its hidden states."""
        place = self.journal or self.own

        def found() -> dict[str, Any] | None:
            return place.read(_DENSE, [_HIDDEN]) if place and place.has(_DENSE) else None

        recorded = self.shares.together(found) if self.shares else [found()]
        return recorded[0] if all(recorded) else None

    def _allocate(self) -> Iterator[Event]:
        """Share the zeros among the sites, after a survey of the dense model where the allocation needs one."""
        config = self.config
        if config.allocation == "uniform":
            return
        clock = self._clock("allocate")
        recorded = self.journal is not None and self.journal.has(_ALLOCATION)
        if data := self._agreed(lambda: self.journal.read(_ALLOCATION, []) if self.journal and recorded else None):
            self.allocation = AllocationReport.model_validate(data["allocation"])
            self.statistics += [StatisticsReport.model_validate(item) for item in data["statistics"]]
            yield clock.started(data["total"], resumed_at=data["total"])
            yield clock.finished(data["seconds"])
            return
        assert self.model is not None
        directory = self.journal.directory if self.journal else None
        sharing = Sharing(
            self.model,
            self.stack,
            config,
            self.calibration.ids_NS,
            self.batch_size,
            self.device,
            directory,
            self._statistics,
            shares=self.shares,
        )
        yield clock.started(sharing.num_steps)
        self.allocation = yield from self._noted(sharing.run())
        self.statistics += sharing.reused
        if self.journal:
            data = {"allocation": self.allocation.model_dump(mode="json"), "total": sharing.num_steps}
            data["statistics"] = [item.model_dump(mode="json") for item in sharing.reused]
            self.journal.write(_ALLOCATION, {**data, "seconds": clock.seconds}, {})
        yield clock.finished()

    def _prune(self) -> Iterator[Event]:
        clock = self._clock("prune")
        yield clock.started(len(self.stack.blocks), resumed_at=self.journal.num_blocks() if self.journal else 0)
        assert self.model is not None
        config = self.config
        if config.refine != "none":  # the mask comes first: kept weights are tuned when it is final
            config = config.model_copy(update={"reconstruct": False})
            self.dense_weights = copy_weights(self._sites())
        start = self.journal.num_blocks() if self.journal else 0
        statistics = self._dense_statistics(start)
        known = statistics is not None and statistics.complete(start)  # then no block has to run
        recording = Recording() if known else self._recording()
        targets = targets_of_sites(self.config, self.allocation)
        walk = Walk(self.stack, recording, config, self.device, targets, shares=self.shares)
        walk.statistics = statistics
        self.walk_kind = walk.kind
        journaled = JournaledWalk(self.model, walk, self.journal, own=self.own)
        self.blocks = journaled.restore()
        before = sum(block.seconds for block in self.blocks)
        self.warnings += [message for block in self.blocks for message in block_messages(block)]
        for event in self._noted(journaled.run(len(self.blocks))):
            if isinstance(event, BlockFinished):
                self.blocks.append(event.report)
            yield event
        if statistics is not None:
            statistics.close()
            for message in statistics.messages:
                yield self._warn(message)
            times = [block.collected for block in self.blocks if block.collected]
            self.statistics.append(
                StatisticsReport(
                    stage="prune", num_blocks=len(self.blocks), num_reused=len(times), collected=min(times, default=None)
                )
            )
        if self.config.permute:
            for message in permutation_messages(self.blocks):
                yield self._warn(message)
        yield clock.finished(before + clock.seconds)

    def _statistics(self, need: Need) -> Statistics | None:
        """The cache of what is measured on the dense model; None where there is none, as of a model without a revision."""
        if not self.config.statistics_cache or self.source is None or several():
            return None
        statistics = statistics_of(
            self.config, self.source, self.model, need, device=self.device, tokens=self.calibration.report.sha256,
            seq_len=self.seq_len, batch_size=self.batch_size, streamed=self.streamed is not None,
        )  # fmt: skip
        self.opened += [statistics] if statistics else []
        return statistics

    def _dense_statistics(self, start: int) -> Statistics | None:
        """The cache, open from block ``start`` on, for a walk all of whose statistics are the dense model's: not where channels
        change places before they are collected, or where pruning a block changes a later one.
        """
        config = self.config
        if config.sequential != "none" or config.permute or shared_sites(self.stack):
            return None
        statistics = self._statistics(method_of(config).needs)
        if statistics is not None:
            statistics.open(len(self.stack.blocks), start)
        return statistics

    def _structure(self) -> Iterator[Event]:
        """Take out what goes whole."""
        clock = self._clock("structure")
        assert self.model is not None
        structuring = self._structuring()
        yield clock.started(structuring.total, resumed_at=structuring.done)
        self.structure, seconds = yield from self._noted(structuring.run())
        if self.shared:
            wait_for_all()  # the others may have files in the work directory
        self.stack = self._probe()
        yield clock.finished(seconds)

    def _structuring(self) -> Structuring:
        assert self.model is not None
        directory = self._agreed(lambda: self.journal.directory if self.journal else None)
        setting = Setting(
            self.model, self.stack, self.config, self.calibration.ids_NS, self.batch_size, self.device, self.journal,
            directory if directory and directory.is_dir() else None, self.shared,
        )  # fmt: skip
        return Structuring(setting)

    def _follow(self) -> Iterator[Event]:
        """What one of several processes does that is not the first: choose with it, and wait for its report."""
        structuring = self._structuring()
        if not structuring.finished:  # else the first has it from the journal
            yield from structuring.run()
        wait_for_all()
        yield self._finished(None)

    def _finished(self, report: Report | None) -> Finished:
        """The last event: of all processes the first one's report."""
        report = self._agreed(lambda: report)
        assert report is not None
        return Finished(report=report)

    def _refine(self) -> Iterator[Event]:
        """Improve the mask against the loss of the whole model."""
        if self.config.refine == "none":
            return
        clock = self._clock("refine")
        assert self.model is not None
        refining = Refining(
            self.model, self.stack, self.config, self.dense_weights, self.calibration.ids_NS, self.device, self.journal
        )
        yield clock.started(refining.total, resumed_at=refining.done)
        before = refining.seconds_before
        self.refinement = yield from self._noted(refining.run())
        if not self.config.reconstruct:
            self.dense_weights = {}
        yield clock.finished(before + clock.seconds)

    def _same_weights(self) -> None:
        """Give all processes the mask that the first refined."""
        if self.shares and self.config.refine != "none":
            for block in self.stack.blocks:
                self.shares.same_(block)

    def _reconstruct(self) -> Iterator[Event]:
        """Tune the kept weights of a refined mask: the dense weights are put back, and the blocks walked once more."""
        if self.config.refine == "none" or not self.config.reconstruct:
            return
        clock, total = self._clock("reconstruct"), len(self.stack.blocks)
        yield clock.started(total, resumed_at=self.journal.num_blocks(_TUNED) if self.journal else 0)
        assert self.model is not None
        supports = put_back(self._sites(), self.dense_weights)
        walk = Walk(self.stack, self._recording(), self.config, self.device, supports=supports)
        journaled = JournaledWalk(self.model, walk, self.journal, _TUNED)
        recorded = journaled.restore()
        before = sum(block.seconds for block in recorded)
        self.warnings += [message for block in recorded for message in block_messages(block)]
        for event in self._noted(journaled.run(len(recorded))):
            if isinstance(event, BlockFinished):
                recorded.append(event.report)
                yield Progress(stage="reconstruct", done=event.block + 1, total=total, detail=event.report.name)
            elif isinstance(event, Progress):
                yield event.model_copy(update={"stage": "reconstruct"})
            elif isinstance(event, Warned):
                yield event
        self.dense_weights = {}
        self.blocks = [tuned_report(*pair) for pair in zip(self.blocks, recorded, strict=True)]
        yield clock.finished(before + clock.seconds)

    def _measure_pruned(self) -> Iterator[Event]:
        clock = self._clock("pruned")
        scoring = self._scoring()
        yield clock.started(scoring.num_windows)
        place = self.journal or self.own
        dense = replace(self.dense, hidden=place.tensors(_DENSE, _HIDDEN)) if place else self.dense
        self.pruned = yield from self._noted(scoring.run("pruned", dense))
        yield clock.finished()

    def _benchmark(self) -> Iterator[Event]:
        """Speed of the dense and the packed model, for a packed checkpoint; afterwards the model is dense again."""
        model = self.model
        assert model is not None
        if self.config.export != "packed" or not self.config.latency or self.streamed or not can_pack(model):
            return

        del self.stack  # its sites would keep every dense weight alive
        layers = {path: site.module for path, site in packable(model)[0].items()} if self.in_memory else {}

        def pack() -> PreTrainedModel:
            pack_(model)
            return model

        clock = self._clock("benchmark")
        yield clock.started(0)
        try:
            self.benchmark = yield from benchmark_models(model, pack, device=self.device)
        finally:
            for path, layer in layers.items():
                swap_(model, path, layer)  # the very layers the caller knows
            unpack_(model)
        yield clock.finished()

    def _save(self) -> Iterator[Event]:
        clock = self._clock("save")
        if self.out is None:
            self.report = self._report(None)
            return
        yield clock.started(2)
        assert self.model is not None
        folder = self.out.with_name(f".{self.out.name}.tmp")
        try:
            source = self.source.path if self.source else None
            rest, shards = (self.streamed.rest, self._shards()) if self.streamed else (None, [])
            checkpoint.save_weights(
                self.model, folder, tokenizer=self.tokenizer, source=source, code=self.config.trust_remote_code,
                rest=rest, shards=shards,
            )  # fmt: skip
            yield Progress(stage="save", done=1, total=2)
            if self.config.export == "packed":
                yield from self._pack(folder)
            finished = clock.finished()
            self.report = self._report(checkpoint.weights_bytes(folder))
            fingerprint = self.fingerprint if self.journal else {}
            checkpoint.finish(folder, self.out, self.report, fingerprint, checkpoint.license_of(source))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        yield finished
        if self.journal:
            self.journal.remove()

    def _pack(self, folder: Path) -> Iterator[Event]:
        """Pack what was just written; where nothing gets smaller by it the checkpoint stays dense, with a warning."""
        assert self.model is not None
        packed = yield from pack_folder_(folder, self.model, "save")
        for message in packing_warnings(packed):
            yield self._warn(message)
        if packed.num_sites:
            self.packed = packed
        else:
            yield self._warn("nothing was packed: this checkpoint is an ordinary dense one.")

    # Parts ----------------------------------------------------------------------------------------------------------

    def _scoring(self) -> Scoring:
        assert self.model is not None
        prompt_1S = self.calibration.ids_NS[:1] if self.config.latency and self.first else None
        folder = self.journal.directory if self.journal else None
        return Scoring(self.model, self.stack, self.texts, self.device, prompt_1S, self.config.offload, folder, self.shares)

    def _report(self, checkpoint_bytes: int | None) -> Report:
        assert self.model is not None
        latency = None
        if self.pruned.speed:
            note = "" if self.structure else DENSE_NOTE
            latency = Latency(device=device_name(self.device), dense=self.dense.speed, pruned=self.pruned.speed, note=note)
        return Report(
            config=self.config,
            model=self.model_report,
            environment=environment(self.device),
            calibration=self.calibration.report,
            scope=self.config.target(method_of(self.config).scope).scope,
            walk="none" if self.structure else self.walk_kind,
            allocation=self.allocation,
            refinement=self.refinement,
            structure=self.structure,
            blocks=tuple(self.blocks),
            quality=self.pruned.quality,
            latency=latency,
            stages=tuple(self.stages),
            statistics=tuple(self.statistics),
            num_zeros_model=self._num_zeros(),
            warnings=tuple(self.warnings),
            resumed=self.resumed,
            out=str(self.out) if self.out else None,
            checkpoint_bytes=checkpoint_bytes,
            packed=self.packed,
            benchmark=self.benchmark,
        )

    def _place(self) -> Place:
        """Where the weights wait; a run that is resumed goes on with those that it had."""
        assert self.source is not None
        reason = (
            "where several processes share a job. Use --offload cpu" if self.shared else not_streamed(self.config, self.out)
        )
        if self.config.offload == "disk" and reason:
            raise ConfigError(f"weights cannot stay on disk {reason}.")
        recorded = self._journal_of(self.out) if self.out and self.resume else None
        if recorded and recorded.exists and "streamed" in (before := recorded.recorded()) and before["streamed"]:
            return "disk"
        device_free = free_bytes(self.device) if self.device.type != "cpu" else None
        place = memory.weights_place(
            self.config.offload, self.source.bytes_in(self.config.dtype), device_free=device_free,
            cpu_free=free_bytes(torch.device("cpu")),
        )  # fmt: skip
        return "cpu" if place == "disk" and reason else place

    def _shards(self) -> list[Path]:
        """The files of the pruned blocks of a model that is streamed."""
        assert self.journal is not None
        return [self.journal.weights_file(index) for index in range(len(self.stack.blocks))]

    def _num_zeros(self) -> int:
        """Of the whole model."""
        assert self.model is not None
        blocks = 0
        if self.streamed and self.journal:
            blocks = sum(self.journal.num_zeros(index) for index in range(len(self.stack.blocks)))
        return blocks + sum(int((parameter == 0).sum()) for parameter in self.model.parameters() if not parameter.is_meta)

    @staticmethod
    def _journal_of(out: Path) -> Journal:
        return Journal(out.with_name(out.name + ".work"))

    def _probe(self) -> Stack:
        """Find the stack of blocks, and what can be known of it by a forward."""
        assert self.model is not None
        with dispatched(self.model, self.device):
            ids_1S = torch.arange(16, device=module_device(self.model))[None] % self.model.config.get_text_config().vocab_size
            return probe(self.model, replace(find_stack(self.model), weights=self.streamed), ids_1S)

    def _check_sites(self, stack: Stack) -> None:
        pattern = Pattern.parse(self.config.pattern)
        if pattern.structure:
            assert self.model is not None
            check_structure(self.config, self.model, stack)
            return
        chosen = self._sites()
        if not chosen:
            raise UnsupportedModel(
                f"nothing to prune: {sum(map(len, stack.sites))} sites in {stack.path}, all taken out by --skip."
            )
        check_pattern(chosen, pattern)
        check_budget(self.config, chosen)
        check_refinement(self.config, self.model, chosen)

    def _choose_batch_size(self) -> int:
        assert self.model is not None
        hidden_size = self.model.config.get_text_config().hidden_size
        return memory.choose_batch_size(
            [site for sites in self.stack.sites for site in sites],
            num_samples=-(-self.config.num_samples // (self.shares.size if self.shares else 1)),
            seq_len=self.seq_len,
            hidden_size=hidden_size,
            itemsize=self.model.dtype.itemsize,
            need=Need.GRAM if self.config.sequential == "none" else method_of(self.config).needs,  # any method: equal batches
            one_pass=self.config.sequential == "group" and self.shares is None,
            free_bytes=free_bytes(self.device),
            on_cpu=self.device.type == "cpu",
            tuned_sites=max(self.stack.sites, key=total_weights) if self.config.reconstruct else (),
            hidden_here=self._hidden_place() in ("device", self.device.type),
        )

    def _hidden_place(self) -> Place:
        """Where hidden states wait between blocks; on a CPU its memory is the device."""
        assert self.model is not None
        sets = 2 if self.config.reconstruct else 1
        hidden_size = self.model.config.get_text_config().hidden_size
        size = sets * self.calibration.ids_NS.numel() * hidden_size * self.model.dtype.itemsize
        on_cpu = self.device.type == "cpu"
        return memory.hidden_place(
            self.config.offload, size, device_free=None if on_cpu else free_bytes(self.device),
            cpu_free=free_bytes(torch.device("cpu")),
        )  # fmt: skip

    def _too_few_tokens(self) -> str | None:
        """A warning where the calibration tokens cannot give every Gram matrix its rank."""
        widest = max((site for sites in self.stack.sites for site in sites), key=lambda site: site.shape[1])
        tokens = self.calibration.ids_NS.numel()
        if method_of(self.config).needs < Need.GRAM or tokens >= widest.shape[1]:
            return None
        return (
            f"{tokens} calibration tokens are fewer than the {widest.shape[1]} inputs of {widest.name}: its Gram matrix lacks "
            f"rank, and damping ({self.config.damping:g} of its mean diagonal) decides the rest. Use more --num-samples, or a "
            "longer --seq-len."
        )

    def _sites(self) -> list[Site]:
        """All that are pruned."""
        return [site for sites in self.stack.sites for site in select(sites, self.config.skip)]

    def _recording(self) -> Recording:
        assert self.model is not None
        hidden = HiddenStates((), self._hidden_place(), self.journal.directory if self.journal else None)
        ids_NS = self.shares.rows(self.calibration.ids_NS) if self.shares else self.calibration.ids_NS
        return record_batches(self.model, self.stack, ids_NS.split(self.batch_size), self.device, hidden)

    def _noted(self, events: Iterable[_E]) -> Generator[_E, None, Any]:
        """The same events; warnings among them are kept for the report. What a generator returns is handed on."""
        iterator = iter(events)
        while True:
            try:
                event = next(iterator)
            except StopIteration as stop:
                return stop.value
            if isinstance(event, Warned):
                self.warnings.append(event.message)
            yield event

    def _warn(self, message: str) -> Warned:
        self.warnings.append(message)
        return Warned(message=message)

    def _clock(self, stage: Stage) -> StageClock:
        return StageClock(stage, self.stages)


def _config_fields(config: PruneConfig) -> dict[str, Any]:
    return {f"config.{name}": value for name, value in config.model_dump(mode="json").items()}


def _check_finite(stack: Stack) -> None:
    for index, block in enumerate(stack.blocks):
        for name, parameter in block.named_parameters():
            if parameter.is_floating_point() and not torch.isfinite(parameter).all():
                raise NonFiniteError(
                    f"{stack.name(index)}: its weight {name} holds NaN or inf. The checkpoint is damaged: download it again."
                )
