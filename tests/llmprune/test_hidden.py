"""Hidden states on the device, in CPU memory and in files: the same values, one copy of each, and the same pruned model."""

from __future__ import annotations

import errno
import gc
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from families import tiny_model
from llmprune.anatomy.blocks import eager_experts, find_stack, probe, record
from llmprune.engines.layerwise import Walk
from llmprune.events import BlockFinished, SitePruned
from llmprune.hidden import HiddenStates, Place
from llmprune.io.journal import Journal
from llmprune.memory import HIDDEN_SHARE, choose_batch_size, hidden_place
from llmprune.spec import Need, PruneConfig
from llmprune.walking import JournaledWalk

CPU = torch.device("cpu")
PLACES: tuple[Place, ...] = ("device", "cpu", "disk")


def _tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_put_in_comes_out(place: Place, dtype: torch.dtype, tmp_path: Path) -> None:
    """Length, order, values, dtype and shape, also of replaced batches, of slices, and of tensors that are not contiguous."""
    batches = [_tensor(3, 5, 4, seed=seed, dtype=dtype) for seed in range(3)]
    states = HiddenStates(batches, place, tmp_path)
    assert len(states) == 3
    assert all(torch.equal(one, other) and one.dtype == dtype for one, other in zip(states, batches, strict=True))
    new = _tensor(4, 5, 3, seed=9, dtype=dtype).transpose(0, 2)
    states[1] = new
    assert torch.equal(states[1], new) and torch.equal(states[2], batches[2]) and torch.equal(states[-1], batches[2])
    assert [one.shape for one in states[1:]] == [new.shape, batches[2].shape]
    with pytest.raises(IndexError):
        states[3]


@pytest.mark.parametrize("place", PLACES)
def test_another_shape_or_dtype_may_take_a_place(place: Place, tmp_path: Path) -> None:
    """A block may put out fp32 from bf16, a shorter or a longer batch."""
    states = HiddenStates([_tensor(2, 3, 4, dtype=torch.bfloat16)], place, tmp_path)
    for new in (_tensor(2, 3, 4), _tensor(1, 3, 4), _tensor(5, 7, 4, dtype=torch.bfloat16)):
        states[0] = new
        assert torch.equal(states[0], new) and states[0].dtype == new.dtype


@pytest.mark.parametrize("place", PLACES)
def test_a_batch_may_replace_itself_and_a_copy_is_apart(place: Place, tmp_path: Path) -> None:
    """An identity block hands back the very tensor it was given; a copy does not follow what happens to the original."""
    first = _tensor(2, 3, 4)
    states = HiddenStates([first.clone()], place, tmp_path)
    other = states.copy()
    states[0] = states[0]
    assert torch.equal(states[0], first)
    states[0] = first + 1
    assert torch.equal(other[0], first) and torch.equal(states[0], first + 1)


