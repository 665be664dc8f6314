"""``llmprune report``: the report of a finished checkpoint, in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from llmprune.console import print_report
from llmprune.io.exports import FORMATS, check_format, export_report, read_report

_FORMAT = f"{', '.join(FORMATS)}. Default: what --out ends in, else tables for the terminal."


def report(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of a checkpoint that llmprune wrote, or its report.json.")],
    format: Annotated[str | None, typer.Option("--format", "-f", help=_FORMAT)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write to this file instead of stdout.")] = None,
) -> None:
    """Show the report of a finished CHECKPOINT, or make Markdown, HTML, JSON or CSV of it."""
    if format is not None:
        check_format(format)
    if out is not None and format is not None and out.suffix != f".{format}":
        out = out.with_name(f"{out.name}.{format}")
    result = read_report(checkpoint)
    if out is not None:
        for path in export_report(result, out):
            typer.echo(path)
    elif format is None:
        print_report(result, Console())
    else:
        typer.echo(FORMATS[format](result), nl=False)
