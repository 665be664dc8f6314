"""What a user asks for: :class:`PruneConfig`, the one description of a job.

Command-line flags, HTTP bodies, queue messages, the checkpoint manifest and the report header are all this object.
Torch-free.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llmprune.efforts import EFFORTS
from llmprune.errors import ConfigError
from llmprune.patterns import MIXED as MIXED
from llmprune.patterns import STRUCTURE_METHODS, structure_of
from llmprune.patterns import Need as Need
from llmprune.patterns import Pattern as Pattern
from llmprune.patterns import Scope as Scope
from llmprune.patterns import Target as Target
from llmprune.patterns import num_pruned as num_pruned

Sequential = Literal["block", "group", "none"]
Allocation = Literal["uniform", "erk", "owl", "pqi", "dp", "evolution"]
EffortName = Literal["fast", "balanced", "best"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Refine = Literal["none", "icbs"]
IcbsPreset = Literal["default", "paper"]
IcbsHessian = Literal["fisher", "exact"]
IcbsSolver = Literal["anneal", "greedy", "exhaustive"]
Widths = Literal["free", "uniform"]
StructureBudget = Literal["kinds", "parameters", "latency"]
TyrPreset = Literal["local", "fast", "standard", "paper"]
Export = Literal["dense", "packed"]
Offload = Literal["auto", "none", "cpu", "disk"]
PackedFormat = Literal["2:4", "bitmask"]
PackFormat = Literal["auto", "2:4", "bitmask"]

BUNDLED_MODEL = "demo"
PACKING_METHOD = "llmprune"
"""``quant_method`` in the config.json of a packed checkpoint."""
DEFAULT_SPARSITY = 0.5
DEFAULT_STRUCTURE_SPARSITY = 0.25
"""What goes whole is missed more than single weights."""
DEFAULT_GENERATIONS = 40
DEFAULT_OFFSPRING = 16
DEFAULT_RECONSTRUCT_STEPS = 120
DEFAULT_RECONSTRUCT_LR = 0.02
MAX_DEFAULT_SEQ_LEN = 2048
MAX_EXACT_BLOCK = 1024
"""Weights of a block whose exact Hessian is taken: it costs a backward pass through a backward pass for each of them."""
MAX_EXHAUSTIVE_BLOCK = 22
"""Weights of a block of which all choices are tried."""
MAX_MIXED_SPARSITY = 0.75
_TASK = re.compile(r"\w[\w.:+*-]*", re.ASCII)
"""A task's name, or a glob of them; never a path, of which the harness would run the code."""


_MIXED: dict[Export, tuple[Pattern, ...]] = {
    "dense": (Pattern(4, 8), Pattern(2, 4), Pattern(1, 4)),
    "packed": (Pattern(2, 4), Pattern(1, 4)),
}
"""What the sites of a mixed job may have beside dense, of equal sparsity the better first. Packed: what the 2:4 format can
carry, of which 1:4 is a special case; it cannot carry 4:8.
"""


def default_seq_len(text_config: Any) -> int:
    """The model's maximum, at most 2048: the length most published perplexities are stated at."""
    return min(getattr(text_config, "max_position_embeddings", None) or MAX_DEFAULT_SEQ_LEN, MAX_DEFAULT_SEQ_LEN)


def _as_tuple(value: Any) -> Any:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


def _as_task_names(value: Any) -> Any:
    """Commas part names, alone and in a list."""
    names = _as_tuple(value)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return names  # pydantic says what it wants
    found = [part.strip() for name in names for part in name.split(",") if part.strip()]
    if wrong := next((name for name in found if not _TASK.fullmatch(name)), None):
        raise ConfigError(
            f"{wrong!r} is no name of a task. Name tasks as hellaswag,piqa; files of your own go into --tasks-path."
        )
    return tuple(dict.fromkeys(found))


Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
TaskNames = Annotated[tuple[str, ...], BeforeValidator(_as_task_names)]


