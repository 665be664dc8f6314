"""Fused layers: one launch where it is safe, never a wrong number anywhere else."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmprune_kernels import SparseLinear24, fuse_, fuse_siblings_, tuning, two_four
from llmprune_kernels.fuse import MAX_WASTED
from llmprune_kernels.layer import frozen

SIZES = (64, 16, 23)  # fragments: all but the last must be divisible by 16
I = 264  # noqa: E741


class Attention(nn.Module):
    """Calls its three layers with one x; `between` may do something after the first."""

    def __init__(
        self, layout: str = "canonical", *, bias: bool = True, int8: bool = False, sizes: tuple[int, ...] = SIZES
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (_layer(size, layout, bias=bias, int8=int8) for size in sizes)
        self.between: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q = self.q_proj(x)
        x = self.between(x)
        return q, self.k_proj(x), self.v_proj(x)

    @property
    def layers(self) -> list[SparseLinear24]:
        return [self.q_proj, self.k_proj, self.v_proj]


def _layer(size: int, layout: str, *, bias: bool, int8: bool) -> SparseLinear24:
    weight_OI = tuning.two_largest_of_four(torch.randn(size, I)).bfloat16()
    layer = SparseLinear24.from_weight(weight_OI, torch.randn(size).bfloat16() if bias else None, int8=int8)
    return layer.relayout(layout)  # type: ignore[arg-type]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, I, generator=torch.Generator().manual_seed(seed)).bfloat16()


def same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert len(got) == len(wanted) == 3
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1.6e-2, atol=1e-2)
        assert (ours == theirs).float().mean() > 0.9  # another order of sums at most


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of every product that was computed."""
    rows: list[int] = []
    original = SparseLinear24.multiply

    def multiply(self: SparseLinear24, x: Tensor, *rest: Any) -> Tensor:
        rows.append(rest[-1])
        return original(self, x, *rest)

    monkeypatch.setattr(SparseLinear24, "multiply", multiply)
    yield rows
    torch.compiler.reset()


KINDS = [("canonical", False), ("fragments", False), ("canonical", True), ("fragments", True)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("layout", "int8"), KINDS)
def test_one_launch_gives_what_three_gave(layout: str, int8: bool, bias: bool, launches: list[int]) -> None:
    """For every layout, with and without bias, for one token and for many."""
    model = Attention(layout, int8=int8, bias=bias)
    for shape in ((1, 1), (2, 5), ()):
        wanted = model(tokens(*shape))
        twin = copy.deepcopy(model)
        assert fuse_(twin.layers, twin)
        launches.clear()
        same(twin(tokens(*shape)), wanted)
        assert launches == [sum(SIZES)]


def test_there_is_no_second_copy_of_the_weights() -> None:
    """All parameters of a kind lie in one storage, which is as long as they are together."""
    model = Attention("fragments", int8=True)
    assert fuse_(model.layers, model)
    for name in ("values", "meta", "scale", "bias"):
        parts = [getattr(layer, name) for layer in model.layers]
        assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
        assert parts[0].untyped_storage().nbytes() == sum(part.nbytes for part in parts)
        assert all(isinstance(part, nn.Parameter) and not part.requires_grad for part in parts)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.clone(),
        lambda x: x.add_(1),
        lambda x: x.view_as(x),
        lambda x: tokens(2, 5, seed=3),
        lambda x: x[:, 1:],
    ],
    ids=["copy", "in place", "view", "other", "fewer"],
)
def test_another_x_is_multiplied_alone(between: Callable[[Tensor], Tensor]) -> None:
    """Also when the tensor object is the same but was written to."""
    model = Attention("fragments")
    model.between = between
    wanted = model(tokens(2, 5))
    assert fuse_(model.layers, model)
    for _ in range(MAX_WASTED + 2):
        same(model(tokens(2, 5)), wanted)


