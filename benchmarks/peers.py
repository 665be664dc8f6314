"""`make bench-peers`: llmprune against llm-compressor's ``oneshot`` on the same models, tokens and methods, in one run.

Both tools run in an environment of their own (:mod:`benchmarks.peers_venv`), every run in a fresh process, in turns and one at
a time. Their checkpoints are judged by llmprune's evaluator and compared weight by weight. A cell, which is one method at one
target of one model, is in the file of results as soon as it is there; one that has fewer runs than asked for gets the others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import peers_tables, peers_venv
from benchmarks.peers_bars import DENSE, FROM_DISK, ONE_PASS, OURS, PEER, bars
from benchmarks.peers_judge import Judge, agreement, weights_of
from benchmarks.quality import DOCS, ROOT, data_root
from benchmarks.quality_cell import split_stories
from benchmarks.quality_variants import PATHS, find_models
from llmprune.devices import environment
from llmprune.io.models import BUNDLED_PATH, load_tokenizer
from llmprune.io.text import load_calibration, load_evaluation
from llmprune.spec import BUNDLED_MODEL, PruneConfig

RESULTS = Path(__file__).parent / "results" / "peers.json"
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    PEER: (PEER, {}),
    OURS: ("llmprune", {}),
    FROM_DISK: ("llmprune", {"offload": "disk"}),
    ONE_PASS: ("llmprune", {"sequential": "group"}),
    DENSE: ("llmprune", {"sequential": "none", "offload": "disk", "statistics_cache": False}),
}
METHODS = ("wanda", "sparsegpt")
TARGETS: dict[str, dict[str, Any]] = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
DAMPING = 0.01
WIDTHS = {
    "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8,
    "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
WIDE, DEEP = "random-27M", "random-190M"
"""Of few blocks and many tokens, where time is the work's; of many blocks and few tokens, where memory is the weights'."""
RANDOM_BLOCKS = {WIDE: 2, DEEP: 16}
RANDOM_SAMPLES = {WIDE: 16, DEEP: 2}
RANDOM_EVAL, RANDOM_LEN = 4, 512
MAX_EVAL_TOKENS = 8192
LIMIT_SECONDS = 1800.0
NICENESS = -5
"""Of measured processes, where that is allowed: what else the machine does then disturbs them less."""

Results = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model to prune: its folder, calibration and held-out tokens [N, S], and whether their loss means something."""

    name: str
    folder: Path
    calibration_NS: Tensor
    held_out_NS: Tensor
    about: str
    is_trained: bool
    targets: Sequence[str]
    methods: Sequence[str] = METHODS


def add_options(parser: argparse.ArgumentParser) -> None:
    """What only this benchmark takes."""
    group = parser.add_argument_group("peers", "and --models, --fresh and --tables of the others")
    group.add_argument("--repeats", type=int, default=3, help="runs of each tool in a cell of the random model (3)")
    group.add_argument("--threads", type=int, default=1, help="of each run (1)")


def run(console: Console, options: argparse.Namespace) -> bool:
    """Measure what has no result yet, write the tables; False, for what is not met is a result too."""
    results: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cells": {}, "models": {}}
    if not options.tables:
        console.print("Making the environment of both tools, where it is not there yet: minutes, hundreds of megabytes.")
        interpreter = peers_venv.python()
        with tempfile.TemporaryDirectory() as temporary:
            for subject in subjects(Path(temporary)):
                if not options.models or subject.name in options.models.split(","):
                    _measure(console, subject, interpreter, Path(temporary), results, options)
    if results["cells"]:
        (DOCS / "peers.md").write_text(peers_tables.page(results), encoding="utf-8")
        for bar in bars(results):
            console.print(f"{bar.verdict:12s} {bar.text}", highlight=False, markup=False, soft_wrap=True)
    return False


