"""The plan: what it foresees, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import llmprune
import tiny
from llmprune import planning
from llmprune.errors import DoesNotFit
from llmprune.planning import require_fit
from llmprune.report import Plan


@pytest.fixture
def make_plan(tiny_model_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Plan a small job on the tiny model, with so many bytes of memory and disk free."""

    monkeypatch.setattr(planning, "_flops_per_second", lambda _device: 1e10)  # a busy machine measures another one every time

    def run(*, free: int = 2**40, disk: int = 2**40, **overrides: Any) -> Plan:
        monkeypatch.setattr(planning, "free_bytes", lambda _device: free)
        monkeypatch.setattr("psutil.Process.memory_info", lambda _self: SimpleNamespace(rss=2**28))
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=disk))
        fields = {"num_samples": 8, "seq_len": 32, "calibration": str(text_file), "eval": str(text_file)} | overrides
        return llmprune.plan(**{"model": tiny_model_dir} | fields)

    return run


def test_plan_counts_what_will_be_pruned(make_plan: Callable[..., Plan]) -> None:
    """Sites, weights, tokens and walk are those of the job."""
    plan = make_plan(sequential="group")
    assert plan.num_sites == 14
    assert plan.num_pruned_weights == plan.model.num_prunable > 0
    assert plan.calibration_tokens == 8 * 32
    assert (plan.walk, plan.batch_size) == ("one-pass", 8)
    assert plan.fits and plan.seconds > 0 and plan.download_bytes == 0
    assert make_plan().walk == "two-pass"
    assert make_plan(sequential="none").walk == "dense"
    assert make_plan(sequential="group", batch_size=2).walk == "one-pass"
    assert make_plan(sequential="group", batch_size=2, free=2**20).walk == "staged"
    assert make_plan(skip="*.down_proj").num_sites == 12


def test_plan_reads_no_weights(make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither transformers nor safetensors is asked for a tensor."""
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("weights loaded"))
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("weights loaded"))
    assert make_plan().fits


def test_more_of_anything_needs_more(make_plan: Callable[..., Plan]) -> None:
    """Samples, a Gram matrix and wider weights raise the peak of the stage they belong to."""

    def prune_peak(**overrides: Any) -> int:
        plan = make_plan(**overrides)
        return next(stage.peak_cpu_bytes for stage in plan.stages if stage.name == "prune")

    assert prune_peak(num_samples=4096) > prune_peak() + 4000 * 32 * 64 * 4
    assert prune_peak(method="sparsegpt", num_samples=4096) > prune_peak(num_samples=4096)
    assert make_plan(dtype="float16").model.weights_bytes * 2 == make_plan(dtype="float32").model.weights_bytes


def test_reconstruction_is_planned(make_plan: Callable[..., Plan]) -> None:
    """It wants eight batches, walks ``group`` in stages, and needs more seconds and memory, more of them the more steps."""

    def prune(**overrides: Any) -> tuple[float, int]:
        plan = make_plan(num_samples=512, **overrides)
        stage = next(stage for stage in plan.stages if stage.name == "prune")
        return stage.seconds, stage.peak_cpu_bytes

    plan = make_plan(num_samples=64, sequential="group", reconstruct=True)
    assert plan.walk == "staged" and 1 < plan.batch_size <= 8
    assert make_plan(reconstruct=True).batch_size == 1
    assert prune(batch_size=64, reconstruct=True, reconstruct_steps=5000)[0] > 10 * prune(batch_size=64)[0]
    assert prune(batch_size=64, reconstruct=True)[1] > prune(batch_size=64)[1]


def test_permutation_is_planned(make_plan: Callable[..., Plan]) -> None:
    """The norms of the inputs take a forward of their own."""
    seconds = [
        next(stage.seconds for stage in make_plan(pattern="2:4", permute=permute).stages if stage.name == "prune")
        for permute in (False, True)
    ]
    assert seconds[1] > seconds[0]


def test_what_cannot_fit_is_refused_with_the_flag_that_helps(make_plan: Callable[..., Plan]) -> None:
    """Too little memory names fewer samples; too little disk another --out; both say how much is needed."""
    plan = make_plan(free=-(2**28), num_samples=4096)
    assert not plan.fits
    with pytest.raises(DoesNotFit, match=r"needs .* GB of CPU memory, .* are free\. Use --num-samples 1024"):
        require_fit(plan)
    with pytest.raises(DoesNotFit, match=r"--out"):
        require_fit(make_plan(disk=1000))
    require_fit(make_plan())


def test_plan_says_where_hidden_states_wait(make_plan: Callable[..., Plan]) -> None:
    """By the job's own formula: in memory up to a quarter of what the weights leave, else in files, for which there is disk."""
    roomy, asked = make_plan(num_samples=512), make_plan(num_samples=512, offload="disk")
    scarce = make_plan(num_samples=512, free=roomy.model.weights_bytes + 3 * 512 * 32 * 64 * 4, offload="auto")
    assert (roomy.hidden_place, asked.hidden_place, scarce.hidden_place) == ("device", "disk", "disk")
    assert asked.disk_bytes + roomy.model.weights_bytes == roomy.disk_bytes + 512 * 32 * 64 * 4


def test_weights_that_do_not_fit_stay_on_disk(make_plan: Callable[..., Plan], tiny_model_dir: Path) -> None:
    """By themselves where memory is short, at once where it is asked for, and never where the job needs them all."""
    weights = make_plan().model.weights_bytes
    roomy, asked, scarce = make_plan(), make_plan(offload="disk"), make_plan(free=weights)
    assert (roomy.weights_place, asked.weights_place, scarce.weights_place) == ("cpu", "disk", "disk")
    assert asked.disk_bytes == roomy.disk_bytes - weights + 8 * 32 * 64 * 4  # a record becomes a shard; hidden states are files
    assert make_plan(free=weights, offload="cpu").weights_place == "cpu"
    assert make_plan(free=weights, refine="icbs").weights_place == "cpu"
    peaks = {}
    for num_blocks in (2, 6):
        model = tiny.make_model(num_hidden_layers=num_blocks)
        folder = tiny.save(model, tiny_model_dir.with_name(f"blocks{num_blocks}"))
        peaks[num_blocks] = [make_plan(model=str(folder), offload=offload).peak_cpu_bytes for offload in ("cpu", "disk")]
    assert peaks[6][0] > peaks[2][0] and peaks[6][1] == peaks[2][1]
