"""Tables of `make bench-structured`: docs/structured_results.csv and docs/structured_results.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.quality_bars import NOTE
from benchmarks.quality_results import Result, Results
from benchmarks.quality_tables import LOAD, bars_text, csv_lines, failures, number, pair, settings, state, table, where
from benchmarks.quality_variants import Model, Variant
from benchmarks.structured_bars import Ratio, bars, cost, curves, ratios, removed
from benchmarks.structured_variants import BLOCKS, SHARES

Timing = dict[str, Any]
_COLUMNS = (
    "removed", "parameters_dense", "parameters", "kv_bytes_dense", "kv_bytes", "stock", "perplexity_dense", "perplexity", "gap",
    "gap_error", "kl", "top1", "seconds", "peak_mib", "tokens", "where",
)  # fmt: skip


def csv_text(results: Results) -> str:
    """A line for every cell that has a result; ``removed`` is a share of what can be taken out, gaps are in nats."""
    return csv_lines(results, _COLUMNS, _values)


def _values(results: Results, model: str, variant: Variant, target: str, found: Result) -> list[str]:
    sizes = found["structure"]
    names = ("num_parameters_dense", "num_parameters", "kv_bytes_dense", "kv_bytes", "stock")
    return [
        f"{removed(found):.6f}", *(str(sizes[name]) for name in names), f"{found['perplexity_dense']:.5f}",
        f"{found['perplexity']:.5f}", *pair(results.gap(model, variant.name, target)), f"{found['kl']:.5f}",
        f"{found['top1']:.5f}", f"{found['seconds']:.2f}", f"{found['peak_bytes'] / 2**20:.1f}", str(found["tokens"]),
        found["where"],
    ]  # fmt: skip


def page(results: Results, timing: Timing) -> str:
    """docs/structured_results.md."""
    parts = [
        "# Structured pruning, measured",
        "`make bench-structured` measures, and `python -m benchmarks structured --tables` writes this page, "
        "[structured_results.csv](structured_results.csv) and the plot "
        "from the results; docs/log.md says which seconds of the first cells were corrected.",
        f"Every cell calibrates, prunes and evaluates in a process of its own. The share asked for is of the parameters of the "
        "attentions and FFNs; *removed* is what really went of them. Variants without a suffix remove that share of all "
        "together (`--budget parameters`), `-kinds` the share of each (the paper's way, where attention can give so much), "
        f"`-uniform` have the same widths in every layer. Gaps are ln(perplexity / dense) in nats per token, {NOTE.lower()} "
        f"{LOAD} {where(results)}",
        "## Bars",
        bars_text(bars(results, timing)),
        "![Gap against pruning time](structured_results.svg)",
        *(part for model in results.models.values() for part in _model(results, model)),
        *_search(results),
        *_speed(timing),
        *failures(results),
    ]
    return "\n\n".join(parts) + "\n"


def _model(results: Results, model: Model) -> list[str]:
    parts = [f"## {model.name}", settings(model)]
    for target in results.grid.targets:
        found = [
            (variant, result)
            for variant in results.grid.variants.values()
            if (result := results.get(model.name, variant.name, target))
        ]
        if found:
            title = "A quarter of the blocks, or the nearest number:" if target == BLOCKS else f"{target} of the modules:"
            parts += [title, _target(results, model.name, target, found)]
    return parts if len(parts) > 2 else [*parts, "No results yet."]


def _target(results: Results, model: str, target: str, found: Iterable[tuple[Variant, Result]]) -> str:
    head = ["", "removed", "left of the model", "KV cache", "perplexity", "gap", "KL", "top-1", "seconds", "MiB"]
    rows: list[list[str]] = []
    for variant, result in found:
        if result["status"] != "ok":
            rows.append([variant.name, "", "", "", state(result), *[""] * (len(head) - 5)])
            continue
        sizes, gap = result["structure"], results.gap(model, variant.name, target)
        assert gap
        if not rows:
            rows.append(["dense", "", "", "", number(result["perplexity_dense"]), *[""] * (len(head) - 5)])
        blocks = f" (blocks {', '.join(map(str, sizes['blocks_removed']))})" if sizes["blocks_removed"] else ""
        rows.append(
            [
                variant.name + blocks, f"{removed(result):.2%}",
                f"{sizes['num_parameters'] / sizes['num_parameters_dense']:.1%}",
                f"{sizes['kv_bytes'] / sizes['kv_bytes_dense']:.0%}", number(result["perplexity"]),
                f"{gap.mean:.4f} ± {gap.error:.4f}", f"{result['kl']:.4f}", f"{result['top1']:.1%}", f"{result['seconds']:.1f}",
                f"{result['peak_bytes'] / 2**20:.0f}",
            ]
        )  # fmt: skip
    return table(head, rows)


def _search(results: Results) -> list[str]:
    """What the searches cost, and what the plan's formulas say of it."""
    rows = []
    for model in results.models:
        for share in SHARES:
            for variant in results.grid.variants:
                found = results.measured(model, variant, share)
                known = cost(found) if found else None
                if found is None or known is None:
                    continue
                seconds, planned, ratio = known
                falls = "; ".join(f"{curve[0]:.4f} to {curve[-1]:.4f}" for curve in curves(found))
                biggest = max(one["supernet_bytes"] for one in found["structure"]["iterations"])
                rows.append(
                    [
                        f"{model}, {share}, {variant}", falls, f"{found['kl']:.4f}", f"{seconds:.2f}", f"{planned:.2f}",
                        f"{seconds / planned:.2f}", f"{biggest / 2**20:.1f}", ", ".join(f"{one:.2f}" for one in ratio),
                    ]
                )  # fmt: skip
    if not rows:
        return []
    head = ["", "KL of the iterations", "KL on other text", "CPU s a generation", "formula", "ratio", "MiB", "MiB, of the plan"]
    note = (
        "The formula is the token-forwards of a generation times the seconds of a token in a plain forward of the dense model, "
        "timed in the same process before the search; both are in seconds of a processor, whatever else the machine does. "
        "Candidates are smaller than the dense model and share the blocks in which they are alike, which it does not count; a "
        "chunk of a draw is smaller than one of the plain forward. The bytes of a supernet are those of what is stored; from "
        "the second on it stands around what was found, which the plan cannot know."
    )
    return ["## The search", table(head, rows), note]


