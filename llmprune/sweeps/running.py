"""``llmprune sweep``: every point of a grid as an ordinary job in a directory of its own.

    DIR/<point>/        the checkpoint and report of one job
    DIR/sweep.json      all points; sweep.csv, sweep.md, sweep.svg and sweep.html say the same
    DIR/.sweep/         what all points share, a lock, and what was measured of the dense model until the last point is done

Called again on the same directory a sweep goes on: finished points are skipped, an interrupted one resumes by its journal,
those that failed are tried again, and points that were not there before are added.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from llmprune.errors import (
    ConfigError,
    CorruptCheckpoint,
    DiskFull,
    GatedModel,
    HubUnreachable,
    ModelNotFound,
    OutputError,
    TextError,
    UnsafeModel,
)
from llmprune.events import Event, Finished, PointFinished, PointStarted, Swept
from llmprune.io.checkpoint import check_output, disk_errors
from llmprune.io.exports import REPORT
from llmprune.io.journal import Journal, write_durably
from llmprune.io.models import local_directory
from llmprune.io.pareto import front
from llmprune.job import Job
from llmprune.methods import method_of
from llmprune.processes import several
from llmprune.report import Report
from llmprune.spec import PruneConfig
from llmprune.sweep_report import PointReport, SweepReport
from llmprune.sweep_spec import AXES, FIELD_OF, MAX_POINTS, Keep, SweepConfig
from llmprune.sweeps.comparing import has_weights
from llmprune.sweeps.page import render_csv, render_md, render_page, render_svg
from llmprune.sweeps.points import compared, done_point, failed_point, plotted

STATE = ".sweep"
TABLE = "sweep.json"
DENSE = "dense"
_ONLY_REPORT = {REPORT, "report.html", "README.md"}
_BEST = ("sparsity", "perplexity")
"""Axes of the front whose checkpoints are kept where only the best are."""
ENDS_ALL = (
    ModelNotFound, HubUnreachable, GatedModel, UnsafeModel, CorruptCheckpoint, TextError, DiskFull,
)  # fmt: skip
"""Errors of the model, the text or the disk: every other point would end in the same."""


def sweep(
    model: str | Path | None = None,
    config: SweepConfig | None = None,
    *,
    out: str | Path,
    keep: Keep = "all",
    max_points: int = MAX_POINTS,
    **fields: Any,
) -> SweepReport:
    """Prune a model at every point of a grid and return them all, the failed ones too.

    Args:
        model: hub ID or directory; None is the bundled one.
        config: the sweep; ``fields`` are its axes (``methods``, ``patterns``, ``sparsities``, ``allocations``, ``efforts``) and
            fields of PruneConfig by name, and take precedence.
        out: directory of the sweep, new or of an earlier call.
        keep: ``all`` checkpoints, those on the front (``best``), or ``none``: reports stay in any case.
        max_points: more are refused.

    Raises:
        LlmpruneError: ConfigError for a sweep of nothing or of too much, ResumeRefused where ``out`` holds a sweep with another
            base, and what would end every point alike, such as a model that is not there.
    """
    for event in sweep_iter(model, config, out=out, keep=keep, max_points=max_points, **fields):
        if isinstance(event, Swept):
            return event.sweep
    raise AssertionError("a sweep ends with Swept")


def sweep_iter(
    model: str | Path | None = None,
    config: SweepConfig | None = None,
    *,
    out: str | Path,
    keep: Keep = "all",
    max_points: int = MAX_POINTS,
    **fields: Any,
) -> Iterator[Event]:
    """:func:`sweep` as a generator of events: those of each job between PointStarted and PointFinished, then Swept."""
    if several():
        raise ConfigError("a sweep is the work of one process. Start it without accelerate launch or torchrun.")
    if keep not in get_args(Keep):
        raise ConfigError(f"keep {keep!r} is unknown; it is {', '.join(get_args(Keep))}.")
    config = built(model, config, fields)
    if keep == "best" and not config.base.eval_sources():
        raise ConfigError("keep 'best' needs a perplexity, and there is no text to evaluate on. Drop --no-eval, or keep all.")
    jobs = config.jobs(max_points=max_points)
    run = _Sweep(config, Path(out), keep)
    with run.opened():
        yield from run.points_of(jobs)
    yield Swept(sweep=run.report())


def built(model: str | Path | None, config: SweepConfig | None, fields: Mapping[str, Any]) -> SweepConfig:
    """The sweep of the arguments."""
    given = {name: value for name, value in fields.items() if value is not None}
    axes = {name: given.pop(name) for name in AXES if name in given}
    if named := sorted(set(given) & set(FIELD_OF.values())):
        axis = next(axis for axis, field in FIELD_OF.items() if field == named[0])
        raise ConfigError(f"{named[0]} is an axis of a sweep: give its values as {axis}.")
    if model is not None:
        given["model"] = str(model)
    base = PruneConfig.build(config.base if config else None, **given)
    known = {name: getattr(config, name) for name in AXES} if config else {}
    return SweepConfig.build(base, **known | axes)


class _Sweep:
    """The points of one directory."""

    def __init__(self, config: SweepConfig, out: Path, keep: Keep) -> None:
        self.config, self.out, self.keep = config, out, keep
        self.journal = Journal(out / STATE)
        self.points: dict[str, PointReport] = {}
        self.order: list[str] = []

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The directory, for this process alone, with the points that are in it.

        Raises OutputError where it holds something else or another process works in it, ResumeRefused where the base differs.
        """
        if not self.journal.exists:
            check_output(self.out, local_directory(self.config.base.model))
        base = self.config.base.model_dump(mode="json", exclude=set(FIELD_OF.values()))
        try:
            with disk_errors(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
                self.journal.open({f"config.{name}": value for name, value in base.items()}, resume=True)
                self.points = {point.name: point for point in self._recorded()}
                yield
        finally:
            self.journal.close()

    def _recorded(self) -> tuple[PointReport, ...]:
        try:
            return SweepReport.model_validate_json((self.out / TABLE).read_bytes()).points
        except FileNotFoundError:
            return ()
        except ValidationError:
            raise OutputError(
                f"{self.out / TABLE} is damaged. Delete it: finished points are found by their reports."
            ) from None

    def points_of(self, jobs: Mapping[str, PruneConfig]) -> Iterator[Event]:
        """Do those jobs that are not done."""
        total = len(jobs)
        self.order = list(dict.fromkeys([*self.points, *jobs]))
        # Who needs most goes first: its statistics serve the others.
        for index, (name, config) in enumerate(sorted(jobs.items(), key=lambda item: -method_of(item[1]).needs)):
            yield PointStarted(name=name, index=index, total=total)
            point = self._finished(name, config)
            reused = point is not None
            if point is None:
                point = yield from self._point(name, config)
            self.points[name] = point
            self._tidy()
            self._write()
            yield PointFinished(point=self.points[name], index=index, total=total, reused=reused)
        if all(self.points[name].status == "done" for name in jobs):
            shutil.rmtree(self.journal.directory / DENSE, ignore_errors=True)

    def report(self) -> SweepReport:
        """All points of the directory."""
        points = [self.points[name] for name in self.order if name in self.points]
        return SweepReport(config=self.config, out=str(self.out), **compared(points))

    def _finished(self, name: str, config: PruneConfig) -> PointReport | None:
        """The point as an earlier call left it."""
        folder = self.out / name
        try:
            report = Report.model_validate_json((folder / REPORT).read_bytes())
        except (OSError, ValidationError):
            return None
        if report.config != config:
            return None
        seconds = self.points[name].seconds if name in self.points else None
        return done_point(report, name, directory=str(folder), kept=has_weights(folder), seconds=seconds)

    def _point(self, name: str, config: PruneConfig) -> Generator[Event, None, PointReport]:
        """Run one job; an error of its own becomes the point's."""
        start, folder = time.perf_counter(), self.out / name
        job = Job(config, out=folder, resume=True, dense_records=self.journal.directory / DENSE)
        try:
            for event in job.run():
                if isinstance(event, Finished):
                    seconds = time.perf_counter() - start
                    return done_point(event.report, name, directory=str(folder), kept=True, seconds=seconds)
                yield event
        except ENDS_ALL:
            raise
        except Exception as error:  # the other points are not to blame
            return failed_point(config, name, error, time.perf_counter() - start)
        raise AssertionError("a job ends with Finished")

    def _tidy(self) -> None:
        """Delete weights that are not to be kept; a point that is beaten stays so whatever is added."""
        if self.keep == "all":
            return
        points = plotted(list(self.points.values()))
        best = {point.label for point, on in zip(points, front(points, *_BEST), strict=True) if on and self.keep == "best"}
        for name, point in self.points.items():
            if point.kept and name not in best:
                keep_report(self.out / name)
                self.points[name] = point.model_copy(update={"kept": False})

    def _write(self) -> None:
        report = self.report()
        title = f"Sweep of {self.config.base.model}"
        contents = {
            "sweep.csv": render_csv(report),
            "sweep.md": render_md(report),
            "sweep.svg": render_svg(report),
            "sweep.html": render_page(report, title, lead=f"{len(report.points)} points.", base=self.out),
            TABLE: report.model_dump_json(indent=1),
        }
        for file, content in contents.items():
            write_durably(self.out / file, content.encode())


def keep_report(folder: Path) -> None:
    """Delete all of a checkpoint but its report."""
    for file in folder.iterdir():
        if file.name not in _ONLY_REPORT:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
