"""What `make bench-quality` compares: models, targets, and variants, which are named sets of PruneConfig's fields.

Other benchmarks of quality have a :class:`Grid` of their own and share the rest.

A cell is one variant at one target of one model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmprune.efforts import EFFORTS
from llmprune.errors import ConfigError
from llmprune.methods import METHODS, Method, get_method
from llmprune.patterns import Pattern
from llmprune.spec import BUNDLED_MODEL, Need, PruneConfig

Fields = dict[str, Any]

TARGETS: dict[str, Fields] = {
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
    "70 %": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
}
NUM_SAMPLES, MAX_SEQ_LEN, MAX_EVAL_TOKENS = 64, 256, 32768
CALIBRATION, EVALUATION = "corpora/tinystories/calib.txt", "corpora/tinystories/test.txt"
PATHS = ("model", "calibration", "eval")
"""Fields that name something below the data's folder, for all models but the bundled one."""
EVERYTHING = ["*"]
"""What a model skips at a target that is not for it: it has no cells there."""


@dataclass(frozen=True)
class Variant:
    """One row of the tables: its name, the family that it is coloured by, the fields it sets, and where it is measured."""

    name: str
    family: str
    fields: Fields
    targets: tuple[str, ...] = tuple(TARGETS)


@dataclass(frozen=True)
class Model:
    """A model and its texts, as fields; ``skip`` names by target the sites that a pattern does not fit, or EVERYTHING."""

    name: str
    fields: Fields
    skip: dict[str, list[str]]


@dataclass(frozen=True)
class Grid:
    """What one benchmark compares: targets, as fields, and variants, both by name and in the order of the tables."""

    targets: dict[str, Fields]
    variants: dict[str, Variant]

    @classmethod
    def of(cls, targets: dict[str, Fields], variants: Iterable[Variant]) -> Grid:
        """Of variants, no two of which may have one name."""
        table = tuple(variants)
        named = {variant.name: variant for variant in table}
        assert len(named) == len(table), "two variants have the same name"
        return cls(targets, named)

    def check(self) -> None:
        """Raise ConfigError where this version cannot do what a variant asks for."""
        for variant in self.variants.values():
            assert variant.targets and set(variant.targets) <= set(self.targets), variant
            for target in variant.targets:
                try:
                    config = PruneConfig.build(**self.targets[target], **variant.fields)
                    if not Pattern.parse(config.pattern).structure:
                        get_method(config.method)
                except ConfigError as error:
                    raise ConfigError(f"variant {variant.name!r} at {target}: {error}") from None

    def cells(self, models: Iterable[Model]) -> list[Cell]:
        """All cells of these models, in the order of the tables."""
        return [
            Cell(model, variant, target, self)
            for model in models
            for variant in self.variants.values()
            for target in variant.targets
            if model.skip.get(target) != EVERYTHING
        ]


@dataclass(frozen=True)
class Cell:
    """One measurement: ``fields`` are the job's, with paths relative to the data's folder."""

    model: Model
    variant: Variant
    target: str
    grid: Grid = field(default_factory=lambda: QUALITY, repr=False)

    @property
    def key(self) -> str:
        """Its name in the file of results."""
        return f"{self.model.name}/{self.variant.name}/{self.target}"

    @property
    def fields(self) -> Fields:
        """Everything that is asked of PruneConfig."""
        skip = self.model.skip.get(self.target)
        texts: Fields = {**self.model.fields, "skip": skip} if skip else self.model.fields
        return {**texts, **self.grid.targets[self.target], **self.variant.fields}

    @property
    def hash(self) -> str:
        """Of all settings that are not the defaults, those of a preset among them: another one is of another job.

        A default that changes does not show, nor does the code: `--fresh` is for them.
        """
        settings = PruneConfig.build(**self.fields).model_dump(mode="json", exclude_defaults=True)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _family(method: Method) -> str:
    if method.needs == Need.NOTHING:
        return "weights alone"
    return "score and update" if method.updates_weights else "score"


_TABLE = (
    *(Variant(method.name, _family(method), {"method": method.name}) for method in METHODS.values()),
    *(
        Variant(f"{method}+reconstruct", "reconstruct", {"method": method, "reconstruct": True}, ("60 %", "2:4"))
        for method in ("magnitude", "wanda", "sparsegpt")
    ),
    *(
        Variant(f"{method}+permute", "permute", {"method": method, "permute": True}, ("2:4",))
        for method in ("wanda", "sparsegpt")
    ),
    *(
        Variant(f"{method}+{allocation}", "allocation", {"method": method, "allocation": allocation}, ("70 %",))
        for method in ("wanda", "sparsegpt")
        for allocation in ("owl", "dp", "evolution")
    ),
    Variant("icbs-short", "refine", {"method": "icbs", "icbs_passes": 8}, ("50 %",)),
    Variant("icbs", "refine", {"method": "icbs"}, ("50 %", "60 %", "2:4")),
    *(Variant(name, "preset", {"effort": name}, ("60 %", "2:4")) for name in EFFORTS),
)
QUALITY = Grid.of(TARGETS, _TABLE)
VARIANTS = QUALITY.variants


def find_models(root: Path) -> list[Model]:
    """The bundled model, on its own kind of text, and every model below ``root``/models, on TinyStories."""
    common = {"num_samples": NUM_SAMPLES, "max_eval_tokens": MAX_EVAL_TOKENS, "dtype": "float32"}
    texts = {"calibration": "stdlib", "eval": "stdlib"}
    found = [Model(BUNDLED_MODEL, {"model": BUNDLED_MODEL, **texts, "seq_len": MAX_SEQ_LEN, **common}, {})]
    for file in sorted((root / "models").glob("*/config.json")):
        config = json.loads(file.read_text())
        fields = {"model": f"models/{file.parent.name}", "calibration": CALIBRATION, "eval": EVALUATION, **common}
        fields["seq_len"] = min(MAX_SEQ_LEN, config["max_position_embeddings"])
        if "auto_map" in config:
            fields["trust_remote_code"] = True
        found.append(Model(file.parent.name, fields, _skip(config)))
    return found


def _skip(config: dict[str, Any]) -> dict[str, list[str]]:
    """An n:m pattern cannot be laid over a down projection whose inputs m does not divide: it stays dense there."""
    groups = {target: int(fields["pattern"].split(":")[1]) for target, fields in TARGETS.items() if "pattern" in fields}
    return {target: ["*.down_proj"] for target, size in groups.items() if config["intermediate_size"] % size}
