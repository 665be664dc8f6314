"""Jobs in words and figures: what the pages say of events, results and targets, and the commands that reproduce a job."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from pydantic import ValidationError

from llmprune.console import LABELS
from llmprune.errors import UserError
from llmprune.io.render import VERDICTS, duration, number, percent, rate, size, small, target_percent, times
from llmprune.spec import PruneConfig
from llmprune_service.commands import arguments
from llmprune_service.jobs import Row
from llmprune_service.schemas import DEFAULT_PRIORITY

BUDGETS = ("max_perplexity_increase", "max_kl", "min_speedup", "max_size")
_STAGES = {str(stage): label for stage, label in LABELS.items()}


class Tile(NamedTuple):
    """A headline number."""

    name: str
    figure: str
    note: str = ""


class Table(NamedTuple):
    """Texts in rows under a head; the first of each row names it."""

    name: str
    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


class Commands(NamedTuple):
    """Shell commands that submit the same job, or do it on this machine; None where its configuration is not valid (now)."""

    curl: str
    submit: str | None
    prune: str | None


def stage_label(name: str) -> str:
    """A stage as the command line calls it."""
    return _STAGES.get(name, name)


def target(row: Row) -> str:
    """What a job aims at: ``2:4``, ``62.5 % unstructured``, or a budget such as ``max_kl 0.1``."""
    if row.kind == "auto":
        return ", ".join(f"{name} {value}" for name, value in row.config.items() if name in BUDGETS)
    return str(row.pattern) if ":" in row.pattern else f"{target_percent(row.sparsity)} {row.pattern}"


def describe(event: Row) -> str:
    """An event as a sentence."""
    kind, data = str(event.type).removeprefix("job."), event.data
    match kind:
        case "queued":
            return f"Queued with priority {data.get('priority')}"
        case "running":
            return f"Running on {data.get('worker')}, attempt {data.get('attempt')}"
        case "phase":
            return f"Phase {data.get('phase')}"
        case "block":
            return _block(data)
        case "metric" if "stage" in data:
            return f"{stage_label(data['stage'])}: {duration(data['seconds'])}"
        case "point":
            return f"Tried {data.get('name')}" + (f": {data['error']}" if data.get("error") else "")
        case "log":
            return f"{str(data.get('level')).capitalize()}: {data.get('message')}"
        case "retrying" | "failed":
            return f"{kind.capitalize()}, {data.get('code')}: {data.get('message')}"
        case "recovered":
            return f"Worker {data.get('worker')} was lost; another one goes on"
        case "succeeded":
            return "Succeeded"
        case "cancelling" | "cancelled":
            return kind.capitalize()
    return " ".join([kind, *(f"{name} {value}" for name, value in data.items() if value not in (None, ""))])


def _block(data: Mapping[str, Any]) -> str:
    facts = [f"{percent(data.get('sparsity'))} zeros"]
    if data.get("error") is not None:
        facts.append(f"output error {small(data['error'])}")
    if data.get("seconds") is not None:
        facts.append(duration(data["seconds"]))
    return f"Block {data['block'] + 1} of {data['num_blocks']}, {data['name']}: {', '.join(facts)}"


def headline(result: Mapping[str, Any]) -> str:
    """A result in a few words."""
    if result.get("perplexity_pruned") is None:
        return f"{percent(result.get('sparsity'))} zeros, not evaluated"
    return f"Perplexity {_pair(result['perplexity_dense'], result['perplexity_pruned'])} ({times(_float(result['ratio']))})"


def tiles(result: Mapping[str, Any]) -> list[Tile]:
    """The headline numbers of a finished job; what was not measured is left out."""
    found = [Tile("Sparsity", percent(_float(result.get("sparsity"))))]
    if result.get("perplexity_pruned") is not None:
        figure = _pair(result["perplexity_dense"], result["perplexity_pruned"])
        found.insert(0, Tile("Perplexity", figure, f"{times(_float(result['ratio']))} on {result['text']}"))
        found.append(Tile("KL from dense", small(_float(result["kl"])), "nats per token"))
        found.append(Tile("Top-1 agreement", percent(_float(result["top1_agreement"]))))
    if result.get("checkpoint_bytes") is not None:
        found.append(Tile("Checkpoint", size(result["checkpoint_bytes"]), f"dense {size(result['dense_bytes'])}"))
    for phase in ("prefill", "decode"):
        speeds = result.get(f"{phase}_tokens_per_second")
        if speeds is not None:
            ratio = times(speeds["pruned"] / speeds["dense"]) if speeds["dense"] else ""
            figure = f"{rate(speeds['dense'])} → {rate(speeds['pruned'])}"
            found.append(Tile(f"{phase.capitalize()} speed", figure, f"tokens/s, {ratio}"))
    return [*found, Tile("Time", duration(result["seconds"]))]


def verdict(row: Row) -> tuple[str, str, str] | None:
    """(status, word, sentence) of a finished job."""
    status = (row.result or {}).get("verdict")
    if status is None:
        return None
    word = VERDICTS.get(status, status)
    text = str(row.result.get("verdict_text", "")).removeprefix(f"{word}: ")
    return status, word, text[:1].upper() + text[1:]


def _pair(dense: float | str | None, pruned: float | str | None) -> str:
    return f"{number(_float(dense))} → {number(_float(pruned))}"


def _float(value: float | str | None) -> float | None:
    """JSON has no infinity: it is stored as a string."""
    return None if value is None else float(value)


def commands(row: Row, base_url: str, *, auth: bool) -> Commands:
    """What submits this job again, from the very same commit of the model."""
    commit = {"revision": row.revision} if row.revision else {}
    own = {"priority": row.priority} if row.priority != DEFAULT_PRIORITY else {}
    if row.kind == "auto":
        search = row.config | {"base": row.config.get("base", {}) | commit} | own
        return Commands(curl(search, base_url, auth=auth, path="v1/auto"), None, None)
    pinned = row.config | commit
    submit = prune = None
    with suppress(ValidationError, UserError):
        words = arguments(PruneConfig.model_validate(pinned))
        submit = shlex.join(["llmprune", "submit", *words, *(f"--{name}={value}" for name, value in own.items())])
        prune = shlex.join(["llmprune", "prune", *words, "--out", "pruned"])
    return Commands(curl(pinned | own, base_url, auth=auth), submit, prune)


def curl(body: Mapping[str, Any], base_url: str, *, auth: bool, path: str = "v1/jobs") -> str:
    """The request as a curl command; the key comes from the environment."""
    lines = [
        f"curl {shlex.quote(f'{base_url}{path}')}",
        *(['-H "Authorization: Bearer $LLMPRUNE_API_KEY"'] if auth else []),
        "-H 'Content-Type: application/json'",
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}",
    ]
    return " \\\n  ".join(lines)
