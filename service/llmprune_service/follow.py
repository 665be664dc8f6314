"""A job of the service on the terminal: its events are drawn as ``llmprune prune`` draws its own. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from llmprune.console import ProgressView, print_report, printable
from llmprune.errors import LlmpruneError, OutputError
from llmprune.events import Event, Progress, Stage, StageFinished, StageStarted, Warned
from llmprune.report import Report
from llmprune_service.client import Client
from llmprune_service.schemas import EventView, JobView

_STAGES: frozenset[str] = frozenset(get_args(Stage))


class JobEnded(LlmpruneError):
    """The job ended without a result."""


def follow(client: Client, job_id: str) -> JobView:
    """Draw a job on stderr from its first event to its end; returns it as it ended."""
    with ProgressView() as view:
        translator = Translator()
        for event in client.events(job_id):
            if note := _note(event):
                view.console.print(printable(note), style="dim", markup=False, soft_wrap=True)
            for drawn in translator.translate(event):
                view.handle(drawn)
    return client.get(job_id)


def require_success(job: JobView) -> None:
    """Raise JobEnded, with the remedy, for a job that failed or was cancelled."""
    if job.status == "cancelled":
        raise JobEnded(f"{job.id} was cancelled. Go on with it by `llmprune jobs resume {job.id}`.")
    if job.error is not None:
        message = job.error.message.rstrip(".")
        raise JobEnded(f"{job.id} failed ({job.error.code}): {message}. Try it again with `llmprune jobs retry {job.id}`.")


def fetch(client: Client, job_id: str, out: Path) -> None:
    """Download a job's files with a bar on stderr."""
    console = Console(stderr=True)
    columns = TextColumn("Downloading"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=None)
        client.download(job_id, out, progress=lambda done, total: bars.update(task, completed=done, total=total))


def check_out(out: Path) -> None:
    """Raise OutputError, before any work, for a directory that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"--out {out} is there and not empty. Give the name of a new directory.")


def show_report(report: Report, out: Path | None) -> None:
    """Print the report on stdout, with the directory its files were downloaded to."""
    print_report(report.model_copy(update={"out": None if out is None else str(out.resolve())}), Console())


class Translator:
    """Events of the service as the library's, where they carry the same facts."""

    def __init__(self) -> None:
        self._begun: set[str] = set()

    def translate(self, event: EventView) -> Iterator[Event]:
        """What a view of the library's events is to draw of one event."""
        data = event.data
        match event.type:
            case "job.running":
                self._begun.clear()  # another execution begins its stages anew
            case "job.progress" if data["stage"] in _STAGES:
                yield self._progress(data)
            case "job.block":
                yield Progress(stage="prune", done=data["block"] + 1, total=data["num_blocks"], detail=data["name"])
            case "job.metric" if data["name"] == "stage" and data["stage"] in _STAGES:
                yield StageFinished.model_validate(data)
            case "job.log":
                yield Warned(message=data["message"])
            case "job.retrying":
                self._begun.clear()
                when = f" in {data['seconds']:g} s" if data["seconds"] else ""
                yield Warned(message=f"{data['message']} Trying again{when}.")
            case "job.recovered":
                yield Warned(message="Its worker was lost: another one goes on with the finished blocks.")

    def _progress(self, data: dict[str, Any]) -> Event:
        """The first word of a stage says where it begins."""
        if data["stage"] not in self._begun:
            self._begun.add(data["stage"])
            return StageStarted(stage=data["stage"], total=data["total"], resumed_at=data["done"])
        return Progress.model_validate(data)


def _note(event: EventView) -> str | None:
    match event.type:
        case "job.queued":
            return "Queued"
        case "job.running":
            return f"Running on {event.data['worker']}"
        case "job.cancelling":
            return "Stopping"
        case _:
            return None
