"""The commands and the Python of the pages, run: on tiny models, in this process, the blocks of a page one after the other.

What a page says is changed in these ways alone:

- `MODEL`, `demo` and names of the hub are a random Llama of two blocks, of eight where whole blocks go; `MOE` mixes experts;
- texts, by name or file, are a file of a few thousand words;
- numbers of samples, steps, tokens and seconds are at most those of LIMITS, and a command has the options of QUICK in any case;
- of the values of a sweep there are two methods, and one of the others;
- an output of an earlier command of the page gives way to one of the same name, unless the command says `--resume`;
- `DIR`, `DIR2`, `pruned` and `pruned-packed` are there when a page begins, as a page may tell of what another one has made;
- lm-evaluation-harness is played by a stand-in;
- Python finds the names of the fixture `names`, and its calls of the library have the fields of QUICK_FIELDS.

Blocks that need a service are run by tests/service/test_docs_service.py.
"""

from __future__ import annotations

import io
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
import tiny
from documented import PAGES, ROOT, Command, blocks
from harness import StandIn
from llmprune import api
from llmprune.engines import icbs
from llmprune.engines.icbs import RefineSettings
from scripts.docs_reference import commands
from tests.conftest import Outcome

LIMITS: dict[str, float] = {
    "--num-samples": 8, "--seq-len": 32, "--max-eval-tokens": 512, "--steps": 2, "--max-new-tokens": 8, "--seconds": 0.5,
    "--prefill-tokens": 16, "--batch-sizes": 1, "--reconstruct-rounds": 2, "--icbs-passes": 2, "--evolution-generations": 2,
    "--evolution-offspring": 4, "--reconstruct-steps": 4, "--tyr-iterations": 1, "--tyr-generations": 1, "--tyr-offspring": 2,
    "--batch-size": 2, "--icbs-block-size": 32, "--icbs-layers-per-step": 2, "--icbs-sequences": 2,
}  # fmt: skip
"""Options of the commands, and the most that they are given here."""
VALUES = {"--methods": 2, "--patterns": 1, "--sparsities": 1, "--allocations": 1, "--efforts": 1}
"""Options of sweeps, and how many of their values are tried here."""
QUICK: dict[str, list[str]] = {
    "prune": ["--num-samples", "--seq-len", "--max-eval-tokens", "--no-latency", "--no-prompt"],
    "sweep": ["--num-samples", "--seq-len", "--max-eval-tokens", "--no-latency", "--no-prompt"],
    "auto": [
        "--num-samples",
        "--seq-len",
        "--max-eval-tokens",
        "--no-prompt",
        "--methods=wanda",
        "--patterns=unstructured",
        "--step=0.2",
    ],
    "plan": ["--num-samples", "--seq-len", "--max-eval-tokens"],
    "evaluate": ["--seq-len", "--max-eval-tokens", "--no-latency"],
    "recover": ["--num-samples", "--seq-len", "--max-eval-tokens", "--steps", "--batch-size"],
    "benchmark": ["--seconds", "--prefill-tokens", "--batch-sizes"],
    "generate": ["--max-new-tokens"],
}
"""Options that a command gets where the page does not give them, with a value or the one of LIMITS."""
QUICK_IF: dict[str, list[str]] = {
    "tyr": ["--tyr-iterations", "--tyr-generations", "--tyr-offspring"],
    "icbs": ["--icbs-passes", "--icbs-block-size", "--icbs-layers-per-step", "--icbs-sequences"],
    "evolution": ["--evolution-generations", "--evolution-offspring"],
    "--reconstruct": ["--reconstruct-steps"],
    "balanced": ["--reconstruct-steps"],
}
"""Options that a pruning gets where it names a method, allocation, option or effort."""
QUICK_FIELDS: dict[str, Any] = {**tiny.QUICK, "dtype": "float32"}
HUB = re.compile(r"^[\w-]+/[\w.-]+$")
TEXTS = ("--calibration", "--eval", "--data")
KEPT = ("synthetic", "none")
COMMANDS = {name.removeprefix("llmprune "): command for name, command in commands()}