class PruneConfig(BaseModel):
    """One pruning job. Every field has a default; ``PruneConfig()`` prunes the bundled model to 50 %.

    Unknown fields and impossible combinations raise :class:`llmprune.errors.ConfigError` (through :meth:`build`) or
    pydantic's ValidationError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(BUNDLED_MODEL, description="Hub ID or local directory; 'demo' is the bundled model.")
    revision: str | None = Field(None, description="Hub branch, tag or commit.")
    effort: EffortName | None = Field(
        None,
        description="Preset of method, permutation and reconstruction: fast, balanced or best; fields given beside it win.",
    )
    method: str = Field("wanda", description="Pruning method; see `llmprune methods`.")
    sparsity: Annotated[float, Field(ge=0, lt=1)] = Field(
        DEFAULT_SPARSITY,
        description="Fraction of zeros among the pruned sites' weights (n:m patterns fix it), or of what goes whole, "
        f"where the default is {DEFAULT_STRUCTURE_SPARSITY}.",
    )
    pattern: str = Field(
        "unstructured",
        description="Zeros: 'unstructured', n:m (n kept of every m) such as 2:4, or 'mixed' (each matrix dense, 4:8, 2:4 or "
        "1:4). Smaller matrices: 'structured' (head groups and FFN channels), 'blocks' (whole ones), 'experts'.",
    )
    widths: Widths = Field(
        "free",
        description="Pattern structured: 'free', widths of its own for every layer, or 'uniform': the same for all, so that "
        "stock transformers, vLLM and converters load it.",
    )
    budget: StructureBudget = Field(
        "kinds",
        description="Method tyr: sparsity is a share of the groups of attention, of FFNs and of experts each ('kinds'), or "
        "together of their 'parameters' or measured 'latency'.",
    )
    tyr_preset: TyrPreset = Field(
        "standard",
        description="Search of method tyr: 'local' (none, the same share everywhere), 'fast' (dynamic programming on measured "
        "curves), 'standard', or 'paper' (4 iterations of 50 generations of 128).",
    )
    tyr_iterations: Annotated[int, Field(ge=1, le=8)] | None = Field(
        None, description="Supernets of method tyr, each with half the step of the one before. Default: the preset's."
    )
    tyr_generations: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Generations of the search on each supernet. Default: the preset's."
    )
    tyr_offspring: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Candidates tried in every generation of method tyr. Default: the preset's."
    )
    tyr_hidden_weight: Annotated[float, Field(ge=0, lt=math.inf)] = Field(
        0.0, description="Weight, in the search, of the error of hidden states beside the KL of the outputs."
    )
    scope: Scope | None = Field(None, description="Set in which scores compete; default is the method's own paper's.")
    allocation: Allocation = Field(
        "uniform",
        description="How sparsity is shared among the sites: uniform, erk, owl, pqi, dp or evolution; the mean is the target.",
    )
    evolution_generations: Annotated[int, Field(ge=0)] = Field(
        DEFAULT_GENERATIONS, description="Generations of the search of allocation 'evolution'; 0 leaves it at dp's."
    )
    evolution_offspring: Annotated[int, Field(ge=1)] = Field(
        DEFAULT_OFFSPRING, description="Candidates tried in every generation of allocation 'evolution'."
    )
    sequential: Sequential = Field(
        "block",
        description="Recompute inputs once per 'block', as the papers do, or after each 'group' of sites sharing one; 'none' "
        "prunes on the dense model's inputs, for sweeps: later jobs find their statistics in the cache.",
    )
    skip: Names = Field((), description="Globs of site names to leave dense, e.g. '*.down_proj'.")
    calibration: str | None = Field(
        None,
        description="Calibration text: c4, wikitext2, ptb, stdlib, synthetic, hf:NAME[:CONFIG][:SPLIT][:COLUMN] or a "
        "path. Default: stdlib for the bundled model, else c4.",
    )
    num_samples: Annotated[int, Field(ge=1)] = Field(128, description="Calibration sequences.")
    seq_len: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Tokens per calibration sequence and evaluation window. Default: the model's maximum, at most 2048."
    )
    batch_size: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Calibration sequences per forward. Default: for 'group' all at once where memory allows, else few.",
    )
    eval: Names | None = Field(
        None, description="Evaluation texts, same names as calibration. Default: stdlib for the bundled model, else wikitext2."
    )
    max_eval_tokens: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Evaluate on at most this many tokens of each text; published protocols use all."
    )
    latency: bool = Field(True, description="Measure prefill and decode speed, dense and pruned.")
    prompt: Names | None = Field(
        None,
        description="Texts that both models go on with, side by side in the report. Default: four short ones.",
    )
    tasks: TaskNames = Field(
        (), description="Zero-shot tasks of lm-evaluation-harness (the extra 'tasks'), e.g. hellaswag,piqa, dense and pruned."
    )
    tasks_path: str | None = Field(None, description="Directory of tasks of your own: YAML files as the harness takes them.")
    task_limit: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Run only so many examples of each task: for trying, as the scores are no longer comparable."
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Examples shown before each question of a task. Default: the task's own number, mostly 0."
    )
    permute: bool = Field(
        False,
        description="n:m patterns: reorder channels inside MLPs and heads so that the pattern keeps more; the model stays.",
    )
    damping: Annotated[float, Field(gt=0, le=1)] = Field(0.01, description="Fraction of the mean Gram diagonal added to it.")
    reconstruct: bool = Field(
        False, description="Tune the kept weights of each pruned block against the dense model's hidden states."
    )
    reconstruct_steps: Annotated[int, Field(ge=1)] = Field(
        DEFAULT_RECONSTRUCT_STEPS, description="Optimiser steps per block at most, of one calibration batch each."
    )
    reconstruct_rounds: Annotated[int, Field(ge=1, le=16)] = Field(
        1, description="Prune each block in this many rounds of rising sparsity, tuning it after each."
    )
    reconstruct_lr: Annotated[float, Field(gt=0, lt=math.inf)] = Field(
        DEFAULT_RECONSTRUCT_LR, description="First step of a weight, as a fraction of its matrix's root mean square."
    )
    refine: Refine = Field(
        "none", description="Improve the mask against the loss of the whole model: none, or icbs (iterative, in blocks)."
    )
    icbs_preset: IcbsPreset = Field(
        "default", description="Settings of icbs: 'default', ours, with steps that do harm undone, or 'paper'."
    )
    icbs_passes: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Backward passes of icbs at most. Default: the preset's."
    )
    icbs_layers_per_step: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Matrices whose masks a pass of icbs changes at once, at most. Default: the preset's."
    )
    icbs_block_size: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Weights of a matrix that a pass of icbs decides anew. Default: the preset's."
    )
    icbs_sequences: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Calibration sequences of a pass of icbs. Default: the preset's, or all that there are."
    )
    icbs_hessian: IcbsHessian = Field(
        "fisher", description="Curvature of icbs: 'fisher', from the gradients, or 'exact', slow and for small blocks."
    )
    icbs_solver: IcbsSolver | None = Field(
        None, description="What solves a block of icbs: anneal, greedy or exhaustive. Default: the preset's."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps ...: where blocks are pruned and evaluated.")
    dtype: Dtype = Field("auto", description="Weights' dtype; auto keeps the checkpoint's.")
    offload: Offload = Field(
        "auto",
        description="Where weights and hidden states wait: 'none' on the device, 'cpu' in memory, 'disk' in files, a block of "
        "the model at a time being read; 'auto' as they fit.",
    )
    export: Export = Field(
        "dense", description="'dense': zeros in ordinary tensors, for any engine; 'packed': smaller, loaded by llmprune."
    )
    statistics_cache: bool = Field(
        True, description="Keep statistics of the dense model for later jobs on the same model and calibration, and use them."
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Seed of every random choice.")
    trust_remote_code: bool = Field(False, description="Run modelling code shipped with the model.")

    @model_validator(mode="before")
    @classmethod
    def _fields_of_effort(cls, values: Any) -> Any:
        """A preset sets the fields that are not given."""
        if not isinstance(values, dict) or not isinstance(values.get("effort"), str) or values["effort"] not in EFFORTS:
            return values
        return {**EFFORTS[values["effort"]].of(str(values.get("pattern", "unstructured"))), **values}

    @model_validator(mode="before")
    @classmethod
    def _sparsity_of_pattern(cls, values: Any) -> Any:
        """An n:m pattern fixes the sparsity; a different explicit one is a contradiction."""
        if not isinstance(values, dict) or not isinstance(values.get("pattern"), str):
            return values
        pattern = Pattern.parse(values["pattern"])
        if pattern.sparsity is None:
            return values
        asked = values.get("sparsity")
        try:
            contradicts = asked is not None and abs(float(asked) - pattern.sparsity) > 1e-9
        except (TypeError, ValueError, OverflowError):
            return values  # pydantic names the field
        if contradicts:
            raise ConfigError(
                f"pattern {pattern} means sparsity {pattern.sparsity:g}, but sparsity {asked} was asked for. Drop one of them."
            )
        return {**values, "sparsity": pattern.sparsity}

    @model_validator(mode="before")
    @classmethod
    def _method_of_structure(cls, values: Any) -> Any:
        """A structure has methods of its own: one of the two names the other, and less goes by default."""
        if not isinstance(values, dict):
            return values
        method, pattern = values.get("method"), values.get("pattern")
        if pattern is None and isinstance(method, str):
            pattern = structure_of(method)
        if pattern not in STRUCTURE_METHODS:
            return values
        return {"sparsity": DEFAULT_STRUCTURE_SPARSITY, "method": STRUCTURE_METHODS[pattern][0], **values, "pattern": pattern}

    @model_validator(mode="before")
    @classmethod
    def _icbs_starts_from_wanda(cls, values: Any) -> Any:
        """Method ``icbs`` is Wanda's mask, refined."""
        if not isinstance(values, dict) or values.get("method") != "icbs":
            return values
        if values.get("refine", "icbs") != "icbs":
            raise ConfigError(
                f"method icbs is wanda with refine 'icbs', but refine {values['refine']!r} was asked for. Drop --refine, or "
                "choose --method wanda."
            )
        return {**values, "method": "wanda", "refine": "icbs"}

    @model_validator(mode="after")
    def _check(self) -> Self:
        pattern = Pattern.parse(self.pattern)
        self._check_structure(pattern)
        if pattern.mixed:
            self._check_mixed()
        if self.allocation != "uniform" and pattern.m is not None:
            raise ConfigError(
                f"pattern {pattern} fixes the sparsity of every site, so allocation {self.allocation!r} has nothing to share. "
                "Drop --allocation, or choose the pattern 'unstructured' or 'mixed'."
            )
        if self.permute and pattern.m is None and not pattern.mixed:
            raise ConfigError(
                "permute moves weights between the groups of an n:m pattern, and the unstructured pattern has none. "
                "Drop --permute, or choose a pattern such as --pattern 2:4."
            )
        if self.reconstruct and self.sequential == "none":
            raise ConfigError(
                "reconstruct tunes each block on what the pruned blocks before it put out, and sequential 'none' carries the "
                "dense model's outputs on. Use --sequential block or group, or drop --reconstruct."
            )
        if self.reconstruct and (self.num_samples < 2 or (self.batch_size or 0) >= self.num_samples):
            raise ConfigError(
                "reconstruct holds a part of the calibration batches out: it needs num_samples of at least 2 and a smaller "
                f"batch_size, got {self.num_samples} and {self.batch_size}. Lower --batch-size or raise --num-samples."
            )
        if not self.tasks and (idle := self._given(("tasks_path", "task_limit", "num_fewshot"))):
            raise ConfigError(f"{idle[0]} is about tasks, and none is named. Add --tasks, or drop it.")
        if self.refine == "icbs":
            self._check_icbs()
        elif idle := self._given(name for name in type(self).model_fields if name.startswith("icbs_")):
            raise ConfigError(f"{idle[0]} says how a mask is refined, but none is. Add --refine icbs, or drop it.")
        return self

    def _given(self, names: Iterable[str]) -> list[str]:
        """Those of the fields that are not at their defaults."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

    def _check_structure(self, pattern: Pattern) -> None:
        """What goes whole has methods of its own, and no zeros that could be shared, ordered, refined or packed."""
        search = [name for name in type(self).model_fields if name == "budget" or name.startswith("tyr_")]
        structure = pattern.structure
        if structure is None:
            if structure_of(self.method):
                raise ConfigError(
                    f"method {self.method} takes out what goes whole, and pattern {pattern} leaves zeros. Drop --pattern, or "
                    "choose another --method."
                )
            if idle := self._given(["widths", *search]):
                raise ConfigError(f"{idle[0]} is of pattern 'structured', got pattern {pattern}. Drop it.")
            return
        if self.method not in STRUCTURE_METHODS[structure]:
            known = ", ".join(STRUCTURE_METHODS[structure])
            raise ConfigError(f"pattern {structure!r} is not for method {self.method!r}; its methods: {known}.")
        zeros = ("effort", "scope", "allocation", "permute", "reconstruct", "refine", "export")
        if idle := self._given(zeros):
            raise ConfigError(
                f"{idle[0]} is about zeros inside of matrices, and pattern {structure!r} makes matrices smaller. Drop it, or "
                "prune the result once more."
            )
        if structure != "structured" and (idle := self._given(["widths"])):
            raise ConfigError(f"{idle[0]} is of pattern 'structured', got {structure!r}. Drop it.")
        if self.sequential == "none":
            raise ConfigError(
                f"sequential 'none' is about zeros inside of matrices, and pattern {structure!r} makes matrices smaller. "
                "Drop --sequential."
            )
        if self.method != "tyr" and (idle := self._given(search)):
            raise ConfigError(f"{idle[0]} is of method tyr, got method {self.method}. Drop it, or choose --method tyr.")

    def _check_mixed(self) -> None:
        if self.allocation not in ("dp", "evolution"):
            raise ConfigError(
                "pattern 'mixed' chooses each matrix's n:m by what it costs, which allocation "
                f"{self.allocation!r} does not measure. Use --allocation dp or evolution, or a pattern such as 2:4."
            )
        if self.sparsity > MAX_MIXED_SPARSITY:
            raise ConfigError(
                f"pattern 'mixed' cannot reach sparsity {self.sparsity:g}: its sparsest pattern is 1:4. "
                f"The closest feasible one is {MAX_MIXED_SPARSITY}; use it, or the unstructured pattern."
            )

    def _check_icbs(self) -> None:
        """What the fields alone say; whether the method keeps dense weights is its table's to know."""
        for is_set, what, why, remedy in (
            (self.permute, "permute", "reorders the weights that a mask would be refined from", "--permute"),
            (self.pattern == MIXED, "pattern 'mixed'", "has groups of another size in every matrix", "--refine"),
            (
                self.reconstruct and self.reconstruct_rounds > 1, f"reconstruct_rounds {self.reconstruct_rounds}",
                "chooses the mask anew in each round", "--reconstruct-rounds",
            ),
        ):  # fmt: skip
            if is_set:
                raise ConfigError(f"refine improves one mask, and {what} {why}. Drop {remedy}.")
        if self.num_samples < 2:
            raise ConfigError(
                f"refine holds a part of the calibration sequences out: it needs num_samples of at least 2, got "
                f"{self.num_samples}. Raise --num-samples."
            )
        learn = self.num_samples - self.num_held_out
        if (self.icbs_sequences or 0) > learn:
            raise ConfigError(
                f"icbs_sequences is {self.icbs_sequences}, but of {self.num_samples} calibration sequences {learn} are there "
                "to learn from. Lower --icbs-sequences or raise --num-samples."
            )
        for chosen, name, most in (
            (self.icbs_hessian, "exact", MAX_EXACT_BLOCK), (self.icbs_solver, "exhaustive", MAX_EXHAUSTIVE_BLOCK)
        ):  # fmt: skip
            if chosen == name and (self.icbs_block_size or 0) > most:
                raise ConfigError(
                    f"{name} is for blocks of at most {most} weights, got {self.icbs_block_size}. Lower --icbs-block-size."
                )

    @property
    def num_held_out(self) -> int:
        """Calibration sequences, the last ones, that judge a refined mask and are not learnt from: an eighth."""
        return max(1, self.num_samples // 8)

    @classmethod
    def build(cls, config: PruneConfig | None = None, **overrides: Any) -> PruneConfig:
        """Validate once, at the boundary: a config, overrides by field name (None means default), or both.

        Raises ConfigError with one line per offending field.
        """
        values = config.model_dump(exclude_unset=True) if config is not None else {}
        given = {name: value for name, value in overrides.items() if value is not None}
        if config is not None and config.effort and {"effort", "pattern"} & given.keys():  # what it set is set anew
            preset = EFFORTS[config.effort].of(config.pattern)
            values = {name: value for name, value in values.items() if name not in preset or value != preset[name]}
        patterns = {str(values.get("pattern", "unstructured")), str(given.get("pattern", "unstructured"))}
        if "pattern" in given and "sparsity" not in given and patterns != {"unstructured"}:
            values.pop("sparsity", None)  # it was another pattern's
        try:
            return cls.model_validate({**values, **given})
        except ValidationError as error:
            raise ConfigError(describe(error)) from None

    def calibration_source(self, *, in_memory: bool = False) -> str:
        """The calibration text: as asked, else the bundled model's own kind of text, else the field's C4."""
        return self.calibration or ("stdlib" if self.model == BUNDLED_MODEL and not in_memory else "c4")

    def eval_sources(self, *, in_memory: bool = False) -> tuple[str, ...]:
        """The evaluation texts: as asked, else stdlib for the bundled model, else the field's WikiText-2."""
        if self.eval is not None:
            return self.eval
        return ("stdlib",) if self.model == BUNDLED_MODEL and not in_memory else ("wikitext2",)

    def target(self, default_scope: Scope) -> Target:
        """The target of every site under uniform allocation; another one changes its sparsity, and under ``mixed`` the
        pattern with it.
        """
        return Target(Pattern.parse(self.pattern), self.sparsity, self.scope or default_scope)

    def choices(self, in_features: int, scope: Scope) -> tuple[Target, ...]:
        """What a site of so many inputs may become under ``mixed``: dense first, then one target for every sparsity that
        a pattern which divides the inputs has, rising.
        """
        found = {0.0: Target(Pattern(), 0.0, scope)}
        for pattern in _MIXED[self.export]:
            assert pattern.m is not None and pattern.sparsity is not None
            if in_features % pattern.m == 0:
                found.setdefault(pattern.sparsity, Target(pattern, pattern.sparsity, scope))
        return tuple(found.values())


def describe(error: ValidationError, fields: Iterable[str] = tuple(PruneConfig.model_fields)) -> str:
    """One line for a pydantic error: field, what was given, what is allowed."""
    known = ", ".join(fields)
    parts = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or "config"
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown field {field!r}; known fields: {known}")
        else:
            parts.append(f"{field}: {item['msg']}, got {item['input']!r}")
    return "; ".join(parts)
