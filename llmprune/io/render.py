"""A report for readers: one self-contained HTML page, Markdown, and the model card of the checkpoint. Torch-free.

The page is complete without scripts and asks the network for nothing (its own Content-Security-Policy forbids it). The
card holds no time, timing or machine, so that the same job gives the same bytes; only where a packed checkpoint was
benchmarked it states the speeds and the device.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llmprune.io.course import Course, recovery_line, refinement_line
from llmprune.io.structure_text import (
    front_course,
    latency_line,
    removed_units,
    search_course,
    search_line,
    structure_line,
    widths_of,
)
from llmprune.report import Benchmark, BlockReport, Latency, Quality, Report, SiteReport, Speed, Verdict
from llmprune.spec import Pattern, PruneConfig
from llmprune.speed import overlap, point_of

TEMPLATES = Path(__file__).parent / "templates"
NOTHING = "\N{EN DASH}"
MIN_COLOUR_RANGE = 0.1
VERDICTS = {"good": "Good", "degraded": "Degraded but usable", "broken": "Broken", "unmeasured": "Not measured"}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_MARKDOWN = re.compile(r"([\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=:)//|(?<=www)\.)")
_BACKTICKS = re.compile(r"`+")


def percent(fraction: float | None, digits: int = 2) -> str:
    """0.5 as ``50.00 %``."""
    return NOTHING if fraction is None else f"{100 * fraction:.{digits}f} %"


def target_percent(fraction: float) -> str:
    """A sparsity as it was asked for, without trailing zeros: 0.625 as ``62.5 %``."""
    return f"{100 * fraction:.10g} %"


def number(value: float | None, digits: int = 2) -> str:
    """A float with fixed digits; ``not finite`` for inf and NaN, powers of ten from 100,000 on."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3g}" if abs(value) >= 1e5 else f"{value:,.{digits}f}"


def times(ratio: float | None) -> str:
    """1.0512 as ``1.05x``."""
    return number(ratio) + ("x" if ratio is not None and math.isfinite(ratio) else "")


def small(value: float | None) -> str:
    """Three significant digits: 0.01234 as ``0.0123``."""
    if value is None or not math.isfinite(value):
        return number(value)
    return "0" if value == 0 else f"{value:#.3g}" if 1e-4 <= abs(value) < 100 else f"{value:.2e}"


def rate(value: float) -> str:
    """Tokens per second; tenths only below a thousand."""
    return number(value, 0 if value >= 1000 else 1)


def brief(seconds: float) -> str:
    """A short time in three digits: ``12.3 µs``, ``4.56 ms``, ``1.20 s``."""
    scale, unit = next(((scale, unit) for scale, unit in ((1e-3, "µs"), (1.0, "ms")) if seconds < scale), (1e3, "s"))
    amount = seconds / scale * 1e3
    digits = 2 if amount < 10 else 1 if amount < 100 else 0
    return f"{amount:,.{digits}f} {unit}"


def count(value: int) -> str:
    """An integer with thousands separators."""
    return f"{value:,}"


