"""Packing a checkpoint, and making a packed one dense again: ``llmprune convert``. Weights stream from file to file."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from llmprune.devices import memory_errors
from llmprune.errors import ConfigError, UnsupportedModel
from llmprune.events import Converted, Event, Progress, Stage, StageFinished, StageStarted, Warned
from llmprune.io import checkpoint
from llmprune.io.models import build_empty, load_config, local_directory, locate, quantization_of
from llmprune.io.packed import (
    ENTRY,
    FORMAT_VERSION,
    Change,
    Choice,
    PackedTensor,
    Packing,
    bytes_when_dense,
    bytes_when_packed,
    legacy_changes,
    packing_changes,
    planned_bytes,
    read_packing,
    rewrite,
    survey,
    unpacking_changes,
    weight_files,
)
from llmprune.io.tensor_names import module_paths
from llmprune.io.tensors import TensorReader
from llmprune.packing import packable
from llmprune.report import Conversion, LeftDense, Packed
from llmprune.spec import PACKING_METHOD, Export, PackFormat, PruneConfig
from llmprune_kernels import legacy

To = Export
Kind = Literal["packed", "dense", "legacy"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def convert(
    model: str | Path,
    *,
    to: To,
    out: str | Path | None = None,
    format: PackFormat = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Conversion:
    """Pack the sparse weights of a checkpoint, or make a packed one dense; both ways every bit is kept.

    Args:
        model: directory or hub ID. Old compressed-tensors checkpoints in the format sparse-24-bitmask are read too.
        to: ``packed`` or ``dense``.
        out: the new directory; None names it after the model, beside it.
        format: store every weight as ``2:4`` or as ``bitmask``; ``auto`` chooses by its zeros.
        revision: hub branch, tag or commit.
        trust_remote_code: run modelling code shipped with the model.

    Raises:
        UserError: it is so already, holds nothing that packing makes smaller, is quantized, damaged, or ``out`` is in the way.
    """
    run = convert_iter(model, to=to, out=out, format=format, revision=revision, trust_remote_code=trust_remote_code)
    for event in run:
        if isinstance(event, Converted):
            return event.conversion
    raise AssertionError("a conversion ends with Converted")


def convert_iter(
    model: str | Path,
    *,
    to: To,
    out: str | Path | None = None,
    format: PackFormat = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Iterator[Event]:
    """:func:`convert` as a generator of events; the last one is Converted."""
    if to not in ("packed", "dense"):
        raise ConfigError(f"--to {to} is unknown; use packed or dense.")
    if format not in ("auto", "2:4", "bitmask"):
        raise ConfigError(f"--format {format} is unknown; use auto, 2:4 or bitmask.")
    config = PruneConfig.build(model=str(model), revision=revision, trust_remote_code=trust_remote_code)
    target = Path(out) if out is not None else default_out(config.model, to)
    local = local_directory(config.model)
    if local is not None:
        checkpoint.check_output(target, local)
    with checkpoint.disk_errors(target), memory_errors():
        yield from _Conversion(config, locate(config), target, to, format).run()


def default_out(model: str, to: To) -> Path:
    """Beside a directory, or in the current one for a hub ID: the model's name with ``-packed`` or ``-dense``."""
    local = Path(model).expanduser()
    other = "-dense" if to == "packed" else "-packed"
    name = (local.resolve().name if local.is_dir() else model.rpartition("/")[2]).removesuffix(other)
    return (local.resolve().parent if local.is_dir() else Path()) / f"{name}-{to}"


