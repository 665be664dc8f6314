"""Tables of `make bench-quality`: docs/quality.csv, docs/quality.md, and the short one of the README."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from benchmarks.quality_bars import NOTE, Bar, bars
from benchmarks.quality_results import BASELINE, Estimate, Result, Results
from benchmarks.quality_variants import TARGETS, VARIANTS, Model, Variant
from llmprune.spec import BUNDLED_MODEL

README_VARIANTS = (
    "magnitude", "wanda", "dsnot", "sparsegpt", "alps", "wanda+reconstruct", "fast", "balanced", "best"
)  # fmt: skip
README_TARGETS = ("60 %", "2:4")
README_COST = "60 %"
LOAD = "Cells run beside one another on a shared machine: seconds compare to within a factor of about two."
_CELL = ("model", "target", "variant", "family", "status")
_COLUMNS = (
    "sparsity", "perplexity_dense", "perplexity", "gap", "gap_error",
    "closed", "closed_error", "kl", "top1", "seconds", "peak_mib", "tokens", "where",
)  # fmt: skip


def number(value: float) -> str:
    """A perplexity: two decimals, or a power of ten where it is past all use."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def csv_text(results: Results) -> str:
    """A line for every cell that has a result; gaps in nats per token, ``closed`` as a share of SparseGPT's gap."""
    return csv_lines(results, _COLUMNS, _values)