def duration(seconds: float) -> str:
    """Seconds as ``4.2 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: int | None) -> str:
    """Bytes with a binary unit: ``1.19 GiB``."""
    if num_bytes is None:
        return NOTHING
    amount, units = float(num_bytes), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while amount >= 1024 and unit != "TiB":
        amount, unit = amount / 1024, next(units)
    return f"{num_bytes} B" if unit == "B" else f"{amount:.2f} {unit}"


def command_line(config: PruneConfig, out: str | None = None) -> str:
    """The shell command that runs this job again: only the fields that differ from their defaults.

    An n:m pattern fixes the sparsity, so it is not repeated; an empty ``eval`` is ``--no-eval``.
    """
    words = ["llmprune", "prune", config.model]
    fixed = {"model"} if Pattern.parse(config.pattern).sparsity is None else {"model", "sparsity"}
    for name, field in PruneConfig.model_fields.items():
        value = getattr(config, name)
        if name not in fixed and value != field.default:
            words += _flag(name, value)
    return shlex.join([*words, *(("--out", out) if out is not None else ())])


def _flag(name: str, value: Any) -> list[str]:
    dashed = name.replace("_", "-")
    if value is False or value == ():
        return [f"--no-{dashed}"]
    if value is True:
        return [f"--{dashed}"]
    values = value if isinstance(value, tuple) else (value,)
    return [word for item in values for word in (f"--{dashed}", str(item))]


def recipe(config: PruneConfig) -> str:
    """What was done in a few words: the method and what came with it, such as ``alps + permute + reconstruct``."""
    parts = [
        config.method,
        config.tyr_preset if config.method == "tyr" else "",
        "" if config.allocation == "uniform" else config.allocation,
        "permute" if config.permute else "",
        "" if config.refine == "none" else config.refine,
        "reconstruct" if config.reconstruct else "",
    ]
    return " + ".join(filter(None, parts))


def reconstruction_line(report: Report) -> str | None:
    """What reconstruction gained and cost, over all blocks; None without one."""
    done = [block.reconstruction for block in report.blocks if block.reconstruction]
    if not done:
        return None
    before, after = (sum(values) / len(done) for values in ([d.error_before for d in done], [d.error_after for d in done]))
    undone = sum(item.rolled_back for item in done)
    return (
        f"Reconstruction of {count(len(done))} blocks: mean held-out error {percent(before, 2)} -> {percent(after, 2)}, "
        f"{count(undone)} rolled back, {duration(sum(item.seconds for item in done))}"
    )


def permutation_line(report: Report) -> str | None:
    """What reordering channels gained, over all matrices whose channels moved; None without any."""
    done = [item for block in report.blocks for item in block.permutations if item.reason is None]
    if not done:
        return None
    before, after = (sum(item.kept_before or 0 for item in done), sum(item.kept_after or 0 for item in done))
    shares = f"{percent(before / len(done), 1)} -> {percent(after / len(done), 1)}"
    return f"Channels of {count(len(done))} matrices reordered: mean share of the score kept {shares}"


def statistics_lines(report: Report) -> list[str]:
    """What each stage took out of the cache of statistics; none where it took nothing."""
    return [
        f"Statistics of {count(item.num_reused)} of {count(item.num_blocks)} blocks reused from an earlier job or stage "
        f"(stage {item.stage}, collected {item.collected})"
        for item in report.statistics
        if item.num_reused
    ]


def worst(quality: Iterable[Quality]) -> Quality | None:
    """The text with the highest perplexity ratio (NaN counts as infinite): the one the verdict speaks of."""
    measured = [(item, item.ratio) for item in quality if item.ratio is not None]
    return max(measured, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])[0] if measured else None


def verdict_parts(verdict: Verdict) -> tuple[str, str]:
    """(word, sentence): the verdict's text without the word it begins with."""
    word = VERDICTS[verdict.status]
    text = verdict.text.removeprefix(f"{word}: ")
    return word, text[:1].upper() + text[1:]


def pair_speeds(latency: Latency) -> list[tuple[Speed, Speed | None]]:
    """Each dense measurement with the pruned one of the same phase and sizes."""
    pruned = {point_of(speed): speed for speed in latency.pruned}
    return [(speed, pruned.get(point_of(speed))) for speed in latency.dense]


def bar_width(value: float, longest: float) -> str:
    """The length of a bar as a fraction of the longest one, for a style attribute."""
    return f"{value / longest:.3f}" if longest > 0 else "0"


