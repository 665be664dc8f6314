"""Calibration and evaluation text: from the name a user gives to windows of token ids, with a report of what they are.

    c4, wikitext2, ptb                     the field's data sets under the field's protocols
    stdlib                                 the running Python's standard library: no download
    synthetic                              sampled from the model itself: no download, calibration only
    hf:NAME[:CONFIG][:SPLIT][:COLUMN]      any dataset of the hub, or a local directory `datasets` can load
    a path                                 a text file, .jsonl, .parquet, or a directory of them

Importing this module, and ``check_source``, need no torch. N sequences, S tokens in each.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.errors import TextError
from llmprune.io import text_files, text_hub, text_protocols
from llmprune.io.stdlib_text import stdlib_documents
from llmprune.report import TextReport

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase as Tokenizer

NAMES = ("c4", "wikitext2", "ptb", "stdlib", "synthetic")
C4_EVALUATION_DOCUMENTS = 1100
C4_EVALUATION_WINDOWS = 256


@dataclass(frozen=True)
class TokenSet:
    """Token ids, int64 [num_sequences, seq_len] on the CPU, and the report of where they are from."""

    ids_NS: Tensor
    report: TextReport


@dataclass(frozen=True)
class _Documents:
    """What a source holds: its documents, how a sentence refers to them, and anything the report must add."""

    documents: Sequence[str]
    split: str
    called: str
    separator: str = "\n\n"
    note: str = ""


def check_source(source: str, *, evaluation: bool = False) -> None:
    """Raise TextError where a source is unknown, a path is missing, or it cannot serve for evaluation."""
    if evaluation and source == "synthetic":
        raise TextError(
            "text the model sampled itself cannot evaluate it: 'synthetic' is for calibration only. "
            "Evaluate on stdlib, wikitext2 or a file of your own."
        )
    if source in NAMES:
        return
    if source.startswith("hf:"):
        text_hub.HubSource.parse(source)
    elif source and Path(source).expanduser().exists():
        text_files.list_files(Path(source).expanduser())
    else:
        raise TextError(_unknown(source))


def fetch(source: str, *, evaluation: bool) -> None:
    """Bring a text to this machine, so that loading it needs no network any more; nothing is tokenized. Raises TextError."""
    check_source(source, evaluation=evaluation)
    if source != "synthetic":
        _load(source, evaluation=evaluation)


def load_calibration(
    source: str, tokenizer: Tokenizer, *, num_samples: int, seq_len: int, seed: int, model: nn.Module | None = None
) -> TokenSet:
    """``num_samples`` calibration sequences; ``model`` is needed for the source ``synthetic`` alone.

    Raises TextError, and TextTooShort where the text does not hold enough tokens.
    """
    check_source(source)
    if source == "synthetic":
        if model is None:
            raise TextError("calibration text 'synthetic' is sampled from the model: pass model=, or use another text.")
        return sample_synthetic(model, tokenizer, num_samples=num_samples, seq_len=seq_len, seed=seed)
    text = _load(source, evaluation=False)
    how: dict[str, Any] = {"num_samples": num_samples, "seq_len": seq_len, "seed": seed, "source": text.called}
    note = text.note
    if source in ("c4", "stdlib"):
        windows = text_protocols.windows_of_documents(text.documents, tokenizer, **how)
        protocol = f"a random window of each of {num_samples} random documents longer than {seq_len} tokens"
    elif source in ("wikitext2", "ptb"):
        windows = text_protocols.windows_of_text(text.separator.join(text.documents), tokenizer, **how)
        protocol = f"{num_samples} random windows of the documents joined by {text.separator!r} and tokenized once"
    else:
        windows, thinned = text_protocols.windows_of_stream(text.documents, tokenizer, **how)
        protocol = (
            f"{num_samples} distinct random windows, in the order drawn, of the documents as one token stream, "
            f"each ended by {tokenizer.eos_token or 'nothing'}"
        )
        note += thinned
    return _token_set(windows, source, text.split, f"{text.called}: {protocol}, seed {seed}{note}.")


def load_evaluation(source: str, tokenizer: Tokenizer, *, seq_len: int, max_tokens: int | None = None) -> TokenSet:
    """Consecutive windows of an evaluation text, at most ``max_tokens`` tokens.

    Raises TextError; TextTooShort where the text does not fill a window; ConfigError where ``max_tokens`` does not.
    """
    check_source(source, evaluation=True)
    text = _load(source, evaluation=True)
    limits = [] if max_tokens is None else [max_tokens]
    if source == "c4":
        limits.append(C4_EVALUATION_WINDOWS * seq_len)
    limit = min(limits, default=None)
    windows = text_protocols.consecutive_windows(
        text.documents, text.separator, tokenizer, seq_len=seq_len, max_tokens=limit, source=text.called
    )
    first = "" if limit is None else f" of the first {limit} tokens"
    protocol = f"joined by {text.separator!r}, tokenized once, non-overlapping windows{first}"
    return _token_set(windows, source, text.split, f"{text.called}: {protocol}{text.note}.")


def sample_synthetic(
    model: nn.Module, tokenizer: Tokenizer, *, num_samples: int, seq_len: int, seed: int, batch_size: int = 16
) -> TokenSet:
    """Calibration sequences sampled from the model itself; the batch size changes speed and memory alone."""
    from llmprune.io.text_synthetic import sample_ids

    ids_NS = sample_ids(model, tokenizer, num_samples=num_samples, seq_len=seq_len, seed=seed, batch_size=batch_size)
    start = "a random token" if tokenizer.bos_token_id is None else str(tokenizer.bos_token)
    how = f"sampled by the model itself at temperature 1 from {start} on, not stopping at end tokens, seed {seed}."
    return _token_set(ids_NS, "synthetic", "generated", f"Text {how}")


def _load(source: str, *, evaluation: bool) -> _Documents:
    if source == "c4":
        if evaluation:
            documents = text_hub.read_c4("validation")[:C4_EVALUATION_DOCUMENTS]
            called = f"the first {C4_EVALUATION_DOCUMENTS} documents of C4's English validation shard 0 of 8"
            return _Documents(documents, "validation", called, " ")
        return _Documents(text_hub.read_c4("train"), "train", "C4's English train shard 0 of 1024")
    if source in ("wikitext2", "ptb"):
        split = "test" if evaluation else "train"
        if source == "ptb":
            return _Documents(text_hub.read_ptb(split), split, f"the Penn Treebank's {split} sentences", " ")
        return _Documents(text_hub.read_wikitext2(split), split, f"raw WikiText-2's {split} lines")
    if source == "stdlib":
        return _load_stdlib(evaluation=evaluation)
    if source.startswith("hf:"):
        parsed = text_hub.HubSource.parse(source)
        documents, split, note = text_hub.read_dataset(parsed, evaluation=evaluation)
        config = f", configuration {parsed.config}" if parsed.config else ""
        return _Documents(documents, split, f"dataset {parsed.name}{config}, split {split}", note=note)
    documents = text_files.read_documents(Path(source).expanduser())
    return _Documents(documents, "all", f"{len(documents)} document{'s' * (len(documents) != 1)} of {source}")


def _load_stdlib(*, evaluation: bool) -> _Documents:
    split = "held-out" if evaluation else "train"
    try:
        documents = stdlib_documents("held-out" if evaluation else "train")
    except FileNotFoundError as error:
        raise TextError(str(error)) from error
    called = f"the {split} files of Python {sys.version_info.major}.{sys.version_info.minor}'s standard library"
    return _Documents(documents, split, called)


def _token_set(windows: text_protocols.Windows | Tensor, source: str, split: str, description: str) -> TokenSet:
    import torch

    ids_NS = torch.as_tensor(windows, dtype=torch.int64)
    num_sequences, seq_len = ids_NS.shape
    report = TextReport(
        source=source,
        split=split,
        description=description[:1].upper() + description[1:],
        num_sequences=num_sequences,
        seq_len=seq_len,
        sha256=hashlib.sha256(ids_NS.numpy().astype("<i8").tobytes()).hexdigest(),
    )
    return TokenSet(ids_NS, report)


def _unknown(source: str) -> str:
    known = f"known texts are {', '.join(NAMES)}, hf:NAME[:CONFIG][:SPLIT][:COLUMN], and paths"
    close = difflib.get_close_matches(source.lower(), NAMES, n=1)
    if close:
        return f"text {source!r} is unknown. Did you mean {close[0]!r}? Otherwise {known}."
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) and not Path(source).suffix:
        return f"no file or directory {source!r}. Did you mean the hub's dataset 'hf:{source}'? Otherwise {known}."
    if "/" in source or "\\" in source or Path(source).suffix:
        return f"no file or directory {source!r}. Check the path; {known}."
    return f"text {source!r} is unknown; {known}."
