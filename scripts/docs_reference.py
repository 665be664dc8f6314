"""The pages that are written from the code: the command line, Python, the REST API, errors, and the examples."""

from __future__ import annotations

import ast
import inspect
import re
import tempfile
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

import llmprune
from llmprune import errors, events
from llmprune.cli import with_plugins
from llmprune_service import client

ROOT = Path(__file__).resolve().parents[1]
ROLE = re.compile(r":(?:func|mod|class|meth):`~?([^`]*)`")
METHODS = ("get", "post", "patch", "delete", "head", "put")


def pages() -> dict[str, str]:
    """The text of each page, by its place on the site."""
    return {
        "reference/cli.md": cli_page(),
        "reference/python.md": python_page(),
        "reference/rest.md": rest_page(),
        "reference/errors.md": errors_page(),
        "examples.md": examples_page(),
    }


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def cell(text: object) -> str:
    """One cell of a table; what looks like HTML is text."""
    return re.sub(r"([|*\[\]])", r"\\\1", " ".join(str(text).split()).replace("<", "&lt;"))


def table(head: str, rows: list[tuple[object, ...]]) -> str:
    """A table of markdown; the first cell of a row is code."""
    names = head.split(" | ")
    lines = [f"| {head} |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *(f"| `{row[0]}` | {' | '.join(map(cell, row[1:]))} |" for row in rows)])


# The command line ---------------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its whole name."""

    def below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        if not hasattr(command, "commands"):
            yield name, command
            return
        for word, sub in command.commands.items():
            yield from below(f"{name} {word}", sub)

    yield from below("llmprune", typer.main.get_command(with_plugins()))


def cli_page() -> str:
    """Every command with its arguments and options, as --help has them."""
    parts = [
        "# Command line",
        "Exit codes: 0 done, 2 your mistake, with its remedy in one line, 1 ours. With `--json` a command prints one object on "
        "stdout, and everything else on stderr. `llmprune --version` prints the version.",
    ]
    for name, command in commands():
        context = command.make_context(name, [], resilient_parsing=True)
        words = [word for parameter in command.params for word in parameter.get_usage_pieces(context)]
        rows: list[tuple[object, ...]] = [
            record for parameter in command.params if (record := parameter.get_help_record(context))
        ]
        parts += [
            f"## {name}",
            (command.help or "").strip().replace("<", "&lt;"),
            f"    {' '.join([name, *words, '[OPTIONS]'])}",
        ]
        if rows:
            parts.append(table("argument or option | meaning", rows))
        if command.epilog:
            parts.append(re.sub(r"^Example: (.*)$", r"Example: `\1`", command.epilog))
    return "\n\n".join(parts) + "\n"


# Python -------------------------------------------------------------------------------------------------------------------


def python_page() -> str:
    """The public names of the library and of the service's client."""
    public = [(name, getattr(llmprune, name)) for name in llmprune.__all__ if not name.startswith("__")]
    functions = [f"::: llmprune.{name}" for name, value in public if inspect.isfunction(value)]
    parts = [
        "# Python",
        "`import llmprune` is quick and imports no torch; the first call does. Names that are not on this page may change.",
        "## Functions", *functions,
        "## The description of a job", model_text(llmprune.PruneConfig),
        "## What comes back",
        "Units are in the names. Every object has `model_dump_json()`; `report.json` of a checkpoint is a `Report`.",
        *(model_text(kind) for kind in results()),
        "## Events", _first(events), table("event | fields | when", [_event(kind) for kind in event_kinds()]),
        "## The client of a service", "`from llmprune_service.client import Client, enqueue`",
        *(f"::: llmprune_service.client.{name}" for name in sorted(client.__all__)),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def results() -> list[type[BaseModel]]:
    """Report first, then everything that it and the other public classes are made of."""
    found: dict[type[BaseModel], None] = {}

    def add(kind: Any) -> None:
        for inner in typing.get_args(kind):
            add(inner)
        if inspect.isclass(kind) and issubclass(kind, BaseModel) and kind not in found:
            found[kind] = None
            for field in kind.model_fields.values():
                add(field.annotation)

    for name in llmprune.__all__:
        add(getattr(llmprune, name))
    del found[llmprune.PruneConfig]
    return sorted(found, key=lambda kind: (kind is not llmprune.Report, kind.__name__))


def event_kinds() -> list[type[BaseModel]]:
    """All events."""
    found = [kind for kind in vars(events).values() if inspect.isclass(kind) and "event" in getattr(kind, "model_fields", {})]
    return [kind for kind in found if kind.__module__ == events.__name__]


def model_text(kind: type[BaseModel]) -> str:
    """A class of fields: what it is, and a table of them."""
    rows: list[tuple[object, ...]] = []
    for name, field in kind.model_fields.items():
        default = "" if field.is_required() else f"Default: {field.get_default(call_default_factory=True)!r}."
        if len(default) > 60:
            default = ""
        rows.append((name, _type(field.annotation), " ".join(filter(None, (field.description, default)))))
    for name, computed in kind.model_computed_fields.items():
        rows.append((name, _type(computed.return_type), f"{computed.description or ''} Computed."))
    return f"### {kind.__name__}\n\n{_first(kind)}\n\n{table('field | type | meaning', rows)}"


def _event(kind: type[BaseModel]) -> tuple[object, ...]:
    fields = [name for name in kind.model_fields if name != "event"]
    return kind.model_fields["event"].default, ", ".join(fields), _first(kind)


def _first(thing: object) -> str:
    """The docstring, without what is set for the eye of a reader of code."""
    return ROLE.sub(r"`\1`", (inspect.getdoc(thing) or "").split("\n\n    ")[0].replace("``", "`"))


def _type(annotation: object) -> str:
    text = annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text).replace("typing.", "")


# REST ---------------------------------------------------------------------------------------------------------------------


def openapi() -> dict[str, Any]:
    """What /openapi.json of a service is."""
    from llmprune_service.api.app import create_app
    from llmprune_service.settings import Settings

    with tempfile.TemporaryDirectory() as folder:
        return dict(create_app(Settings(data_dir=Path(folder))).openapi())


def operations(document: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and description of each operation."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method in METHODS:
                yield method.upper(), path, operation


def rest_page() -> str:
    """Every operation and every schema of the OpenAPI document."""
    document = openapi()
    schemas = document["components"]["schemas"]
    parts = [
        "# REST",
        document["info"]["description"],
        "Written from `/openapi.json`, which a running service serves; `/docs` shows it.",
    ]
    tags: dict[str, list[str]] = {}
    for method, path, operation in operations(document):
        tags.setdefault((operation.get("tags") or ["other"])[0], []).append(_operation(method, path, operation))
    for tag, texts in tags.items():
        parts += [f"## {tag.capitalize()}", *texts]
    parts += ["## Schemas", *(_schema(name, schema) for name, schema in sorted(schemas.items()))]
    return "\n\n".join(parts) + "\n"


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    parts = [f"### {method} {path}", f"{operation['summary']}. {operation.get('description', '')}".replace("<", "&lt;").strip()]
    if parameters := operation.get("parameters"):
        rows: list[tuple[object, ...]] = [
            (item["name"], item["in"], _shape(item["schema"]), item.get("description", "")) for item in parameters
        ]
        parts.append(table("parameter | in | type | meaning", rows))
    if body := operation.get("requestBody"):
        kinds = [_link(media["schema"]) for media in body["content"].values()]
        parts.append(f"Body: {', '.join(kinds)}")
    answers = []
    for status, answer in sorted(operation["responses"].items()):
        kinds = [_link(media["schema"]) for media in answer.get("content", {}).values() if media.get("schema")]
        answers.append(f"| {status} | {', '.join(kinds)} | {cell(answer['description'])} |")
    return "\n\n".join([*parts, "\n".join(["| status | body | when |", "|---|---|---|", *answers])])


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    rows: list[tuple[object, ...]] = []
    for field, value in schema.get("properties", {}).items():
        default = f" Default: {value['default']!r}." if value.get("default") not in (None, "", [], {}) else ""
        needed = " Required." if field in schema.get("required", ()) else ""
        rows.append((field, _shape(value), value.get("description", "") + default + needed))
    text = ROLE.sub(r"`\1`", schema.get("description", "").split("\n\n    ")[0]).replace("``", "`")
    return "\n\n".join(filter(None, [f"### {name}", text, table("field | type | meaning", rows) if rows else ""]))


def _shape(schema: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_shape(choice) for choice in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return repr(schema["const"])
    if schema.get("type") == "array":
        return f"list of {_shape(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def _link(schema: Mapping[str, Any]) -> str:
    name = _shape(schema)
    return f"[{name}](#{slug(name)})" if "$ref" in schema else cell(name)


# Errors, examples ---------------------------------------------------------------------------------------------------------


def error_kinds() -> list[type[errors.LlmpruneError]]:
    """All errors that are raised on purpose."""
    return [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.LlmpruneError)]


def errors_page() -> str:
    """The tree of errors; the codes of the service are in its guide."""
    rows: list[tuple[object, ...]] = [
        (kind.__name__, kind.__bases__[0].__name__, kind.exit_code, _first(kind)) for kind in error_kinds()
    ]
    tree = inspect.cleandoc(errors.__doc__ or "").partition("\n\n")[2].rpartition("\n\n")[0]
    return "\n\n".join([
        "# Errors",
        "A message is one line: what is wrong, what is allowed, the remedy. `from llmprune.errors import ...`",
        tree,
        table("error | is a | exit code | when", rows),
        "A service answers with [problem documents](../service.md#errors).",
    ]) + "\n"  # fmt: skip


def examples_page() -> str:
    """The scripts under examples/, whole."""
    parts = [
        "# Examples",
        "Whole scripts, which the tests run. They need nothing but an installed llmprune and its bundled model.",
    ]
    for file in sorted((ROOT / "examples").iterdir()):
        text = file.read_text()
        language = {".py": "python", ".sql": "sql"}[file.suffix]
        summary = (
            (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
            if language == "python"
            else text.split("\n")[0].lstrip("- ")
        )
        parts += [f"## {file.name}", summary, f"```{language}\n{text.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"
