"""`make bench-scale` without an hour: its formulas against models, fits, bars, and tiny runs of what it measures."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import scale_formulas as formulas
from benchmarks import scale_gpu, scale_memory, scale_tables, scale_walk
from llmprune import memory
from llmprune.spec import Need

CPU = torch.device("cpu")
TINY = scale_gpu.TINY
SMALL = {name: value for name, value in TINY.items() if name != "num_hidden_layers"}


@pytest.mark.parametrize("fields", [*formulas.LLAMAS.values(), TINY], ids=[*formulas.LLAMAS, "tiny"])
def test_a_shape_has_the_weights_of_the_model(fields: dict[str, int]) -> None:
    """Against transformers' own model, all but its norms; Llama 3 70B has 70 billion."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields))
    assert formulas.shape_of(fields).num_weights == sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert [site.shape for site in formulas.sites_of(fields)] == [*formulas.shape_of(fields).sites]


def test_forward_flops_are_those_of_the_products() -> None:
    """As torch counts them, without attention."""
    from torch.utils.flop_counter import FlopCounterMode

    model = scale_walk.random_llama(TINY, CPU)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model(input_ids=torch.zeros(2, 8, dtype=torch.int64), use_cache=False)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    shape = formulas.shape_of(TINY)
    attention = shape.num_blocks * 2 * 16 * 8 * shape.hidden_size
    assert formulas.forward_flops(shape, 16, 8) == products + attention


def test_everything_but_the_solves_is_linear_in_tokens_and_all_of_it_in_blocks() -> None:
    """Doubling either doubles it; the solves do not know the text."""
    one, two = (formulas.shape_of({**TINY, "num_hidden_layers": count}) for count in (3, 6))
    rates = formulas.Rates(1e9, 1e9, 1e9, 1e9, 1e-9, 1e-6)
    once, again = (formulas.walk_seconds(shape, "sparsegpt", 512, 64, rates) for shape in (one, two))
    longer = formulas.walk_seconds(one, "sparsegpt", 1024, 64, rates)
    for part, seconds in once.items():
        assert again[part] == pytest.approx(2 * seconds)
        assert longer[part] == pytest.approx((2 if part in ("forward", "Gram matrices") else 1) * seconds)
    assert set(formulas.walk_seconds(one, "wanda", 512, 64, rates)) == {"forward", "scores"}


def test_what_is_computed_of_a_symmetric_product() -> None:
    """All of one panel, little more than half of many."""
    assert formulas.share(256) == 1 and formulas.share(512) == 0.75
    assert 0.5 < formulas.share(14336) < 0.54
    shape = formulas.shape_of(formulas.LLAMA_8B)
    assert 1 < formulas.gram_flops(shape, 1000, as_computed=True) / formulas.gram_flops(shape, 1000) < 1.08


def test_a_streamed_walk_holds_what_the_plan_counts() -> None:
    """The formulas of the page are those of llmprune.memory; none but the checkpoint's has the number of blocks in it."""
    few, many = (formulas.bytes_of({**TINY, "num_hidden_layers": count}, "sparsegpt", 4096, 512, 2) for count in (2, 20))
    assert {name for name in few if few[name] != many[name]} == {"checkpoint"}
    sites = formulas.sites_of(TINY)
    assert few["solve"] == memory.solve_bytes(sites, Need.GRAM) == 16 * 64 * 128 + 18 * 128**2
    assert few["activations"] == memory.block_activation_bytes(
        sites, num_tokens=512, hidden_size=64, itemsize=2, need=Need.GRAM
    )  # fmt: skip
    assert few["activations"] == 512 * (2 * (3 * 64 + 3 * 128) + 4 * 128)
    assert few["blocks"] == 3 * 2 * formulas.shape_of(TINY).block_weights


def test_the_longer_of_computing_and_reading() -> None:
    """A slow disk rules, a fast one costs nothing; a second forward is added to the computing."""
    shape = formulas.shape_of(TINY)
    rates = formulas.Rates(1e6, 1e6, 1e6, 1e6, disk=1e12)
    plain = formulas.forward_flops(shape, 512, 64) / 1e6
    assert formulas.total_seconds(shape, "wanda", 512, 64, rates, 2) == pytest.approx(plain)
    assert formulas.total_seconds(shape, "wanda", 512, 64, rates, 2, passes=2) == pytest.approx(2 * plain)
    slow = formulas.Rates(1e6, 1e6, 1e6, 1e6, disk=1.0)
    assert formulas.total_seconds(shape, "wanda", 512, 64, slow, 2) == 4 * shape.num_weights


