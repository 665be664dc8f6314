"""Packed weights in memory and in safetensors files: formats, sizes, swapping layers, the hook that registers us."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tiny
from families import tiny_model
from llmprune.errors import CorruptCheckpoint
from llmprune.io.tensors import CODES, TensorReader, TensorWriter
from llmprune.packing import (
    choose_format,
    input_groups,
    num_negative_zeros,
    pack_,
    pack_layer,
    packable,
    packed_layers,
    put_empty_,
    sizes,
    unpack_,
)
from llmprune.spec import PackedFormat, PackFormat
from llmprune_kernels.linear import SparseLinear24
from two_four_weights import prune_, sparse_of, two_four_of

IDS = torch.arange(3, 19)[None]


def weight(rows: int = 32, columns: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random, without zeros."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


def one_of_four(dense_OI: Tensor) -> Tensor:
    """75 % zeros that are 2:4 as well."""
    out = torch.zeros_like(dense_OI)
    out[:, ::4] = dense_OI[:, ::4]
    return out


@pytest.mark.parametrize(
    ("weight_OI", "wanted", "chosen"),
    [
        (two_four_of(weight()), "auto", "2:4"),
        (two_four_of(weight()), "bitmask", "bitmask"),
        (two_four_of(weight(dtype=torch.float32)), "auto", "2:4"),
        (two_four_of(weight(dtype=torch.float16)), "2:4", "2:4"),
        (one_of_four(weight()), "auto", "bitmask"),
        (one_of_four(weight()), "2:4", "2:4"),
        (sparse_of(weight(), 0.6), "auto", "bitmask"),
        (sparse_of(weight(), 0.6), "2:4", None),
        (sparse_of(weight(), 0.05), "auto", None),
        (sparse_of(weight(), 0.05), "bitmask", None),
        (sparse_of(weight(), 0.15), "auto", None),
        (sparse_of(weight(), 0.2), "auto", "bitmask"),
        (sparse_of(weight(columns=63), 0.6), "auto", "bitmask"),
        (torch.zeros(32, 64), "auto", "bitmask"),
        (two_four_of(weight(dtype=torch.float64)), "auto", None),
        (torch.zeros(0, 64), "auto", None),
    ],
)
def test_choose_format(weight_OI: Tensor, wanted: PackFormat, chosen: PackedFormat | None) -> None:
    """2:4 where it fits, the bitmask where that is much smaller or nothing else fits, neither where it saves nothing."""
    assert choose_format(weight_OI, wanted) == chosen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_OI", [two_four_of(weight(48, 136)), sparse_of(weight(50, 63), 0.7)], ids=["2:4", "odd"])
def test_sizes_are_those_of_the_packed_layers(weight_OI: Tensor, dtype: torch.dtype) -> None:
    """What the choice is made by is what the format takes."""
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, dtype=dtype)
    linear.weight.data = weight_OI.to(dtype)
    for name, expected in sizes(linear.weight.detach()).items():
        assert sum(tensor.nbytes for tensor in pack_layer(linear, name).state_dict().values()) == expected


def test_packed_24_takes_at_most_057_of_dense() -> None:
    """At a shape of a real model, in bf16."""
    weight_OI = two_four_of(weight(1024, 4096))
    assert sizes(weight_OI)["2:4"] / weight_OI.nbytes == 0.5625
    assert choose_format(weight_OI) == "2:4"


def test_num_negative_zeros() -> None:
    """Only -0.0 counts, not 0.0 and not negative numbers."""
    assert num_negative_zeros(torch.tensor([[0.0, -0.0, -1.0, -0.0]])) == 2


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral", "qwen2"])
@pytest.mark.parametrize("sparsity", [None, 0.7])
def test_pack_and_unpack_in_memory(family: str, sparsity: float | None) -> None:
    """All that can be packed is, the model computes the same, and unpacking gives every bit back."""
    model = prune_(tiny_model(family), sparsity)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(input_ids=IDS).logits
    able, _ = packable(model)
    done = pack_(model)
    assert set(done) == set(able) and set(done.values()) == {"2:4" if sparsity is None else "bitmask"}
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)
    assert sorted(unpack_(model)) == sorted(done)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert isinstance(model.get_submodule(next(iter(done))), Conv1D if family == "gpt2" else nn.Linear)


def test_what_cannot_be_packed_says_why() -> None:
    """Experts of fused parameters, and weights that modules share."""
    able, others = packable(tiny_model("mixtral"))
    assert len(able) == 8 and len(others["experts of one fused parameter"]) == 16
    able, others = packable(tiny_model("zamba2"))
    assert any("shared_transformer" in name for name in others["weights that several modules share"])
    assert not any("shared_transformer" in name for name in able)


def test_packed_layers_that_read_one_tensor() -> None:
    """q, k, v and gate, up of every block, seen in a forward; down and o read their own."""
    model = prune_(tiny.make_model())
    pack_(model)
    groups = [[path.rpartition(".")[2] for path in group] for group in input_groups(model, IDS)]
    assert groups == 2 * [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


def test_a_packed_layer_of_another_shape_is_refused() -> None:
    """config.json and the model do not belong together."""
    model = tiny.make_model()
    for path in ("model.layers.0.mlp.up_proj", "model.layers.9.mlp.up_proj"):
        with pytest.raises(CorruptCheckpoint, match="names a packed layer"):
            put_empty_(model, path, "2:4", (4, 4), None, torch.float32)
    assert not packed_layers(model)
    put_empty_(model, "model.layers.0.mlp.up_proj", "2:4", (128, 64), None, torch.float32)
    assert isinstance(packed_layers(model)["model.layers.0.mlp.up_proj"], SparseLinear24)


TENSORS = {
    "b.bytes": torch.arange(5, dtype=torch.uint8),
    "a.half": torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).half(),
    "c.long": torch.tensor([2**40, -1]),
    "a.float": torch.tensor(1.5),
    "z.brain": torch.full((7,), -0.0, dtype=torch.bfloat16),
    "e.empty": torch.empty(0, 4),
    "flag": torch.tensor([True, False]),
    "ä": torch.ones(2, 2, dtype=torch.float64),
}


@pytest.mark.parametrize("metadata", [{"format": "pt"}, None])
def test_written_files_are_those_of_safetensors(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    """Byte for byte, in whatever order the tensors come."""
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata)
    layout = {name: (CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    with TensorWriter(tmp_path / "ours.safetensors", layout, metadata) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    written = (tmp_path / "ours.safetensors").read_bytes()
    assert written == (tmp_path / "theirs.safetensors").read_bytes()
    assert writer.num_bytes == len(written)
    assert load_file(tmp_path / "ours.safetensors")["c.long"].tolist() == [2**40, -1]


def test_tensors_are_read_and_copied_one_by_one(tmp_path: Path) -> None:
    """From several files, with their bits."""
    names = list(TENSORS)
    for number, part in enumerate((names[:4], names[4:])):
        save_file({name: TENSORS[name] for name in part}, tmp_path / f"{number}.safetensors")
    with TensorReader(sorted(tmp_path.glob("*.safetensors")), "model") as reader:
        for name, tensor in TENSORS.items():
            read = reader.read(name)
            assert read.dtype == tensor.dtype and read.shape == tensor.shape
            assert read.flatten().view(torch.uint8).equal(tensor.contiguous().flatten().view(torch.uint8))
            with (tmp_path / "copy").open("wb") as stream:
                reader.copy(name, stream)
            assert (tmp_path / "copy").read_bytes() == bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
        assert reader.file_of["flag"] == "1.safetensors"


ORDERS = {
    "llmprune first": "import llmprune, sys; assert not {'torch', 'transformers'} & set(sys.modules); import transformers",
    "transformers first": "import transformers; from transformers.quantizers import auto; import llmprune",
    "lazy transformers first": "import transformers; import llmprune; import transformers.modeling_utils",
    "twice": "import llmprune, importlib; importlib.reload(llmprune); import transformers",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_transformers_knows_our_quantizer_in_either_order(order: str) -> None:
    """``import llmprune`` brings neither torch nor transformers, and whichever comes first, both end up registered."""
    code = (
        f"{order}\n"
        "from transformers.quantizers import auto\n"
        "assert auto.AUTO_QUANTIZER_MAPPING['llmprune'].__name__ == 'PackedQuantizer'\n"
        "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['llmprune'].__name__ == 'PackedConfig'\n"
        "import sys; assert not [f for f in sys.meta_path if type(f).__name__ == '_AfterImport']\n"
        "assert auto.__spec__.loader.get_source(auto.__name__)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120, cwd=Path(__file__).parents[2])
