"""What is concluded from given times: ratios, picks, verdicts and the reasons in words."""

from __future__ import annotations

from typing import Any

import pytest

from llmprune.measure.reasons import DeviceFacts, explain
from llmprune.report import Generated, Generation
from llmprune.speed import Benchmark, LayerTime, ModelSpeed
from tests.reports import layer, point, sample_benchmark, sample_report

CPU = DeviceFacts("cpu")
H200 = DeviceFacts("cuda", (9, 0))


def model(rate: float, *, packed: bool = False, share: float | None = 0.9, prefill: float | None = None) -> ModelSpeed:
    """A model with one decode point, and a prefill point where asked."""
    speeds = [point("decode", 1, 32, rate, None if share is None else 4000 * share)]
    if prefill is not None:
        speeds.append(point("prefill", 1, 512, prefill))
    return ModelSpeed(
        name="m", weights_bytes=60 if packed else 100, packed_bytes=50 if packed else 0, num_packed=7 if packed else 0,
        speeds=tuple(speeds),
    )  # fmt: skip


def bench(dense: ModelSpeed | None, packed: ModelSpeed, **changes: Any) -> Benchmark:
    """A benchmark of the two without layers."""
    fields: dict[str, Any] = {"dense": dense, "subject": packed, "against": None if dense is None else "d", "layers": ()}
    return sample_benchmark(**{**fields, **changes})


def test_ratios_are_computed_from_the_speeds() -> None:
    """Packed over dense for whole models, dense over packed for times of layers."""
    benchmark = sample_benchmark()
    assert [pair.ratio for pair in benchmark.pairs] == pytest.approx([40 / 42, 1.5, 1.28])
    assert all(pair.clear for pair in benchmark.pairs)
    assert benchmark.layers[0].times[0].ratio == pytest.approx(30.2 / 17.9)


def test_faster_in_words() -> None:
    """The verdict names the device, decode first, each ratio, and the size of the weights."""
    verdict = sample_benchmark().verdict
    assert verdict.status == "faster"
    assert verdict.text == (
        "Faster on NVIDIA H200: decode at batch 1 1.50x, decode at batch 16 1.28x, prefill of 2048 tokens 0.95x; "
        "weights 0.60x of the dense model's."
    )


@pytest.mark.parametrize(
    ("dense", "packed", "status", "words"),
    [
        (100.0, 150.0, "faster", "Faster on NVIDIA H200: decode at batch 1 1.50x"),
        (100.0, 50.0, "slower", "Slower on NVIDIA H200: decode at batch 1 0.50x"),
        (100.0, 101.0, "same", "No speed-up on NVIDIA H200: decode at batch 1 1.01x (within the spread)"),
    ],
)
def test_status(dense: float, packed: float, status: str, words: str) -> None:
    """A difference within the quartiles is none."""
    verdict = bench(model(dense), model(packed, packed=True)).verdict
    assert verdict.status == status
    assert words in verdict.text


def test_few_runs_decide_nothing() -> None:
    """Two runs have no spread to speak of: however far apart, they are not called a speed-up."""
    one = model(100).model_copy(update={"speeds": (point("decode", 1, 32, 100, repeats=2),)})
    other = model(900, packed=True).model_copy(update={"speeds": (point("decode", 1, 32, 900, repeats=2),)})
    verdict = bench(one, other).verdict
    assert verdict.status == "same"
    assert "Too few runs to tell on NVIDIA H200: decode at batch 1 9.00x (too few runs)" in verdict.text
    time = layer("2:4", (8, 8), 1, packed_seconds=1.0, dense_seconds=2.0).times[0]
    assert time.pick == "packed"
    assert LayerTime(**{**time.model_dump(exclude={"ratio", "pick"}), "repeats": 2}).pick == "dense"


def test_alone_there_is_no_ratio() -> None:
    """One model alone: its speeds, and nothing about faster."""
    verdict = bench(None, model(123.4)).verdict
    assert verdict.status == "alone"
    assert verdict.text == "On NVIDIA H200: decode at batch 1 123.4 tokens/s."


def test_nothing_measured() -> None:
    """Where no point was in time the verdict says so."""
    assert "nothing was measured" in bench(None, ModelSpeed(name="m", weights_bytes=1)).verdict.text


@pytest.mark.parametrize(("packed", "dense", "pick"), [(1.0, 2.0, "packed"), (2.0, 1.0, "dense"), (1.0, 1.015, "dense")])
def test_pick(packed: float, dense: float, pick: str) -> None:
    """Packed only where it is faster beyond the spread."""
    measured = layer("2:4", (8, 8), 1, packed_seconds=packed, dense_seconds=dense)
    assert measured.times[0].pick == measured.pick == pick


def test_pick_of_a_layer_is_that_of_its_fewest_tokens() -> None:
    """Decode decides, not a long prompt."""
    slow = layer("2:4", (8, 8), 1, packed_seconds=2.0, dense_seconds=1.0, tokens=2048).times[0]
    fast = layer("2:4", (8, 8), 1, packed_seconds=1.0, dense_seconds=2.0, tokens=1)
    assert fast.model_copy(update={"times": (slow, *fast.times)}).pick == "packed"


