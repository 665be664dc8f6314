"""Identifiers the server makes: a prefix and a ULID, so that they sort by the time they were made."""

from __future__ import annotations

import re
import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_ULID = f"[{_ALPHABET}]{{26}}"
JOB_ID = re.compile(f"job_{_ULID}")
SWEEP_ID = re.compile(f"sweep_{_ULID}")


def new_id(prefix: str) -> str:
    """``prefix_`` and 26 characters: 48 bits of milliseconds, 80 random bits."""
    number = (int(time.time() * 1000) << 80) | secrets.randbits(80)
    return f"{prefix}_" + "".join(_ALPHABET[(number >> shift) & 31] for shift in range(125, -1, -5))
