"""Several pruned models side by side: points, which of them no other beats, as a plot, a table and CSV. Torch-free.

A point is on the front of two axes if no other is at least as good on both and better on one. The plot is one inline SVG that
asks for nothing: colours are presentation attributes, which the classes of a page's own style sheet override, and text is
``currentColor``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from urllib.parse import urlsplit

from llmprune.io.exports import to_csv
from llmprune.io.render import NOTHING, code, count, markdown, number, percent, recipe, size, small, times
from llmprune.io.scale import Scale
from llmprune.report import Quality, Report
from llmprune.speed import Speed
from llmprune.speed import point_of as same_sizes

COLOURS = ("#2f6fb3", "#c2571a", "#2e8b57", "#a23b72", "#8a6d00", "#5b5bd6", "#b3262e", "#0f7d8c")
"""Of the series in turn, each at least 3:1 against white and against the report's dark ground."""
SHAPES = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z", "M-4.5 -4.5H4.5V4.5H-4.5Z", "M0 -6L5.5 4.5H-5.5Z", "M0 -6L6 0L0 6L-6 0Z",
    "M0 6L5.5 -4.5H-5.5Z", "M-2 -6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
)  # fmt: skip
LETTER = 6.6
"""Width of a letter of the plot's text, for leaving it room."""
MAX_LABEL = 36


@dataclass(frozen=True)
class Axis:
    """What may be plotted.

    ``unit`` says how a value is written: ``fraction`` as per cent, bytes, ms, x, nats, count; ``short`` is the label for a
    terminal. Values that agree to ``decimals`` are the same to the front: a method that counts rows hits a sparsity of 60 % by
    60.1 %, which is no gain.
    """

    label: str
    unit: str
    smaller_is_better: bool
    short: str = ""
    decimals: int | None = None

    def text(self, value: float | None) -> str:
        """A value with its unit."""
        if value is None:
            return NOTHING
        if not math.isfinite(value):
            return number(value)
        match self.unit:
            case "fraction":
                return percent(value)
            case "bytes":
                return size(round(value))
            case "count":
                return count(round(value))
            case "x":
                return times(value)
            case "nats":
                return small(value)
            case "ms":
                return f"{number(value)} ms"
        return number(value)

    def tick(self, value: float) -> str:
        """A round value, shorter than :meth:`text`."""
        match self.unit:
            case "fraction":
                return f"{100 * value:.6g} %"
            case "bytes":
                return size(round(value))
            case "x":
                return f"{value:.4g}x"
            case "count":
                return _thousands(value)
        return f"{value:.4g}"


AXES: dict[str, Axis] = {
    "perplexity": Axis("perplexity", "", True),
    "perplexity_increase": Axis("perplexity increase", "fraction", True, "increase"),
    "kl": Axis("KL from dense", "nats", True, "KL"),
    "sparsity": Axis("sparsity", "fraction", False, decimals=2),
    "parameters": Axis("nonzero parameters", "count", True),
    "bytes": Axis("size of the weights", "bytes", True, "size"),
    "decode_speedup": Axis("decode speed-up", "x", False, "decode"),
    "prefill_speedup": Axis("prefill speed-up", "x", False),
    "decode_ms": Axis("decode, ms a token", "ms", True),
}


@dataclass(frozen=True)
class Point:
    """One model: ``values`` by key of :data:`AXES`, ``group`` the series it belongs to, ``href`` where its name leads."""

    label: str
    group: str
    values: dict[str, float] = field(default_factory=dict)
    href: str = ""


def point_of(report: Report, label: str, href: str = "") -> Point:
    """What a report says of every axis; what it did not measure is left out.

    Quality is that on the first text. Zeros in dense tensors bring no speed, so where only their noise was measured the
    speed-ups are 1; ``decode_ms`` is of the smallest batch.
    """
    values: dict[str, float | None] = {
        "sparsity": report.sparsity,
        "parameters": _parameters(report),
        "bytes": report.checkpoint_bytes,
        **_quality(report.quality),
        **_speed(report),
    }
    group = recipe(report.config) + ("" if report.config.pattern == "unstructured" else f" {report.config.pattern}")
    return Point(label, group, {key: float(values[key] or 0) for key in AXES if values.get(key) is not None}, href)


def _parameters(report: Report) -> int:
    return report.structure.num_parameters if report.structure else report.model.num_parameters - report.num_zeros_model


def _quality(quality: Sequence[Quality]) -> dict[str, float | None]:
    if not quality:
        return {}
    first = quality[0]
    increase = None if first.ratio is None else first.ratio - 1
    return {"perplexity": first.perplexity_pruned, "perplexity_increase": increase, "kl": first.kl}


