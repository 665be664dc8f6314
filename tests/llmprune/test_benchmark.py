"""Benchmarks for real, on tiny models with tiny budgets: structure, sizes, notes, and both ways of measuring."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, StaticCache

import llmprune
import tiny
from llmprune import benchmarking
from llmprune.devices import PeakMemory
from llmprune.errors import ConfigError, DoesNotFit
from llmprune.events import Benchmarked, Event, Progress, StageFinished, StageStarted
from llmprune.masks import keep_mask
from llmprune.measure import points as points_module
from llmprune.measure.benchmark import benchmark_models, benchmark_together, make_dense_
from llmprune.measure.graphs import CaptureFailed, StaticState
from llmprune.measure.layers import measure_layers
from llmprune.measure.phases import Prepared, max_tokens, prepare_decode, prepare_prefill, random_ids, static_decode
from llmprune.measure.points import Point, Subject, bytes_read, fit_protocol, points_of, weights_bytes, zeros_of
from llmprune.measure.timing import Run
from llmprune.packing import pack_, packed_layers
from llmprune.report import Benchmark
from llmprune.spec import Pattern
from llmprune.speed import LayerSpeed, Protocol
from tests.reports import layer

CPU = torch.device("cpu")
TINY = Protocol(
    prefill_tokens=(8, 16), batch_sizes=(1, 2), layer_tokens=(1, 4), decode_tokens=3, context=4, repeats=3, seconds=30.0
)
T = TypeVar("T")


def result(run: Generator[Event, None, T]) -> tuple[list[Event], T]:
    """The events of a generator and what it returns."""
    events = []
    while True:
        try:
            events.append(next(run))
        except StopIteration as stop:
            return events, stop.value


def two_four(model: PreTrainedModel) -> PreTrainedModel:
    """Every Linear of the blocks pruned to 2:4 by magnitude, in place."""
    for module in model.get_submodule("model.layers").modules():
        if isinstance(module, nn.Linear):
            keep = keep_mask(module.weight.detach().abs(), Pattern(2, 4), 0.5, "row")
            module.weight.data.mul_(keep)
    return model


@pytest.fixture
def dense() -> PreTrainedModel:
    """A tiny Llama, 2:4 in dense tensors."""
    return two_four(tiny.make_model())


@pytest.fixture
def packed(dense: PreTrainedModel) -> PreTrainedModel:
    """The same, packed."""
    model = copy.deepcopy(dense)
    assert len(pack_(model)) == 14
    return model


def test_together(dense: PreTrainedModel, packed: PreTrainedModel) -> None:
    """Every point of both models, every kind of layer at every number of tokens, memory, progress to the last step."""
    events, benchmark = result(benchmark_together(("p", packed), ("d", dense), TINY, CPU))
    assert benchmark.model == "p" and benchmark.against == "d" and benchmark.interleaved
    names = [(speed.phase, speed.batch_size, speed.num_tokens) for speed in benchmark.subject.speeds]
    assert names == [("prefill", 1, 8), ("prefill", 1, 16), ("decode", 1, 3), ("decode", 2, 3)]
    assert len(benchmark.pairs) == 4 and all(pair.repeats == 3 for pair in benchmark.pairs)
    assert not any(speed.cuda_graph for speed in benchmark.subject.speeds)
    assert benchmark.subject.num_packed == 14 and benchmark.dense is not None and benchmark.dense.num_packed == 0
    assert benchmark.subject.weights_bytes < benchmark.dense.weights_bytes
    assert benchmark.subject.peak_bytes is not None and benchmark.subject.peak_bytes >= benchmark.subject.weights_bytes
    assert sum(kind.num_layers for kind in benchmark.layers) == 14
    assert all([time.num_tokens for time in kind.times] == [1, 4] for kind in benchmark.layers)
    assert "expanded to dense at every call" in benchmark.verdict.text and "nothing about GPUs" in benchmark.verdict.text
    steps = [event for event in events if isinstance(event, Progress)]
    assert [step.done for step in steps[: len(steps)]] == list(range(1, len(steps) + 1))
    assert steps[-1].done == steps[-1].total
    assert Benchmark.model_validate_json(benchmark.model_dump_json()) == benchmark


def test_gigabytes_per_second_are_bytes_by_steps(dense: PreTrainedModel) -> None:
    """Decode: the weights a step reads, times steps in a second; prefill has none."""
    _, benchmark = result(benchmark_together(("d", dense), None, TINY, CPU))
    read = bytes_read(dense)
    assert read is not None
    for speed in benchmark.subject.speeds:
        if speed.phase == "decode":
            assert speed.gigabytes_per_second == pytest.approx(read * speed.tokens_per_second / speed.batch_size / 1e9)
            assert speed.copy_share == pytest.approx((speed.gigabytes_per_second or 0) / benchmark.copy_gigabytes_per_second)
        else:
            assert speed.gigabytes_per_second is None and speed.copy_share is None
    assert benchmark.verdict.status == "alone" and not benchmark.layers
    assert "stores its zeros" in benchmark.verdict.text


def test_one_after_the_other(dense: PreTrainedModel) -> None:
    """What a job does: the dense model first, then what pack makes of it in place; nothing is called interleaved."""
    order: list[str] = []

    def pack() -> PreTrainedModel:
        order.append("packed")
        pack_(dense)
        return dense

    run = benchmark_models(dense, pack, device=CPU, protocol=TINY)
    first = next(run)
    assert isinstance(first, Progress) and not order
    events, benchmark = result(run)
    assert order == ["packed"]
    assert not benchmark.interleaved and len(benchmark.pairs) == 4 and len(benchmark.layers) > 0
    assert (benchmark.model, benchmark.against) == ("packed", "dense")
    last = events[-1]
    assert isinstance(last, Progress) and last.done == last.total


def test_quick_is_quick(dense: PreTrainedModel) -> None:
    """The protocol of a job ends on its own, with decode at batch 1 and 16."""
    _, benchmark = result(benchmark_models(dense, lambda: dense, device=CPU))
    assert [speed.batch_size for speed in benchmark.subject.speeds if speed.phase == "decode"] == [1, 16]
    assert benchmark.seconds < 60


def test_layers_picked_dense_are_made_dense_and_measured_again(
    dense: PreTrainedModel, packed: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where picks differ the mixed model is measured too, and computes what the packed one did."""

    def given(*_: Any, **__: Any) -> Generator[Event, None, tuple[tuple[LayerSpeed, ...], tuple[str, ...]]]:
        yield Progress(stage="benchmark", done=1, total=1)
        shapes = sorted({(item.out_features, item.in_features) for item in packed_layers(packed).values()})
        seconds = [(1.0, 2.0), *[(2.0, 1.0)] * (len(shapes) - 1)]
        return tuple(
            layer("2:4", shape, 1, packed_seconds=one, dense_seconds=other)
            for shape, (one, other) in zip(shapes, seconds, strict=True)
        ), ()

    monkeypatch.setattr("llmprune.measure.benchmark.measure_layers", given)
    ids = random_ids(packed, 1, 8)
    before = packed(input_ids=ids).logits
    _, benchmark = result(benchmark_together(("p", packed), ("d", dense), TINY, CPU))
    assert benchmark.mixed is not None and len(benchmark.mixed.speeds) == 4
    assert 0 < benchmark.mixed.num_packed < 14
    assert len(packed_layers(packed)) == benchmark.mixed.num_packed
    torch.testing.assert_close(packed(input_ids=ids).logits, before)


