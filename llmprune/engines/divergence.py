"""What a candidate allocation costs on the model: its weights are put in place, block by block, and its divergence measured.

All candidates of a stage travel together, so a block is brought to the device once, and candidates that agree up to a block
share its forwards.

N sequences of S tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.anatomy.blocks import Recording, Stack
from llmprune.devices import free_bytes
from llmprune.engines.draws import Part, draw, narrowed, whole
from llmprune.engines.evolution import Variants
from llmprune.processes import spread

MEMORY_SHARE = 0.5
"""Share of the free memory that the hidden states of candidates may take; beyond it they are measured in turn."""
WORST = 1e9
"""A divergence in place of NaN and inf, in nats."""

Candidate = tuple[int | None, ...]
"""The rung of every group, None where it is dense."""
Logits = Callable[[int, Tensor], Tensor]
"""(number of a chunk, the last block's output [N, S, H]) -> logits [N, S, V]."""
Head = Callable[[], AbstractContextManager[Logits]]
"""Makes the model's head ready to run; open only while no block runs."""


@dataclass
class Divergence:
    """Mean KL(dense || candidate) of candidates over calibration tokens, in fp32; a
    :class:`llmprune.allocate.evolution.Fitness`. Where several processes run, each measures some of the candidates.

    Attributes:
        recording: the search's sequences, a chunk [N, S] a batch.
        head: the model's own, on the last block's outputs.
        hidden_weight: of what is added to the KL: after the first, the middle and the last block the squared error of the
            hidden states over their squared norm, summed (Li et al. 2025, arXiv 2503.09657, eq. 6).
    """

    stack: Stack
    shelves: Variants[Any]
    recording: Recording
    device: torch.device
    head: Head
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        # Candidates are told apart, up to a block, by the rungs of the groups before it.
        self.cuts = [sum(group.block <= index for group in self.shelves.groups) for index in range(len(self.stack.blocks))]
        last = len(self.stack.blocks) - 1
        watched = sorted({0, last // 2, last}) if self.hidden_weight else []
        self.hidden: dict[int, dict[int, Tensor]] = {index: {} for index in watched}
        self.cut: int | None = None
        dense: Candidate = (None,) * len(self.shelves.groups)
        outputs = self._outputs([dense], self._all, lambda at, _key, part, out: self.hidden[at].update({part.chunk: out}))
        self.dense = [outputs[dense, part] for part in self._all]

    @property
    def _all(self) -> list[Part]:
        return [whole(chunk, hidden_NSH) for chunk, hidden_NSH in enumerate(self.recording.hidden)]

    @torch.no_grad()
    def __call__(
        self, candidates: Sequence[Candidate], rng: random.Random | None, num_tokens: int | None = None
    ) -> list[float]:
        """See :class:`llmprune.allocate.evolution.Fitness`; with ``rng`` alone a chunk is drawn."""
        if self.cut is None and num_tokens is not None:
            self.cut = self._probe()
        parts = self._all if rng is None else draw(self.recording.hidden, rng, num_tokens, together=self.cut == 2)
        runs = {part: self._widened(part)[self.cut or 0] for part in parts}
        # The hidden states before and after a block, of as many candidates as fit.
        hidden = self.recording.hidden
        size = sum(run.num_tokens * hidden[run.chunk][0, 0].nbytes for run in set(runs.values()))
        count = max(1, int(MEMORY_SHARE * free_bytes(hidden[0].device) / (2 * size)))

        def work(own: Sequence[Candidate]) -> list[float]:
            groups = (own[start : start + count] for start in range(0, len(own), count))
            return [divergence for group in groups for divergence in self._measure(group, runs)]

        return spread(candidates, work, self.device)

    def _measure(self, candidates: Sequence[Candidate], runs: Mapping[Part, Part]) -> list[float]:
        """Divergences on the parts, of which ``runs`` has what is run for each, itself or more."""
        errors: dict[tuple[int, Candidate], float] = defaultdict(float)

        def watch(index: int, key: Candidate, ran: Part, out_NSH: Tensor) -> None:
            for part, run in runs.items():
                if run == ran:
                    errors[index, key] += _norm(part.of(self.hidden[index][part.chunk]) - part.within(run).of(out_NSH))

        outputs = self._outputs(candidates, list(dict.fromkeys(runs.values())), watch)
        sums = [0.0] * len(candidates)
        with self.head() as logits:
            for part, run in runs.items():
                dense_RLV = self._log_probs(logits, part, run, run.of(self.dense[run.chunk]))
                for number, candidate in enumerate(candidates):
                    other_RLV = self._log_probs(logits, part, run, outputs[candidate, run])
                    kl = F.kl_div(other_RLV, dense_RLV, log_target=True, reduction="none").sum(dtype=torch.float64)
                    sums[number] += _finite(float(kl))
        num_tokens = sum(part.num_tokens for part in runs)
        found = [max(total, 0.0) / num_tokens for total in sums]
        for index, dense in self.hidden.items():
            norm = sum(_norm(part.of(dense[part.chunk])) for part in runs)
            for number, candidate in enumerate(candidates):
                found[number] += self.hidden_weight * _finite(errors[index, self._prefix(candidate, index)] / norm)
        return found

    @staticmethod
    def _log_probs(logits: Logits, part: Part, run: Part, hidden_RLH: Tensor) -> Tensor:
        """Of a part [R, L, V], from what the last block put out where ``run`` was run."""
        return F.log_softmax(part.within(run).of(logits(run.chunk, hidden_RLH)).float(), dim=-1)

    @torch.no_grad()
    def _outputs(
        self, candidates: Sequence[Candidate], parts: Sequence[Part], watch: Callable[[int, Candidate, Part, Tensor], None]
    ) -> dict[tuple[Candidate, Part], Tensor]:
        """The last block's output [R, L, H] of every candidate on every part; ``watch`` is shown what the watched blocks put
        out, once for all candidates that agree up to there.
        """
        hidden, made, stateful = self.recording.hidden, self.recording.calls, self.recording.stateful
        calls = {part: [narrowed(call, part, hidden[part.chunk]) for call in made[part.chunk]] for part in parts}
        # A mutable object that blocks hand on belongs to one candidate alone.
        own = {(one, part): copy.deepcopy(calls[part]) for one in candidates for part in parts} if stateful else {}
        streams: dict[tuple[Candidate, Part], Tensor] = {}
        for index, block in enumerate(self.stack.blocks):
            after: dict[tuple[Candidate, Part], Tensor] = {}
            with self.stack.placed(index, self.device) as device:
                for candidate in self._in_turn(candidates, index):
                    before, key = self._prefix(candidate, index - 1), self._prefix(candidate, index)
                    if (key, parts[0]) in after:
                        continue
                    for number in self.shelves.used_by[index]:
                        self.shelves.hold_(number, candidate[number])
                    for part in parts:
                        hidden_RLH = streams[before, part] if index else part.of(hidden[part.chunk])
                        call = own.get((candidate, part), calls[part])[index]
                        after[key, part] = call.run(block, hidden_RLH.to(device)).to(hidden_RLH.device)
                        if index in self.hidden:
                            watch(index, key, part, after[key, part])
            streams = after
        last = len(self.stack.blocks) - 1
        return {(one, part): streams[self._prefix(one, last), part] for one in candidates for part in parts}

    def _in_turn(self, candidates: Sequence[Candidate], index: int) -> list[Candidate]:
        """Those with the same rungs in a block after one another, so that its weights change as seldom as they can."""
        used = self.shelves.used_by[index]
        return sorted(candidates, key=lambda one: [-1 if one[number] is None else one[number] for number in used])

    def _prefix(self, candidate: Candidate, index: int) -> Candidate:
        """What of a candidate the outputs of a block depend on."""
        return candidate if self.recording.stateful or index < 0 else candidate[: self.cuts[index]]

    def _widened(self, part: Part) -> tuple[Part, Part, Part]:
        """What can be run for a part: itself, its sequences to their ends, its chunk."""
        full = whole(part.chunk, self.recording.hidden[part.chunk])
        return part, Part(part.chunk, part.rows, full.length), full

    def _probe(self) -> int:
        """The first of :meth:`_widened` for which the blocks and the head give what they give for a whole chunk."""
        num_rows, length = self.recording.hidden[0].shape[:2]
        widened, dense = self._widened(Part(0, (num_rows - 1,), max(1, 2 * length // 3))), (None,) * len(self.shelves.groups)
        for cut, part in enumerate(widened[:2]):
            try:
                found = self._outputs([dense], [part], lambda *_: None)[dense, part]
                with self.head() as logits:
                    pairs = [(found, part.of(self.dense[0])), (logits(0, found), part.of(logits(0, self.dense[0])))]
            except (IndexError, RuntimeError, TypeError, ValueError):
                continue
            if all(one.shape == other.shape and _close(one, other) for one, other in pairs):
                return cut
        return 2


def _close(one: Tensor, other: Tensor) -> bool:
    return _norm(one - other) <= torch.finfo(one.dtype).eps * _norm(other)


def _norm(values: Tensor) -> float:
    """The squared Frobenius norm, in fp64."""
    return float(values.float().square().sum(dtype=torch.float64))


def _finite(value: float) -> float:
    """NaN and inf as what no search keeps."""
    return value if math.isfinite(value) else WORST
