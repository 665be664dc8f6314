"""What is reported of speed: :class:`Latency` of a job, :class:`Benchmark`, and the verdict on it. Torch-free.

Seconds are medians unless they say otherwise; ``quartiles`` are the first and the third. A GB is 1e9 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

Phase = Literal["prefill", "decode"]
MIN_CLEAR = 3
"""Runs without which a difference is none."""

SpeedStatus = Literal["faster", "same", "slower", "alone"]


class Part(BaseModel):
    """Base of everything in a report."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class Environment(Part):
    """What the numbers were measured with."""

    llmprune: str
    torch: str
    transformers: str
    python: str
    device: str
    num_threads: int


class Speed(Part):
    """Tokens per second at one batch size: the median of ``repeats`` runs, and their quartiles."""

    phase: Phase
    batch_size: int
    num_tokens: int
    repeats: int
    tokens_per_second: float
    quartiles: tuple[float, float]


class Latency(Part):
    """Speed of the dense and the pruned model on the same device, and what to make of it."""

    device: str
    dense: tuple[Speed, ...]
    pruned: tuple[Speed, ...] = ()
    note: str = ""


class Protocol(Part):
    """How a benchmark is taken: the points, and how long.

    Prefill reads ``prefill_tokens`` at batch 1; decode generates ``decode_tokens`` at each of ``batch_sizes``, one at a time
    after ``context`` tokens that are not timed; single layers see ``layer_tokens`` rows. Each point is run at most
    ``repeats`` times after a warm-up, all of them together take about ``seconds``.
    """

    prefill_tokens: tuple[Annotated[int, Field(ge=1, le=1 << 20)], ...] = (128, 512, 2048)
    batch_sizes: tuple[Annotated[int, Field(ge=1, le=1 << 12)], ...] = (1, 4, 16, 64)
    layer_tokens: tuple[Annotated[int, Field(ge=1, le=1 << 20)], ...] = (1, 4, 16, 64, 512, 2048)
    decode_tokens: Annotated[int, Field(ge=1)] = 32
    context: Annotated[int, Field(ge=1)] = 128
    repeats: Annotated[int, Field(ge=1, le=10_000)] = 20
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0


class BenchmarkSpeed(Speed):
    """One point of a benchmark.

    ``gigabytes_per_second`` are the stored weights a decode step reads, by the steps in a second; ``copy_share`` is that
    over the device's own copy bandwidth. ``cuda_graph`` says whether the run was one.
    """

    context: int = 0
    cuda_graph: bool = False
    gigabytes_per_second: float | None = None
    copy_share: float | None = None


class ModelSpeed(Part):
    """One model: its size, the most memory it took, and its speed at every point that was measured.

    ``peak_bytes`` is the weights and the most that one run took beside them.
    """

    name: str
    weights_bytes: int
    packed_bytes: int = 0
    num_packed: int = 0
    peak_bytes: int | None = None
    speeds: tuple[BenchmarkSpeed, ...] = ()


class LayerTime(Part):
    """One matrix shape at one number of tokens: ``F.linear`` on the dense weight against the packed operation, in seconds."""

    num_tokens: int
    repeats: int
    dense_seconds: float
    dense_quartiles: tuple[float, float]
    packed_seconds: float
    packed_quartiles: tuple[float, float]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratio(self) -> float:
        """Dense time over packed time: above 1 the packed operation is faster."""
        return self.dense_seconds / self.packed_seconds

    @computed_field  # type: ignore[prop-decorator]
    @property
    def pick(self) -> Literal["packed", "dense"]:
        """Packed only where it is faster beyond the spread of three runs or more."""
        faster = self.repeats >= MIN_CLEAR and self.packed_quartiles[1] < self.dense_quartiles[0]
        return "packed" if faster else "dense"


class LayerSpeed(Part):
    """All packed layers of one shape and format; ``example`` is the path of the first."""

    format: str
    shape: tuple[int, int]
    num_layers: int
    example: str
    times: tuple[LayerTime, ...]

    @property
    def pick(self) -> Literal["packed", "dense"]:
        """The pick for decode at the smallest number of tokens."""
        return min(self.times, key=lambda time: time.num_tokens).pick


class SpeedPair(Part):
    """The same point of two models: ``ratio`` above 1 is the packed one faster, ``clear`` if the quartiles do not meet."""

    dense: BenchmarkSpeed
    packed: BenchmarkSpeed

    @property
    def ratio(self) -> float:
        """Packed speed over dense speed."""
        return self.packed.tokens_per_second / self.dense.tokens_per_second

    @property
    def clear(self) -> bool:
        """Whether the interquartile ranges of three runs or more do not meet."""
        return self.repeats >= MIN_CLEAR and not overlap(self.dense, self.packed)

    @property
    def repeats(self) -> int:
        """Runs of the one that was run less."""
        return min(self.dense.repeats, self.packed.repeats)


