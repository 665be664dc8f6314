"""What every table on a terminal is made of: literal text, and columns that fit. Torch-free."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text


def printable(text: str, keep: str = "") -> str:
    """The text with control characters replaced, those of ``keep`` excepted: text from outside must not steer the terminal."""
    return "".join(char if char.isprintable() or char in keep else "\N{REPLACEMENT CHARACTER}" for char in text)


def make_table(first: str, *others: str) -> Table:
    """A table whose first column is text, folded where it is too long, and whose others are figures, never cut."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def add_row(table: Table, *cells: str) -> None:
    """A row of literal text: Text, because square brackets in a plain string would be read as markup."""
    table.add_row(*(Text(printable(cell)) for cell in cells))