def test_weights_written_to_in_between_are_the_ones_used() -> None:
    """In place, replaced, or loaded between the call of one layer and the next."""

    def zero(model: Attention) -> None:
        model.k_proj.values.zero_()

    def replace(model: Attention) -> None:
        model.k_proj.values = frozen(torch.zeros_like(model.k_proj.values))

    def load(model: Attention) -> None:
        state = model.k_proj.state_dict()
        model.k_proj.load_state_dict(state | {"values": torch.zeros_like(state["values"])})

    for change in (zero, replace, load):
        for layout in ("canonical", "fragments"):
            model = Attention(layout)
            assert fuse_(model.layers, model)

            def between(x: Tensor, model: Attention = model, change: Callable[[Attention], None] = change) -> Tensor:
                change(model)
                return x

            model.between = between
            q, k, v = model(tokens(1, 2))
            assert model.k_proj.bias is not None
            assert torch.equal(k, model.k_proj.bias.detach().expand_as(k))
            same((q, v, v), (model.q_proj(tokens(1, 2)), model.v_proj(tokens(1, 2)), v))


def test_a_layer_called_by_itself_computes_its_own_rows(launches: list[int]) -> None:
    """Outside its parent's forward nothing is shared, so that nothing of one CUDA graph ends up in another."""
    model = Attention()
    assert fuse_(model.layers, model)
    x = tokens(1, 1)
    for layer in model.layers:
        layer(x)
    assert launches == [*SIZES]


def test_layers_that_share_no_x_are_left_alone_soon(launches: list[int]) -> None:
    """Computing all rows for nothing is given up after a few times."""
    model = Attention()
    model.between = lambda x: x.clone()
    assert fuse_(model.layers, model)
    for _ in range(20):
        model(tokens(1, 1))
    assert launches[-3:] == [*SIZES]
    assert launches.count(sum(SIZES)) <= MAX_WASTED + 1


def test_parts_are_not_kept_longer_than_x() -> None:
    """What nobody can ask for is freed, at the latest when the parent returns."""
    model = Attention()
    assert fuse_(model.layers, model)
    group = model.q_proj._fused.group
    seen = []

    def between(x: Tensor) -> Tensor:
        seen.append(len(group.calls.pending.parts))
        return x

    model.between = between
    model(tokens(1, 1))
    assert seen == [2]
    assert group.calls.pending is None


def test_an_error_in_the_parent_does_not_leave_it_open() -> None:
    """The next call starts afresh."""
    model = Attention()
    wanted = model(tokens(1, 1))
    assert fuse_(model.layers, model)

    def fail(x: Tensor) -> Tensor:
        raise KeyError("between")

    model.between = fail
    with pytest.raises(KeyError):
        model(tokens(1, 1))
    assert model.q_proj._fused.group.calls.depth == 0
    model.between = lambda x: x
    same(model(tokens(1, 1)), wanted)


def test_inference_mode_computes_alone(launches: list[int]) -> None:
    """Its tensors keep no count of writes, so that one cannot know; the numbers are right also with a write."""
    model = Attention()
    wanted = model(tokens(2, 1))
    model.between = lambda x: x.mul_(2)
    doubled = model(tokens(2, 1))
    assert fuse_(model.layers, model)
    launches.clear()
    with torch.inference_mode():
        same(model(tokens(2, 1)), doubled)
        model.between = lambda x: x
        same(model(tokens(2, 1)), wanted)
    assert launches == [*SIZES, *SIZES]


def test_fusing_within_inference_mode() -> None:
    """The parameters are ordinary tensors all the same."""
    model = Attention("fragments")
    wanted = model(tokens(2, 1))
    with torch.inference_mode():
        assert fuse_(model.layers, model)
        same(model(tokens(2, 1)), wanted)
    assert not model.q_proj.values.is_inference()
    same(model(tokens(2, 1)), wanted)


def test_threads_do_not_fetch_each_others_parts() -> None:
    """Many threads through one model, each with its own x, and with a shared one."""
    model = Attention("fragments")
    inputs = [tokens(1, 2, seed=seed) for seed in range(4)]
    wanted = [model(x) for x in inputs]
    assert fuse_(model.layers, model)
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for _ in range(10):
                same(model(inputs[index]), wanted[index])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index % 4,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_are_right(backend: str, launches: list[int]) -> None:
    """torch.compile takes them as layers of their own, whole."""
    model = Attention("fragments")
    wanted = model(tokens(2, 1))
    assert fuse_(model.layers, model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    same(compiled(tokens(2, 1)), wanted)
    same(compiled(tokens(2, 1)), wanted)
    same(model(tokens(2, 1)), wanted)


@pytest.mark.parametrize("layout", ["canonical", "fragments"])
def test_state_dict_is_that_of_the_single_layers(layout: str) -> None:
    """Each saves its own canonical tensors, in storages of their own."""
    model = Attention(layout)
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert fuse_(model.layers, model)
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, wanted[name])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    fresh = Attention(layout)
    fresh.load_state_dict(state)
    same(fresh(tokens(1, 1)), model(tokens(1, 1)))


