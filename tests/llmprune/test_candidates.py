"""Candidates on the model: their weights are the method's, their divergence that of whole forwards, and nothing stays."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import llmprune
import tiny
from families import tiny_model
from llmprune.allocation import Sharing, search_chunks
from llmprune.anatomy.blocks import find_stack, probe
from llmprune.engines import evolution
from llmprune.engines.divergence import Divergence
from llmprune.engines.evolution import Shelf, pack_bits, unpack_bits
from llmprune.errors import OutputError
from llmprune.events import Progress
from llmprune.spec import PruneConfig


def _ids() -> Tensor:
    return torch.randint(3, 100, (6, 32), generator=torch.Generator().manual_seed(0))


def _sharing(model: PreTrainedModel, **fields: Any) -> Sharing:
    stack = probe(model, find_stack(model), _ids()[:1])
    fields = {"allocation": "evolution", "sparsity": 0.6, "evolution_generations": 3, "evolution_offspring": 8, **fields}
    return Sharing(model, stack, PruneConfig(**fields), _ids(), 4, torch.device("cpu"))


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _unchanged(model: PreTrainedModel, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def _searching(event: Any) -> bool:
    return isinstance(event, Progress) and event.detail is not None and event.detail.startswith("KL")


@pytest.mark.parametrize("count", [1, 7, 8, 63, 100, 1000])
def test_bits(count: int) -> None:
    """Packed and unpacked a mask is the same, an eighth of a byte each, the first one the lowest."""
    keep = torch.rand(count, generator=torch.Generator().manual_seed(count)) > 0.5
    bits = pack_bits(keep)
    assert bits.dtype == torch.uint8 and len(bits) == -(-count // 8)
    assert torch.equal(unpack_bits(bits, count), keep)
    assert pack_bits(torch.tensor([True, False, True])).tolist() == [5]


@pytest.mark.parametrize("directory", [None, "files"])
def test_a_shelf_gives_back_what_was_put(directory: str | None, tmp_path: Path) -> None:
    """In memory and from a mapped file, whatever the sizes; an empty one too."""
    where = tmp_path if directory else None
    shelf = Shelf("shelf", where)
    dense, bits = torch.randn(3, 5, dtype=torch.float64).half(), torch.arange(7, dtype=torch.uint8)
    shelf.put(0, 0, None, [dense])
    shelf.put(0, 0, 2, [bits, torch.ones(0), dense[0]])
    shelf.close()
    assert torch.equal(shelf.get(0, 0, None)[0].view(torch.float16).view(3, 5), dense)
    first, none, last = shelf.get(0, 0, 2)
    assert torch.equal(first, bits) and not len(none) and torch.equal(last.view(torch.float16), dense[0])
    empty = Shelf("empty", where)
    empty.close()
    assert len(empty.whole) == 0


@pytest.mark.parametrize(
    ("family", "method"), [("llama", "wanda"), ("llama", "sparsegpt"), ("gpt2", "sparsegpt"), ("mixtral", "magnitude")]
)
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_candidate_is_what_a_whole_forward_says(
    family: str, method: str, on_disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its KL is that of a copy of the model with the method's own weights put in one by one; the dense model's is 0."""
    if on_disk:
        monkeypatch.setattr(evolution, "MEMORY_SHARE", 0.0)
    model = tiny_model(family)
    before = _state(model)
    sharing = _sharing(model, method=method)
    checked: list[float] = []
    measure = Divergence.__call__

    @torch.no_grad()
    def check(self: Divergence, candidates: Any, rng: random.Random | None) -> list[float]:
        found = measure(self, candidates, rng)
        if rng is None and len(checked) < 2:
            assert all((shelf.directory is not None) == on_disk for shelf in self.shelves.shelves.values())
            for number, rung in enumerate(candidates[0]):
                self.shelves.hold_(number, rung)
                group = self.shelves.groups[number]
                zeros = sum(int((site.weight_OI == 0).sum()) for site in group.sites)
                wanted = sum(round(t.sparsity * s.numel) for t, s in zip(group.rungs[rung], group.sites, strict=True))
                assert zeros == wanted > 0
            pruned_NSV = F.log_softmax(model(input_ids=_ids(), use_cache=False).logits.float(), dim=-1)
            self.shelves.restore_()
            assert _unchanged(model, before)
            dense_NSV = F.log_softmax(model(input_ids=_ids(), use_cache=False).logits.float(), dim=-1)
            kl = float(F.kl_div(pruned_NSV, dense_NSV, log_target=True, reduction="none").sum(-1).mean())
            assert found[0] == pytest.approx(kl, rel=1e-3, abs=1e-7)
            assert measure(self, [(None,) * len(candidates[0])], None) == pytest.approx([0.0], abs=1e-9)
            checked.append(kl)
        return found

    monkeypatch.setattr(Divergence, "__call__", check)
    assert len(list(sharing.run())) == sharing.num_steps
    assert len(checked) == 2 and checked[0] > 0 and _unchanged(model, before)


