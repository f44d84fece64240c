"""Raw sockets: what no client library would send."""

import contextlib
import json
import re
import socket
from collections.abc import Iterator

from ..harness import MODEL, WAIT_S, Server

POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
ASK = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}).encode()


def whole(body: bytes = ASK, *lines: bytes) -> bytes:
    """A request with its body, as it should be, and more `lines` of headers."""
    return b"".join([POST, *lines, b"Content-Length: %d\r\n\r\n" % len(body), body])


@contextlib.contextmanager
def connected(server: Server, sent: bytes = b"", source: str = "127.0.0.1") -> Iterator[socket.socket]:
    """A connection from an address, which has sent something."""
    host, port = server.url[7:].split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S, source_address=(source, 0)) as connection:
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


@contextlib.contextmanager
def crowd(server: Server, count: int, sent: bytes = b"", source: str = "127.0.0.1") -> Iterator[list[socket.socket]]:
    """So many connections, each of which has sent something."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connected(server, sent, source)) for _ in range(count)]


def statuses(said: bytes) -> list[int]:
    """The status of each response in it."""
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", said)]
