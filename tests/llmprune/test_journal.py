"""What a resume compares: every field of a config is in the fingerprint, and the one that differs is named."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

import pytest

from llmprune.io.journal import difference
from llmprune.job.state import config_fields
from llmprune.spec import PruneConfig


def another(name: str) -> Any:
    """A value of the field's type that is not its default."""
    field = PruneConfig.model_fields[name]
    kinds = [kind for kind in (get_args(field.annotation) or [field.annotation]) if kind is not type(None)]
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else get_args(kinds[0])
    if choices and all(isinstance(choice, str) for choice in choices):
        return next(choice for choice in choices if choice != field.default)
    if isinstance(field.default, bool):
        return not field.default
    if isinstance(field.default, (int, float)):
        return field.default + 1
    if "tuple" in str(field.annotation):
        return ("another",)
    return 7 if "int" in str(field.annotation) else "another"


@pytest.mark.parametrize("name", PruneConfig.model_fields)
def test_the_field_that_differs_is_named(name: str) -> None:
    """Whichever it is, before and now, after a way through JSON as the journal takes it; the same config differs in nothing."""
    config = PruneConfig()
    other = config.model_copy(update={name: another(name)})
    before, now, same = (json.loads(json.dumps(config_fields(one))) for one in (config, other, config))
    found = difference(before, now)
    assert found is not None and found.startswith(f"config.{name} = ")
    assert found.endswith(f"{before[f'config.{name}']!r}, not {now[f'config.{name}']!r}")
    assert difference(before, same) is None


@pytest.mark.parametrize("name", ["revision", "tokens", "batch_size", "seq_len", "llmprune", "torch"])
def test_a_field_that_only_one_knows_differs(name: str) -> None:
    """As where one run was made by another version; the first in the alphabet is named."""
    assert difference({}, {name: "new"}) == f"{name} = None, not 'new'"
    assert difference({name: 1, "zzz": 1}, {}) == f"{name} = 1, not None"