class SpeedVerdict(Part):
    """A plain sentence on what the packed weights bring on this device."""

    status: SpeedStatus
    text: str


class Benchmark(Part):
    """What ``llmprune benchmark`` measured of one model, alone or against its dense original.

    ``mixed`` is the packed model with those layers dense again that were not faster packed (``layers`` lists the picks).
    ``reasons`` say why packed weights bring nothing on this device, where they do not; ``notes`` what was left out or done
    otherwise than asked. ``interleaved``: runs of both models took turns, so that a drift of the machine hits both.
    """

    model: str
    against: str | None = None
    environment: Environment
    protocol: Protocol
    copy_gigabytes_per_second: float
    interleaved: bool
    subject: ModelSpeed
    dense: ModelSpeed | None = None
    mixed: ModelSpeed | None = None
    layers: tuple[LayerSpeed, ...] = ()
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def pairs(self) -> tuple[SpeedPair, ...]:
        """The points measured of both models."""
        return pair(self.dense, self.subject)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> SpeedVerdict:
        """Faster, the same or slower, at which phase and by how much, and why not more."""
        return judge_speed(self)


def overlap(dense: Speed, pruned: Speed) -> bool:
    """Whether the interquartile ranges meet, so that the ratio is within the spread of the runs."""
    return dense.quartiles[0] <= pruned.quartiles[1] and pruned.quartiles[0] <= dense.quartiles[1]


def pair(dense: ModelSpeed | None, packed: ModelSpeed | None) -> tuple[SpeedPair, ...]:
    """Points of the same phase and sizes."""
    if dense is None or packed is None:
        return ()
    found = {point_of(speed): speed for speed in packed.speeds}
    return tuple(SpeedPair(dense=speed, packed=found[point_of(speed)]) for speed in dense.speeds if point_of(speed) in found)


def point_of(speed: Speed) -> tuple[str, int, int]:
    """What makes two speeds comparable."""
    return speed.phase, speed.batch_size, speed.num_tokens


def pair_speeds(dense: Sequence[Speed], others: Sequence[Speed]) -> list[tuple[Speed, Speed | None]]:
    """Each dense measurement with the other one of the same phase and sizes."""
    by_sizes = {point_of(speed): speed for speed in others}
    return [(speed, by_sizes.get(point_of(speed))) for speed in dense]


def judge_speed(benchmark: Benchmark) -> SpeedVerdict:
    """Faster if decode at the smallest batch is (or prefill, where no decode was measured), beyond the spread of the runs."""
    device = benchmark.environment.device
    pairs = benchmark.pairs
    reasons = " ".join(benchmark.reasons)
    if not pairs:
        alone = _alone(benchmark.subject.speeds)
        return SpeedVerdict(status="alone", text=" ".join(filter(None, (f"On {device}: {alone}.", reasons))))
    first = next((item for item in pairs if item.packed.phase == "decode"), pairs[0])
    if not first.clear:
        status: SpeedStatus = "same"
        head = f"No speed-up on {device}" if first.repeats >= MIN_CLEAR else f"Too few runs to tell on {device}"
    elif first.ratio > 1:
        status, head = "faster", f"Faster on {device}"
    else:
        status, head = "slower", f"Slower on {device}"
    points = ", ".join(_in_words(item) for item in sorted(pairs, key=lambda item: item.packed.phase))
    size = _size(benchmark)
    return SpeedVerdict(status=status, text=" ".join(filter(None, (f"{head}: {points}{size}.", reasons))))


def _in_words(item: SpeedPair) -> str:
    where = f"at batch {item.packed.batch_size}" if item.packed.phase == "decode" else f"of {item.packed.num_tokens} tokens"
    doubt = "" if item.clear else " (within the spread)" if item.repeats >= MIN_CLEAR else " (too few runs)"
    return f"{item.packed.phase} {where} {item.ratio:.2f}x{doubt}"


def _size(benchmark: Benchmark) -> str:
    if benchmark.dense is None or not benchmark.subject.num_packed:
        return ""
    return f"; weights {benchmark.subject.weights_bytes / benchmark.dense.weights_bytes:.2f}x of the dense model's"


def _alone(speeds: Iterable[Speed]) -> str:
    said = []
    for speed in speeds:
        where = f"at batch {speed.batch_size}" if speed.phase == "decode" else f"of {speed.num_tokens} tokens"
        said.append(f"{speed.phase} {where} {speed.tokens_per_second:,.4g} tokens/s")
    return ", ".join(said) or "nothing was measured"
