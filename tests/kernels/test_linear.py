"""The packed layers: their numbers, their state_dict in every way it is loaded, moving, copying, and what they refuse."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from llmprune_kernels import BitmaskLinear, PackedLinear, SparseLinear24, fragments, prepare_, tune_, tuning, two_four

O, I = 37, 300  # neither fills the fragments, and the metadata ends in half a byte  # noqa: E741
Make = Callable[..., PackedLinear]


def two_four_linear(dtype: torch.dtype = torch.bfloat16, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    linear = nn.Linear(I, O, bias).requires_grad_(False)
    groups = linear.weight.unflatten(1, (-1, 4))
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.abs().topk(2, 2).indices, True)
    linear.weight.copy_(torch.where(kept, groups, 0.0).flatten(1))
    return linear.to(dtype)


def make(kind: str, linear: nn.Linear | None = None) -> PackedLinear:
    linear = linear or two_four_linear()
    if kind == "bitmask":
        return BitmaskLinear.from_linear(linear)
    layer = SparseLinear24.from_linear(linear, int8=kind.startswith("int8"))
    return layer.relayout("fragments") if kind.endswith("fragments") else layer


def empty_like(layer: PackedLinear, **kwargs: object) -> PackedLinear:
    kwargs = {"bias": layer.bias is not None, "dtype": layer.dtype} | kwargs
    if isinstance(layer, SparseLinear24):
        return SparseLinear24(I, O, int8=layer.is_int8, **kwargs)  # type: ignore[arg-type]
    return BitmaskLinear(I, O, **kwargs)  # type: ignore[arg-type]


def tokens(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(2, 3, I, generator=torch.Generator().manual_seed(7)).to(dtype)


KINDS = ("canonical", "fragments", "int8", "int8 fragments", "bitmask")
EXACT = ("canonical", "fragments", "bitmask")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Compiled code counts against a limit per function, which all tests together would exceed."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", EXACT)
def test_a_layer_computes_what_its_linear_does(kind: str, bias: bool) -> None:
    """On CPU to the bit, as both unpack and multiply with the same function."""
    linear = two_four_linear(bias=bias)
    assert torch.equal(make(kind, linear)(tokens()), linear(tokens()))


@pytest.mark.parametrize("kind", ["int8", "int8 fragments"])
def test_int8_is_as_near_as_its_grid(kind: str) -> None:
    """255 steps a row: 0.5 % of the result, and both layouts agree."""
    linear = two_four_linear()
    y, wanted = make(kind, linear)(tokens()).float(), linear(tokens()).float()
    assert 0 < (y - wanted).norm() <= 0.01 * wanted.norm()
    torch.testing.assert_close(y, make("int8", linear)(tokens()).float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dense_weight_and_to_linear_are_exact(kind: str, dtype: torch.dtype) -> None:
    """Bit for bit, and the dense copy can be trained."""
    linear = two_four_linear(dtype)
    if kind == "fragments" and dtype == torch.float32:
        pytest.skip("fragments hold 16-bit values")
    layer = make(kind, linear).eval()
    dense = layer.to_linear()
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(dense.weight, linear.weight)
    assert torch.equal(dense.bias, linear.bias)
    assert dense.weight.requires_grad
    assert not dense.training


def test_a_conv1d_is_packed_transposed() -> None:
    """GPT-2 keeps [in, out]; from_weight takes the [out, in] view."""
    linear = two_four_linear()
    conv_weight_IO = linear.weight.T.contiguous()
    assert torch.equal(SparseLinear24.from_weight(conv_weight_IO.T, linear.bias)(tokens()), linear(tokens()))
    assert torch.equal(BitmaskLinear.from_weight(conv_weight_IO.T, linear.bias)(tokens()), linear(tokens()))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_not_trained(kind: str) -> None:
    """Not even those of an nn.Linear that is."""
    layer = make(kind, two_four_linear().requires_grad_(True))
    assert [name for name, _ in layer.named_parameters()]
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_canonical(kind: str) -> None:
    """Names, shapes and dtypes of the format, whatever the runtime layout."""
    state = make(kind).state_dict()
    shapes = {name: (tensor.dtype, *tensor.shape) for name, tensor in state.items()}
    half = torch.bfloat16
    if kind == "bitmask":
        assert shapes["bits"] == (torch.uint8, O, 38)
        assert shapes["offsets"] == (torch.int64, 4)
        assert shapes.keys() == {"bits", "values", "offsets", "bias"}
    elif kind.startswith("int8"):
        assert shapes == {
            "values": (torch.int8, O, 150), "meta": (torch.uint8, O, 38), "scale": (torch.float32, O), "bias": (half, O)
        }  # fmt: skip
    else:
        assert shapes == {"values": (half, O, 150), "meta": (torch.uint8, O, 38), "bias": (half, O)}
        assert torch.equal(state["values"], two_four.pack(two_four_linear().weight).values)


@pytest.mark.parametrize("way", ["copy", "assign", "meta", "one by one", "setattr", "torch.save"])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind: str, way: str) -> None:
    """Every way that a loader fills a layer gives the same numbers."""
    source = make(kind)
    state = source.state_dict()
    on_meta = way in ("meta", "one by one", "setattr")
    if kind == "bitmask" and on_meta:
        layer = empty_like(source, device="meta", num_values=len(state["values"]))
    else:
        layer = empty_like(source, device="meta" if on_meta else None)
    if way == "setattr":
        for name, tensor in state.items():
            setattr(layer, name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        prepare_(nn.Sequential(layer))
        assert not any(parameter.requires_grad for parameter in layer.parameters())
    elif way == "one by one":
        for name, tensor in state.items():
            layer.load_state_dict({name: tensor}, strict=False, assign=True)
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        layer.load_state_dict(torch.load(file, weights_only=True))
    else:
        layer.load_state_dict(state, assign=way != "copy")
    torch.testing.assert_close(layer(tokens()), source(tokens()), rtol=1e-2, atol=1e-2)
    if kind in EXACT:
        assert torch.equal(layer(tokens()), source(tokens()))
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("kind", ["fragments", "int8 fragments"])
def test_loading_into_a_layer_in_fragment_order(kind: str) -> None:
    """Its old weights are gone, not mixed with the new."""
    layer, other = make(kind), make(kind, two_four_linear(seed=5))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.dense_weight(), other.dense_weight())
    torch.testing.assert_close(layer(tokens()), other(tokens()), rtol=1e-2, atol=1e-2)


def test_loading_bits_forgets_what_was_derived() -> None:
    """Row starts belong to the bits they were made from."""
    linear, other = two_four_linear(), two_four_linear(seed=5)
    other.weight[3:9] = 0
    layer = make("bitmask", linear)
    layer(tokens())
    layer.load_state_dict(make("bitmask", other).state_dict())
    assert torch.equal(layer(tokens()), other(tokens()))
    layer = make("bitmask", linear)
    for name, tensor in make("bitmask", other).state_dict().items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    assert torch.equal(layer(tokens()), other(tokens()))


@pytest.mark.parametrize("kind", KINDS)
def test_moving_and_casting(kind: str) -> None:
    """.to(dtype) converts the values whatever the layout; .to("meta") and back keeps the shapes."""
    linear = two_four_linear()
    layer = make(kind, linear).to(torch.float16)
    assert layer.dtype == torch.float16
    wanted = make(kind, linear).dense_weight().to(torch.float16)
    torch.testing.assert_close(layer.dense_weight(), wanted, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(
        layer(tokens(torch.float16)), (tokens(torch.float16).float() @ wanted.float().T + linear.bias.float()).half(),
        rtol=1e-2, atol=1e-2,
    )  # fmt: skip
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float16
    if isinstance(layer, SparseLinear24) and layer.is_int8:
        assert layer.scale is not None
        assert layer.scale.dtype == torch.float32
        assert torch.equal(layer.scale, make(kind, linear).scale)  # type: ignore[arg-type]
    there = layer.to("meta")
    assert all(parameter.is_meta for parameter in there.parameters())
    assert there.weight.shape == (O, I)
    back = there.to_empty(device="cpu")
    back.load_state_dict(make(kind, linear).state_dict())
    torch.testing.assert_close(back.float().dense_weight(), wanted.float(), rtol=1e-2, atol=1e-2)


def test_relayout_is_exact_and_undone() -> None:
    """Fragments hold int32 words; canonical again is what it was."""
    layer = SparseLinear24.from_linear(two_four_linear())
    values, meta = layer.values.clone(), layer.meta.clone()
    assert layer.relayout("fragments").layout == "fragments"
    assert layer.values.dtype == torch.int32
    assert [list(layer.values.shape), list(layer.meta.shape)] == list(fragments.fragment_shapes(O, I, torch.bfloat16))
    assert layer.dtype == torch.bfloat16
    layer.relayout("canonical")
    assert torch.equal(layer.values, values)
    assert torch.equal(layer.meta, meta)
    with pytest.raises(ValueError, match="'canonical' or 'fragments'"):
        layer.relayout("blocked")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float32"):
        layer.float().relayout("fragments")


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_is_independent(kind: str) -> None:
    """The copy computes the same and has tensors of its own."""
    layer = make(kind)
    twin = copy.deepcopy(layer)
    y = layer(tokens())
    assert torch.equal(twin(tokens()), y)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(layer(tokens()), y)


@pytest.mark.parametrize("kind", KINDS)
def test_pickling_is_refused_with_the_remedy(kind: str) -> None:
    """Both by pickle and by torch.save, also inside a model."""
    for attempt in (lambda: pickle.dumps(make(kind)), lambda: torch.save(nn.Sequential(make(kind)), io.BytesIO())):
        with pytest.raises(TypeError, match="state_dict"):
            attempt()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_layers_compile_whole(kind: str, backend: str) -> None:
    """fullgraph=True, the same numbers, and again after other weights were loaded."""
    layer = make(kind)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(tokens()), layer(tokens()), rtol=0, atol=0)
    torch.testing.assert_close(compiled(tokens()[:1]), layer(tokens()[:1]), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_work_in_inference_mode_and_under_vmapless_grad(kind: str) -> None:
    """inference_mode, no_grad and grad mode agree; a gradient is refused when it is asked for."""
    layer = make(kind)
    y = layer(tokens())
    with torch.inference_mode():
        assert torch.equal(layer(tokens()), y)
    with torch.no_grad():
        assert torch.equal(layer(tokens().requires_grad_()), y)
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(tokens().requires_grad_()).sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_repr_says_what_it_is(kind: str) -> None:
    """Features, and layout or density."""
    text = repr(make(kind))
    assert f"in_features={I}, out_features={O}, bias=True" in text
    assert ("density=0.500" if kind == "bitmask" else kind.split()[-1]) in text


@pytest.mark.parametrize("kind", KINDS)
def test_x_that_does_not_fit(kind: str) -> None:
    """Width and dtype are the layer's to check: fragments are padded and do not know them."""
    layer = make(kind)
    with pytest.raises(ValueError, match=r"x of shape \(2, 3, 296\) does not fit a layer of 300"):
        layer(tokens()[..., :-4])
    with pytest.raises(ValueError, match=r"torch.float16, but the layer torch.bfloat16. Cast"):
        layer(tokens(torch.float16))


