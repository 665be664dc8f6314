"""The divergence of candidates: closed forms, whole forwards, drawn tokens, memory, and several processes, all the same."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import tiny_model
from forked import PROCESSES
from llmprune.anatomy.blocks import Call, Recording, Stack, find_stack, probe, record
from llmprune.anatomy.sites import Site
from llmprune.engines import divergence as divergence_module
from llmprune.engines.divergence import Candidate, Divergence, Head, Logits
from llmprune.engines.draws import Part, draw, whole
from llmprune.engines.evolution import Shelf, Variants
from llmprune.hidden import HiddenStates
from llmprune.measure.quality import replay_tail

CPU = torch.device("cpu")
RUNGS = (1.0, 0.7, 0.4)


@dataclass(frozen=True)
class Bundle:
    """Matrices of one block that are scaled together."""

    block: int
    sites: tuple[Site, ...]


class Scaled(Variants[Bundle]):
    """Rung r of a group: its weights times the r-th of some factors."""

    def fill(self, factors: Sequence[float] = RUNGS) -> Scaled:
        for index in range(len(self.stack.blocks)):
            self.shelves[index] = shelf = Shelf(f"block{index}", None)
            for number, group in enumerate(self.groups):
                for member, site in enumerate(group.sites if group.block == index else ()):
                    shelf.put(number, member, None, [site.weight_OI])
                    for rung, factor in enumerate(factors):
                        shelf.put(number, member, rung, [site.weight_OI * factor])
            shelf.close()
        return self

    def decode(self, number: int, member: int, found: Sequence[Tensor]) -> Tensor:
        site = self.groups[number].sites[member]
        return found[0].view(site.stored.dtype).view(site.shape)


class Case:
    """A tiny model, two groups a block, and sequences of it in chunks of three, three and one."""

    def __init__(self, family: str = "llama", factors: Sequence[float] = RUNGS) -> None:
        self.model: PreTrainedModel = tiny_model(family)
        ids_NS = torch.randint(3, 100, (7, 24), generator=torch.Generator().manual_seed(0))
        self.chunks = ids_NS.split(3)
        self.stack = probe(self.model, find_stack(self.model), ids_NS[:1])
        bundles = [Bundle(index, sites[part::2]) for index, sites in enumerate(self.stack.sites) for part in (0, 1)]
        self.variants = Scaled(self.stack, bundles).fill(factors)
        self.recording = record(self.model, self.stack, self.chunks)

    def measure(self, **fields: Any) -> Divergence:
        @contextmanager
        def head() -> Iterator[Logits]:
            yield lambda chunk, hidden_NSH: replay_tail(self.model, self.stack, self.chunks[chunk], hidden_NSH)

        return Divergence(self.stack, self.variants, self.recording, CPU, head, **fields)

    @torch.no_grad()
    def forward(self, candidate: Candidate) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Log-probabilities of every chunk, and what every block puts out, by forwards of the whole model."""
        for number, rung in enumerate(candidate):
            self.variants.hold_(number, rung)
        hidden: list[list[Tensor]] = [[] for _ in self.stack.blocks]

        def keep(number: int, output: Any) -> None:
            hidden[number].append(output if isinstance(output, Tensor) else output[0])

        hooks = [
            block.register_forward_hook(lambda _module, _args, output, number=number: keep(number, output))
            for number, block in enumerate(self.stack.blocks)
        ]
        logits = [self.model(input_ids=ids_NS, use_cache=False).logits.float() for ids_NS in self.chunks]
        for hook in hooks:
            hook.remove()
        self.variants.restore_()
        return [F.log_softmax(chunk_NSV, dim=-1) for chunk_NSV in logits], hidden


