"""What a job reports: :class:`Report` and its parts, the schema of ``report.json``. Torch-free.

Units are in the names (``seconds``, ``bytes``); perplexities are per token and mean nothing without their ``seq_len``;
divergences are in nats per token.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import computed_field

from llmprune.continuations import Continuations as Continuations
from llmprune.pruning import MAX_POINTS as MAX_POINTS
from llmprune.pruning import AllocationReport as AllocationReport
from llmprune.pruning import BlockReport as BlockReport
from llmprune.pruning import Permutation as Permutation
from llmprune.pruning import Reconstruction as Reconstruction
from llmprune.pruning import RefinementPoint as RefinementPoint
from llmprune.pruning import RefinementReport as RefinementReport
from llmprune.pruning import SearchReport as SearchReport
from llmprune.pruning import SiteReport as SiteReport
from llmprune.pruning import StatisticsReport as StatisticsReport
from llmprune.pruning import fraction_of_zeros
from llmprune.recovery_spec import RecoverConfig
from llmprune.spec import PruneConfig
from llmprune.speed import Benchmark as Benchmark
from llmprune.speed import Environment as Environment
from llmprune.speed import Latency as Latency
from llmprune.speed import Part
from llmprune.speed import Speed as Speed
from llmprune.structure import StructureReport as StructureReport
from llmprune.task_report import TaskReport as TaskReport

SCHEMA_VERSION = 1
BROKEN_RATIO = 2.0
DEGRADED_RATIO = 1.1

VerdictStatus = Literal["good", "degraded", "broken", "unmeasured"]


class TextReport(Part):
    """A token set: where it came from and what exactly it was."""

    source: str
    split: str
    description: str
    num_sequences: int
    seq_len: int
    sha256: str

    @computed_field  # type: ignore[prop-decorator]
    @property
    def num_tokens(self) -> int:
        """Tokens in all sequences."""
        return self.num_sequences * self.seq_len


class Quality(Part):
    """Dense against pruned on one text, the same windows, the same run.

    ``perplexity`` follows the GPTQ protocol (non-overlapping windows of ``text.seq_len`` tokens, fp32 logits);
    ``kl`` is the mean over tokens of KL(dense || pruned); ``top1_agreement`` the share of tokens whose most probable
    successor is unchanged. Where a model is evaluated alone only ``perplexity_pruned`` is there.
    """

    text: TextReport
    perplexity_dense: float | None = None
    perplexity_pruned: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    seconds_dense: float = 0.0
    seconds_pruned: float = 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratio(self) -> float | None:
        """Pruned perplexity over dense perplexity."""
        if self.perplexity_pruned is None or self.perplexity_dense is None:
            return None
        return self.perplexity_pruned / self.perplexity_dense


class RecoveryPoint(Part):
    """Where a recovery stood after ``step`` steps: loss on the held-out sequences, and mean loss trained on since the last."""

    step: int
    loss: float
    loss_train: float | None
    seconds: float


class Recovery(Part):
    """What ``llmprune recover`` did: a pruned model, ``config.model``, trained back towards its teacher.

    Losses are in nats per token: ``config.distill`` parts KL(teacher || student), the rest cross-entropy. Zeros are those of
    the ``num_weights`` weights of the blocks' matrices. ``rolled_back``: no loss was below the first, the weights stayed.
    """

    config: RecoverConfig
    teacher: str | None
    environment: Environment
    text: TextReport
    num_held_out: int
    num_trained: int
    num_weights: int
    num_zeros_before: int
    num_zeros_after: int
    points: tuple[RecoveryPoint, ...]
    rolled_back: bool
    quality_before: tuple[Quality, ...]
    quality_after: tuple[Quality, ...]
    seconds: float
    warnings: tuple[str, ...] = ()
    out: str | None = None
    checkpoint_bytes: int | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def loss_before(self) -> float:
        """Held out, of the pruned model."""
        return self.points[0].loss

    @computed_field  # type: ignore[prop-decorator]
    @property
    def loss_after(self) -> float:
        """Held out, of the weights that were kept."""
        return min(point.loss for point in self.points)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity_before(self) -> float:
        """Fraction of zeros in the blocks' matrices."""
        return self.num_zeros_before / self.num_weights

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity_after(self) -> float:
        """At least the one before."""
        return self.num_zeros_after / self.num_weights


