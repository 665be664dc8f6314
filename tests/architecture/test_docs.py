"""The docs are complete: every field, option, method, command, text and error is in the guide."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import get_args

import pytest

from llmprune import errors, events
from llmprune.allocate import ALLOCATORS
from llmprune.cli import app
from llmprune.io.text import NAMES
from llmprune.methods import METHODS, STRUCTURAL, Method
from llmprune.recovery_spec import RecoverConfig
from llmprune.spec import PruneConfig
from llmprune.sweep_spec import AutoConfig, SweepConfig

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guide.md").read_text()
README = (ROOT / "README.md").read_text()
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
ERRORS = [name for name, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, errors.LlmpruneError)]


EVENTS = [
    value.model_fields["event"].default
    for _, value in inspect.getmembers(events, inspect.isclass)
    if value.__module__ == events.__name__ and "event" in value.model_fields
]


@pytest.mark.parametrize("field", PruneConfig.model_fields)
def test_every_field_is_in_the_guide(field: str) -> None:
    """With its option, where it has one."""
    assert f"`{field}`" in GUIDE
    assert field == "model" or f"--{field.replace('_', '-')}" in GUIDE


@pytest.mark.parametrize("field", PruneConfig.model_fields)
def test_every_field_describes_itself(field: str) -> None:
    """Its description is the help of the command line and of the service."""
    assert PruneConfig.model_fields[field].description


@pytest.mark.parametrize("field", sorted(RecoverConfig.model_fields.keys() - {"model"}))
def test_every_field_of_a_recovery_is_in_the_guide(field: str) -> None:
    """Among the options of its section."""
    section = GUIDE[GUIDE.index("## Recovery") : GUIDE.index("## Events")]
    assert f"`--{field.replace('_', '-')}`" in section


@pytest.mark.parametrize("field", sorted({*SweepConfig.model_fields, *AutoConfig.model_fields} - {"base"}))
def test_every_field_of_a_sweep_and_a_search_is_in_the_guide(field: str) -> None:
    """Among the options of their section."""
    section = GUIDE[GUIDE.index("## Sweeps") : GUIDE.index("## Recovery")]
    assert f"`--{field.replace('_', '-')}`" in section


@pytest.mark.parametrize("method", STRUCTURAL.values(), ids=lambda method: f"{method.structure}-{method.name}")
def test_every_structural_method_has_its_place(method: Method) -> None:
    """In the guide, and with its pattern and its paper on the page of its own."""
    assert f"`{method.name}`" in GUIDE and f"`{method.structure}`" in GUIDE
    page = (ROOT / "docs" / "structured.md").read_text()
    assert f"`{method.name}`" in page and f"`{method.structure}`" in page
    assert method.paper == "baseline" or method.name == "magnitude" or method.paper.rpartition("arXiv ")[2][:10] in page


@pytest.mark.parametrize("name", [*METHODS, *ALLOCATORS, *NAMES, *ERRORS, *EVENTS, *get_args(events.Stage)])
def test_every_name_is_in_the_guide(name: str) -> None:
    """Methods, allocations, texts, errors, events and stages."""
    assert f"`{name}`" in GUIDE or f"`llmprune.{name}`" in GUIDE


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command: str) -> None:
    """And its function has a docstring, which is its help."""
    assert f"llmprune {command}" in README
    callback = next(c.callback for c in app.registered_commands if c.callback and c.callback.__name__ == command)
    assert callback.__doc__


def test_every_event_can_be_parsed() -> None:
    """The union that parse_event reads has all of them."""
    union = get_args(events.Event)[0]
    assert sorted(kind.model_fields["event"].default for kind in get_args(union)) == sorted(EVENTS)
    assert len(EVENTS) > 10


def test_every_error_is_drawn_in_the_tree() -> None:
    """The docstring of errors.py is the whole tree."""
    assert len(ERRORS) > 15
    for name in ERRORS:
        assert name in (errors.__doc__ or "")


def test_the_config_takes_every_allocation() -> None:
    """The literal of the field and the table have the same names."""
    assert set(get_args(PruneConfig.model_fields["allocation"].annotation)) == set(ALLOCATORS)
