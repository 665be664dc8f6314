"""Packed checkpoints on disk: the entry in config.json, and rewriting a directory's files from dense to packed and back.

For a packed layer ``<path>.weight`` is replaced by ``<path>.values`` and ``<path>.meta`` (2:4) or ``<path>.bits``,
``<path>.values`` and ``<path>.offsets`` (bitmask); their bytes are specified in triton_kernels/README.md. All other tensors
stay what they are, in the files they are in. One tensor is in memory at a time.

The first packed layer keeps a ``<path>.weight`` of no elements, the guard: a loader that does not know the format stops at its
shape. transformers without llmprune would only warn, and fill all packed layers with random numbers.

O out, I in features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from llmprune.errors import CorruptCheckpoint, UnsupportedModel, one_line
from llmprune.io.headers import bytes_of
from llmprune.io.tensors import CODES, DTYPES, Layout, TensorReader, TensorWriter
from llmprune.packing import choose_format, num_negative_zeros, num_nonzeros
from llmprune.spec import PACKING_METHOD, PackedFormat, PackFormat, describe
from llmprune_kernels import FLOATS, bitmask, legacy, two_four

FORMAT_VERSION = 1
ENTRY = "quantization_config"
INDEX = "model.safetensors.index.json"
PARTS: dict[PackedFormat, tuple[str, ...]] = {"2:4": ("values", "meta"), "bitmask": ("bits", "values", "offsets")}
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in FLOATS}


class PackedTensor(BaseModel):
    """One packed weight: format, [O, I], dtype, whether the dense tensor is its transpose, and for a bitmask the number of
    stored values.
    """

    model_config = ConfigDict(frozen=True)

    format: PackedFormat
    shape: tuple[int, int]
    dtype: Literal["bfloat16", "float16", "float32"]
    transposed: bool = False
    num_values: int | None = None


class Packing(BaseModel):
    """``quantization_config`` of a packed checkpoint's config.json: its packed weights by the names of their tensors, less
    the last part.
    """

    model_config = ConfigDict(frozen=True)

    quant_method: str = PACKING_METHOD
    format_version: int = FORMAT_VERSION
    modules: dict[str, PackedTensor]


def read_packing(entry: Mapping[str, Any], model: str) -> Packing:
    """Check a ``quantization_config`` whose ``quant_method`` is ours.

    Raises:
        UnsupportedModel: it is of another format version.
        CorruptCheckpoint: it is not in order.
    """
    version = entry.get("format_version")
    if version != FORMAT_VERSION:
        raise UnsupportedModel(
            f"{model!r} is packed in format version {version!r}; this llmprune reads version {FORMAT_VERSION}. Update llmprune."
        )
    try:
        return Packing.model_validate(dict(entry))
    except ValidationError as error:
        raise CorruptCheckpoint(f"{ENTRY} of {model!r} is not in order ({describe(error)[:200]}). Convert it again.") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files a model is loaded from: those its index names, or all there are."""
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


@dataclass(frozen=True)
class Change:
    """Tensors of one file that take the place of others, and how they are made."""

    inputs: tuple[str, ...]
    file: str
    outputs: Layout
    make: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Choice:
    """What became of one dense weight: how it is to be packed, or why it is not."""

    name: str
    tensor: PackedTensor | None
    sparsity: float
    num_negative_zeros: int = 0
    reason: str = ""


def survey(reader: TensorReader, weights: Mapping[str, bool], format: PackFormat) -> Generator[str, None, list[Choice]]:
    """Read every weight once and choose its format; yields each name as it is done.

    Args:
        weights: the tensors that may be packed, and whether each is stored transposed [I, O].
    """
    choices = []
    for name, transposed in weights.items():
        header = reader.tensors[name]
        dtype = DTYPES.get(header.dtype)
        if dtype not in _NAMES:
            choices.append(Choice(name, None, 0.0, reason=f"of dtype {header.dtype}"))
        else:
            choices.append(_choose(name, reader.read(name), transposed, format))
        yield name
    return choices


def _choose(name: str, weight: Tensor, transposed: bool, format: PackFormat) -> Choice:
    weight_OI = weight.T.contiguous() if transposed else weight
    num_zeros = weight_OI.numel() - num_nonzeros(weight_OI)
    sparsity = num_zeros / max(1, weight_OI.numel())
    chosen = choose_format(weight_OI, format)
    if chosen is None:
        reason = "not 2:4" if format == "2:4" else "too dense to be smaller by a tenth when packed"
        return Choice(name, None, sparsity, reason=reason)
    num_negative = num_negative_zeros(weight_OI)
    tensor = PackedTensor(
        format=chosen,
        shape=(weight_OI.shape[0], weight_OI.shape[1]),
        dtype=_NAMES[weight_OI.dtype],
        transposed=transposed,
        num_values=weight_OI.numel() - num_zeros + num_negative if chosen == "bitmask" else None,
    )
    lost = num_negative and chosen == "2:4" and num_negative - num_negative_zeros(two_four.unpack(*two_four.pack(weight_OI)))
    return Choice(name, tensor, sparsity, num_negative_zeros=int(lost))


