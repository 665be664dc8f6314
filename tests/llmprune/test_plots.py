"""Plots as SVG: what is drawn is what was measured, in the right place, and text stays text."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from llmprune.io.plots import Bars, Cell, Line, bars_svg, curve_svg, heat_svg, standalone, thinned
from llmprune.io.report_plots import plots_of
from llmprune.pruning import AllocationReport, RefinementPoint, RefinementReport, SearchReport
from reports import sample_benchmark, sample_report

EVIL = '"><script>alert(1)</script>'
SPACE = "{http://www.w3.org/2000/svg}"


def parse(svg: str) -> ElementTree.Element:
    """As the browser reads a file of it."""
    return ElementTree.fromstring(standalone(svg))


def titles(svg: str) -> list[str]:
    """What the marks say."""
    return [title.text or "" for title in parse(svg).iter(f"{SPACE}title")]


def curve(*lines: Line) -> str | None:
    """With plain texts."""
    return curve_svg(lines, label="l", x_label="x", y_label="y", x_text=str, y_text=str)


def test_a_curve_falls_where_its_values_do() -> None:
    """Marks from left to right, lower values further down; every mark is told, every line named where there are several."""
    svg = curve(Line("a", [(0.0, 3.0), (1.0, 2.0), (4.0, 1.0)]), Line("b", [(0.0, 1.0), (4.0, 3.0)]))
    assert svg is not None
    circles = [(float(item.get("cx", "")), float(item.get("cy", ""))) for item in parse(svg).iter(f"{SPACE}circle")]
    assert circles[:3] == sorted(circles[:3]) and circles[3][1] > circles[4][1]
    assert circles[1][0] - circles[0][0] == pytest.approx((circles[2][0] - circles[0][0]) / 4, abs=0.1)
    assert titles(svg)[:2] == ["a, 0.0: 3.0", "a, 1.0: 2.0"] and len(titles(svg)) == 5


def test_a_curve_needs_two_finite_points() -> None:
    """Else there is none; what is not finite is left out."""
    assert curve(Line("a", [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf)])) is None
    svg = curve(Line("a", [(0.0, 1.0), (1.0, math.nan), (2.0, 2.0)]))
    assert svg is not None and titles(svg) == ["0.0: 1.0", "2.0: 2.0"]


def test_long_curves_are_thinned_out() -> None:
    """The first and the last point stay."""
    points = [(float(index), 1.0) for index in range(10_000)]
    kept = thinned(points, 100)
    assert len(kept) <= 102 and (kept[0], kept[-1]) == (points[0], points[-1])


def test_a_heat_map_has_a_field_for_what_is_there() -> None:
    """Darker for more; nothing where there is nothing."""
    svg = heat_svg(
        ["q", "k"], ["block 0", "block 1"], [[Cell(0.0, "0 %"), Cell(1.0, "9 %")], [None, Cell(0.5, "5 %")]], label="l"
    )
    fields = list(parse(svg).iter(f"{SPACE}rect"))
    assert titles(svg) == ["block 0, q: 0 %", "block 1, q: 9 %", "block 1, k: 5 %"]
    shades = [float(item.get("fill-opacity", "")) for item in fields]
    assert shades[0] < shades[2] < shades[1]


def test_bars_are_as_long_as_their_values() -> None:
    """Within a group; the missing one is not drawn."""
    svg = bars_svg(
        [Bars("decode", [(50.0, "50"), (100.0, "100 (2x)")]), Bars("prefill", [(7.0, "7"), None])],
        ("dense", "pruned"),
        label="l",
    )
    marks = [item for item in parse(svg).iter(f"{SPACE}rect") if item.get("class")]
    widths = [float(item.get("width", "")) for item in marks]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.01) and widths[2] == widths[1] and len(widths) == 3
    assert titles(svg) == ["decode, dense: 50", "decode, pruned: 100 (2x)", "prefill, dense: 7"]


def test_a_report_has_the_plots_of_what_was_measured() -> None:
    """In the order of reading, each a file by itself, named and described; a bare one has none."""
    steps = [
        RefinementPoint(num_passes=n, num_blocks=1, num_accepted=n, num_swaps=n, loss=3.0 - n, seconds=n) for n in range(2)
    ]
    refinement = RefinementReport(
        name="icbs", preset="default", hessian="fisher", solver="anneal", block_size=8, layers_per_step=1, num_sequences=1,
        num_held_out=2, scope="row", num_sites=1, points=tuple(steps), stopped="it is over",
    )  # fmt: skip
    search = SearchReport(generations=5, num_evaluated=9, num_tokens=64, curve=((0, 0.5), (3, 0.25)))
    allocation = AllocationReport(name="evolution", num_zeros=1, numel=2, sparsities={"a": 0.5}, search=search)
    report = sample_report(refinement=refinement, allocation=allocation, benchmark=sample_benchmark())
    plots = plots_of(report)
    assert list(plots) == ["sparsity", "errors", "speed", "packed-speed", "refinement", "allocation"]
    for name, plot in plots.items():
        assert plot.name == name and plot.title and plot.note.endswith(".")
        assert parse(plot.svg).get("aria-label")
    assert titles(plots["errors"].svg)[3].startswith("3: 0.0")
    assert titles(plots["allocation"].svg) == ["0: 0.5000", "3: 0.2500", "5: 0.2500"]
    assert titles(plots["sparsity"].svg)[0] == "block 0, q_proj: 52.00 %"
    assert "1.08x" in plots["speed"].svg and "1.50x" in plots["packed-speed"].svg
    assert plots_of(sample_report(blocks=(), latency=None)) == {}


def test_names_are_text() -> None:
    """Whatever they hold."""
    found = [
        heat_svg([EVIL], [EVIL], [[Cell(0.5, EVIL)]], label=EVIL),
        bars_svg([Bars(EVIL, [(1.0, EVIL)])], (EVIL,), label=EVIL),
        curve_svg(
            [Line(EVIL, [(0, 1), (1, 2)])] * 2, label=EVIL, x_label=EVIL, y_label=EVIL, x_text=lambda _: EVIL, y_text=str
        ),
    ]
    for svg in found:
        assert svg is not None and "<script" not in svg
        assert parse(svg).get("aria-label") == EVIL
        assert not re.search(r"\son\w+=", svg)
