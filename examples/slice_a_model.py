"""Take a quarter of the parameters out of the bundled model's blocks, load the smaller model two ways, and train it a little.

python examples/slice_a_model.py
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune


def main() -> None:
    """Print what went, what it cost, and what other sizes would cost."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "smaller"
        texts = {"num_samples": 8, "seq_len": 64, "max_eval_tokens": 2048}  # a quick look: take more for better models
        report = llmprune.prune(
            "demo", method="tyr", tyr_preset="fast", budget="parameters", sparsity=0.25, out=out, latency=False,
            dtype="float32", **texts,
        )  # fmt: skip
        print(report.verdict.text)
        assert report.structure is not None
        print(f"{report.structure.num_parameters_dense:,} parameters before, {report.structure.num_parameters:,} now")
        for point in report.structure.front[:4]:
            print(f"with {point.num_parameters:,} the KL would be about {point.kl_predicted:.3f}")

        tokenizer = AutoTokenizer.from_pretrained(out)
        prompt = tokenizer("def main() -> None:\n", return_tensors="pt")
        models = {
            "llmprune": llmprune.load(out, device="cpu"),
            "transformers": AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True),  # layers differ in width
        }
        for name, model in models.items():
            tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)
            print(f"by {name}: {tokenizer.decode(tokens[0])!r}")

        mode = "lora" if find_spec("peft") else "full"  # pip install 'llmprune[recover]' for lora
        better = llmprune.recover(
            out, out=Path(folder) / "better", mode=mode, steps=8, batch_size=4, **{**texts, "num_samples": 32}
        )
        print(f"after {better.config.steps} steps perplexity {better.quality_after[0].perplexity_pruned:.2f}")


if __name__ == "__main__":
    main()
