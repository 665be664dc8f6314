"""What the pages of the project say: their fenced blocks, and the commands in them.

A block of the language ``sh`` or ``python`` is run by a test, unless the line above its fence says why not:

    <!-- not run: needs a GPU -->

Then its commands are parsed all the same, by the command line's own parser.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "triton_kernels" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("sh", "python")
SERVICE = ("serve", "worker", "submit", "submit-auto", "jobs", "sweeps", "keys", "hub-token", "migrate", "quickstart")
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<excuse>[^\n]+) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S
)
_OPERATORS = {"|", "<", ">", "&&", "&", ";"}


@dataclass
class Command:
    """A command of a block: its words, without what the shell does with them."""

    words: list[str]
    line: str
    environment: dict[str, str] = field(default_factory=dict)
    stdin: str | None = None
    stdin_file: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.words[:1] == ["llmprune"] or self.words[:3] == ["python", "-m", "llmprune"]

    @property
    def needs_service(self) -> bool:
        return self.words[0] == "curl" or (self.is_ours and self.words[1:2] != [] and self.words[1] in SERVICE)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, and why it is not run, where it is not."""

    page: Path
    line: int
    language: str
    text: str
    excuse: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[Command]:
        """Of a block of the shell."""
        return [command for line in _lines(self.text) if (command := _command(line))]

    @property
    def needs_service(self) -> bool:
        """Whether a running service is needed for it."""
        if self.language == "python":
            return "llmprune_service" in self.text
        return any(command.needs_service for command in self.commands)


def blocks(page: Path) -> list[Block]:
    """All blocks of a page."""
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start("language")) + 1, found["language"], found["text"], found["excuse"])
        for found in _BLOCK.finditer(text)
    ]


def _lines(text: str) -> Iterator[str]:
    """Logical lines: what ends with a backslash goes on, a here-document is part of its command."""
    rest = iter(text.splitlines())
    for line in rest:
        while line.endswith("\\"):
            line = line[:-1] + " " + next(rest).lstrip()
        if here := re.search(r"<<-?\s*'?(\w+)'?", line):
            while next(rest) != here[1]:
                pass
            line = line[: here.start()]
        yield line


def _command(line: str) -> Command | None:
    """The last command of a line: those before it feed it by a pipe."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    if not words:
        return None
    command = Command([], line)
    if "|" in words:
        before, words = words[: words.index("|")], words[words.index("|") + 1 :]
        command.stdin = " ".join(before[1:]) + "\n" if before[0] == "echo" else ""
    if "<" in words:
        place = words.index("<")
        command.stdin_file, words = words[place + 1], words[:place]
    if operators := _OPERATORS & set(words):
        words = words[: min(map(words.index, operators))]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        command.environment[name] = value
    command.words = words or ["true"]
    return command
