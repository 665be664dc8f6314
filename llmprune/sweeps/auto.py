"""``llmprune auto``: the best model within a budget, as an ordinary checkpoint, and all that was tried for it.

    DIR/                the checkpoint, with auto.json and auto.html beside the report
    DIR.auto/           until it is there: a report for every job that was tried, and what was measured of the dense model

Called again, a search takes the jobs that are done from DIR.auto, whatever the budget was: the same jobs serve another one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmprune.errors import BudgetNotMet, ConfigError, OutputError
from llmprune.events import Event, Finished, PointFinished, PointStarted, Searched
from llmprune.io.checkpoint import check_output, disk_errors, read_manifest
from llmprune.io.journal import Journal, write_durably
from llmprune.io.models import load_config, local_directory, locate
from llmprune.job import Job
from llmprune.methods import method_of
from llmprune.processes import several
from llmprune.report import Report
from llmprune.spec import PruneConfig, default_seq_len
from llmprune.sweep_report import AutoReport, Trial, TrialKind
from llmprune.sweep_spec import FIELD_OF, AutoConfig, point_name
from llmprune.sweeps.budget import QUALITY, in_words, measured_of, missed, option, unseen_of
from llmprune.sweeps.page import render_page
from llmprune.sweeps.points import comparison, done_point, failed_point
from llmprune.sweeps.running import ENDS_ALL
from llmprune.sweeps.searching import MAX_CONFIRMATIONS, Search

FOUND = "auto.json"
PAGE = "auto.html"
_TRIAL = "trial"
_BEST = "best"
_CONFIRMING = "confirming.json"


def auto(model: str | Path | None = None, config: AutoConfig | None = None, *, out: str | Path, **fields: Any) -> AutoReport:
    """Find the best model within a budget, and write it as an ordinary checkpoint.

    Args:
        model: hub ID or directory; None is the bundled one.
        config: the search; ``fields`` are its own (``max_perplexity_increase``, ``max_kl``, ``min_speedup``, ``max_size``,
            ``methods``, ``patterns``, ``allocations`` ...) and fields of PruneConfig by name, and take precedence.
        out: directory of the checkpoint, with ``auto.json`` beside the report.

    Raises:
        BudgetNotMet: nothing that was tried is within the budget; says how close the nearest came.
        LlmpruneError: ConfigError for no budget or a contradictory one, and what ends every job alike.
    """
    for event in auto_iter(model, config, out=out, **fields):
        if isinstance(event, Searched):
            require_found(event.search)
            return event.search
    raise AssertionError("a search ends with Searched")


def auto_iter(
    model: str | Path | None = None, config: AutoConfig | None = None, *, out: str | Path, **fields: Any
) -> Iterator[Event]:
    """:func:`auto` as a generator of events: those of each job between PointStarted and PointFinished, then Searched, whose
    ``best`` is None where nothing met the budget.
    """
    if several():
        raise ConfigError("a search is the work of one process. Start it without accelerate launch or torchrun.")
    config = built(model, config, fields)
    for family in config.families():  # refused before anything is read
        method_of(family)
    lab = _Lab(config, Path(out))
    if done := lab.already_done():
        yield Searched(search=done)
        return
    if not lab.was_confirming():
        check_output(lab.out, local_directory(config.base.model))
    begun = time.perf_counter()
    with disk_errors(lab.out):
        try:
            lab.open()
            search = Search(config, lab.run)
            best = yield from search.run()
            report = _report(config, search, best, lab.out, time.perf_counter() - begun)
            if best is not None:
                yield from lab.put_in_place(best)
            lab.write(report)
        finally:
            lab.journal.close()
    if best is not None:
        shutil.rmtree(lab.work, ignore_errors=True)
    yield Searched(search=report)


def built(model: str | Path | None, config: AutoConfig | None, fields: Mapping[str, Any]) -> AutoConfig:
    """The search of the arguments."""
    given = {name: value for name, value in fields.items() if value is not None}
    own = {name: given.pop(name) for name in AutoConfig.model_fields if name in given and name != "base"}
    if model is not None:
        given["model"] = str(model)
    known = config.model_dump(exclude_unset=True, exclude={"base"}) if config else {}
    return AutoConfig.build(PruneConfig.build(config.base if config else None, **given), **known | own)


def require_found(search: AutoReport) -> None:
    """Raise BudgetNotMet where a search found nothing."""
    if search.best is None:
        raise BudgetNotMet(search.text)


class _Lab:
    """Where the jobs of a search are done, and found done."""

    def __init__(self, config: AutoConfig, out: Path) -> None:
        self.config, self.out = config, out
        self.work = out.with_name(f"{out.name}.auto")
        self.journal = Journal(self.work)
        self.count = 0

    def already_done(self) -> AutoReport | None:
        """What this very search has found before; raises OutputError where the directory holds another one's."""
        try:
            known = AutoReport.model_validate_json((self.out / FOUND).read_bytes())
        except (OSError, ValidationError):
            return None
        if known.config != self.config:
            raise OutputError(f"{self.out} holds what another search found; choose another --out or delete it.")
        return known

    def was_confirming(self) -> bool:
        """Whether an earlier call ended just when a checkpoint had taken its place, before that was judged."""
        with suppress(OSError, ValidationError):
            return _config_of(self.out) == PruneConfig.model_validate_json((self.work / _CONFIRMING).read_bytes())
        return False

    def open(self) -> None:
        """Take the work directory; raises ResumeRefused where its jobs have another base."""
        base = self.config.base
        fields = base.model_dump(mode="json", exclude=set(FIELD_OF.values()))
        fingerprint = {f"config.{name}": value for name, value in fields.items()}
        self.journal.open({**fingerprint, "proxy_windows": self.config.proxy_windows}, resume=True)
        seq_len = base.seq_len or default_seq_len(load_config(locate(base), base).get_text_config())
        self.proxy_tokens = min(self.config.proxy_windows * seq_len, base.max_eval_tokens or 1 << 62)

    def run(self, kind: TrialKind, config: PruneConfig) -> Generator[Event, None, Trial]:
        """Do a job, or find it done. A confirmation that meets the budget leaves its checkpoint as the best one so far."""
        name = point_name(config, {})
        job = self._cheap(config) if kind == "proxy" else config
        yield PointStarted(name=name if kind == "proxy" else f"{name}, all windows", index=self.count)
        start = time.perf_counter()
        try:
            report = self._recorded(kind, job)
            reused = report is not None
            report = report or (yield from self._do(kind, job))
        except ENDS_ALL:
            raise
        except Exception as error:  # the others are not to blame
            point, reused = failed_point(job, name, error, time.perf_counter() - start), False
            trial = Trial(kind=kind, point=point, missed=tuple(self.config.budgets))
        else:
            trial = self._trial(kind, name, report)
            if kind == "confirmed":
                self._keep_or_drop(trial, job)
        yield PointFinished(point=trial.point, index=self.count, reused=reused)
        self.count += 1
        return trial

    def put_in_place(self, best: Trial) -> Generator[Event, None, None]:
        """Move the best checkpoint to where it is wanted; done once more where another took its place."""
        folder = self.work / _BEST
        if _config_of(folder) != best.point.config:
            shutil.rmtree(folder, ignore_errors=True)
            for event in Job(best.point.config, out=self.out, resume=True, dense_records=self.work).run():
                if not isinstance(event, Finished):
                    yield event
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(self.out)

    def write(self, report: AutoReport) -> None:
        """The search beside the checkpoint, or in the work directory where there is none."""
        folder = self.out if report.best else self.work
        page = render_page(
            report.tried, f"The best of {report.config.base.model} within a budget", lead=report.text, base=folder
        )
        write_durably(folder / PAGE, page.encode())
        write_durably(folder / FOUND, report.model_dump_json(indent=1).encode())

    def _cheap(self, config: PruneConfig) -> PruneConfig:
        latency = self.config.min_speedup is not None
        return config.model_copy(update={"max_eval_tokens": self.proxy_tokens, "latency": latency, "prompt": (), "tasks": ()})

    def _file(self, kind: TrialKind, config: PruneConfig) -> Path:
        return self.work / f"{kind}-{point_name(config, {})}.json"

    def _recorded(self, kind: TrialKind, config: PruneConfig) -> Report | None:
        """The report of the same job, if it was done and measured what is asked now."""
        with suppress(OSError, ValidationError):
            report = Report.model_validate_json(self._file(kind, config).read_bytes())
            if report.config == config and (self.config.max_size is None or report.checkpoint_bytes is not None):
                return report
        return None

    def _do(self, kind: TrialKind, config: PruneConfig) -> Generator[Event, None, Report]:
        """Run a job; a cheap one is written only where its size is asked for, and deleted."""
        out = self.out if kind == "confirmed" else self.work / _TRIAL if self.config.max_size is not None else None
        if kind == "confirmed":
            write_durably(self.work / _CONFIRMING, config.model_dump_json().encode())
        elif out is not None:
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(out.with_name(f"{out.name}.work"), ignore_errors=True)
        # What is to be faster is measured beside the dense model: a machine's speed drifts.
        apart = kind == "confirmed" and self.config.min_speedup is not None
        records = None if apart else self.work
        for event in Job(config, out=out, resume=kind == "confirmed", dense_records=records).run():
            if isinstance(event, Finished):
                write_durably(self._file(kind, config), event.report.model_dump_json().encode())
                if kind == "proxy" and out is not None:
                    shutil.rmtree(out)
                return event.report
            yield event
        raise AssertionError("a job ends with Finished")

    def _trial(self, kind: TrialKind, name: str, report: Report) -> Trial:
        point = done_point(report, name, directory=None, kept=False).model_copy(update={"text": None})
        measured, unseen = measured_of(report, self.config.speed_of), {}
        if kind == "confirmed":
            point = point.model_copy(update={"group": f"{point.group}, all windows"})
            if part := self._recorded("proxy", self._cheap(report.config)):
                unseen = unseen_of(report, part)
        trial = Trial(kind=kind, point=point, measured=measured, unseen=unseen)
        return trial.model_copy(update={"missed": missed(self.config.budgets, trial.worst)})

    def _keep_or_drop(self, trial: Trial, config: PruneConfig) -> None:
        """A confirmed checkpoint within the budget waits as the best so far; one that is not goes."""
        if _config_of(self.out) != config:
            return  # found done: its weights were dealt with
        if not trial.missed:
            shutil.rmtree(self.work / _BEST, ignore_errors=True)
            self.out.rename(self.work / _BEST)
        else:
            shutil.rmtree(self.out)


