"""What a job reports: :class:`Report` and its parts, the schema of ``report.json``. Torch-free.

Units are in the names (``seconds``, ``bytes``); perplexities are per token and mean nothing without their ``seq_len``;
divergences are in nats per token.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from llmprune.spec import PruneConfig

SCHEMA_VERSION = 1
BROKEN_RATIO = 2.0
DEGRADED_RATIO = 1.1

VerdictStatus = Literal["good", "degraded", "broken", "unmeasured"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class SiteReport(_Part):
    """One pruned weight matrix.

    ``num_tokens`` is how many calibration tokens reached it (for an expert, those routed to it). ``output_error`` is
    ||(W - W') X||_F^2 / ||W X||_F^2 on the calibration inputs, for methods that hold the Gram matrix. ``fallback`` says
    why the site was scored by its weights alone, if it was.
    """

    name: str
    shape: tuple[int, int]
    numel: int
    num_zeros: int
    num_tokens: int = 0
    output_error: float | None = None
    fallback: str | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.num_zeros / self.numel if self.numel else 0.0


class BlockReport(_Part):
    """One decoder block: its sites and the seconds it took."""

    index: int
    name: str
    seconds: float
    sites: tuple[SiteReport, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the weights of the block's pruned sites."""
        return _fraction(self.sites)


class TextReport(_Part):
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


class Quality(_Part):
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


class Speed(_Part):
    """Tokens per second at one batch size: the median of ``repeats`` runs, and their quartiles."""

    phase: Literal["prefill", "decode"]
    batch_size: int
    num_tokens: int
    repeats: int
    tokens_per_second: float
    quartiles: tuple[float, float]


class Latency(_Part):
    """Speed of the dense and the pruned model on the same device, and what to make of it."""

    device: str
    dense: tuple[Speed, ...]
    pruned: tuple[Speed, ...] = ()
    note: str = ""


class ModelReport(_Part):
    """Which model, exactly, and how large."""

    name: str
    revision: str
    model_type: str
    dtype: str
    num_parameters: int
    num_prunable: int
    num_blocks: int
    weights_bytes: int


class StageReport(_Part):
    """Wall time and peak memory of one stage."""

    name: str
    seconds: float
    peak_cpu_bytes: int | None = None
    peak_gpu_bytes: int | None = None


class Environment(_Part):
    """What the numbers were measured with."""

    llmprune: str
    torch: str
    transformers: str
    python: str
    device: str
    num_threads: int


class Evaluation(_Part):
    """What ``llmprune evaluate`` measured of one model, alone or against another."""

    model: str
    against: str | None
    environment: Environment
    quality: tuple[Quality, ...]
    latency: Latency | None = None


class Fetched(_Part):
    """What ``llmprune fetch`` brought to this machine: the model as a job will name it, and the texts, calibration first."""

    model: str
    revision: str
    weights_bytes: int
    texts: tuple[str, ...]


class SiteInfo(_Part):
    """One prunable matrix as ``llmprune inspect`` shows it; sites of one ``input_group`` read the same tensor."""

    name: str
    shape: tuple[int, int]
    input_group: int | None
    num_zeros: int | None


class Inspection(_Part):
    """The anatomy of a model: its blocks, their sites, and what is never pruned."""

    model: ModelReport
    stack: str
    blocks: tuple[tuple[SiteInfo, ...], ...]
    not_pruned: tuple[str, ...]
    tied_embeddings: bool


class StagePlan(_Part):
    """What one stage is expected to need."""

    name: str
    seconds: float
    peak_cpu_bytes: int
    peak_gpu_bytes: int


class Plan(_Part):
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


class Verdict(_Part):
    """A plain sentence on whether the pruned model is still worth having."""

    status: VerdictStatus
    text: str


class Report(_Part):
    """Everything a job asked for, did, lost and gained; the schema of ``report.json``."""

    schema_version: int = SCHEMA_VERSION
    config: PruneConfig
    model: ModelReport
    environment: Environment
    calibration: TextReport | None
    scope: str
    walk: str
    blocks: tuple[BlockReport, ...]
    quality: tuple[Quality, ...]
    latency: Latency | None
    stages: tuple[StageReport, ...]
    num_zeros_model: int
    warnings: tuple[str, ...] = ()
    resumed: bool = False
    out: str | None = None
    checkpoint_bytes: int | None = None

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
