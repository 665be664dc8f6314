"""A report for readers: one self-contained HTML page, Markdown, and the model card of the checkpoint. Torch-free.

The page is complete without its script and asks the network for nothing: its own Content-Security-Policy forbids it, and
every other script. The card holds no time, timing or machine, so that the same job gives the same bytes; only where a packed
checkpoint was benchmarked it states the speeds and the device.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llmprune.io.course import recovery_line, refinement_line
from llmprune.io.formats import NOTHING as NOTHING
from llmprune.io.formats import brief as brief
from llmprune.io.formats import change_of as change_of
from llmprune.io.formats import count as count
from llmprune.io.formats import duration as duration
from llmprune.io.formats import number as number
from llmprune.io.formats import percent as percent
from llmprune.io.formats import rate as rate
from llmprune.io.formats import size as size
from llmprune.io.formats import small as small
from llmprune.io.formats import target_percent as target_percent
from llmprune.io.formats import times as times
from llmprune.io.formats import with_error as with_error
from llmprune.io.grid import MIN_COLOUR_RANGE, Grid, Group, Shade, expert_tokens, make_grid
from llmprune.io.plots import standalone
from llmprune.io.report_plots import plots_of
from llmprune.io.structure_text import (
    latency_line,
    removed_units,
    search_line,
    structure_line,
    widths_of,
)
from llmprune.report import Benchmark, Quality, Report, Verdict
from llmprune.spec import Pattern, PruneConfig
from llmprune.speed import overlap, pair_speeds

TEMPLATES = Path(__file__).parent / "templates"
SCRIPT_FILE = TEMPLATES / "plots.js"
SCRIPT = SCRIPT_FILE.read_text(encoding="utf-8")
"""Tips, arrow keys and PNG for plots; a page is complete without it."""
VERDICTS = {"good": "Good", "degraded": "Degraded but usable", "broken": "Broken", "unmeasured": "Not measured"}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_MARKDOWN = re.compile(r"([\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=:)//|(?<=www)\.)")
_BACKTICKS = re.compile(r"`+")


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
        speeds=pair_speeds(report.latency.dense, report.latency.pruned) if report.latency else [],
        shade_sparsity=Shade.of([cell.sparsity for cell in _cells(grid)], MIN_COLOUR_RANGE),
        shade_error=Shade.of(errors, 0.0) if errors else None,
        experts=[(row, lists) for row in grid.rows if (lists := expert_tokens(grid, row))],
        fallbacks=_fallbacks(report),
        statistics=statistics_lines(report),
        permutation=permutation_line(report),
        reconstruction=reconstruction_line(report),
        refinement=refinement_line(report.refinement, duration(report.refinement.seconds)) if report.refinement else None,
        plots=plots_of(report),
        script=SCRIPT,
        script_digest=_digest(SCRIPT),
        recovery=recovery_line(report.recovery, duration(report.recovery.seconds)) if report.recovery else None,
        command=command_line(report.config, report.out),
        **_structure_parts(report),
    )


def _digest(script: str) -> str:
    """As a Content-Security-Policy names a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def data_url(svg: str) -> str:
    """A plot as an address that holds all of it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(standalone(svg).encode()).decode()}"


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
            "prompt": None,
            "tasks_path": report.config.tasks_path and last_part(report.config.tasks_path),
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
        speeds=pair_speeds(report.latency.dense, report.latency.pruned) if report.latency else [],
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
    code_block, quoted, how_measured, capitalized, data_url, with_error, change_of,
)  # fmt: skip


@cache
def _environment(*, html: bool) -> Environment:
    env = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=html, undefined=StrictUndefined)
    env.trim_blocks = env.lstrip_blocks = env.keep_trailing_newline = True
    env.filters |= {function.__name__: function for function in _FILTERS}
    env.globals |= {"overlap": overlap, "bar_width": bar_width, "NOTHING": NOTHING}
    return env
