"""Families whose blocks are read from disk one by one: the same weights, sites and checkpoint as of a model in memory.

Most here are stored in other layouts than they run in: those are converted block by block, and back.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from families import tiny_model
from llmprune.anatomy.blocks import find_stack, probe
from llmprune.errors import UnsupportedModel
from llmprune.io.models import Source, load_model
from llmprune.io.streaming import load_streamed
from llmprune.spec import PruneConfig

FAMILIES = (
    "llama", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "phi3", "gemma3_text", "rwkv", "mamba", "jamba", "mixtral",
    "qwen2_moe", "deepseek_v3", "phimoe", "lfm2_moe", "nemotron_h", "granitemoe", "exaone_moe", "qwen3_next", "gpt_oss",
)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_family(family: str, tmp_path: Path) -> None:
    """Every tensor comes as the loader in memory gives it, and goes as it was saved; a block is empty but while it is held."""
    tiny_model(family).save_pretrained(tmp_path)
    config, source = PruneConfig(model=str(tmp_path)), Source("tiny", tmp_path, "revision")
    whole = load_model(source, config, torch.device("cpu"))
    model, weights = load_streamed(source, config)
    stack = replace(find_stack(model), weights=weights)
    expected = dict(whole.named_parameters())
    exported = weights.reverted(weights.rest)
    num_checked = 0
    for index, block in enumerate(stack.blocks):
        assert all(parameter.is_meta for parameter in block.parameters())
        with stack.placed(index, torch.device("cpu")):
            for name, parameter in block.named_parameters():
                other = expected[f"{stack.name(index)}.{name}"]
                assert parameter.dtype == other.dtype and torch.equal(parameter, other), name
                num_checked += 1
            exported |= weights.export(index)
    assert num_checked == sum(len(list(block.parameters())) for block in find_stack(whole).blocks) > 0
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() <= exported.keys() and all(torch.equal(saved[name], exported[name]) for name in saved)

    ids_1S = torch.arange(3, 19)[None]
    torch.testing.assert_close(model(input_ids=ids_1S, use_cache=False).logits, whole(input_ids=ids_1S, use_cache=False).logits)
    probed, plain = probe(model, stack, ids_1S), probe(whole, find_stack(whole), ids_1S)
    assert [[(site.name, site.transposed) for site in sites] for sites in probed.sites] == [
        [(site.name, site.transposed) for site in sites] for sites in plain.sites
    ]
    assert all(parameter.is_meta for block in stack.blocks for parameter in block.parameters())


def test_blocks_that_share_weights_are_not_streamed(tmp_path: Path) -> None:
    """What one block changes would be lost to the other."""
    tiny_model("zamba2").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="blocks share weights .* Use --offload cpu"):
        load_streamed(Source("tiny", tmp_path, "revision"), PruneConfig(model=str(tmp_path)))
