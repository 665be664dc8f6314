"""What may be asked for where something goes whole, and how the report tells of it."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from llmprune.console import print_report
from llmprune.errors import ConfigError
from llmprune.io.render import command_line, recipe, render_card, render_html
from llmprune.io.structure_text import (
    front_course,
    latency_line,
    removed_units,
    search_course,
    search_line,
    structure_line,
    widths_of,
)
from llmprune.methods import METHODS, STRUCTURAL, method_of
from llmprune.patterns import STRUCTURE_METHODS
from llmprune.report import Report, StructureReport
from llmprune.spec import DEFAULT_STRUCTURE_SPARSITY, Need, Pattern, PruneConfig
from llmprune.structure import BlockChoice, FrontPoint, IterationReport, ModuleReport
from reports import sample_report


def _structure(**changes: Any) -> StructureReport:
    """Two blocks: kv groups 4 -> 3 and 4 -> 0, channels 100 -> 60 and 100 -> 90."""
    kept = {("kv group", 0): 3, ("kv group", 1): 0, ("channel", 0): 60, ("channel", 1): 90}
    modules = tuple(
        ModuleReport(
            name=f"model.layers.{block}.{'self_attn' if unit == 'kv group' else 'mlp'}", block=block, unit=unit,
            num_groups=4 if unit == "kv group" else 100, num_kept=number, parameters_per_group=10,
        )
        for (unit, block), number in sorted(kept.items(), key=lambda item: item[0][1])
    )  # fmt: skip
    fields: dict[str, Any] = {
        "structure": "structured", "method": "tyr", "num_parameters_dense": 10_000, "num_parameters": 9_450,
        "num_removable": 2_080, "num_removed": 550, "stock": False, "kv_bytes_dense": 64, "kv_bytes": 24, "modules": modules,
    }  # fmt: skip
    return StructureReport(**{**fields, **changes})


def _search() -> dict[str, Any]:
    shared = {"steps": {"attention of 64": 1}, "num_evaluated": 64, "supernet_seconds": 2.0, "supernet_on_disk": False}
    return {
        "iterations": (
            IterationReport(
                **shared, curve=((0, 0.5), (2, 0.4)), num_generations=3, supernet_bytes=10**6, generation_seconds=1.5
            ),
            IterationReport(**shared, curve=((0, 0.4),), num_generations=3, supernet_bytes=2 * 10**6, generation_seconds=2.5),
        ),
        "front": (
            FrontPoint(num_parameters=10_000, kl_predicted=0.0, kl_measured=0.0),
            FrontPoint(num_parameters=9_000, kl_predicted=0.2),
        ),
        "left": {"model.layers.0.odd": "it is <odd>"},
    }


@pytest.mark.parametrize("structure", STRUCTURE_METHODS)
def test_pattern_and_method_name_each_other(structure: Any) -> None:
    """A structure has a default method, its methods imply it, and less goes by default."""
    first, *others = STRUCTURE_METHODS[structure]
    config = PruneConfig.build(pattern=structure)
    assert (config.method, config.sparsity) == (first, DEFAULT_STRUCTURE_SPARSITY)
    assert Pattern.parse(config.pattern).structure == structure and str(Pattern.parse(structure)) == structure
    for name in (first, *others):
        if name not in METHODS:
            assert PruneConfig.build(method=name) == PruneConfig.build(pattern=structure, method=name)
        chosen = method_of(PruneConfig.build(pattern=structure, method=name, sparsity=0.1))
        assert (chosen.name, chosen.structure) == (name, structure) and chosen.paper and chosen.summary
    assert len(STRUCTURAL) == sum(map(len, STRUCTURE_METHODS.values()))


def test_magnitude_prunes_weights_unless_a_structure_is_named() -> None:
    """The one name that both kinds have."""
    assert PruneConfig.build(method="magnitude").pattern == "unstructured"
    assert method_of(PruneConfig.build(method="magnitude")).needs == Need.NOTHING
    assert method_of(PruneConfig.build(method="magnitude", pattern="structured")).structure == "structured"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"pattern": "structured", "method": "wanda"}, ("wanda", "tyr, flap, magnitude")),
        ({"pattern": "2:4", "method": "tyr"}, ("tyr", "2:4", "--pattern")),
        ({"pattern": "blocks", "method": "tyr"}, ("blocks", "tyr", "block-qubo")),
        ({"method": "tyr", "effort": "best"}, ("effort", "structured")),
        ({"method": "tyr", "reconstruct": True}, ("reconstruct",)),
        ({"method": "tyr", "export": "packed"}, ("export",)),
        ({"method": "tyr", "allocation": "dp"}, ("allocation",)),
        ({"method": "tyr", "permute": True}, ("permute",)),
        ({"method": "flap", "scope": "row"}, ("scope",)),
        ({"method": "flap", "budget": "parameters"}, ("budget", "tyr")),
        ({"method": "flap", "tyr_generations": 3}, ("tyr_generations", "--method tyr")),
        ({"widths": "uniform"}, ("widths", "unstructured")),
        ({"pattern": "blocks", "widths": "uniform"}, ("widths", "blocks")),
        ({"tyr_preset": "paper"}, ("tyr_preset",)),
        ({"method": "tyr", "tyr_preset": "huge"}, ("tyr_preset", "huge")),
        ({"method": "tyr", "tyr_iterations": 0}, ("tyr_iterations",)),
        ({"method": "tyrr"}, ("tyrr",)),
    ],
)
def test_what_does_not_go_together_is_refused(asked: dict[str, Any], words: tuple[str, ...]) -> None:
    """By the names of what was asked for, in one line with the way out."""
    with pytest.raises(ConfigError) as caught:
        method_of(PruneConfig.build(**asked)).needs  # noqa: B018
        if asked["method"] == "tyrr":
            from llmprune.methods import get_method

            get_method(asked["method"])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_report_counts_what_is_gone() -> None:
    """Sparsity is the share of what could go; the units are summed over the blocks."""
    structure = _structure()
    report = sample_report(structure=structure, blocks=(), num_blocks=2)
    assert report.sparsity == 550 / 2080 and report.sparsity_of_model == pytest.approx(0.055)
    assert [(item.unit, item.num_before, item.num_kept) for item in removed_units(structure, 2)] == [
        ("kv groups", 8, 3), ("channels", 200, 150),
    ]  # fmt: skip
    line = structure_line(structure, 2)
    for part in ("5 of 8 kv groups", "50 of 200 channels", "9,450 parameters", "5.50 %", "64 -> 24 bytes"):
        assert part in line
    units, rows = widths_of(structure)
    assert units == ["kv group", "channel"]
    assert [[module.num_kept if module else None for module in row.modules] for row in rows] == [[3, 60], [0, 90]]
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_search_is_told_in_a_line_and_two_curves() -> None:
    """Its cost and gain; nothing where there was no search."""
    structure = _structure(**_search())
    line = search_line(structure)
    assert line is not None
    for part in ("0.5000 -> 0.4000", "2 supernets of up to 2.0 MB in memory", "6 generations, 2.5 s each", "128 candidates"):
        assert part in line
    course, front = search_course(structure), front_course(structure)
    assert course is not None and (course.high, course.low, course.end) == (0.5, 0.4, 6)
    assert front is not None and (front.high, front.low, front.end) == (0.2, 0.0, 1000)
    assert search_line(_structure()) is None and search_course(_structure()) is None and front_course(_structure()) is None


def test_a_budget_of_seconds_is_told() -> None:
    """5 of 8 kv groups of 4 ms and 50 of 200 channels of 0.02 ms are 21 of 36 ms; nothing without a measurement."""
    structure = _structure(group_seconds={"kv group": 0.004, "channel": 0.00002})
    assert structure.sparsity_of_seconds == pytest.approx(21 / 36) and _structure().sparsity_of_seconds is None
    line = latency_line(structure)
    assert line == "Measured: 4,000.00 µs a kv group, 20.00 µs a channel in one request; 58.33 % of all groups' time taken out"
    assert latency_line(_structure()) is None
    report = sample_report(structure=structure, blocks=(), num_blocks=2)
    console = Console(file=StringIO(), width=200)
    print_report(report, console)
    assert line in console.file.getvalue()  # type: ignore[attr-defined]
    assert "20.00 µs a channel in one request" in render_html(report)


@pytest.mark.parametrize("stock", [True, False])
def test_page_card_and_terminal_show_the_structure(stock: bool) -> None:
    """What is left, how to load it, and nothing of zeros; text in names is escaped."""
    config = PruneConfig.build(method="tyr", tyr_preset="fast")
    report = sample_report(structure=_structure(stock=stock, **_search()), blocks=(), num_blocks=2, config=config)
    page, card = render_html(report), render_card(report, "owner/name", None)
    for part in ("5 of 8 kv groups", "Size against divergence", "3 of 4", "it is &lt;odd&gt;", "KL against generations"):
        assert part in page
    assert ("trust_remote_code" in card) == ("trust_remote_code" in page) == (not stock)
    assert ("modeling_pruned.py" in card) == (not stock)
    for text in (page, card):
        assert "Zeros" not in text and "zeros" not in text and "set to zero" not in text
    assert "| kv groups | 8 | 3 | 62.50 % |" in card
    console = Console(file=StringIO(), width=80)
    print_report(report, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "tyr + fast" in shown and "kv groups" in shown and "KV cache" in shown and "Searched" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_blocks_are_told_by_number() -> None:
    """Which blocks went, and the sets that were measured."""
    structure = _structure(
        structure="blocks", method="block-qubo", modules=(), blocks_removed=(3, 1), stock=True,
        choices=(BlockChoice(blocks=(1, 3), kl=0.25), BlockChoice(blocks=(2, 3), kl=0.5)),
    )  # fmt: skip
    report = sample_report(structure=structure, blocks=(), config=PruneConfig.build(pattern="blocks"))
    page = render_html(report)
    assert "2 of 4 blocks" in page and "0.2500" in page and "1, 3" in page
    assert recipe(report.config) == "block-qubo"
    assert command_line(report.config).endswith("--method block-qubo --sparsity 0.25 --pattern blocks")
