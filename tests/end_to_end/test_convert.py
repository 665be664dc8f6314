"""Packed checkpoints on disk: converting there and back, loading, refusals, and ``prune --export packed``."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmprune
import tiny
from llmprune.errors import ConfigError, CorruptCheckpoint, LlmpruneError, OutputError, UnsupportedModel
from llmprune.events import Converted, StageStarted, Warned, parse_event
from llmprune.io.checkpoint import MANIFEST
from llmprune.io.packed import INDEX
from llmprune.packing import packed_layers
from llmprune.report import Conversion, Report
from two_four_weights import prune_

Cli = Callable[..., Any]
IDS = torch.arange(3, 19)[None]


def digests(folder: Path | str) -> dict[str, str]:
    """sha256 of every file of a directory."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(folder).iterdir()}


def save_sparse(folder: Path, model_type: str = "llama", sparsity: float | None = None, **changes: Any) -> Path:
    """A model on disk whose sites are 2:4, or sparse without a pattern."""
    model = tiny.make_model(model_type, **changes)
    prune_(model, sparsity)
    return tiny.save(model, folder)


def generate(model: PreTrainedModel) -> list[int]:
    """Greedily, 24 tokens."""
    tokens: torch.Tensor = model.generate(IDS, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    return tokens[0].tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def sparse_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2:4 Llama in bf16; read only."""
    return save_sparse(tmp_path_factory.mktemp("sparse") / "sparse", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def packed_dir(sparse_dir: Path) -> Path:
    """The same, packed; read only."""
    return Path(llmprune.convert(sparse_dir, to="packed").out)


@pytest.fixture
def broken(packed_dir: Path, tmp_path: Path) -> Path:
    """A copy of the packed checkpoint to break."""
    return Path(shutil.copytree(packed_dir, tmp_path / "broken"))


def edit_config(folder: Path, **entry: Any) -> None:
    """Change ``quantization_config``."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"] = content.get("quantization_config", {}) | entry
    file.write_text(json.dumps(content))


def edit_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Change or drop a tensor of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed}, folder / "model.safetensors", {"format": "pt"})


# There and back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [None, 0.6])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_there_and_back_gives_the_same_files(
    tmp_path: Path, model_type: str, sparsity: float | None, dtype: torch.dtype
) -> None:
    """Every byte of every file, in every dtype and both formats; packed generates what dense does, token for token."""
    dense = save_sparse(tmp_path / "dense", model_type, sparsity, dtype=dtype)
    packed = llmprune.convert(dense, to="packed")
    assert packed.out == str(tmp_path / "dense-packed")
    assert packed.packed is not None
    assert (packed.packed.num_two_four, packed.packed.num_bitmask)[sparsity is not None] == packed.num_layers > 0
    back = llmprune.convert(packed.out, to="dense", out=tmp_path / "back")
    assert (back.packed, back.num_layers) == (None, packed.num_layers)
    assert digests(back.out) == digests(dense)
    assert packed.bytes_before == back.bytes_after > packed.bytes_after == back.bytes_before
    assert generate(llmprune.load(packed.out, device="cpu")) == generate(llmprune.load(dense, device="cpu"))


def test_pruned_layers_take_at_most_057_of_bf16(tmp_path: Path) -> None:
    """At the hidden size of a small real model; the report's ratio is the files'."""
    changes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64, "num_hidden_layers": 1}
    dense = save_sparse(tmp_path / "dense", dtype=torch.bfloat16, **changes)
    done = llmprune.convert(dense, to="packed").packed
    assert done is not None and done.ratio == 0.5625
    sizes = {name: tensor.nbytes for name, tensor in load_file(tmp_path / "dense-packed" / "model.safetensors").items()}
    packed = sum(size for name, size in sizes.items() if name.endswith((".values", ".meta")))
    dense_bytes = sum(
        tensor.nbytes for name, tensor in load_file(dense / "model.safetensors").items() if name.endswith("proj.weight")
    )
    assert packed == done.packed_bytes and dense_bytes == done.dense_bytes and packed / dense_bytes <= 0.57


