"""Writing: tokens as transformers' own loop gives them, pieces that add up to the text, comparison, and refusals."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
import tiny
from llmprune.errors import ConfigError
from llmprune.events import Event, StageFinished, TextGenerated, TextPiece
from llmprune.generation import generate_iter, prompt_ids, write
from llmprune.io.models import BUNDLED_PATH
from llmprune.report import Generation

CHAT = "{% for message in messages %}the {{ message['content'] }}\n{% endfor %}model"


def written(*arguments: Any, **options: Any) -> tuple[list[Event], Generation]:
    """All events and the last one's generation."""
    events = list(generate_iter(*arguments, device="cpu", **options))
    last = events[-1]
    assert isinstance(last, TextGenerated)
    return events, last.generation


def test_greedy_tokens_are_those_of_transformers(trained_model_dir: Path) -> None:
    """The same tokens as model.generate(do_sample=False), and text that decodes to them."""
    model = AutoModelForCausalLM.from_pretrained(trained_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(trained_model_dir)
    ids = tokenizer("the model", return_tensors="pt")["input_ids"]
    wanted = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    _, generation = written(trained_model_dir, "the model", max_new_tokens=12)
    assert list(generation.generated.tokens) == wanted
    assert generation.generated.num_tokens == 12 and not generation.generated.finished
    assert generation.generated.text == tokenizer.decode(ids[0].tolist() + wanted)[len("the model") :]
    assert generation.num_prompt_tokens == ids.shape[1]


def test_pieces_add_up_to_the_text(trained_model_dir: Path) -> None:
    """Streaming: several pieces, whose sum is the text; the space of the first word is kept."""
    events, generation = written(trained_model_dir, "the model", max_new_tokens=20)
    pieces = [event.text for event in events if isinstance(event, TextPiece)]
    assert len(pieces) > 3 and all(pieces)
    assert "".join(pieces) == generation.generated.text
    assert generation.generated.text.startswith((" ", "\n"))
    assert [event.stage for event in events if isinstance(event, StageFinished)] == ["load", "generate"]


def test_pieces_come_while_the_model_writes(trained_model_dir: Path) -> None:
    """The first one is there before the last token: the generator is lazy, and closing it ends the writing."""
    run = generate_iter(trained_model_dir, "the model", max_new_tokens=50, device="cpu")
    first = next(event for event in run if isinstance(event, TextPiece))
    assert first.text and first.model == str(trained_model_dir)
    run.close()  # type: ignore[attr-defined]


def test_characters_of_several_tokens_are_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece ends within a character: an emoji is several tokens of the bundled tokenizer, and comes whole."""
    ids = AutoTokenizer.from_pretrained(BUNDLED_PATH)("\N{GRINNING FACE}")["input_ids"]
    assert len(ids) > 1

    def given(*_: Any, **__: Any) -> Generator[tuple[int, float], None, bool]:
        for token in ids:
            yield token, 0.1
        return True

    monkeypatch.setattr("llmprune.generation.write", given)
    events, generation = written("demo", "the")
    assert [event.text for event in events if isinstance(event, TextPiece)] == ["\N{GRINNING FACE}"]
    assert generation.generated.finished
    assert generation.generated.prefill_seconds == pytest.approx(0.1)
    assert generation.generated.tokens_per_second == pytest.approx(10.0)


def test_seed_and_temperature(tiny_model_dir: Path) -> None:
    """The same seed draws the same tokens, another one others; greedy needs none."""

    def tokens(**options: Any) -> tuple[int, ...]:
        return written(tiny_model_dir, "the", max_new_tokens=20, **options)[1].generated.tokens

    assert tokens(temperature=1.0, seed=1) == tokens(temperature=1.0, seed=1)
    assert tokens(temperature=1.0, seed=1) != tokens(temperature=1.0, seed=2)
    assert tokens(seed=1) == tokens(seed=2)


def test_a_model_ends_by_itself(tiny_model_dir: Path) -> None:
    """The token that ends the text is not part of it; all of a list of them count."""
    model = tiny.make_model()
    ids = torch.tensor([[5, 6, 7]])
    steps = list(write(model, ids, max_new_tokens=6, temperature=0, seed=0))
    model.generation_config.eos_token_id = [127, steps[2][0]]
    run = write(model, ids, max_new_tokens=6, temperature=0, seed=0)
    tokens = []
    while True:
        try:
            tokens.append(next(run)[0])
        except StopIteration as stop:
            assert stop.value is True
            break
    first = [token for token, _ in steps].index(steps[2][0])
    assert tokens == [token for token, _ in steps[:first]]


def test_a_model_without_a_cache_writes_the_same(tiny_model_dir: Path) -> None:
    """Everything is read anew for each token."""
    model = tiny.make_model()
    ids = torch.tensor([[5, 6, 7]])
    wanted = [token for token, _ in write(model, ids, max_new_tokens=5, temperature=0, seed=0)]
    forward = model.forward

    def forget(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        output.past_key_values = None
        return output

    model.forward = forget
    assert [token for token, _ in write(model, ids, max_new_tokens=5, temperature=0, seed=0)] == wanted


def test_packed_and_dense_agree(trained_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """A packed model writes what its dense form writes, and says that a CPU expands it at every call."""
    out = tmp_path / "pruned"
    llmprune.prune(trained_model_dir, out=out, pattern="2:4", calibration=str(text_file), eval=(), **tiny.QUICK)
    llmprune.convert(out, to="packed", out=tmp_path / "packed")
    _, generation = written(tmp_path / "packed", "the model", compare=out, max_new_tokens=16)
    assert generation.compared is not None
    assert generation.num_agreeing == 16
    assert generation.generated.text == generation.compared.text
    assert "--to dense" in generation.generated.notes[0] and generation.compared.notes == ()


def test_compare_tells_where_they_part(tiny_model_dir: Path, trained_model_dir: Path) -> None:
    """Two models, the same prompt: the leading tokens that agree are counted, pieces carry their model's name."""
    events, generation = written(trained_model_dir, "the model", compare=tiny_model_dir, max_new_tokens=8)
    assert generation.compared is not None
    one, other = generation.generated.tokens, generation.compared.tokens
    agreeing = generation.num_agreeing
    assert agreeing is not None and one[:agreeing] == other[:agreeing] and one != other
    names = [event.model for event in events if isinstance(event, TextPiece)]
    assert list(dict.fromkeys(names)) == [str(trained_model_dir), str(tiny_model_dir)]


def test_compare_needs_the_same_vocabulary(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Else token ids mean other things."""
    other = tiny.save(tiny.make_model(vocab_size=160), tmp_path / "other")
    with pytest.raises(ConfigError, match="different vocabularies"):
        llmprune.generate(tiny_model_dir, "the", compare=other, max_new_tokens=2, device="cpu")


def test_model_in_memory() -> None:
    """With its tokenizer; without one that is an error."""
    model, tokenizer = tiny.make_model(), tiny.train_tokenizer()
    generation = llmprune.generate(model, "the", tokenizer=tokenizer, max_new_tokens=3)
    assert generation.generated.num_tokens == 3
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        llmprune.generate(model, "the", max_new_tokens=3)


def test_chat_template() -> None:
    """Applied where asked for; a tokenizer without one is named."""
    tokenizer = tiny.train_tokenizer()
    with pytest.raises(ConfigError, match=r"^m has no chat template"):
        prompt_ids(tokenizer, "the", chat=True, name="m")
    tokenizer.chat_template = CHAT
    ids = prompt_ids(tokenizer, "small model", chat=True, name="m")
    assert ids.shape[0] == 1
    assert tokenizer.decode(ids[0]) == "the small model\nmodel"


def test_empty_prompt() -> None:
    """Begins with the tokenizer's own first token; a tokenizer without one refuses."""
    tokenizer = tiny.train_tokenizer()
    assert prompt_ids(tokenizer, "", chat=False, name="m").tolist() == [[tokenizer.bos_token_id]]
    tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="prompt is empty"):
        prompt_ids(tokenizer, "", chat=False, name="m")


def test_prompts_stay_within_the_positions(tiny_model_dir: Path) -> None:
    """New tokens stop at the model's maximum, with a note; a prompt that fills it is refused with both numbers."""
    limit = tiny.make_model().config.max_position_embeddings
    model, tokenizer = tiny.make_model(max_position_embeddings=8), tiny.train_tokenizer()
    assert limit > 8
    generation = llmprune.generate(model, "the", tokenizer=tokenizer, max_new_tokens=50)
    assert generation.num_prompt_tokens + generation.generated.num_tokens == 8
    assert "has positions for 8" in generation.generated.notes[0]
    with pytest.raises(ConfigError, match="and .* has positions for 8"):
        llmprune.generate(model, tiny.prose(50), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"dtype": "int8"}, "dtype"),
        ({"seed": -1}, "seed"),
    ],
)
def test_values_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    """Refused before anything is loaded."""
    with pytest.raises(ConfigError, match=message):
        llmprune.generate("demo", "the", **options)