@dataclass
class _Conversion:
    config: PruneConfig
    path: Path
    out: Path
    to: To
    format: PackFormat
    warnings: list[str] = field(default_factory=list)

    def run(self) -> Iterator[Event]:
        begun = time.perf_counter()
        entry = quantization_of(self.path, self.config)
        kind = kind_of(entry, self.config.model)
        if kind == self.to:
            raise ConfigError(_already(kind, self.config.model))
        checkpoint.check_output(self.out, self.path)
        files = weight_files(self.path)
        folder = self.out.with_name(f".{self.out.name}.tmp")
        with TensorReader(files, self.config.model) as reader:
            yield StageStarted(stage="convert", total=0)
            plan = yield from self._plan(reader, kind, entry)
            checkpoint.check_disk(self.out, planned_bytes(reader, plan.changes))
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                self._copy_others(folder, {file.name for file in files})
                yield from write(reader, plan, folder, "convert")
                conversion = self._finish(folder, plan, time.perf_counter() - begun)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        yield StageFinished(stage="convert", seconds=conversion.seconds)
        yield Converted(conversion=conversion)

    def _plan(self, reader: TensorReader, kind: Kind, entry: Mapping[str, Any]) -> Generator[Event, None, Plan]:
        name = self.config.model
        if self.to == "dense" and kind == "packed":
            return Plan(unpacking_changes(reader, read_packing(entry, name), name), None, None)
        if self.to == "dense":
            return Plan(legacy_changes(reader, {}, name)[0], None, None)
        model = build_empty(load_config(self.path, self.config, quantized=kind == "legacy"), self.config)
        if kind == "legacy":
            return self._plan_legacy(reader, model)
        plan = yield from plan_packing(reader, model, self.format, "convert")
        assert plan.packed is not None
        if not plan.packed.num_sites:
            raise ConfigError(
                f"nothing to pack in {name}: {plan.densest}. Prune it first: llmprune prune {name} --pattern 2:4."
            )
        for warning in packing_warnings(plan.packed):
            self.warnings.append(warning)
            yield Warned(message=warning)
        return plan

    def _plan_legacy(self, reader: TensorReader, model: PreTrainedModel) -> Plan:
        """A layer is packed where the model has an ordinary one, else made dense."""
        if self.format == "bitmask":
            raise ConfigError(f"{self.config.model} is 2:4 throughout: make it dense first to store it as a bitmask.")
        sites, others = packable(model)
        names = [name.removesuffix("compressed") + "weight" for name in reader.tensors if name.endswith(".compressed")]
        paths = module_paths(model, names)
        able = {name: False for name in names if paths.get(name) in sites}
        changes, tensors = legacy_changes(reader, able, self.config.model)
        return Plan(changes, Packing(modules=tensors), _packed(tensors, 0, others))

    def _copy_others(self, folder: Path, weights: set[str]) -> None:
        """What is not a weight is copied byte for byte; pickles and files no index names stay behind."""
        others = {*weights, checkpoint.MANIFEST}
        for file in self.path.iterdir():
            if file.is_file() and file.name not in others and file.suffix not in (*_PICKLES, ".safetensors"):
                shutil.copyfile(file, folder / file.name)

    def _finish(self, folder: Path, plan: Plan, seconds: float) -> Conversion:
        write_entry(folder, plan.packing)
        bytes_after = checkpoint.weights_bytes(folder)
        conversion = Conversion(
            model=self.config.model,
            out=str(self.out),
            to=self.to,
            num_layers=len(plan.changes),
            packed=plan.packed,
            bytes_before=sum(file.stat().st_size for file in weight_files(self.path)),
            bytes_after=bytes_after,
            seconds=seconds,
            warnings=tuple(self.warnings),
        )
        manifest = checkpoint.read_any_manifest(self.path)
        if manifest is None:
            checkpoint.finish_plain(folder, self.out, packed=self.to == "packed")
        else:
            fingerprint, report = manifest
            report = report.model_copy(update={"packed": plan.packed, "checkpoint_bytes": bytes_after})
            checkpoint.finish(folder, self.out, report, fingerprint, checkpoint.license_of(self.path))
        return conversion


@dataclass(frozen=True)
class Plan:
    """What is to be changed, and what config.json and report will say of it; ``densest`` says why nothing is packed."""

    changes: list[Change]
    packing: Packing | None
    packed: Packed | None
    densest: str = ""


def kind_of(entry: Mapping[str, Any], model: str) -> Kind:
    """How a checkpoint stores its weights, by the entry in its config.json.

    Raises UnsupportedModel for quantized weights, and for sparse formats that cannot be read.
    """
    if not entry:
        return "dense"
    if entry.get("quant_method") == PACKING_METHOD:
        return "packed"
    sparsity = entry.get("sparsity_config")
    formats = [entry.get("format"), sparsity.get("format") if isinstance(sparsity, dict) else None]
    if "marlin-24" in formats:
        formats = ["marlin-24"]
    if legacy.FORMAT in formats and not entry.get("config_groups"):
        return "legacy"
    sparse = next((name for name in formats if isinstance(name, str) and name not in ("dense", legacy.FORMAT)), None)
    if sparse is not None and ("24" in sparse or "sparse" in sparse):
        try:
            legacy.check_format(sparse)
        except ValueError as error:
            raise UnsupportedModel(f"{model}: {error}") from None
    raise UnsupportedModel(
        f"{model} is quantized ({entry.get('quant_method', 'by an unnamed method')}); only 16- and 32-bit weights can be "
        "converted. Give the original."
    )


