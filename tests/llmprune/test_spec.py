"""PruneConfig and Pattern: what a user may ask for, and what an error says."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from llmprune.efforts import EFFORTS
from llmprune.errors import ConfigError, PatternError, UserError
from llmprune.spec import DEFAULT_SPARSITY, EffortName, Need, Pattern, PruneConfig, Target, default_seq_len


def _error(**overrides: Any) -> str:
    """The message of the ConfigError that building from ``overrides`` raises, which is one line."""
    with pytest.raises(ConfigError) as caught:
        PruneConfig.build(**overrides)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_every_field_has_a_default_and_a_description() -> None:
    """An empty config prunes the bundled model by half, and every field explains itself."""
    config = PruneConfig()
    assert (config.model, config.method, config.sparsity, config.pattern) == ("demo", "wanda", 0.5, "unstructured")
    assert (config.skip, config.eval, config.scope, config.seed) == ((), None, None, 0)
    assert PruneConfig.build() == config
    assert PruneConfig.model_fields
    for name, field in PruneConfig.model_fields.items():
        assert not field.is_required(), name
        assert field.description and field.description.endswith("."), name


@pytest.mark.parametrize(("text", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("3:4", 0.25), ("4:8", 0.5), ("1:3", 1 - 1 / 3)])
def test_pattern_fixes_the_sparsity(text: str, sparsity: float) -> None:
    """n:m decides the sparsity, whether it is left out, None, or given consistently."""
    for config in (
        PruneConfig(pattern=text),
        PruneConfig.build(pattern=text),
        PruneConfig.build(pattern=text, sparsity=None),
        PruneConfig.build(pattern=text, sparsity=sparsity),
        PruneConfig.build(PruneConfig(sparsity=0.9), pattern=text),
    ):
        assert config.sparsity == pytest.approx(sparsity)


@pytest.mark.parametrize("asked", [0.4, 0.0, 0.75, "0.75"])
def test_contradicting_sparsity_is_an_error(asked: float | str) -> None:
    """A sparsity the pattern does not mean names both and the way out."""
    message = _error(pattern="2:4", sparsity=asked)
    for part in ("2:4", "0.5", str(asked), "Drop one"):
        assert part in message
    with pytest.raises(ConfigError):
        PruneConfig(pattern="2:4", sparsity=asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, 50, float("nan"), float("inf"), "half"])
def test_sparsity_outside_its_range_is_an_error(sparsity: Any) -> None:
    """Sparsity lies in [0, 1): the message names the field and the value given."""
    message = _error(sparsity=sparsity)
    assert message.startswith("sparsity: ")
    assert repr(sparsity) in message


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.999, "0.25"])
def test_sparsity_inside_its_range_is_taken(sparsity: Any) -> None:
    """Both ends of [0, 1) that are allowed, and numbers as text from a form, are accepted."""
    assert PruneConfig.build(sparsity=sparsity).sparsity == float(sparsity)


def test_unknown_field_lists_the_known_ones() -> None:
    """A misspelt field is named, and all known ones are listed."""
    message = _error(sparcity=0.3)
    assert "unknown field 'sparcity'" in message
    assert all(name in message for name in PruneConfig.model_fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_samples", 0),
        ("seq_len", 1),
        ("batch_size", 0),
        ("max_eval_tokens", 1),
        ("damping", 0),
        ("damping", -1),
        ("scope", "layer"),
        ("sequential", "site"),
        ("dtype", "int8"),
        ("seed", "x"),
        ("skip", 3),
        ("eval", [1]),
        ("latency", "perhaps"),
        ("model", 3),
        ("allocation", "owls"),
    ],
)
def test_bad_values_name_their_field_and_value(field: str, value: Any) -> None:
    """Every bad value is reported under its field, with what was given."""
    message = _error(**{field: value})
    assert message.startswith(field)
    assert "got" in message


def test_several_errors_are_one_line() -> None:
    """All bad fields are named at once, joined on one line."""
    message = _error(num_samples=0, sparsity=2, sparcity=1, model="a\nb", seed="x\ny")
    assert all(field in message for field in ("num_samples", "sparsity", "sparcity", "seed"))


def test_none_override_means_default_or_the_configs_own() -> None:
    """Command-line flags left out arrive as None: they change nothing."""
    nothing: dict[str, Any] = dict.fromkeys(PruneConfig.model_fields)
    assert PruneConfig.build(**nothing) == PruneConfig()
    config = PruneConfig(method="magnitude", sparsity=0.7, skip=("*.q_proj",), seed=3)
    assert PruneConfig.build(config, **nothing) == config


def test_overrides_win_over_the_config() -> None:
    """An override replaces its field and leaves the rest and the given config as they were."""
    config = PruneConfig(method="magnitude", sparsity=0.7)
    assert PruneConfig.build(config, sparsity=0.2) == PruneConfig(method="magnitude", sparsity=0.2)
    assert config.sparsity == 0.7
    assert PruneConfig.build(config) == config
    assert PruneConfig.build(config, seed=1).model_fields_set == {"method", "sparsity", "seed"}


def test_changing_the_pattern_drops_the_sparsity_it_fixed() -> None:
    """From 2:4 back to unstructured the default sparsity holds again, and from 2:4 to 1:4 the new pattern's."""
    config = PruneConfig(pattern="1:4")
    assert PruneConfig.build(config, pattern="unstructured").sparsity == DEFAULT_SPARSITY
    assert PruneConfig.build(config, pattern="3:4").sparsity == 0.25
    assert PruneConfig.build(config, pattern="unstructured", sparsity=0.6).sparsity == 0.6


