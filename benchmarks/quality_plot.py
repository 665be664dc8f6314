"""The plot of `make bench-quality`: gap against pruning seconds, both logarithmic, as an SVG written by hand.

A row of panels for each model, a column for each of two targets; one colour for each family of variants. The line joins the
variants that no other one beats in both time and gap, and those are named; every point says its name when pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.quality_results import BASELINE, Results

TARGETS = ("60 %", "2:4")
PALETTE = ("#999999", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, distinguishable by colour-blind readers; families take them in the order of the table."""
WIDTH, HEIGHT, LEFT, TOP, GAP_X, GAP_Y = 390, 250, 64, 76, 70, 62
RADIUS, LINE_HEIGHT = 4.5, 12.0


@dataclass(frozen=True)
class Point:
    """One variant at one target of one model."""

    name: str
    family: str
    seconds: float
    gap: float


def svg(results: Results, targets: Sequence[str] = TARGETS) -> str:
    """The whole picture."""
    families = list(dict.fromkeys(variant.family for variant in results.grid.variants.values()))
    colours = {family: PALETTE[number % len(PALETTE)] for number, family in enumerate(families)}
    width = LEFT + len(targets) * WIDTH + (len(targets) - 1) * GAP_X + 24
    height = TOP + len(results.models) * (HEIGHT + GAP_Y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="11" fill="#333">',
        "<title>Gap to the dense model against the seconds that pruning took</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(LEFT, 20, "Gap ln(perplexity / dense) in nats per token, against seconds of pruning", size=14),
        _legend(colours),
    ]
    for row, model in enumerate(results.models):
        for column, target in enumerate(targets):
            x, y = LEFT + column * (WIDTH + GAP_X), TOP + row * (HEIGHT + GAP_Y)
            parts.append(f'<g transform="translate({x} {y})">{_panel(results, model, target, colours)}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def points(results: Results, model: str, target: str) -> list[Point]:
    """All variants with a finite gap above zero: a logarithm shows no other."""
    found = []
    for variant in results.grid.variants.values():
        result, gap = results.measured(model, variant.name, target), results.gap(model, variant.name, target)
        if result and gap and 0 < gap.mean < math.inf and result["seconds"] > 0:
            found.append(Point(variant.name, variant.family, result["seconds"], gap.mean))
    return found


def front(found: list[Point]) -> list[Point]:
    """Those that no other one beats in both, by rising time."""
    best: list[Point] = []
    for point in sorted(found, key=lambda one: (one.seconds, one.gap)):
        if not best or point.gap < best[-1].gap:
            best.append(point)
    return best


def _panel(results: Results, model: str, target: str, colours: dict[str, str]) -> str:
    title = _text(0, -8, f"{model}, {target}", size=12, weight="bold")
    frame = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#ccc"/>'
    found = points(results, model, target)
    if not found:
        return title + frame + _text(WIDTH / 2, HEIGHT / 2, "not measured", anchor="middle")
    low_x, high_x = _range([point.seconds for point in found])
    low_y, high_y = _range([point.gap for point in found])

    def at_x(seconds: float) -> float:
        return WIDTH * math.log(seconds / low_x) / math.log(high_x / low_x)

    def at_y(gap: float) -> float:
        return HEIGHT * (1 - math.log(gap / low_y) / math.log(high_y / low_y))

    parts = [title, frame]
    for tick in _ticks(low_x, high_x):
        x = at_x(tick)
        parts.append(f'<path d="M{x:.1f} 0V{HEIGHT}" stroke="#eee"/>{_text(x, HEIGHT + 15, f"{tick:g} s", anchor="middle")}')
    for tick in _ticks(low_y, high_y):
        y = at_y(tick)
        parts.append(f'<path d="M0 {y:.1f}H{WIDTH}" stroke="#eee"/>{_text(-6, y + 4, f"{tick:g}", anchor="end")}')
    best = front(found)
    line = " ".join(f"{at_x(point.seconds):.1f},{at_y(point.gap):.1f}" for point in best)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#888" stroke-dasharray="3 3"/>')
    parts += _labels([point for point in found if point in best or point.name == BASELINE], at_x, at_y)
    for point in found:
        says = escape(f"{point.name}: gap {point.gap:.4f}, {point.seconds:.1f} s")
        parts.append(
            f'<circle cx="{at_x(point.seconds):.1f}" cy="{at_y(point.gap):.1f}" r="{RADIUS}" fill="{colours[point.family]}" '
            f'stroke="#fff"><title>{says}</title></circle>'
        )
    return "".join(parts)


def _labels(named: list[Point], at_x: Callable[[float], float], at_y: Callable[[float], float]) -> list[str]:
    """Names beside their points, each at least a line's height from the one above it."""
    parts, last = [], -math.inf
    for point in sorted(named, key=lambda one: at_y(one.gap)):
        x, y = at_x(point.seconds), at_y(point.gap)
        last = max(y + 4, last + LINE_HEIGHT)
        is_left = x > 0.7 * WIDTH
        parts.append(_text(x - 8 if is_left else x + 8, last, point.name, anchor="end" if is_left else "start"))
    return ['<g stroke="#fff" stroke-width="3" paint-order="stroke">', *parts, "</g>"]


def _range(values: list[float]) -> tuple[float, float]:
    """Their range with a margin, on a logarithmic axis."""
    margin = max(1.15, (max(values) / min(values)) ** 0.08)
    return min(values) / margin, max(values) * margin


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between the two; more where those are few, powers alone where they are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)

    def ticks(*digits: float) -> list[float]:
        return [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]

    usual = ticks(1, 2, 5)
    if len(usual) > 9:
        return ticks(1)
    return usual if len(usual) > 2 else ticks(1, 1.5, 2, 3, 4, 5, 6, 8)


def _legend(colours: dict[str, str]) -> str:
    parts, x = [], float(LEFT)
    for family, colour in colours.items():
        parts.append(f'<circle cx="{x + 5:.0f}" cy="38" r="{RADIUS}" fill="{colour}"/>{_text(x + 14, 42, family)}')
        x += 14 + 6.2 * len(family) + 18
    return "".join(parts)


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 11, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}">{escape(text)}</text>'
    )