def test_fits_find_the_exponent() -> None:
    """Of a power exactly, of a line with a constant less than one; of nothing they refuse."""
    exponent, r2 = formulas.fit([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)])
    assert exponent == pytest.approx(1.5) and r2 == pytest.approx(1)
    exponent, r2 = formulas.fit([2, 4, 8, 16], [1 + x for x in (2, 4, 8, 16)])
    assert 0.7 < exponent < 1 and 0.98 < r2 < 1
    assert formulas.fit([1, 2], [5.0, 5.0]) == (0.0, 1.0)
    for xs, ys in (([1], [1.0]), ([1, 2], [0.0, 1.0]), ([2, 2], [1.0, 3.0]), ([1, 2, 3], [1.0, 2.0])):
        with pytest.raises(ValueError, match="a fit needs two"):
            formulas.fit(xs, ys)


def test_spread_of_peaks() -> None:
    """Largest over smallest; a run that failed is no peak."""
    rows = [{"anonymous": value, "returncode": 0} for value in (100, 104, 102)]
    assert scale_memory.spread(rows) == pytest.approx(0.04)
    assert scale_memory.spread([]) == scale_memory.spread([*rows, {"anonymous": 101, "returncode": 1}]) == float("inf")


def test_shards_are_the_model_that_transformers_reads(tmp_path: Path) -> None:
    """Every weight where it belongs, over several shards, each of a few blocks."""
    size = scale_memory.save_random_llama(tmp_path / "model", 5, {**SMALL, "tie_word_embeddings": True})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()) and len(model.model.layers) == 5
    assert size == sum(parameter.nbytes for parameter in model.parameters())
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    with safe_open(files[1], "pt") as shard:
        assert {name.split(".")[2] for name in shard.keys()} == {"4"}  # noqa: SIM118
    assert float(model.model.layers[3].mlp.up_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_memory_of_a_process_is_seen(tmp_path: Path) -> None:
    """A hundred megabytes that it takes are anonymous pages; under a limit of less it fails."""
    code = "import time; held = bytearray(100 * 2**20); held[::4096] = b'x' * len(held[::4096]); time.sleep(0.1)"
    peak = scale_memory.watch([sys.executable, "-S", "-c", code])
    assert (
        peak.returncode == 0 and 100 * 2**20 < peak.anonymous < 130 * 2**20 and peak.virtual > peak.resident >= peak.anonymous
    )
    scarce = scale_memory.watch([sys.executable, "-S", "-c", code], limit=_sixty_mebibytes)
    assert scarce.returncode == 1 and "MemoryError" in scarce.error and scarce.virtual <= 60 * 2**20
    assert scale_memory.memory_of(2**30) == {}


def _sixty_mebibytes() -> None:
    scale_memory.resource.setrlimit(scale_memory.resource.RLIMIT_AS, (60 * 2**20, 60 * 2**20))


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The result of a tiny run."""
    console = Console(quiet=True)
    return scale_walk.against_forward(
        console, CPU, fields=TINY, num_tokens=256, seq_len=32, repeats=1, product_size=64
    ) | {"environment": {"device": "CPU (1 threads)", "torch": "9"}}  # fmt: skip


def test_a_walk_is_timed_and_undone(walked: dict[str, Any]) -> None:
    """Four cases, each with a limit that SparseGPT's is above; the weights are as before, and a walk of nothing is refused."""
    assert [row["case"] for row in walked["rows"]] == [*scale_walk.LIMITS]
    assert all(row["seconds"] > 0 and row["limit"] >= 1 for row in walked["rows"])
    model = scale_walk.random_llama(TINY, CPU)
    before = [parameter.clone() for parameter in model.parameters()]
    scale_walk.walk_times(model, "sparsegpt", scale_walk.token_ids(64, 16, 64, CPU))
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


def test_growth_of_a_tiny_model() -> None:
    """Both methods, against blocks and tokens."""
    rows = scale_walk.growth(
        Console(quiet=True), CPU, fields=TINY, blocks=(1, 2), tokens=(32, 64), few_tokens=32, repeats=1
    )  # fmt: skip
    assert [(row["case"], row["what"]) for row in rows] == [
        ("wanda", "blocks"), ("wanda", "tokens"), ("sparsegpt", "blocks"), ("sparsegpt", "tokens"),
    ]  # fmt: skip
    assert all(len(row["seconds"]) == 2 for row in rows)


def test_tables_are_written_between_their_markers(walked: dict[str, Any], tmp_path: Path) -> None:
    """From the results that there are; the rest of the page stays, and what is computed says so."""
    blocks = [
        {"num_blocks": count, "checkpoint_bytes": count << 20, "anonymous": 400 << 20, "file": 1 << 20, "resident": 401 << 20,
         "returncode": 0} for count in (8, 32)
    ]  # fmt: skip
    limited = {
        "limit": "RLIMIT_AS (ulimit -v)", "limit_bytes": 2 << 30, "idle_virtual_bytes": 1 << 30, "num_blocks": 9,
        "checkpoint_bytes": 3 << 30, "disk": {"returncode": 0, "virtual": 1 << 30},
        "cpu": {"returncode": 1, "virtual": 2 << 30},
    }  # fmt: skip
    results = {"walk": walked, "memory": {"blocks": blocks, "spread": 0.0, "limited": limited}}
    for name, result in results.items():
        (tmp_path / f"scale_{name}.json").write_text(json.dumps(result))
    page = tmp_path / "scaling.md"
    names = ("bytes", "walk", "growth", "memory", "paper")
    page.write_text("before\n" + "".join(f"<!-- scale_{name} -->\n<!-- /scale_{name} -->\n" for name in names) + "after\n")
    scale_tables.refresh(tmp_path, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "\n".join(["<!-- scale_growth -->", "<!-- /"]) in text
    assert "| 8 | 8 | 400 | 1 | 401 | yes |" in text and "`--offload cpu` ends with exit code 1" in text
    assert "**Computed, never run.**" in text and "Llama 3 405B, sparsegpt" in text
    scale_tables.refresh(tmp_path, page)
    assert page.read_text() == text


def test_the_page_has_every_marker_and_says_what_never_ran() -> None:
    """Once each; and no time on a GPU is claimed before there is a result of one."""
    text = scale_tables.PAGE.read_text()
    assert re.findall(r"<!-- (scale_\w+) -->", text) == [
        "scale_bytes", "scale_walk", "scale_growth", "scale_memory", "scale_paper"
    ]  # fmt: skip
    assert "no GPU has run it yet" in text


def test_a_gpu_visit_without_a_gpu_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And does nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert scale_gpu.main(["--out", str(tmp_path)]) == 2
    assert "no GPU: nothing was checked and nothing was measured" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


def test_a_dry_visit_goes_through_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Checks, both walks and the table; keeps nothing and judges nothing."""
    assert scale_gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("green ") == 7 and "RED" not in out
    assert out.count("| dry run |") == len(scale_gpu.TARGETS)
    assert not [*tmp_path.iterdir()]


def test_no_time_while_a_check_is_red(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gram matrix that is a thousandth off is found, and ends the visit."""
    monkeypatch.setattr(scale_gpu, "mirror_", lambda gram_II: gram_II.mul_(1.001))
    assert scale_gpu.main(["--dry-run"]) == 1
    out = capsys.readouterr().out
    assert "RED Gram matrix of bfloat16" in out and "RED: no time is reported." in out and "x one forward" not in out


def test_the_verdict_of_a_visit() -> None:
    """Met, missed, not measured; a share has no limit."""
    row = {"case": "wanda 2:4", "seconds": 29.0, "ratio": 1.31, "peak_gigabytes": 40.0, "share": 0.5}
    lines = scale_gpu.verdict_table({"dry_run": False, "rows": [row]}).splitlines()[2:]
    verdicts = [line.rsplit("|", 2)[1].strip() for line in lines]
    assert verdicts == ["met", "not measured", "MISSED", "not measured", "met", "not measured", "", "not measured"]
    assert "50.0%" in lines[6]
