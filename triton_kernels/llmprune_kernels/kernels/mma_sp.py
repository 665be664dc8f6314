"""y = x W^T + b of a 2:4 weight on the sparse tensor cores, for the few tokens of a decode step.

O out features, I in features, T tokens. The weight lies in fragment order (`llmprune_kernels.fragments`), so a warp takes 16
rows x 256 columns with one 128-bit load of metadata and eight of values per lane and multiplies them with eight `mma.sp`
m16n8k32. It is a kernel for streaming weights: it reads 9/16 of the dense bytes, and its limit is that fraction of the
time a dense kernel needs for its weights.

A CTA computes 16 * row_tiles rows for 8 * token_tiles tokens. Its warps take the 256-column blocks in turn and add up at the
end through shared memory; `splits` > 1 gives the blocks of a row to several CTAs, which leave fp32 partial sums that a second
kernel adds in a fixed order. One block ahead of the multiplication, the loads of the next are already on their way: ptxas
would otherwise move every load to its use and wait eight times per block.

sm_90 machine code (Triton 3.9, 8 warps): registers per thread, and warp instructions per stored byte in the main loop

    row x token tiles    bf16, x in place    bf16, x shuffled    int8, x in place
    1 x 1                 96  0.025           96  0.020           80  0.100
    2 x 1                170  0.021          174  0.018          210  0.093
    1 x 2                 94  0.038           80  0.030           80  0.126
    2 x 2                130  0.025          128  0.020          134  0.105
    4 x 2                138  0.018           92  0.016          144  0.089
    2 x 4                174  0.040          178  0.034          170  0.131
    4 x 4                186  0.027          140  0.022          190  0.105
    2 x 8                  -                 182  0.050            -

A streaming multiprocessor issues up to four a cycle and an H200 delivers it some 18 bytes in that time: a budget of 0.22.

What the code leans on, checked by tests/kernels/test_mma_sp_aot.py in the compiled code: a tensor [num_warps * 32, 4] has one
row per lane and its four columns in four registers of that lane, which is how `mma.sp` wants its operands. Masks stay on
loads and stores: all 32 lanes must reach the instruction, and masked metadata reads as nibble 4 (columns 0 and 1), since
the instruction demands ascending pairs.
"""

# Triton's functions are untyped, and their tuples grow at compile time.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune_kernels.fragments import COLUMNS, ROWS

TOKENS = 8

_PAD_META = tl.constexpr(0x44444444)
_MMA_CONSTRAINTS = tl.constexpr("=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r,r,r,r,r,r,r")
_EXPAND_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r")


class Tile(NamedTuple):
    """How a launch cuts its work: see the module's docstring. `shuffle_x` copies x to fragment order first."""

    row_tiles: int
    token_tiles: int
    num_warps: int
    splits: int = 1
    shuffle_x: bool = False


@triton.constexpr_function
def _mma_asm(dtype, step):
    """mma.sp of k-step `step`: $0-3 = sums, $4-7 = sums so far, $8-11 values, $12-15 tokens, $16-19 metadata of 8 steps."""
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{dtype}.{dtype}.f32 "
        f"{{$0,$1,$2,$3}}, {{$8,$9,$10,$11}}, {{$12,$13,$14,$15}}, {{$4,$5,$6,$7}}, ${16 + step // 2}, 0x{step % 2};"
    )