def _speed(report: Report) -> dict[str, float | None]:
    """Of the packed model where it was benchmarked, else of the pruned one."""
    if report.benchmark and report.benchmark.dense:
        subject: Sequence[Speed] = report.benchmark.subject.speeds
        dense: Sequence[Speed] = report.benchmark.dense.speeds
    elif report.latency:
        subject, dense = report.latency.pruned, report.latency.dense
    else:
        return {}
    as_measured = report.benchmark is not None or report.structure is not None
    dense_by_sizes = {same_sizes(speed): speed for speed in dense}
    values: dict[str, float | None] = {}
    for speed in sorted(subject, key=lambda speed: (speed.batch_size, -speed.num_tokens), reverse=True):
        other = dense_by_sizes.get(same_sizes(speed))
        if other is not None:
            values[f"{speed.phase}_speedup"] = speed.tokens_per_second / other.tokens_per_second if as_measured else 1.0
        if speed.phase == "decode":
            values["decode_ms"] = 1e3 * speed.batch_size / speed.tokens_per_second
    return values


def front(points: Sequence[Point], x: str, y: str) -> list[bool]:
    """Which points are on the front of two axes; one without a finite value on both is not. Equal points all are."""
    places = [_place(point, x, y) for point in points]
    there = [place for place in places if place is not None]
    return [place is not None and not any(_beats(other, place) for other in there) for place in places]


def _place(point: Point, x: str, y: str) -> tuple[float, float] | None:
    """The point's values with signs that make the smaller the better."""
    axes, values = [AXES[key] for key in (x, y)], [point.values.get(key, math.nan) for key in (x, y)]
    if not all(map(math.isfinite, values)):
        return None
    across, down = (
        (1 if axis.smaller_is_better else -1) * (value if axis.decimals is None else round(value, axis.decimals))
        for axis, value in zip(axes, values, strict=True)
    )
    return across, down


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def columns(points: Sequence[Point]) -> list[str]:
    """The axes that some point has a value of."""
    return [key for key in AXES if any(key in point.values for point in points)]