def test_sharded_checkpoints_keep_their_shards(tmp_path: Path) -> None:
    """Tensors stay in their files, the index is right, and the way back gives every file."""
    model = tiny.make_model(num_hidden_layers=4)
    prune_(model)
    model.save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    packed = Path(llmprune.convert(tmp_path / "dense", to="packed").out)
    index = json.loads((packed / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files == sorted(file.name for file in packed.glob("*.safetensors"))
    tensors = {name: file for file in files for name in load_file(packed / file)}
    assert tensors == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(packed / file).values())
    loaded = llmprune.load(packed, device="cpu")
    assert len(packed_layers(loaded)) == 28
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    llmprune.convert(packed, to="dense", out=tmp_path / "back")
    assert digests(tmp_path / "back") == digests(tmp_path / "dense")


def test_layers_whose_parts_lie_in_different_shards(packed_dir: Path, sparse_dir: Path, tmp_path: Path) -> None:
    """transformers may save them so; both loading and converting find all parts."""
    llmprune.load(packed_dir, device="cpu").save_pretrained(tmp_path / "again", max_shard_size="6KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 5
    llmprune.convert(tmp_path / "again", to="dense", out=tmp_path / "dense")
    ours, theirs = (llmprune.load(folder, device="cpu") for folder in (tmp_path / "dense", sparse_dir))
    for (name, tensor), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    """Head and embedding are one parameter of the loaded packed model."""
    dense = save_sparse(tmp_path / "dense", tie_word_embeddings=True)
    loaded = llmprune.load(llmprune.convert(dense, to="packed").out, device="cpu")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert generate(loaded) == generate(llmprune.load(dense, device="cpu"))


def test_negative_zeros_are_counted_and_the_bitmask_keeps_them(tmp_path: Path) -> None:
    """2:4 has no slot for a -0.0 beside two other weights: said so; ``--format bitmask`` loses nothing."""
    model = tiny.make_model()
    prune_(model)
    weight = model.get_submodule("model.layers.0.mlp.up_proj").get_parameter("weight")
    with torch.no_grad():
        weight[3] = torch.where(weight[3] == 0, -0.0, weight[3])
    dense = tiny.save(model, tmp_path / "dense")
    done = llmprune.convert(dense, to="packed")
    assert done.packed is not None and done.packed.num_negative_zeros == 32
    assert any("32 weights of -0.0" in warning for warning in done.warnings)
    llmprune.convert(done.out, to="dense", out=tmp_path / "back")
    assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"], weight)
    exact = llmprune.convert(dense, to="packed", format="bitmask", out=tmp_path / "exact")
    assert exact.packed is not None and exact.packed.num_negative_zeros == 0 and not exact.warnings
    llmprune.convert(exact.out, to="dense", out=tmp_path / "same")
    assert digests(tmp_path / "same") == digests(dense)


def test_what_stays_dense_is_said(tmp_path: Path) -> None:
    """Fused experts by their reason; layers that --format 2:4 does not fit."""
    dense = save_sparse(tmp_path / "dense", "mixtral")
    (warning,) = llmprune.convert(dense, to="packed").warnings
    assert warning.startswith("16 matrices stay dense") and "experts of one fused parameter" in warning
    model = tiny.make_model()
    prune_(model)
    nn.init.normal_(model.get_submodule("model.layers.1.mlp.up_proj").get_parameter("weight"))
    done = llmprune.convert(tiny.save(model, tmp_path / "mixed"), to="packed", format="2:4")
    assert done.num_layers == 13 and "model.layers.1.mlp.up_proj.weight: not 2:4" in done.warnings[0]


def test_the_card_of_a_model_that_is_not_ours(tmp_path: Path) -> None:
    """Packed, it says how to load; dense again, it is what it was."""
    dense = save_sparse(tmp_path / "dense")
    (dense / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    packed = Path(llmprune.convert(dense, to="packed").out)
    card = (packed / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "llmprune.load(" in card
    llmprune.convert(packed, to="dense", out=tmp_path / "back")
    assert digests(tmp_path / "back") == digests(dense)


def test_events_of_a_conversion(sparse_dir: Path, tmp_path: Path) -> None:
    """One stage with progress to its end, then the result."""
    from llmprune.conversion import convert_iter

    events = list(convert_iter(sparse_dir, to="packed", out=tmp_path / "out"))
    assert isinstance(events[0], StageStarted) and isinstance(events[-1], Converted)
    steps = [event for event in events if event.event == "progress"]
    assert [event.done for event in steps] == sorted(event.done for event in steps)
    assert steps[-1].done == steps[-1].total


# Loading ------------------------------------------------------------------------------------------------------------


def test_plain_transformers_loads_it(packed_dir: Path, sparse_dir: Path) -> None:
    """AutoModelForCausalLM.from_pretrained, after ``import llmprune``, with its own arguments."""
    model = AutoModelForCausalLM.from_pretrained(packed_dir)
    assert len(packed_layers(model)) == 14 and model.is_quantized and model.dtype == torch.bfloat16
    assert generate(model) == generate(AutoModelForCausalLM.from_pretrained(sparse_dir))
    placed = AutoModelForCausalLM.from_pretrained(packed_dir, device_map={"": "cpu"}, dtype=torch.float32)
    assert placed.dtype == torch.float32


def test_transformers_alone_stops(packed_dir: Path, tmp_path: Path) -> None:
    """Without ``import llmprune`` it only warns of an unknown quantization; the guard keeps it from random weights."""
    again = tmp_path / "again"
    llmprune.load(packed_dir, device="cpu").save_pretrained(again)
    code = """
import sys, transformers
for folder in sys.argv[1:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        assert "ignore_mismatched_sizes" in str(error), error
        print("stopped", folder)
"""
    command = [sys.executable, "-c", code, packed_dir, again]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == [f"stopped {packed_dir}", f"stopped {again}"]


def test_dtype_casts_values_alone(packed_dir: Path) -> None:
    """fp16 was asked for; the bits that say where weights are stay what they are."""
    state = llmprune.load(packed_dir, device="cpu", dtype=torch.float16).state_dict()
    dtypes = {name.rpartition(".")[2]: tensor.dtype for name, tensor in state.items()}
    assert (dtypes["values"], dtypes["meta"], dtypes["weight"]) == (torch.float16, torch.uint8, torch.float16)


def test_packed_false_gives_an_ordinary_model(packed_dir: Path, sparse_dir: Path, tmp_path: Path) -> None:
    """nn.Linear everywhere, the dense checkpoint's bits, and nothing of packing when it is saved."""
    model = llmprune.load(packed_dir, device="cpu", packed=False)
    assert not packed_layers(model)
    model.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", sparse_dir))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_loaded_packed_model_can_be_saved(packed_dir: Path, tmp_path: Path) -> None:
    """save_pretrained writes the same packed checkpoint; with another dtype its entry says so."""
    llmprune.load(packed_dir, device="cpu").save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        content = [(folder / name).read_bytes() for folder in (tmp_path / "again", packed_dir)]
        assert content[0] == content[1] if name != "config.json" else json.loads(content[0]) == json.loads(content[1])
    llmprune.load(packed_dir, device="cpu", dtype="float16").save_pretrained(tmp_path / "half")
    entry = json.loads((tmp_path / "half" / "config.json").read_text())["quantization_config"]
    assert {module["dtype"] for module in entry["modules"].values()} == {"float16"}
    llmprune.convert(tmp_path / "half", to="dense", out=tmp_path / "dense")


def test_names_that_transformers_changes_while_loading(tmp_path: Path) -> None:
    """The entry names what is in the file, also after the model was loaded and saved."""
    dense = save_sparse(tmp_path / "dense", "nemotron_h")
    packed = llmprune.convert(dense, to="packed")
    entry = json.loads((Path(packed.out) / "config.json").read_text())["quantization_config"]
    assert any(path.startswith("backbone.") for path in entry["modules"])
    llmprune.load(packed.out, device="cpu").save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == entry
    llmprune.convert(tmp_path / "again", to="dense", out=tmp_path / "back")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", dense))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_fused_layers_compute_and_save_the_same(packed_dir: Path, tmp_path: Path) -> None:
    """q, k, v and gate, up in one launch."""
    fused = llmprune.load(packed_dir, device="cpu", fuse=True)
    assert torch.equal(fused(input_ids=IDS).logits, llmprune.load(packed_dir, device="cpu")(input_ids=IDS).logits)
    assert sum(layer._fused is not None for layer in packed_layers(fused).values()) == 10  # type: ignore[attr-defined]
    fused.save_pretrained(tmp_path / "again")
    assert digests(tmp_path / "again")["model.safetensors"] == digests(packed_dir)["model.safetensors"]


def test_commands_read_packed_checkpoints(packed_dir: Path, sparse_dir: Path, eval_file: Path, tmp_path: Path) -> None:
    """evaluate, inspect, plan and prune take them like dense ones."""
    quick = {"eval": str(eval_file), "seq_len": 32, "max_eval_tokens": 256}
    ours = llmprune.evaluate(packed_dir, against=sparse_dir, latency=False, **quick).quality[0]
    assert ours.perplexity_pruned == ours.perplexity_dense and ours.kl == 0
    assert llmprune.inspect(packed_dir).blocks == llmprune.inspect(sparse_dir).blocks
    assert llmprune.plan(packed_dir, calibration=str(eval_file), eval=()).num_sites == 14
    report = llmprune.prune(packed_dir, out=tmp_path / "out", calibration=str(eval_file), **tiny.QUICK | {"eval": ()})
    assert report.num_sites == 14 and not packed_layers(llmprune.load(tmp_path / "out", device="cpu"))


# Old compressed-tensors checkpoints ---------------------------------------------------------------------------------


def save_legacy(dense: Path, folder: Path, *, key: str = "quantization_config", **entry: Any) -> Path:
    """The same model as compressed-tensors before 0.15 stored it."""
    shutil.copytree(dense, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight_OI = tensors.pop(name)
        groups = weight_OI.reshape(len(weight_OI), -1, 4)
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.abs().topk(2, -1).indices, True)
        flags = keep.reshape(len(weight_OI), -1, 8)
        path = name.removesuffix("weight")
        tensors[path + "bitmask"] = (flags << torch.arange(8)).sum(-1).to(torch.uint8)
        tensors[path + "compressed"] = groups[keep].reshape(len(weight_OI), -1)
        tensors[path + "shape"] = torch.tensor(weight_OI.shape)[:, None]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
    content[key] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity} | entry
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_legacy_checkpoints_become_dense_and_packed(sparse_dir: Path, packed_dir: Path, tmp_path: Path, key: str) -> None:
    """The tensors of the dense model; and those of its packed checkpoint, which loads."""
    old = save_legacy(sparse_dir, tmp_path / "old", key=key)
    llmprune.convert(old, to="dense", out=tmp_path / "dense")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "dense", sparse_dir))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((tmp_path / "dense" / "config.json").read_text()).keys().isdisjoint({key})
    done = llmprune.convert(old, to="packed", out=tmp_path / "packed")
    assert done.packed is not None and done.packed.num_two_four == 14 and done.packed.ratio == 0.5625
    assert generate(llmprune.load(tmp_path / "packed", device="cpu")) == generate(llmprune.load(packed_dir, device="cpu"))


def test_legacy_checkpoints_are_not_loaded_unconverted(sparse_dir: Path, tmp_path: Path) -> None:
    """The refusal names the command."""
    old = save_legacy(sparse_dir, tmp_path / "old")
    with pytest.raises(UnsupportedModel, match="llmprune convert .* --to dense"):
        llmprune.load(old, device="cpu")


def test_a_damaged_legacy_layer_is_named(sparse_dir: Path, tmp_path: Path) -> None:
    """A missing part, and a group with other than two bits."""
    old = save_legacy(sparse_dir, tmp_path / "old")
    edit_tensor(old, "model.layers.1.mlp.up_proj.bitmask", lambda bits: bits | 0xFF)
    with pytest.raises(CorruptCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj.* has 4 bits set"):
        llmprune.convert(old, to="dense", out=tmp_path / "out")
    edit_tensor(old, "model.layers.1.mlp.up_proj.shape", lambda _: None)
    with pytest.raises(CorruptCheckpoint, match=r"lacks model\.layers\.1\.mlp\.up_proj\.shape"):
        llmprune.convert(old, to="dense", out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "marlin-24 checkpoints are not supported"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}}, "'sparse-bitmask'"),
        ({"quant_method": "gptq", "bits": 4}, r"is quantized \(gptq\)"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {}},
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            "is quantized",
        ),
    ],
)
def test_quantized_checkpoints_are_refused_by_name(
    sparse_dir: Path, tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    """Whichever way they are to go."""
    model = Path(shutil.copytree(sparse_dir, tmp_path / "model"))
    edit_config(model, **entry)
    for to in ("packed", "dense"):
        with pytest.raises(UnsupportedModel, match=message):
            llmprune.convert(model, to=to, out=tmp_path / "out")


def test_what_makes_no_sense_is_refused(
    packed_dir: Path, sparse_dir: Path, tiny_model_dir: Path, tmp_path: Path, text_file: Path
) -> None:
    """Packed twice, dense twice, nothing to pack, unknown words, an output that is in the way: each with its remedy."""
    cases: list[tuple[Path, dict[str, Any], type[LlmpruneError], str]] = [
        (packed_dir, {"to": "packed"}, ConfigError, "is packed already"),
        (sparse_dir, {"to": "dense"}, ConfigError, "is dense already"),
        (tiny_model_dir, {"to": "packed"}, ConfigError, r"nothing to pack .*sparsest matrix is .* with 0\.0% zeros"),
        (sparse_dir, {"to": "sideways"}, ConfigError, "use packed or dense"),
        (sparse_dir, {"to": "packed", "format": "csr"}, ConfigError, "use auto, 2:4 or bitmask"),
        (sparse_dir, {"to": "packed", "out": sparse_dir / "in"}, OutputError, "lies inside it"),
        (sparse_dir, {"to": "packed", "out": text_file.parent}, OutputError, "not empty"),
    ]
    for model, arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            llmprune.convert(model, **{"out": tmp_path / "out"} | arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("read", ["load", "convert", "from_pretrained"])
@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        ({"format_version": 2}, UnsupportedModel, "format version 2; this llmprune reads version 1"),
        ({"format_version": None}, UnsupportedModel, "format version None"),
        ({"modules": {"model.layers.0.mlp.up_proj": {"format": "3:4"}}}, CorruptCheckpoint, "not in order"),
        (
            {"modules": {"model.layers.7.mlp.up_proj": {"format": "2:4", "shape": [128, 64], "dtype": "bfloat16"}}},
            CorruptCheckpoint,
            r"model\.layers\.7\.mlp\.up_proj",
        ),
    ],
)
def test_entries_that_cannot_be_read(
    broken: Path, tmp_path: Path, read: str, entry: dict[str, Any], kind: type[LlmpruneError], message: str
) -> None:
    """Another version, an unknown format, a layer the model does not have: loading and converting refuse alike."""
    edit_config(broken, **entry)
    with pytest.raises(kind, match=message):
        _read(broken, read, tmp_path)