def test_make_dense_leaves_other_kinds_packed(packed: PreTrainedModel) -> None:
    """By format and shape."""
    shape = (packed.config.hidden_size, packed.config.intermediate_size)
    make_dense_(packed, [layer("2:4", shape, 2, packed_seconds=1.0, dense_seconds=1.0)])
    assert len(packed_layers(packed)) == 12
    assert isinstance(packed.get_submodule("model.layers.0.mlp.down_proj"), nn.Linear)
    make_dense_(packed, [layer("bitmask", shape, 2, packed_seconds=1.0, dense_seconds=1.0)])
    assert len(packed_layers(packed)) == 12


def test_bitmask_layers_are_a_kind_of_their_own(dense: PreTrainedModel) -> None:
    """Formats are timed apart."""
    pack_(dense, "bitmask")
    _, (speeds, notes) = result(measure_layers(dense, TINY, CPU, seconds=10.0, done=0, total=0))
    assert {speed.format for speed in speeds} == {"bitmask"} and notes == ()


def test_the_time_budget_leaves_points_out_and_says_so(packed: PreTrainedModel) -> None:
    """With a clock that takes a second at each look only the first points are measured, and the others are named."""

    class Slow:
        now = 0.0

        def __call__(self) -> float:
            self.now += 1.0
            return self.now

    protocol = TINY.model_copy(update={"seconds": 5.0})
    _, benchmark = result(benchmark_together(("p", packed), None, protocol, CPU, clock=Slow()))
    assert 1 <= len(benchmark.subject.speeds) < 4
    assert any("left out for lack of time (--seconds)" in note and "prefill" in note for note in benchmark.notes)
    assert any("layer timings" in note for note in benchmark.notes)


