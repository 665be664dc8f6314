"""The examples run, and the bundled model is what its card says."""

from __future__ import annotations

import runpy
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import llmprune
from llmprune.io.models import BUNDLED_PATH

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("prune_*.py")), ids=lambda path: path.name)
def test_example_runs(example: Path) -> None:
    """As its docstring says, in a process of its own; it ends with the verdict. The other examples need a running service."""
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=240, check=True, cwd=ROOT)
    assert "block 5: 50%" in done.stdout
    assert "perplexity" in done.stdout


def test_packing_example_runs() -> None:
    """Every way of loading writes the same text, and dense again the weights are the same bytes."""
    example = ROOT / "examples" / "pack_a_checkpoint.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=240, check=True, cwd=ROOT)
    assert "42 matrices take 53.1% of their dense bytes" in done.stdout
    texts = {line.split(": ", 1)[1] for line in done.stdout.splitlines() if "def main()" in line}
    assert done.stdout.count("def main() -> None") == 4 and len(texts) == 1
    assert "dense again, the same bytes: True" in done.stdout


def test_slicing_example_runs() -> None:
    """Both ways of loading write the same text, and the model is smaller."""
    example = ROOT / "examples" / "slice_a_model.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=240, check=True, cwd=ROOT)
    assert "4,066,560 parameters before, 3,181,824 now" in done.stdout
    texts = [line.split(": ", 1)[1] for line in done.stdout.splitlines() if line.startswith("by ")]
    assert len(texts) == 2 and len(set(texts)) == 1
    assert "the KL would be about" in done.stdout and "after 8 steps perplexity" in done.stdout


def test_comparing_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, on a text of one's own: both methods at both sparsities, the best ones with a star."""
    example = runpy.run_path(str(ROOT / "examples" / "compare_methods.py"))
    example["main"](ROOT / "docs" / "guide.md")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("wanda", "sparsegpt"))]
    assert sorted(row[0] for row in rows) == ["sparsegpt-0.5", "sparsegpt-0.6", "wanda-0.5", "wanda-0.6"]
    assert rows[0][0] == "sparsegpt-0.5" and rows[0][-1] == "*"


def test_serving_example_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What was chosen is served: on a CPU the dense checkpoint, as packed weights are slower there."""
    example = runpy.run_path(str(ROOT / "examples" / "serve_two_four.py"))
    chosen = example["choose"](tmp_path)
    assert "perplexity" in capsys.readouterr().out
    assert chosen.name == "dense" or torch.cuda.is_available()
    with example["make_server"](llmprune.load(chosen), AutoTokenizer.from_pretrained(chosen), 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}", b"def main(", timeout=60) as answer:
            assert answer.read().decode().startswith("def main(")
        server.shutdown()
        thread.join(30)


def test_sweeping_example_runs() -> None:
    """Points with a front, and a model that meets the budget."""
    example = ROOT / "examples" / "sweep_and_choose.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=240, check=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert [line[2:].split(":")[0] for line in lines[:2]] == ["magnitude-0.5", "wanda-0.5"]
    assert any(line.startswith("*") for line in lines[:2])
    assert "is the sparsest within the budget" in lines[2] and "perplexity" in lines[3]


def test_bundled_model_is_small_and_has_learnt() -> None:
    """Under 12 MB; on held-out text far below the n-gram baseline's 39.5 that its card states."""
    assert sum(file.stat().st_size for file in BUNDLED_PATH.iterdir()) < 12e6
    assert "| 5-gram, modified Kneser-Ney, same train text | 39.5" in (BUNDLED_PATH / "README.md").read_text()
    result = llmprune.evaluate(eval="stdlib", seq_len=256, max_eval_tokens=16384, dtype="float32", latency=False)
    perplexity = result.quality[0].perplexity_pruned
    assert perplexity is not None and perplexity < 30


def test_bundled_tokenizer_round_trips() -> None:
    """Indentation, line ends, and characters of every length in UTF-8."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_PATH)
    text = "def f(x):\n\t  return 'é→🙂' \r\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