class ModelReport(Part):
    """Which model, exactly, and how large."""

    name: str
    revision: str
    model_type: str
    dtype: str
    num_parameters: int
    num_prunable: int
    num_blocks: int
    weights_bytes: int


class StageReport(Part):
    """Wall time and peak memory of one stage."""

    name: str
    seconds: float
    peak_cpu_bytes: int | None = None
    peak_gpu_bytes: int | None = None


class Evaluation(Part):
    """What ``llmprune evaluate`` measured of one model, alone or against another."""

    model: str
    against: str | None
    environment: Environment
    quality: tuple[Quality, ...]
    latency: Latency | None = None
    tasks: TaskReport | None = None


class Generated(Part):
    """What one model wrote: ``num_tokens`` after the prompt, and how fast; the first of them comes out of the prefill.

    ``finished`` says that the model ended by itself. The token ids are there to be compared.
    """

    model: str
    text: str
    tokens: tuple[int, ...]
    finished: bool
    prefill_seconds: float
    decode_seconds: float
    notes: tuple[str, ...] = ()

    @computed_field  # type: ignore[prop-decorator]
    @property
    def num_tokens(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed at batch 1; None where a single token was generated."""
        return (self.num_tokens - 1) / self.decode_seconds if self.num_tokens > 1 and self.decode_seconds else None


class Generation(Part):
    """What ``llmprune generate`` wrote, and with ``--compare`` what another model makes of the same prompt."""

    prompt: str
    num_prompt_tokens: int
    environment: Environment
    generated: Generated
    compared: Generated | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def num_agreeing(self) -> int | None:
        """How many tokens from the first on both models share; None without a comparison."""
        if self.compared is None:
            return None
        pairs = zip(self.generated.tokens, self.compared.tokens, strict=False)
        return next(
            (at for at, (one, other) in enumerate(pairs) if one != other),
            min(self.generated.num_tokens, self.compared.num_tokens),
        )


class Fetched(Part):
    """What ``llmprune fetch`` brought to this machine: the model as a job will name it, and the texts, calibration first."""

    model: str
    revision: str
    weights_bytes: int
    texts: tuple[str, ...]


class LeftDense(Part):
    """Why matrices of the decoder blocks are stored as before, how many, and one of them."""

    reason: str
    num_sites: int
    example: str


class Packed(Part):
    """The weights that a packed checkpoint stores in fewer bytes.

    ``dense_bytes`` is what those weights take as ordinary tensors of the same dtype. ``num_negative_zeros`` counts the -0.0
    that 2:4 has no slot for: they come back as +0.0, which is equal.
    """

    format_version: int
    num_two_four: int
    num_bitmask: int
    dense_bytes: int
    packed_bytes: int
    num_negative_zeros: int = 0
    left_dense: tuple[LeftDense, ...] = ()

    @computed_field  # type: ignore[prop-decorator]
    @property
    def num_sites(self) -> int:
        """Matrices that are packed."""
        return self.num_two_four + self.num_bitmask

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratio(self) -> float | None:
        """Packed bytes over dense bytes; None where nothing is packed."""
        return self.packed_bytes / self.dense_bytes if self.dense_bytes else None


class Conversion(Part):
    """What ``llmprune convert`` did: from which directory to which, and the bytes of the weights before and after."""

    model: str
    out: str
    to: Literal["packed", "dense"]
    num_layers: int
    packed: Packed | None
    bytes_before: int
    bytes_after: int
    seconds: float
    warnings: tuple[str, ...] = ()


class SiteInfo(Part):
    """One prunable matrix as ``llmprune inspect`` shows it; sites of one ``input_group`` read the same tensor."""

    name: str
    shape: tuple[int, int]
    input_group: int | None
    num_zeros: int | None


class Inspection(Part):
    """The anatomy of a model: its blocks, their sites, and what is never pruned."""

    model: ModelReport
    stack: str
    blocks: tuple[tuple[SiteInfo, ...], ...]
    not_pruned: tuple[str, ...]
    tied_embeddings: bool


class StagePlan(Part):
    """What one stage is expected to need."""

    name: str
    seconds: float
    peak_cpu_bytes: int
    peak_gpu_bytes: int


class Plan(Part):
    """What a job would do and need, from config.json and the safetensors headers alone.

    ``weights_place`` is where weights wait while others are worked on: device, cpu or disk; ``hidden_place`` where hidden
    states wait between blocks. Of pattern structured ``num_modules`` can be pruned and ``left`` says why others cannot, by
    name; sites are the matrices of these modules, and weights what can go from them.
    """

    config: PruneConfig
    model: ModelReport
    num_sites: int
    num_pruned_weights: int
    walk: str
    batch_size: int
    seq_len: int
    calibration_tokens: int
    evaluation_tokens: int
    device: str
    weights_place: str
    hidden_place: str = "device"
    stages: tuple[StagePlan, ...]
    peak_cpu_bytes: int
    peak_gpu_bytes: int
    free_cpu_bytes: int
    free_gpu_bytes: int
    disk_bytes: int
    free_disk_bytes: int
    download_bytes: int
    seconds: float
    problems: tuple[str, ...] = ()
    num_modules: int | None = None
    left: dict[str, str] = {}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice."""
        return not self.problems


class Verdict(Part):
    """A plain sentence on whether the pruned model is still worth having."""

    status: VerdictStatus
    text: str


class Report(Part):
    """Everything a job asked for, did, lost and gained; the schema of ``report.json``."""

    schema_version: int = SCHEMA_VERSION
    config: PruneConfig
    model: ModelReport
    environment: Environment
    calibration: TextReport | None
    scope: str
    walk: str
    allocation: AllocationReport | None = None
    blocks: tuple[BlockReport, ...]
    refinement: RefinementReport | None = None
    structure: StructureReport | None = None
    quality: tuple[Quality, ...]
    latency: Latency | None
    continuations: Continuations | None = None
    tasks: TaskReport | None = None
    benchmark: Benchmark | None = None
    stages: tuple[StageReport, ...]
    statistics: tuple[StatisticsReport, ...] = ()
    num_zeros_model: int
    warnings: tuple[str, ...] = ()
    resumed: bool = False
    out: str | None = None
    checkpoint_bytes: int | None = None
    packed: Packed | None = None
    recovery: Recovery | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        """Achieved fraction of zeros among the pruned sites' weights, or of what could be taken out whole."""
        if self.structure:
            return self.structure.sparsity
        return fraction_of_zeros([site for block in self.blocks for site in block.sites])

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity_of_model(self) -> float:
        """Fraction of zeros, or of parameters gone, among all of the dense model, embeddings and norms included."""
        if self.structure:
            return self.structure.sparsity_of_model
        return self.num_zeros_model / self.model.num_parameters

    @computed_field  # type: ignore[prop-decorator]
    @property
    def num_sites(self) -> int:
        """Number of pruned weight matrices."""
        return sum(len(block.sites) for block in self.blocks)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Verdict:
        """The verdict on the worst evaluated text."""
        remedy = "Lower the sparsity, or use --effort best."
        if self.config.reconstruct or self.recovery:
            remedy = "Lower the sparsity."
        elif self.structure:
            remedy = "Lower the sparsity, or train it back with `llmprune recover`."
        return judge(self.quality, remedy)


def judge(quality: tuple[Quality, ...], remedy: str) -> Verdict:
    """Broken above 2x the dense perplexity (or if it is not finite), degraded above 1.1x, good below.

    ``remedy`` is what to do about a broken one.
    """
    measured = [(item.ratio, item) for item in quality if item.ratio is not None]
    if not measured:
        return Verdict(status="unmeasured", text="No text was evaluated: the quality of this checkpoint is unknown.")
    for ratio, item in measured:
        if not math.isfinite(ratio):
            return Verdict(
                status="broken",
                text=f"Broken: perplexity {item.perplexity_dense:.2f} -> {item.perplexity_pruned:.2f} on {item.text.source}.",
            )
    ratio, worst = max(measured, key=lambda pair: pair[0])
    where = f"on {worst.text.source} at seq_len {worst.text.seq_len}"
    change = f"perplexity {worst.perplexity_dense:.2f} -> {worst.perplexity_pruned:.2f} ({ratio:.2f}x) {where}"
    if ratio > BROKEN_RATIO:
        return Verdict(status="broken", text=f"Broken: {change}, more than {BROKEN_RATIO:g}x the dense model's. {remedy}")
    if ratio > DEGRADED_RATIO:
        return Verdict(status="degraded", text=f"Degraded but usable: {change}. Check it on your own task before use.")
    return Verdict(status="good", text=f"Good: {change}.")
