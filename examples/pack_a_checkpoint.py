"""Prune the bundled model to 2:4, pack the checkpoint, load it three ways, and make it dense again.

python examples/pack_a_checkpoint.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune


def main() -> None:
    """Print what packing saves, and that the packed model writes what the dense one writes."""
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "pruned"
        options = {"num_samples": 8, "seq_len": 128, "max_eval_tokens": 4096, "latency": False, "dtype": "float32"}
        report = llmprune.prune("demo", pattern="2:4", out=dense, **options)  # export="packed" would pack at once
        print(report.verdict.text)

        done = llmprune.convert(dense, to="packed")
        assert done.packed is not None
        print(f"{done.packed.num_sites} matrices take {done.packed.ratio:.1%} of their dense bytes")

        tokenizer = AutoTokenizer.from_pretrained(done.out)
        prompt = tokenizer("def main() -> None:\n", return_tensors="pt")
        models = {
            "dense": llmprune.load(dense, device="cpu"),
            "packed": llmprune.load(done.out, device="cpu"),
            "by transformers": AutoModelForCausalLM.from_pretrained(done.out),
            "unpacked while loading": llmprune.load(done.out, device="cpu", packed=False),
        }
        for name, model in models.items():
            tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)
            print(f"{name}: {tokenizer.decode(tokens[0])!r}")

        back = llmprune.convert(done.out, to="dense", out=Path(folder) / "back")
        same = (Path(back.out) / "model.safetensors").read_bytes() == (dense / "model.safetensors").read_bytes()
        print(f"dense again, the same bytes: {same}")


if __name__ == "__main__":
    main()
