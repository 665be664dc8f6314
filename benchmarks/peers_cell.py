"""One tool prunes one model in a process of its own: what that took, and the checkpoint.

Run by the interpreter of the peers' environment, which has both tools, with a job as JSON on stdin:

python -m benchmarks.peers_cell RESULT < JOB

The pruning proper begins when the weights are loaded and ends when the last one is pruned; the whole begins with the process
and ends when the checkpoint is written. What is imported for one tool is not for the other.
"""

from __future__ import annotations

import gc
import hashlib
import json
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.children import end_with_parent

Job = dict[str, Any]
BEGUN = time.perf_counter()


class Meter:
    """Seconds, processor seconds and peak resident set of the phases of this process, one after the other."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, float]] = {}
        self._seconds, self._cpu = BEGUN, 0.0
        self._reset()

    def end(self, phase: str) -> None:
        """What went on since the last phase ended was this one."""
        seconds, cpu = time.perf_counter(), _cpu_seconds()
        self.phases[phase] = {
            "seconds": seconds - self._seconds, "cpu_seconds": cpu - self._cpu, "peak_bytes": _status("VmHWM"),
            "end_bytes": _status("VmRSS"),
        }  # fmt: skip
        self._seconds, self._cpu = seconds, cpu
        self._reset()

    @staticmethod
    def _reset() -> None:
        """Let the peak start again from what is resident now; where the system cannot, it stays that of the whole process."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _status(name: str) -> int:
    """A size of this process in bytes, as Linux knows it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def ours(job: Job, meter: Meter) -> None:
    """llmprune's own job, its calibration tokens given; nothing is evaluated or timed."""
    import torch

    from llmprune.events import Finished, Progress, StageFinished
    from llmprune.io.text import TokenSet
    from llmprune.job import Job as OneJob
    from llmprune.report import TextReport
    from llmprune.spec import PruneConfig

    gc.freeze()  # as the command line does: stages collect garbage, and need not walk all that torch is made of
    meter.end("import")
    ids_NS = torch.load(job["tokens"])

    report = TextReport(
        source="tensor", split="given", description="Given tokens.", num_sequences=len(ids_NS), seq_len=ids_NS.shape[1],
        sha256=hashlib.sha256(ids_NS.numpy().tobytes()).hexdigest(),
    )  # fmt: skip
    config = PruneConfig.build(
        model=job["model"], method=job["method"], damping=job["damping"], dtype="float32", device="cpu", eval=(), latency=False,
        calibration="stdlib", prompt=(), num_samples=len(ids_NS), seq_len=ids_NS.shape[1], **job["target"], **job["fields"],
    )  # fmt: skip
    with patch("llmprune.job.calibrating.load_calibration", return_value=TokenSet(ids_NS, report)):
        for event in OneJob(config, out=Path(job["out"])).run():
            if isinstance(event, Progress) and (event.stage, event.done) == ("load", 2):
                meter.end("load")
            if isinstance(event, StageFinished) and event.stage == "prune":
                meter.end("prune")
            if isinstance(event, Finished):
                meter.end("save")


def theirs(job: Job, meter: Meter) -> None:
    """llm-compressor's ``oneshot`` on a loaded model, one decoder layer after the other, then its ``save_pretrained``."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    meter.end("import")
    ids_NS = torch.load(job["tokens"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    meter.end("load")
    pattern = job["target"].get("pattern")
    common = {"sparsity": job["target"].get("sparsity", 0.5), "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    if pattern:
        common["mask_structure"] = pattern
    if job["method"] == "sparsegpt":
        recipe = SparseGPTModifier(**common, block_size=128, dampening_frac=job["damping"])
    else:
        recipe = WandaPruningModifier(**common)
    rows = {"input_ids": ids_NS.tolist(), "attention_mask": torch.ones_like(ids_NS).tolist()}
    oneshot(
        model=model, processor=tokenizer, recipe=recipe, dataset=Dataset.from_dict(rows), num_calibration_samples=len(ids_NS),
        max_seq_length=ids_NS.shape[1], shuffle_calibration_samples=False, **job["fields"],
    )  # fmt: skip
    meter.end("prune")
    model.save_pretrained(job["out"], save_compressed=False)
    tokenizer.save_pretrained(job["out"])
    meter.end("save")


def main() -> None:
    """Read, prune, write."""
    end_with_parent()
    job = json.load(sys.stdin)
    meter = Meter()
    {"llmprune": ours, "llm-compressor": theirs}[job["tool"]](job, meter)
    Path(sys.argv[1]).write_text(json.dumps(meter.phases))


if __name__ == "__main__":
    main()
