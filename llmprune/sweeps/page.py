"""Several models as a page, a plot, Markdown, CSV and JSON, the same numbers in all of them. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from llmprune.io.exports import Cell, to_csv
from llmprune.io.pareto import AXES, columns, pareto_svg, safe_href
from llmprune.io.render import NOTHING, TEMPLATES, code, markdown
from llmprune.sweep_report import Comparison, PointReport
from llmprune.sweeps.points import plotted, sizes_differ

STAR = "\N{BLACK STAR}"
FORMATS = ("table", "md", "csv", "json", "html")


def config_columns(comparison: Comparison) -> list[str]:
    """The fields to show of the jobs: those they differ in, but for the sparsity, which is measured."""
    return [name for name in comparison.differing if name != "sparsity"]


def table(comparison: Comparison, base: Path | None = None) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of text: name, front, fields, all axes that were measured, and why a job failed."""
    fields, keys = config_columns(comparison), columns(plotted(comparison.points))
    failed = any(point.error for point in comparison.points)
    head = ["", "front", *fields, *(AXES[key].label for key in keys), *(["error"] if failed else [])]
    rows = [
        [
            point.name,
            STAR if point.on_front else "",
            *(field_text(point, name, base) for name in fields),
            *(AXES[key].text(point.values.get(key)) for key in keys),
            *([point.error or ""] if failed else []),
        ]
        for point in comparison.points
    ]
    return head, rows


def field_text(point: PointReport, name: str, base: Path | None = None) -> str:
    """A field of a job as it was asked for; of a path that a page leads to, from the page's place."""
    value = getattr(point.config, name)
    if isinstance(value, tuple):
        value = ", ".join(map(str, value))
    if isinstance(value, str) and base and name == "model" and Path(value).is_absolute():
        return Path(value).name
    return NOTHING if value is None or value == "" else str(value)


def render_md(comparison: Comparison) -> str:
    """A Markdown table, and what to mind."""
    head, rows = table(comparison)
    lines = [head, ["---", ":---:", *("---:" for _ in head[2:])]]
    lines += [[code(row[0]), *map(markdown, row[1:])] for row in rows]
    notes = "".join(f"\n{markdown(note)}\n" for note in comparison.notes)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + notes


def render_csv(comparison: Comparison) -> str:
    """All values in full, fractions as fractions; fields of the jobs that differ as ``config.NAME``."""
    fields, keys = comparison.differing, columns(plotted(comparison.points))
    return to_csv(
        {
            "name": point.name,
            "status": point.status,
            "front": int(point.on_front),
            **{f"config.{name}": _cell(getattr(point.config, name)) for name in fields},
            **{key: point.values.get(key) for key in keys},
            "seconds": point.seconds,
            "directory": point.directory,
            "error": point.error,
        }
        for point in comparison.points
    )


def _cell(value: Any) -> Cell:
    """A field of a job as CSV holds it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def render_svg(comparison: Comparison) -> str:
    """The plot of the comparison's own axes."""
    return pareto_svg(_linked(comparison.points, None), comparison.x, comparison.y)


def render_page(
    comparison: Comparison,
    title: str,
    *,
    lead: str = "",
    command: str = "",
    base: Path | None = None,
) -> str:
    """One self-contained page: plots, table, notes.

    Args:
        base: the directory of the page: links to reports are relative to it.
    """
    points = _linked(comparison.points, base)
    head, rows = table(comparison, base)
    plots = [pareto_svg(points, comparison.x, comparison.y)]
    if comparison.x != "bytes" and sizes_differ(comparison.points):
        plots.append(pareto_svg(points, "bytes", comparison.y))
    links = [safe_href(point.href) for point in points]
    page: str = _template().render(
        title=title, lead=lead, command=command, plots=[Markup(plot) for plot in plots], head=head,
        rows=list(zip(rows, links, comparison.points, strict=True)), notes=comparison.notes,
    )  # fmt: skip
    return page


def render(comparison: Comparison, format: str, title: str = "Comparison", base: Path | None = None) -> str:
    """In one of :data:`FORMATS` but ``table``."""
    if format == "md":
        return render_md(comparison)
    if format == "csv":
        return render_csv(comparison)
    if format == "json":
        return comparison.model_dump_json(indent=1) + "\n"
    return render_page(comparison, title, base=base)


def _linked(points: Sequence[PointReport], base: Path | None) -> list[Any]:
    """The points with links as seen from ``base``: none where there is no page to come from."""
    if base is None:
        return plotted([point.model_copy(update={"directory": None}) for point in points])
    here = base.resolve()
    relative = [
        point.model_copy(update={"directory": os.path.relpath(Path(point.directory).resolve(), here)})
        if point.directory
        else point
        for point in points
    ]
    return plotted(relative)


@cache
def _template() -> Any:
    env = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    env.trim_blocks = env.lstrip_blocks = env.keep_trailing_newline = True
    return env.get_template("points.html.j2")