def test_moving_ends_the_sharing_and_fuse_begins_it_again(launches: list[int]) -> None:
    """.to() gives every layer its own tensors; hooks do not pile up."""
    model = Attention()
    wanted = model(tokens(1, 1).half().bfloat16())
    for _ in range(3):
        assert fuse_siblings_(model) == 1
        assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
        model.to(torch.float32).to(torch.bfloat16)
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
        assert all(layer._fused is None for layer in model.layers)
    same(model(tokens(1, 1)), wanted)
    assert fuse_siblings_(model) == 1
    launches.clear()
    same(model(tokens(1, 1)), wanted)
    assert launches == [sum(SIZES)]


def test_unfuse_gives_memory_back() -> None:
    """With all members gone the buffer is freed."""
    model = Attention()
    wanted = model(tokens(1, 1))
    assert fuse_(model.layers, model)
    for layer in model.layers:
        layer.unfuse()
    gc.collect()
    for layer in model.layers:
        assert layer.values.untyped_storage().nbytes() == layer.values.nbytes
    same(model(tokens(1, 1)), wanted)


def test_a_deepcopy_is_not_fused_and_can_be() -> None:
    """The copy shares nothing with the original, not by its hooks either."""
    model = Attention("fragments")
    wanted = model(tokens(1, 1))
    assert fuse_(model.layers, model)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    same(twin(tokens(1, 1)), wanted)
    assert fuse_(twin.layers, twin)
    same(twin(tokens(1, 1)), wanted)
    same(copy.deepcopy(twin)(tokens(1, 1)), wanted)


def test_what_does_not_fit_stays_as_it_is() -> None:
    """False, and the same parameters as before."""
    cases: list[list[SparseLinear24]] = [
        [Attention().q_proj],
        [Attention().q_proj, Attention("fragments").k_proj],
        [Attention().q_proj, Attention(bias=False).k_proj],
        [Attention().q_proj, Attention(int8=True).k_proj],
        [Attention().q_proj, Attention().half().k_proj],
        [Attention().q_proj, SparseLinear24(8, 16, dtype=torch.bfloat16)],
        [SparseLinear24(8, 16, device="meta"), SparseLinear24(8, 16, device="meta")],
        [SparseLinear24(8, 16), SparseLinear24(8, 16, device="meta")],
        Attention("fragments", sizes=(23, 16, 64)).layers,
    ]
    same_twice = Attention()
    cases.append([same_twice.q_proj, same_twice.q_proj])
    for layers in cases:
        before = [layer.values for layer in layers]
        assert not fuse_(layers, nn.Module())
        assert all(layer.values is values for layer, values in zip(layers, before, strict=True))
        assert all(layer._fused is None for layer in layers)


def test_siblings_are_found_by_name() -> None:
    """q/k/v and gate/up of every block; a group that does not fit is left out."""
    blocks = nn.ModuleList(Attention() for _ in range(2))
    mlp = nn.Module()
    mlp.gate_proj, mlp.up_proj = Attention().q_proj, Attention().q_proj
    odd = nn.Module()
    odd.gate_proj, odd.up_proj = Attention().q_proj, nn.Linear(I, 64)
    assert fuse_siblings_(nn.ModuleList([blocks, mlp, odd])) == 3
    assert mlp.gate_proj._fused is not None
    assert odd.gate_proj._fused is None


def test_fusing_again_moves_a_layer_to_the_new_group() -> None:
    """The old group is dissolved and computes right."""
    model = Attention()
    wanted = model(tokens(1, 1))
    assert fuse_(model.layers, model)
    old = model.v_proj._fused.group
    assert fuse_(model.layers[:2], model)
    assert not old.is_whole
    same(model(tokens(1, 1)), wanted)
    assert two_four.is_two_four(model.v_proj.weight)
