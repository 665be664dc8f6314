"""Devices, placement and the choice of batch."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from families import tiny_model
from llmprune import devices
from llmprune.anatomy.blocks import find_stack
from llmprune.devices import PeakMemory, free_bytes, own_device, pick_device, placed
from llmprune.errors import ConfigError
from llmprune.measure.dispatch import dispatched, spread
from llmprune.memory import block_activation_bytes, choose_batch_size, solve_bytes
from llmprune.spec import Need

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "tpu:x"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    """With what there is, and the remedy."""
    with pytest.raises(ConfigError, match="auto"):
        pick_device(name)


def test_auto_is_the_accelerator_or_the_cpu() -> None:
    """And something is free on it."""
    device = pick_device("auto")
    assert device.type == ("cpu" if not torch.accelerator.is_available() else torch.accelerator.current_accelerator().type)
    assert free_bytes(device) > 0


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_spread_by_accelerate_computes_the_same_and_comes_back(family: str) -> None:
    """Blocks offloaded to disk, the rest on the CPU: the same logits, and afterwards the same weights in the same place."""
    model = tiny_model(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids_NS = torch.arange(3, 19)[None]
    expected = model(input_ids=ids_NS, use_cache=False).logits
    stack = find_stack(model)
    device_map = {name: "cpu" for name, _ in _leaves_outside(model, stack.path)}
    device_map |= {stack.name(index): "disk" if index else "cpu" for index in range(len(stack.blocks))}
    with spread(model, device_map):
        assert next(stack.blocks[1].parameters()).device.type == "meta"
        assert torch.equal(model(input_ids=ids_NS, use_cache=False).logits, expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert torch.equal(model(input_ids=ids_NS, use_cache=False).logits, expected)


def _leaves_outside(model: torch.nn.Module, path: str) -> list[tuple[str, torch.nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if not list(module.children()) and not name.startswith(f"{path}.")
    ]


def test_a_model_that_is_where_it_should_be_is_left_alone() -> None:
    """No hooks, no copies."""
    model = tiny_model("llama")
    pointer = model.lm_head.weight.data_ptr()
    with dispatched(model, CPU), placed(model, CPU):
        assert model.lm_head.weight.data_ptr() == pointer
        assert not hasattr(model, "hf_device_map")


def _choose(free: int, *, one_pass: bool = True, num_samples: int = 64) -> int:
    sites = [site for block in find_stack(tiny_model("llama")).sites for site in block]
    return choose_batch_size(
        sites, num_samples=num_samples, seq_len=128, hidden_size=64, itemsize=4, need=Need.GRAM, one_pass=one_pass,
        free_bytes=free, on_cpu=False,
    )  # fmt: skip


def test_one_pass_takes_all_sequences_where_they_fit() -> None:
    """And falls back to batches where they do not, down to one sequence."""
    assert _choose(2**40) == 64
    assert 1 <= _choose(2**24) < 64
    assert _choose(0) == 1
    assert _choose(2**40, one_pass=False) < 64


def test_batches_are_smaller_on_a_cpu() -> None:
    """Where its caches decide, by tokens and not by sequences."""
    sites = [site for block in find_stack(tiny_model("llama")).sites for site in block]

    def choose(seq_len: int, *, on_cpu: bool) -> int:
        return choose_batch_size(
            sites, num_samples=512, seq_len=seq_len, hidden_size=64, itemsize=4, need=Need.NORM, one_pass=False,
            free_bytes=2**40, on_cpu=on_cpu,
        )  # fmt: skip

    assert (choose(128, on_cpu=True), choose(512, on_cpu=True)) == (16, 4)
    assert choose(512, on_cpu=False) == 16


def test_batches_keep_activations_below_the_hidden_states() -> None:
    """The bound of the walk in batches: one block's activations are no more than the calibration set's hidden states."""
    sites = [site for block in find_stack(tiny_model("llama")).sites for site in block]
    batch = _choose(2**40, one_pass=False)
    activations = block_activation_bytes(sites, num_tokens=batch * 128, hidden_size=64, itemsize=4, need=Need.GRAM)
    assert activations <= 64 * 128 * 64 * 4


def test_estimates_grow_with_what_they_estimate() -> None:
    """More tokens, half precision with a Gram matrix, and methods with a Gram matrix need more."""
    sites = [site for block in find_stack(tiny_model("llama")).sites for site in block]
    one = block_activation_bytes(sites, num_tokens=100, hidden_size=64, itemsize=4, need=Need.NORM)
    assert block_activation_bytes(sites, num_tokens=200, hidden_size=64, itemsize=4, need=Need.NORM) == 2 * one
    assert solve_bytes(sites, Need.GRAM) > solve_bytes(sites, Need.NORM) > 0


def test_peak_memory_is_that_of_its_stage() -> None:
    """A large tensor shows in the stage that held it, and not in the next one."""
    first = PeakMemory()
    idle = first.cpu_bytes
    block = torch.ones(64 * 2**20)  # 256 MiB
    held = first.cpu_bytes
    del block
    second = PeakMemory()
    assert held - idle > 200 * 2**20
    if second._resettable:
        assert second.cpu_bytes < held - 200 * 2**20


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them may take half each; one alone takes all, whatever a launcher left behind."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(devices, "_cgroup_free", lambda: [2000])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_bytes(CPU) == 1000
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert free_bytes(CPU) == 500


def test_several_processes_take_a_device_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by number is refused, and more processes than accelerators."""
    accelerator = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="a device each, got device 'cuda:1'. Use --device cuda"):
        own_device("cuda:1")
    with pytest.raises(ConfigError, match="3 processes need a device each, and this machine has 2"):
        own_device("auto")