def test_cpu_says_that_weights_are_expanded_and_nothing_of_gpus() -> None:
    """On a CPU one reason alone, whatever else is slow."""
    (said,) = explain(CPU, model(50, packed=True), model(100, share=0.01), zeros=0.5)
    for words in ("expanded to dense at every call", "no sparse arithmetic", "not time", "--to dense", "nothing about GPUs"):
        assert words in said
    assert "launch" not in said and "tensor cores" not in said


def test_zeros_in_dense_tensors_bring_nothing() -> None:
    """A dense checkpoint with zeros: their share, and how to pack it; one without has nothing to gain."""
    (said,) = explain(H200, model(100), model(100), zeros=0.5)
    assert "stores its zeros (50 % of its matrices) in dense tensors, which brings neither speed nor memory" in said
    assert "--to packed" in said
    (said,) = explain(CPU, model(100), None, zeros=0.0)
    assert said == "This model is dense: there is nothing sparse in it that could make it faster."


def test_nothing_to_say_where_it_is_faster() -> None:
    """No excuse without a fault."""
    fast = layer("2:4", (8, 8), 1, packed_seconds=1.0, dense_seconds=2.0)
    assert explain(H200, model(150, packed=True, prefill=900), model(100, prefill=500), [fast], zeros=0.5) == ()


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (DeviceFacts("cuda", (7, 5)), "compute capability 7.5; sparse tensor cores came with 8.0"),
        (DeviceFacts("cuda", (9, 0), has_triton=False), "Triton is not installed"),
        (DeviceFacts("mps"), "No sparse tensor cores"),
        (DeviceFacts("cuda", None), "No sparse tensor cores"),
    ],
)
def test_devices_that_cannot(facts: DeviceFacts, words: str) -> None:
    """Old GPUs, other makes, and a missing compiler are named."""
    assert words in explain(facts, model(150, packed=True), model(100), zeros=0.5)[0]


def test_launch_bound_decode() -> None:
    """Where the dense model reads its weights slowly, fewer bytes cannot help, and the share is given."""
    said = explain(H200, model(100, packed=True), model(100, share=0.08), zeros=0.5)
    assert any("launch-bound" in text and "8 % of this device's copy bandwidth" in text for text in said)
    assert not any("launch-bound" in text for text in explain(H200, model(100, packed=True), model(100), zeros=0.5))


def test_compute_bound_prefill() -> None:
    """Long prompts are bound by arithmetic."""
    said = explain(H200, model(150, packed=True, prefill=400), model(100, prefill=500), zeros=0.5)
    assert len(said) == 1 and "Prefill is compute-bound" in said[0]


def test_few_packed_weights() -> None:
    """A model of which little is packed cannot gain much."""
    packed = model(100, packed=True).model_copy(update={"weights_bytes": 95, "packed_bytes": 6})
    assert any("Only 11 % of the weights are packed" in text for text in explain(H200, packed, model(100), zeros=0.5))


def test_layers_better_left_dense_are_named() -> None:
    """The shapes that were picked dense, at most four of them."""
    slow = [layer("2:4", (size, 8), 1, packed_seconds=2.0, dense_seconds=1.0) for size in range(1, 7)]
    (said,) = explain(H200, model(150, packed=True), model(100), slow, zeros=0.5)
    assert said.endswith("better left dense: 1 x 8, 2 x 8, 3 x 8, 4 x 8 and 2 more.")


def test_benchmark_survives_json() -> None:
    """Written and read again it is equal, with verdict, ratios and picks in the JSON for others to read."""
    benchmark = sample_benchmark()
    text = benchmark.model_dump_json()
    assert Benchmark.model_validate_json(text) == benchmark
    for key in ('"verdict"', '"ratio"', '"pick"', '"copy_share"'):
        assert key in text
    report = sample_report(benchmark=benchmark)
    assert type(report).model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize(
    ("one", "other", "agreeing"),
    [((1, 2, 3), (1, 2, 4), 2), ((1, 2), (1, 2, 3), 2), ((1,), (2,), 0), ((), (), 0), ((5, 6), (5, 6), 2)],
)
def test_agreeing_tokens(one: tuple[int, ...], other: tuple[int, ...], agreeing: int) -> None:
    """How many tokens from the first on are the same."""

    def written(tokens: tuple[int, ...]) -> Generated:
        return Generated(model="m", text="", tokens=tokens, finished=False, prefill_seconds=1.0, decode_seconds=2.0)

    generation = Generation(
        prompt="", num_prompt_tokens=1, environment=sample_report().environment, generated=written(one), compared=written(other)
    )
    assert generation.num_agreeing == agreeing
    assert generation.model_copy(update={"compared": None}).num_agreeing is None
    assert written((1, 2, 3)).tokens_per_second == 1.0
    assert written((1,)).tokens_per_second is None
