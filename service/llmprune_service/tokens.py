"""Hub tokens by reference: one file a tenant, ``DATA_DIR/tokens/TENANT``. Never in the database, in jobs or in logs."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from llmprune_service.problems import Problem
from llmprune_service.settings import Settings

DEFAULT_TENANT = "default"
_TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_TOKEN = re.compile(r"[!-~]{1,512}")


def hub_token(settings: Settings, tenant: str) -> str | None:
    """The tenant's hub token, or None; the tenant ``default`` falls back on LLMPRUNE_HF_TOKEN.

    Raises:
        Problem: 500, the file can be read by others than its owner, or holds no token.
    """
    try:
        file = _path(settings, tenant).open(encoding="ascii", errors="replace")
    except FileNotFoundError:
        fallback = settings.hf_token if tenant == DEFAULT_TENANT else None
        return (fallback.get_secret_value() or None) if fallback else None
    with file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise Problem(500, "token-file", f"The hub token of tenant {tenant!r} can be read by others. Run chmod 600 on it.")
        token = file.read(1024).strip()
    if not _TOKEN.fullmatch(token):
        raise Problem(500, "token-file", f"The file of tenant {tenant!r}'s hub token holds none. Set the token again.")
    return token


def set_hub_token(settings: Settings, tenant: str, token: str) -> None:
    """Write the tenant's token, readable by the owner only; raises ValueError for what cannot be a token."""
    if not _TOKEN.fullmatch(token):
        raise ValueError("a hub token has 1 to 512 printable ASCII characters and no spaces.")
    path = _path(settings, tenant)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # made with mode 0600
    with os.fdopen(descriptor, "w") as file:
        file.write(token)
    Path(temporary).replace(path)


def _path(settings: Settings, tenant: str) -> Path:
    if not _TENANT.fullmatch(tenant):
        raise ValueError(f"tenant {tenant!r} is not a name: lower case letters, digits and '-', at most 63 of them.")
    return settings.data_dir / "tokens" / tenant
