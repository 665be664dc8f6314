"""``llmprune convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from llmprune.cli_options import (
    EventsFile,
    Json,
    Model,
    Revision,
    TrustRemoteCode,
    check_streams,
    event_sink,
    follow,
    heavy_imports,
    show,
)
from llmprune.events import Converted
from llmprune.spec import BUNDLED_MODEL, Export, PackFormat
from llmprune.tables import print_conversion

_TO = "packed: sparse weights in fewer bytes; dense: ordinary tensors, for any engine."
_OUT = "New directory; default: MODEL's name with -packed or -dense, beside it."
_FORMAT = "How weights are packed: 2:4, bitmask, or auto, which chooses by their zeros."


def convert(
    model: Model = BUNDLED_MODEL,
    to: Annotated[str, typer.Option("--to", help=_TO)] = "packed",
    out: Annotated[Path | None, typer.Option("--out", "-o", help=_OUT)] = None,
    format: Annotated[str, typer.Option("--format", help=_FORMAT)] = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = None,
    events: EventsFile = None,
    as_json: Json = False,
) -> None:
    """Pack the sparse weights of MODEL, or make a packed one dense; every bit is kept."""
    check_streams(events, as_json)
    with event_sink(events) as sink:
        with heavy_imports():
            from llmprune.conversion import convert_iter
        run = convert_iter(
            model, to=cast(Export, to), out=out, format=cast(PackFormat, format), revision=revision,
            trust_remote_code=bool(trust_remote_code),
        )  # fmt: skip
        last = follow(run, sink)
    assert isinstance(last, Converted)
    if events != "-":
        show(last.conversion, as_json, print_conversion)
        if not as_json:
            typer.echo(f"Checkpoint   {Path(last.conversion.out).resolve()}")
