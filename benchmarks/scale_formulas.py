"""What a walk costs, from the shapes alone: operations and bytes of docs/scaling.md, one function for each formula.

T tokens in sequences of S, H hidden, O out and I in features of a site, L blocks. A multiplication with its addition is two
operations, and triangles are counted as triangles: these are limits, not what one program happens to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmprune import memory
from llmprune.anatomy.blocks import find_stack
from llmprune.anatomy.sites import Site
from llmprune.linalg import panels
from llmprune.spec import Need

STREAMED_BLOCKS = 3  # one is read, one is pruned, one is written
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
LLAMA_70B = {
    "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8,
}  # fmt: skip
LLAMA_405B = {
    "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
    "num_attention_heads": 128, "num_key_value_heads": 8,
}  # fmt: skip
LLAMAS = {"Llama 3 8B": LLAMA_8B, "Llama 3 70B": LLAMA_70B, "Llama 3 405B": LLAMA_405B}


@dataclass(frozen=True)
class Shape:
    """One block of a Llama and how many of them there are.

    Attributes:
        sites: (out, in) of every matrix of a block.
        inputs: in features of every group of sites that share an input.
        ends: weights of the embeddings and the head.
    """

    hidden_size: int
    num_blocks: int
    sites: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]
    ends: int

    @property
    def block_weights(self) -> int:
        """Matrix weights of one block."""
        return sum(rows * columns for rows, columns in self.sites)

    @property
    def num_weights(self) -> int:
        """Matrix weights of the model; norms are not counted."""
        return self.num_blocks * self.block_weights + self.ends


def shape_of(fields: dict[str, int]) -> Shape:
    """The shape of a Llama with these fields of its config."""
    hidden, inner = fields["hidden_size"], fields["intermediate_size"]
    keys = hidden // fields["num_attention_heads"] * fields["num_key_value_heads"]
    attention = ((hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden))
    sites = (*attention, (inner, hidden), (inner, hidden), (hidden, inner))
    ends = (1 if fields.get("tie_word_embeddings") else 2) * fields["vocab_size"] * hidden
    return Shape(hidden, fields["num_hidden_layers"], sites, (hidden, hidden, hidden, inner), ends)


def forward_flops(shape: Shape, num_tokens: int, seq_len: int) -> float:
    """One forward of T tokens through the blocks: 2 T sum(O I), and 2 T S H of causal attention; the head is not needed."""
    return shape.num_blocks * (2.0 * num_tokens * shape.block_weights + 2.0 * num_tokens * seq_len * shape.hidden_size)


def gram_flops(shape: Shape, num_tokens: int, *, as_computed: bool = False) -> float:
    """Gram matrices of all groups of sites: T sum(I^2), as they are symmetric; ``as_computed`` with our panels' overlap."""
    each = (2 * share(columns) if as_computed else 1.0 for columns in shape.inputs)
    return shape.num_blocks * float(num_tokens) * sum(part * size**2 for part, size in zip(each, shape.inputs, strict=True))


def share(num_columns: int) -> float:
    """The share of a symmetric product that is computed in panels: 1/2 + 1/(2 x panels) where they are even."""
    return sum(stop * (stop - start) for start, stop in panels(num_columns)) / num_columns**2


def factor_flops(shape: Shape) -> float:
    """Cholesky factor and inverse of the triangle, in fp64: I^3 / 3 each, per group of sites."""
    return shape.num_blocks * sum(2.0 * size**3 / 3 for size in shape.inputs)


def column_flops(shape: Shape) -> float:
    """SparseGPT's columns: every one moves all later ones of its rows, O I^2 per site."""
    return shape.num_blocks * sum(float(rows) * columns**2 for rows, columns in shape.sites)


def error_flops(shape: Shape) -> float:
    """The relative output error in the report: tr(W G W^T) of the dense weight and of its change, O I^2 each."""
    return shape.num_blocks * sum(2.0 * rows * columns**2 for rows, columns in shape.sites)