def _read(folder: Path, read: str, tmp_path: Path) -> None:
    if read == "load":
        llmprune.load(folder, device="cpu")
    elif read == "convert":
        llmprune.convert(folder, to="dense", out=tmp_path / "out")
    else:
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("read", ["load", "convert", "from_pretrained"])
def test_a_metadata_nibble_that_does_not_ascend_is_found(broken: Path, tmp_path: Path, read: str) -> None:
    """Never a wrong number: the layer, the row and the group are named."""

    def spoil(meta: torch.Tensor) -> torch.Tensor:
        meta[5, 3] = 0x45
        return meta

    edit_tensor(broken, "model.layers.1.self_attn.o_proj.meta", spoil)
    with pytest.raises(CorruptCheckpoint, match=r"model\.layers\.1\.self_attn\.o_proj .*row 5, group 6"):
        _read(broken, read, tmp_path)


@pytest.mark.parametrize("read", ["load", "convert"])
@pytest.mark.parametrize("change", [lambda tensor: None, lambda tensor: tensor[:-1].clone(), lambda tensor: tensor.float()])
def test_tensors_that_are_not_what_the_entry_says(
    broken: Path, tmp_path: Path, read: str, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> None:
    """A tensor that is missing, of another shape, or of another dtype."""
    edit_tensor(broken, "model.layers.1.self_attn.o_proj.values", change)
    if read == "load" and change(torch.zeros(2, 2)) is not None and change(torch.zeros(2, 2)).shape == (2, 2):  # type: ignore[union-attr]
        assert packed_layers(llmprune.load(broken, device="cpu"))  # transformers casts on loading
        return
    with pytest.raises(CorruptCheckpoint, match=r"model\.layers\.1\.self_attn\.o_proj\.values"):
        _read(broken, read, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


# prune --export packed ----------------------------------------------------------------------------------------------


@pytest.fixture
def job(tiny_model_dir: Path, text_file: Path, eval_file: Path) -> dict[str, Any]:
    """A quick job that exports packed."""
    quick = {"calibration": str(text_file), "eval": (str(eval_file),), "export": "packed", "pattern": "2:4"}
    return {"model": tiny_model_dir, **tiny.QUICK, **quick}


def check_manifest(folder: Path) -> Report:
    """Every digest is right; the manifest's report is report.json, which is returned."""
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["sha256"] == {name: digest for name, digest in digests(folder).items() if name != MANIFEST}
    report = Report.model_validate_json((folder / "report.json").read_text())
    assert Report.model_validate(manifest["report"]) == report
    return report


def test_export_packed(job: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint is packed, the report says how and what it saves, and the weights are those of a dense export."""
    report = llmprune.prune(out=tmp_path / "packed", **job | {"dtype": "bfloat16"})
    assert report.packed is not None and report.packed.num_two_four == report.num_sites == 14
    assert report.packed.ratio is not None and report.packed.ratio <= 0.57
    assert report.checkpoint_bytes == (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert check_manifest(tmp_path / "packed") == report
    assert "llmprune.load" in (tmp_path / "packed" / "README.md").read_text()
    assert "stored packed" in (tmp_path / "packed" / "report.html").read_text()
    dense = llmprune.prune(out=tmp_path / "dense", **job | {"dtype": "bfloat16", "export": "dense"})
    assert dense.packed is None and dense.quality[0].perplexity_pruned == report.quality[0].perplexity_pruned
    assert dense.num_zeros_model == report.num_zeros_model
    llmprune.convert(tmp_path / "dense", to="packed", out=tmp_path / "converted")
    assert digests(tmp_path / "converted")["model.safetensors"] == digests(tmp_path / "packed")["model.safetensors"]


def test_a_checkpoint_of_ours_goes_there_and_back(job: dict[str, Any], tmp_path: Path) -> None:
    """Report, page, card and manifest follow the weights; dense again, all files are what they were."""
    llmprune.prune(out=tmp_path / "dense", **job | {"export": "dense"})
    packed = Path(llmprune.convert(tmp_path / "dense", to="packed").out)
    report = check_manifest(packed)
    assert report.packed is not None and report.packed.num_two_four == 14
    assert report.checkpoint_bytes == (packed / "model.safetensors").stat().st_size
    assert "llmprune convert DIR --to packed" in (packed / "README.md").read_text()
    llmprune.convert(packed, to="dense", out=tmp_path / "back")
    assert digests(tmp_path / "back") == digests(tmp_path / "dense")


def test_export_packed_of_what_cannot_be_packed(job: dict[str, Any], tmp_path: Path) -> None:
    """5 % zeros save nothing: a warning says what stays dense and why, and the checkpoint is an ordinary one."""
    report = llmprune.prune(out=tmp_path / "out", **job | {"pattern": "unstructured", "sparsity": 0.05})
    assert report.packed is None and report.benchmark is None
    assert any("14 matrices stay dense" in warning and "too dense" in warning for warning in report.warnings)
    assert any("nothing was packed" in warning for warning in report.warnings)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_export_packed_of_unstructured_zeros(job: dict[str, Any], tmp_path: Path) -> None:
    """As bitmask."""
    report = llmprune.prune(out=tmp_path / "out", **job | {"pattern": "unstructured", "sparsity": 0.7})
    assert report.packed is not None and report.packed.num_bitmask == 14
    assert len(packed_layers(llmprune.load(tmp_path / "out", device="cpu"))) == 14


def test_a_killed_packed_export_goes_on(job: dict[str, Any], tmp_path: Path) -> None:
    """Stopped while it packs: --resume writes the bytes of an uninterrupted run, and then finds it done."""
    llmprune.prune(out=tmp_path / "whole", **job)
    _close_at(llmprune.prune_iter(out=tmp_path / "out", **job), "save")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    report = llmprune.prune(out=tmp_path / "out", resume=True, **job)
    assert report.resumed and report.packed is not None
    names = ("model.safetensors", "config.json", "README.md")
    assert [digests(tmp_path / "out")[name] for name in names] == [digests(tmp_path / "whole")[name] for name in names]
    assert llmprune.prune(out=tmp_path / "out", resume=True, **job) == report
    with pytest.raises(OutputError, match=r"config\.export"):
        llmprune.prune(out=tmp_path / "out", resume=True, **job | {"export": "dense"})


def _close_at(run: Iterator[Any], stage: str) -> None:
    steps = 0
    for event in run:
        steps += event.event == "progress" and event.stage == stage
        if steps == 5:
            run.close()  # type: ignore[attr-defined]
            return
    raise AssertionError(f"{stage} took {steps} steps")


def test_a_job_measures_the_packed_model(job: dict[str, Any], tmp_path: Path) -> None:
    """With latency the report has a benchmark of dense and packed, in a stage of its own; a model in memory stays dense."""
    tokenizer = tiny.train_tokenizer()
    model = tiny.make_model()
    layers = dict(model.named_modules())
    fields = {name: value for name, value in job.items() if name != "model"} | {"latency": True}
    report = llmprune.prune(model, tokenizer=tokenizer, out=tmp_path / "out", **fields)
    assert report.benchmark is not None and [stage.name for stage in report.stages][-2:] == ["benchmark", "save"]
    assert not packed_layers(model) and report.packed is not None
    assert all(module is layers[path] for path, module in model.named_modules())
    assert Report.model_validate_json((tmp_path / "out" / "report.json").read_text()) == report


# The command line ---------------------------------------------------------------------------------------------------


def test_convert_on_the_command_line(cli: Cli, sparse_dir: Path, tmp_path: Path) -> None:
    """A table and the path; as JSON one object; events as lines."""
    outcome = cli("convert", sparse_dir, "--to", "packed", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "14 matrices" in outcome.out and "56.2 %" in outcome.out and f"Checkpoint   {tmp_path / 'out'}" in outcome.out
    outcome = cli("convert", tmp_path / "out", "--to", "dense", "-o", tmp_path / "dense", "--json")
    done = Conversion.model_validate_json(outcome.out)
    assert (outcome.code, done.to, done.num_layers) == (0, "dense", 14)
    outcome = cli("convert", sparse_dir, "--format", "bitmask", "-o", tmp_path / "bits", "--events", "-")
    events = [parse_event(line) for line in outcome.out.splitlines()]
    assert isinstance(events[-1], Converted) and events[-1].conversion.packed is not None
    assert events[-1].conversion.packed.num_bitmask == 14 and not any(isinstance(event, Warned) for event in events)


def test_convert_mistakes_are_one_line(cli: Cli, packed_dir: Path, tmp_path: Path) -> None:
    """Exit code 2 and the remedy."""
    outcome = cli("convert", packed_dir, "--to", "packed", "--out", tmp_path / "out")
    assert outcome.code == 2 and "packed already" in outcome.err and len(outcome.err.strip().splitlines()) == 1


def test_prune_export_on_the_command_line(cli: Cli, job: dict[str, Any], tmp_path: Path) -> None:
    """--export packed reaches the config and the printed report says what it saved."""
    outcome = cli(
        "prune", job["model"], "--out", tmp_path / "out", "--export", "packed", "--pattern", "2:4", "--no-eval",
        "--calibration", job["calibration"], "--num-samples", 4, "--seq-len", 32, "--no-latency",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "Packed 14 matrices (14 as 2:4, 0 as bitmask), in 53.1 %" in outcome.out
    outcome = cli("prune", job["model"], "--out", tmp_path / "other", "--export", "zip")
    assert outcome.code == 2 and "export" in outcome.err
