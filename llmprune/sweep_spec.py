"""What a user asks of many jobs on one model: :class:`SweepConfig`, all points of a grid, and :class:`AutoConfig`, the best
model within a budget. Torch-free.

Both hold a ``base``: the fields of :class:`PruneConfig` that all their jobs share. Where it leaves ``sequential`` open, jobs
that can be pruned on the dense model's inputs are, so that one collection of statistics serves them all.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_serializer, model_validator

from llmprune.errors import ConfigError
from llmprune.patterns import Pattern
from llmprune.spec import Names, PruneConfig, describe

Keep = Literal["all", "best", "none"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
SpeedOf = Literal["decode", "prefill"]

MAX_POINTS = 100
"""Jobs of a sweep, where nothing else is said."""
MAX_COMBINATIONS = 10_000
"""Of the values of all axes, before those that are no job or the same one are left out."""
AXES = ("methods", "patterns", "sparsities", "allocations", "efforts")
"""Fields of a sweep that hold several values of one field of a job."""
FIELD_OF = {"methods": "method", "patterns": "pattern", "sparsities": "sparsity", "allocations": "allocation"}
FIELD_OF["efforts"] = "effort"
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\s*", re.ASCII | re.IGNORECASE)


def _as_numbers(value: Any) -> Any:
    if value is None:
        return ()
    return (value,) if isinstance(value, int | float) else value


def _as_fraction(value: Any) -> Any:
    """``5%`` as 0.05."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


def _as_bytes(value: Any) -> Any:
    """``4GB`` and ``4GiB`` as bytes."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " "))
    return value


class _ManyJobs(BaseModel):
    """What a sweep and a search share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: PruneConfig = Field(PruneConfig(), description="The fields of a job that all jobs share, and the model.")

    @field_serializer("base")
    def _as_given(self, base: PruneConfig) -> dict[str, Any]:
        """What was given and no more: a default that is written out would take precedence over what a preset sets."""
        return base.model_dump(mode="json", exclude_unset=True)

    @classmethod
    def build(cls, base: PruneConfig | None = None, **fields: Any) -> Self:
        """Validate once, at the boundary: None means default. Raises ConfigError with one line per offending field."""
        given = {name: value for name, value in fields.items() if value is not None}
        try:
            return cls.model_validate({**({} if base is None else {"base": base}), **given})
        except ValidationError as error:
            raise ConfigError(describe(error, cls.model_fields)) from None


class SweepConfig(_ManyJobs):
    """Many jobs on one model: every combination of the values of its axes, each an ordinary job.

    An axis that is left out has the one value of ``base``. An n:m pattern fixes the sparsity, so it is one point whatever
    ``sparsities`` are. Combinations that no job can have (a structured method with an n:m pattern, say) are left out, as long
    as every value is in some point.
    """

    methods: Names = Field((), description="Methods; see `llmprune methods`.")
    patterns: Names = Field((), description="Patterns: unstructured, n:m, mixed, structured, blocks, experts.")
    sparsities: Annotated[tuple[Fraction, ...], BeforeValidator(_as_numbers)] = Field(
        (), description="Sparsities, as fractions."
    )
    allocations: Names = Field((), description="Allocations: uniform, erk, owl, pqi, dp, evolution.")
    efforts: Names = Field((), description="Efforts: fast, balanced, best.")

    @model_validator(mode="after")
    def _no_value_twice(self) -> Self:
        for axis in AXES:
            values = getattr(self, axis)
            if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
                raise ConfigError(f"{axis} names {twice[0]} twice. Give every value once.")
        return self

    def points(self, *, max_points: int = MAX_POINTS) -> list[PruneConfig]:
        """The jobs; see :meth:`jobs`."""
        return list(self.jobs(max_points=max_points).values())

    def jobs(self, *, max_points: int = MAX_POINTS) -> dict[str, PruneConfig]:
        """The jobs by name; the name of a point says its values, and stays when others are added.

        Raises:
            ConfigError: there is no axis, there are more than ``max_points``, two points are the same job, or a value is in no
                job that can be.
        """
        if not any(getattr(self, axis) for axis in AXES):
            raise ConfigError(
                "a sweep of nothing: give at least one of --methods, --patterns, --sparsities, --allocations, --efforts."
            )
        found = _possible(self.base, self._combinations())
        if len(found) > max_points:
            raise ConfigError(
                f"a sweep of {len(found)} points, more than {max_points}. Name fewer values, or raise --max-points."
            )
        return found

    def _combinations(self) -> list[dict[str, Any]]:
        """Values by field, in the order of the axes; those of an n:m pattern without a sparsity."""
        axes = [[(FIELD_OF[axis], value) for value in getattr(self, axis)] for axis in AXES if getattr(self, axis)]
        if (most := math.prod(map(len, axes))) > MAX_COMBINATIONS:
            raise ConfigError(f"a sweep of up to {most} points. Name fewer values.")
        found: dict[tuple[tuple[str, Any], ...], None] = {}
        for pairs in itertools.product(*axes):
            fixed = Pattern.parse(str(dict(pairs).get("pattern", self.base.pattern))).sparsity is not None
            found[tuple(pair for pair in pairs if not (fixed and pair[0] == "sparsity"))] = None
        return [dict(pairs) for pairs in found]


