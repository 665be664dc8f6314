"""What a process of the service gives up when it starts."""

from __future__ import annotations

import sys


def forbid_pickle() -> None:
    """Refuse, for the rest of this process, every pickle that names a class or function: all that could run code.

    The job engine writes JSON here, but reads a row the way the row itself says; who can write the database must not be
    able to run code in whoever reads it.
    """
    sys.addaudithook(_refuse_classes)


def _refuse_classes(event: str, arguments: tuple[object, ...]) -> None:
    if event == "pickle.find_class":
        raise RuntimeError(f"a pickle that names {arguments[0]}.{arguments[1]} is refused in this process")
