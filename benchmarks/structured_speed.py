"""Time of a model with smaller matrices against the dense one, in turns, in one process and on one thread of a CPU.

python -m benchmarks.structured_speed RESULT FOLDER

The first groups stay, as weights do not matter for time. Beside the models of FOLDER there are random ones, large enough for
matrix products to take nearly all of the time.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.structured_variants import models
from llmprune.anatomy.blocks import find_stack
from llmprune.devices import environment
from llmprune.errors import ConfigError
from llmprune.io.models import load_model, resolve
from llmprune.measure.points import Subject, measure_points
from llmprune.spec import BUNDLED_MODEL, PruneConfig
from llmprune.speed import Protocol
from llmprune.structured.budget import Budget
from llmprune.structured.sizes import num_parameters
from llmprune.structured.slicing import Cut, slice_
from llmprune.structured.uniform import closest, uniform_widths
from llmprune.structured.units import find_units
from llmprune.structured.widths import uniform_counts

RANDOM = {"random, hidden 512": (512, 1536, 8, 8), "random, hidden 1024": (1024, 2816, 4, 16)}
"""Hidden size, FFN width, blocks, and heads, of which two share a key and a value."""
CUTS = tuple((widths, sparsity) for sparsity in (0.25, 0.5) for widths in ("free", "uniform"))
PROTOCOL = Protocol(
    prefill_tokens=(512,), batch_sizes=(1, 8), context=16, decode_tokens=8, repeats=15, seconds=75.0, layer_tokens=()
)
CPU = torch.device("cpu")


def random_llama(hidden: int, ffn: int, blocks: int, heads: int) -> PreTrainedModel:
    """Of a vocabulary so small that the blocks are nearly all of it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=512, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=heads // 2, max_position_embeddings=1024,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def block_parameters(model: PreTrainedModel) -> int:
    """Parameters of the decoder blocks."""
    return sum(parameter.numel() for block in find_stack(model).blocks for parameter in block.parameters())


def sliced(dense: PreTrainedModel, widths: str, sparsity: float) -> PreTrainedModel:
    """A copy of a model without about this share of its modules' parameters: the same widths in every layer, or widths that
    fall from one and a half times to half of it from the first block to the last.

    Raises:
        ConfigError: that share cannot go.
    """
    model = copy.deepcopy(dense)
    stack = find_stack(model)
    modules = list(find_units(model, stack).modules)
    if widths == "uniform":
        heads = uniform_counts(model, next(module for module in modules if module.kind == "attention"))
        counts = closest(uniform_widths(Budget.of(modules, sparsity, "parameters"), heads), modules, sparsity).removed(modules)
    else:
        steps = len(stack.blocks) - 1
        shares = [sparsity * (1.5 - module.block / steps) for module in modules]
        counts = [round(share * module.num_groups) for share, module in zip(shares, modules, strict=True)]
    for module, count in zip(modules, counts, strict=True):
        if count:
            slice_(model, module, Cut(torch.arange(module.num_groups - count)))
    return model


def measure(name: str, dense: PreTrainedModel) -> dict[str, Any]:
    """Every cut of one model against it; seconds of a point as median and quartiles."""
    found: dict[str, PreTrainedModel] = {"dense": dense}
    for widths, sparsity in CUTS:
        try:
            found[f"{widths}, {sparsity:.0%}"] = sliced(dense, widths, sparsity)
        except ConfigError:  # heads of too few counts, say
            continue
    subjects = [Subject(cut, model, 1.0) for cut, model in found.items()]
    # Seconds in which this thread had a processor: what else the machine does is not of the models.
    for _ in measure_points(subjects, PROTOCOL, seconds=PROTOCOL.seconds, done=0, total=0, clock=time.thread_time):
        pass
    sizes = {cut: (num_parameters(model), block_parameters(model)) for cut, model in found.items()}
    rows = []
    for subject in subjects:
        for speed in subject.speeds:
            tokens = speed.batch_size * speed.num_tokens
            rows.append(
                {
                    "model": name, "cut": subject.name, "phase": speed.phase, "batch_size": speed.batch_size,
                    "num_tokens": speed.num_tokens, "repeats": speed.repeats, "seconds": tokens / speed.tokens_per_second,
                    "quartiles": [tokens / speed.quartiles[1], tokens / speed.quartiles[0]],
                    "num_parameters": sizes[subject.name][0], "block_parameters": sizes[subject.name][1],
                }
            )  # fmt: skip
    return {"rows": rows}


def subjects_of(root: Path) -> Iterator[tuple[str, PreTrainedModel]]:
    """The models of a folder, and the random ones."""
    for model in models(root):
        fields = {key: model.fields[key] for key in ("model", "dtype", "trust_remote_code") if key in model.fields}
        if model.name != BUNDLED_MODEL:
            fields["model"] = str((root / fields["model"]).resolve())
        config = PruneConfig.build(**fields)
        yield model.name, load_model(resolve(config), config, CPU)
    for name, sizes in RANDOM.items():
        yield name, random_llama(*sizes)


def main() -> None:
    """Measure, and write a JSON file."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, dense in subjects_of(Path(sys.argv[2])):
        rows += measure(name, dense)["rows"]
    result = {"rows": rows, "environment": environment(CPU).model_dump(mode="json")}
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
