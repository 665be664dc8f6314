"""Inline PTX for Triton's interpreter: what the kernels' assembly does, in numpy.

The interpreter (`TRITON_INTERPRET=1`) refuses `tl.inline_asm_elementwise`. `install()` teaches it the few instructions our
kernels use, register by register and lane by lane as the PTX ISA words them, and rounds fp32 -> bf16 to nearest even like
the GPU (the interpreter truncates). What silicon would leave undefined is an error here: metadata that is not ascending, an
output without early clobber written before the last input is read, a register that was never written, an address outside
the tensors a kernel was given or not a multiple of what is read there.

Call it in a process of its own, before any kernel runs: the environment variable decides when `@triton.jit` is applied.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

LANES = 32


def install() -> None:
    """Replace the interpreter's inline assembly and its fp32 -> bf16 cast, and watch its loads and stores."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def create_inline_asm(
        self: Any, asm: str, constraints: str, values: list[Any], types: Any, is_pure: bool, pack: int
    ) -> Any:
        arrays = [np.ascontiguousarray(value.data) for value in values]
        outputs = evaluate(asm, constraints, arrays, pack)
        handles = [interpreter.TensorHandle(array, tl.float32 if array.dtype == np.float32 else tl.int32) for array in outputs]
        return _Results(handles)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.get_element_ty() == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(to_bf16(src.data).astype(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    builder.create_inline_asm = create_inline_asm
    builder.cast_impl = cast_impl
    _watch_addresses(interpreter)


def _watch_addresses(interpreter: Any) -> None:
    """Raise where an unmasked lane reads or writes outside the kernel's arguments, or at an odd address."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, execute = builder.create_masked_load, builder.create_masked_store, executor.__call__
    ranges: list[tuple[int, int]] = []

    def check(pointers: Any, mask: Any) -> None:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        inside = np.zeros(addresses.shape, bool)
        for begin, end in ranges:
            inside |= (addresses >= begin) & (addresses + width <= end)
        if not inside.all():
            raise ValueError("a kernel reads or writes outside its arguments")
        if np.any(addresses % width):
            raise ValueError(f"a kernel reads or writes {width} bytes at an address that is not a multiple of {width}")

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        check(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if hasattr(value, "data_ptr")]
        ranges[:] = [(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()) for tensor in tensors]
        return execute(self, *args, **kwargs)

    builder.create_masked_load = create_masked_load
    builder.create_masked_store = create_masked_store
    executor.__call__ = call


class _Results:
    """What the builder returns for an operation of several results."""

    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def get_result(self, index: int) -> Any:
        return self.handles[index]


def evaluate(asm: str, constraints: str, inputs: list[NDArray[Any]], pack: int) -> list[NDArray[Any]]:
    """Run `asm` once per `pack` elements of the (equally shaped, 32-bit) `inputs`; returns the outputs in the same shape.

    Element `pack * i + j` of an operand is register `j` of thread `i`, which is how the compiled kernel lays them out when
    each lane holds `pack` neighbours (sizePerThread [1, pack], threadsPerWarp [32, 1]).
    """
    outputs = [c for c in constraints.split(",") if c.startswith("=")]
    shape = inputs[0].shape
    if any(array.dtype.itemsize != 4 or array.shape != shape for array in inputs):
        raise ValueError("inline assembly here takes 32-bit operands of one shape")
    state = _State([c.startswith("=&") for c in outputs])
    for array in inputs:
        state.bind(array.view(np.uint32).reshape(-1, pack))
    for opcode, operands in _parse(asm):
        _step(state, opcode, operands)
    results = []
    for first in range(0, len(outputs), pack):
        words = np.stack([state.output(first + j) for j in range(pack)], axis=-1).reshape(shape)
        results.append(words.view(np.float32 if outputs[first].endswith("f") else np.int32))
    return results


class _State:
    """The registers of all threads: name -> one word per thread."""

    def __init__(self, early_clobber: list[bool]) -> None:
        self.early_clobber = early_clobber
        self.words: dict[str, Words] = {}
        self.num_bound = len(early_clobber)
        self.overwritten = ""

    def bind(self, words: Words) -> None:
        for j in range(words.shape[1]):
            self.words[f"${self.num_bound}"] = words[:, j]
            self.num_bound += 1

    def read(self, name: str) -> Words:
        if name.startswith("0x"):
            return np.uint32(int(name, 16)) * np.ones(1, np.uint32)
        if name not in self.words:
            raise ValueError(f"register {name} is read before it is written")
        if name.startswith("$") and int(name[1:]) >= len(self.early_clobber) and self.overwritten:
            raise ValueError(f"input {name} is read after output {self.overwritten}, which is not early-clobber")
        return self.words[name]

    def write(self, name: str, words: Words) -> None:
        if name.startswith("$"):
            if int(name[1:]) >= len(self.early_clobber):
                raise ValueError(f"input {name} is written")
            if not self.early_clobber[int(name[1:])]:
                self.overwritten = name
        self.words[name] = words

    def output(self, index: int) -> Words:
        if f"${index}" not in self.words:
            raise ValueError(f"output ${index} is never written")
        return self.words[f"${index}"]


def _parse(asm: str) -> list[tuple[str, list[list[str]]]]:
    """Statements as (opcode, operands); an operand is the list of its registers (several for a `{...}` vector)."""
    statements = []
    for line in re.sub(r"//[^\n]*", "", asm).split(";"):
        text = re.sub(r"^[\s{}]+", "", line).strip()
        if not text or text.startswith(".reg"):
            continue
        opcode, _, rest = text.partition(" ")
        operands = [re.findall(r"[^\s,{}]+", operand) for operand in re.findall(r"\{[^}]*\}|[^\s,]+", rest)]
        statements.append((opcode, operands))
    return statements


def _step(state: _State, opcode: str, operands: list[list[str]]) -> None:
    if opcode.startswith("mma.sp"):
        targets, *vectors = operands
        d = _mma_sp(opcode, *([state.read(name) for name in vector] for vector in vectors))
        for name, words in zip(targets, d, strict=True):
            state.write(name, words)
        return
    for pattern, function in _SIMPLE.items():
        if re.fullmatch(pattern, opcode):
            sources = [state.read(name) for (name,) in operands[1:]]
            state.write(operands[0][0], function(opcode, *sources))
            return
    raise NotImplementedError(f"the interpreter's shim does not know {opcode}")


def to_bf16(values: NDArray[Any]) -> Words:
    """Bits of `values` rounded to the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.atleast_1d(np.asarray(values, np.float32)).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    result = np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint32)
    return result.reshape(np.shape(values))


def _halves(words: Words, dtype: str) -> NDArray[np.float32]:
    """The two 16-bit floats of each word, low half first, on a new last axis."""
    both = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=-1)
    if dtype == "bf16":
        return (both << np.uint32(16)).view(np.float32)
    return both.astype(np.uint16).view(np.float16).astype(np.float32)


