"""The layerwise walk: block by block, collect input statistics, prune, propagate the pruned outputs.

Four walks, chosen by ``sequential`` and by what fits in memory:

- one-pass (``group``): a site is pruned at the moment its whole input is there, so ONE forward per block both prunes it and
  gives the next block's inputs; the forward of every batch waits at the site until those of all others have come as far;
- staged (``group``, where there is no room for the activations of all batches at once): one partial forward per group of sites
  that share an input, then one full forward;
- two-pass (``block``): one forward of the dense block, as far as its last site's input, collects everything, a second one
  propagates;
- dense (``none``): one forward of the dense block collects everything and its outputs go on, so that all statistics are those
  of the dense model, and may come from an earlier job: with ``statistics`` of all blocks there is no forward at all.

One-pass and staged prune every site on the same inputs. Several processes walk staged, as each has some of the sequences
(:mod:`llmprune.engines.sharding`). With ``reconstruct`` the dense model's hidden states are carried along,
and the kept weights of each pruned block are tuned to them before its outputs go on. T tokens, I in and O out features.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmprune.anatomy.blocks import Recording, Stack
from llmprune.anatomy.sites import Site, select, write_
from llmprune.anatomy.watch import SharedInputs, Watcher
from llmprune.devices import module_device, return_free_memory
from llmprune.engines.permute import permute_
from llmprune.engines.reconstruct import reconstruct_
from llmprune.engines.sharding import Shares
from llmprune.errors import FactorizationError, NonFiniteError
from llmprune.events import BlockFinished, BlockStarted, Progress, SitePruned, Warned
from llmprune.hidden import HiddenStates
from llmprune.linalg import all_finite, energy
from llmprune.methods import METHODS, get_method
from llmprune.report import BlockReport, Permutation, Reconstruction, SiteReport
from llmprune.spec import Need, PruneConfig, Target
from llmprune.stats import LinearStats, ServingStats
from llmprune.turns import Turns

WalkEvent = BlockStarted | Progress | SitePruned | BlockFinished | Warned

MIN_EXPERT_TOKENS = 16
"""An expert that fewer calibration tokens reached is scored by its weights alone."""


PROGRESS_STEPS = 10
"""Steps of reconstruction between two events of progress."""


class _GroupComplete(Exception):
    """Every input of the open group of sites has passed: the rest of this forward is not needed."""


class Statistics(Protocol):
    """Statistics of the dense model's blocks that outlive the job: :class:`llmprune.io.statistics.Statistics`."""

    def read(self, index: int, device: torch.device) -> dict[str, LinearStats] | None:
        """Those of a block's sites by name; None where there are none."""

    def write(self, index: int, collected: Mapping[str, LinearStats]) -> None:
        """Keep those of a block."""

    def complete(self, start: int = 0) -> bool:
        """Whether those of blocks ``start`` and later are all there."""

    def collected(self, index: int) -> str | None:
        """When those of a block were collected, if they were read."""


