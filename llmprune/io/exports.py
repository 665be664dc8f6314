"""A finished report in the formats people pass on: Markdown, HTML, JSON, and CSV for a spreadsheet. Torch-free.

CSV is two files: one row for every site (or module, or block, of a job that made matrices smaller), and beside it, its name
ending in ``-summary``, one row for the job, so that the rows of several jobs make a table.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from llmprune.errors import ConfigError, OutputError, one_line
from llmprune.io.render import recipe, render_html, render_markdown, worst
from llmprune.report import Report, StructureReport

REPORT = "report.json"
Cell = str | int | float | None
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the beginning of a formula."""


def to_json(report: Report) -> str:
    """The report with all of its numbers, as ``report.json`` holds it."""
    return report.model_dump_json(indent=1) + "\n"


def sites_csv(report: Report) -> str:
    """One row for every pruned site; of a structured job for every module or, of pattern ``blocks``, every block."""
    if report.structure:
        return to_csv(
            _blocks(report, report.structure) if report.structure.structure == "blocks" else _modules(report.structure)
        )
    return to_csv(
        {
            "block": block.index,
            "site": site.name,
            "outputs": site.shape[0],
            "inputs": site.shape[1],
            "weights": site.numel,
            "zeros": site.num_zeros,
            "sparsity": site.sparsity,
            "target": report.config.sparsity if site.target is None else site.target,
            "pattern": site.pattern or report.config.pattern,
            "calibration_tokens": site.num_tokens,
            "output_error": site.output_error,
            "fallback": site.fallback,
        }
        for block in report.blocks
        for site in block.sites
    )


def _modules(structure: StructureReport) -> Iterable[Mapping[str, Cell]]:
    for module in structure.modules:
        yield {
            "block": module.block,
            "module": module.name,
            "unit": module.unit,
            "groups": module.num_groups,
            "kept": module.num_kept,
            "sparsity": module.sparsity,
            "parameters_per_group": module.parameters_per_group,
        }


def _blocks(report: Report, structure: StructureReport) -> Iterable[Mapping[str, Cell]]:
    scores = dict(enumerate(structure.block_scores))
    for index in range(report.model.num_blocks):
        yield {"block": index, "removed": int(index in structure.blocks_removed), "score": scores.get(index)}


def summary_csv(report: Report) -> str:
    """One row for the job: what was asked for, the worst text's quality, then all texts', each in columns of its own."""
    config, model, text = report.config, report.model, worst(report.quality)
    row: dict[str, Cell] = {
        "model": model.name,
        "revision": model.revision,
        "recipe": recipe(config),
        "pattern": config.pattern,
        "target": config.sparsity,
        "sparsity": report.sparsity,
        "sparsity_of_model": report.sparsity_of_model,
        "parameters_dense": model.num_parameters,
        "parameters": report.structure.num_parameters if report.structure else model.num_parameters,
        "zeros": report.num_zeros_model,
        "bytes_dense": model.weights_bytes,
        "bytes": report.checkpoint_bytes,
        "verdict": report.verdict.status,
        "text": text.text.source if text else None,
        "perplexity_dense": text.perplexity_dense if text else None,
        "perplexity_pruned": text.perplexity_pruned if text else None,
        "perplexity_ratio": text.ratio if text else None,
        "kl": text.kl if text else None,
        "top1_agreement": text.top1_agreement if text else None,
        "seconds": report.seconds,
        "seed": config.seed,
        "device": report.environment.device,
        "llmprune": report.environment.llmprune,
        "out": report.out,
    }
    writing = report.continuations
    row |= {"writing": writing.verdict.status if writing else None}
    for kind, written in (("dense", writing.diversity_dense), ("pruned", writing.diversity_pruned)) if writing else ():
        if written:
            row |= {f"distinct_2_{kind}": written.distinct_2, f"repeated_{kind}": written.repeated}
    for item in report.quality:
        name = item.text.source
        row |= {f"perplexity_dense {name}": item.perplexity_dense, f"perplexity_pruned {name}": item.perplexity_pruned}
        row |= {f"kl {name}": item.kl}
    for score in report.tasks.scores if report.tasks else ():
        for kind, value, stderr in (
            ("dense", score.dense, score.dense_stderr), ("pruned", score.pruned, score.pruned_stderr)
        ):  # fmt: skip
            row |= {f"{score.task} {score.metric} {kind}": value, f"{score.task} {score.metric} {kind} stderr": stderr}
    for speeds, kind in ((report.latency.dense, "dense"), (report.latency.pruned, "pruned")) if report.latency else ():
        row |= {f"{item.phase}_tokens_per_second_{kind} batch {item.batch_size}": item.tokens_per_second for item in speeds}
    return to_csv([row])


