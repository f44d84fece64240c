"""Requests whose end a proxy in front may see elsewhere, and heads and bodies that only take time."""

import pytest

from qvl_edge.server.connection import FREE_PIECES

from ..harness import ScriptedWorker, serving
from .raw import ASK, POST, answer, connected, statuses, to_end, whole

pytestmark = pytest.mark.slow
SMUGGLED = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


@pytest.fixture(scope="module")
def server():
    with serving(ScriptedWorker("x")) as running:
        yield running


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (POST + CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Content-Length: 0\r\n" + CHUNKED + b"\r\n0\r\n\r\n", 400),
        (POST.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n0\r\n\r\n", 400),
        (POST + CHUNKED * 2 + b"\r\n0\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
        (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", 400),
        (POST + b"Content-Length: +2\r\n\r\n{}", 400),
        (POST + b"Content-Length: -2\r\n\r\n{}", 400),
        (POST + b"Content-Length : 2\r\n\r\n{}", 400),
        (POST + b"Host: evil.example\r\n\r\n", 400),
        (POST.replace(b"Host: localhost\r\n", b"") + b"\r\n", 400),
        (POST + b"Host: localhost\r\n\r\n", 400),
        (POST + b"Content-Length: 2, 3\r\n\r\n{}", 400),
        (POST + b"Content-Length: 0x2\r\n\r\n{}", 400),
        (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}", 400),
        (POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: identity\r\n\r\n{}", 501),
        (POST.replace(b"chat/", b"chat /") + b"\r\n", 400),
        (POST.replace(b"1.1", b"9.9") + b"\r\n", 505),
        (b"PRI * HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
        (POST + CHUNKED + b"\r\n-2\r\n{}\r\n0\r\n\r\n", 400),
        (POST + CHUNKED + b"\r\n0x2\r\n{}\r\n0\r\n\r\n", 400),
        (POST + CHUNKED + b"\r\n" + b"f" * 40 + b"\r\n{}\r\n0\r\n\r\n", 400),
        (POST + CHUNKED + b"\r\nzz\r\n\r\n", 400),
        (POST + CHUNKED + b"\r\n2\r\n{}x\r\n0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\na: " + b"b" * 40_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"nonsense\r\n\r\n", 400),
        (POST + CHUNKED + b"\r\n" + b"1\r\n \r\n" * (FREE_PIECES + 99) + b"0\r\n\r\n", 400),
    ],
)  # fmt: skip
def test_an_ambiguous_or_endless_request_is_refused_and_its_connection_closed(server, sent: bytes, status: int) -> None:
    said = answer(server, sent + SMUGGLED)  # to the end: it was closed
    assert said.startswith(b"HTTP/1.1 %d " % status), said
    assert said.count(b"HTTP/1.1 ") == 1 and b"connection: close" in said.lower()
    assert b'"error"' in said and server.ask("a").status_code == 200


def test_a_body_in_pieces_of_usual_size_is_read(server) -> None:
    body = b'{"model": "small", "messages": [{"role": "user", "content": "' + b"a" * 100_000 + b'"}]}'
    pieces = [body[at : at + 70] for at in range(0, len(body), 70)]
    assert len(pieces) > FREE_PIECES and server.post(content=iter(pieces)).status_code == 200


CLOSE = b"Connection: close\r\n"


@pytest.mark.parametrize("head", [b"", CHUNKED])
def test_requests_in_one_piece_and_byte_by_byte_are_answered(server, head: bytes) -> None:
    def made(*lines: bytes) -> bytes:
        return (
            b"".join([POST, *lines, head, b"\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(ASK), ASK)])
            if head
            else whole(ASK, *lines)
        )

    assert statuses(answer(server, made() * 2 + made(CLOSE))) == [200] * 3
    with connected(server) as slow:
        for byte in made(CLOSE):
            slow.sendall(bytes([byte]))
        assert statuses(to_end(slow)) == [200]


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
def test_an_upgrade_is_not_made(server, protocol: bytes) -> None:
    assert statuses(answer(server, whole(ASK, b"Upgrade: %s\r\nConnection: Upgrade, close\r\n" % protocol))) == [200]