def test_weights_that_are_not_two_four() -> None:
    """The first offending row and group, and in_features that no 2:4 has."""
    with pytest.raises(ValueError, match=r"row 0, group 0"):
        SparseLinear24.from_linear(nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"divisible by 4, got 6"):
        SparseLinear24.from_linear(nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"divisible by 4, got 6"):
        SparseLinear24(6, 3)
    for layer in (SparseLinear24, BitmaskLinear):
        with pytest.raises(ValueError, match="at least one"):
            layer(0, 3)
        with pytest.raises(ValueError, match="float64"):
            layer(8, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="13 kept"):
        BitmaskLinear(4, 3, num_values=13)


@pytest.mark.parametrize(
    ("kind", "name", "wrong", "message"),
    [
        ("canonical", "values", torch.zeros(O, 152), "values must be"),
        ("canonical", "values", torch.zeros(O, 150, dtype=torch.int8), "values must be"),
        ("int8", "values", torch.zeros(O, 150), "values must be torch.int8"),
        ("int8", "scale", torch.ones(O, dtype=torch.bfloat16), "scale must be"),
        ("canonical", "meta", torch.full((O, 37), 0x44, dtype=torch.uint8), "meta must be"),
        ("canonical", "meta", torch.zeros(O, 38, dtype=torch.uint8), "net.0.meta: .*row 0, group 0"),
        ("fragments", "meta", torch.full((O, 38), 0x44, dtype=torch.uint8), "net.0.meta: .*unused"),
        ("bitmask", "bits", torch.zeros(O, 37, dtype=torch.uint8), "bits must be"),
        ("bitmask", "offsets", torch.zeros(5, dtype=torch.int64), "offsets must be"),
        ("bitmask", "values", torch.zeros(3, 3), "values must be"),
    ],
)
def test_corrupt_state_dicts_are_named(kind: str, name: str, wrong: Tensor, message: str) -> None:
    """Before anything is overwritten."""
    model = nn.ModuleDict({"net": nn.Sequential(make(kind))})
    y = model["net"](tokens())
    with pytest.raises(ValueError, match=message):
        model.load_state_dict({**model.state_dict(), f"net.0.{name}": wrong})
    assert torch.equal(model["net"](tokens()), y)