def _candidates(case: Case) -> list[Candidate]:
    count = len(case.variants.groups)
    return [(0,) * count, (1,) * count, (2,) + (0,) * (count - 1), (None,) * (count - 1) + (2,), (None, 1) * (count // 2)]


def _distribution(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("dense_V", "other_V", "wanted"),
    [
        (_distribution(0.5, 0.3, 0.2), _distribution(0.4, 0.4, 0.2), 0.0252672),
        (_distribution(0.4, 0.4, 0.2), _distribution(0.5, 0.3, 0.2), 0.4 * math.log(0.8) + 0.4 * math.log(4 / 3)),
        (_distribution(0.5, 0.3, 0.2), _distribution(0.5, 0.3, 0.2), 0.0),
        (_distribution(0.5, 0.3, 0.2), _distribution(0.5, 0.3, 0.2) + 3, 0.0),
        (_distribution(0.5, 0.3, 0.2), torch.full((3,), torch.nan), divergence_module.WORST),
    ],
)
def test_closed_forms(dense_V: Tensor, other_V: Tensor, wanted: float) -> None:
    """KL(dense || candidate) of two distributions: its direction, a constant added to logits; NaN is the worst."""
    block = nn.Linear(1, 3, bias=False)
    block.weight.data = dense_V.float()[:, None]
    site = Site("block", block, "weight")
    stack = Stack("blocks", (block,), (None,), ((site,),))
    variants = Scaled(stack, [Bundle(0, (site,))])
    variants.shelves[0] = Shelf("block", None)
    variants.shelves[0].put(0, 0, None, [block.weight])
    variants.shelves[0].put(0, 0, 0, [other_V.float()])
    variants.shelves[0].close()
    recording = Recording(HiddenStates([torch.ones(1, 4, 1)]), [[Call((), {}, None)]])
    head: Head = lambda: nullcontext(lambda _chunk, hidden_NSH: hidden_NSH)
    measure = Divergence(stack, variants, recording, CPU, head)
    found, dense = measure([(0,), (None,)], None)
    assert dense == 0
    assert found == (pytest.approx(wanted, abs=2e-7) if wanted < 1 else wanted / 4)


def test_a_draw_is_of_whole_sequences_but_one() -> None:
    """Exactly as many tokens as asked, no sequence twice, another seed others; all there are where more are asked."""
    hidden = [torch.zeros(3, 10, 2), torch.zeros(3, 10, 2), torch.zeros(1, 7, 2)]
    seen = set()
    for seed in range(20):
        for asked in (1, 9, 10, 25, 34, 66, 67, 1000):
            parts = draw(hidden, random.Random(seed), asked)
            assert parts == draw(hidden, random.Random(seed), asked)
            assert sum(part.num_tokens for part in parts) == min(asked, 67)
            rows = [(part.chunk, row) for part in parts for row in part.rows]
            assert len(rows) == len(set(rows))
            assert sum(part.length < hidden[part.chunk].shape[1] for part in parts) <= 1
            seen.add(tuple(rows))
    assert len(seen) > 40
    assert draw(hidden, random.Random(0), None) == [whole(1, hidden[1])]
    together = [draw(hidden[:2], random.Random(seed), 30, together=True) for seed in range(20)]
    assert {tuple(parts) for parts in together} == {(whole(0, hidden[0]),), (whole(1, hidden[1]),)}
    few = {part.rows for seed in range(20) for part in draw(hidden[:2], random.Random(seed), 20, together=True)}
    assert few == {(0, 1), (0, 2), (1, 2)}
    assert Part(0, (2, 0), 4).of(torch.arange(30).view(3, 10, 1)).flatten().tolist() == [20, 21, 22, 23, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("family", "forced", "cut"),
    [
        ("llama", None, 0),
        ("mixtral", None, 0),
        ("gemma3_text", None, 0),
        ("gpt2", None, 1),
        ("bloom", None, 2),
        ("llama", 2, 2),
    ],
)
def test_drawn_tokens_are_measured_as_in_whole_forwards(family: str, forced: int | None, cut: int) -> None:
    """Mean KL of the drawn tokens alone, and relative errors of the hidden states there, with blocks run on these tokens, their
    sequences or their chunks, as the family allows; candidates may leave groups dense.
    """
    case = Case(family)
    candidates = _candidates(case)
    measure = case.measure(hidden_weight=0.5)
    measure.cut = forced
    found = measure(candidates, random.Random(11), 70)
    assert measure.cut == cut
    parts = draw(case.recording.hidden, random.Random(11), 70, together=cut == 2)
    assert any(len(part.rows) > 1 for part in parts)
    assert cut == 2 or any(part.length < 24 and 0 not in part.rows for part in parts)
    dense, dense_hidden = case.forward((None,) * 4)
    for candidate, divergence in zip(candidates, found, strict=True):
        log_probs, hidden = case.forward(candidate)
        kl = 0.0
        for part in parts:
            kl_NSV = F.kl_div(log_probs[part.chunk], dense[part.chunk], log_target=True, reduction="none")
            kl += float(kl_NSV[list(part.rows), : part.length].sum()) / 70
        errors = [
            sum(float((part.of(ours[part.chunk]) - part.of(theirs[part.chunk])).square().sum()) for part in parts)
            / sum(float(part.of(theirs[part.chunk]).square().sum()) for part in parts)
            for ours, theirs in zip(hidden, dense_hidden, strict=True)
        ]
        assert divergence == pytest.approx(kl + 0.5 * sum(errors), rel=1e-3, abs=1e-6)
    assert found[1] > 1e-3 > found[0]


def test_hidden_states_are_compared_after_three_blocks() -> None:
    """The weight is a factor; without it nothing is kept, and the KL is what it is."""
    case = Case()
    candidates = _candidates(case)
    plain, one, two = (case.measure(hidden_weight=weight) for weight in (0.0, 1.0, 2.0))
    assert not plain.hidden and sorted(one.hidden) == [0, 1]
    kl, once, twice = (measure(candidates, None) for measure in (plain, one, two))
    halves = [(first + second) / 2 for first, second in zip(kl, twice, strict=True)]
    assert once == pytest.approx(halves)
    assert once[1] > kl[1] and once[0] == kl[0] == 0


@pytest.mark.parametrize("num_tokens", [None, 50])
def test_little_memory_changes_nothing(num_tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One candidate after another where the hidden states of two do not fit."""
    case = Case()
    candidates = _candidates(case)
    measure = case.measure(hidden_weight=0.3)
    together = measure(candidates, random.Random(1), num_tokens)
    groups: list[int] = []
    inner = Divergence._measure
    monkeypatch.setattr(Divergence, "_measure", lambda self, own, runs: (groups.append(len(own)), inner(self, own, runs))[1])
    for free, sizes in ((0, [1] * 5), (1 << 40, [5])):
        monkeypatch.setattr(divergence_module, "free_bytes", lambda _device, free=free: free)
        groups.clear()
        assert measure(candidates, random.Random(1), num_tokens) == together and groups == sizes
    assert len(set(together)) == 5


def test_a_candidate_that_overflows_loses() -> None:
    """Weights of NaN: worse than any other, in both terms."""
    case = Case(factors=(1.0, 0.5, math.nan))
    found = case.measure(hidden_weight=1.0)([(0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 0, 0)], None)
    assert found[0] < found[1] < 100 < 1e5 < found[2] < math.inf


def _one_of_several(rank: int, size: int, store: str, send: Any) -> None:
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in names.items()}, GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    send.send(_measured())
    torch.distributed.destroy_process_group()


def _measured() -> tuple[list[list[float]], int]:
    case, measured = Case(), []
    inner = Divergence._measure

    def count(self: Divergence, own: Sequence[Candidate], runs: Any) -> list[float]:
        measured.extend(own)
        return inner(self, own, runs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Divergence, "_measure", count)
        measure, rng = case.measure(), random.Random(7)
        draws = [None, rng, rng]
        found = [measure(_candidates(case)[:4], own, tokens) for own, tokens in zip(draws, (None, None, 40), strict=True)]
        return [*found, measure(_candidates(case)[:1], None)], len(measured)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_candidates(size: int, tmp_path: Path) -> None:
    """Each measures some of them, and each gets what one process gets for all, on the same draws; one candidate is one's."""
    pipes = [PROCESSES.Pipe(duplex=False) for _ in range(size)]
    started = [
        PROCESSES.Process(target=_one_of_several, args=(rank, size, str(tmp_path / "store"), pipes[rank][1]), daemon=True)
        for rank in range(size)
    ]
    for process in started:
        process.start()
    try:
        alone, count = _measured()
        assert count == 13
        found = []
        for receive, _ in pipes:
            assert receive.poll(200)
            found.append(receive.recv())
        assert [divergences for divergences, _ in found] == [alone] * size
        assert [own for _, own in found] == ([7, 6] if size == 2 else [7, 3, 3])
    finally:
        for process in started:
            process.join(10)
            process.kill()
