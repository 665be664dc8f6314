"""A job as the command line that does it: what the worker runs, and what a page shows to reproduce it."""

from __future__ import annotations

from typing import Any

from llmprune.spec import PruneConfig
from llmprune.sweep_spec import AXES, FIELD_OF, AutoConfig

_MAY_BE_NONE = ("eval", "prompt")
_FETCHED = ("model", "revision", "calibration", "eval", "tasks", "tasks_path")


def arguments(config: PruneConfig) -> list[str]:
    """MODEL and the options of ``llmprune prune`` for the fields that were set."""
    return _arguments(config.model_dump(mode="json", exclude_unset=True), config.model)


def fetch_arguments(config: PruneConfig) -> list[str]:
    """MODEL and the options of ``llmprune fetch``: what decides what is downloaded."""
    return _arguments(config.model_dump(mode="json", exclude_unset=True, include=set(_FETCHED)), config.model)


def auto_arguments(config: AutoConfig) -> list[str]:
    """MODEL and the options of ``llmprune auto``: budgets, axes, and the fields of the base that were set."""
    base = config.base.model_dump(mode="json", exclude_unset=True, exclude=set(FIELD_OF.values()))
    own = config.model_dump(mode="json", exclude_unset=True, exclude={"base", *AXES})
    asked = {axis for axis in config.axes() if getattr(config, axis) or FIELD_OF[axis] in config.base.model_fields_set}
    axes = {axis: ",".join(values) for axis, values in config.axes().items() if axis in asked}
    return _arguments(base | own | axes, config.base.model)


def _arguments(fields: dict[str, Any], model: str) -> list[str]:
    options = [model]
    for name, value in fields.items():
        option = f"--{name.replace('_', '-')}"
        if name == "model" or value is None:
            continue
        if value is False:
            options.append(option.replace("--", "--no-", 1))
        elif value is True:
            options.append(option)
        elif isinstance(value, list):
            options += [f"{option}={item}" for item in value] or ([f"--no-{name}"] if name in _MAY_BE_NONE else [])
        elif not (name == "sparsity" and ":" in fields.get("pattern", "")):  # the pattern fixes it
            options.append(f"{option}={value}")
    return options