def points_table(points: Sequence[Point], marked: Sequence[bool] = ()) -> str:
    """A Markdown table of all values; ``marked`` points are told by a star in a column ``front``."""
    keys = columns(points)
    head = ["", *(["front"] if marked else []), *(AXES[key].label for key in keys)]
    rows = [head, ["---", *([":---:"] if marked else []), *("---:" for _ in keys)]]
    for index, point in enumerate(points):
        star = ["\N{BLACK STAR}" if marked[index] else ""] if marked else []
        rows.append([_linked(point), *star, *(AXES[key].text(point.values.get(key)) for key in keys)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def points_csv(points: Sequence[Point], marked: Sequence[bool] = ()) -> str:
    """All values in full, fractions as fractions, with a header; ``marked`` is a column ``front`` of 1 and 0.

    No cell is a formula to a spreadsheet.
    """
    keys = columns(points)
    return to_csv(
        {
            "label": point.label,
            "group": point.group,
            **({"front": int(marked[index])} if marked else {}),
            **{key: point.values.get(key) for key in keys},
        }
        for index, point in enumerate(points)
    )


def _linked(point: Point) -> str:
    href = safe_href(point.href)
    return f"[{markdown(point.label)}](<{href}>)" if href and not set(href) & set("<>\n") else code(point.label)


def safe_href(href: str) -> str:
    """A link that runs nothing: a web address or a relative one, else none."""
    try:
        return href if urlsplit(href).scheme in ("", "http", "https") else ""
    except ValueError:
        return ""


# The plot ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """Where the square of the plot lies in its SVG, and its two scales."""

    left: float
    top: float
    right: float
    bottom: float
    x: Scale
    y: Scale

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A place in the SVG, in pixels; y grows upwards."""
        across = self.left + self.x(x) * (self.right - self.left)
        return round(across, 1), round(self.bottom - self.y(y) * (self.bottom - self.top), 1)


def pareto_svg(points: Sequence[Point], x: str, y: str, *, width: int = 720, height: int = 420) -> str:
    """The points, coloured and shaped by group, and the staircase of their front, as one inline SVG element.

    Every point has a title and, where it has an ``href``, is a link. Classes: ``pareto``, ``rule``, ``tick``, ``axis``,
    ``front``, ``point``, ``on-front``, ``series-0`` to ``series-7``, ``legend``. A point without a finite value on both axes
    is left out, and a line below says how many are.
    """
    shown = [point for point in points if _place(point, x, y) is not None]
    groups = list(dict.fromkeys(point.group for point in shown))
    legend, top = _legend(groups, width)
    scales = [Scale.of([point.values[key] for point in shown]) for key in (x, y)]
    frame = _Frame(78, top, width - 20, height - 50, *scales)
    missing = len(points) - len(shown)
    label = f"{AXES[y].label} against {AXES[x].label} of {len(shown)} models; the table has the numbers"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="pareto" role="group" aria-label="{escape(label)}" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="system-ui, sans-serif" '
        'font-size="12" fill="currentColor">',
        *_grid(frame, AXES[x], AXES[y]),
        *_front(shown, x, y, frame),
        *(_mark(point, on, groups.index(point.group), x, y, frame) for point, on in _front_last(shown, x, y)),
        *_names(shown, x, y, frame),
        *legend,
    ]
    if missing:
        words = f"{missing} without a finite value on both axes: not shown"
        parts.append(f'<text class="tick" x="{width - 20}" y="{height - 6}" text-anchor="end">{words}</text>')
    return "\n".join([*parts, "</svg>"])


def _front_last(points: Sequence[Point], x: str, y: str) -> list[tuple[Point, bool]]:
    """Those on the front are drawn over the others."""
    return sorted(zip(points, front(points, x, y), strict=True), key=lambda pair: pair[1])


def _grid(frame: _Frame, x: Axis, y: Axis) -> list[str]:
    parts = []
    for value in frame.x.ticks():
        across = frame.at(value, frame.y.low)[0]
        parts += [
            f'<path class="rule" d="M{across} {frame.top}V{frame.bottom}" stroke="currentColor" stroke-opacity="0.15"/>',
            f'<text class="tick" x="{across}" y="{frame.bottom + 17}" text-anchor="middle">{escape(x.tick(value))}</text>',
        ]
    for value in frame.y.ticks():
        down = frame.at(frame.x.low, value)[1]
        parts += [
            f'<path class="rule" d="M{frame.left} {down}H{frame.right}" stroke="currentColor" stroke-opacity="0.15"/>',
            f'<text class="tick" x="{frame.left - 7}" y="{down + 4}" text-anchor="end">{escape(y.tick(value))}</text>',
        ]
    middle = (frame.top + frame.bottom) / 2
    return [
        *parts,
        f'<text class="axis" x="{(frame.left + frame.right) / 2}" y="{frame.bottom + 36}" text-anchor="middle">'
        f"{escape(_heading(x, frame.x))}</text>",
        f'<text class="axis" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{escape(_heading(y, frame.y))}</text>",
    ]


def _heading(axis: Axis, scale: Scale) -> str:
    arrow = "smaller is better" if axis.smaller_is_better else "larger is better"
    return f"{axis.label} ({arrow}{', log' if scale.log else ''})"


def _front(points: Sequence[Point], x: str, y: str, frame: _Frame) -> list[str]:
    """The staircase between what some point reaches and what none does."""
    on = {frame.at(point.values[x], point.values[y]) for point, on in zip(points, front(points, x, y), strict=True) if on}
    places = sorted(on)
    if len(places) < 2:
        return []
    path = [f"M{places[0][0]} {places[0][1]}"]
    path += [f"H{right}V{down}" if AXES[x].smaller_is_better else f"V{down}H{right}" for right, down in places[1:]]
    return [
        f'<path class="front" d="{"".join(path)}" fill="none" stroke="currentColor" stroke-opacity="0.5" '
        'stroke-dasharray="5 4"/>'
    ]


def _mark(point: Point, on_front: bool, series: int, x: str, y: str, frame: _Frame) -> str:
    across, down = frame.at(point.values[x], point.values[y])
    words = ", ".join(f"{AXES[key].label} {AXES[key].text(point.values[key])}" for key in dict.fromkeys((x, y)))
    title = escape(f"{point.label}: {words}{', on the front' if on_front else ''}")
    look = 'fill-opacity="1" stroke="currentColor"' if on_front else 'fill-opacity="0.55"'
    mark = (
        f'<path class="point{" on-front" if on_front else ""} series-{series % len(COLOURS)}" '
        f'd="{SHAPES[series % len(SHAPES)]}" transform="translate({across} {down})" '
        f'fill="{COLOURS[series % len(COLOURS)]}" {look}><title>{title}</title></path>'
    )
    if href := safe_href(point.href):
        return f'<a href="{escape(href)}" aria-label="{title}">{mark}</a>'
    return f'<g role="img" aria-label="{title}">{mark}</g>'


def _names(points: Sequence[Point], x: str, y: str, frame: _Frame) -> list[str]:
    """The names of the points on the front, as far as they do not run into one another."""
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for point, on in zip(points, front(points, x, y), strict=True):
        if not on:
            continue
        across, down = frame.at(point.values[x], point.values[y])
        name = _cut(point.label)
        length = LETTER * len(name)
        left = min(max(across - length / 2, frame.left), max(frame.right - length, frame.left))
        if all(abs(down - other) > 14 or left > end or left + length < start for start, end, other in taken):
            taken.append((left, left + length, down))
            parts.append(f'<text class="name" x="{left:.1f}" y="{max(down - 10, 11):.1f}" font-size="11">{escape(name)}</text>')
    return parts


def _legend(groups: Sequence[str], width: int) -> tuple[list[str], float]:
    """The series in rows above the plot, and where the plot may begin."""
    parts, left, row = ['<g class="legend">'], 78.0, 14.0
    for series, group in enumerate(groups):
        name = _cut(group)
        room = LETTER * len(name) + 34
        if left > 78 and left + room > width:
            left, row = 78.0, row + 18
        parts.append(
            f'<path class="series-{series % len(COLOURS)}" d="{SHAPES[series % len(SHAPES)]}" '
            f'transform="translate({left + 6} {row - 4})" fill="{COLOURS[series % len(COLOURS)]}"/>'
            f'<text x="{left + 16}" y="{row}">{escape(name)}</text>'
        )
        left += room
    return [*parts, "</g>"], row + 26


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}\N{HORIZONTAL ELLIPSIS}"


def _thousands(value: float) -> str:
    """A large count in three digits: ``1.5 M``."""
    for scale, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}"
