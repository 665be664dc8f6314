"""The site is whole: every page is in its menu, every link leads somewhere, and what the code offers is described."""

from __future__ import annotations

import inspect
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml

import llmprune
from documented import PAGES, ROOT, RUN, Block, blocks
from llmprune_service import client
from llmprune_service.api.errors import _CODES
from scripts import docs_reference, docs_source

SPAN = re.compile(r"`(llmprune [^`\n]+)`")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
SOURCES = sorted((ROOT / "service" / "llmprune_service").rglob("*.py"))
COMMANDS = dict(docs_reference.commands())
WRITTEN = [
    ROOT / "docs" / page
    for page in ("reference/cli.md", "reference/python.md", "reference/rest.md", "reference/errors.md", "examples.md")
]
PUBLIC = [getattr(llmprune, name) for name in llmprune.__all__ if inspect.isfunction(getattr(llmprune, name))]
BLOCKS = [block for page in PAGES for block in blocks(page)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as `make docs` gives them to mkdocs."""
    out = tmp_path_factory.mktemp("site") / "docs"
    docs_source.main(out)
    return out


def named(entry: Any) -> list[str]:
    """The pages of a part of the menu."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in named(part)]


def anchors(text: str) -> set[str]:
    """Of the headings of a page, as Python-Markdown makes them; of what mkdocstrings will put there, its name."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = []
    for heading in HEADING.findall(text):
        plain = re.sub(r"\]\([^)]*\)|[`*\[\]\\]", "", heading)
        plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        found.append(docs_reference.slug(plain))
    return set(found)


def test_the_menu_has_every_page_once(site: Path) -> None:
    """And none that is not there."""
    menu = named(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(menu) > 30
    assert sorted(menu) == sorted(page.relative_to(site).as_posix() for page in site.rglob("*.md"))


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    """To a file, and to a heading where it names one; nothing of it lies outside."""
    pages = {page: page.read_text() for page in site.rglob("*.md")}
    targets = [
        (page, *link.partition("#")[::2])
        for page, text in pages.items()
        for part in docs_source.FENCE.split(text)[::2]
        for link in docs_source.LINK.findall(part)
        if "://" not in link
    ]
    assert len(targets) > 100
    for page, path, anchor in targets:
        target = (page.parent / path).resolve() if path else page
        assert target.is_file() and target.is_relative_to(site), f"{page.relative_to(site)}: {path}"
        assert not anchor or target.suffix != ".md" or anchor in anchors(pages[target]), (
            f"{page.relative_to(site)}: {path}#{anchor}"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_the_repository_leads_somewhere(page: Path) -> None:
    """Whoever reads the pages where they lie follows the same links, but for those to pages that are written from the code."""
    for part in docs_source.FENCE.split(page.read_text())[::2]:
        for link in docs_source.LINK.findall(part):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if "://" in link or target in WRITTEN:
                continue
            assert target.exists(), link
            assert not anchor or target.suffix != ".md" or anchor in anchors(target.read_text()), link


def test_the_pages_that_are_written_are_the_known_ones(site: Path) -> None:
    """And are not in the repository."""
    assert sorted(docs_reference.pages()) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in WRITTEN)
    assert not any(page.exists() for page in WRITTEN)


def test_nothing_is_left_to_fill_in(site: Path) -> None:
    """Measured tables stand where their marks were, with numbers of the results."""
    texts = {page.relative_to(site).as_posix(): page.read_text() for page in site.rglob("*.md")}
    assert not [page for page, text in texts.items() if "<!-- measured:" in text or "<!-- readme:" in text]
    row = next(
        row
        for row in docs_source.results("quality.csv")
        if (row["model"], row["target"], row["variant"]) == ("demo", "60 %", "wanda")
    )
    assert f"{float(row['perplexity']):.2f}" in texts["methods/wanda.md"]
    assert sum("Perplexity on held-out text" in text for text in texts.values()) > 12


def test_nobody_asks_for_what_was_not_measured() -> None:
    """A name that the results do not have ends the build."""
    with pytest.raises(SystemExit, match="Nothing was measured of wandering"):
        docs_source.fill("<!-- measured: quality wanda wandering -->")


# Reference ------------------------------------------------------------------------------------------------------------


def test_the_reference_has_every_public_name(site: Path) -> None:
    """Functions for mkdocstrings to describe, classes of fields with all of these."""
    page = (site / "reference" / "python.md").read_text()
    for name in set(llmprune.__all__) - {"__version__"}:
        described = f"::: llmprune.{name}\n" in page or f"### {name}\n" in page
        assert described or f"| `{name}` |" in (site / "reference" / "errors.md").read_text(), name
    for field in llmprune.PruneConfig.model_fields:
        assert f"| `{field}` |" in page


@pytest.mark.parametrize("thing", [*PUBLIC, *vars(client.Client).values()], ids=lambda thing: getattr(thing, "__name__", None))
def test_arguments_are_described_by_their_names(thing: Any) -> None:
    """One a line: what reads the docstrings for the site knows no `x, y:`, and ends the build."""
    section = (inspect.getdoc(thing) or "").partition("Args:\n")[2].partition("\n\n")[0] if inspect.isfunction(thing) else ""
    for name in re.findall(r"^    (\S[^:]*):", section, re.MULTILINE):
        assert name in inspect.signature(thing).parameters


def test_the_reference_has_every_endpoint(site: Path) -> None:
    """With its parameters; each says what it does."""
    page = (site / "reference" / "rest.md").read_text()
    operations = list(docs_reference.operations(docs_reference.openapi()))
    assert len(operations) > 25
    for method, path, operation in operations:
        section = page.partition(f"### {method} {path}\n")[2].partition("\n### ")[0]
        assert operation["summary"] in section and operation["description"].split("<")[0].split("|")[0][:40] in section
        for parameter in operation.get("parameters", ()):
            assert f"| `{parameter['name']}` |" in section


def test_the_reference_has_every_command_and_option(site: Path) -> None:
    """Each with a sentence."""
    page = (site / "reference" / "cli.md").read_text()
    assert len(COMMANDS) > 20 and "object at 0x" not in page and "bound method" not in page.lower()
    for name, command in COMMANDS.items():
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert command.help.split(".")[0].split("<")[0] in section
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                assert re.search(rf"`[^`]*{parameter.opts[0]}\b[^`]*` \| ", section), (name, parameter.opts)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_by_hand(name: str) -> None:
    """In the guides, not by what is written from --help alone."""
    guides = "".join((ROOT / "docs" / page).read_text() for page in ("guide.md", "service.md", "structured.md", "processes.md"))
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            assert re.search(rf"{parameter.opts[0]}(?![\w-])", guides), parameter.opts[0]


def test_every_problem_of_the_service_is_explained() -> None:
    """The codes the service's code answers with, and those of failed jobs."""
    sources = "".join(file.read_text() for file in SOURCES)
    problems = set(re.findall(r'(?:Problem\(\s*\d+,|_refusal\()\s*"([a-z_-]+)"', sources)) | set(_CODES.values())
    failures = set(re.findall(r'(?:JobFailed|ChildFailed|execution\.fail)\(\s*"([a-z_]+)"', sources))
    assert len(problems) > 30 and len(failures) > 3
    section = (ROOT / "docs" / "service.md").read_text().partition("## Errors")[2]
    assert [code for code in problems | failures if f"`{code}`" not in section] == []


# Commands -------------------------------------------------------------------------------------------------------------


def of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and its arguments."""
    rest = words[3:] if words[0] == "python" else words[1:]
    for length in (2, 1):
        if command := COMMANDS.get(" ".join(["llmprune", *rest[:length]])):
            return command, rest[length:]
    pytest.fail(f"there is no command {' '.join(words)}")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_commands_can_be_parsed(block: Block) -> None:
    """Those that are run elsewhere, and those that say why they are not; `make` has the verbs that it is told."""
    assert block.language not in ("bash", "console", "shell"), "blocks of the shell are of the language sh"
    assert block.excuse is None or block.language in RUN
    if block.language != "sh":
        assert "llmprune " not in block.text.splitlines()[0] or block.language, "commands stand in blocks of the language sh"
        return
    for command in block.commands:
        words = command.words
        if "llmprune" in words and words[0] in ("accelerate", "torchrun"):
            words = words[words.index("llmprune") :]
        if words[:2] in (["llmprune", "--version"], ["llmprune", "--help"]):
            continue
        if words[0] == "llmprune":
            found, arguments = of(words)
            found.make_context(found.name, arguments)
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words[1]
        else:
            assert block.excuse or command.needs_service, f"{command.line!r} is not run by any test: say why"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_in_sentences_have_the_options_they_name(page: Path) -> None:
    """Code in a line of text may leave out what else a command needs."""
    for span in SPAN.findall(page.read_text()):
        words = span.split()
        if words[1].startswith("-") or words[1] == "keys" or "..." in words[1]:
            continue
        if words[1:2] == ["jobs"] and len(words) == 2:
            continue
        command, arguments = of(words)
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        assert {word for word in arguments if word.startswith("--")} <= known, span
