"""Points, their front, and how they are shown."""

from __future__ import annotations

import csv
import io
import math
import random
import xml.etree.ElementTree as ElementTree

import pytest

from llmprune.io.pareto import AXES, Point, front, pareto_svg, point_of, points_csv, points_table
from llmprune.io.scale import Scale
from llmprune.spec import PruneConfig
from llmprune.structure import StructureReport
from tests.reports import sample_benchmark, sample_report

HOSTILE = "<script>alert(1)</script>\"'&`|[x](http://evil.test)\n=1+1"
SVG = "{http://www.w3.org/2000/svg}"


def some(num: int, seed: int = 0) -> list[Point]:
    """Points on a coarse grid, so that ties and equal ones are among them."""
    rng = random.Random(seed)
    values = [{"sparsity": rng.randrange(6) / 10, "perplexity": float(rng.randrange(5, 12))} for _ in range(num)]
    return [Point(f"p{index}", f"g{index % 3}", each) for index, each in enumerate(values)]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_no_other_point_beats(seed: int) -> None:
    """Against the definition in words: sparser at no worse a perplexity, or better at no lower a sparsity."""
    points = some(30, seed)
    pairs = [(point.values["sparsity"], point.values["perplexity"]) for point in points]
    expected = [not any((s >= a and p < b) or (s > a and p <= b) for s, p in pairs) for a, b in pairs]
    assert front(points, "sparsity", "perplexity") == expected
    assert any(expected) and not all(expected)


def test_a_point_without_a_finite_value_is_on_no_front() -> None:
    """A broken model is no bargain, and what was not measured is not compared."""
    values = ({"sparsity": 0.9, "perplexity": math.nan}, {"sparsity": 0.9, "perplexity": math.inf}, {"sparsity": 0.95})
    points = [Point("x", "g", each) for each in values] + [Point("fine", "g", {"sparsity": 0.5, "perplexity": 6.0})]
    assert front(points, "sparsity", "perplexity") == [False, False, False, True]
    assert "3 without a finite value" in pareto_svg(points, "sparsity", "perplexity")


def test_a_report_becomes_a_point() -> None:
    """Quality of the first text, zeros not counted as parameters, and no speed-up of zeros in dense tensors."""
    report = sample_report()
    point = point_of(report, "half", "half/report.html")
    assert point.group == "sparsegpt"
    assert point.values["perplexity"] == report.quality[0].perplexity_pruned
    assert point.values["perplexity_increase"] == pytest.approx(29.3103 / 20.9664 - 1)
    assert point.values["parameters"] == report.model.num_parameters - report.num_zeros_model
    assert point.values["bytes"] == report.checkpoint_bytes
    assert point.values["decode_speedup"] == point.values["prefill_speedup"] == 1.0
    assert point.values["decode_ms"] == pytest.approx(1e3 / 45.6)
    assert set(point.values) == set(AXES)


def test_speed_is_the_packed_models_and_of_smaller_matrices_as_measured() -> None:
    """At the smallest batch, dense against packed; structured checkpoints by their own latency."""
    packed = point_of(sample_report(benchmark=sample_benchmark()), "packed")
    assert packed.values["decode_speedup"] == pytest.approx(1.5)
    assert packed.values["prefill_speedup"] == pytest.approx(40 / 42)
    structure = StructureReport(
        structure="structured", method="flap", num_parameters_dense=100, num_parameters=80, num_removable=40, num_removed=20,
        stock=True,
    )  # fmt: skip
    config = PruneConfig(method="flap", sparsity=0.5)
    smaller = point_of(sample_report(structure=structure, config=config), "smaller")
    assert smaller.values["decode_speedup"] == pytest.approx(45.6 / 42.4)
    assert (smaller.values["parameters"], smaller.group) == (80, "flap structured")


def test_an_unmeasured_report_has_few_values() -> None:
    """Nothing is made up where nothing was measured."""
    assert set(point_of(sample_report(quality=(), latency=None, checkpoint_bytes=None), "x").values) == {
        "sparsity",
        "parameters",
    }


def test_the_plot_is_well_formed_and_says_what_each_point_is() -> None:
    """A title and a link for every point, the front marked, a legend of all series, and no style or script."""
    points = [Point(p.label, p.group, p.values, f"{p.label}/report.html?a=1&b=2") for p in some(12)]
    root = ElementTree.fromstring(pareto_svg(points, "sparsity", "perplexity", width=500, height=300))
    marks = [mark for mark in root.iter(f"{SVG}path") if "point" in (mark.get("class") or "").split()]
    assert len(marks) == 12
    assert {mark.findtext(f"{SVG}title", "").split(":")[0] for mark in marks} == {point.label for point in points}
    assert sum("on-front" in (mark.get("class") or "") for mark in marks) == sum(front(points, "sparsity", "perplexity"))
    assert len(list(root.iter(f"{SVG}a"))) == 12
    assert {text.text for text in root.iter(f"{SVG}text")} >= {"g0", "g1", "g2"}
    assert not list(root.iter(f"{SVG}style")) and not list(root.iter(f"{SVG}script"))
    for mark in marks:
        across, down = map(float, (mark.get("transform") or "")[10:-1].split())
        assert 0 <= across <= 500 and 0 <= down <= 300


@pytest.mark.parametrize("num", [0, 1])
def test_a_plot_of_nothing_or_one_point_is_a_plot(num: int) -> None:
    """There is no range to scale by."""
    ElementTree.fromstring(pareto_svg([Point("p", "g", {"bytes": 0.0, "kl": 0.0})] * num, "bytes", "kl"))


def test_text_is_escaped_everywhere() -> None:
    """Names come from users: in the plot, the table and the CSV they are text."""
    values = {"sparsity": 0.5, "kl": 0.1}
    points = [Point(HOSTILE, HOSTILE, values, "javascript:alert(1)"), Point("=2+3", "@x", values, 'a" onload="x')]
    drawn = pareto_svg(points, "sparsity", "kl")
    root = ElementTree.fromstring(drawn)
    assert "<script" not in drawn and "javascript:" not in drawn
    assert [link.get("href") for link in root.iter(f"{SVG}a")] == ['a" onload="x']
    table = points_table(points, [True, False])
    assert len(table.splitlines()) == 4 and "javascript:" not in table
    rows = list(csv.reader(io.StringIO(points_csv(points))))
    assert rows[1][:2] == [HOSTILE, HOSTILE]
    assert rows[2][:2] == ["'=2+3", "'@x"]


def test_csv_and_table_hold_what_there_is() -> None:
    """A column for each axis that some point has; CSV numbers are exact."""
    points = [Point("a", "g", {"kl": 1 / 3}), Point("b", "g", {"sparsity": 0.5})]
    rows = list(csv.DictReader(io.StringIO(points_csv(points, [True, False]))))
    assert [row["front"] for row in rows] == ["1", "0"]
    assert float(rows[0]["kl"]) == 1 / 3 and rows[1]["kl"] == "" and "bytes" not in rows[0]
    assert "50.00 %" in points_table(points) and "0.333" in points_table(points)


@pytest.mark.parametrize("values", [(0.3, 0.7), (5.0, 5.0), (0.0, 0.0), (1e-4, 90.0), (4.2, 1e6), (-3.0, 2.0), (0.31, 0.31001)])
def test_ticks_are_few_round_and_inside(values: tuple[float, float]) -> None:
    """Linear and logarithmic, wide and narrow."""
    scale = Scale.of(values)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 7 and ticks == sorted(ticks)
    assert all(-1e-9 <= scale(tick) <= 1 + 1e-9 for tick in ticks)
    assert all(0 <= scale(value) <= 1 for value in values)