def test_bits_and_values_that_do_not_belong_together() -> None:
    """Counted when they are loaded together, or else in the first forward."""
    state = make("bitmask").state_dict()
    layer = BitmaskLinear(I, O, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="corrupt bitmask"):
        layer.load_state_dict({**state, "values": state["values"][:-1]})
    layer = BitmaskLinear(I, O, dtype=torch.bfloat16)
    for name, tensor in state.items():
        layer.load_state_dict({name: tensor[:-1] if name == "values" else tensor}, strict=False, assign=True)
    with pytest.raises(ValueError, match="corrupt bitmask"):
        layer(tokens())


@pytest.mark.usefixtures("fresh_compiler")
def test_a_loaded_or_moved_bitmask_compiles_whole() -> None:
    """Nothing that looks at data is left for the first forward."""
    source = make("bitmask")
    loaded = BitmaskLinear(I, O, dtype=torch.bfloat16)
    loaded.load_state_dict(source.state_dict())
    for layer in (loaded, make("bitmask").half().bfloat16()):
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(tokens()), source(tokens()), rtol=1e-2, atol=1e-2)


def test_bad_metadata_set_by_hand_is_found_by_prepare() -> None:
    """A loader that goes past load_state_dict still gets the check."""
    layer = make("canonical")
    layer.meta = nn.Parameter(torch.zeros_like(layer.meta), requires_grad=False)
    with pytest.raises(ValueError, match="row 0, group 0"):
        prepare_(layer)


