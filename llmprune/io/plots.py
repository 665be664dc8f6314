"""Plots as inline SVG that asks for nothing: curves, a heat map, bars in pairs. Torch-free.

Colours are presentation attributes, which a page's own style sheet may override by class, and text is ``currentColor``, so
that one text serves light and dark pages and policies that forbid inline style. Every mark has a title.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from llmprune.io.scale import Scale

COLOURS = ("#2f6fb3", "#c2571a", "#2e8b57", "#a23b72")
"""Of the series in turn, each at least 3:1 against white and against the report's dark ground."""
WIDTH = 640
MAX_POINTS = 300
LETTER = 6.4
"""Width of a letter, for leaving text its room."""
MAX_LABEL = 28


@dataclass(frozen=True)
class Line:
    """A curve: its name, and (place, value) with the places rising."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Cell:
    """A field of a heat map: 0 to 1 for its shade, and what it says."""

    shade: float
    text: str


@dataclass(frozen=True)
class Bars:
    """What belongs together in a plot of bars: a name, and (value, text) for each series; None where there is none."""

    name: str
    values: Sequence[tuple[float, str] | None]


def thinned(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Finite points, at most about ``most``, evenly taken, the first and the last among them."""
    finite = [point for point in points if all(map(math.isfinite, point))]
    step = -(-len(finite) // most) if most else 1
    return finite if step < 2 else [*finite[:-1:step], finite[-1]]


def curve_svg(
    lines: Sequence[Line],
    *,
    label: str,
    x_label: str,
    y_label: str,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    height: int = 230,
) -> str | None:
    """Curves over one another; None where none has two finite points.

    ``x_text`` and ``y_text`` write a value; a logarithmic scale says so.
    """
    shown = [Line(line.name, thinned(line.points)) for line in lines]
    shown = [line for line in shown if len(line.points) > 1]
    if not shown:
        return None
    x, y = (Scale.of([point[axis] for line in shown for point in line.points]) for axis in (0, 1))
    first, last = min(line.points[0][0] for line in shown), max(line.points[-1][0] for line in shown)
    x = Scale(first, last if last > first else first + 1)
    left, top, right, bottom = 70.0, 26.0 if len(shown) > 1 else 10.0, WIDTH - 14.0, height - 44.0

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return round(left + x(point[0]) * (right - left), 1), round(bottom - y(point[1]) * (bottom - top), 1)

    parts = [_open(label, height)]
    for value in y.ticks(5):
        down = at((first, value))[1]
        parts += [_rule(f"M{left} {down}H{right}"), _text(y_text(value), left - 7, down + 4, "end")]
    whole = all(float(place).is_integer() for line in shown for place, _ in line.points)
    for value in (tick for tick in x.ticks(6) if not whole or float(tick).is_integer()):
        across = at((value, y.low))[0]
        parts += [_rule(f"M{across} {bottom}v5"), _text(x_text(value), across, bottom + 18, "middle")]
    parts.append(_text(x_label, (left + right) / 2, height - 6, "middle"))
    middle = (top + bottom) / 2
    turned = f'transform="rotate(-90 13 {middle})"'
    parts.append(_text(f"{y_label}{' (log)' if y.log else ''}", 13, middle, "middle", turned))
    for number, line in enumerate(shown):
        parts += _curve(line, number, at, x_text, y_text, named=len(shown) > 1)
    if len(shown) > 1:
        parts += _legend([line.name for line in shown])
    return "".join([*parts, "</svg>"])


def _curve(
    line: Line,
    number: int,
    at: Callable[[tuple[float, float]], tuple[float, float]],
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    *,
    named: bool,
) -> list[str]:
    colour = COLOURS[number % len(COLOURS)]
    places = [at(point) for point in line.points]
    path = "L".join(f"{across} {down}" for across, down in places)
    parts = [f'<path class="line series-{number}" d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    radius = 3 if len(places) <= 60 else 1.5
    parts.append(f'<g class="marks" fill="{colour}">')
    for (across, down), point in zip(places, line.points, strict=True):
        words = f"{x_text(point[0])}: {y_text(point[1])}"
        title = f"{line.name}, {words}" if named else words
        parts.append(f'<circle class="mark" cx="{across}" cy="{down}" r="{radius}"><title>{escape(title)}</title></circle>')
    return [*parts, "</g>"]


def heat_svg(rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Cell | None]], *, label: str) -> str:
    """A field for each row and column, darker where the shade is higher; what is None stays empty."""
    left = min(max((LETTER * len(_cut(row)) for row in rows), default=0.0), 190.0) + 10
    wide = min(44.0, (WIDTH - left - 4) / max(len(columns), 1))
    tall, top = 20.0, 4.0
    bottom = top + tall * len(rows)
    parts = [_open(label, bottom + 40)]
    parts += [_text(_cut(row), left - 7, top + tall * (index + 0.7), "end") for index, row in enumerate(rows)]
    parts.append(f'<g class="marks" fill="{COLOURS[0]}" stroke="none">')
    for down, (row, line) in enumerate(zip(rows, cells, strict=True)):
        for across, (column, cell) in enumerate(zip(columns, line, strict=True)):
            if cell is None:
                continue
            place = f'x="{left + wide * across:.1f}" y="{top + tall * down:.0f}" width="{wide - 1:.1f}" height="{tall - 1:.0f}"'
            title = escape(f"{column}, {row}: {cell.text}")
            opacity = f"{0.08 + 0.84 * min(max(cell.shade, 0.0), 1.0):.2f}"
            parts.append(f'<rect class="mark" {place} fill-opacity="{opacity}"><title>{title}</title></rect>')
    parts.append("</g>")
    step = max(1, -(-len(columns) // 12))
    for index in range(0, len(columns), step):
        parts.append(_text(columns[index].rpartition(" ")[2], left + wide * (index + 0.5), bottom + 14, "middle"))
    return "".join([*parts, _text("block", left + wide * len(columns) / 2, bottom + 32, "middle"), "</svg>"])


def bars_svg(groups: Sequence[Bars], series: Sequence[str], *, label: str) -> str:
    """Horizontal bars, those of a group beside each other and drawn to one scale, with their texts at the end."""
    left = min(max((LETTER * len(_cut(group.name)) for group in groups), default=0.0), 190.0) + 10
    room = WIDTH - left - 150
    tall, gap, top = 15.0, 10.0, 26.0
    height = top + len(groups) * (tall * len(series) + gap)
    parts = [_open(label, height), *_legend(series)]
    for index, group in enumerate(groups):
        begin = top + index * (tall * len(series) + gap)
        longest = max((found[0] for found in group.values if found), default=0.0)
        parts.append(_text(_cut(group.name), left - 7, begin + tall * len(series) / 2 + 4, "end"))
        for number, found in enumerate(group.values):
            if found is None:
                continue
            down, length = begin + tall * number, max(2.0, room * found[0] / longest if longest > 0 else 0.0)
            title = escape(f"{group.name}, {series[number]}: {found[1]}")
            parts.append(
                f'<rect class="mark series-{number}" x="{left}" y="{down}" width="{length:.1f}" height="{tall - 2}" rx="2" '
                f'fill="{COLOURS[number % len(COLOURS)]}"><title>{title}</title></rect>'
            )
            parts.append(_text(found[1], left + length + 6, down + 11, "start"))
    return "".join([*parts, "</svg>"])


def standalone(svg: str) -> str:
    """A plot as a file of its own."""
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) if " xmlns=" not in svg else svg


def _open(label: str, height: float) -> str:
    size = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    font = 'font-family="system-ui, sans-serif" font-size="12" fill="currentColor"'
    return f'<svg class="plot" role="img" aria-label="{escape(label)}" {size} {font}>'


def _text(words: str, x: float, y: float, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{" " + more if more else ""}>{escape(words)}</text>'


def _rule(path: str) -> str:
    return f'<path class="rule" d="{path}" stroke="currentColor" stroke-opacity="0.18" fill="none"/>'


def _legend(names: Sequence[str]) -> list[str]:
    parts, left = [], 70.0
    for number, name in enumerate(names):
        parts.append(f'<rect x="{left:.1f}" y="3" width="11" height="11" rx="2" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(_text(_cut(name), left + 16, 13, "start"))
        left += LETTER * len(_cut(name)) + 40
    return parts


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LABEL else f"\N{HORIZONTAL ELLIPSIS}{text[1 - MAX_LABEL :]}"