def to_csv(rows: Iterable[Mapping[str, Cell]]) -> str:
    """Rows of the same columns under a header; no text in it can be a formula to a spreadsheet."""
    table = list(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in ([list(table[0])] if table else []) + [list(row.values()) for row in table]:
        writer.writerow([_inert(cell) for cell in row])
    return text.getvalue()


def _inert(cell: Cell) -> Cell:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


FORMATS: dict[str, Callable[[Report], str]] = {
    "md": render_markdown,
    "html": render_html,
    "json": to_json,
    "csv": sites_csv,
}


def check_format(name: str) -> str:
    """A format's name, or ConfigError."""
    if name not in FORMATS:
        raise ConfigError(f"there is no report format {name!r}; the formats are {', '.join(FORMATS)}.")
    return name


def export_paths(wanted: Sequence[str], out: Path) -> tuple[Path, ...]:
    """Where ``--export-report`` writes, checked before the job: beside ``out`` for a format's name, else the file named.

    Raises ConfigError for another ending, and OutputError where the file cannot be.
    """
    paths = []
    for name in wanted:
        path = out.with_name(f"{out.name}-report.{name}") if name in FORMATS else Path(name)
        if path.suffix.removeprefix(".") not in FORMATS:
            raise ConfigError(
                f"--export-report {name} is neither a format nor a file that ends in one; the formats are {', '.join(FORMATS)}."
            )
        if path.is_dir():
            raise OutputError(f"--export-report {name} is a directory; name a file in it, such as {path / 'report.md'}.")
        if out.resolve() in path.resolve().parents:
            raise OutputError(
                f"--export-report {name} lies inside the checkpoint, whose files are counted in its manifest. Name a file "
                f"beside it, or give the format alone: {path.suffix.removeprefix('.')}."
            )
        paths.append(path)
    return tuple(paths)


def export_report(report: Report, path: str | Path) -> tuple[Path, ...]:
    """Write a report in the format that the file's name ends in, over what is there, and return the files written.

    For ``csv`` a second file, its name ending in ``-summary``, holds one row for the job.

    Raises ConfigError for another ending, and OutputError where the file cannot be written.
    """
    path = Path(path)
    texts = {path: FORMATS[check_format(path.suffix.removeprefix("."))](report)}
    if path.suffix == ".csv":
        texts[path.with_name(f"{path.stem}-summary.csv")] = summary_csv(report)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"the report cannot be written to {path} ({one_line(error)}). Choose another file.") from None
    return tuple(texts)


def read_report(path: str | Path) -> Report:
    """The report of a finished checkpoint: of its directory, or of a report.json alone. Raises ConfigError."""
    path = Path(path)
    file = path / REPORT if path.is_dir() else path
    try:
        return Report.model_validate_json(file.read_bytes())
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ConfigError(f"{path} holds no report ({why}): give a checkpoint that llmprune wrote, or its {REPORT}.") from None
    except ValidationError:
        raise ConfigError(
            f"{file} is not a report of llmprune: give a checkpoint that llmprune wrote, or its {REPORT}."
        ) from None
