"""Offline text: the source of the running Python's standard library, split into train and held-out files.

It needs no download and is the same text, up to patch releases, on every machine with the same Python minor version.

A file's split depends on nothing but its path relative to the library's root, so a file that one machine has and
another lacks (Debian moves `tkinter`, `distutils` and `ensurepip` into packages of their own) leaves every other file
where it was.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "held-out"]

HELD_OUT_BUCKETS = 20
"""One file in this many is held out."""

EXCLUDED_DIRECTORIES = frozenset(
    {
        # Not the standard library, or not source.
        "site-packages",
        "dist-packages",
        "__pycache__",
        # Two thirds of a full install, and absent from Debian's: with them the two would be different texts.
        "test",
        "tests",
        "idle_test",
        # Split off, trimmed or patched by Linux distributions; distutils is gone from Python 3.12, lib2to3 from 3.13.
        "idlelib",
        "lib2to3",
        "distutils",
        "ensurepip",
        "tkinter",
        "turtledemo",
        # Generated: character tables and the help text of the language reference, a fifth of what is left otherwise.
        "encodings",
        "pydoc_data",
        # New in 3.13. pathlib.py, of the train split until 3.12, became a package there, half of it in the held-out
        # split: a model trained on 3.11 has seen that text.
        "_pyrepl",
        "pathlib",
    }
)
EXCLUDED_DIRECTORY_PREFIXES = ("config-",)  # config-3.11-x86_64-linux-gnu: how this interpreter was built
# Written when the interpreter was built, or by a distribution or the machine's owner.
EXCLUDED_FILE_PREFIXES = ("_sysconfigdata", "_distutils_system_mod", "sitecustomize", "usercustomize")


def is_held_out(relative_path: str) -> bool:
    """Whether a file, named by its posix path relative to the library's root, belongs to the held-out split."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_BUCKETS == 0


def stdlib_files(split: Split, *, root: Path | None = None) -> list[Path]:
    """The library's `*.py` files of one split, sorted by path relative to `root` (default: the running Python's)."""
    if split not in ("train", "held-out"):
        raise ValueError(f"split must be 'train' or 'held-out', got {split!r}")
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    relative_paths = sorted(path.relative_to(root).as_posix() for path in _source_files(root))
    return [root / path for path in relative_paths if is_held_out(path) == (split == "held-out")]


def stdlib_documents(split: Split, *, root: Path | None = None) -> list[str]:
    """The text of each file of one split, in the order of `stdlib_files`.

    Line ends are "\\n". Empty files and files that are not valid UTF-8 are left out.

    Raises FileNotFoundError where the library has no source files (a zipped or stripped Python).
    """
    files = stdlib_files(split, root=root)
    if not files:
        where = root or sysconfig.get_paths()["stdlib"]
        raise FileNotFoundError(
            f"no {split} Python source files under {where}: this Python ships its standard library without source. "
            "Pass text of your own instead."
        )
    return [text for text in map(_read_utf8, files) if text.strip()]


def _source_files(root: Path) -> Iterator[Path]:
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [
            name
            for name in subdirectories
            if name not in EXCLUDED_DIRECTORIES and not name.startswith(EXCLUDED_DIRECTORY_PREFIXES)
        ]
        for name in files:
            if name.endswith(".py") and not name.startswith(EXCLUDED_FILE_PREFIXES):
                yield Path(directory, name)


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
