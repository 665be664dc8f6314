"""Safetensors headers: what the library wrote passes, what it would not open is refused, and nothing else is raised."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from llmprune.errors import CorruptCheckpoint
from llmprune.io.headers import MAX_HEADER_BYTES, MAX_TENSORS, TensorHeader, read_header

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32,
    "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}  # fmt: skip
BITS = {"F32": 32, "U8": 8, "F4": 4, "F6_E2M3": 6, "I64": 64}
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}

quick = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=150,
)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
tensors = st.dictionaries(
    names,
    st.builds(
        lambda dtype, shape: torch.zeros(shape, dtype=DTYPES[dtype]),
        st.sampled_from(sorted(DTYPES)),
        st.lists(st.integers(0, 5), max_size=4),
    ),
    max_size=6,
)
# safetensors 0.8 writes no JSON where there is neither a tensor nor anything in the metadata.
metadata = st.none() | st.dictionaries(names, names, min_size=1, max_size=3)


def layout(header: bytes, body: bytes = b"") -> bytes:
    """A file of this header and these bytes of tensors."""
    return struct.pack("<Q", len(header)) + header + body


def written(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """What safetensors writes for the tensors."""
    save_file(tensors, file, metadata)
    return file.read_bytes()


def opened(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor, as safetensors itself reads them."""
    with safe_open(file, framework="pt") as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  (a handle is no dict)
        return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}


def verdict(file: Path, content: bytes) -> dict[str, TensorHeader] | None:
    """What read_header says of a file of this content: None where it refuses it, which it does in one line."""
    file.write_bytes(content)
    try:
        return read_header(file, "a/model")
    except CorruptCheckpoint as error:
        message = str(error)
        assert message.startswith("x.safetensors of 'a/model' is truncated or not safetensors (") and "\n" not in message
        assert message.endswith("Download it again.") and len(message) < 500
        return None


def agrees(file: Path, content: bytes) -> bool:
    """Whether the content passes; what passes must open in safetensors with the same tensors."""
    found = verdict(file, content)
    if found is None:
        return False
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in found.items()} == opened(file)
    return True


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


@quick
@given(tensors=tensors, metadata=metadata)
def test_what_safetensors_writes_passes(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> None:
    """Every dtype torch has, empty tensors, scalars, any name, with metadata and without: dtype, shape and bytes are right."""
    content = written(file, tensors, metadata)
    assert agrees(file, content)
    found = read_header(file, "a/model")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert DTYPES[found[name].dtype] == tensor.dtype and found[name].shape == tuple(tensor.shape)
        assert found[name].numel == tensor.numel()
        assert found[name].end - found[name].begin == tensor.numel() * tensor.itemsize


@quick
@given(tensors=tensors, metadata=metadata, data=st.data())
def test_every_truncation_is_refused(
    file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None, data: st.DataObject
) -> None:
    """Whatever is missing at the end, and whatever is there too much."""
    content = written(file, tensors, metadata)
    cut = data.draw(st.integers(0, len(content) - 1))
    assert verdict(file, content[:cut]) is None
    assert verdict(file, content + data.draw(st.binary(min_size=1, max_size=9))) is None


@quick
@given(tensors=tensors, metadata=metadata, data=st.data())
def test_changed_bytes_are_refused_or_open_in_safetensors(
    file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None, data: st.DataObject
) -> None:
    """Bytes replaced, inserted and taken out, most of them in the header."""
    content = bytearray(written(file, tensors, metadata))
    header = 8 + struct.unpack("<Q", content[:8])[0]
    likely = st.sampled_from([*b'{}[]":,0123456789-. eE\\u', *range(0, 256, 17)])
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, min(header, len(content) - 1)))
        match data.draw(st.sampled_from(["replace", "insert", "remove"])):
            case "replace":
                content[where] = data.draw(likely)
            case "insert":
                content.insert(where, data.draw(likely))
                content[:8] = struct.pack("<Q", header - 7) if where >= 8 else content[:8]
            case _:
                del content[where]
    agrees(file, bytes(content))


numbers = st.integers(-2, 30) | st.sampled_from([2**31, 2**53, 2**62, 2**63, 2**64, 2**70, 10**30])
junk: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "BOOL", "F4", "F6_E2M3", "F8_E8M0", "F128", "f32", ""]) | junk,
        "shape": st.lists(numbers | st.floats(), max_size=4) | junk,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | junk,
        "more": junk,
    },
)


@quick
@given(
    header=st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), entries | junk, max_size=3),
    num_bytes=st.integers(0, 40),
    ascii_only=st.booleans(),
    padding=st.sampled_from(["", " ", "\n\t ", "\0", "x", "{}"]),
)
def test_any_json_is_refused_or_opens_in_safetensors(
    file: Path, header: dict[str, Any], num_bytes: int, ascii_only: bool, padding: str
) -> None:
    """Headers made of anything JSON can hold, and of what only Python's reader takes for JSON (NaN, half surrogates)."""
    text = json.dumps(header, ensure_ascii=ascii_only) + padding
    agrees(file, layout(text.encode(errors="surrogatepass"), bytes(num_bytes)))


