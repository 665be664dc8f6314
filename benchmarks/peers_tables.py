"""Tables of `make bench-peers`: docs/peers.md, and the short one of the README."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.peers_bars import (
    DENSE,
    FROM_DISK,
    NOTE,
    ONE_PASS,
    OURS,
    PEER,
    PRUNING,
    WALKS,
    WHOLE,
    Cell,
    Cost,
    Results,
    bars,
    cells,
    ratio,
)
from benchmarks.quality_tables import bars_text, number, table

SETTINGS = f"""\
Both tools prune every linear layer of the decoder blocks and leave the head alone, one decoder layer after the other, each on
what the pruned layers before it put out; SparseGPT takes blocks of 128 columns and adds 0.01 of the mean Gram diagonal. What
remains different:

- {PEER} runs every layer twice: once to see its inputs, once to propagate. So does {OURS} (`--sequential block`, the default).
  *{ONE_PASS}* (`--sequential group`) prunes a matrix as soon as its inputs are there, so every layer runs once, and a matrix is
  pruned on inputs that pruned matrices before it in its own layer have made; it holds what batches hold that wait for others.
- *{DENSE}* (`--sequential none --offload disk`, without its cache of statistics) runs every layer
  once too, and prunes all of it on what the dense model puts in: errors of pruned layers do not reach the statistics of later
  ones. The losses say what that is worth.
- Nobody reads what the last layer puts out: {OURS} leaves it after its last matrix's inputs, {PEER} runs it
  twice, and the head. Of two layers that is a larger part than of many.
- *{FROM_DISK}* (`--offload disk`) never holds the model: blocks are read from the checkpoint as they are pruned, and written.
- {PEER} feeds one sequence at a time (its default), {OURS} as many as keep a layer's activations below the hidden states.
- {PEER} sums a Gram matrix for each of the matrices that read one input and factorises it in fp32; {OURS} sums one for all of
  them and factorises it in fp64. Where that fails {PEER} goes on with the identity, {OURS} raises the damping and says so.
- SparseGPT's unstructured mask: {PEER} prunes `score <= threshold`, a weight more than asked in each block of 128 columns;
  {OURS} prunes the exact number.
