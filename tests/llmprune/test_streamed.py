"""Scoring block by block gives the numbers of whole forwards, whatever holds the hidden states."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import llmprune
import tiny
from families import tiny_model
from llmprune import evaluation
from llmprune import scoring as scoring_module
from llmprune.anatomy.blocks import Stack, find_stack, probe
from llmprune.evaluation import evaluate_iter
from llmprune.events import Warned
from llmprune.measure import quality, streamed
from llmprune.measure.quality import Keep, Scores, replay_head, score_text
from llmprune.measure.streamed import ends_placed, score_streamed

CPU = torch.device("cpu")
# Beside plain ones: tied embeddings, soft-caps, scaled embeddings and logits, blocks that hand on an object, a residual
# stream of several copies, no attention, experts, positions by ALiBi.
FAMILIES = [
    "llama", "qwen2", "gemma2", "gemma3_text", "cohere", "granite", "minicpm3", "gemma3n_text", "gemma4_text", "mamba",
    "mixtral", "bloom", "opt", "gpt2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three windows a batch, the last one smaller."""
    monkeypatch.setattr(quality, "windows_per_batch", lambda *_: 3)


def _ids(num_windows: int = 8, seq_len: int = 16) -> Tensor:
    return torch.randint(3, 100, (num_windows, seq_len), generator=torch.Generator().manual_seed(0))


def _probed(model: PreTrainedModel) -> Stack:
    return probe(model, find_stack(model), _ids(1))


def _result(scoring: Generator[int, None, Scores]) -> tuple[list[int], tuple[float | None, ...]]:
    """The steps shown, and the scores less their seconds."""
    steps = []
    while True:
        try:
            steps.append(next(scoring))
        except StopIteration as stop:
            scores: Scores = stop.value
            return steps, (scores.perplexity, scores.kl, scores.top1_agreement)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_in_turn_give_the_scores_of_whole_forwards(family: str, tmp_path: Path) -> None:
    """Perplexity, divergence, agreement and the head inputs that are kept are equal bit for bit; memory-mapped too."""
    model, ids_NS = tiny_model(family), _ids()
    stack = _probed(model)
    whole: Keep = []
    kept: Keep = []
    assert _result(score_streamed(model, stack, ids_NS, CPU, keep=kept))[1] == _result(score_text(model, ids_NS, keep=whole))[1]
    assert len(kept) == len(whole) == 3
    assert all(torch.equal(one, other) for one, other in zip(kept, whole, strict=True))
    with torch.no_grad():
        for site in stack.sites[0]:
            site.stored.mul_(site.stored.abs() > site.stored.abs().median())

    def dense(number: int, batch_NS: Tensor) -> Tensor:
        return replay_head(model, stack, batch_NS, kept[number])

    expected = _result(score_text(model, ids_NS, dense=dense))[1]
    assert expected[1] and expected[1] > 0  # something was pruned
    assert _result(score_streamed(model, stack, ids_NS, CPU, dense=dense, offload="disk", folder=tmp_path))[1] == expected
    assert not list(tmp_path.iterdir())


def test_progress_counts_windows_and_ends_at_all_of_them() -> None:
    """The bar rises by block and batch, never falls, and is full at the end."""
    model = tiny.make_model(num_hidden_layers=5)
    steps, _ = _result(score_streamed(model, _probed(model), _ids(), CPU))
    assert steps == sorted(set(steps))
    assert steps == list(range(1, 9))


def test_every_block_is_placed_once_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches there are; and the last block has gone when the head comes."""
    model = tiny_model("llama")
    held: list[int] = []
    open_: list[int] = []

    class Watched(Stack):
        @contextlib.contextmanager
        def placed(self, index: int, device: torch.device) -> Iterator[torch.device]:
            held.append(index)
            open_.append(index)
            yield device
            open_.remove(index)

    stack = _probed(model)
    watched = Watched(stack.path, stack.blocks, stack.rests, stack.sites, stack.repeated)
    model.lm_head.register_forward_hook(lambda *_: [][0] if open_ else None)
    _result(score_streamed(model, watched, _ids(), CPU))
    assert held == [0, 1]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma3n_text"])
def test_ends_move_and_blocks_stay(family: str) -> None:
    """Embeddings, norm and head, tied or not, are brought over while the blocks stay behind; afterwards all is as it was."""
    model = tiny_model(family)
    stack = _probed(model)
    blocks = {id(tensor) for block in stack.blocks for tensor in (*block.parameters(), *block.buffers())}
    moves: list[str] = []

    def move_(tensors: list[Tensor], device: torch.device) -> None:
        ends = {id(tensor) for tensor in (*model.parameters(), *model.buffers())} - blocks
        assert sorted(map(id, tensors)) == sorted(ends)
        moves.append(device.type)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "move_", move_)
        with ends_placed(model, stack, torch.device("meta")) as where:
            assert where.type == "meta"
    assert moves == ["meta", "cpu"]
    with ends_placed(model, stack, CPU) as where:
        assert where == CPU


def test_a_job_scores_a_model_that_does_not_fit_block_by_block(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same report but for the speed, which is not measured, with a warning that says why."""
    how = {**tiny.QUICK, "calibration": str(text_file), "eval": (str(text_file),)}
    plain = llmprune.prune(tiny_model_dir, out=tmp_path / "plain", **how)
    monkeypatch.setattr(scoring_module, "is_streamed", lambda *_: True)
    report = llmprune.prune(tiny_model_dir, out=tmp_path / "streamed", **(how | {"latency": True}))
    assert [item.perplexity_pruned for item in report.quality] == [item.perplexity_pruned for item in plain.quality]
    assert [item.kl for item in report.quality] == [item.kl for item in plain.quality]
    assert report.latency is None and report.warnings.count(streamed.NO_SPEED) == 1


def test_evaluation_of_models_that_do_not_fit(tiny_model_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models block by block: the numbers of whole forwards, and a warning in place of the speed."""
    how = {"eval": (str(text_file),), "seq_len": 32, "max_eval_tokens": 512, "device": "cpu", "against": tiny_model_dir}
    plain = list(evaluate_iter(tiny_model_dir, latency=False, **how))[-1].evaluation
    monkeypatch.setattr(evaluation, "fits", lambda *_: False)
    *events, last = evaluate_iter(tiny_model_dir, **how)
    for one, other in zip(plain.quality, last.evaluation.quality, strict=True):
        assert (one.perplexity_pruned, one.perplexity_dense, one.kl) == (
            other.perplexity_pruned,
            other.perplexity_dense,
            other.kl,
        )
    assert [event.message for event in events if isinstance(event, Warned)] == [streamed.NO_SPEED]
    assert last.evaluation.latency is None