@quick
@given(
    parts=st.lists(
        st.tuples(st.sampled_from(["F32", "U8", "F4", "F6_E2M3", "I64"]), st.integers(0, 9)), min_size=1, max_size=4
    ),
    shift=st.tuples(st.integers(0, 3), st.integers(-8, 8), st.integers(-8, 8)),
)
def test_ranges_are_judged_as_safetensors_judges_them(
    file: Path, parts: list[tuple[str, int]], shift: tuple[int, int, int]
) -> None:
    """Tensors side by side, one of them moved: holes, overlaps and wrong sizes are refused, the untouched layout passes."""
    header, position, whole = {}, 0, True
    for number, (dtype, numel) in enumerate(parts):
        whole = whole and numel * BITS[dtype] % 8 == 0
        end = position + numel * BITS[dtype] // 8
        moved = (shift[1], shift[2]) if number == shift[0] else (0, 0)
        header[str(number)] = {"dtype": dtype, "shape": [numel], "data_offsets": [position + moved[0], end + moved[1]]}
        position = end
    untouched = shift[1:] == (0, 0) or shift[0] >= len(parts)
    passes = agrees(file, layout(json.dumps(header).encode(), bytes(position)))
    if untouched:
        assert passes == whole


@pytest.mark.parametrize(
    ("header", "body", "reason"),
    [
        (b"", 0, "the header is no JSON object"),
        (b"[]", 0, "the header is no JSON object"),
        (b' {"a":1}', 0, "the header is no JSON object"),
        (b'{"a":', 0, "Expecting value"),
        (b"{\xff}", 0, "can't decode byte 0xff"),
        (b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}", 0, "recursion"),
        (b'{"a":' + b"9" * 5000 + b"}", 0, "99999999999999999999 is no size or offset"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}', 0, "-1 is no size"),
        (b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0, "-0 is no size"),
        (b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', 4, "1.0 is no size"),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}', 0, "NaN is no size"),
        (b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', 4, "that are no sizes"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":0}}', 4, "or more than these"),
        (b'{"a":{"dtype":"F32","shape":[1]}}', 0, "has no dtype, shape and data_offsets"),
        (b'{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}', 4, "unknown dtype 'F33'"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', 4, "'a' takes other than its 4 bytes"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', 4, "'a' takes other than its -4 bytes"),
        (b'{"a":{"dtype":"U8","shape":[%d,%d,0],"data_offsets":[0,0]}}' % (2**50, 2**50), 0, "has more than"),
        (b'{"a":{"dtype":"U8","shape":[%s1],"data_offsets":[0,1]}}' % (b"1," * 64), 1, "that are no sizes"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 8, "4 bytes of tensors are described, 8 are there"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', 8, "begins at byte 4, the one before it ends at 0"),
        (b'{%s,%s}' % ((b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}',) * 2), 0, "stands twice"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}', 0, "stands twice"),
        (b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', 0, "has no dtype"),
        (b'{"__metadata__":{"a":1}}', 0, "__metadata__ holds something else than text"),
        (b'{"__metadata__":null}', 0, "__metadata__ holds something else than text"),
    ],
)  # fmt: skip
def test_each_defect_has_its_reason(file: Path, header: bytes, body: int, reason: str) -> None:
    """One defect at a time, with what the message says of it."""
    file.write_bytes(layout(header, bytes(body)))
    with pytest.raises(CorruptCheckpoint) as caught:
        read_header(file, "a/model")
    assert reason in str(caught.value)


def test_two_tensors_may_not_share_bytes(file: Path) -> None:
    """Equal ranges of two tensors are an overlap."""
    header = {"a": ENTRY, "b": ENTRY}
    assert verdict(file, layout(json.dumps(header).encode(), bytes(24))) is None
    header["b"] = {**ENTRY, "data_offsets": [24, 48]}
    assert agrees(file, layout(json.dumps(header).encode(), bytes(48)))


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_huge_declared_header_is_not_read(file: Path, length: int) -> None:
    """Neither in a small file nor in one that is really so large: nothing near the declared length is allocated."""
    for size in (100, MAX_HEADER_BYTES + 2**20):
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", length) + b"{}")
            stream.truncate(size)
        tracemalloc.start()
        try:
            with pytest.raises(CorruptCheckpoint, match=f"a header of {length} bytes in a file of {size}"):
                read_header(file, "a/model")
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()


def test_the_number_of_tensors_is_limited(file: Path) -> None:
    """100,000 pass, one more does not."""
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    header = {str(number): entry for number in range(MAX_TENSORS)}
    found = verdict(file, layout(json.dumps(header).encode()))
    assert found is not None and len(found) == MAX_TENSORS
    assert verdict(file, layout(json.dumps({**header, "more": entry}).encode())) is None


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, Path.mkdir, lambda file: file.symlink_to("nowhere"), lambda file: file.symlink_to(file.name)],
    ids=["pipe", "directory", "broken link", "link to itself"],
)
def test_what_is_no_file_is_refused_at_once(file: Path, make: Callable[[Path], Any]) -> None:
    """A pipe is not waited for."""
    make(file)
    with pytest.raises(CorruptCheckpoint, match="it is not a file"):
        read_header(file, "a/model")


def test_an_unreadable_file_says_why(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk is one of the file."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    file.write_bytes(layout(b"{}"))
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(CorruptCheckpoint, match="Input/output error"):
        read_header(file, "a/model")


def test_names_from_outside_are_quoted_and_cut(file: Path) -> None:
    """A name of a million characters, with line ends, does not become the message."""
    header = {"a\n" * 10**6: {**ENTRY, "dtype": "?"}}
    assert verdict(file, layout(json.dumps(header).encode(), bytes(24))) is None


def test_reading_headers_needs_no_torch() -> None:
    """The web process may look at a file."""
    code = "import sys, llmprune.io.headers; sys.exit(bool({'torch', 'safetensors', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