def how_measured(benchmark: Benchmark) -> str:
    """The protocol of a benchmark in a few sentences."""
    protocol = benchmark.protocol
    graphs = {speed.cuda_graph for speed in benchmark.subject.speeds}
    graph = "CUDA graphs" if graphs == {True} else "CUDA graphs in part" if True in graphs else "no CUDA graphs"
    turns = ""
    if benchmark.dense is not None:
        turns = ", both models taking turns" if benchmark.interleaved else ", one model after the other"
    return (
        f"Medians of up to {protocol.repeats} runs in {duration(benchmark.seconds)}{turns}; {graph}. Decode: "
        f"{protocol.decode_tokens} tokens after {protocol.context}. A copy on this device runs at "
        f"{number(benchmark.copy_gigabytes_per_second, 1)} GB/s."
    )


def capitalized(note: str) -> str:
    """A note as a sentence."""
    return f"{note[:1].upper()}{note[1:].rstrip('.')}."


@dataclass(frozen=True)
class Group:
    """The sites of one block that share a column: one matrix, or a parameter's experts."""

    sites: tuple[SiteReport, ...]

    @property
    def num_weights(self) -> int:
        """Weights of all sites."""
        return sum(site.numel for site in self.sites)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return sum(site.num_zeros for site in self.sites) / max(self.num_weights, 1)

    @property
    def output_error(self) -> float | None:
        """The worst of the experts'."""
        return max((site.output_error for site in self.sites if site.output_error is not None), default=None)


@dataclass(frozen=True)
class Row:
    """One block of the table: a cell per column, None where the block has no such pruned site."""

    block: BlockReport
    cells: tuple[Group | None, ...]

    @property
    def output_error(self) -> float | None:
        """The largest error of the row's cells, where any was measured."""
        errors = [cell.output_error for cell in self.cells if cell is not None and cell.output_error is not None]
        return max(errors, default=None)


@dataclass(frozen=True)
class Grid:
    """All sites as blocks x columns; a column is labelled by the shortest ending of its path that no other has."""

    labels: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def totals(self) -> list[tuple[str, Group]]:
        """(label, its sites in all blocks) per column."""
        columns = zip(*(row.cells for row in self.rows), strict=True)
        merged = [Group(tuple(site for cell in column if cell for site in cell.sites)) for column in columns]
        return list(zip(self.labels, merged, strict=True))


def make_grid(blocks: Sequence[BlockReport]) -> Grid:
    """Arrange the sites of all blocks."""
    grouped = [_columns(block) for block in blocks]
    paths = tuple(dict.fromkeys(path for columns in grouped for path in columns))
    rows = (
        Row(block, tuple(Group(tuple(columns[path])) if path in columns else None for path in paths))
        for block, columns in zip(blocks, grouped, strict=True)
    )
    return Grid(_shortest_labels(paths), tuple(rows))


def _columns(block: BlockReport) -> dict[str, list[SiteReport]]:
    """The block's sites by path inside the block, expert indices taken out."""
    local = [(site.name.removeprefix(f"{block.name}."), site) for site in block.sites]
    siblings = Counter((name.rpartition(".")[0], site.shape) for name, site in local if _ends_in_index(name))
    columns: dict[str, list[SiteReport]] = {}
    for name, site in local:
        index = _expert_position(name, is_slice=siblings[name.rpartition(".")[0], site.shape] > 1)
        parts = name.split(".")
        path = name if index is None else ".".join(parts[:index] + parts[index + 1 :])
        columns.setdefault(path, []).append(site)
    return columns


