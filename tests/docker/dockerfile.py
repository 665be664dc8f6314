"""Reads what the container images are made from: the Dockerfile into stages, .dockerignore into an answer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGETS = ("web", "worker")


@dataclass(frozen=True)
class Instruction:
    """One instruction: keyword in capitals, the rest on one line."""

    keyword: str
    rest: str

    @property
    def flags(self) -> list[str]:
        """The leading --name=value words."""
        return list(takewhile(lambda word: word.startswith("--"), self.rest.split()))

    @property
    def exec_form(self) -> list[str]:
        """The JSON array it ends in, for CMD, ENTRYPOINT and HEALTHCHECK."""
        words: list[str] = json.loads(self.rest[self.rest.index("[") :])
        return words

    def context_paths(self) -> list[str]:
        """What it takes from the build context; '.' is all of it."""
        if self.keyword not in ("COPY", "ADD") or any(flag.startswith("--from=") for flag in self.flags):
            return []
        return self.rest.split()[len(self.flags) : -1]


@dataclass
class Stage:
    """A stage: what it is built from, and its instructions."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Dockerfile:
    """The ARGs above the first FROM, and the stages by name, in order."""

    arguments: dict[str, str]
    stages: dict[str, Stage]

    def chain(self, target: str) -> list[Instruction]:
        """All instructions of a stage, those of its base stages first."""
        stage = self.stages[target]
        return [*(self.chain(stage.base) if stage.base in self.stages else []), *stage.instructions]

    def last(self, target: str, keyword: str) -> Instruction:
        """The instruction that holds, of those that replace each other."""
        return [instruction for instruction in self.chain(target) if instruction.keyword == keyword][-1]

    def images(self) -> list[str]:
        """The images from outside, with the default of their argument."""
        bases = [stage.base for stage in self.stages.values() if stage.base not in self.stages]
        return [re.sub(r"\$\{(\w+)\}", lambda match: self.arguments[match[1]], base) for base in bases]


def read() -> Dockerfile:
    """The Dockerfile of this repository."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    found = Dockerfile({}, {})
    for line in "\n".join(lines).replace("\\\n", "").splitlines():
        if not line.strip():
            continue
        keyword, rest = line.split(maxsplit=1)
        if keyword == "FROM":
            base, _, name = rest.split()
            stage = found.stages[name] = Stage(name, base)
        elif not found.stages:
            name, _, value = rest.partition("=")
            found.arguments[name] = value
        else:
            stage.instructions.append(Instruction(keyword, rest))
    return found


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file out of the build context: the last pattern that matches it or a parent holds."""
    parts = path.split("/")
    parents = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
            if any(re.fullmatch(pattern, parent) for parent in parents):
                ignored = not line.startswith("!")
    return ignored
