"""Connections that are many, silent or slow."""

import asyncio
import contextlib
import json
import logging
import socket
import sys
import threading
import time
from unittest.mock import Mock

import httpx
import pytest

from qvl_edge.server import connection, guard
from qvl_edge.server.connection import Connections, within_descriptors
from qvl_edge.server.guard import Bodies, Body
from qvl_edge.server.logs import MOST, Sparing

from ..harness import MODEL, ScriptedWorker, serving, until
from .raw import ASK, POST, answer, connected, crowd, statuses, to_end, whole

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("limits", [Connections(most=8), Connections(most=100, most_per_address=8)])
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost:",
        POST + b"Content-Length: 100\r\n\r\n{",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_silent_connections_without_end_make_nobody_wait(limits: Connections, sent: bytes) -> None:
    with serving(ScriptedWorker("x"), connections=limits) as server:
        host, port = server.url[7:].split(":")
        crowd = [socket.create_connection((host, int(port)), timeout=30) for _ in range(50)]
        try:
            for one in crowd:
                one.sendall(sent)
            for _ in range(3):
                assert server.ask("a").status_code == httpx.get(f"{server.url}/health").status_code == 200
            assert len(limits.open) <= 8
        finally:
            for one in crowd:
                one.close()
        until(lambda: not limits.open and not limits.by_address)


def test_answers_that_are_being_made_keep_their_connections() -> None:
    release = threading.Event()

    async def wait() -> None:
        while not release.is_set():
            await asyncio.sleep(0.005)

    engine = ScriptedWorker("x", before=lambda _: wait())
    with serving(engine, connections=Connections(most=2)) as server:
        answers: list[httpx.Response] = []
        busy = [threading.Thread(target=lambda: answers.append(server.ask("a"))) for _ in range(2)]
        for each in busy:
            each.start()
        until(lambda: len(engine.requests) == 2)
        with connected(server) as third:
            said = to_end(third)
        assert said.startswith(b"HTTP/1.1 503") and json.loads(said.partition(b"\r\n\r\n")[2])["error"]
        release.set()
        for each in busy:
            each.join()
    assert [response.status_code for response in answers] == [200, 200]


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\n"])
def test_headers_have_a_time(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.1)
    with serving(ScriptedWorker("x")) as server, connected(server, sent) as slow:
        assert b"HTTP/1.1 408" in to_end(slow)


def test_a_body_that_brings_a_byte_now_and_then_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_FREE_S", 0.2)
    with serving(ScriptedWorker("x")) as server, connected(server, POST + b"Content-Length: 99\r\n\r\n{") as slow:
        until(lambda: not drip(slow) or None)


def drip(slow: socket.socket) -> bool:
    """Whether the server still takes bytes."""
    slow.settimeout(0.05)
    try:
        slow.sendall(b" ")
        return b"body_timeout" not in slow.recv(1000)
    except TimeoutError:
        return True


def test_bodies_that_are_still_coming_take_no_place() -> None:
    with serving(ScriptedWorker("x"), max_concurrent=2) as server:
        host, port = server.url[7:].split(":")
        slow = [socket.create_connection((host, int(port)), timeout=30) for _ in range(32)]
        for one in slow:
            one.sendall(POST + b"Content-Length: 55\r\n\r\n{")
        assert server.ask("a").status_code == 200
        for one in slow:
            one.close()


def test_the_largest_unfinished_body_makes_room_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(ScriptedWorker("x"), max_body_bytes=100_000) as server:  # 800,000 for all
        head = POST + b"Content-Length: 100000\r\n\r\n"
        host, port = server.url[7:].split(":")
        large = [socket.create_connection((host, int(port)), timeout=30) for _ in range(12)]
        for one in large:
            one.sendall(head + b" " * 99_000)
        assert server.ask("a" * 5000).status_code == 200
        until(lambda: any(b"429" in peek(one) for one in large))
        for one in large:
            one.close()


def peek(one: socket.socket) -> bytes:
    one.settimeout(0.01)
    try:
        return one.recv(1000, socket.MSG_PEEK)
    except TimeoutError:
        return b""


def test_what_is_held_of_bodies_is_bounded() -> None:
    def fill() -> tuple[int, int]:
        bodies = Bodies(100)
        for size in (60, 30, 20, 5):
            body = Body(size, Mock(asyncio.Timeout))
            bodies.held[body] = None
            bodies.make_room()
        return sum(body.size for body in bodies.held), len(bodies.held)

    assert fill() == (55, 3)  # the first went


def test_who_does_not_read_an_answer_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WRITE_S", 0.2)
    engine = ScriptedWorker(*["x" * 100_000] * 2000, before=lambda _: asyncio.sleep(0.001))
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "a"}], "stream": True}).encode()
    with serving(engine) as server, connected(server, POST + b"Content-Length: %d\r\n\r\n" % len(body) + body):
        assert engine.cancelled.wait(30)


def test_a_cause_writes_so_many_lines() -> None:
    sparing, lines = Sparing(), []
    for number in range(1000):
        record = logging.LogRecord("asyncio", logging.ERROR, "", 0, "socket.accept() out of %s", (number,), None)
        if sparing.filter(record):
            lines.append(record.getMessage())
    assert len(lines) == MOST and "left out" in lines[-1]
    assert sparing.filter(logging.LogRecord("asyncio", logging.ERROR, "", 0, "another", (), None))