def test_a_version_of_the_future_is_refused() -> None:
    """torch keeps the version beside a state_dict that it saved itself."""
    for kind in ("canonical", "bitmask"):
        layer = make(kind)
        state = layer.state_dict()
        state._metadata[""]["version"] = 2  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=r"version 2 .* reads version 1. Update llmprune"):
            layer.load_state_dict(state)


def test_an_empty_layer_is_a_valid_zero() -> None:
    """Constructed on a real device it can be computed with, saved and loaded."""
    for layer in (SparseLinear24(I, O), SparseLinear24(I, O, int8=True), BitmaskLinear(I, O)):
        assert not layer.prepare().dense_weight().any()
        assert torch.equal(layer(tokens(torch.float32)), torch.zeros(2, 3, O))
        layer.load_state_dict(copy.deepcopy(layer.state_dict()))


def test_memory_is_what_the_format_promises() -> None:
    """9/16 of bf16 for 2:4, 5/16 for int8, 1/16 + density for a bitmask."""
    linear = nn.Linear(1024, 256, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.copy_(tuning.two_largest_of_four(linear.weight))
    dense_bytes = linear.weight.nbytes

    def share(layer: PackedLinear) -> float:
        return sum(parameter.nbytes for parameter in layer.parameters()) / dense_bytes

    assert share(SparseLinear24.from_linear(linear)) == 0.5625
    assert share(SparseLinear24.from_linear(linear).relayout("fragments")) == 0.5625
    assert share(SparseLinear24.from_linear(linear, int8=True)) == pytest.approx(0.3125, abs=0.003)
    assert share(BitmaskLinear.from_linear(linear)) == pytest.approx(0.5625, abs=0.001)


def test_tuning_a_model_without_cuda_measures_nothing() -> None:
    """It is for CUDA layers only."""
    assert tune_(nn.Sequential(make("canonical"), make("bitmask"))) == {}


def test_cusparselt_is_opt_in_and_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on a CPU; with a stand-in, from so many tokens on, and only until the weights change."""
    layer = SparseLinear24.from_linear(two_four_linear())
    assert not layer.add_cusparselt(1)
    used = []

    class Tracked(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Callable[..., Tensor], types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            used.append(func)
            plain = [arg.as_subclass(Tensor) if isinstance(arg, Tracked) else arg for arg in args]
            return func(*plain, **(kwargs or {}))

    monkeypatch.setattr(tuning, "has_cusparselt", lambda device: True)
    monkeypatch.setattr(tuning, "compress", lambda weight_OI: weight_OI.as_subclass(Tracked))
    y = layer(tokens())
    assert layer.add_cusparselt(6)
    used.clear()
    assert torch.equal(layer(tokens()), y)
    assert used == [nn.functional.linear]
    assert torch.equal(layer(tokens()[:1]), y[:1])
    assert len(used) == 1
    changes = [
        lambda: layer.to(torch.bfloat16), lambda: layer.load_state_dict(layer.state_dict()),
        lambda: setattr(layer, "values", nn.Parameter(layer.values.clone(), requires_grad=False)),
    ]  # fmt: skip
    for change in changes:
        assert layer.add_cusparselt(6)
        change()
        assert layer._cusparselt is None
    assert layer.add_cusparselt(6)
    assert copy.deepcopy(layer)._cusparselt is None
    assert not SparseLinear24.from_linear(two_four_linear(), int8=True).add_cusparselt(6)
    monkeypatch.setattr(tuning, "cusparselt_from", lambda *shape: None)
    assert not layer.add_cusparselt()
