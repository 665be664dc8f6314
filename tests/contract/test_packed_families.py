"""Packed checkpoints of every decoder family: dense to packed to dense gives the same files, and packed computes the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

import llmprune
from families import FAMILIES, MULTIMODAL_FAMILIES, tiny_model
from llmprune.packing import packable, packed_layers
from two_four_weights import prune_


@torch.no_grad()
@pytest.mark.parametrize("family", sorted({*FAMILIES, *MULTIMODAL_FAMILIES}))
def test_family(family: str, tmp_path: Path) -> None:
    """What can be packed is; the packed model puts out the dense one's logits; the way back gives the very files."""
    model = tiny_model(family)
    prune_(model)
    able, _ = packable(model)
    model.save_pretrained(tmp_path / "dense")
    done = llmprune.convert(tmp_path / "dense", to="packed")
    assert done.packed is not None and done.packed.num_two_four == done.packed.num_sites > 0
    assert done.packed.num_sites + sum(left.num_sites for left in done.packed.left_dense) >= len(able)
    packed = llmprune.load(done.out, device="cpu")
    assert len(packed_layers(packed)) == done.packed.num_sites
    dense = llmprune.load(tmp_path / "dense", device="cpu")
    ids_NS = torch.arange(3, 19)[None]
    try:
        expected = dense(input_ids=ids_NS, use_cache=False).logits
    except Exception as error:  # no model of plain text: then the packed one is none either
        with pytest.raises(type(error)):
            packed(input_ids=ids_NS, use_cache=False)
    else:
        logits = packed(input_ids=ids_NS, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)  # sums depend on how weights lie in memory
    llmprune.convert(done.out, to="dense", out=tmp_path / "back")
    assert digests(tmp_path / "back") == digests(tmp_path / "dense")


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
