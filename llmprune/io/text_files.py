"""Documents from local files: text, JSON lines, Parquet, or a directory of them. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmprune.errors import TextError, one_line

TEXT_COLUMNS = ("text", "content")
JSON_LINES = (".jsonl", ".ndjson")


def read_documents(path: Path) -> list[str]:
    """The documents of a file, or of all files below a directory that are not hidden, sorted by path."""
    return [document for file in list_files(path) for document in _read_file(file)]


def list_files(path: Path) -> list[Path]:
    """The files a path stands for; raises TextError where there are none."""
    if not path.is_dir():
        return [path]
    relative = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    files = [path / file for file in relative if not any(part.startswith(".") for part in file.parts)]
    if not files:
        raise TextError(f"directory {path} holds no text: put .txt, .jsonl or .parquet files into it.")
    return files


def pick_column(columns: Iterable[str], *, asked: str, all_columns: Iterable[str], where: str, remedy: str) -> str:
    """The column asked for, else ``text`` or ``content``, else the only one of the string columns given."""
    columns = list(columns)
    named = [column for column in ((asked,) if asked else TEXT_COLUMNS) if column in columns]
    if named:
        return named[0]
    if not asked and len(columns) == 1:
        return columns[0]
    missing = f"has no text column {asked!r}" if asked else "does not say which column is its text"
    strings = ", ".join(columns) or "none"
    raise TextError(f"{where} {missing}: string columns are {strings}, of all: {', '.join(all_columns)}. {remedy}")


def _read_file(path: Path) -> list[str]:
    suffix = path.suffix.lower()
    if suffix in JSON_LINES:
        return _read_json_lines(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix == ".json":
        raise TextError(f"{path}: .json files are not read. Write one JSON object per line to a .jsonl file.")
    return [_read_utf8(path)]


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {error.start}). "
            "Convert it, or remove it from the directory if it is no text."
        ) from error
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}. Check the path and its permissions.") from error


def _read_json_lines(path: Path) -> list[str]:
    column = ""
    documents = []
    # Not splitlines(), which also breaks at U+2028 and the like, legal inside a JSON string.
    for number, line in enumerate(_read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        record = _parse_record(line, where)
        if not column:
            strings = [name for name, value in record.items() if isinstance(value, str)]
            remedy = "Name one of them 'text'."
            column = pick_column(strings, asked="", all_columns=record, where=where, remedy=remedy)
        if not isinstance(record.get(column), str):
            raise TextError(f"{where}: no string in field {column!r}, where the lines before have their text.")
        documents.append(record[column])
    return documents


def _parse_record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(f"{where}: not valid JSON ({error.msg} at column {error.colno}). Fix or remove it.") from error
    if not isinstance(record, dict):
        raise TextError(f'{where}: expected a JSON object such as {{"text": "..."}}, got {type(record).__name__}.')
    return record


def _read_parquet(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
        strings = [
            field.name for field in schema if pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type)
        ]
        remedy = "Rename one of them to 'text'."
        column = pick_column(strings, asked="", all_columns=schema.names, where=str(path), remedy=remedy)
        values = pyarrow.parquet.read_table(path, columns=[column]).column(column).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise TextError(f"{path} is no readable Parquet: {one_line(error)}. Check that it is complete.") from error
    return [value for value in values if value is not None]