def _already(kind: Kind, model: str) -> str:
    if kind == "packed":
        return f"{model} is packed already: llmprune.load reads it. To pack it in another way convert it --to dense first."
    return f"{model} is dense already: its weights are ordinary tensors. There is nothing to do."


def plan_packing(
    reader: TensorReader, model: PreTrainedModel, format: PackFormat, stage: Stage
) -> Generator[Event, None, Plan]:
    """Read every weight that may be packed and choose its format; ``model`` may be on ``meta``."""
    sites, others = packable(model)
    paths = module_paths(model, [name for name in reader.tensors if name.endswith(".weight")])
    weights = {name: sites[path].transposed for name, path in paths.items() if path in sites}
    if hidden := sorted(set(sites) - {paths[name] for name in weights}):
        others["stored in another form than the model uses"] = hidden
    surveying = survey(reader, weights, format)
    done, total = 0, len(weights) + len(reader.tensors)
    while True:
        try:
            name = next(surveying)
        except StopIteration as stop:
            choices: list[Choice] = stop.value
            break
        done += 1
        yield Progress(stage=stage, done=done, total=total, detail=name)
    for choice in choices:
        if choice.tensor is None:
            others.setdefault(choice.reason, []).append(choice.name)
    tensors = {choice.name.removesuffix(".weight"): choice.tensor for choice in choices if choice.tensor is not None}
    negative = sum(choice.num_negative_zeros for choice in choices)
    packed = _packed(tensors, negative, others)
    return Plan(packing_changes(reader, choices), Packing(modules=tensors), packed, _densest(choices, packed))


def _densest(choices: list[Choice], packed: Packed) -> str:
    if not choices:
        reasons = "; ".join(f"{left.num_sites} {left.reason}" for left in packed.left_dense)
        return f"no matrix of its blocks can be packed ({reasons or 'it has none'})"
    most = max(choices, key=lambda choice: choice.sparsity)
    return f"its sparsest matrix is {most.name} with {most.sparsity:.1%} zeros ({most.reason})"


def write(reader: TensorReader, plan: Plan, folder: Path, stage: Stage) -> Iterator[Event]:
    """Write the files of a plan to ``folder``."""
    total = len(reader.tensors) * 2
    done = total - len(reader.tensors)
    for name in rewrite(reader, plan.changes, folder):
        done += 1
        yield Progress(stage=stage, done=min(done, total), total=total, detail=name)


def pack_folder_(folder: Path, model: PreTrainedModel, stage: Stage) -> Generator[Event, None, Packed]:
    """Pack a directory that ``model`` was just saved to, file by file in place; returns what was packed."""
    with TensorReader(weight_files(folder), folder.name) as reader:
        plan = yield from plan_packing(reader, model, "auto", stage)
        assert plan.packed is not None
        if plan.packed.num_sites:
            yield from write(reader, plan, folder, stage)
            write_entry(folder, plan.packing)
    return plan.packed


def packing_warnings(packed: Packed) -> list[str]:
    """What the user should know of a packed checkpoint."""
    warnings = []
    if packed.num_negative_zeros:
        warnings.append(
            f"{packed.num_negative_zeros:,} weights of -0.0 have no slot in 2:4 and come back as +0.0, which is equal; "
            "--format bitmask keeps them."
        )
    for left in packed.left_dense:
        what = "1 matrix stays" if left.num_sites == 1 else f"{left.num_sites} matrices stay"
        warnings.append(f"{what} dense, e.g. {left.example}: {left.reason}.")
    return warnings


def _packed(tensors: Mapping[str, PackedTensor], num_negative_zeros: int, others: Mapping[str, list[str]]) -> Packed:
    formats = [tensor.format for tensor in tensors.values()]
    return Packed(
        format_version=FORMAT_VERSION,
        num_two_four=formats.count("2:4"),
        num_bitmask=formats.count("bitmask"),
        dense_bytes=sum(map(bytes_when_dense, tensors.values())),
        packed_bytes=sum(map(bytes_when_packed, tensors.values())),
        num_negative_zeros=num_negative_zeros,
        left_dense=tuple(LeftDense(reason=reason, num_sites=len(names), example=names[0]) for reason, names in others.items()),
    )


def write_entry(folder: Path, packing: Packing | None) -> None:
    """Set the entry of config.json, or take it out; everything else in the file stays as it is."""
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for name in (ENTRY, "compression_config"):
        content.pop(name, None)
    if packing is not None:
        content[ENTRY] = packing.model_dump(mode="json", exclude_none=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
