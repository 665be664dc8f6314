"""What both models write: the numbers against closed forms, batches against single prompts, the verdict, and the job."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
import tiny
from llmprune.console import print_report
from llmprune.continuations import Continuations, Continued, distinct, diversity_of, longest_loop, repeated
from llmprune.errors import ConfigError
from llmprune.io.render import render_card, render_html, render_markdown
from llmprune.measure.writing import NUM_TOKENS, PROMPTS, greedy, prepare_prompts, write_all
from tests.llmprune.test_render import HOSTILE, Page
from tests.reports import sample_report

VARIED = tuple(range(40))
LOOP = (5, 6, *(7, 8, 9) * 12)


def continued(*tokens: int, text: str = "words", finished: bool = False) -> Continued:
    """A text of these tokens."""
    return Continued(text=text, tokens=tokens, finished=finished)


def both(dense: list[Continued], pruned: list[Continued], **changes: object) -> Continuations:
    """Two models side by side."""
    prompts = tuple(f"prompt {index}" for index in range(len(dense)))
    return Continuations.model_validate({"prompts": prompts, "max_new_tokens": 40, "dense": dense, "pruned": pruned, **changes})


def test_shares_of_n_grams() -> None:
    """Counted by hand: over all texts together, and within each."""
    texts = [(1, 2, 1, 2), (1, 2, 3)]
    assert distinct(texts, 1) == 3 / 7
    assert distinct(texts, 2) == 3 / 5
    assert distinct(texts, 3) == 1.0
    assert repeated(texts, 1) == pytest.approx(2 / 7)
    assert repeated(texts, 2) == pytest.approx(1 / 5)
    assert distinct(texts, 5) is repeated(texts, 5) is distinct([], 1) is None


@pytest.mark.parametrize(
    ("tokens", "longest"),
    [((), 0), ((1,), 0), ((1, 2, 3), 0), ((1, 1, 1), 2), ((9, 1, 2, 1, 2, 1, 8), 3), ((1, 2, 3, 4, 1, 2, 3, 4), 4)],
)
def test_longest_loop(tokens: tuple[int, ...], longest: int) -> None:
    """Tokens that only repeat what stood a fixed distance before them."""
    assert longest_loop(tokens) == longest


@pytest.mark.parametrize(
    ("text", "stuck"),
    [
        (continued(*VARIED), False),
        (continued(*LOOP), True),
        (continued(text="", finished=True), True),
        (continued(1, 2, text=" \n"), True),
        (continued(1, 1, 1, 1), False),  # too short to tell
        (continued(*VARIED, *(3,) * 20), False),
    ],
)
def test_which_texts_are_stuck(text: Continued, stuck: bool) -> None:
    """Nothing, or mostly one loop."""
    assert text.is_stuck is stuck


@pytest.mark.parametrize(
    ("dense", "pruned", "status"),
    [
        ((VARIED, VARIED), (VARIED, VARIED), "fine"),
        ((VARIED, VARIED, VARIED), (VARIED, VARIED, LOOP), "fine"),
        ((VARIED, VARIED), (VARIED, LOOP), "degenerate"),
        ((VARIED, LOOP), (LOOP, LOOP), "both"),
        ((LOOP, LOOP), (VARIED, VARIED), "fine"),
    ],
)
def test_verdict(dense: tuple[tuple[int, ...], ...], pruned: tuple[tuple[int, ...], ...], status: str) -> None:
    """Degenerate where half of its texts are stuck and fewer than half of the dense one's."""
    found = both([continued(*text) for text in dense], [continued(*text) for text in pruned])
    assert found.verdict.status == status
    assert Continuations.model_validate_json(found.model_dump_json()) == found
    assert found.num_agreeing(0) == (len(dense[0]) if dense[0] == pruned[0] else 0)


def test_nothing_written_says_why() -> None:
    """As of a model that is read from disk."""
    verdict = Continuations(prompts=("a",), max_new_tokens=9, skipped="it is on disk").verdict
    assert verdict.status == "skipped" and "it is on disk" in verdict.text
    assert diversity_of(()) is None


