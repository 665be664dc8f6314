"""``llmprune auto``: the best model within a budget is an ordinary checkpoint, confirmed, and found again where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmprune
from llmprune.errors import BudgetNotMet, ConfigError, OutputError, ResumeRefused
from llmprune.events import PointFinished, PointStarted, Searched

Fields = dict[str, Any]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of the test's own."""
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def fields(text_file: Path, eval_file: Path) -> Fields:
    """A quick search: one method, few steps, few windows."""
    return {
        "calibration": str(text_file), "eval": (str(eval_file),), "num_samples": 4, "seq_len": 32, "max_eval_tokens": 1024,
        "batch_size": 2, "latency": False, "methods": "wanda", "allocations": "uniform", "step": 0.2, "proxy_windows": 4,
    }  # fmt: skip


def test_the_best_is_an_ordinary_checkpoint(tiny_model_dir: Path, fields: Fields, tmp_path: Path) -> None:
    """Confirmed on all windows, with all that was tried beside it; the work directory is gone, and a second call finds it."""
    out = tmp_path / "best"
    events = list(llmprune.auto_iter(tiny_model_dir, out=out, max_kl=0.02, **fields))
    search = events[-1].search if isinstance(events[-1], Searched) else None
    assert search is not None and search.best is not None
    assert search.best.kind == "confirmed" and search.best.worst["kl"] <= 0.02 and search.best.unseen
    assert search.best.point.directory == str(out) and search.best.point.kept
    assert llmprune.AutoReport.model_validate_json((out / "auto.json").read_bytes()) == search
    report = llmprune.read_report(out)
    assert report.quality[0].text.num_sequences == 32 and report.quality[0].kl == search.best.measured["kl"]
    assert report.sparsity == pytest.approx(search.best.point.config.sparsity, abs=0.02)
    assert {trial.point.config.max_eval_tokens for trial in search.trials if trial.kind == "proxy"} == {4 * 32}
    sparser = [trial for trial in search.trials if trial.point.config.sparsity > search.best.point.config.sparsity]
    assert sparser and all(trial.missed for trial in sparser) and search.binding == ("max_kl",)
    assert "--max-kl binds" in search.text and "<svg" in (out / "auto.html").read_text()
    assert not (tmp_path / "best.auto").exists() and not (tmp_path / "best.work").exists()
    assert llmprune.auto(tiny_model_dir, out=out, max_kl=0.02, **fields) == search
    with pytest.raises(OutputError, match="another search"):
        llmprune.auto(tiny_model_dir, out=out, max_kl=0.5, **fields)


def test_a_search_goes_on_and_its_jobs_serve_another_budget(tiny_model_dir: Path, fields: Fields, tmp_path: Path) -> None:
    """Stopped after a job, then with a budget that nothing meets, then with one that is met: no job twice."""
    out = tmp_path / "best"
    run = llmprune.auto_iter(tiny_model_dir, out=out, max_kl=1e-9, **fields)
    first = next(event for event in run if isinstance(event, PointFinished))
    run.close()  # type: ignore[attr-defined]
    with pytest.raises(BudgetNotMet, match=r"The nearest of \d+ jobs is wanda-0.2: KL .* it misses --max-kl"):
        llmprune.auto(tiny_model_dir, out=out, max_kl=1e-9, **fields)
    missed = json.loads((tmp_path / "best.auto" / "auto.json").read_text())
    assert missed["best"] is None and missed["trials"][0]["point"]["name"] == first.point.name and not out.exists()
    with pytest.raises(ResumeRefused, match=r"config.num_samples = 4, not 5"):
        llmprune.auto(tiny_model_dir, out=out, max_kl=1e-9, **{**fields, "num_samples": 5})
    events = list(llmprune.auto_iter(tiny_model_dir, out=out, max_kl=0.02, **fields))
    again = [event for event in events if isinstance(event, PointFinished) and event.reused]
    assert len(again) >= 2 and (out / "model.safetensors").is_file()
    assert len([event for event in events if isinstance(event, PointStarted)]) == len(events[-1].search.trials)


def test_small_enough_by_the_command_line(
    cli: Callable[..., Any], tiny_model_dir: Path, fields: Fields, tmp_path: Path
) -> None:
    """Packed 2:4 and smaller matrices are smaller; the size is that of the files. What is too small for all is an error."""
    dense = sum(file.stat().st_size for file in tiny_model_dir.glob("*.safetensors"))
    options: list[Any] = ["--patterns", "2:4,structured", "--methods", "wanda,flap", "--step", 0.2, "--proxy-windows", 4]
    options += ["--calibration", fields["calibration"], "--eval", fields["eval"][0], "--num-samples", 4, "--seq-len", 32]
    options += ["--max-eval-tokens", 512, "--no-latency"]
    out = tmp_path / "small"
    outcome = cli("auto", tiny_model_dir, "--max-size", int(0.9 * dense), "--out", out, *options)
    assert outcome.code == 0 and "meets it" in outcome.out and "the lowest KL within the budget" in outcome.out
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) <= 0.9 * dense
    outcome = cli("auto", tiny_model_dir, "--max-size", "1kB", "--out", tmp_path / "tiny", *options)
    assert outcome.code == 2 and "Nothing met the budget. The nearest of" in outcome.err and "--max-size" in outcome.err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "no budget"),
        ({"max_kl": 0.1, "sparsity": 0.5}, "finds the sparsity"),
        ({"max_kl": 0.1, "methods": "wando"}, "wando"),
    ],
    ids=str,
)
def test_what_a_search_refuses(more: Fields, words: str, tiny_model_dir: Path, fields: Fields, tmp_path: Path) -> None:
    """Before anything is read."""
    with pytest.raises(ConfigError, match=words):
        llmprune.auto(tiny_model_dir, out=tmp_path / "out", **{**fields, **more})
    assert not (tmp_path / "out.auto").exists()
