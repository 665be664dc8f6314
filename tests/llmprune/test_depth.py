"""Depth pruning: the choice against brute force on small models, the removal against the dense model with blocks bypassed."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny
from families import tiny_model
from llmprune.anatomy.blocks import Call, find_stack, probe, record
from llmprune.engines import depth
from llmprune.engines.depth import (
    DepthMethod,
    block_influence,
    block_qubo,
    choose_blocks,
    divergences,
    drop_one,
    influence,
    lowest_states,
    num_steps,
    quadratic,
)
from llmprune.engines.divergence import Logits
from llmprune.errors import NonFiniteError, UnsupportedModel
from llmprune.measure.quality import replay_tail
from llmprune.structured.depth import bypassed, layer_fields, remove_blocks_

CPU = torch.device("cpu")
T = TypeVar("T")
SLIDING = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 6,
}


def _ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(seed))


def _drain(steps: Generator[int, None, T]) -> tuple[list[int], T]:
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as stop:
            return seen, stop.value


class Case:
    """A random model of a few blocks, of weights large enough that every block matters, and its recording."""

    def __init__(self, model_type: str = "llama", num_blocks: int = 5, **changes: Any) -> None:
        self.model = tiny.make_model(model_type, num_hidden_layers=num_blocks, **changes)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(3)
        self.stack = probe(self.model, find_stack(self.model), _ids()[:1])
        self.chunks = list(_ids().split(2))
        self.recording = record(self.model, self.stack, self.chunks)

    @property
    def given(self) -> tuple[Any, ...]:
        return self.stack, self.recording, CPU, self.head

    @contextmanager
    def head(self) -> Iterator[Logits]:
        yield lambda chunk, hidden_NSH: replay_tail(self.model, self.stack, self.chunks[chunk], hidden_NSH)

    def brute_force(self, removed: tuple[int, ...]) -> float:
        """KL of the whole model with the blocks bypassed, from its definition in fp64."""
        with torch.no_grad():
            dense = _log_probs(self.model, _ids())
            with bypassed(self.stack, removed):
                other = _log_probs(self.model, _ids())
        return float((dense.exp() * (dense - other)).sum(-1).mean())


def _log_probs(model: PreTrainedModel, ids_NS: Tensor) -> Tensor:
    return F.log_softmax(model(input_ids=ids_NS, use_cache=False).logits.double(), -1)


def test_influence_is_the_angle_alone() -> None:
    """A block that scales scores 0, one that negates 2, one that turns by a right angle 1."""
    x_TH = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    turned_TH = torch.cat([-x_TH[:, 4:], x_TH[:, :4]], 1)
    for after_TH, score in ((3 * x_TH, 0.0), (-x_TH, 2.0), (turned_TH, 1.0)):
        torch.testing.assert_close(influence(x_TH, after_TH), torch.full((7,), score), atol=1e-6, rtol=0)


def test_block_influence_is_that_of_the_models_own_hidden_states() -> None:
    """The streamed scores equal those of the hidden states a forward returns."""
    case = Case()
    seen, scores = _drain(block_influence(case.stack, case.recording, CPU))
    assert seen == [1, 2, 3, 4, 5]
    inputs: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _module, args: inputs.append(args[0])) for block in case.stack.blocks]
    with torch.no_grad():
        case.model(input_ids=_ids(), use_cache=False)
    for hook in hooks:
        hook.remove()
    for before, after, score in zip(inputs, inputs[1:], scores, strict=False):
        assert math.isclose(
            float((1 - F.cosine_similarity(before.double(), after.double(), dim=-1)).mean()), score, abs_tol=1e-6
        )


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_divergences_are_those_of_the_whole_model(model_type: str) -> None:
    """Streamed with shared prefixes or run whole with blocks bypassed, the KL is the same."""
    case = Case(model_type, 4, **(SLIDING if model_type == "gemma2" else {}))
    sets = [(0,), (3,), (0, 3), (1, 2, 3)]
    seen, losses = _drain(divergences(*case.given, sets, start=10))
    assert seen == [11, 12, 13, 14]
    assert min(losses) > 1e-3
    for one, loss in zip(sets, losses.tolist(), strict=True):
        assert math.isclose(loss, case.brute_force(one), rel_tol=1e-4)


def test_drop_one_passes_half_the_blocks_of_separate_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five blocks: 5 of the dense model and 4 + 3 + 2 + 1 + 0 of those that lack one, on each chunk."""
    case = Case()
    calls = 0
    run = Call.run

    def counted(self: Call, block: nn.Module, hidden_NSH: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return run(self, block, hidden_NSH)

    monkeypatch.setattr(Call, "run", counted)
    _, losses = _drain(drop_one(*case.given))
    assert calls == 15 * len(case.chunks)
    assert losses.shape == (5,)


def test_the_quadratic_model_is_exact_for_one_and_two_blocks() -> None:
    """Its energies are the measured KL of single blocks and of pairs, and its factor is real."""
    case = Case(num_blocks=4)
    _, (problem, alone) = _drain(block_qubo(*case.given, 2))
    for removed in [*combinations(range(4), 1), *combinations(range(4), 2)]:
        x = torch.zeros(1, 4, dtype=torch.bool)
        x[0, list(removed)] = True
        assert math.isclose(float(problem.energy(x)), case.brute_force(removed), rel_tol=1e-3), removed
    assert int(problem.pruned_V.sum()) == 2
    assert alone.tolist() == pytest.approx([case.brute_force((index,)) for index in range(4)], rel=1e-3)


@pytest.mark.parametrize("count", [1, 2])
def test_the_quadratic_choice_is_the_best_of_all(count: int) -> None:
    """For one and two blocks no other set has a smaller KL, and the alternatives come with theirs."""
    case = Case()
    seen, choice = _drain(choose_blocks("block-qubo", *case.given, count, num_measured=4))
    best = min(combinations(range(5), count), key=case.brute_force)
    assert choice.removed == best
    assert math.isclose(choice.kl, case.brute_force(best), rel_tol=1e-4)
    assert len(choice.tried) == 4
    assert [kl for _, kl in choice.tried] == sorted(kl for _, kl in choice.tried)
    assert seen[-1] == num_steps("block-qubo", 5, count) and seen == sorted(set(seen))


@pytest.mark.parametrize("method", ["shortgpt", "drop-one"])
def test_scores_alone_choose_the_least(method: DepthMethod) -> None:
    """The blocks of the least scores go, and their KL together is measured."""
    case = Case()
    seen, choice = _drain(choose_blocks(method, *case.given, 2))
    order = torch.tensor(choice.scores).argsort()[:2].tolist()
    assert choice.removed == tuple(sorted(order))
    assert choice.tried == ((choice.removed, choice.kl),)
    assert math.isclose(choice.kl, case.brute_force(choice.removed), rel_tol=1e-4)
    assert seen[-1] == num_steps(method, 5, 2)


def test_the_annealer_finds_the_states_that_trying_all_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 12 blocks of random energies the least state is the same, and the states are distinct and rising."""
    generator = torch.Generator().manual_seed(0)
    alone = torch.rand(12, dtype=torch.float64, generator=generator)
    pairs = torch.triu(alone[:, None] + alone + torch.randn(12, 12, dtype=torch.float64, generator=generator), 1)
    problem = quadratic(alone, pairs, 4)
    exact = lowest_states(problem, 4, 20)
    monkeypatch.setattr(depth, "_MAX_STATES", 10)
    found = lowest_states(problem, 4, 20)
    assert found[0] == exact[0]
    assert len(set(found)) == 20
    assert all(len(set(state)) == 4 for state in found)


def test_bad_counts_and_broken_models_are_refused() -> None:
    """No block, all blocks, a model that puts out NaN."""
    case = Case()
    for count in (0, 5):
        with pytest.raises(ValueError, match="choose 1 to 4"):
            next(choose_blocks("shortgpt", *case.given, count))
    with torch.no_grad():
        next(case.stack.blocks[2].parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteError, match="layers.2"):
        _drain(drop_one(*case.given))


REMOVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": SLIDING | {"max_window_layers": 1, "use_sliding_window": True},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "gpt2": {},
    "opt": {},
    "phi3": {},
    "mixtral": {},
    "gpt_neox": {},
    "qwen3_moe": {"mlp_only_layers": [0, 3]},
    "glm4_moe": {"first_k_dense_replace": 2},
}


@pytest.mark.parametrize("model_type", REMOVED)
def test_what_is_left_is_a_stock_model(model_type: str, tmp_path: Path) -> None:
    """Without two of four blocks the model puts out what it does with them bypassed, generates, and loads as it is."""
    model = tiny.make_model(model_type, num_hidden_layers=4, **REMOVED[model_type])
    stack = probe(model, find_stack(model), _ids()[:1])
    with torch.no_grad(), bypassed(stack, (1, 3)):
        expected = model(input_ids=_ids(), use_cache=False).logits
    remove_blocks_(model, stack, (1, 3), _ids()[:1])
    assert len(find_stack(model).blocks) == model.config.num_hidden_layers == 2
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=_ids(), use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = _ids()[:2]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6, rtol=1e-6)
    made = loaded.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    for length in range(16, 19):  # the cache counts as before: each new token is that of a forward without one
        with torch.no_grad():
            logits = loaded(input_ids=made[:, :length], use_cache=False).logits[:, -1]
        assert torch.equal(logits.argmax(-1), made[:, length])


def test_layers_of_a_config_follow_the_blocks() -> None:
    """Lists by layer are cut, layer numbers renumbered, leading layers counted again; the rest stays."""
    config = tiny.make_model("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0, 3]).config
    config.layer_types = ["a", "b", "c", "d"]
    config.first_k_dense_replace = 3
    config.eos_token_id = [1, 2, 3, 4]
    fields = layer_fields(config, 4, [0, 2, 3])
    expected = {"num_hidden_layers": 3, "mlp_only_layers": [0, 2], "layer_types": ["a", "c", "d"], "first_k_dense_replace": 2}
    assert fields == expected


REFUSED = {
    "gpt_neo": "differs from block to block",
    "zamba2": "serves several blocks",
    "gemma3n_text": "num_kv_shared_layers",
    "minicpm3": "residual_scale",
    "diffllama": "lambda_init",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_depends_on_the_number_of_a_layer_is_refused(model_type: str) -> None:
    """The refusal names what it is, and the model is as it was."""
    model = tiny_model(model_type)
    stack = probe(model, find_stack(model), _ids()[:1])
    before = model.config.to_dict()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UnsupportedModel, match=REFUSED[model_type]):
        remove_blocks_(model, stack, (0,), _ids()[:1])
    assert model.config.to_dict() == before
    assert [name for name, _ in model.named_modules()] == names


def test_a_block_that_computes_with_its_number_is_refused_and_put_back() -> None:
    """Where only a forward shows the dependence, the check against the bypassed model does; all is as it was afterwards."""
    model = tiny.make_model("llama", num_hidden_layers=3)
    for block in find_stack(model).blocks:
        block.self_attn.register_forward_hook(lambda module, _args, output: (output[0] * (1 + module.layer_idx), *output[1:]))
    stack = probe(model, find_stack(model), _ids()[:1])
    with torch.no_grad():
        before = model(input_ids=_ids(), use_cache=True).logits
    with pytest.raises(UnsupportedModel, match="number of a layer"):
        remove_blocks_(model, stack, (0,), _ids()[:1])
    with torch.no_grad():
        assert torch.equal(model(input_ids=_ids(), use_cache=True).logits, before)
    assert [block.self_attn.layer_idx for block in find_stack(model).blocks] == [0, 1, 2]
    assert model.config.num_hidden_layers == 3