@dataclass
class Walk:
    """One walk over a recorded model; pruning is in place.

    Attributes:
        hidden: per batch, the inputs of the next block to prune [N, S, H]; replaced as the walk goes on. A journal
            stores them and puts them back to go on from block ``start``.
        dense: per batch the dense model's hidden states at the same place, to reconstruct to; empty without.
        device: where blocks compute; blocks and hidden states are brought there and taken back.
        targets: what each site is to become by name, from an allocation; the config's own for the others.
        supports: which weights of each site stay, bool [O, I] by name; where there are any, they take the method's place.
        shares: of several processes that walk together what this one does; None where it is alone.
        parts: of several processes that reconstruct, for each batch of all sequences which of this one's batches is its part
            of it, None where it has none.
        pausing: whether there is room for the activations of all batches while they wait at a site.
        needs: the statistics that are collected, the method's own unless more is asked for.
        statistics: where those of the dense model's blocks may be found, and are put; only for a walk that meets dense blocks.
    """

    stack: Stack
    recording: Recording
    config: PruneConfig
    device: torch.device
    targets: Mapping[str, Target] = field(default_factory=dict)
    supports: Mapping[str, Tensor] = field(default_factory=dict)
    shares: Shares | None = None
    parts: Sequence[int | None] | None = None
    pausing: bool = True
    hidden: HiddenStates = field(init=False)
    dense: HiddenStates = field(init=False)

    def __post_init__(self) -> None:
        self.hidden = self.recording.hidden
        self.dense = self.hidden.copy() if self.config.reconstruct else HiddenStates()
        self.method = get_method(self.config.method)
        self.needs = self.method.needs
        self.statistics: Statistics | None = None
        self.target = self.config.target(self.method.scope)
        self.fallback = METHODS["magnitude"]
        self.progress = 1.0  # share of the rounds of a block, the one at work included
        self._shared = shared_sites(self.stack)

    @property
    def kind(self) -> str:
        """Which walk this is: one-pass, staged, two-pass or dense."""
        if self.config.sequential == "none":
            return "dense"
        if self.config.sequential == "block":
            return "two-pass"
        return "one-pass" if self.shares is None and not self.dense and (self.pausing or len(self.hidden) == 1) else "staged"

    def carries(self, index: int) -> bool:
        """Whether ``hidden`` holds what block ``index`` takes in, once those before it are done: not where there is no such
        block, nor where the statistics of this block and of all later ones are known beforehand.
        """
        return index < len(self.stack.blocks) and (self.statistics is None or not self.statistics.complete(index))

    def _to_the_end(self, index: int) -> bool:
        """Whether a block's outputs are wanted: by the next one, or to see that they are finite, which the statistics of its
        inputs tell where there are any.
        """
        return self.carries(index + 1) or self.needs == Need.NOTHING

    @torch.no_grad()
    def run(self, start: int = 0) -> Iterator[WalkEvent]:
        """Prune blocks ``start`` and later.

        Raises:
            NonFiniteError: NaN or inf in a block's output; names the block.
            FactorizationError: names the site.
        """
        num_blocks = len(self.stack.blocks)
        for index in range(start, num_blocks):
            begun = time.perf_counter()
            name, block = self.stack.name(index), self.stack.blocks[index]
            yield BlockStarted(block=index, name=name, num_blocks=num_blocks)
            sites = select(self.stack.sites[index], self.config.skip)
            with self.stack.placed(index, self.device):
                if self.dense:  # before anything changes: a resumed run carries them the same way
                    self._together(partial(self._advance_dense, index, block))
                permutations = self._permute(index, block, sites) if self.config.permute else ()
                reports, reconstruction = yield from self._prune_block(index, block, sites)
                order = {site.name: position for position, site in enumerate(sites)}
                reports.sort(key=lambda report: order[report.name])
                for report in reports:
                    yield SitePruned(block=index, site=report)
                seconds = time.perf_counter() - begun
                summary = BlockReport(
                    index=index, name=name, seconds=seconds, sites=tuple(reports), permutations=permutations,
                    reconstruction=reconstruction,
                    collected=self.statistics.collected(index) if self.statistics else None,
                )  # fmt: skip
                for message in block_messages(summary):
                    yield Warned(message=message)
                yield BlockFinished(block=index, num_blocks=num_blocks, report=summary)  # its weights can still be read

    @torch.no_grad()
    def replay(self, num_blocks: int, *, dense: bool = False) -> None:
        """Carry the hidden states through the first blocks as they are: for blocks pruned in an earlier process.

        With ``dense`` those of the dense model, before the pruned weights are put back.
        """
        for index in range(num_blocks):
            block = self.stack.blocks[index]
            with self.stack.placed(index, self.device):
                if dense:
                    self._advance_dense(index, block)
                else:
                    self.advance(index, block)

    def _prune_block(
        self, index: int, block: nn.Module, sites: Sequence[Site]
    ) -> Generator[Progress, None, tuple[list[SiteReport], Reconstruction | None]]:
        if self.kind == "dense":
            found = self.collect(index, block, {site.name: site for site in sites}, whole=True, keep=True)
            return self._prune_all([(site, found.get(site.name)) for site in sites]), None
        repeated = self.stack.repeated.intersection(site.name for site in sites)
        if self.kind == "one-pass" and not repeated:
            return self._one_pass(index, block, sites), None
        if self.dense and sites:
            reports, reconstruction = yield from self._reconstruct(index, block, sites)
        else:
            reports, reconstruction = self._prune_in_stages(index, block, sites), None
        if self._to_the_end(index):
            self._together(partial(self.advance, index, block))
        return reports, reconstruction

    def _permute(self, index: int, block: nn.Module, sites: Sequence[Site]) -> tuple[Permutation, ...]:
        """Reorder channels of the dense block; its inputs' norms take a forward of their own."""
        every = self.stack.sites[index]
        if self.recording.stateful:  # later blocks may read its keys and values
            return tuple(Permutation(site=site.name, reason="blocks of this model share a mutable state") for site in sites[:1])
        stats = self.collect(index, block, {site.name: site for site in every}, whole=True, needs=Need.NORM)
        patterns = {site.name: self.targets.get(site.name, self.target).pattern for site in sites}
        chosen = [site for site in sites if patterns[site.name].m is not None]  # a mixed job leaves some dense

        def replay() -> Tensor:
            return self.recording.calls[0][index].run(block, self.hidden[0].to(module_device(block)))

        def permute() -> tuple[Permutation, ...]:
            return permute_(
                block, self.stack.name(index), every, chosen, stats, replay, patterns,
                fixed=self.stack.repeated | self._shared, generator=self._generator(f"{self.stack.name(index)} permute"),
            )  # fmt: skip

        return self.shares.first_changes(block, permute) if self.shares else permute()

    def _prune_in_stages(self, index: int, block: nn.Module, sites: Sequence[Site]) -> list[SiteReport]:
        if self.supports:
            return [self._keep_support(site) for site in sites]
        reports = []
        pending = {site.name: site for site in sites}
        while pending:
            collected = self.collect(index, block, pending, whole=self.kind == "two-pass")
            if not collected:
                break
            reports += self._prune_all([(pending.pop(name), stats) for name, stats in collected.items()])
        return reports + self._prune_all([(site, None) for site in pending.values()])

    def _prune_all(self, work: Sequence[tuple[Site, LinearStats | None]]) -> list[SiteReport]:
        if self.shares is None:
            return [self._prune(site, stats) for site, stats in work]
        return self.shares.pruned(work, self._prune)

    def _together(self, work: Callable[[], None]) -> None:
        """Do what another process may fail at: then all fail."""
        if self.shares is None:
            work()
        else:
            self.shares.together(work)

    def _reconstruct(
        self, index: int, block: nn.Module, sites: Sequence[Site]
    ) -> Generator[Progress, None, tuple[list[SiteReport], Reconstruction]]:
        """Prune the block and tune it to the dense model's outputs, in one round or several of rising sparsity.

        Half of the steps are the last round's, the others share the rest. The reports' zeros are counted at the end, for a
        cast can add some; after the first round a site's output error would be that of tuned weights, and is left out.
        """
        name, rounds, steps = self.stack.name(index), self.config.reconstruct_rounds, self.config.reconstruct_steps
        generator = self._generator(f"{name} reconstruct")

        def replay(run: Any, batch: int) -> Tensor:
            return self.recording.calls[batch][index].run(run, self.hidden[batch].to(module_device(block)))

        tuned: list[Reconstruction] = []
        for number in range(1, rounds + 1):
            self.progress = number / rounds
            reports = self._prune_in_stages(index, block, sites)
            share = steps if rounds == 1 else steps // 2 if number == rounds else -(-steps // (2 * (rounds - 1)))
            before = sum(one.steps for one in tuned)
            tuning = reconstruct_(block, sites, replay, self.dense, steps=max(share, 1), lr=self.config.reconstruct_lr,
                                  generator=generator, parts=self.parts, shares=self.shares)  # fmt: skip
            while True:
                try:
                    done = before + next(tuning)
                except StopIteration as stop:
                    tuned.append(stop.value)
                    break
                if done % PROGRESS_STEPS == 0:
                    detail = f"{name}: reconstruction {done}/{steps}"
                    yield Progress(stage="prune", done=index, total=len(self.stack.blocks), detail=detail)
        zeros = {site.name: int((site.stored == 0).sum()) for site in sites}
        unknown = {"output_error": None} if rounds > 1 else {}
        whole = tuned[-1].model_copy(
            update={"rounds": rounds, "steps": sum(one.steps for one in tuned), "seconds": sum(one.seconds for one in tuned)}
        )
        return [report.model_copy(update={"num_zeros": zeros[report.name], **unknown}) for report in reports], whole

    def _one_pass(self, index: int, block: nn.Module, sites: Sequence[Site]) -> list[SiteReport]:
        """Prune every site at the moment its whole input is there: when the forwards of all batches wait at its product.

        Where batches part ways, as tokens do that go to different experts, the sites that are left are pruned in stages.
        """
        pending = {site.name: site for site in sites}
        found: dict[str, LinearStats] = {}
        reports: list[SiteReport] = []
        stream = torch.accelerator.current_stream() if torch.accelerator.is_available() else None

        def prune(name: str) -> None:
            reports.append(self._prune(pending.pop(name), found.pop(name)))
            if not pending and not self._to_the_end(index):
                raise _GroupComplete

        def forward(batch: int, wait: Callable[[str], None]) -> Tensor:
            shared: SharedInputs[LinearStats] = SharedInputs()

            def on_input(site: Site, x_TI: Tensor) -> None:
                if site.name not in pending:
                    return
                stats, own = shared.get(x_TI), found.get(site.name)
                if stats is None or (own is not None and own is not stats):
                    stats = own or LinearStats(site.shape[1], self.needs, x_TI.device)
                    stats.update(x_TI)
                    shared.put(x_TI, stats)
                found[site.name] = stats
                wait(site.name)

            if stream is not None:  # a thread begins with the default one
                torch.accelerator.set_stream(stream)
            with torch.no_grad(), Watcher(sites, on_input):
                return self._forward(index, block, batch)

        try:
            if len(self.hidden) == 1:
                outputs = [forward(0, prune)]
            else:
                with Turns([partial(forward, batch) for batch in range(len(self.hidden))]) as turns:
                    while len(waiting := set(turns.go_on())) == 1 and (name := waiting.pop()) is not None:
                        return_free_memory(collect=False)  # the C allocator keeps what a thread freed for that thread
                        prune(name)
                    outputs = [] if waiting else [turns.take(batch) for batch in range(len(self.hidden))]
        except _GroupComplete:
            return reports
        parted = not outputs
        if parted:
            reports += self._prune_in_stages(index, block, list(pending.values()))
            if not self._to_the_end(index):
                return reports
        else:
            reports += [self._prune(site, None) for site in pending.values()]
        if parted or any(site.expert is None for site in pending.values()):  # or used in a way that was not seen
            self.advance(index, block)
            return reports
        for batch in range(len(outputs)):
            self._keep(index, batch, outputs.pop(0))
        return reports

    def collect(
        self,
        index: int,
        block: nn.Module,
        pending: Mapping[str, Site],
        *,
        whole: bool,
        keep: bool = False,
        needs: Need | None = None,
    ) -> dict[str, LinearStats]:
        """Statistics of all pending sites (``whole``), or of the first group of them that shares an input; of several processes
        those of all together.

        Experts of one parameter form one group: none of their inputs depends on another's output. With ``keep`` (and
        ``whole``) the same forward gives the next block's inputs: those of the block as it is now; where ``statistics`` has
        those of this block and of all later ones, there is no forward, and the hidden states stay. ``needs`` are the
        statistics, by default those of the walk.
        """
        needs = self.needs if needs is None else needs
        kept = self.statistics if keep else None
        if kept is not None and (found := kept.read(index, module_device(block))) is not None:
            if self.carries(index + 1):
                self._together(partial(self.advance, index, block))
            return found
        kind = ServingStats if kept is not None else LinearStats
        collect = partial(self._collect, index, block, keep=keep, needs=needs, kind=kind)
        if self.shares is None:
            collected = collect(pending, whole)
        else:
            collected = self.shares.merged(pending, collect, whole=whole, need=needs, kind=kind)
        if kept is not None:
            kept.write(index, collected)
        return collected

    def _collect(
        self,
        index: int,
        block: nn.Module,
        pending: Mapping[str, Site],
        whole: bool,
        *,
        keep: bool,
        needs: Need,
        kind: type[LinearStats],
    ) -> dict[str, LinearStats]:
        """:meth:`collect` on the hidden states of this process."""
        collected: dict[str, LinearStats] = {}
        group: set[int] = set()  # ids of the statistics of the open group
        parameters: set[tuple[int, str]] = set()  # expert parameters of the open group
        keep = keep and self._to_the_end(index)
        unseen: set[str] = set()  # pending sites whose input this batch has not shown yet
        shared: SharedInputs[LinearStats] = SharedInputs()

        def on_input(site: Site, x_TI: Tensor) -> None:
            if site.name not in pending:
                return
            key = (id(site.module), site.parameter)
            stats = shared.get(x_TI)
            own = collected.get(site.name)
            in_group = whole or not group or own is not None or id(stats) in group or key in parameters
            if not in_group:
                if parameters:
                    return  # a later expert of this group may still come
                raise _GroupComplete
            if stats is None or (own is not None and own is not stats):
                stats = own or kind(site.shape[1], needs, x_TI.device)
                stats.update(x_TI)
                shared.put(x_TI, stats)
            collected[site.name] = stats
            group.add(id(stats))
            if site.expert is not None:
                parameters.add(key)
            unseen.discard(site.name)
            if may_stop and not unseen:
                raise _GroupComplete

        # Nobody reads what comes after the last site's input, such as its own product; a site used again is not seen before.
        may_stop = whole and not keep and not self.recording.stateful and not self.stack.repeated.intersection(pending)
        for batch in range(len(self.hidden)):
            shared, unseen = SharedInputs(), set(pending)
            with Watcher(pending.values(), on_input):
                try:
                    output_NSH = self._forward(index, block, batch)
                except _GroupComplete:
                    continue
                if keep:
                    self._keep(index, batch, output_NSH)
        return collected

    def advance(self, index: int, block: nn.Module) -> None:
        """Carry the hidden states through a block."""
        for batch in range(len(self.hidden)):
            self._keep(index, batch, self._forward(index, block, batch))

    def _advance_dense(self, index: int, block: nn.Module) -> None:
        """Carry the dense model's hidden states through a block that is still dense.

        Where blocks share a mutable object, it holds what pruned blocks put there: then the target is the dense block's output
        on the pruned model's inputs, as it cannot be that of the dense model.
        """
        inputs = self.hidden if self.recording.stateful else self.dense
        for batch, hidden_NSH in enumerate(inputs):
            output_NSH = self.recording.calls[batch][index].run(block, hidden_NSH.to(module_device(block)))
            self.dense[batch] = output_NSH

    def _generator(self, name: str) -> torch.Generator:
        # The CPU generator keeps 32 bits of its seed: a hash of both, and the same whatever was pruned before.
        return torch.Generator().manual_seed(zlib.crc32(f"{self.config.seed} {name}".encode()))

    def _forward(self, index: int, block: nn.Module, batch: int) -> Tensor:
        hidden_NSH = self.hidden[batch].to(module_device(block))
        return self.recording.calls[batch][index].run(block, hidden_NSH)

    def _keep(self, index: int, batch: int, output_NSH: Tensor) -> None:
        """Replace a batch's hidden states by what the block put out."""
        if not all_finite(output_NSH):
            after = "" if self.kind == "dense" else " after pruning"
            raise NonFiniteError(
                f"{self.stack.name(index)} puts out NaN or inf{after}. Use --dtype float32, lower the sparsity, "
                "or check that the dense model evaluates to a finite perplexity."
            )
        self.hidden[batch] = output_NSH

    def solve(self, site: Site, stats: LinearStats | None, target: Target) -> tuple[Tensor, LinearStats, bool]:
        """The site's pruned weight [O, I], the statistics it was pruned by, and whether by its weights alone: so where no
        token, or of an expert's hardly any, was seen. The model is not changed.
        """
        starved = stats is None or (site.expert is not None and stats.num_tokens < MIN_EXPERT_TOKENS)
        method = self.fallback if starved else self.method
        if stats is None or method is self.fallback:
            stats = LinearStats(site.shape[1], Need.NOTHING, site.stored.device)
        elif not all_finite(stats.sq_I):
            raise NonFiniteError(f"the calibration activations of {site.name} overflow fp32. Use --dtype float32 or bfloat16.")
        generator = self._generator(site.name)
        target = target.eased(self.progress)
        try:
            pruned_OI = method.prune(site.weight_OI, stats, target, damping=self.config.damping, generator=generator)
        except FactorizationError as error:
            raise FactorizationError(f"{site.name}: {error} Raise --damping, or use --dtype float32.") from None
        return pruned_OI, stats, method is not self.method

    def _prune(self, site: Site, stats: LinearStats | None) -> SiteReport:
        """Prune one site in place; without usable statistics by its weights alone."""
        num_tokens = stats.num_tokens if stats else 0
        target = self.targets.get(site.name, self.target)
        pruned_OI, stats, fell_back = self.solve(site, stats, target)
        output_error = relative_output_error(site.weight_OI, pruned_OI, stats)
        num_zeros = write_(site, pruned_OI)
        fallback = None
        if fell_back and self.method.needs > Need.NOTHING:
            fallback = f"scored by magnitude: {num_tokens} calibration tokens reached it"
        elif (used := stats.damping_used) and used > self.config.damping:
            fallback = f"damping raised to {used:g}"
        return SiteReport(
            name=site.name, shape=site.shape, numel=site.numel, num_zeros=num_zeros, num_tokens=num_tokens,
            output_error=output_error, fallback=fallback, target=target.sparsity, pattern=target.name,
        )  # fmt: skip

    def _keep_support(self, site: Site) -> SiteReport:
        keep_OI = self.supports[site.name].to(site.stored.device)
        num_zeros = write_(site, site.weight_OI.where(keep_OI, 0))
        return SiteReport(name=site.name, shape=site.shape, numel=site.numel, num_zeros=num_zeros)