def num_columns(shape: Shape) -> int:
    """Columns that SparseGPT goes through one after the other."""
    return shape.num_blocks * sum(columns for _, columns in shape.sites)


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        product: operations of a matrix product of activations and weights, in the dtype of the model.
        gram: those of a Gram matrix (fp32 sums).
        single, double: those of fp32 and fp64 products.
        score_seconds: seconds to score, select and write one weight.
        column_seconds: seconds to start the operations of one SparseGPT column.
        disk: bytes read or written.
    """

    product: float
    gram: float
    single: float
    double: float
    score_seconds: float = 0.0
    column_seconds: float = 0.0
    disk: float = float("inf")


def walk_seconds(shape: Shape, method: str, num_tokens: int, seq_len: int, rates: Rates) -> dict[str, float]:
    """The parts of a one-pass walk: what one forward takes, and what the method adds."""
    parts = {"forward": forward_flops(shape, num_tokens, seq_len) / rates.product}
    if method == "sparsegpt":
        parts["Gram matrices"] = gram_flops(shape, num_tokens) / rates.gram
        parts["factors"] = factor_flops(shape) / rates.double
        parts["columns"] = column_flops(shape) / rates.single + num_columns(shape) * rates.column_seconds
        parts["errors"] = error_flops(shape) / rates.single
    parts["scores"] = shape.num_blocks * shape.block_weights * rates.score_seconds
    return parts


def total_seconds(
    shape: Shape, method: str, num_tokens: int, seq_len: int, rates: Rates, itemsize: int, *, passes: int = 1
) -> float:
    """A walk whose weights are read and written while it computes: the longer of the two.

    ``passes`` are the forwards of a block; 2 recomputes its outputs (``--sequential block``).
    """
    parts = walk_seconds(shape, method, num_tokens, seq_len, rates)
    computed = sum(parts.values()) + (passes - 1) * parts["forward"]
    return max(computed, 2 * shape.num_weights * itemsize / rates.disk)


def bytes_of(fields: dict[str, int], method: str, num_tokens: int, batch_tokens: int, itemsize: int) -> dict[str, int]:
    """What a streamed walk holds: blocks, hidden states in and out, activations of one batch, and what a solve needs.

    The last two are the formulas of :mod:`llmprune.memory`, by which ``llmprune plan`` counts.
    """
    sites = sites_of(fields)
    need = Need.GRAM if method == "sparsegpt" else Need.NORM
    hidden = fields["hidden_size"]
    activations = memory.block_activation_bytes(
        sites, num_tokens=batch_tokens, hidden_size=hidden, itemsize=itemsize, need=need
    )  # fmt: skip
    return {
        "checkpoint": shape_of(fields).num_weights * itemsize,
        "blocks": STREAMED_BLOCKS * shape_of(fields).block_weights * itemsize,
        "hidden states": 2 * num_tokens * hidden * itemsize,
        "activations": activations,
        "solve": memory.solve_bytes(sites, need),
    }


def sites_of(fields: dict[str, int]) -> Sequence[Site]:
    """The sites of one block, without any weights."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**fields, "num_hidden_layers": 1}))
    return find_stack(model).sites[0]


def fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """The exponent of y = a x^b by least squares on logarithms, and r^2 of that line."""
    if len(xs) != len(ys) or len(xs) < 2 or min(*xs, *ys) <= 0:
        raise ValueError(f"a fit needs two positive points or more, got {len(xs)} and {len(ys)}")
    log_x, log_y = (torch.tensor(values, dtype=torch.float64).log() for values in (xs, ys))
    x, y = log_x - log_x.mean(), log_y - log_y.mean()
    if not float(x.square().sum()):
        raise ValueError("a fit needs two different sizes")
    slope = float((x * y).sum() / x.square().sum())
    total = float(y.square().sum())
    return slope, 1 - float((y - slope * x).square().sum()) / total if total else 1.0