@triton.constexpr_function
def _expand_asm(dtype):
    """16 int8 in $8-11 -> the same numbers as 16-bit floats, $0-3 the values of the first k-step and $4-7 of the second.

    A byte is put under an exponent where the last bit of the mantissa is worth one, and the offset is taken off again; both
    steps are exact. fp16: 0x64uu = 1024 + u with u = q + 128. bf16 has a bit less: 0x43uu = 128 + u below 128 and 256 + 2 (u -
    128) above, so the top bit is cut off and goes into what is subtracted (128 or 256).
    """
    magic = "0x64646464" if dtype == "f16" else "0x43434343"
    lines = ["{", ".reg .b32 bytes, low, high, offset;", f"mov.b32 offset, {'0x64806480' if dtype == 'f16' else '0xBF80BF80'};"]
    for word in range(4):  # step 2s + half: bytes 0 and 1 are row g, 2 and 3 row g + 8
        if dtype == "f16":
            lines.append(f"xor.b32 bytes, ${8 + word}, 0x80808080;")
        for hi, selector in enumerate(("0x4140", "0x4342")):
            out = f"${2 * word + hi}"
            if dtype == "f16":
                lines += [f"prmt.b32 low, bytes, {magic}, {selector};", f"sub.rn.f16x2 {out}, low, offset;"]
            else:
                lines += [
                    f"prmt.b32 bytes, ${8 + word}, {magic}, {selector};",
                    "and.b32 low, bytes, 0xFF7FFF7F;",
                    "and.b32 high, bytes, 0xFF80FF80;",
                    f"fma.rn.bf16x2 {out}, high, offset, low;",
                ]
    return "\n".join([*lines, "}"])