- {OURS} keeps a journal beside the checkpoint, from which a killed run goes on, and writes a report; {PEER} does neither.
- {OURS} takes what it has imported out of the garbage collector's rounds, as its command line does: some tenths of a second.
- {PEER} traces the model, {OURS} probes it: both count as pruning."""


def line(cell: Cell) -> str:
    """One cell in one line, for the terminal."""
    parts = []
    for name in cell["contestants"]:
        if name != PEER:
            wall, cpu = ratio(cell, name, PRUNING, lambda cost: cost.wall), ratio(cell, name, PRUNING, lambda cost: cost.cpu)
            peak = ratio(cell, name, WHOLE, lambda cost: cost.peak)
            parts.append(f"{name}: wall x {wall:.2f}, processor x {cpu:.2f}, peak memory x {peak:.2f}")
    return "; ".join(parts)


def page(results: Results) -> str:
    """docs/peers.md."""
    parts = [
        f"# {OURS} beside {PEER}",
        "`make bench-peers` measures, and `python -m benchmarks peers --tables` writes this page from the results; no number "
        "here is written by hand.",
        _how(results),
        SETTINGS,
        "## Bars",
        NOTE,
        bars_text(bars(results)),
        *(_model(results, model) for model in results["models"]),
    ]
    return "\n\n".join(parts) + "\n"


def _where(results: Results) -> str:
    """The device, and the threads of the measured processes, which need not be those of the one that starts them."""
    threads = ", ".join(map(str, sorted({cell["threads"] for cell in results["cells"].values()})))
    return f"{results['environment']['device'].partition(' (')[0]}, threads: {threads}"


def _how(results: Results) -> str:
    versions = results["versions"]
    return (
        f"llmcompressor {versions['llmcompressor']}'s `oneshot` and this checkout run in one environment (torch "
        f"{versions['torch']}, transformers {versions['transformers']}) on {_where(results)}. Every run has a process "
        "of its own, in turns and one at a time, and the same tensor of tokens. *Pruning* "
        "begins with the loaded model and ends with the last pruned matrix; *whole* is the process, from imports to the "
        "written checkpoint. The machine was shared with other work: wall seconds are what that left, processor seconds (user "
        "and system) what the tools used. Peak memory is the largest resident set of the process, imports and memory-mapped "
        "weights included; *own* is that above what was resident once the libraries were imported. Both results are judged by "
        "llmprune's evaluator, in the same windows."
    )


def _model(results: Results, model: str) -> str:
    known = results["models"][model]
    samples, length = known["samples"]
    parts = [f"## {model}", f"{known['about'][0].upper()}{known['about'][1:]}; {samples} x {length} calibration tokens."]
    rows, same = [], []
    for name, method, target, cell in cells(results):
        if name != model:
            continue
        for contestant, found in cell["contestants"].items():
            pruning, whole = Cost.of(found["runs"], PRUNING), Cost.of(found["runs"], WHOLE)
            quality = found["quality"]
            rows.append(
                [
                    f"{method}, {target}: {contestant}", _seconds(pruning.wall), _seconds(pruning.cpu), _seconds(whole.wall),
                    _seconds(whole.cpu), f"{whole.peak[0] / 2**20:.0f}", f"{whole.above[0] / 2**20:.0f}",
                    number(math.exp(statistics.fmean(quality["losses"]))) if known["is_trained"] else "",
                    f"{statistics.fmean(quality['kls']):.4f}", f"{quality['num_zeros'] / quality['num_weights']:.4%}",
                ]
            )  # fmt: skip
        share = cell["agreement"]
        same.append(
            [
                f"{method}, {target}", f"{share['first']:.4%}", f"{share['mean']:.4%}", f"{share['worst']:.4%}",
                f"{share['distance']:.1e}",
            ]
        )  # fmt: skip
    head = ["", "pruning s", "CPU s", "whole s", "CPU s", "peak MiB", "own MiB", "perplexity", "KL", "zeros"]
    dense = number(math.exp(statistics.fmean(known["losses"])))
    if known["is_trained"]:
        parts.append(f"Perplexity of the dense model: {dense}.")
    parts += ["Medians, with the least and the greatest of several runs.", table(head, rows)]
    parts += [
        f"Weights that {OURS} and {PEER} both keep or both prune: in the first block, where both see the same inputs, on the "
        "mean of all matrices, and in the one that agrees least; and how far the weights of the first block lie apart, over "
        "their norm. Sums are rounded differently, and in a deep random model the few weights that this tips grow to many.",
        table(["", "first block", "mean", "least", "distance"], same),
    ]
    return "\n\n".join(parts)


def _seconds(spread: tuple[float, float, float]) -> str:
    median, least, greatest = spread
    return f"{median:.1f}" if least == greatest else f"{median:.1f} ({least:.1f} to {greatest:.1f})"


def readme_table(results: dict[str, Any]) -> str:
    """Ratios of the random models' cells, one row for a cell and a walk."""
    rows = []
    for model, method, target, cell in cells(results, is_trained=False):
        for name in (walk for walk in WALKS if walk in cell["contestants"]):
            share: Callable[..., float] = lambda phases, what, cell=cell, name=name: ratio(cell, name, phases, what)
            rows.append(
                [
                    f"{model}, {method}, {target}: {name}", f"{share(PRUNING, lambda cost: cost.wall):.2f}",
                    f"{share(PRUNING, lambda cost: cost.cpu):.2f}", f"{share(WHOLE, lambda cost: cost.wall):.2f}",
                    f"{share(WHOLE, lambda cost: cost.peak):.2f}", f"{share(WHOLE, lambda cost: cost.above):.2f}",
                ]
            )  # fmt: skip
    if not rows:
        return ""
    head = [f"x {PEER}", "pruning, wall", "pruning, CPU", "whole run", "peak memory", "of it above imports"]
    known = {name: model for name, model in results["models"].items() if not model["is_trained"]}
    about = "; ".join(
        f"{name}: {model['about']}, {' x '.join(map(str, model['samples']))} of them" for name, model in known.items()
    )
    note = (
        f"{about}. {_where(results)}, in turns in one run. `make bench-peers` measures it; how, and the "
        "quality of both: [docs/peers.md](docs/peers.md)."
    )
    return table(head, rows) + "\n\n" + note