def test_protocol_is_cut_to_the_positions_of_the_model(dense: PreTrainedModel) -> None:
    """Prompts stop at the model's maximum, which is said; decode stays within it."""
    limit = max_tokens(dense)
    assert limit is not None
    protocol, notes = fit_protocol(Protocol(prefill_tokens=(8, 4 * limit, 8 * limit), context=limit), dense)
    assert protocol.prefill_tokens == (8, limit)
    assert protocol.context + protocol.decode_tokens == limit
    assert f"prefill stops at the model's maximum of {limit} tokens (asked: {4 * limit}, {8 * limit})" in notes
    assert len(notes) == 2
    assert fit_protocol(TINY, dense) == (TINY, ())


def test_points_are_in_order_of_cost() -> None:
    """Batch 1 first: what is most wanted is there even where the time is short."""
    names = [point.name for point in points_of(Protocol())]
    assert names[0] == "decode at batch 1"
    assert set(names) == {f"decode at batch {size}" for size in (1, 4, 16, 64)} | {
        f"prefill of {count} tokens" for count in (128, 512, 2048)
    }


def test_memory_that_runs_out_leaves_a_point_out(dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch too large for the device is a note, not the end."""
    real = points_module.prepare_decode

    def prepare(model: PreTrainedModel, batch_size: int, *rest: int) -> Prepared | None:
        if batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, batch_size, *rest)

    monkeypatch.setattr(points_module, "prepare_decode", prepare)
    _, benchmark = result(benchmark_together(("d", dense), None, TINY, CPU))
    assert "decode at batch 2 is left out: memory ran out" in benchmark.notes
    assert len(benchmark.subject.speeds) == 3


def test_other_errors_pass(dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not memory is not swallowed."""

    def prepare(*_: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(points_module, "prepare_prefill", prepare)
    with pytest.raises(RuntimeError, match="boom"):
        result(benchmark_together(("d", dense), None, TINY, CPU))


def test_bytes_read() -> None:
    """All weights but an untied embedding's; nothing is claimed of experts."""
    untied = tiny.make_model(tie_word_embeddings=False)
    table = untied.get_input_embeddings().weight
    assert bytes_read(untied) == weights_bytes(untied) - table.nbytes
    tied = tiny.make_model(tie_word_embeddings=True)
    assert bytes_read(tied) == weights_bytes(tied)
    assert bytes_read(tiny.make_model("mixtral")) is None


def test_zeros_are_counted_in_matrices(dense: PreTrainedModel) -> None:
    """Half of the blocks' weights; the head is a matrix too, embeddings are not."""
    head = dense.get_output_embeddings().weight.numel()
    matrices = sum(
        module.weight.numel() for module in dense.get_submodule("model.layers").modules() if isinstance(module, nn.Linear)
    )
    tied = dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert zeros_of(dense) == pytest.approx(matrices / 2 / (matrices + (0 if tied else head)), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3"])
def test_static_decode_takes_the_same_steps(model_type: str) -> None:
    """The step a CUDA graph captures, run plainly: the tokens of a growing cache, and again after a reset."""
    model = tiny.make_model(model_type, **({"sliding_window": 32} if "gemma" in model_type else {}))
    prompt = random_ids(model, 2, 5)
    captured: list[Callable[[], object]] = []

    def plainly(work: Callable[[], object], _device: torch.device) -> Callable[[], object]:
        for _ in range(4):
            work()
        captured.append(work)
        return work

    prepared = static_decode(model, prompt, 6, plainly)
    assert prepared.cuda_graph and len(captured) == 1
    growing = prepare_decode_of(model, prompt, 6)
    for _ in range(2):
        prepared.run.reset()
        growing.reset()
        assert torch.equal(prepared.run.run(), growing.run())  # type: ignore[arg-type]


def prepare_decode_of(model: PreTrainedModel, prompt: torch.Tensor, num_tokens: int) -> Run:
    """Decode with a growing cache after this very prompt."""
    prepared = prepare_decode(model, prompt.shape[0], prompt.shape[1], num_tokens)
    assert prepared is not None and not prepared.cuda_graph
    return prepared.run


@torch.no_grad()
def test_a_model_without_a_static_cache_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a failed capture, for the caller to decode plainly."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("no such\nlayer")

    monkeypatch.setattr("llmprune.measure.phases.StaticCache", refuse)
    model = tiny.make_model()
    with pytest.raises(CaptureFailed, match=r"^no static cache: no such layer$"):
        static_decode(model, random_ids(model, 1, 4), 2, lambda work, _: work)


@torch.no_grad()
def test_a_device_that_captures_nothing_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA device whose capture fails both phases run plainly, with a note of why."""

    def refuse(*_: Any) -> None:
        raise CaptureFailed("operation not permitted when stream is capturing")

    model = tiny.make_model()
    ids = random_ids(model, 1, 4)
    monkeypatch.setattr("llmprune.measure.phases.capture", refuse)
    monkeypatch.setattr("llmprune.measure.phases.module_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("llmprune.measure.phases.random_ids", lambda *_: ids)
    prefill, decode = prepare_prefill(model, 4), prepare_decode(model, 1, 4, 2)
    assert decode is not None
    for prepared in (prefill, decode):
        assert not prepared.cuda_graph
        assert "without a CUDA graph (operation not permitted" in prepared.note
        prepared.run.reset()
        prepared.run.run()


@torch.no_grad()
def test_static_state_goes_back_in_place() -> None:
    """The same tensors, because a graph keeps their addresses."""
    model = tiny.make_model()
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(input_ids=random_ids(model, 1, 4), past_key_values=cache, use_cache=True)
    lengths = [layer.cumulative_length for layer in cache.layers]
    state = StaticState(cache)
    model(input_ids=random_ids(model, 1, 3), past_key_values=cache, use_cache=True)
    assert [int(length) for length in lengths] == [7, 7]
    state.restore()
    assert [int(layer.cumulative_length) for layer in cache.layers] == [4, 4]
    assert all(layer.cumulative_length is length for layer, length in zip(cache.layers, lengths, strict=True))


@torch.no_grad()
def test_model_without_a_cache_is_measured_in_prefill_alone(dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note instead of a decode speed."""
    monkeypatch.setattr(points_module, "prepare_decode", lambda *_: None)
    _, benchmark = result(benchmark_together(("d", dense), None, TINY, CPU))
    assert {speed.phase for speed in benchmark.subject.speeds} == {"prefill"}
    assert "decode is not measured: the model keeps no cache" in benchmark.notes


def test_working_memory_is_beside_the_weights(dense: PreTrainedModel) -> None:
    """A point takes some memory, and a larger one not less."""
    subject = Subject("d", dense, 1.0)
    with torch.no_grad():
        assert subject.prepare(Point("prefill", 1, 8), 4) is not None
        first = subject.working_bytes
        assert subject.prepare(Point("decode", 8, 2), 4) is not None
    assert first is not None and subject.working_bytes is not None and 0 <= first <= subject.working_bytes


def test_peaks_of_stages_inside_one_another() -> None:
    """The start of an inner measurement does not make the outer one forget."""
    gc.collect()
    outer = PeakMemory()
    buffer = torch.ones(1 << 26, dtype=torch.uint8)
    high = outer.cpu_bytes
    del buffer
    inner = PeakMemory()
    slack = 1 << 22  # the kernel's counters of threads are summed late
    assert outer.cpu_bytes >= high - slack
    assert inner.cpu_bytes < high - slack


# From directories


def test_directories(tmp_path: Path, dense: PreTrainedModel) -> None:
    """llmprune.benchmark of a packed checkpoint against the dense one it was made from."""
    tiny.save(dense, tmp_path / "dense")
    llmprune.convert(tmp_path / "dense", to="packed", out=tmp_path / "packed")
    options: dict[str, Any] = {"prefill_tokens": (8,), "batch_sizes": (1,), "repeats": 3, "seconds": 5.0, "device": "cpu"}
    benchmark = llmprune.benchmark(tmp_path / "packed", against=tmp_path / "dense", **options)
    assert benchmark.subject.num_packed == 14 and benchmark.interleaved
    assert benchmark.protocol.repeats == 3 and len(benchmark.pairs) == 2
    assert benchmark.model == str(tmp_path / "packed") and benchmark.against == str(tmp_path / "dense")


def test_models_that_do_not_fit_together_are_measured_in_turn(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, with a warning; where not even one fits that is an error with its remedy."""
    options: dict[str, Any] = {"prefill_tokens": (8,), "batch_sizes": (), "repeats": 3, "seconds": 5.0, "device": "cpu"}
    size = sum(file.stat().st_size for file in tiny_model_dir.glob("*.safetensors"))
    monkeypatch.setattr(benchmarking, "free_bytes", lambda _: 1.5 * size / 0.8)
    events = list(benchmarking.benchmark_iter(tiny_model_dir, against=tiny_model_dir, **options))
    assert any("do not fit on the device together" in getattr(event, "message", "") for event in events)
    last = events[-1]
    assert isinstance(last, Benchmarked) and not last.benchmark.interleaved and len(last.benchmark.pairs) == 1
    monkeypatch.setattr(benchmarking, "free_bytes", lambda _: size // 2)
    with pytest.raises(DoesNotFit, match="use a larger device"):
        list(benchmarking.benchmark_iter(tiny_model_dir, **options))


def test_stages(tiny_model_dir: Path) -> None:
    """Loading and measuring are stages; the second one has its peak."""
    events = list(benchmarking.benchmark_iter(tiny_model_dir, prefill_tokens=(8,), batch_sizes=(), seconds=2.0, device="cpu"))
    assert [event.stage for event in events if isinstance(event, StageStarted)] == ["load", "benchmark"]
    finished = [event for event in events if isinstance(event, StageFinished)]
    assert finished[-1].stage == "benchmark" and finished[-1].peak_cpu_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats"),
        ({"seconds": -1.0}, "seconds"),
        ({"seconds": float("inf")}, "seconds"),
        ({"batch_sizes": (0,)}, "batch_sizes"),
        ({"prefill_tokens": (), "batch_sizes": ()}, "nothing to measure"),
    ],
)
def test_values_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    """Refused before anything is loaded, by the name of the field."""
    with pytest.raises(ConfigError, match=message):
        llmprune.benchmark("demo", **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_decode_is_a_cuda_graph(dense: PreTrainedModel, packed: PreTrainedModel) -> None:
    """Captured for both models, with bandwidth and peak of the device."""
    device = torch.device("cuda")
    pair = (("p", packed.to(device)), ("d", dense.to(device)))
    _, benchmark = result(benchmark_together(*pair, TINY, device))
    assert benchmark.notes == ()
    assert all(speed.cuda_graph for speed in benchmark.subject.speeds)
    assert benchmark.copy_gigabytes_per_second > 50