def packing_changes(reader: TensorReader, choices: Sequence[Choice]) -> list[Change]:
    """The changes that pack what was chosen."""
    tensors = {choice.name: choice.tensor for choice in choices if choice.tensor is not None}
    return guarded([_pack(reader, name, tensor) for name, tensor in tensors.items()])


def guard_of(paths: Iterable[str]) -> str:
    """The name of the guard, given the names of all packed layers."""
    return f"{min(paths)}.weight"


def guarded(changes: list[Change]) -> list[Change]:
    """The changes, the first packed layer's with the guard."""
    paths = {
        name.removesuffix(".values"): index
        for index, change in enumerate(changes)
        for name in change.outputs
        if name.endswith(".values")
    }
    if paths:
        path = min(paths)
        index, guard = paths[path], guard_of(paths)
        change = changes[index]
        code = change.outputs[f"{path}.values"][0]
        empty = torch.empty(0, dtype=DTYPES[code])
        outputs = {**change.outputs, guard: (code, (0,))}
        changes[index] = replace(change, outputs=outputs, make=lambda: {**change.make(), guard: empty})
    return changes


def _pack(reader: TensorReader, name: str, tensor: PackedTensor) -> Change:
    path = name.removesuffix(".weight")

    def make() -> dict[str, Tensor]:
        weight = reader.read(name)
        weight_OI = weight.T.contiguous() if tensor.transposed else weight
        packed = two_four.pack(weight_OI) if tensor.format == "2:4" else bitmask.pack(weight_OI)
        return {f"{path}.{part}": value for part, value in zip(packed._fields, packed, strict=True)}

    return Change((name,), reader.file_of[name], layout_of(path, tensor), make)


