"""Documents from Hugging Face datasets, and every way of not getting them as a TextError. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.errors import TextError, TextUnreachable, one_line
from llmprune.io.text_files import pick_column

MAX_DOWNLOAD_BYTES = 20 * 10**9
EVALUATION_SPLITS = ("test", "validation", "train")
_SYNTAX = "hf:NAME[:CONFIG][:SPLIT][:COLUMN]"
_NETWORK_ERRORS = {"ConnectionError", "TimeoutError", "TransportError", "LocalEntryNotFoundError"}
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class HubSource:
    """A parsed ``hf:`` source; parts left out are empty strings. ``name`` is a hub repository or a local directory."""

    name: str
    config: str = ""
    split: str = ""
    column: str = ""

    @classmethod
    def parse(cls, source: str) -> HubSource:
        """Read ``hf:NAME[:CONFIG][:SPLIT][:COLUMN]``; a split may be a slice, such as ``train[:1000]``."""
        parts = re.split(r":(?![^\[\]]*\])", source.removeprefix("hf:"))
        if len(parts) > 4 or not parts[0]:
            raise TextError(f"{source!r} is not {_SYNTAX}. Leave parts out or empty, as in hf:name::validation.")
        parsed = cls(*parts)
        if not parsed.is_local and not _REPOSITORY.fullmatch(parsed.name):
            raise TextError(
                f"{parsed.name!r} in {source!r} is no directory and no dataset name. Check it, or use hf:user/name."
            )
        return parsed

    @property
    def is_local(self) -> bool:
        """Whether the name is a directory on this machine."""
        return Path(self.name).is_dir()


def read_c4(split: str) -> Sequence[str]:
    """The documents of C4's first English shard of ``train`` or ``validation``."""
    file = f"en/c4-{split}.00000-of-{1024 if split == 'train' else 8:05}.json.gz"
    return _read_file("allenai/c4", file, kind="json", column="text")


def read_wikitext2(split: str) -> Sequence[str]:
    """The lines of raw WikiText-2, blank ones included."""
    return read_dataset(HubSource("Salesforce/wikitext", "wikitext-2-raw-v1", split, "text"), evaluation=False)[0]


def read_ptb(split: str) -> Sequence[str]:
    """The sentences of the Penn Treebank.

    The repository itself is a loading script, which datasets 4 and later refuse to run; the hub keeps its Parquet
    conversion on a branch of its own.
    """
    file = f"penn_treebank/{split}/0000.parquet"
    revision = "refs/convert/parquet"
    return _read_file("ptb-text-only/ptb_text_only", file, kind="parquet", column="sentence", revision=revision)


def read_dataset(source: HubSource, *, evaluation: bool) -> tuple[Sequence[str], str, str]:
    """Documents, the split they are from, and a note on the split where it is not the expected one.

    The default split is ``train`` for calibration; for evaluation ``test``, else ``validation``, else ``train``.
    """
    with _explained(source.name):
        import datasets

        # None is "no such argument" to datasets, an empty string is a name.
        builder = datasets.load_dataset_builder(source.name, source.config or None)
        _check_size(source.name, builder.info.download_size)
        builder.download_and_prepare()
        split, note = _pick_split(source, list(builder.info.splits or ()), evaluation=evaluation)
        dataset = builder.as_dataset(split=split)
    return _column(dataset, source.column, source.name), split, note


def _read_file(name: str, file: str, *, kind: str, column: str, revision: str | None = None) -> Sequence[str]:
    """One file of a hub dataset.

    Downloaded by huggingface_hub rather than by ``load_dataset(name, data_files=...)``: that lists the repository, and
    offline it does not find again what it has in its cache.
    """
    with _explained(name):
        import datasets
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(name, file, repo_type="dataset", revision=revision)
        dataset = datasets.load_dataset(kind, data_files=path, split="train")
    return _column(dataset, column, name)


def _column(dataset: Any, asked: str, name: str) -> Sequence[str]:
    """A column of strings, read from disk as it is indexed; nulls are left out."""
    kinds = {column: getattr(kind, "dtype", None) for column, kind in dataset.features.items()}
    strings = [column for column, kind in kinds.items() if kind in ("string", "large_string")]
    remedy = f"Name one: {_SYNTAX}."
    column = pick_column(strings, asked=asked, all_columns=dataset.column_names, where=f"dataset {name}", remedy=remedy)
    documents: Sequence[str] = dataset[column]
    if dataset.data.column(column).null_count:
        return [document for document in documents if document is not None]
    return documents


def _pick_split(source: HubSource, splits: list[str], *, evaluation: bool) -> tuple[str, str]:
    wanted = (source.split,) if source.split else EVALUATION_SPLITS if evaluation else ("train",)
    # "train[:1000]" and "train+test" are made of splits; datasets itself checks the rest of the expression.
    found = [split for split in wanted if re.split(r"[\[+]", split)[0] in splits]
    if not found:
        known = ", ".join(splits) or "none"
        missing = " or ".join(wanted)
        raise TextError(f"dataset {source.name} has no split {missing}; it has {known}. Name one: {_SYNTAX}.")
    note = "" if found[0] == wanted[0] else f"; the dataset has no {wanted[0]} split, so {found[0]} was used"
    return found[0], note


def _check_size(name: str, download_bytes: int | None) -> None:
    if download_bytes and download_bytes > MAX_DOWNLOAD_BYTES:
        raise TextError(
            f"dataset {name} is a download of {download_bytes / 1e9:.0f} GB (limit {MAX_DOWNLOAD_BYTES / 1e9:.0f} GB). "
            "Name a smaller configuration, or download some of its files and pass their directory."
        )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn whatever datasets raises (a dozen unrelated types, from five libraries) into a TextError with a remedy."""
    try:
        yield
    except TextError:
        raise
    except Exception as error:
        kind = TextUnreachable if _is_unreachable(error) else TextError
        raise kind(_explain(name, error)) from error


def _explain(name: str, error: Exception) -> str:
    if _is_unreachable(error):
        return (
            f"cannot reach the Hugging Face hub for dataset {name} ({one_line(error)}). Use a local file, 'stdlib' or "
            "'synthetic' as text, or load it once with a connection: then HF_HUB_OFFLINE=1 finds it in the cache."
        )
    if type(error).__name__ == "DatasetNotFoundError":
        remedy = "Check the name; for a gated dataset accept its terms on the hub and run `hf auth login`"
        return f"{one_line(error)}. {remedy}."
    if "scripts are no longer supported" in str(error):
        return f"dataset {name} is a Python script, which is not run. Download its text and pass the path instead."
    # What follows is advice on Python code.
    message = one_line(error).split(" Example of usage")[0]
    return f"cannot read dataset {name}: {message}. The syntax is {_SYNTAX}."


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether the error, or one it was raised from, is of the network: httpx's, huggingface_hub's or Python's own."""
    while error is not None:
        if _NETWORK_ERRORS & {kind.__name__ for kind in type(error).__mro__}:
            return True
        error = error.__cause__
    return False
