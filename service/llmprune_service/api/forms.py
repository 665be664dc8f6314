"""The form of a submission: its fields are made from the schema of a request, and a job can be put back into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple
from urllib.parse import parse_qsl

from fastapi import Depends, Request
from pydantic import ValidationError

from llmprune.errors import UserError
from llmprune.io.text import NAMES
from llmprune.methods import METHODS, REFINED, STRUCTURAL
from llmprune_service.api import auth
from llmprune_service.api.errors import pointer
from llmprune_service.jobs import Row
from llmprune_service.problems import Problem
from llmprune_service.schemas import DEFAULT_PRIORITY, JobRequest

FIRST = ("model", "effort", "method", "pattern", "sparsity", "calibration")
"""What the form shows at once; all else is folded away."""
PATTERNS = ("unstructured", "2:4", "4:8", "mixed", "structured", "blocks", "experts")
LEFT_OUT = ("trust_remote_code", "tasks_path", "webhook")
"""The first two are always refused, the last one is for programs."""
_GROUPS = {
    "Quality": ("scope", "sequential", "skip", "permute", "damping", "allocation", "evolution_"),
    "Reconstruction and refinement": ("reconstruct", "refine", "icbs_"),
    "Structure": ("widths", "budget", "tyr_"),
    "Queue": ("priority", "timeout_s", "metadata"),
}
_REST = "Data, measurements and output"
_OF_STRUCTURES = {name: method.summary for (_, name), method in STRUCTURAL.items() if name not in METHODS}
_METHODS = {**{method.name: method.summary for method in METHODS.values()}, **REFINED, **_OF_STRUCTURES}
_NONE = "none"
_MAY_BE_NONE = ("eval", "prompt")  # whose default is not to have none


class Field(NamedTuple):
    """One field: ``kind`` is text, number, choice or lines; ``default`` is what an empty one means."""

    name: str
    kind: str
    hint: str
    default: str
    choices: Mapping[str, str] = {}
    suggestions: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    step: str = "any"

    @property
    def label(self) -> str:
        """The name in words."""
        return self.name.replace("_", " ").capitalize().removesuffix(" s")


class Group(NamedTuple):
    """Fields under one heading."""

    title: str
    fields: tuple[Field, ...]


def _make_fields() -> dict[str, Field]:
    schema = JobRequest.model_json_schema()
    return {name: _field(name, part) for name, part in schema["properties"].items() if name not in LEFT_OUT}


def _field(name: str, part: Mapping[str, Any]) -> Field:
    """A field from its part of the JSON Schema; what may be null is as it is when it is not."""
    hint, default = part.get("description", ""), _shown(part.get("default"))
    kinds = [one for one in part.get("anyOf", [part]) if one.get("type") != "null"]
    kind = kinds[0]
    if name == "method":
        return Field(name, "choice", hint, default, choices=_METHODS)
    if choices := kind.get("enum"):
        return Field(name, "choice", hint, default, choices=dict.fromkeys(choices, ""))
    match kind.get("type"):
        case "boolean":
            return Field(name, "choice", hint, default, choices={"yes": "", "no": ""})
        case "integer" | "number":
            low, high = (_bound(kind, end) for end in ("inimum", "aximum"))
            step = "1" if kind["type"] == "integer" else "any"
            return Field(name, "number", hint, default, low=low, high=high, step=step)
        case "array" | "object":
            more = "One a line" + (", as key=value." if kind["type"] == "object" else ".")
            told = f" '{_NONE}' for none." if name in _MAY_BE_NONE else ""
            return Field(name, "lines", f"{hint} {more}{told}", default)
    suggestions = {"pattern": PATTERNS, "calibration": NAMES, "device": ("auto", "cpu", "cuda")}.get(name, ())
    return Field(name, "text", hint, default, suggestions=suggestions)


def _bound(kind: Mapping[str, Any], end: str) -> float | None:
    found = kind.get(f"m{end}", kind.get(f"exclusiveM{end}"))
    return None if found is None or found >= 2**31 - 1 else found


def _shown(value: Any) -> str:
    match value:
        case None | [] | {}:
            return ""
        case bool():
            return "yes" if value else "no"
    return str(value)


FIELDS = _make_fields()


def _grouped() -> list[Group]:
    rest = [field for name, field in FIELDS.items() if name not in FIRST]
    titles = {
        field.name: next((title for title, prefixes in _GROUPS.items() if field.name.startswith(prefixes)), _REST)
        for field in rest
    }
    return [Group(title, tuple(field for field in rest if titles[field.name] == title)) for title in (_REST, *_GROUPS)]


GROUPS = _grouped()
"""What is folded away, under headings."""


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form of another page of ours that were filled in."""
    auth.check_origin(request, needed=True)
    body = (await request.body()).decode(errors="replace")
    return {name: value.strip() for name, value in parse_qsl(body) if value.strip()}


Form = Annotated[dict[str, str], Depends(_form)]


def read(form: Mapping[str, str]) -> JobRequest:
    """Raises Problem 422 with an entry for each field that is wrong."""
    try:
        return JobRequest.model_validate({name: _value(field, form[name]) for name, field in FIELDS.items() if name in form})
    except ValidationError as error:
        errors = [{"pointer": pointer(item["loc"]), "detail": item["msg"]} for item in error.errors()]
        raise Problem(422, "invalid", "Some fields cannot be used.", errors=errors) from None
    except UserError as error:
        raise Problem(422, "invalid", str(error)) from None


def _value(field: Field, text: str) -> Any:
    if field.kind == "lines":
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if field.name == "metadata":
            return {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
        return [] if field.name in _MAY_BE_NONE and lines == [_NONE] else lines
    return {"yes": True, "no": False}.get(text, text) if field.choices.keys() == {"yes", "no"} else text


def filled(row: Row) -> dict[str, str]:
    """The form as it asks for this job once more."""
    asked = row.config | {"metadata": row.metadata} | ({"priority": row.priority} if row.priority != DEFAULT_PRIORITY else {})
    if ":" in row.pattern:
        asked.pop("sparsity", None)  # the pattern fixes it
    return {name: text for name in FIELDS if name in asked and (text := _text(name, asked[name]))}


def _text(name: str, value: Any) -> str:
    match value:
        case dict():
            return "\n".join(f"{key}={item}" for key, item in value.items())
        case list() | tuple():
            return "\n".join(map(str, value)) or (_NONE if name in _MAY_BE_NONE else "")
    return _shown(value)