def layout_of(path: str, tensor: PackedTensor) -> Layout:
    """Dtype code and shape of the tensors of a packed weight, by name."""
    (num_rows, num_columns), code = tensor.shape, _code(tensor)
    bits = ("U8", (num_rows, -(-num_columns // 8)))
    if tensor.format == "2:4":
        return {f"{path}.values": (code, (num_rows, num_columns // 2)), f"{path}.meta": bits}
    values, offsets = (code, (tensor.num_values or 0,)), ("I64", (-(-num_rows // 16) + 1,))
    return {f"{path}.bits": bits, f"{path}.values": values, f"{path}.offsets": offsets}


def bytes_when_packed(tensor: PackedTensor) -> int:
    """Bytes of a packed weight."""
    return sum(bytes_of(code, math.prod(shape)) for code, shape in layout_of("", tensor).values())


def bytes_when_dense(tensor: PackedTensor) -> int:
    """Bytes of the same weight as an ordinary tensor."""
    return bytes_of(_code(tensor), math.prod(tensor.shape))


def _code(tensor: PackedTensor) -> str:
    return next(CODES[dtype] for dtype, name in _NAMES.items() if name == tensor.dtype)


def unpacking_changes(reader: TensorReader, packing: Packing, model: str) -> list[Change]:
    """The changes that make a packed checkpoint dense. Raises CorruptCheckpoint where config.json and files disagree."""
    changes = []
    for path, tensor in packing.modules.items():
        layout = layout_of(path, tensor)
        for name, (code, shape) in layout.items():
            header = reader.tensors.get(name)
            if header is None or (header.dtype, header.shape) != (code, shape):
                found = "nothing" if header is None else f"{header.dtype} {list(header.shape)}"
                raise CorruptCheckpoint(
                    f"{model!r} holds {found} as {name}, where its config.json calls for {code} {list(shape)}. "
                    "Download it again."
                )
        changes.append(_unpack(reader, path, tensor, model))
    return changes


def _unpack(reader: TensorReader, path: str, tensor: PackedTensor, model: str) -> Change:
    inputs = tuple(f"{path}.{part}" for part in PARTS[tensor.format])

    def make() -> dict[str, Tensor]:
        parts = [reader.read(name) for name in inputs]
        with kernel_errors(path, model):
            weight_OI = _dense(tensor, parts)
        return {f"{path}.weight": weight_OI.T.contiguous() if tensor.transposed else weight_OI}

    num_rows, num_columns = tensor.shape
    shape = (num_columns, num_rows) if tensor.transposed else tensor.shape
    guard = (f"{path}.weight",) if f"{path}.weight" in reader.tensors else ()
    return Change((*inputs, *guard), reader.file_of[f"{path}.values"], {f"{path}.weight": (_code(tensor), shape)}, make)


def _dense(tensor: PackedTensor, parts: Sequence[Tensor]) -> Tensor:
    if tensor.format == "2:4":
        values, meta = parts
        return two_four.unpack(values, meta)
    bits, values, offsets = parts
    return bitmask.unpack(bits, values, offsets, tensor.shape[1])


def legacy_changes(
    reader: TensorReader, packable: Mapping[str, bool], model: str
) -> tuple[list[Change], dict[str, PackedTensor]]:
    """The changes that read the layers of an old compressed-tensors checkpoint.

    Args:
        packable: names of the weights that become packed ones (none of them transposed); all others become dense.

    Returns:
        The changes, and the packed weights by path.

    Raises CorruptCheckpoint for a layer whose tensors do not belong together.
    """
    changes: list[Change] = []
    packed: dict[str, PackedTensor] = {}
    for name in [name for name in reader.tensors if name.endswith(".compressed")]:
        path = name.removesuffix(".compressed")
        inputs = tuple(f"{path}.{part}" for part in legacy.PARTS)
        missing = [part for part in inputs if part not in reader.tensors]
        header = reader.tensors[name]
        if missing or len(header.shape) != 2 or DTYPES.get(header.dtype) not in _NAMES:
            what = f"lacks {missing[0]}" if missing else f"holds {name} as {header.dtype} {list(header.shape)}"
            raise CorruptCheckpoint(f"{model!r} {what}; a layer of {legacy.FORMAT} has {', '.join(legacy.PARTS)}.")
        tensor = PackedTensor.model_validate(
            {"format": "2:4", "shape": (header.shape[0], 2 * header.shape[1]), "dtype": _NAMES[DTYPES[header.dtype]]}
        )
        keep = f"{path}.weight" in packable
        if keep:
            packed[path] = tensor
        outputs: Layout = layout_of(path, tensor) if keep else {f"{path}.weight": (header.dtype, tensor.shape)}
        changes.append(Change(inputs, reader.file_of[name], outputs, _reads_legacy(reader, path, inputs, keep, model)))
    return guarded(changes), packed


def _reads_legacy(
    reader: TensorReader, path: str, inputs: Sequence[str], keep: bool, model: str
) -> Callable[[], Mapping[str, Tensor]]:
    def make() -> dict[str, Tensor]:
        with kernel_errors(path, model):
            found = legacy.read_two_four({name: reader.read(name) for name in inputs}, path)
        if keep:
            return {f"{path}.values": found.values, f"{path}.meta": found.meta}
        return {f"{path}.weight": two_four.unpack(*found, check=False)}

    return make


@contextmanager
def kernel_errors(path: str, model: str) -> Iterator[None]:
    """Turn a ValueError of the formats into CorruptCheckpoint that names the layer."""
    try:
        yield
    except ValueError as error:
        raise CorruptCheckpoint(f"{path} of {model!r}: {one_line(error)}. Download it again.") from None


def planned_bytes(reader: TensorReader, changes: Sequence[Change]) -> int:
    """Size of the files that :func:`rewrite` will write."""
    return sum(
        TensorWriter(Path(file), layout, reader.metadata[file]).num_bytes for file, layout in _layouts(reader, changes).items()
    )


def rewrite(reader: TensorReader, changes: Sequence[Change], folder: Path) -> Iterator[str]:
    """Write every file of the reader to ``folder`` with the changes made, and the index; yields what is written.

    ``folder`` may be where the files come from: each takes its place when it is whole.
    """
    layouts = _layouts(reader, changes)
    replaced = {name for change in changes for name in change.inputs}
    for file, layout in layouts.items():
        temporary = folder / f".{file}.tmp"
        with TensorWriter(temporary, layout, reader.metadata[file]) as writer:
            for name in layout:
                if name in reader.tensors and name not in replaced:
                    reader.copy(name, writer.at(name))
                    yield name
            for change in changes:
                if change.file == file:
                    for name, tensor in change.make().items():
                        writer.write(name, tensor)
                    yield change.inputs[0]
        temporary.rename(folder / file)
    if len(layouts) > 1 or (folder / INDEX).is_file():
        _write_index(folder, layouts)


def _layouts(reader: TensorReader, changes: Sequence[Change]) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    replaced = {name for change in changes for name in change.inputs}
    layouts: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {file: {} for file in reader.metadata}
    for name, header in reader.tensors.items():
        if name not in replaced:
            layouts[reader.file_of[name]][name] = (header.dtype, header.shape)
    for change in changes:
        layouts[change.file] |= change.outputs
    return layouts


def _write_index(folder: Path, layouts: Mapping[str, Layout]) -> None:
    """The index of the files just written; what else its metadata said is kept."""
    file = folder / INDEX
    index = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    total = sum(bytes_of(code, math.prod(shape)) for layout in layouts.values() for code, shape in layout.values())
    index["metadata"] = {**index.get("metadata", {}), "total_size": total}
    index["weight_map"] = {key: name for name, layout in layouts.items() for key in layout}
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
