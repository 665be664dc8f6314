"""Try a grid of settings, then let llmprune find the sparsest model within a budget of quality.

python examples/sweep_and_choose.py
"""

import tempfile
from pathlib import Path

import llmprune

QUICK = {"num_samples": 8, "seq_len": 128, "max_eval_tokens": 1024, "dtype": "float32", "latency": False}


def main() -> None:
    """On the bundled model: two jobs in one directory, then a search among sparsities of Wanda."""
    with tempfile.TemporaryDirectory() as directory:
        sweep = llmprune.sweep(
            "demo", out=Path(directory) / "sweep", methods=("magnitude", "wanda"), sparsities=0.5, keep="none", **QUICK
        )
        for point in sweep.points:
            star = "*" if point.on_front else " "
            print(f"{star} {point.name}: perplexity {point.values['perplexity']:.1f} at {point.values['sparsity']:.0%}")
        search = llmprune.auto(
            "demo", out=Path(directory) / "best", max_perplexity_increase="25%", methods="wanda", allocations="uniform",
            step=0.2, max_sparsity=0.6, proxy_windows=4, **QUICK,
        )  # fmt: skip
        print(search.text)
        print(f"tried {len(search.trials)} jobs; {llmprune.read_report(search.out).verdict.text}")


if __name__ == "__main__":
    main()