def test_there_are_descriptors_left_for_files_and_children() -> None:
    resource = pytest.importorskip("resource")
    was = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 4 <= within_descriptors(10) <= 10
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == was[1]


def test_headers_that_come_a_byte_at_a_time_get_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.2)
    with serving(ScriptedWorker("x")) as server, connected(server, b"GET /health HTTP/1.1\r\nX-A: ") as slow:
        slow.settimeout(0.01)
        said = b""
        for _ in range(1000):
            slow.sendall(b"a")
            with contextlib.suppress(TimeoutError):
                said = slow.recv(1000)
                break
        assert statuses(said) == [408]


def test_a_body_that_keeps_the_rate_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_FREE_S", 0.2)
    body = ASK[:-1] + b" " * 4000 + b"}"
    with serving(ScriptedWorker("x")) as server, connected(server) as steady:
        said = whole(body, b"Connection: close\r\n")
        for at in range(0, len(said), 1024):  # half a second in all
            steady.sendall(said[at : at + 1024])
            time.sleep(0.1)
        assert statuses(to_end(steady)) == [200]


@pytest.mark.parametrize("size", [1 << 20, 40 << 20])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_refusal_of_a_body_that_nobody_reads_arrives_after_all_of_it_was_sent(size: int, chunked: bool) -> None:
    body = b"x" * size
    framed = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (size, body)
    with serving(ScriptedWorker("x"), max_body_bytes=1000) as server:
        with connected(server, POST + framed if chunked else whole(body)) as large:
            assert statuses(large.recv(1000)) == [413]


def test_pipelined_requests_whose_answers_are_not_read_are_not_taken_for_ever() -> None:
    with serving(ScriptedWorker("x")) as server, connected(server) as greedy:
        greedy.settimeout(0.5)
        one, sent = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000, 0
        with contextlib.suppress(OSError):
            while sent < 64 << 20:
                sent += greedy.send(one)
        assert sent < 64 << 20 and server.ask("a").status_code == 200


def test_requests_that_cannot_be_read_write_so_many_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    caplog.handler.addFilter(sparing := Sparing())
    try:
        with serving(ScriptedWorker("x")) as server:
            for number in range(2 * MOST):
                answer(server, b"GET /%d nonsense\r\n\r\n" % number)
                answer(server, whole(b"{", b"X-%d: a\r\nConnection: close\r\n" % number))
    finally:
        caplog.handler.removeFilter(sparing)
    lines = [record.getMessage() for record in caplog.records]
    assert sum("Invalid HTTP" in line for line in lines) == sum("400 invalid_json" in line for line in lines) == MOST


def test_connections_that_come_and_go_leave_nothing() -> None:
    limits = Connections(most=8)
    with serving(ScriptedWorker("x"), connections=limits) as server:
        for sent in (b"", b"G", whole(), whole()[:-9], b"nonsense\r\n\r\n"):
            for _ in range(20):
                with connected(server, sent):
                    pass
        until(lambda: not limits.open and not limits.by_address)
        assert server.ask("a").status_code == 200


@pytest.mark.skipif(sys.platform == "darwin", reason="127.0.0.2 is no address there")
def test_a_crowd_from_elsewhere_takes_nobody_the_place_of_a_slow_upload() -> None:
    said, limits = whole(ASK, b"Connection: close\r\n"), Connections(most=16, most_per_address=8)
    with serving(ScriptedWorker("x"), connections=limits) as server, connected(server, said[:-5]) as honest:
        with crowd(server, 40, source="127.0.0.2"), crowd(server, 40, said[:-5], source="127.0.0.3"):
            httpx.get(f"{server.url}/health")  # all before it were taken
            honest.sendall(said[-5:])
            assert statuses(to_end(honest)) == [200]


@pytest.mark.parametrize(("heard", "loses"), [(True, "b"), (False, "a")])
def test_a_crowd_whose_requests_are_just_coming_is_no_crowd(heard: bool, loses: str) -> None:
    limits, now = Connections(most=15), time.monotonic()

    def one(address: str, heard: float) -> Mock:
        return Mock(address=address, silent=True, since=now, heard=heard)

    many, few = [one("a", now if heard else 0.0) for _ in range(10)], [one("b", 0.0) for _ in range(5)]
    assert all(limits.admit(each) for each in (*many, *few, one("c", 0.0)))
    lost = [each.address for each in (*many, *few) if each.transport.abort.called]
    assert lost == [loses]


def test_who_asks_for_files_and_does_not_read_them_keeps_no_place() -> None:
    with serving(ScriptedWorker("x"), connections=Connections(most=8)) as server:
        sent = b"GET /app.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500
        with crowd(server, 12, sent):
            time.sleep(0.5)  # until the buffers are full
            assert [server.ask("a").status_code for _ in range(3)] == [200] * 3


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("192.0.2.7", "192.0.2.7"), ("::ffff:192.0.2.7", "192.0.2.7"), ("::1", "::/64"), ("fe80::1%eth0", "fe80::/64"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"), ("", ""),
    ],
)  # fmt: skip
def test_an_address_is_counted_as_what_one_client_can_have(address: str, counted: str) -> None:
    assert connection._network(address) == counted
