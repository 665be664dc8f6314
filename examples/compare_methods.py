"""Compare methods on a text of your own: prune by each at two sparsities, and see which results no other one beats.

python examples/compare_methods.py [TEXT]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import llmprune

GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"


def main(text: Path) -> None:
    """Calibrate on the first two thirds of the text, evaluate on the rest; statistics of the dense model are shared."""
    with tempfile.TemporaryDirectory() as folder:
        learn, judge = Path(folder) / "calibration.txt", Path(folder) / "evaluation.txt"
        words = text.read_text()
        cut = 2 * len(words) // 3
        learn.write_text(words[:cut])
        judge.write_text(words[cut:])
        sweep = llmprune.sweep(
            "demo", methods=("wanda", "sparsegpt"), sparsities=(0.5, 0.6), out=Path(folder) / "sweep", keep="none",
            calibration=str(learn), eval=str(judge), num_samples=8, seq_len=128, max_eval_tokens=2048, latency=False,
            dtype="float32",
        )  # fmt: skip
        print(f"{'':16}{'perplexity':>12}{'KL':>8}")
        for point in sorted(sweep.points, key=lambda point: point.values["perplexity"]):
            star = " *" if point.on_front else ""
            print(f"{point.name:16}{point.values['perplexity']:12.2f}{point.values['kl']:8.3f}{star}")
        print("* no other one is both sparser and better")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else GUIDE)