def _config_of(folder: Path) -> PruneConfig | None:
    """The job that left a whole checkpoint."""
    manifest = read_manifest(folder)
    return manifest[1].config if manifest else None


def _report(config: AutoConfig, search: Search, best: Trial | None, out: Path, seconds: float) -> AutoReport:
    binding = search.binding(best) if best else ()
    nearest = None if best else search.nearest()
    points = [_placed(trial, out).point if trial is best else trial.point for trial in search.trials]
    y = "perplexity_increase" if config.max_perplexity_increase is not None or config.max_kl is None else "kl"
    x = "bytes" if config.max_size is not None else "sparsity" if config.min_speedup is None else f"{config.speed_of}_speedup"
    return AutoReport(
        config=config,
        objective="kl" if config.bounds_cost else "sparsity",
        best=_placed(best, out) if best else None,
        nearest=nearest,
        binding=binding,
        trials=tuple(search.trials),
        tried=comparison(points, x, y),
        text=_in_words(config, search, best, nearest, binding),
        out=str(out),
        seconds=seconds,
    )


def _placed(trial: Trial, out: Path) -> Trial:
    return trial.model_copy(update={"point": trial.point.model_copy(update={"directory": str(out), "kept": True})})


def _in_words(config: AutoConfig, search: Search, best: Trial | None, nearest: Trial | None, binding: tuple[str, ...]) -> str:
    budgets = config.budgets
    if best is None:
        if nearest is None or not nearest.measured:
            why = f" {search.trials[0].point.error}." if search.trials and search.trials[0].point.error else ""
            return f"Nothing met the budget, and no job that was tried came to an end.{why}"
        broken = ", ".join(map(option, nearest.missed)) or "it was not confirmed"
        return (
            f"Nothing met the budget. The nearest of {len(search.trials)} jobs is {nearest.point.name}: "
            f"{in_words(budgets, nearest.worst)}; it misses {broken}. Loosen that, or try other --methods and --patterns."
        )
    what = "the lowest KL" if config.bounds_cost else "the sparsest"
    text = f"{best.point.name} is {what} within the budget: {in_words(budgets, best.worst)}."
    if binding:
        text += f" {', '.join(map(option, binding))} {'bind' if len(binding) > 1 else 'binds'}: the next step breaks it."
    else:
        text += " No budget binds: there is no next step, or it was not tried."
    if any(name in QUALITY for name in budgets) and not best.unseen:
        text += " The search has seen all windows of the evaluation text: use a longer one, or fewer --proxy-windows."
    if search.spent:
        text += f" The search ended after {config.max_trials} cheap jobs: --max-trials."
    if sum(trial.kind == "confirmed" for trial in search.trials) == MAX_CONFIRMATIONS:
        text += f" It ended after {MAX_CONFIRMATIONS} confirmations."
    return text