def test_files_hold_one_copy_and_go_with_the_object(tmp_path: Path) -> None:
    """A file a batch, as large as the tensor however often it is replaced; what a reader changes in place stays its own."""
    states = HiddenStates((_tensor(2, 3, 4) for _ in range(2)), "disk", tmp_path)
    for seed in range(3):
        states[0] = _tensor(2, 3, 4, seed=seed)
    (folder,) = tmp_path.iterdir()
    assert [file.stat().st_size for file in sorted(folder.iterdir())] == [96, 96]
    states[1].zero_()
    assert torch.equal(states[1], _tensor(2, 3, 4))
    del states
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_file_that_may_not_grow_is_an_error_not_a_signal(tmp_path: Path) -> None:
    """A written map would end the process with SIGBUS; a write raises OSError."""
    states = HiddenStates([_tensor(2, 3, 4)], "disk", tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            states.append(_tensor(64, 64, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert len(states) == 1 and torch.equal(states[0], _tensor(2, 3, 4))


def test_a_full_disk_is_an_error_and_replacing_needs_no_room(small_disk: Path) -> None:
    """ENOSPC where a batch is added; those that are there can still be written over."""
    states = HiddenStates([_tensor(64, 64, 4)], "disk", small_disk)
    (small_disk / "ballast").write_bytes(b"0" * (shutil.disk_usage(small_disk).free // 4096 * 4096))
    with pytest.raises(OSError) as caught:
        states.append(_tensor(64, 64, 4))
    assert caught.value.errno == errno.ENOSPC
    states[0] = _tensor(64, 64, 4, seed=1)
    assert torch.equal(states[0], _tensor(64, 64, 4, seed=1))


def _walk(model: PreTrainedModel, config: PruneConfig, place: Place, folder: Path, batch_size: int) -> Walk:
    ids_NS = torch.randint(3, 100, (8, 16), generator=torch.Generator().manual_seed(0))
    stack = probe(model, find_stack(model), ids_NS[:1])
    hidden = HiddenStates((), place, folder)
    return Walk(stack, record(model, stack, list(ids_NS.split(batch_size)), hidden), config, CPU)


@pytest.mark.parametrize(
    ("family", "batch_size", "changes"),
    [
        ("llama", 8, {"method": "sparsegpt", "sequential": "group"}),
        ("llama", 3, {"method": "sparsegpt", "sequential": "group"}),
        ("llama", 3, {"method": "wanda"}),
        ("llama", 1, {"method": "wanda", "reconstruct": True, "reconstruct_steps": 8}),
        ("gemma3n_text", 3, {"method": "wanda"}),
        ("gemma3n_text", 1, {"method": "wanda", "reconstruct": True, "reconstruct_steps": 2}),
        ("mamba", 3, {"method": "wanda"}),
        ("mixtral", 8, {"method": "wanda", "sequential": "group"}),
    ],
)
def test_a_walk_is_the_same_wherever_its_states_lie(
    family: str, batch_size: int, changes: dict[str, object], tmp_path: Path
) -> None:
    """One-pass, staged, two-pass and reconstructing walks end with the same weights and states, byte for byte."""
    config = PruneConfig.build(None, **changes)
    ends = []
    for place in PLACES:
        model = tiny_model(family)
        with eager_experts(model):
            walk = _walk(model, config, place, tmp_path, batch_size)
            assert sum(isinstance(event, SitePruned) for event in walk.run()) == sum(map(len, walk.stack.sites)) > 0
        assert walk.hidden.place == walk.recording.hidden.place == place
        ends.append(([parameter.detach() for parameter in model.parameters()], [state.clone() for state in walk.hidden]))
    for weights, states in ends[1:]:
        assert all(torch.equal(one, other) for one, other in zip(ends[0][0], weights, strict=True))
        assert all(torch.equal(one, other) for one, other in zip(ends[0][1], states, strict=True))


def test_a_journal_reads_and_writes_states_in_files(tmp_path: Path) -> None:
    """A walk with its states on disk goes on where a record left it, and ends with the same weights."""
    whole, parts = tiny_model("llama"), tiny_model("llama")
    config = PruneConfig(method="wanda")
    for _ in _walk(whole, config, "disk", tmp_path, 3).run():
        pass
    journal = Journal(tmp_path / "work")
    journal.open({"run": 1}, resume=False)
    first = JournaledWalk(parts, _walk(parts, config, "disk", tmp_path, 3), journal)
    assert next(event.block for event in first.run(0) if isinstance(event, BlockFinished)) == 0
    again = tiny_model("llama")
    second = JournaledWalk(again, _walk(again, config, "disk", journal.directory, 3), journal)
    assert len(second.restore()) == 1
    assert second.walk.hidden.place == "disk"
    for _ in second.run(1):
        pass
    journal.close()
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("offload", "size", "device_free", "cpu_free", "place"),
    [
        ("none", 1 << 40, 1, 1, "device"),
        ("cpu", 1, 1 << 40, 1, "cpu"),
        ("disk", 1, 1 << 40, 1 << 40, "disk"),
        ("auto", 10, 100, 100, "device"),
        ("auto", 30, 100, 1000, "cpu"),
        ("auto", 30, 100, 100, "disk"),
        ("auto", 10, None, 100, "device"),
        ("auto", 30, None, 100, "disk"),
    ],
)
def test_states_lie_at_the_nearest_place_with_room(
    offload: str, size: int, device_free: int | None, cpu_free: int, place: Place
) -> None:
    """``--offload`` decides; ``auto`` takes the device, then CPU memory, then files, of which a share may be taken."""
    assert HIDDEN_SHARE == 0.25
    assert hidden_place(offload, size, device_free=device_free, cpu_free=cpu_free) == place


def test_states_elsewhere_leave_room_for_a_batch() -> None:
    """Where all states together are more than the device has, batches are single sequences only if the states are there too."""
    sites = find_stack(tiny_model("llama")).sites[0]

    def choose(*, hidden_here: bool, tuned: bool = False) -> int:
        return choose_batch_size(
            sites, num_samples=4096, seq_len=16, hidden_size=64, itemsize=4, need=Need.NORM, one_pass=True, free_bytes=1 << 24,
            on_cpu=False, tuned_sites=sites if tuned else (), hidden_here=hidden_here,
        )  # fmt: skip

    assert [choose(hidden_here=True), choose(hidden_here=True, tuned=True)] == [1, 1]
    assert choose(hidden_here=False) > 16 and choose(hidden_here=False, tuned=True) > 16
