"""Tables for the terminal beside the report's: plan, inspection, evaluation, methods. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from llmprune.console import print_tasks, printable
from llmprune.io.render import NOTHING, count, duration, number, percent, rate, size, small
from llmprune.methods import REFINED, Method
from llmprune.report import Conversion, Evaluation, Fetched, Inspection, Plan, SiteInfo


def print_plan(plan: Plan, console: Console) -> None:
    """What will be pruned, what it needs, what there is."""
    facts = _facts(f"Plan for {printable(plan.model.name)}")
    parts = f"{plan.num_sites} sites"
    if plan.num_modules is not None:
        parts = f"{plan.num_sites} matrices of {plan.num_modules} modules"
    facts.add_row("Pruned", f"{count(plan.num_pruned_weights)} weights, {parts}, {plan.model.num_blocks} blocks")
    if plan.left:
        name, why = next(iter(plan.left.items()))
        facts.add_row("Left whole", printable(f"{len(plan.left)} modules, e.g. {name}: {why}"))
    facts.add_row("Walk", f"{plan.walk}, {plan.batch_size} sequences of {plan.seq_len} tokens per forward")
    facts.add_row("Tokens", f"{count(plan.calibration_tokens)} calibration, about {count(plan.evaluation_tokens)} evaluation")
    where = {"device": "on it", "cpu": "in CPU memory", "disk": "on disk, a block in memory at a time"}[plan.weights_place]
    waiting = {"device": "on it", "cpu": "in CPU memory", "disk": "in files of the work directory"}[plan.hidden_place]
    facts.add_row("Device", f"{plan.device}, weights {where}, hidden states {waiting}")
    facts.add_row("CPU memory", f"{size(plan.peak_cpu_bytes)} at the peak, {size(plan.free_cpu_bytes)} available")
    if plan.peak_gpu_bytes:
        facts.add_row("GPU memory", f"{size(plan.peak_gpu_bytes)} at the peak, {size(plan.free_gpu_bytes)} available")
    facts.add_row("Disk", f"{size(plan.disk_bytes)}, {size(plan.free_disk_bytes)} available")
    facts.add_row("Download", size(plan.download_bytes) if plan.download_bytes else "nothing")
    facts.add_row("Time", f"about {duration(plan.seconds)}")
    console.print(facts)
    stages = _table("Stage", "about", "CPU peak", "GPU peak")
    for stage in plan.stages:
        gpu = size(stage.peak_gpu_bytes) if plan.peak_gpu_bytes else NOTHING
        stages.add_row(stage.name, duration(stage.seconds), size(stage.peak_cpu_bytes), gpu)
    console.print(stages)
    for problem in plan.problems:
        console.print(f"Does not fit: {problem}", style="bold red", markup=False, soft_wrap=True)


def print_inspection(inspection: Inspection, console: Console) -> None:
    """One row a kind of site; blocks that look alike are folded into one line."""
    model = inspection.model
    facts = _facts(printable(model.name))
    facts.add_row("Model", f"{model.model_type}, {model.dtype}, {count(model.num_parameters)} parameters")
    facts.add_row("Prunable", f"{count(model.num_prunable)} ({percent(model.num_prunable / model.num_parameters)})")
    facts.add_row("Blocks", f"{model.num_blocks} in {inspection.stack}")
    facts.add_row("Embeddings", "tied to the head" if inspection.tied_embeddings else "not tied")
    console.print(facts)
    for first, last, sites in _alike(inspection.blocks):
        table = _table(f"Block {first}" if first == last else f"Blocks {first}-{last}", "shape", "input", "zeros")
        for site in _folded(sites):
            table.add_row(*site)
        console.print(table)
    console.print(f"Never pruned: {len(inspection.not_pruned)} matrices (embeddings, head, routers, convolutions)")


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Perplexity and divergence of one model."""
    table = _table(printable(evaluation.model), "seq_len", "perplexity", "dense", "KL", "top-1")
    for item in evaluation.quality:
        table.add_row(
            printable(item.text.source), str(item.text.seq_len), number(item.perplexity_pruned),
            number(item.perplexity_dense), small(item.kl), percent(item.top1_agreement),
        )  # fmt: skip
    if evaluation.quality:
        console.print(table)
    if evaluation.tasks:
        print_tasks(evaluation.tasks, console)
    for speed in evaluation.latency.pruned if evaluation.latency else ():
        what = f"{speed.num_tokens} tokens, batch {speed.batch_size}"
        console.print(f"{speed.phase}: {rate(speed.tokens_per_second)} tokens/s ({what})")