def _packed(opcode: str, function: Callable[..., Any], *sources: Words) -> Words:
    """An f16x2 or bf16x2 instruction: computed in float64, rounded once."""
    dtype = "bf16" if "bf16x2" in opcode else "f16"
    with np.errstate(all="ignore"):
        result = function(*(_halves(words, dtype).astype(np.float64) for words in sources))
        bits = to_bf16(result) if dtype == "bf16" else result.astype(np.float16).view(np.uint16).astype(np.uint32)
    return np.asarray(bits[..., 0] | (bits[..., 1] << np.uint32(16)), np.uint32)


def _prmt(opcode: str, a: Words, b: Words, selector: Words) -> Words:
    """prmt.b32: byte i of the result is byte (selector nibble i) of b:a; bit 3 of the nibble replicates the sign."""
    source = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint64)
    for i in range(4):
        nibble = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (source >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return result.astype(np.uint32)


def _lop3(opcode: str, a: Words, b: Words, c: Words, table: Words) -> Words:
    """lop3.b32: bit by bit, the entry of the 8-entry table that the bits of a, b, c number."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for entry in range(8):
        if int(table[0]) >> entry & 1:
            terms = [word if entry >> (2 - i) & 1 else ~word for i, word in enumerate((a, b, c))]
            result |= terms[0] & terms[1] & terms[2]
    return result


_SIMPLE: dict[str, Callable[..., Words]] = {
    r"mov\.b32": lambda op, a: a,
    r"and\.b32": lambda op, a, b: a & b,
    r"or\.b32": lambda op, a, b: a | b,
    r"xor\.b32": lambda op, a, b: a ^ b,
    r"shl\.b32": lambda op, a, b: a << b,
    r"shr\.(u|b)32": lambda op, a, b: a >> b,
    r"prmt\.b32": _prmt,
    r"lop3\.b32": _lop3,
    r"sub(\.rn)?\.b?f16x2": lambda op, a, b: _packed(op, np.subtract, a, b),
    r"fma\.rn\.b?f16x2": lambda op, a, b, c: _packed(op, lambda x, y, z: x * y + z, a, b, c),
}


def _mma_sp(opcode: str, a: list[Words], b: list[Words], c: list[Words], e: list[Words], selector: list[Words]) -> list[Words]:
    """mma.sp m16n8k32, row.col, 16-bit inputs, fp32 accumulators, as the PTX ISA lays the fragments out.

    Lane = 4 g + t. A register r holds the two kept values of row g + 8 (r odd), columns 4 t + 16 (r >= 2) and the next three;
    B register r holds columns 2 t + 8 r and the next of token g; C register r holds row g + 8 (r >= 2), token 2 t + (r odd).
    Metadata of columns 0-15 sits in lane 2 selector of the four, of columns 16-31 in the next; low half for row g, high half
    for row g + 8, four bits per group of four columns. Columns that are not named are not multiplied (an Inf there is unseen).
    """
    match = re.fullmatch(r"mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k32\.row\.col\.f32\.(b?f16)\.\1\.f32", opcode)
    if not match:
        raise NotImplementedError(opcode)
    dtype = match[1]
    num_warps = len(a[0]) // LANES
    lane = np.arange(LANES)
    g, t = lane // 4, lane % 4
    picked = int(selector[0][0])
    warps = [word.reshape(num_warps, LANES) for word in (*a, *b, *c, *e)]
    a_regs, b_regs, c_regs, metadata = warps[:4], warps[4:8], warps[8:12], warps[12]

    tokens = np.zeros((num_warps, 32, 8), np.float32)
    for r in range(4):
        pair = _halves(b_regs[r], dtype)
        for slot in range(2):
            tokens[:, 8 * r + 2 * t + slot, g] = pair[..., slot]

    sums = np.zeros((num_warps, 16, 8), np.float32)
    with np.errstate(all="ignore"):
        for r in range(4):
            row, column = g + 8 * (r % 2), 4 * t + 16 * (r // 2)
            nibble = metadata[:, 4 * g + 2 * picked + r // 2] >> np.asarray(16 * (r % 2) + 4 * t, np.uint32) & np.uint32(15)
            first, second = nibble & np.uint32(3), nibble >> np.uint32(2)
            if np.any(first >= second):
                raise ValueError("mma.sp with metadata that is not ascending")
            pair = _halves(a_regs[r], dtype)
            for slot, index in enumerate((first, second)):
                chosen = tokens[np.arange(num_warps)[:, None], column + index]  # [warps, lanes, 8]
                np.add.at(sums, (slice(None), row), pair[..., slot, None] * chosen)
        return [
            np.ascontiguousarray(c_regs[r].view(np.float32) + sums[:, g + 8 * (r // 2), 2 * t + r % 2])
            .view(np.uint32)
            .reshape(-1)
            for r in range(4)
        ]
