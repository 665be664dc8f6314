"""A Llama of 8 B random weights, dense and packed 2:4: decode at batch 1 in a CUDA graph with a static cache, and prefill."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache

from llmprune_kernels import SparseLinear24, fuse_siblings_, tuning

LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
CONTEXT = 128
PREFILL = (128, 2048)
STEPS = 32
WARM_UPS = 3
Seconds = Callable[[Callable[[], object]], float]


@torch.no_grad()
def run(
    device: torch.device, seconds_of: Seconds, *, fields: dict[str, int] | None = None, context: int = CONTEXT,
    prefill: tuple[int, ...] = PREFILL, steps: int = STEPS, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Times of the dense model, then of the same model pruned and packed; the packed one must give the pruned one's logits."""
    model = make(device, fields or LLAMA_8B)
    result: dict[str, Any] = {"shape": fields or LLAMA_8B, "context": context, "steps": steps}
    result["dense"] = measure(model, seconds_of, context, prefill, steps)
    say(f"dense   {_describe(result['dense'])}")
    prune_(model)
    ids_BS = _ids(model, context)
    wanted = model(input_ids=ids_BS).logits[:, -1].float()
    pack_(model)
    logits = model(input_ids=ids_BS).logits[:, -1].float()
    result["logits_error"] = ((logits - wanted).norm() / wanted.norm()).item()
    result["fused_groups"] = fuse_siblings_(model)
    fused = model(input_ids=ids_BS).logits[:, -1].float()
    result["fused_logits_error"] = ((fused - wanted).norm() / wanted.norm()).item()
    result["packed"] = measure(model, seconds_of, context, prefill, steps)
    say(f"packed  {_describe(result['packed'])}")
    result["speedups"] = {
        name: result["dense"][name] / result["packed"][name]
        for name in result["dense"]
        if name.endswith("seconds") and result["packed"].get(name)
    }
    return result


def make(device: torch.device, fields: dict[str, int]) -> PreTrainedModel:
    """Random weights in bf16, made where they are used."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False).to(device)


def prune_(model: PreTrainedModel) -> None:
    """Keep the two larger of every four inputs in all layers of the blocks."""
    for _, _, linear in _linears(model):
        linear.weight.copy_(tuning.two_largest_of_four(linear.weight))


def pack_(model: PreTrainedModel) -> None:
    """Replace them by packed layers, one at a time."""
    for parent, name, linear in _linears(model):
        setattr(parent, name, SparseLinear24.from_linear(linear))


def _linears(model: PreTrainedModel) -> list[tuple[nn.Module, str, nn.Linear]]:
    return [
        (parent, name, child)
        for parent in model.base_model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]


def measure(model: PreTrainedModel, seconds_of: Seconds, context: int, prefill: tuple[int, ...], steps: int) -> dict[str, Any]:
    """Seconds per token of decode and per prompt of prefill, and the memory of the weights."""
    found: dict[str, Any] = {"weight_bytes": sum(parameter.nbytes for parameter in model.parameters())}
    step, reset, is_graph = decode_step(model, context, steps)

    def decode() -> None:
        reset()
        for _ in range(steps):
            step()

    found["decode_seconds"] = seconds_of(decode) / steps
    found["decode_in_graph"] = is_graph
    for num_tokens in prefill:
        ids_BS = _ids(model, num_tokens)
        forward = lambda ids_BS=ids_BS: model(input_ids=ids_BS, use_cache=False, logits_to_keep=1)
        found[f"prefill_{num_tokens}_seconds"] = seconds_of(captured(forward, model.device) or forward)
    return found


def decode_step(model: PreTrainedModel, context: int, steps: int) -> tuple[Callable[[], Any], Callable[[], None], bool]:
    """A step that generates one token greedily, what puts the cache back after the prompt, and whether it is a CUDA graph."""
    cache = StaticCache(config=model.config, max_cache_len=context + max(steps, WARM_UPS) + 1)
    output = model(input_ids=_ids(model, context), past_key_values=cache, use_cache=True, logits_to_keep=1)
    first_B1: Tensor = output.logits[:, -1:].argmax(-1)
    token_B1 = first_B1.clone()
    lengths = [(layer.cumulative_length, layer.cumulative_length.clone()) for layer in cache.layers]

    def step() -> None:
        logits = model(input_ids=token_B1, past_key_values=cache, use_cache=True).logits
        token_B1.copy_(logits[:, -1:].argmax(-1))

    def reset() -> None:
        token_B1.copy_(first_B1)
        for length, before in lengths:
            length.copy_(before)

    replay = captured(step, model.device)
    return replay or step, reset, replay is not None


def captured(work: Callable[[], object], device: torch.device) -> Callable[[], None] | None:
    """The work as a CUDA graph; None, with a warning, where it cannot be captured."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        warnings.warn(f"no CUDA graph, so that the times are those of launching too: {error}", stacklevel=2)
        torch.cuda.synchronize()
        return None
    return lambda: graph.replay()


def event_seconds(work: Callable[[], object], repeats: int = 7) -> float:
    """Median of the times of a CUDA device, after two runs that do not count."""
    times = []
    for _ in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def _ids(model: PreTrainedModel, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(model.config.vocab_size, (1, num_tokens), generator=generator).to(model.device)


def _describe(times: dict[str, Any]) -> str:
    prefill = ", ".join(
        f"{name.removesuffix('_seconds')} {value * 1e3:.1f} ms" for name, value in times.items() if "fill" in name
    )
    decode = f"decode {times['decode_seconds'] * 1e3:.2f} ms a token ({'' if times['decode_in_graph'] else 'no '}CUDA graph)"
    return f"{decode}, {prefill}, weights {times['weight_bytes'] / 1e9:.2f} GB"