def _speed(timing: Timing) -> list[str]:
    """Time of the sliced models over that of the dense ones."""
    found = ratios(timing)
    if not found:
        return []
    environment = timing["environment"]
    note = (
        f"Dense and sliced models take turns in one process, on {environment['num_threads']} thread of "
        f"{environment['device']}, torch {environment['torch']}, timed by the seconds in which it had a processor. Ratios are "
        f"of medians, of {_repeats(found)} runs, with the quartiles of the sliced model over the dense median. Decode "
        "generates 8 tokens after 16. *Saved* is the share of the time that went over the share of the blocks' parameters that "
        "went: 100 % is in proportion. The demo model and the stories are so small that calls take most of the time, not "
        "matrix products; the random models show the rest. Norms, embedding and head do not shrink, and attention scores only "
        "with its heads."
    )
    head = ["", "point", "blocks' parameters", "time", "quartiles", "saved"]
    return ["## Time of sliced models", note, table(head, [_speed_row(ratio) for ratio in found])]


def _speed_row(ratio: Ratio) -> Sequence[str]:
    low, high = (seconds / ratio.dense["seconds"] for seconds in ratio.row["quartiles"])
    saved = (1 - ratio.time) / (1 - ratio.blocks)
    return [
        f"{ratio.row['model']}: {ratio.row['cut']}", ratio.point, f"x {ratio.blocks:.2f}", f"x {ratio.time:.2f}",
        f"{low:.2f} to {high:.2f}", f"{saved:.0%}",
    ]  # fmt: skip


def _repeats(found: Sequence[Ratio]) -> str:
    numbers = sorted({ratio.row["repeats"] for ratio in found})
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