class AutoConfig(_ManyJobs):
    """The best model within a budget: what it must not exceed, and what is searched.

    With bounds on quality alone the sparsest model is the best, else the one of the lowest KL. Quality is that of the worst
    evaluation text. Axes that are left out have the values of :meth:`axes`.
    """

    max_perplexity_increase: Annotated[float, Field(ge=0, le=1), BeforeValidator(_as_fraction)] | None = Field(
        None, description="Perplexity may rise by this share of the dense model's: 5% or 0.05."
    )
    max_kl: Annotated[float, Field(ge=0, lt=math.inf)] | None = Field(
        None, description="Mean KL from the dense model, in nats per token, may be this much."
    )
    min_speedup: Annotated[float, Field(ge=1, lt=math.inf)] | None = Field(
        None,
        description="Measured speed over the dense model's on this device must be this much; what is within the noise is 1.",
    )
    max_size: Annotated[int, Field(gt=0), BeforeValidator(_as_bytes)] | None = Field(
        None, description="Bytes of the checkpoint's weights at most: 4GB, 900MB, 4GiB."
    )
    speed_of: SpeedOf = Field(
        "decode", description="Which speed min_speedup bounds: decode (of the smallest batch) or prefill."
    )
    methods: Names = Field((), description="Methods to try. Default: wanda and sparsegpt, and flap for pattern structured.")
    patterns: Names = Field(
        (),
        description="Patterns to try. Default: unstructured; with max_size 2:4 and structured too, with min_speedup these two.",
    )
    allocations: Names = Field((), description="Allocations to try. Default: uniform and owl; n:m patterns take uniform alone.")
    min_sparsity: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="Lowest sparsity to try.")
    max_sparsity: Annotated[float, Field(gt=0, lt=1)] = Field(0.9, description="Highest sparsity to try.")
    step: Annotated[float, Field(ge=0.001, le=0.25)] = Field(0.01, description="Sparsities are multiples of this.")
    proxy_windows: Annotated[int, Field(ge=1)] = Field(
        8, description="Windows of each evaluation text that the search looks at; all of them confirm what it finds."
    )
    max_trials: Annotated[int, Field(ge=1)] = Field(100, description="Cheap jobs at most; up to 8 confirmations come on top.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.budgets:
            raise ConfigError("no budget: give at least one of --max-perplexity-increase, --max-kl, --min-speedup, --max-size.")
        if "sparsity" in self.base.model_fields_set and Pattern.parse(self.base.pattern).sparsity is None:
            raise ConfigError(f"auto finds the sparsity, and sparsity {self.base.sparsity:g} was asked for. Drop --sparsity.")
        if not self.base.eval_sources():
            raise ConfigError("auto has to measure what it looks for, and there is no text to evaluate on. Drop --no-eval.")
        if self.min_sparsity >= self.max_sparsity:
            raise ConfigError(f"min_sparsity {self.min_sparsity:g} is not below max_sparsity {self.max_sparsity:g}.")
        if self.min_speedup is not None and "latency" in self.base.model_fields_set and not self.base.latency:
            raise ConfigError("min_speedup needs speed to be measured. Drop --no-latency, or --min-speedup.")
        self._check_cost()
        return self

    def _check_cost(self) -> None:
        """A bound on size or speed that zeros in dense tensors can never meet is a contradiction."""
        bound = next((name for name in ("min_speedup", "max_size") if getattr(self, name) is not None), None)
        dense = "export" in self.base.model_fields_set and self.base.export == "dense"
        patterns = self.axes()["patterns"]
        if bound and dense and not any(Pattern.parse(pattern).structure for pattern in patterns):
            raise ConfigError(
                f"{bound} asks for a smaller or faster model, and zeros in dense tensors are neither. Drop --export dense, or "
                "add structured to --patterns."
            )
        if self.min_speedup is not None and patterns == ("unstructured",):
            raise ConfigError(
                "min_speedup asks for a faster model, and unstructured zeros run no faster. Add 2:4 or structured to "
                "--patterns."
            )

    @property
    def budgets(self) -> dict[str, float]:
        """The bounds that are set, by name."""
        names = ("max_perplexity_increase", "max_kl", "min_speedup", "max_size")
        return {name: float(value) for name in names if (value := getattr(self, name)) is not None}

    @property
    def bounds_cost(self) -> bool:
        """Whether size or speed is bounded."""
        return self.min_speedup is not None or self.max_size is not None

    def axes(self) -> dict[str, tuple[str, ...]]:
        """What is searched: as asked, else the value of ``base`` where it has one, else the default."""
        given = self.base.model_fields_set
        patterns = self.patterns
        if not patterns and "pattern" in given:
            patterns = (self.base.pattern,)
        if not patterns and self.min_speedup is not None:
            patterns = ("2:4", "structured")
        patterns = patterns or (("unstructured", "2:4", "structured") if self.bounds_cost else ("unstructured",))
        methods = self.methods or ((self.base.method,) if "method" in given else ())
        if not methods:
            whole = [structure for pattern in patterns if (structure := Pattern.parse(pattern).structure)]
            methods = ("wanda", "sparsegpt") if len(whole) < len(patterns) else ()
            methods += tuple({"structured": "flap", "blocks": "drop-one", "experts": "reap"}[structure] for structure in whole)
        allocations = self.allocations or ((self.base.allocation,) if "allocation" in given else ("uniform", "owl"))
        return {"methods": methods, "patterns": patterns, "allocations": allocations}

    def families(self) -> list[PruneConfig]:
        """A job at ``min_sparsity`` for every combination of method, pattern and allocation; see :meth:`at`.

        Raises ConfigError where a value is in no job that can be.
        """
        axes = self.axes()
        combinations: dict[tuple[tuple[str, Any], ...], None] = {}
        for method, pattern, allocation in itertools.product(axes["methods"], axes["patterns"], axes["allocations"]):
            parsed = Pattern.parse(pattern)
            values: dict[str, Any] = {"method": method, "pattern": pattern, "allocation": "uniform"}
            if parsed.sparsity is None:
                values["sparsity"] = self.min_sparsity
            if parsed.structure:  # what is about zeros is for the other patterns
                values["export"] = "dense"
            else:
                values["allocation"] = allocation if parsed.sparsity is None else "uniform"
                if self.bounds_cost and "export" not in self.base.model_fields_set:
                    values["export"] = "packed"
            combinations[tuple(values.items())] = None
        return list(_possible(self.base, [dict(values) for values in combinations]).values())

    def at(self, family: PruneConfig, sparsity: float) -> PruneConfig:
        """A family's job at another sparsity; the same where its pattern fixes that."""
        return family if Pattern.parse(family.pattern).sparsity is not None else PruneConfig.build(family, sparsity=sparsity)


def _possible(base: PruneConfig, combinations: list[dict[str, Any]]) -> dict[str, PruneConfig]:
    """The jobs by name of those combinations of values that a job can have.

    Raises ConfigError where two of them are the same job, or a value is in none.
    """
    found: dict[str, PruneConfig] = {}
    used: set[tuple[str, Any]] = set()
    refused: dict[tuple[str, Any], ConfigError] = {}
    for values in combinations:
        try:
            config = _job(base, values)
        except ConfigError as error:
            refused |= {value: error for value in values.items() if value not in refused}
            continue
        name = point_name(config, values)
        if twin := next((other for other, known in found.items() if known == config), None):
            raise ConfigError(f"points {twin} and {name} are the same job. Leave one of them out.")
        used |= set(values.items())
        found[name] = config
    for value, reason in refused.items():
        if value not in used:
            raise reason
    return found


def _job(base: PruneConfig, values: dict[str, Any]) -> PruneConfig:
    """The job with ``values`` in place of the base's; on the dense model's inputs, where nothing else is said and it can be."""
    config = PruneConfig.build(base, **values)
    can_be = not (config.reconstruct or config.effort or Pattern.parse(config.pattern).structure)
    if can_be and "sequential" not in base.model_fields_set:
        return PruneConfig.build(base, **values, sequential="none")
    return config


def point_name(config: PruneConfig, values: dict[str, Any]) -> str:
    """Method, pattern and sparsity, and what else was chosen, as the name of a directory: ``sparsegpt-0.5-owl``, ``wanda-2-4``.

    ``values`` are those that were chosen for this point.
    """
    pattern = Pattern.parse(config.pattern)
    parts = [str(values.get("method", "icbs" if config.refine == "icbs" else config.method))]
    if pattern.sparsity is not None:
        parts.append(f"{pattern.n}-{pattern.m}")
    else:
        parts += ["" if config.pattern == "unstructured" else config.pattern, f"{config.sparsity:.10g}"]
    parts += ["" if config.allocation == "uniform" else config.allocation, str(values.get("effort") or "")]
    return "-".join(filter(None, parts))


def values_of(text: str | None) -> Sequence[str] | None:
    """``wanda,sparsegpt`` as a list of names; None where nothing was given."""
    return None if text is None else [part for part in (word.strip() for word in text.split(",")) if part]