def print_fetched(fetched: Fetched, console: Console) -> None:
    """What lies ready, and where the next job may run."""
    facts = _facts(f"Fetched {printable(fetched.model)}")
    facts.add_row("Revision", printable(fetched.revision))
    facts.add_row("Weights", size(fetched.weights_bytes))
    facts.add_row("Texts", printable(", ".join(fetched.texts)) or "none")
    console.print(facts)


def print_conversion(conversion: Conversion, console: Console) -> None:
    """What was packed or made dense, what was not, and the bytes it takes."""
    facts = _facts(f"{printable(conversion.model)}, {conversion.to}")
    if conversion.packed:
        packed = conversion.packed
        facts.add_row("2:4", f"{count(packed.num_two_four)} matrices")
        facts.add_row("Bitmask", f"{count(packed.num_bitmask)} matrices")
        facts.add_row("Packed", f"{size(packed.packed_bytes)} for {size(packed.dense_bytes)} ({percent(packed.ratio, 1)})")
    else:
        facts.add_row("Unpacked", f"{count(conversion.num_layers)} matrices")
    facts.add_row("Weights", f"{size(conversion.bytes_before)} before, {size(conversion.bytes_after)} now")
    facts.add_row("Time", duration(conversion.seconds))
    console.print(facts)
    for warning in conversion.warnings:
        console.print(f"Note: {printable(warning)}", markup=False, soft_wrap=True)


def print_methods(methods: Iterable[Method], console: Console) -> None:
    """The registry, one method a row."""
    table = _table("Method", "scope", "needs", "weights", "what it does")
    table.columns[-1].justify = "left"
    for method in methods:
        weights = "smaller" if method.structure else "updated" if method.updates_weights else "kept"
        table.add_row(
            method.name,
            method.structure or method.scope,
            method.needs.name.lower(),
            weights,
            f"{method.summary}\n{method.paper}",
        )
    for name, summary in REFINED.items():
        table.add_row(name, NOTHING, "gradients", "kept", summary)
    console.print(table)


def _alike(blocks: tuple[tuple[SiteInfo, ...], ...]) -> list[tuple[int, int, tuple[SiteInfo, ...]]]:
    """Runs of consecutive blocks whose sites have the same names, shapes and number of zeros."""
    runs: list[tuple[int, int, tuple[SiteInfo, ...]]] = []
    for index, sites in enumerate(blocks):
        if runs and _signature(runs[-1][2]) == _signature(sites):
            runs[-1] = (runs[-1][0], index, runs[-1][2])
        else:
            runs.append((index, index, sites))
    return runs


def _signature(sites: tuple[SiteInfo, ...]) -> list[tuple[str, tuple[int, int], bool]]:
    return [(_local(site.name), site.shape, bool(site.num_zeros)) for site in sites]


def _local(name: str) -> str:
    """The part of a site's name after the block's number."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[first + 1 :])


def _folded(sites: tuple[SiteInfo, ...]) -> list[tuple[str, str, str, str]]:
    """Rows for a block; the experts of one parameter share a row. Inputs are lettered: equal letters, one tensor."""
    letters: dict[int | None, str] = {}
    rows: dict[str, list[SiteInfo]] = {}
    for site in sites:
        name = _local(site.name)
        stem, _, leaf = name.rpartition(".")
        rows.setdefault(f"{stem}.*" if leaf.isdigit() else name, []).append(site)
    result = []
    for name, group in rows.items():
        numbers = Counter(site.input_group for site in group)
        letter = "own" if len(numbers) > 1 else letters.setdefault(group[0].input_group, chr(ord("a") + len(letters)))
        zeros = sum(site.num_zeros or 0 for site in group) / sum(site.shape[0] * site.shape[1] for site in group)
        shape = f"{group[0].shape[0]} x {group[0].shape[1]}"
        result.append((name, shape if len(group) == 1 else f"{len(group)} of {shape}", letter, percent(zeros)))
    return result


def _facts(title: str) -> Table:
    table = Table(title=title, box=None, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column()
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for other in others:
        table.add_column(other, justify="right")
    return table