@triton.jit
def _load_weights(
    values_ptr, meta_ptr, tile, num_tiles, num_blocks, block, last, lane_word,
    ROW_TILES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Values (`WORDS` 128-bit words per lane and row tile) and metadata of each warp's `block`; nothing is read past `last`."""
    values = ()
    meta = ()
    for i in tl.static_range(ROW_TILES):
        index = tl.minimum(tile + i, num_tiles - 1).to(tl.int64) * num_blocks + block
        address = meta_ptr + index * 128 + lane_word
        meta += (tl.load(address, mask=block < last, other=_PAD_META, eviction_policy="evict_first"),)
        for word in tl.static_range(WORDS):
            address = values_ptr + index * (WORDS * 128) + word * 128 + lane_word
            values += (tl.load(address, mask=block < last, other=0, eviction_policy="evict_first"),)
    return values, meta


@triton.jit
def _load_tokens(
    x_ptr, token, num_tokens, in_features, num_blocks, block, last, lane, reg,
    FIRST: tl.constexpr, STEPS: tl.constexpr, TOKEN_TILES: tl.constexpr, SHUFFLED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """x of k-steps FIRST .. FIRST + STEPS of each warp's `block`, as the instruction's B fragments.

    A token that is not there reads the last one: the sums of different tokens do not meet, and its own is not stored.
    """
    x = ()
    for j in tl.static_range(TOKEN_TILES):
        for step in tl.static_range(FIRST, FIRST + STEPS):
            if SHUFFLED:
                index = (token // 8 + j).to(tl.int64) * num_blocks + block
                x += (tl.load(x_ptr + index * 1024 + step * 128 + lane * 4 + reg, mask=block < last, other=0),)
            else:
                row = tl.minimum(token + j * 8 + lane // 4, num_tokens - 1).to(tl.int64) * (in_features // 2)
                word = block * 128 + step * 16 + lane % 4 + reg * 4
                mask = (block < last) & ((reg < 4) if EVEN else (word < in_features // 2))
                x += (tl.load(x_ptr + row + word, mask=mask, other=0),)
    return x


@triton.jit
def _store(
    sums, y_ptr, scale_ptr, bias_ptr, row, token, num_tokens, out_features,
    NUM_WARPS: tl.constexpr,
):  # fmt: skip
    """Add the warps up, scale, add the bias, store what is inside [num_tokens, out_features]."""
    total = tl.sum(tl.reshape(sums, (NUM_WARPS, 32, 4)), axis=0)
    lane = tl.arange(0, 32)[:, None]
    reg = tl.arange(0, 4)[None, :]
    rows = row + lane // 4 + (reg // 2) * 8
    tokens = token + (lane % 4) * 2 + reg % 2
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + rows, mask=rows < out_features, other=0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + rows, mask=rows < out_features, other=0).to(tl.float32)
    mask = (tokens < num_tokens) & (rows < out_features)
    tl.store(y_ptr + tokens.to(tl.int64) * out_features + rows, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def mma_sp_kernel(
    x_ptr, values_ptr, meta_ptr, scale_ptr, bias_ptr, y_ptr, num_tokens, out_features, in_features,
    ROW_TILES: tl.constexpr, TOKEN_TILES: tl.constexpr, NUM_WARPS: tl.constexpr, SPLITS: tl.constexpr,
    SHUFFLED: tl.constexpr, EVEN: tl.constexpr, INT8: tl.constexpr,
    AHEAD: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One CTA of y[T, O]; with SPLITS > 1, of the partial sums fp32 [SPLITS, T, O].

    EVEN: in_features is a multiple of 256, so x needs no mask of its own. AHEAD: 0 nothing, 1 the weights, 2 the tokens too
    are loaded one round ahead. STEPS: k-steps of x loaded at a time where they are not loaded ahead.
    """
    DTYPE: tl.constexpr = "bf16" if x_ptr.dtype.element_ty == tl.bfloat16 else "f16"
    WORDS: tl.constexpr = 4 if INT8 else 8
    x_ptr = x_ptr.to(tl.pointer_type(tl.int32))
    num_tiles = tl.cdiv(out_features, 16)
    num_blocks = tl.cdiv(in_features, 256)
    num_chunks = tl.cdiv(num_tokens, 8 * TOKEN_TILES)
    token = (tl.program_id(0) % num_chunks) * (8 * TOKEN_TILES)
    tile = (tl.program_id(0) // num_chunks) * ROW_TILES
    per_split = tl.cdiv(num_blocks, SPLITS)
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, num_blocks)

    thread = tl.arange(0, NUM_WARPS * 32)[:, None]
    reg = tl.arange(0, 4)[None, :]
    lane = thread % 32
    lane_word = lane * 4 + reg
    mine = first + thread // 32

    sums = ()
    for _ in tl.static_range(ROW_TILES * TOKEN_TILES):
        sums += (tl.zeros((NUM_WARPS * 32, 4), tl.float32),)
    if AHEAD >= 1:
        values, meta = _load_weights(values_ptr, meta_ptr, tile, num_tiles, num_blocks, mine, last, lane_word, ROW_TILES, WORDS)
    if AHEAD >= 2:
        x = _load_tokens(
            x_ptr, token, num_tokens, in_features, num_blocks, mine, last, lane, reg, 0, 8, TOKEN_TILES, SHUFFLED, EVEN
        )
    for start in range(first, last, NUM_WARPS):
        block = start + thread // 32
        if AHEAD >= 1:
            next_values, next_meta = _load_weights(
                values_ptr, meta_ptr, tile, num_tiles, num_blocks, block + NUM_WARPS, last, lane_word, ROW_TILES, WORDS
            )
        else:
            values, meta = _load_weights(
                values_ptr, meta_ptr, tile, num_tiles, num_blocks, block, last, lane_word, ROW_TILES, WORDS
            )
        if AHEAD >= 2:
            next_x = _load_tokens(
                x_ptr, token, num_tokens, in_features, num_blocks, block + NUM_WARPS, last, lane, reg,
                0, 8, TOKEN_TILES, SHUFFLED, EVEN,
            )  # fmt: skip
        if INT8:
            wide = ()  # at the last moment: two registers for one
            for word in tl.static_range(ROW_TILES * WORDS):
                even, odd = tl.inline_asm_elementwise(
                    _expand_asm(DTYPE), _EXPAND_CONSTRAINTS, [values[word]], (tl.int32, tl.int32), True, 4
                )
                wide += (even, odd)
        else:
            wide = values
        for begin in tl.static_range(0, 8, STEPS):
            if AHEAD < 2:
                x = _load_tokens(
                    x_ptr, token, num_tokens, in_features, num_blocks, block, last, lane, reg,
                    begin, STEPS, TOKEN_TILES, SHUFFLED, EVEN,
                )  # fmt: skip
            for step in tl.static_range(STEPS):
                new = ()
                for i in tl.static_range(ROW_TILES):
                    for j in tl.static_range(TOKEN_TILES):
                        operands = [sums[i * TOKEN_TILES + j], wide[i * 8 + begin + step], x[j * STEPS + step], meta[i]]
                        new += (
                            tl.inline_asm_elementwise(
                                _mma_asm(DTYPE, begin + step), _MMA_CONSTRAINTS, operands, tl.float32, True, 4
                            ),
                        )
                sums = new
        if AHEAD >= 1:
            values = next_values
            meta = next_meta
        if AHEAD >= 2:
            x = next_x

    y_ptr += tl.program_id(1).to(tl.int64) * num_tokens * out_features
    for i in tl.static_range(ROW_TILES):
        for j in tl.static_range(TOKEN_TILES):
            _store(
                sums[i * TOKEN_TILES + j], y_ptr, scale_ptr, bias_ptr, (tile + i) * 16, token + j * 8,
                num_tokens, out_features, NUM_WARPS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["size"])
def _reduce_kernel(parts_ptr, bias_ptr, y_ptr, size, out_features, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y = the sum of the SPLITS partial sums, in order, plus the bias."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + split * size.to(tl.int64) + index, mask=mask, other=0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + index % out_features, mask=mask, other=0).to(tl.float32)
    tl.store(y_ptr + index, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _shuffle_kernel(x_ptr, shuffled_ptr, num_tokens, in_features):
    """x [T, I] -> 32-bit words [ceil(T/8), ceil(I/256), 8, 32, 4] in the order of B fragments, zeros where there is no x."""
    x_ptr = x_ptr.to(tl.pointer_type(tl.int32))
    shuffled_ptr = shuffled_ptr.to(tl.pointer_type(tl.int32))
    index = tl.arange(0, 1024)
    step, lane, reg = index // 128, index // 4 % 32, index % 4
    token = tl.program_id(1) * 8 + lane // 4
    word = tl.program_id(0) * 128 + step * 16 + lane % 4 + reg * 4
    mask = (token < num_tokens) & (word < in_features // 2)
    x = tl.load(x_ptr + token.to(tl.int64) * (in_features // 2) + word, mask=mask, other=0)
    block = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(shuffled_ptr + block * 1024 + index, x)


def linear(
    x_TI: Tensor,
    values_frag: Tensor,
    meta_frag: Tensor,
    bias: Tensor | None,
    out_features: int,
    *,
    row_tiles: int = 1,
    token_tiles: int = 1,
    num_warps: int = 4,
    splits: int = 1,
    shuffle_x: bool = False,
) -> Tensor:
    """x W^T + b with a 2:4 weight in fragment order, fp32 sums.

    Args:
        x_TI: bf16 or fp16 [T, I], contiguous; I a multiple of 4.
        values_frag: int32 [ceil(O/16), ceil(I/256), 8, 32, 4], of the dtype of x.
        meta_frag: int32 [ceil(O/16), ceil(I/256), 32, 4].
        bias: [O] of any float dtype, or None.
        out_features: O.
        row_tiles: tiles of 16 rows per CTA: 1, 2 or 4.
        token_tiles: tiles of 8 tokens per CTA: 1, 2, 4 or 8; more tokens take more CTAs, which read the weight again.
        num_warps: warps per CTA, a power of two up to 16.
        splits: CTAs among which the columns of a row are divided.
        shuffle_x: copy x to the order of the fragments first, which makes its loads a quarter as many.

    Returns:
        [T, O] in the dtype of x. An Inf or NaN in x that meets only pruned weights is not seen, as it is never multiplied.

    Raises:
        ValueError: an illegal tile.
    """
    tile = Tile(row_tiles, token_tiles, num_warps, splits, shuffle_x)
    return launch(x_TI, values_frag, meta_frag, None, bias, out_features, tile)


def launch(
    x_TI: Tensor,
    values_frag: Tensor,
    meta_frag: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    tile: Tile,
) -> Tensor:
    """`linear`; with `scale` (fp32 [O]) the values are int8 and every row is multiplied with its scale."""
    check_tile(tile)
    num_tokens, in_features = x_TI.shape
    y_TO = x_TI.new_empty(num_tokens, out_features)
    if not num_tokens:
        return y_TO
    if tile.shuffle_x:
        x_TI = _shuffled(x_TI, tile.token_tiles)
    elif x_TI.data_ptr() % 4:
        x_TI = x_TI.clone()  # a view that begins at an odd element; the kernel reads pairs
    parts = x_TI.new_empty(tile.splits, num_tokens, out_features, dtype=torch.float32) if tile.splits > 1 else None
    num_chunks = -(-num_tokens // (TOKENS * tile.token_tiles))
    num_row_blocks = -(-out_features // (ROWS * tile.row_tiles))
    mma_sp_kernel[(num_chunks * num_row_blocks, tile.splits)](
        x_TI,
        values_frag,
        meta_frag,
        scale,
        bias if parts is None else None,
        y_TO if parts is None else parts,
        num_tokens,
        out_features,
        in_features,
        **constants(tile, in_features, int8=scale is not None),
        num_warps=tile.num_warps,
        num_stages=1,
    )
    if parts is not None:
        block = 512
        _reduce_kernel[(-(-y_TO.numel() // block),)](
            parts, bias, y_TO, y_TO.numel(), out_features, SPLITS=tile.splits, BLOCK=block, num_warps=4
        )
    return y_TO


def constants(tile: Tile, in_features: int, *, int8: bool) -> dict[str, int | bool]:
    """The compile-time arguments of `mma_sp_kernel`."""
    ahead, x_steps = _schedule(tile)
    return {
        "ROW_TILES": tile.row_tiles,
        "TOKEN_TILES": tile.token_tiles,
        "NUM_WARPS": tile.num_warps,
        "SPLITS": tile.splits,
        "SHUFFLED": tile.shuffle_x,
        "EVEN": in_features % COLUMNS == 0,
        "INT8": int8,
        "AHEAD": ahead,
        "STEPS": x_steps,
    }


def check_tile(tile: Tile) -> None:
    """Raise ValueError for a tile the kernel has no code for."""
    allowed = {"row_tiles": (1, 2, 4), "token_tiles": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8, 16)}
    for name, values in allowed.items():
        if getattr(tile, name) not in values:
            raise ValueError(f"{name} of the mma.sp kernel is one of {values}, got {getattr(tile, name)}")
    if tile.splits < 1:
        raise ValueError(f"splits of the mma.sp kernel is at least 1, got {tile.splits}")


def _schedule(tile: Tile) -> tuple[int, int]:
    """AHEAD and STEPS: as much in flight as the registers hold (255 per thread, 128 with 16 warps) without a spill."""
    rows, tokens, warps = tile.row_tiles, tile.token_tiles, tile.num_warps
    if tokens == 1 and rows <= 2:
        return (2 if rows == 1 or warps <= 8 else 1), 8
    ahead = tokens < 8 and (rows == 1 or (rows == 2 and warps <= 8))
    return int(ahead), {1: 8, 2: 8, 4: 4, 8: 4}[tokens] if tile.shuffle_x else 8 // tokens


def _legal_tiles() -> list[Tile]:
    """Every tile whose registers suffice: no spill in 16 bit, a few words with int8 in single versions of ptxas."""
    tiles = []
    for rows, tokens, warps, shuffle_x in product((1, 2, 4), (1, 2, 4, 8), (4, 8, 16), (False, True)):
        registers_suffice = rows * tokens <= 16 if warps <= 8 else rows * tokens <= 8 and rows <= 2
        if registers_suffice and (tokens < 8 or rows == 1 or shuffle_x):
            tiles.append(Tile(rows, tokens, warps, 1, shuffle_x))
    return tiles


TILES = _legal_tiles()
"""What a tuner may try, with any `splits`; `linear` computes the other combinations too, but they spill registers."""


def _shuffled(x_TI: Tensor, token_tiles: int) -> Tensor:
    """x in the order of B fragments, a multiple of `token_tiles` tiles of eight tokens."""
    num_tokens, in_features = x_TI.shape
    num_tiles = -(-num_tokens // (TOKENS * token_tiles)) * token_tiles
    num_blocks = -(-in_features // COLUMNS)
    shuffled = x_TI.new_empty(num_tiles, num_blocks, COLUMNS * TOKENS)
    if x_TI.data_ptr() % 4:
        x_TI = x_TI.clone()
    _shuffle_kernel[(num_blocks, num_tiles)](x_TI, shuffled, num_tokens, in_features, num_warps=4)
    return shuffled