def csv_lines(
    results: Results, columns: Sequence[str], values: Callable[[Results, str, Variant, str, Result], list[str]]
) -> str:
    """A line for every cell that has a result: which it is, its status, and the values of one that has a perplexity."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_CELL, *columns])
    for model in results.models:
        for target in results.grid.targets:
            for variant in results.grid.variants.values():
                if found := results.get(model, variant.name, target):
                    row = [""] * len(columns)
                    if found["status"] == "ok":
                        row = values(results, model, variant, target, found)
                    writer.writerow([model, target, variant.name, variant.family, found["status"], *row])
    return text.getvalue()


def _values(results: Results, model: str, variant: Variant, target: str, found: Result) -> list[str]:
    gap, closed = results.gap(model, variant.name, target), results.closed(model, variant.name, target)
    return [
        f"{found['sparsity']:.6f}", f"{found['perplexity_dense']:.5f}", f"{found['perplexity']:.5f}", *pair(gap), *pair(closed),
        f"{found['kl']:.5f}", f"{found['top1']:.5f}", f"{found['seconds']:.2f}", f"{found['peak_bytes'] / 2**20:.1f}",
        str(found["tokens"]), found["where"],
    ]  # fmt: skip


def pair(estimate: Estimate | None) -> tuple[str, str]:
    """A mean and its error, for the CSV."""
    return (f"{estimate.mean:.5f}", f"{estimate.error:.5f}") if estimate else ("", "")


def page(results: Results) -> str:
    """docs/quality.md."""
    parts = [
        "# Quality of all methods, measured",
        "`make bench-quality` measures, and `python -m benchmarks quality --tables` writes this page, "
        "[quality.csv](quality.csv) and the plot from the results; nothing here is written by hand.",
        _how(results),
        "## Bars",
        bars_text(bars(results)),
        "![Gap against pruning time](quality.svg)",
        *(_model(results, model) for model in results.models.values()),
        *failures(results),
    ]
    return "\n\n".join(parts) + "\n"


def where(results: Results) -> str:
    """What the cells were measured on, and how many are left out."""
    found = sorted({found["where"] for found in results.cells.values() if found["status"] == "ok"})
    stale = f" {results.num_stale} results of other settings are left out." if results.num_stale else ""
    return f"Measured on {'; '.join(found) or 'nothing yet'}.{stale}"


def _how(results: Results) -> str:
    return (
        "The gap of a pruned model is ln(perplexity) - ln(dense perplexity), in nats per token; the share closed is of the gap "
        f"that {BASELINE} leaves at the same target: 100 % would be the dense model, below 0 is worse than {BASELINE}. "
        f"± is one standard error over the evaluation windows, paired. {NOTE} Seconds are those of pruning with everything a "
        "variant does beside it (survey, search, reconstruction, refinement), without loading and evaluating; the memory is "
        "the peak of the process while it does so, above that of one that has only imported llmprune. All other settings are "
        f"the defaults. {LOAD} {where(results)}"
    )


def bars_text(found: Sequence[Bar]) -> str:
    """Every bar and whether it is met, with what fails, and a table of all checks."""
    lines = []
    for bar in found:
        lines.append(f"- **{bar.verdict}** ({bar.detail}): {bar.text}")
        lines += [f"    - {check.where}: {check.found}" for check in bar.checks if check.is_met is False]
    details = [
        [bar.text, check.where, check.found, {True: "met", False: "not met", None: "not measured"}[check.is_met]]
        for bar in found
        for check in bar.checks
        if check.is_met is not None
    ]
    checks = table(["bar", "where", "found", ""], details)
    return "\n".join(lines) + f"\n\n<details><summary>Every check</summary>\n\n{checks}\n\n</details>"


def _model(results: Results, model: Model) -> str:
    variants = [
        variant for variant in VARIANTS.values() if any(results.get(model.name, variant.name, target) for target in TARGETS)
    ]
    parts = [f"## {model.name}", settings(model)]
    if not variants:
        return "\n\n".join([*parts, "No results yet."])
    dense = next((found["perplexity_dense"] for found in _measured(results, model.name, variants)), None)
    targets = list(TARGETS)

    def perplexity(variant: str, target: str) -> str:
        found = results.get(model.name, variant, target)
        return state(found) or number(found["perplexity"]) if found else ""

    def closed(variant: str, target: str) -> str:
        share = results.closed(model.name, variant, target)
        return f"{share.mean:.0%} ± {share.error:.0%}" if share and math.isfinite(share.mean) else ""

    def divergence(variant: str, target: str) -> str:
        found = results.measured(model.name, variant, target)
        return f"{found['kl']:.4f}" if found else ""

    rows = [["dense", *[number(dense)] * len(targets), "", ""]] if dense else []
    rows += [
        [variant.name, *(perplexity(variant.name, target) for target in targets), *_cost(results, model.name, variant)]
        for variant in variants
    ]
    parts.append("Perplexity, and the cost: median seconds and largest memory over the targets.")
    parts.append(table(["", *targets, "seconds", "MiB"], rows))
    parts.append(f"Share of {BASELINE}'s gap that is closed:")
    parts.append(_by_target([variant for variant in variants if variant.name != BASELINE], targets, closed))
    inner = _by_target(variants, targets, divergence)
    parts.append(f"<details><summary>KL(dense || pruned), nats per token</summary>\n\n{inner}\n\n</details>")
    return "\n\n".join(parts)


def _by_target(variants: Sequence[Variant], targets: list[str], value: Callable[[str, str], str]) -> str:
    rows = [[variant.name, *(value(variant.name, target) for target in targets)] for variant in variants]
    return table(["", *targets], [row for row in rows if any(row[1:])])


def _measured(results: Results, model: str, variants: Sequence[Variant]) -> list[Result]:
    found = (results.measured(model, variant.name, target) for variant in variants for target in TARGETS)
    return [result for result in found if result]


def _cost(results: Results, model: str, variant: Variant) -> tuple[str, str]:
    found = _measured(results, model, [variant])
    if not found:
        return "", ""
    seconds = statistics.median(result["seconds"] for result in found)
    return f"{seconds:.1f}", f"{max(result['peak_bytes'] for result in found) / 2**20:.0f}"


def settings(model: Model) -> str:
    """On what a model was calibrated and evaluated."""
    fields = model.fields
    text = (
        f"Calibrated on {fields['num_samples']} x {fields['seq_len']} tokens of {fields['calibration']}, evaluated on "
        f"{fields['max_eval_tokens']} tokens of {fields['eval']} in windows of {fields['seq_len']}, {fields['dtype']}."
    )
    for target, sites in model.skip.items():
        text += f" At {target} {', '.join(sites)} stays dense: the pattern does not divide its inputs."
    return text


def failures(results: Results) -> list[str]:
    """The cells that failed and why; nothing where none did."""
    lines = [
        f"- {model}, {target}, {variant.name}: {found['error']}"
        for model in results.models
        for variant in results.grid.variants.values()
        for target in results.grid.targets
        if (found := results.get(model, variant.name, target)) and found["status"] == "failed"
    ]
    return ["## Failed\n\n" + "\n".join(lines)] if lines else []


def state(found: Result) -> str:
    """What stands in place of a perplexity where there is none."""
    if found["status"] == "limit":
        return f"> {found['limit_seconds'] / 60:g} min"
    return "failed" if found["status"] == "failed" else ""


def readme_table(results: Results) -> str:
    """The README's table: the demo model under the main methods and the presets; empty unless all of it was measured."""
    names = [name for name in README_VARIANTS if name in VARIANTS]
    found = {(name, target): results.measured(BUNDLED_MODEL, name, target) for name in names for target in README_TARGETS}
    measured = {key: result for key, result in found.items() if result}
    if len(measured) < len(found):
        return ""
    first = next(iter(measured.values()))
    rows = [["dense", *[number(first["perplexity_dense"])] * len(README_TARGETS), "", ""]]
    for name in names:
        share = results.closed(BUNDLED_MODEL, name, README_COST)
        perplexities = [number(measured[name, target]["perplexity"]) for target in README_TARGETS]
        seconds = measured[name, README_COST]["seconds"]
        rows.append([name, *perplexities, f"{share.mean:.0%}" if share else "", f"{seconds:.0f} s"])
    head = ["perplexity at", *README_TARGETS, f"gap closed, {README_COST}", f"pruning, {README_COST}"]
    note = (
        f"Gap closed: the share of ln(perplexity / dense) that SparseGPT leaves. {settings(results.models[BUNDLED_MODEL])} "
        f"{first['where']}. {LOAD} `make bench-quality` measures it; more sparsities, methods and models, and the noise, "
        "are in [docs/quality.md](docs/quality.md)."
    )
    return f"{table(head, rows)}\n\n{note}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown, all columns but the first to the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
