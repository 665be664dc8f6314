"""Prune a transformers model that is already in memory, and follow the events.

python examples/prune_in_memory.py
"""

from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.events import BlockFinished, Finished
from llmprune.io.models import BUNDLED_PATH


def main() -> None:
    """Prune the bundled model to 50 % with Wanda; it changes in place."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_PATH, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_PATH)
    events = llmprune.prune_iter(
        model, tokenizer=tokenizer, method="wanda", sparsity=0.5, calibration="stdlib", eval="stdlib",
        num_samples=16, seq_len=256, max_eval_tokens=4096, latency=False,
    )  # fmt: skip
    for event in events:
        if isinstance(event, BlockFinished):
            print(f"block {event.block}: {event.report.sparsity:.0%} in {event.report.seconds:.1f} s")
        elif isinstance(event, Finished):
            print(event.report.verdict.text)


if __name__ == "__main__":
    main()
