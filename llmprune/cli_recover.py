"""``llmprune recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from llmprune.cli_options import EventsFile, Json, NoEval, check_streams, event_sink, follow, heavy_imports, show
from llmprune.console import printable
from llmprune.events import Recovered
from llmprune.io.render import count, duration, number, percent
from llmprune.processes import is_first
from llmprune.recovery_spec import RecoverConfig
from llmprune.report import Recovery
from llmprune.terminal import add_row, make_table


def _option(field: str, *names: str) -> Any:
    """An option whose help is the field's own description."""
    default = RecoverConfig.model_fields[field].default
    return typer.Option(*names, help=RecoverConfig.model_fields[field].description, show_default=str(default or False))


def recover(
    model: Annotated[str, typer.Argument(help=RecoverConfig.model_fields["model"].description)],
    out: Annotated[Path, typer.Option("--out", "-o", help="New directory for the recovered checkpoint.")],
    data: Annotated[str | None, _option("data", "--data")] = None,
    teacher: Annotated[str | None, _option("teacher", "--teacher")] = None,
    distill: Annotated[float | None, _option("distill", "--distill")] = None,
    mode: Annotated[str | None, _option("mode", "--mode")] = None,
    rank: Annotated[int | None, _option("rank", "--rank")] = None,
    steps: Annotated[int | None, _option("steps", "--steps")] = None,
    lr: Annotated[float | None, _option("lr", "--lr")] = None,
    batch_size: Annotated[int | None, _option("batch_size", "--batch-size")] = None,
    accumulate: Annotated[int | None, _option("accumulate", "--accumulate")] = None,
    num_samples: Annotated[int | None, _option("num_samples", "--num-samples")] = None,
    seq_len: Annotated[int | None, _option("seq_len", "--seq-len")] = None,
    eval: Annotated[list[str] | None, _option("eval", "--eval", "-e")] = None,
    no_eval: NoEval = False,
    max_eval_tokens: Annotated[int | None, _option("max_eval_tokens", "--max-eval-tokens")] = None,
    device: Annotated[str | None, _option("device", "--device")] = None,
    dtype: Annotated[str | None, _option("dtype", "--dtype")] = None,
    seed: Annotated[int | None, _option("seed", "--seed")] = None,
    revision: Annotated[str | None, _option("revision", "--revision")] = None,
    trust_remote_code: Annotated[bool | None, _option("trust_remote_code", "--trust-remote-code")] = None,
    events: EventsFile = None,
    as_json: Json = False,
) -> None:
    """Train the pruned MODEL back towards the dense one; its zeros and shapes stay.

    By default low-rank updates learn the outputs of the model that was pruned, on the text that it was calibrated on; they are
    merged in the end, without filling a zero. Under `accelerate launch -m llmprune recover ...` several devices share the work.
    """
    fields = {name: value for name, value in locals().items() if name in RecoverConfig.model_fields}
    fields["eval"] = () if no_eval else tuple(eval) if eval else None
    check_streams(events, as_json)
    first = is_first()  # of several processes one speaks
    with event_sink(events if first else None) as sink:
        with heavy_imports():
            from llmprune.recovery import recover_iter
        run = recover_iter(fields.pop("model"), out=out, **fields)
        last = follow(run, sink) if first else list(run)[-1]
    assert isinstance(last, Recovered)
    if events != "-" and first:
        show(last.recovery, as_json, print_recovery)


def print_recovery(recovery: Recovery, console: Console) -> None:
    """What it learnt from, the losses, what was kept, and the quality before and after."""
    config = recovery.config
    how = f"{config.mode}, rank {config.rank}" if config.mode == "lora" else config.mode
    console.print(Text(printable(f"{config.model}, recovered ({how})"), style="bold"))
    table = make_table("Perplexity", "dense", "pruned", "recovered", "KL before", "KL now")
    for before, after in zip(recovery.quality_before, recovery.quality_after, strict=True):
        add_row(
            table, printable(before.text.source), number(before.perplexity_dense), number(before.perplexity_pruned),
            number(after.perplexity_pruned), number(before.kl, 4), number(after.kl, 4),
        )  # fmt: skip
    if recovery.quality_after:
        console.print(table)
    facts = (
        f"Held-out loss {recovery.loss_before:.4f} -> {recovery.loss_after:.4f} in {count(recovery.points[-1].step)} steps, "
        f"{duration(recovery.seconds)}; {count(recovery.num_trained)} numbers trained",
        f"Sparsity {percent(recovery.sparsity_before)} before, {percent(recovery.sparsity_after)} now",
        f"Teacher {recovery.teacher or 'none'}; text {recovery.text.source}",
    )
    for line in facts:
        console.print(Text(printable(line)), soft_wrap=True)
    if recovery.out is not None:
        console.print(Text(f"Checkpoint {printable(str(Path(recovery.out).resolve()))}"), soft_wrap=True)
