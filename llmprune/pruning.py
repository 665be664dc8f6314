"""What was done to the weights: the parts of the report on sites, blocks, allocation and refinement. Torch-free."""

from __future__ import annotations

from pydantic import Field, computed_field

from llmprune.speed import Part

MAX_POINTS = 500
"""Points of a course over time; a longer one is thinned out."""


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
    """One decoder block: its sites and the seconds it took, with ``permutations`` and ``reconstruction`` if there were any.

    ``collected`` is when the statistics it was pruned on were collected (UTC), where they came out of the cache.
    """

    index: int
    name: str
    seconds: float
    sites: tuple[SiteReport, ...]
    permutations: tuple[Permutation, ...] = ()
    reconstruction: Reconstruction | None = None
    collected: str | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the weights of the block's pruned sites."""
        return fraction_of_zeros(self.sites)


class StatisticsReport(Part):
    """How many of the blocks that a stage collects statistics of it found in the cache, and when the oldest of them were
    collected (UTC); None where none were found.
    """

    stage: str
    num_blocks: int
    num_reused: int
    collected: str | None = None


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


def fraction_of_zeros(sites: tuple[SiteReport, ...] | list[SiteReport]) -> float:
    """Of all weights of these sites."""
    numel = sum(site.numel for site in sites)
    return sum(site.num_zeros for site in sites) / numel if numel else 0.0