def test_candidates_together_are_as_alone() -> None:
    """Shared beginnings and the order of candidates do not change a divergence."""
    model = tiny_model("llama")
    sharing = _sharing(model)
    found: list[bool] = []
    measure = Divergence.__call__

    def check(self: Divergence, candidates: Any, rng: random.Random | None) -> list[float]:
        if rng is not None and len(candidates) > 2:
            together = measure(self, candidates, random.Random(3))
            alone = [measure(self, [one], random.Random(3))[0] for one in reversed(candidates)]
            found.append(together == alone[::-1] and len(set(together)) > 2)
        return measure(self, candidates, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Divergence, "__call__", check)
        list(sharing.run())
    assert found and all(found)


def test_the_search_does_not_end_above_its_start() -> None:
    """The report's curve falls from dp's KL; the same seed finds the same, and steps count up to the last."""
    reports = []
    for _ in range(2):
        model = tiny_model("llama")
        before = _state(model)
        run = _sharing(model, evolution_generations=6).run()
        steps = []
        while True:
            try:
                steps.append(next(run))
            except StopIteration as stop:
                reports.append(stop.value)
                break
        assert [step.done for step in steps] == list(range(1, len(steps) + 1))
        assert {step.total for step in steps} == {len(steps)}
        assert _unchanged(model, before)
    assert reports[0] == reports[1]
    search = reports[0].search
    assert search.kl_end < search.kl_start and search.generations == 6 and search.num_tokens == 192


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_dense_weights_come_back_when_the_search_is_stopped(method: str) -> None:
    """Closed in mid-search by the caller: the model in memory is as it came."""
    model = tiny_model("llama")
    before = _state(model)
    run = _sharing(model, method=method).run()
    assert any(_searching(event) for event in run)
    assert not _unchanged(model, before)
    run.close()
    assert _unchanged(model, before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_dense_weights_come_back_after_an_error(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised while a candidate's weights are in place."""
    model = tiny_model(family)
    before = _state(model)
    measure, calls = Divergence.__call__, []

    def fail(self: Divergence, candidates: Any, rng: random.Random | None) -> list[float]:
        measure(self, candidates, rng)
        calls.append(_unchanged(model, before))
        if len(calls) == 3:
            raise RuntimeError("broken")
        return [1.0] * len(candidates)

    monkeypatch.setattr(Divergence, "__call__", fail)
    with pytest.raises(RuntimeError, match="broken"):
        list(_sharing(model).run())
    assert calls == [False] * 3 and _unchanged(model, before)


def test_a_job_that_is_stopped_leaves_the_model_dense(text_file: Path) -> None:
    """The whole job on a model in memory, closed while the search runs."""
    model = tiny.make_model()
    before = _state(model)
    fields = {"allocation": "evolution", "calibration": str(text_file), "eval": (), **tiny.QUICK}
    run = llmprune.prune_iter(model, tokenizer=tiny.train_tokenizer(), **fields)
    assert any(_searching(event) for event in run)
    run.close()  # type: ignore[attr-defined]
    assert _unchanged(model, before)


def test_no_room_anywhere_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither in memory nor on the disk: refused with the remedy before anything is pruned."""
    monkeypatch.setattr(evolution, "MEMORY_SHARE", 0.0)
    with pytest.raises(OutputError, match="--allocation dp"), evolution.scratch(1 << 62, tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_blocks_that_share_a_parameter() -> None:
    """A weight used by two blocks has the candidate's rung in both."""
    model = tiny_model("llama")
    layers = model.model.layers
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    sharing = _sharing(model)
    before = _state(model)
    checked: list[bool] = []
    measure = Divergence.__call__

    @torch.no_grad()
    def check(self: Divergence, candidates: Any, rng: random.Random | None) -> list[float]:
        found = measure(self, candidates, rng)
        if rng is None:
            for number, rung in enumerate(candidates[-1]):
                self.shelves.hold_(number, rung)
            pruned_NSV = F.log_softmax(model(input_ids=_ids(), use_cache=False).logits.float(), dim=-1)
            self.shelves.restore_()
            dense_NSV = F.log_softmax(model(input_ids=_ids(), use_cache=False).logits.float(), dim=-1)
            kl = float(F.kl_div(pruned_NSV, dense_NSV, log_target=True, reduction="none").sum(-1).mean())
            checked.append(found[-1] == pytest.approx(kl, rel=1e-3))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Divergence, "__call__", check)
        list(sharing.run())
    assert len(checked) > 2 and all(checked) and _unchanged(model, before)


def test_the_tokens_of_a_search() -> None:
    """All sequences up to 8192 tokens, in at most eight parts."""
    assert [len(chunk) for chunk in search_chunks(torch.zeros(16, 128, dtype=torch.long))] == [2] * 8
    assert [len(chunk) for chunk in search_chunks(torch.zeros(11, 32, dtype=torch.long))] == [2, 2, 2, 2, 2, 1]
    assert sum(chunk.numel() for chunk in search_chunks(torch.zeros(128, 256, dtype=torch.long))) == 8192
    assert [chunk.shape for chunk in search_chunks(torch.zeros(2, 9000, dtype=torch.long))] == [(1, 9000)]