def shared_sites(stack: Stack) -> frozenset[str]:
    """Names of the sites whose parameter another block uses too."""
    owners = Counter(id(parameter) for block in stack.blocks for parameter in block.parameters())
    return frozenset(
        site.name for sites in stack.sites for site in sites if owners[id(getattr(site.module, site.parameter))] > 1
    )


def relative_output_error(dense_OI: Tensor, pruned_OI: Tensor, stats: LinearStats) -> float | None:
    """||(W - W') X||_F^2 / ||W X||_F^2 = tr(D G D^T) / tr(W G W^T); None without the Gram matrix."""
    if stats.gram_II is None:
        return None
    dense_OI = dense_OI.float()
    whole = energy(dense_OI, stats.gram_II)
    lost = energy(dense_OI - pruned_OI.float(), stats.gram_II)
    return float(lost / whole) if whole > 0 else 0.0


def block_messages(report: BlockReport) -> list[str]:
    """What a user should know of one block: sites that fell back, a reconstruction that was undone."""
    messages = fallback_messages(report.sites)
    if report.reconstruction and report.reconstruction.rolled_back:
        messages.append(
            f"{report.name}: reconstruction did not lower the held-out error in {report.reconstruction.steps} steps and was "
            "rolled back. Use more calibration samples (--num-samples) or a lower --reconstruct-lr."
        )
    return messages


def fallback_messages(reports: Sequence[SiteReport]) -> list[str]:
    """One line for each site that fell back, the first eight by name."""
    fallen = [report for report in reports if report.fallback]
    messages = [f"{report.name}: {report.fallback}." for report in fallen[:8]]
    if len(fallen) > 8:
        messages.append(f"{len(fallen) - 8} more sites of this block fell back; the report names them.")
    return messages
