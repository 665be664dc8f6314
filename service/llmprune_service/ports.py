"""Ports of this host: whether one is free, and one that is."""

from __future__ import annotations

import socket


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there; an address that is not this host's is not free."""
    try:
        _bound(host, port)
    except OSError:
        return False
    return True


def find_free(host: str) -> int:
    """A port nobody listens on, for now."""
    return _bound(host, 0)


def _bound(host: str, port: int) -> int:
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a past connection is no obstacle
        probe.bind(address)
        return int(probe.getsockname()[1])