def test_batches_write_what_single_prompts_do(trained_model_dir: Path) -> None:
    """Prompts of different lengths, in any order, as transformers' own loop continues each alone."""
    model = AutoModelForCausalLM.from_pretrained(trained_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(trained_model_dir)
    wanted = ("the model", "a small sparse network", "of the", "the weight")
    prompts = prepare_prompts(model, tokenizer, wanted, name="tiny")
    assert len({len(ids_S) for ids_S in prompts.ids}) > 1
    texts = write_all(model, tokenizer, prompts)
    for ids_S, text in zip(prompts.ids, texts, strict=True):
        alone = model.generate(input_ids=ids_S[None], max_new_tokens=prompts.max_new_tokens, do_sample=False)[0, len(ids_S) :]
        assert list(text.tokens) == alone.tolist() and not text.finished
        assert text.text == tokenizer.decode([*ids_S, *text.tokens])[len(tokenizer.decode(ids_S)) :]


def test_texts_that_end(trained_model_dir: Path) -> None:
    """The token that ends a text is left out, and the other rows go on; where all have ended no more is computed."""
    model = AutoModelForCausalLM.from_pretrained(trained_model_dir)
    ids_NS = torch.tensor([[20, 21], [30, 31]])
    (first, _), (second, _) = greedy(model, ids_NS, 10)
    end = next(token for token in first if token not in second)
    model.generation_config.eos_token_id = [end]
    (cut, finished), (whole, goes_on) = greedy(model, ids_NS, 10)
    assert cut == first[: first.index(end)] and finished
    assert whole == second and not goes_on


def test_own_prompts_are_one_batch_that_fits(tiny_model_dir: Path) -> None:
    """Cut to equal lengths, with room for the text among few positions."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    prompts = prepare_prompts(model, tokenizer, None, name="tiny")
    limit = model.config.max_position_embeddings
    assert len(prompts.ids) == len(PROMPTS) and len({len(ids_S) for ids_S in prompts.ids}) == 1
    assert 1 <= prompts.max_new_tokens <= NUM_TOKENS and len(prompts.ids[0]) + prompts.max_new_tokens <= limit
    with pytest.raises(ConfigError, match="Shorten it"):
        prepare_prompts(model, tokenizer, ("the model " * limit,), name="tiny")


def test_a_job_compares_what_was_asked_for(trained_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """The prompts come back with both texts; a ruined model is said to degenerate, in the report and among its warnings."""
    how = {**tiny.QUICK, "prompt": ("the model", HOSTILE), "calibration": str(text_file), "eval": ()}
    report = llmprune.prune(trained_model_dir, method="magnitude", sparsity=0.99, out=tmp_path / "out", **how)
    found = report.continuations
    assert found is not None and found.prompts == ("the model", HOSTILE)
    assert len(found.dense) == len(found.pruned) == 2 and len(found.dense[0].tokens) == found.max_new_tokens
    assert found.dense != found.pruned
    assert found.verdict.status in ("degenerate", "both")
    assert any("the pruned model degenerates" in item for item in report.warnings) == (found.verdict.status == "degenerate")
    assert llmprune.read_report(tmp_path / "out") == report
    page, card = (tmp_path / "out" / "report.html").read_text(), (tmp_path / "out" / "README.md").read_text()
    assert found.verdict.text in Page(page).text and "<script>alert" not in page
    assert "## Continuations" in card and "the model" not in card.partition("## Continuations")[2].partition("## Sparsity")[0]


def test_hostile_texts_are_inert() -> None:
    """What was asked and what was written is text everywhere."""
    text = continued(*VARIED, text=HOSTILE)
    report = sample_report(continuations=both([text], [text], prompts=(HOSTILE,)))
    page = render_html(report)
    assert "<script>alert" not in page and Page(page).text.count("<script>alert(1)</script>") == 3
    for markdown in (render_markdown(report), render_card(report, "owner/name", None)):
        html = MarkdownIt("commonmark").enable("table").render(markdown)
        assert "<script" not in html and "<a " not in html and html.count("<h1>") <= 2


def test_terminal_and_page_show_the_numbers() -> None:
    """Distinct n-grams, repetition and the loop, of both models."""
    report = sample_report(continuations=both([continued(*VARIED)] * 2, [continued(*LOOP)] * 2))
    console = Console(width=100, record=True, file=io.StringIO())
    print_report(report, console)
    shown = console.export_text()
    for text in (shown, Page(render_html(report)).text):
        assert all(part in text.lower() for part in ("degenerates: 2 of 2", "0.500", "0.066", "33", "distinct-2")), text


def test_a_resumed_job_remembers_what_the_dense_model_wrote(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """It is in the journal: the texts are those of a run that was not stopped."""
    how = {**tiny.QUICK, "prompt": ("the model",), "calibration": str(text_file), "eval": ()}
    run = llmprune.prune_iter(tiny_model_dir, out=tmp_path / "out", **how)
    for event in run:
        if event.event == "block_finished":
            break
    run.close()  # type: ignore[attr-defined]
    resumed = llmprune.prune(tiny_model_dir, out=tmp_path / "out", resume=True, **how)
    assert resumed.resumed and resumed.continuations == llmprune.prune(tiny_model_dir, **how).continuations is not None


def test_a_model_on_disk_writes_nothing_and_says_why(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """Every token would read all of it."""
    how = {**tiny.QUICK, "prompt": ("the model",), "calibration": str(text_file), "eval": (), "offload": "disk"}
    found = llmprune.prune(tiny_model_dir, out=tmp_path / "out", **how).continuations
    assert found is not None and found.verdict.status == "skipped" and found.dense == found.pruned == ()
    page = Page((tmp_path / "out" / "report.html").read_text()).text
    assert "every token would read all of it" in page and "How varied" not in page