def _ends_in_index(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()


def _expert_position(name: str, *, is_slice: bool) -> int | None:
    """Which part of a name is the expert's index: a number after ``experts``, or the last part of a 3-D parameter's."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit() and any("expert" in before for before in parts[:position]):
            return position
    return len(parts) - 1 if is_slice and _ends_in_index(name) else None


def _shortest_labels(paths: Sequence[str]) -> tuple[str, ...]:
    uses = Counter(ending for path in paths for ending in _endings(path))
    return tuple(next((ending for ending in _endings(path) if uses[ending] == 1), path) for path in paths)


def _endings(path: str) -> list[str]:
    """``a.b.c`` as c, b.c, a.b.c."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


@dataclass(frozen=True)
class ExpertTokens:
    """How many calibration tokens each expert of a block saw; parameters with the same counts share an entry."""

    labels: tuple[str, ...]
    tokens: tuple[tuple[int, int], ...]

    @property
    def num_unseen(self) -> int:
        """Experts that no calibration token reached."""
        return sum(tokens == 0 for _, tokens in self.tokens)


def expert_tokens(grid: Grid, row: Row) -> list[ExpertTokens]:
    """The token counts of a block's experts, for every column that holds more than one site."""
    found: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for label, cell in zip(grid.labels, row.cells, strict=True):
        if cell is not None and len(cell.sites) > 1:
            tokens = tuple((_expert_index(site.name, row.block.name), site.num_tokens) for site in cell.sites)
            found.setdefault(tokens, []).append(label)
    return [ExpertTokens(tuple(labels), tokens) for tokens, labels in found.items()]


def _expert_index(name: str, block: str) -> int:
    local = name.removeprefix(f"{block}.")
    position = _expert_position(local, is_slice=True)
    assert position is not None, name
    return int(local.split(".")[position])


@dataclass(frozen=True)
class Shade:
    """Values mapped to 0..1 for the colour of a cell; equal values stay in the middle of the scale."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], min_range: float) -> Shade:
        """The scale of ``values``, at least ``min_range`` wide."""
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        spare = max(0.0, min_range - (max(finite) - min(finite))) / 2
        return cls(min(finite) - spare, max(finite) + spare)

    def __call__(self, value: float) -> str:
        """Where a value lies on the scale, 0 to 1, for a style attribute."""
        if not math.isfinite(value):
            return "1"
        return f"{(value - self.low) / (self.high - self.low):.2f}" if self.high > self.low else "0.5"


def _cells(grid: Grid) -> list[Group]:
    return [cell for row in grid.rows for cell in row.cells if cell is not None]


def _fallbacks(report: Report) -> list[tuple[str, list[str]]]:
    """(reason, site names) of the sites that were scored by their weights alone."""
    reasons: dict[str, list[str]] = {}
    for block in report.blocks:
        for site in block.sites:
            if site.fallback:
                reasons.setdefault(site.fallback, []).append(site.name)
    return list(reasons.items())


def render_html(report: Report) -> str:
    """The report as one self-contained HTML page."""
    grid = make_grid(report.blocks)
    errors = [cell.output_error for cell in _cells(grid) if cell.output_error is not None]
    word, sentence = verdict_parts(report.verdict)
    template = _environment(html=True).get_template("report.html.j2")
    return template.render(
        report=report,
        grid=grid,
        verdict_word=word,
        verdict_text=sentence,
        worst=worst(report.quality),
        speeds=pair_speeds(report.latency) if report.latency else [],
        shade_sparsity=Shade.of([cell.sparsity for cell in _cells(grid)], MIN_COLOUR_RANGE),
        shade_error=Shade.of(errors, 0.0) if errors else None,
        experts=[(row, lists) for row in grid.rows if (lists := expert_tokens(grid, row))],
        fallbacks=_fallbacks(report),
        statistics=statistics_lines(report),
        permutation=permutation_line(report),
        reconstruction=reconstruction_line(report),
        refinement=refinement_line(report.refinement, duration(report.refinement.seconds)) if report.refinement else None,
        course=Course.of(report.refinement) if report.refinement else None,
        recovery=recovery_line(report.recovery, duration(report.recovery.seconds)) if report.recovery else None,
        command=command_line(report.config, report.out),
        **_structure_parts(report),
    )


def _structure_parts(report: Report) -> dict[str, Any]:
    """What structure.html.j2 shows; empty without a structure."""
    structure = report.structure
    if structure is None:
        return {}
    units, widths = widths_of(structure)
    return {
        "structure_line": structure_line(structure, report.model.num_blocks),
        "search_line": search_line(structure),
        "latency_line": latency_line(structure),
        "search_course": search_course(structure),
        "front_course": front_course(structure),
        "width_units": units,
        "widths": widths,
    }


def render_card(report: Report, base_model: str, license: str | None) -> str:
    """README.md of the checkpoint; the same job gives the same bytes.

    ``base_model`` enters the front matter if it has the form ``owner/name``. Of local paths, the texts' too, only the last
    part is shown, and the device is left out of the command: these are facts of a machine, not of the checkpoint.
    """
    is_hub_id = _HUB_ID.fullmatch(base_model) is not None
    shown = base_model if is_hub_id else Path(base_model).name or base_model
    config = report.config.model_copy(
        update={
            "model": shown,
            "device": "auto",
            "calibration": report.config.calibration and last_part(report.config.calibration),
            "eval": report.config.eval and tuple(map(last_part, report.config.eval)),
        }
    )
    template = _environment(html=False).get_template("model_card.md.j2")
    return template.render(
        report=report,
        base_model=base_model if is_hub_id else None,
        shown=shown,
        license=license,
        totals=make_grid(report.blocks).totals,
        refinement=refinement_line(report.refinement) if report.refinement else None,
        structure=structure_line(report.structure, report.model.num_blocks) if report.structure else None,
        removed=removed_units(report.structure, report.model.num_blocks) if report.structure else [],
        recovery=recovery_line(report.recovery) if report.recovery else None,
        command=command_line(config),
    )


def render_markdown(report: Report) -> str:
    """The report as Markdown, for a wiki or an issue: what the page shows without its charts and its tables of sites."""
    refinement, recovery, structure = report.refinement, report.recovery, report.structure
    lines = [
        structure_line(structure, report.model.num_blocks) if structure else None,
        search_line(structure) if structure else None,
        latency_line(structure) if structure else None,
        refinement_line(refinement, duration(refinement.seconds)) if refinement else None,
        recovery_line(recovery, duration(recovery.seconds)) if recovery else None,
        *statistics_lines(report),
        permutation_line(report),
        reconstruction_line(report),
    ]
    template = _environment(html=False).get_template("report.md.j2")
    return template.render(
        report=report,
        lines=[line for line in lines if line],
        totals=make_grid(report.blocks).totals,
        removed=removed_units(structure, report.model.num_blocks) if structure else [],
        speeds=pair_speeds(report.latency) if report.latency else [],
        command=command_line(report.config, report.out),
    )


def last_part(source: str) -> str:
    """A text's name; of a path its last part."""
    return source if source.startswith("hf:") else Path(source).name or source


def markdown(value: object) -> str:
    """Text that Markdown and HTML leave alone: nothing in it is markup, a link or a table border."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return _MARKDOWN.sub(r"\\\1", text)


def code(value: object) -> str:
    """A code span that no backtick in the text can close."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in _BACKTICKS.findall(text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def code_block(value: str, language: str) -> str:
    """A fenced block that no line of the text can close."""
    fence = "`" * max(3, 1 + max((len(run) for run in _BACKTICKS.findall(value)), default=0))
    return f"{fence}{language}\n{value}\n{fence}"


def quoted(value: str) -> str:
    """A double-quoted YAML scalar."""
    return json.dumps(value, ensure_ascii=False)


_FILTERS: tuple[Callable[..., Any], ...] = (
    percent, target_percent, recipe, number, times, small, rate, brief, count, duration, size, last_part, markdown, code,
    code_block, quoted, how_measured, capitalized,
)  # fmt: skip


@cache
def _environment(*, html: bool) -> Environment:
    env = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=html, undefined=StrictUndefined)
    env.trim_blocks = env.lstrip_blocks = env.keep_trailing_newline = True
    env.filters |= {function.__name__: function for function in _FILTERS}
    env.globals |= {"overlap": overlap, "bar_width": bar_width, "NOTHING": NOTHING}
    return env