@pytest.fixture(scope="module")
def made(tiny_model_dir: Path, text_file: Path, eval_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2:4 checkpoint and the same packed."""
    folder = tmp_path_factory.mktemp("made")
    texts = {"calibration": str(text_file), "eval": str(eval_file)}
    llmprune.prune(tiny_model_dir, pattern="2:4", out=folder / "pruned", **texts, **tiny.QUICK)
    llmprune.convert(folder / "pruned", to="packed")
    shutil.copytree(folder / "pruned", folder / "DIR")
    llmprune.prune(tiny_model_dir, method="magnitude", out=folder / "DIR2", **texts, **tiny.QUICK)
    (folder / "DIR" / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def deep_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of which an eighth of the blocks is one."""
    return tiny.save(tiny.make_model(num_hidden_layers=8), tmp_path_factory.mktemp("models") / "deep")


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page's commands are run."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.fixture
def names(tiny_model_dir: Path, text_file: Path) -> dict[str, Any]:
    """What Python on a page may take for granted: a model, its tokenizer, token ids, and layers."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = torch.tensor(tokenizer(text_file.read_text())["input_ids"])
    linear = nn.Linear(64, 32, bias=True)
    linear.weight.data.view(-1, 4)[:, 2:] = 0
    conv1d = nn.Module()
    conv1d.weight, conv1d.bias = nn.Parameter(linear.weight.T.detach().clone()), linear.bias
    return {
        "model": AutoModelForCausalLM.from_pretrained(tiny_model_dir), "tokenizer": tokenizer,
        "ids_NS": ids[: 16 * 32].view(16, 32), "held_out_NS": ids[16 * 32 : 20 * 32].view(4, 32),
        "weight": linear.weight.detach().clone(), "linear": linear, "conv1d": conv1d, "device": "cpu",
    }  # fmt: skip


@pytest.fixture
def quick_python(tiny_model_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's functions, with fewer samples, on a tiny model and a file's text."""

    def quicken(function: Callable[..., Any], **replaced: Any) -> Callable[..., Any]:
        def call(model: Any = None, *arguments: Any, **given: Any) -> Any:
            model = str(tiny_model_dir) if isinstance(model, str) and (model == "demo" or HUB.match(model)) else model
            if "out" in given:
                shutil.rmtree(given["out"], ignore_errors=True)
            against = {"against": str(tiny_model_dir)} if given.get("against") == "demo" else {}
            return function(model, *arguments, **{**given, **replaced, **against})

        return call

    evaluation = {name: QUICK_FIELDS[name] for name in ("seq_len", "max_eval_tokens", "latency")}
    texts = {"calibration": str(text_file), "eval": str(text_file)}
    for name, replaced in {
        "prune": {**QUICK_FIELDS, **texts}, "prune_iter": {**QUICK_FIELDS, **texts}, "sweep": {**QUICK_FIELDS, **texts},
        "evaluate": {**evaluation, "eval": str(text_file)}, "generate": {"max_new_tokens": 8}, "load": {},
    }.items():  # fmt: skip
        monkeypatch.setattr(api, name, quicken(getattr(api, name), **replaced))
    few = {"num_epochs": 1, "steps_per_epoch": 2, "block_size": 32}
    monkeypatch.setattr(icbs, "RefineSettings", lambda **given: RefineSettings(**{**given, **few}))


@pytest.fixture
def change(tiny_model_dir: Path, deep_model_dir: Path, moe_model_dir: Path, text_file: Path) -> Callable[[Command], list[str]]:
    """The arguments of a command, as they are given here."""

    def arguments(command: Command) -> list[str]:
        model = deep_model_dir if "blocks" in command.words else tiny_model_dir
        models = {"MODEL": model, "demo": model, "MOE": moe_model_dir}
        words = [str(models.get(word, model if HUB.match(word) else word)) for word in command.words[1:]]
        for place, word in enumerate(words[:-1]):
            if word in TEXTS and words[place + 1] not in KEPT:
                words[place + 1] = str(text_file)
            elif word in VALUES:
                words[place + 1] = ",".join(words[place + 1].split(",")[: VALUES[word]])
            elif word in LIMITS and words[place + 1] != "none":
                words[place + 1] = _limited(word, words[place + 1])
        added = [*QUICK.get(words[0], ()), *(option for word in words for option in QUICK_IF.get(word, ()))]
        known = {name for option in COMMANDS[words[0]].params for name in (*option.opts, *option.secondary_opts)}
        for option in dict.fromkeys(added):
            name = option.partition("=")[0]
            if name not in words and name in known:
                words += [option, _limited(option, "inf")] if option in LIMITS else [option]
        for option in TEXTS:
            if option in known and option not in words and "--no-eval" not in words:
                words += [option, str(text_file)]
        return words

    return arguments


def _limited(option: str, value: str) -> str:
    """The number, or the first of several, or the limit where that is less."""
    least = min(float(value.split(",")[0]), LIMITS[option])
    return f"{least:g}"


def _clear(arguments: list[str]) -> None:
    """Take away what the command is about to make."""
    out = next((value for option, value in itertools.pairwise(arguments) if option in ("--out", "-o")), None)
    if arguments[0] == "convert" and out is None:
        out = f"{arguments[1].removesuffix('-packed')}-{arguments[arguments.index('--to') + 1]}"
    if out and "--resume" not in arguments and arguments[0] in ("prune", "recover", "convert", "auto"):
        assert not Path(out).is_absolute()
        shutil.rmtree(out, ignore_errors=True)


def needs_running(page: Path) -> bool:
    return any(block.language in ("sh", "python") and not block.excuse and not block.needs_service for block in blocks(page))


@pytest.mark.parametrize("page", list(filter(needs_running, PAGES)), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_the_page_says_works(
    page: Path,
    place: Path,
    names: dict[str, Any],
    quick_python: None,
    change: Callable[[Command], list[str]],
    cli: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every command ends with exit code 0, and Python raises nothing."""
    StandIn(monkeypatch, "hellaswag", "piqa", "arc_easy")
    done = 0
    for block in blocks(page):
        if block.excuse or block.needs_service or block.language not in ("sh", "python"):
            continue
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), names)
            done += 1
            continue
        for command in block.commands:
            arguments = change(command)
            _clear(arguments)
            for name, value in command.environment.items():
                monkeypatch.setenv(name, value)
            monkeypatch.setattr("sys.stdin", io.StringIO(command.stdin or ""))
            outcome = cli(*arguments)
            assert outcome.code == 0, f"{block}: {' '.join(arguments)}\n{outcome.err}"
            done += 1
    assert done