def _measure(
    console: Console, subject: Subject, interpreter: Path, work: Path, results: Results, options: argparse.Namespace
) -> None:
    repeats = 1 if subject.is_trained else options.repeats  # small models say nothing of time
    keys = {(method, target): f"{subject.name}/{method}/{target}" for method in subject.methods for target in subject.targets}
    done = (
        {}
        if options.fresh
        else {key: cell for key, cell in results["cells"].items() if CONTESTANTS.keys() == cell["contestants"].keys()}
    )
    open_keys = {cell: key for cell, key in keys.items() if key not in done or num_runs(done[key]) < repeats}
    if not open_keys:
        return
    judge = Judge(str(subject.folder), subject.held_out_NS)
    results["models"][subject.name] = {
        "about": subject.about, "samples": list(subject.calibration_NS.shape), "is_trained": subject.is_trained,
        "losses": judge.losses,
    }  # fmt: skip
    results["environment"] = environment(torch.device("cpu")).model_dump(mode="json")
    results["versions"] = _versions(interpreter)
    for (method, target), key in open_keys.items():
        setting = Setting(subject, method, target, interpreter, work, options.threads)
        found = results["cells"][key] = measure_cell(setting, judge, done.get(key), repeats)
        new = RESULTS.with_suffix(".tmp")
        new.write_text(json.dumps(results, indent=1) + "\n")
        new.replace(RESULTS)
        console.print(f"{key}: {peers_tables.line(found)}", highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Setting:
    """What all runs of a cell share."""

    subject: Subject
    method: str
    target: str
    interpreter: Path
    work: Path
    threads: int

    def run(self, name: str, out: Path) -> dict[str, Any]:
        """One run of a contestant."""
        tokens = self.work / "tokens.pt"
        torch.save(self.subject.calibration_NS, tokens)
        tool, fields = CONTESTANTS[name]
        job = {
            "tool": tool, "model": str(self.subject.folder), "method": self.method, "damping": DAMPING, "tokens": str(tokens),
            "out": str(out), "target": TARGETS[self.target], "fields": fields,
        }  # fmt: skip
        return run_tool(self.interpreter, job, self.work, self.threads)


def num_runs(cell: dict[str, Any]) -> int:
    """Of every contestant, as they take turns."""
    return len(cell["contestants"][PEER]["runs"])


def measure_cell(setting: Setting, judge: Judge, before: dict[str, Any] | None, repeats: int) -> dict[str, Any]:
    """The runs of a cell that are missing; of the first ones, what the checkpoints are worth, and where the masks agree."""
    cell = before or {"threads": setting.threads, "contestants": {name: {"runs": []} for name in CONTESTANTS}}
    weights = {}
    for number in range(num_runs(cell), repeats):
        for name in list(CONTESTANTS)[:: -1 if number % 2 else 1]:
            out, found = setting.work / "out", cell["contestants"][name]
            found["runs"].append(setting.run(name, out))
            if "quality" not in found:
                found["quality"] = judge.quality(out)
                weights[name] = weights_of(out, judge.sites)
            shutil.rmtree(out)
    if "agreement" not in cell:
        cell["agreement"] = agreement(weights[OURS], weights[PEER])
    return cell


def run_tool(interpreter: Path, job: dict[str, Any], work: Path, threads: int) -> dict[str, Any]:
    """One run: what each phase took.

    Raises RuntimeError with the end of what the process said, where it failed.
    """
    result = work / "result.json"
    environ = {
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "service", "triton_kernels")),
    }  # fmt: skip
    done = subprocess.run(
        [interpreter, "-m", "benchmarks.peers_cell", result], input=json.dumps(job), cwd=ROOT, env={**os.environ, **environ},
        capture_output=True, text=True, timeout=LIMIT_SECONDS, preexec_fn=_hurry,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{job['tool']} failed on {job['model']}:\n{done.stderr[-2000:]}")
    return json.loads(result.read_text())


def _hurry() -> None:
    with suppress(OSError):
        os.nice(NICENESS)


def _versions(interpreter: Path) -> dict[str, str]:
    names = ("torch", "transformers", "llmcompressor")
    code = f"import importlib.metadata as m, json; print(json.dumps({{name: m.version(name) for name in {names}}}))"
    return json.loads(subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True).stdout)


def subjects(temporary: Path) -> Iterator[Subject]:
    """Models of stock classes: the random ones, the bundled one, and those of the folder of `make bench-quality`."""
    yield random_model(WIDE, temporary)
    yield replace(random_model(DEEP, temporary), targets=["50 %"], methods=["wanda"])
    root = data_root()
    for model in find_models(root):
        if "trust_remote_code" in model.fields:
            continue
        fields = dict(model.fields)
        if model.name != BUNDLED_MODEL:
            fields |= {name: str((root / fields[name]).resolve()) for name in PATHS}
        texts = {fields[name] for name in ("calibration", "eval") if Path(fields[name]).is_file()}
        copies = split_stories(map(Path, sorted(texts)), temporary)
        fields = {name: copies.get(value, value) if isinstance(value, str) else value for name, value in fields.items()}
        config = PruneConfig.build(**fields)
        folder = BUNDLED_PATH if model.name == BUNDLED_MODEL else Path(fields["model"])
        tokenizer = load_tokenizer(folder, config)
        seq_len = fields["seq_len"]
        how = {"num_samples": fields["num_samples"], "seq_len": seq_len, "seed": config.seed}
        calibration = load_calibration(fields["calibration"], tokenizer, **how)
        held_out = load_evaluation(fields["eval"], tokenizer, seq_len=seq_len, max_tokens=MAX_EVAL_TOKENS)
        about = (
            f"calibrated on {model.fields['calibration']}, judged on {held_out.ids_NS.numel()} tokens of {model.fields['eval']}"
        )
        targets = [target for target in TARGETS if target not in model.skip]
        yield Subject(model.name, folder, calibration.ids_NS, held_out.ids_NS, about, True, targets)


def random_model(name: str, temporary: Path) -> Subject:
    """A Llama of random weights, wide enough for matrix products to take nearly all of the time."""
    torch.manual_seed(0)
    folder, num_blocks, num_samples = temporary / name, RANDOM_BLOCKS[name], RANDOM_SAMPLES[name]
    config = AutoConfig.for_model("llama", num_hidden_layers=num_blocks, **WIDTHS)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for file in BUNDLED_PATH.glob("tokenizer*"):
        shutil.copy(file, folder)
    tokens_NS = torch.randint(WIDTHS["vocab_size"], (num_samples + RANDOM_EVAL, RANDOM_LEN))
    about = (
        f"a Llama of random fp32 weights, {num_blocks} blocks, hidden {WIDTHS['hidden_size']}, FFN "
        f"{WIDTHS['intermediate_size']}, on random tokens"
    )
    calibration_NS, held_out_NS = tokens_NS[:num_samples].clone(), tokens_NS[num_samples:].clone()
    return Subject(name, folder, calibration_NS, held_out_NS, about, False, list(TARGETS))