@pytest.mark.parametrize(
    ("given", "expected"),
    [("*.q_proj", ("*.q_proj",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], ()), ((), ())],
)
def test_names_become_tuples(given: Any, expected: tuple[str, ...]) -> None:
    """One name, a list or a tuple give the same hashable tuple."""
    config = PruneConfig.build(skip=given, eval=given)
    assert config.skip == config.eval == expected
    hash(config)


def test_config_is_frozen() -> None:
    """A job cannot change under way."""
    config = PruneConfig()
    with pytest.raises(ValidationError):
        config.sparsity = 0.9  # type: ignore[misc]
    assert config.sparsity == DEFAULT_SPARSITY


@pytest.mark.parametrize(
    "config",
    [
        PruneConfig(),
        PruneConfig(pattern="2:4", skip=("*.down_proj",), eval=("wikitext2", "ptb"), seq_len=128),
        PruneConfig(pattern="1:3"),
        PruneConfig(sparsity=0.1 + 0.2, method="sparsegpt", scope="row", revision="main", damping=1e-3, latency=False),
        PruneConfig(eval=()),
    ],
    ids=["default", "2:4", "1:3", "sparsegpt", "no evaluation"],
)
def test_json_round_trip(config: PruneConfig) -> None:
    """What is written to a queue or a manifest reads back equal, through JSON text and through a plain dictionary."""
    assert PruneConfig.model_validate_json(config.model_dump_json()) == config
    assert PruneConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    assert PruneConfig.build(**json.loads(config.model_dump_json(exclude_unset=True))) == config


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "abc", "", "2:", ":4", "2:4:8", "-1:4", "1.5:4", "2:4 ", "Unstructured"])
def test_bad_patterns_say_what_is_allowed(text: str) -> None:
    """Text that is no pattern is quoted back with both forms that are, from Pattern and from the config alike."""
    with pytest.raises(ConfigError) as caught:
        Pattern.parse(text)
    message = str(caught.value)
    assert repr(text) in message and "'unstructured'" in message and "0 < n < m" in message and "\n" not in message
    assert _error(pattern=text) == message


@pytest.mark.parametrize(("text", "n", "m"), [("2:4", 2, 4), ("1:2", 1, 2), ("7:8", 7, 8), ("unstructured", None, None)])
def test_patterns_parse_and_print(text: str, n: int | None, m: int | None) -> None:
    """n weights are KEPT of every m; printing gives the text back."""
    pattern = Pattern.parse(text)
    assert (pattern.n, pattern.m, str(pattern)) == (n, m, text)
    assert pattern.sparsity == (None if n is None or m is None else pytest.approx(1 - n / m))


def test_target_takes_the_methods_scope_by_default() -> None:
    """The config's scope wins over the method's own."""
    assert PruneConfig(pattern="2:4").target("row") == Target(Pattern(2, 4), 0.5, "row")
    assert PruneConfig(sparsity=0.3, scope="matrix").target("row") == Target(Pattern(), 0.3, "matrix")


