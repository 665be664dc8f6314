"""What a job reports: :class:`Report` and its parts, the schema of ``report.json``. Torch-free.

Units are in the names (``seconds``, ``bytes``); perplexities are per token and mean nothing without their ``seq_len``;
divergences are in nats per token.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, computed_field

from llmprune.spec import PruneConfig
from llmprune.speed import Benchmark as Benchmark
from llmprune.speed import Environment as Environment
from llmprune.speed import Latency as Latency
from llmprune.speed import Part
from llmprune.speed import Speed as Speed

SCHEMA_VERSION = 1
BROKEN_RATIO = 2.0
DEGRADED_RATIO = 1.1

MAX_POINTS = 500
"""Points of a course over time; a longer one is thinned out."""

VerdictStatus = Literal["good", "degraded", "broken", "unmeasured"]


class SiteReport(Part):
    """One pruned weight matrix.

    ``num_tokens`` is how many calibration tokens reached it (for an expert, those routed to it). ``output_error`` is
    ||(W - W') X||_F^2 / ||W X||_F^2 on the calibration inputs, for methods that hold the Gram matrix, before any
    reconstruction; None where that is done in rounds. ``fallback`` says why the site was scored by its weights alone, if it
    was. ``target`` is the sparsity the allocation gave it, ``pattern`` where its zeros may lie: unstructured, n:m, or dense.
    """

    name: str
    shape: tuple[int, int]
    numel: int
    num_zeros: int
    num_tokens: int = 0
    output_error: float | None = None
    fallback: str | None = None
    target: float | None = None
    pattern: str | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.num_zeros / self.numel if self.numel else 0.0


class Reconstruction(Part):
    """How the kept weights of one block were tuned against the dense model.

    Errors are ||pruned - dense||_F^2 / ||dense||_F^2 of the hidden states after the block, on calibration sequences that were
    not tuned on. ``rolled_back`` says that no state with a lower error was found: the block is as the method left it. Of
    several ``rounds``, steps and seconds are those of all, the rest is of the last.
    """

    error_before: float
    error_after: float
    steps: int
    seconds: float
    rolled_back: bool = False
    rounds: int = 1


class Permutation(Part):
    """The input channels of one site, put into an order in which its n:m pattern keeps more.

    ``kept_before`` and ``kept_after`` are the shares of RIA's score that the pattern keeps. Where the channels stayed in place
    ``reason`` says why, and the shares are None.
    """

    site: str
    kept_before: float | None = None
    kept_after: float | None = None
    reason: str | None = None


class BlockReport(Part):
    """One decoder block: its sites and the seconds it took, with ``permutations`` and ``reconstruction`` if there were any."""

    index: int
    name: str
    seconds: float
    sites: tuple[SiteReport, ...]
    permutations: tuple[Permutation, ...] = ()
    reconstruction: Reconstruction | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the weights of the block's pruned sites."""
        return _fraction(self.sites)


class SearchReport(Part):
    """What the search of an allocation did.

    ``curve`` holds (generation, KL) whenever it fell, generation 0 being dp's allocation that the search began at; KL is the
    mean KL(dense || pruned) in nats on the first ``num_tokens`` calibration tokens, which are the same for all generations.
    """

    generations: int
    num_evaluated: int
    num_tokens: int
    curve: tuple[tuple[int, float], ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def kl_start(self) -> float:
        """KL of dp's allocation."""
        return self.curve[0][1]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def kl_end(self) -> float:
        """KL of the best allocation found."""
        return self.curve[-1][1]


class AllocationReport(Part):
    """How the zeros were shared among the sites: sparsities by site name, and the zeros they are together.

    ``num_zeros`` is the target's share of ``numel`` in whole units: a weight, or for scope ``row`` a weight of every row. Under
    ``mixed`` it is the least above the target that the patterns allow, or a little more, and ``patterns`` names each site's.
    """

    name: str
    num_zeros: int
    numel: int
    sparsities: dict[str, float]
    patterns: dict[str, str] = {}
    search: SearchReport | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        """The mean over the weights of all sites."""
        return self.num_zeros / self.numel if self.numel else 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def min_sparsity(self) -> float:
        """The lowest of a site."""
        return min(self.sparsities.values(), default=0.0)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def max_sparsity(self) -> float:
        """The highest of a site."""
        return max(self.sparsities.values(), default=0.0)


class RefinementPoint(Part):
    """Where the refinement of a mask stood after ``num_passes`` backward passes; all numbers count from its start.

    ``loss`` is the mean cross-entropy on the held-out sequences, ``num_swaps`` the weights newly pruned and as many newly kept
    in passes that were accepted.
    """

    num_passes: int
    num_blocks: int
    num_accepted: int
    num_swaps: int
    loss: float
    seconds: float


class RefinementReport(Part):
    """How a mask was improved against the loss of the whole model, and what that took.

    The sequences that judged the steps are calibration text too: the evaluation says what it gained on other text. ``scope``
    is where the number of zeros stayed: matrix, row, or the groups of an n:m pattern. ``points`` are thinned out.
    """

    name: str
    preset: str
    hessian: str
    solver: str
    block_size: int
    layers_per_step: int
    num_sequences: int
    num_held_out: int
    scope: str
    num_sites: int
    points: tuple[RefinementPoint, ...] = Field(min_length=1)
    stopped: str

    @computed_field  # type: ignore[prop-decorator]
    @property
    def loss_before(self) -> float:
        """Of the mask that the method left."""
        return self.points[0].loss

    @computed_field  # type: ignore[prop-decorator]
    @property
    def loss_after(self) -> float:
        """Of the refined mask."""
        return self.points[-1].loss

    @computed_field  # type: ignore[prop-decorator]
    @property
    def seconds(self) -> float:
        """From the first loss to the last."""
        return self.points[-1].seconds


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
    """What a job would do and need, from config.json and the safetensors headers alone."""

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
    quality: tuple[Quality, ...]
    latency: Latency | None
    benchmark: Benchmark | None = None
    stages: tuple[StageReport, ...]
    num_zeros_model: int
    warnings: tuple[str, ...] = ()
    resumed: bool = False
    out: str | None = None
    checkpoint_bytes: int | None = None
    packed: Packed | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        """Achieved fraction of zeros among the pruned sites' weights."""
        return _fraction([site for block in self.blocks for site in block.sites])

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity_of_model(self) -> float:
        """Fraction of zeros among all parameters of the model, embeddings and norms included."""
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
        return judge(self.quality)


def judge(quality: tuple[Quality, ...]) -> Verdict:
    """Broken above 2x the dense perplexity (or if it is not finite), degraded above 1.1x, good below."""
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
        remedy = "Lower the sparsity, or use sparsegpt."
        return Verdict(status="broken", text=f"Broken: {change}, more than {BROKEN_RATIO:g}x the dense model's. {remedy}")
    if ratio > DEGRADED_RATIO:
        return Verdict(status="degraded", text=f"Degraded but usable: {change}. Check it on your own task before use.")
    return Verdict(status="good", text=f"Good: {change}.")


def _fraction(sites: tuple[SiteReport, ...] | list[SiteReport]) -> float:
    numel = sum(site.numel for site in sites)
    return sum(site.num_zeros for site in sites) / numel if numel else 0.0
