"""Write the pages of the documentation site to a folder: those of docs/, with measured tables filled in, and the references.

    python scripts/docs_source.py build/docs

In a page ``<!-- measured: quality wanda ria -->`` becomes a table of those variants from docs/quality.csv, ``structured`` from
docs/structured_results.csv, and ``<!-- readme: speed -->`` the table that a benchmark wrote into the README. Links to files of
the repository that are no pages lead to copies of them.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "service", "triton_kernels")]

from scripts import docs_reference  # noqa: E402

MOVED = {"CHANGELOG.md": "changelog.md", "triton_kernels/README.md": "kernels.md"}
"""Pages whose source lies elsewhere."""
STANDS_FOR = {"README.md": "index.md", "examples": "examples.md"}
"""Pages that a link to a file which is none leads to."""
LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")
FENCE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def main(out: Path) -> None:
    """Write all pages; what the folder held before is gone."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "docs", out)
    for source, page in MOVED.items():
        shutil.copy(ROOT / source, out / page)
    sources = {page.relative_to(out).as_posix(): f"docs/{page.relative_to(out).as_posix()}" for page in out.rglob("*.md")}
    sources |= {page: source for source, page in MOVED.items()}
    for page, source in sources.items():
        text = fill((out / page).read_text())
        text = text.replace("<details>", "<details markdown>")
        (out / page).write_text(outside_code(text, lambda part, page=page, source=source: relink(part, page, source, out)))
    for page, text in docs_reference.pages().items():
        (out / page).parent.mkdir(exist_ok=True)
        (out / page).write_text(text)


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Change the text but for code in fences and spans."""
    parts = FENCE.split(text)
    return "".join(part if number % 2 else change(part) for number, part in enumerate(parts))


def relink(text: str, page: str, source: str, out: Path) -> str:
    """Links of a file of the repository, as they are on a page of the site; files that are no pages are copied."""

    def new(link: re.Match[str]) -> str:
        target, mark, anchor = link[1].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        path = Path(os.path.normpath(ROOT / Path(source).parent / target)).relative_to(ROOT).as_posix()
        place = place_of(path)
        if place is None:
            if not (ROOT / path).is_file():
                raise SystemExit(f"{source}: {link[1]} leads nowhere.")
            place = f"source/{path}"
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, out / place)
        return f"]({os.path.relpath(place, Path(page).parent)}{mark}{anchor})"

    return LINK.sub(new, text)


def place_of(path: str) -> str | None:
    """Where a file of the repository is on the site; None for what is not there."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("examples/"):
        return f"examples.md#{docs_reference.slug(Path(path).name)}"
    return MOVED.get(path) or STANDS_FOR.get(path)


def fill(text: str) -> str:
    """Measured tables in place of their marks."""
    text = re.sub(r"<!-- measured: (\w+) ([^>]+) -->", lambda mark: TABLES[mark[1]](mark[2].split()), text)
    return re.sub(r"<!-- readme: (\w+) -->", lambda mark: readme_table(mark[1]), text)


def quality_table(variants: Sequence[str]) -> str:
    """Perplexity of the variants at every target, the dense model's first."""
    rows = [row for row in results("quality.csv") if row["status"] == "ok"]
    found = [row for row in rows if row["variant"] in variants]
    return table(found, variants, "perplexity", lambda row: f"{float(row['perplexity']):.2f}") + (
        "\n\nPerplexity on held-out text, and the median seconds of a run; how it was measured, and on what: "
        "[quality](../quality.md).\n"
    )


def structured_table(variants: Sequence[str]) -> str:
    """The same of what makes matrices smaller, with the share of the blocks' parameters that went."""
    found = [row for row in results("structured_results.csv") if row["status"] == "ok" and row["variant"] in variants]
    cell = lambda row: f"{float(row['perplexity']):.2f} (-{1 - int(row['parameters']) / int(row['parameters_dense']):.0%})"
    return table(found, variants, "perplexity (parameters)", cell) + (
        "\n\nPerplexity on held-out text, in brackets the share of the model's parameters that went, and the median seconds of "
        "a run; how it was measured: [structured pruning](../structured_results.md).\n"
    )


def table(rows: Sequence[dict[str, str]], variants: Sequence[str], what: str, cell: Callable[[dict[str, str]], str]) -> str:
    """A row for each model and variant, a column for each target."""
    missing = set(variants) - {row["variant"] for row in rows}
    if missing:
        raise SystemExit(f"Nothing was measured of {', '.join(sorted(missing))}.")
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = [[what, *targets, "seconds"]]
    for model in dict.fromkeys(row["model"] for row in rows):
        here = [row for row in rows if row["model"] == model]
        lines.append([f"**{model}**, dense {float(here[0]['perplexity_dense']):.2f}", *[""] * len(targets), ""])
        for variant in variants:
            cells = {row["target"]: row for row in here if row["variant"] == variant}
            if cells:
                seconds = statistics.median(float(row["seconds"]) for row in cells.values())
                values = [cell(cells[target]) if target in cells else "" for target in targets]
                lines.append([f"`{variant}`", *values, f"{seconds:.0f}"])
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|---|" + "---:|" * (len(targets) + 1), *body])


def results(name: str) -> list[dict[str, str]]:
    """The rows of a benchmark's results."""
    with (ROOT / "docs" / name).open() as file:
        return list(csv.DictReader(file))


def readme_table(name: str) -> str:
    """What a benchmark wrote into the README between its marks."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", (ROOT / "README.md").read_text(), re.DOTALL)
    if not found:
        raise SystemExit(f"The README has no table {name}.")
    return found[1].replace("(docs/", "(")


TABLES = {"quality": quality_table, "structured": structured_table}

if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