def test_errors_of_a_request_are_the_users() -> None:
    """Pattern and config errors share the exit code of user errors."""
    assert issubclass(PatternError, ConfigError) and issubclass(ConfigError, UserError)
    assert UserError.exit_code == 2


def test_needs_are_levels() -> None:
    """Each level of statistics holds the ones below it, so levels compare."""
    assert Need.NOTHING < Need.NORM < Need.GRAM


def test_torch_free_modules_do_not_import_torch() -> None:
    """A command line's --help or a service's schema must not wait for torch."""
    modules = ["llmprune.spec", "llmprune.report", "llmprune.errors", "llmprune.events", "llmprune.methods"]
    code = f"import sys, {', '.join(modules)}; print([m for m in {modules} if m in sys.modules], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{modules} False"


@pytest.mark.parametrize(("maximum", "expected"), [(64, 64), (2048, 2048), (131072, 2048), (None, 2048)])
def test_default_sequence_length_is_the_models_but_at_most_2048(maximum: int | None, expected: int) -> None:
    """Short models set the length; long ones, and those that state none, get the published 2048."""
    assert default_seq_len(SimpleNamespace(max_position_embeddings=maximum)) == expected
    assert default_seq_len(SimpleNamespace()) == 2048


def test_default_texts_depend_on_the_model() -> None:
    """The bundled model is calibrated and measured on stdlib, others on C4 and WikiText-2; what is asked for wins."""
    bundled, other = PruneConfig(), PruneConfig(model="org/model")
    assert (bundled.calibration_source(), bundled.eval_sources()) == ("stdlib", ("stdlib",))
    assert (other.calibration_source(), other.eval_sources()) == ("c4", ("wikitext2",))
    assert (bundled.calibration_source(in_memory=True), bundled.eval_sources(in_memory=True)) == ("c4", ("wikitext2",))
    asked = PruneConfig(calibration="ptb", eval=())
    assert (asked.calibration_source(), asked.eval_sources()) == ("ptb", ())


def test_every_effort_has_a_line_of_the_table() -> None:
    """The choices of the field are the table's."""
    assert get_args(EffortName) == tuple(EFFORTS)


@pytest.mark.parametrize("name", EFFORTS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_an_effort_sets_what_is_not_given(name: str, pattern: str) -> None:
    """Its fields are set, those given beside it win, and the config read back is the same."""
    config = PruneConfig.build(effort=name, pattern=pattern)
    assert config.model_dump() == PruneConfig(pattern=pattern).model_dump() | EFFORTS[name].of(pattern) | {"effort": name}
    assert PruneConfig.model_validate_json(config.model_dump_json()) == config
    own = PruneConfig.build(effort=name, pattern=pattern, method="ria")
    assert own.model_dump() == config.model_dump() | {"method": "ria"}


def test_another_effort_or_pattern_replaces_the_fields_of_the_first() -> None:
    """A preset leaves nothing behind; what the user gave stays."""
    best = PruneConfig.build(effort="best", seed=3)
    assert best.reconstruct_rounds == 3 and not best.permute
    assert PruneConfig.build(best, effort="fast") == PruneConfig.build(effort="fast", seed=3)
    assert PruneConfig.build(best, pattern="2:4") == PruneConfig.build(effort="best", seed=3, pattern="2:4")
    assert PruneConfig.build(best, seed=4) == PruneConfig.build(effort="best", seed=4)


def test_an_unknown_effort_names_the_known_ones() -> None:
    """One line with the choices."""
    with pytest.raises(ConfigError, match="effort: .*'fast', 'balanced' or 'best'"):
        PruneConfig.build(effort="quick")


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"pattern": "2:4", "permute": True}, "--permute"),
        ({"pattern": "mixed", "allocation": "dp"}, "'mixed'"),
        ({"reconstruct": True, "reconstruct_rounds": 2}, "--reconstruct-rounds"),
    ],
)
def test_a_refined_mask_is_one_mask(fields: dict[str, Any], names: str) -> None:
    """What changes weights or groups under a mask does not go with refining it."""
    assert PruneConfig.build(**fields)
    assert names in _error(method="icbs", **fields)
