"""Raw sockets: what no client library would send."""

import contextlib
import socket
from collections.abc import Iterator

from ..harness import WAIT_S, Server

POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@contextlib.contextmanager
def connected(server: Server, sent: bytes = b"") -> Iterator[socket.socket]:
    """A connection that has sent something."""
    host, port = server.url[7:].split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(sent)
        yield connection


def answer(server: Server, sent: bytes) -> bytes:
    """All that comes back, until the server closes the connection."""
    with connected(server, sent) as connection:
        return to_end(connection)


def to_end(connection: socket.socket) -> bytes:
    """What comes until the other end closes; a reset is an end too."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            said += piece
    return said
