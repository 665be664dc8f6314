"""Perplexity and divergence against literal fp64 computations; the head's replay is bit-exact."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from families import tiny_model
from llmprune.anatomy.blocks import find_stack, probe
from llmprune.measure.latency import measure_speed
from llmprune.measure.quality import Scores, head_inputs, replay_head, score_text


def _ids(num_windows: int = 20, seq_len: int = 24) -> Tensor:
    return torch.randint(3, 100, (num_windows, seq_len), generator=torch.Generator().manual_seed(0))


def _score(model: PreTrainedModel, ids_NS: Tensor, **options: Any) -> Scores:
    scoring = score_text(model, ids_NS, **options)
    while True:
        try:
            next(scoring)
        except StopIteration as stop:
            return stop.value


@torch.no_grad()
def _log_probs64(model: PreTrainedModel, ids_NS: Tensor) -> Tensor:
    return F.log_softmax(model(input_ids=ids_NS, use_cache=False).logits.double(), dim=-1)[:, :-1]


def test_perplexity_is_the_gptq_protocol() -> None:
    """exp of the sum over windows of mean loss times seq_len, over windows times seq_len, in fp64 by hand."""
    model, ids_NS = tiny_model("llama"), _ids()
    total = 0.0
    for window_S in ids_NS:
        log_probs_SV = _log_probs64(model, window_S[None])[0]
        loss = -log_probs_SV[torch.arange(len(window_S) - 1), window_S[1:]].mean()
        total += float(loss) * len(window_S)
    expected = math.exp(total / ids_NS.numel())
    assert _score(model, ids_NS).perplexity == pytest.approx(expected, rel=1e-6)


def test_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    """Zero logits everywhere: perplexity is the number of tokens."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert _score(model, _ids()).perplexity == pytest.approx(model.config.vocab_size, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "mixtral", "gpt2", "opt", "bloom", "mamba"])
@torch.no_grad()
def test_replayed_head_gives_the_very_same_logits(family: str) -> None:
    """Stored head inputs through stubbed blocks give the dense logits bit for bit, soft-caps and scales included."""
    model, ids_NS = tiny_model(family), _ids(3)
    stack = probe(model, find_stack(model), ids_NS[:1])
    with head_inputs(model) as captured:
        dense = model(input_ids=ids_NS, use_cache=False).logits
    assert torch.equal(replay_head(model, stack, ids_NS, captured[0]), dense)
    assert torch.equal(model(input_ids=ids_NS, use_cache=False).logits, dense)


def test_identical_models_do_not_diverge() -> None:
    """KL exactly 0 and agreement exactly 1 of a model with itself."""
    model, ids_NS = tiny_model("llama"), _ids()
    stack = probe(model, find_stack(model), ids_NS[:1])
    keep: list[Tensor] = []
    alone = _score(model, ids_NS, keep=keep)
    scores = _score(model, ids_NS, dense=lambda number, ids: replay_head(model, stack, ids, keep[number]))
    assert (scores.kl, scores.top1_agreement, scores.perplexity) == (0.0, 1.0, alone.perplexity)


@torch.no_grad()
def test_divergence_is_kl_of_dense_and_pruned() -> None:
    """KL(dense || pruned), in that direction, and top-1 agreement equal fp64 sums over the scored positions."""
    dense, ids_NS = tiny_model("llama"), _ids()
    pruned = copy.deepcopy(dense)
    for block in pruned.model.layers:
        block.mlp.down_proj.weight[:, ::2] = 0
    pruned.lm_head.weight.mul_(3)  # sharper, so that the two directions differ
    stack = probe(dense, find_stack(dense), ids_NS[:1])
    keep: list[Tensor] = []
    _score(dense, ids_NS, keep=keep)
    scores = _score(pruned, ids_NS, dense=lambda number, ids: replay_head(dense, stack, ids, keep[number]))
    p, q = _log_probs64(dense, ids_NS), _log_probs64(pruned, ids_NS)
    assert scores.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert scores.kl != pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), rel=1e-2)
    assert scores.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_known_divergence() -> None:
    """p=(.5,.3,.2) against q=(.4,.4,.2) is 0.0252672 nats."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    assert float(F.kl_div(q.log(), p.log(), log_target=True, reduction="sum")) == pytest.approx(0.0252672, abs=1e-7)


def test_half_precision_is_scored_in_fp32() -> None:
    """A bf16 model's perplexity is that of its own logits in fp64, not of bf16 log-probabilities."""
    model, ids_NS = tiny_model("llama", dtype=torch.bfloat16), _ids(4)
    log_probs = _log_probs64(model, ids_NS)
    expected = math.exp(-float(log_probs.gather(-1, ids_NS[:, 1:, None]).mean()))
    assert _score(model, ids_NS).perplexity == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_speed_is_measured_in_tokens_per_second(family: str) -> None:
    """Prefill and decode are positive, with the median between its quartiles."""
    speeds = measure_speed(tiny_model(family), _ids(1), num_decode=3, repeats=3)
    assert {speed.phase for speed in speeds} <= {"prefill", "decode"}
    assert speeds[0].phase == "prefill"
    for speed in speeds:
        assert 0 < speed.quartiles[0] <= speed.tokens_per_second <= speed.quartiles[1]
