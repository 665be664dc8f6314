"""A TCP proxy that breaks connections: what a client sees when a network does."""

from __future__ import annotations

import re
import socket
import threading
from collections import deque
from contextlib import suppress

_CHUNK = 65536


class Proxy:
    """Stands before 127.0.0.1:``port``. Each connection takes a budget of answered bytes from ``budgets``; then it breaks.

    Attributes:
        budgets: of the connections to come; without one a connection is left alone.
        heads: request heads that came through, in order.
        sent: bytes of answers that were passed on.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.budgets: deque[int] = deque()
        self.heads: list[str] = []
        self.sent = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._sockets: list[socket.socket] = []
        self._threads[0].start()

    def requests(self, pattern: str) -> list[str]:
        """Heads whose request line matches."""
        return [head for head in self.heads if re.match(pattern, head)]

    def header(self, pattern: str, name: str) -> list[str]:
        """Values of a header in the requests that match and have it."""
        found = (re.search(rf"^{name}: (.*?)\r$", head, re.IGNORECASE | re.MULTILINE) for head in self.requests(pattern))
        return [match[1] for match in found if match]

    def close(self) -> None:
        """Break everything."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            _close(each)
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [client, server]
                budget = self.budgets.popleft() if self.budgets else None
                for pump in ((self._ask, client, server), (self._answer, server, client, budget)):
                    thread = threading.Thread(target=pump[0], args=pump[1:], daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(_CHUNK):
                if re.match(rb"[A-Z]+ /", data):
                    self.heads.append(data.partition(b"\r\n\r\n")[0].decode() + "\r\n")
                server.sendall(data)
        _close(server)

    def _answer(self, server: socket.socket, client: socket.socket, budget: int | None) -> None:
        with suppress(OSError):
            while data := server.recv(_CHUNK):
                if budget is not None:
                    data, budget = data[:budget], budget - len(data)
                self.sent += len(data)
                client.sendall(data)
                if budget is not None and budget <= 0:
                    break
        _close(client)
        _close(server)


def _close(each: socket.socket) -> None:
    with suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()
