"""One connection over uvicorn's h11 protocol, with the limits that it lacks: how many, how slow, and how framed.

uvicorn has the parser, the flow control and the shutdown; it has no time for headers, and its only limit of
connections answers 503 to everybody. hypercorn has the same gaps, granian is a server in Rust of which none of this can
be tested from here, and a reverse proxy is not there on somebody's desk, so the limits are a subclass.
"""

import asyncio
import functools
import ipaddress
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from qvl_edge.server.refusal import INVALID, SERVER, ErrorDetail, ErrorResponse

UVICORN: dict[str, Any] = {
    "ws": "none",
    "loop": "asyncio",
    "lifespan": "on",
    "log_config": None,
    "access_log": False,  # paths are user input
    "server_header": False,
    "proxy_headers": False,
    "backlog": 64,  # asyncio accepts so many at once before the first of them is counted
    "timeout_graceful_shutdown": 30,  # seconds for running answers to finish
}
MAX_HEAD_BYTES, MAX_HEADERS = 32 << 10, 100
HEAD_S = 10.0  # for the request line and the headers, from the connection or from their first byte
WRITE_S = 60.0  # that an answer may wait in all for a client that reads slowly or not at all
COMING_S = 1.0  # for so long after a part of its body a request counts as one that comes
LINGER_S = 2.0  # what a refused client still sends is read for so long: else a reset would take the refusal from it
ANSWERING = "qvl_edge.answering"  # in the state of a request's scope, once it has a place in the queue
FREE_PIECES, PIECE_BYTES = 1000, 64  # a body in more pieces than these, of fewer bytes on average, only takes time


@dataclass
class Connections:
    """Those of a server, and how many there may be: in all, and from one address (of IPv6, one /64 network)."""

    most: int = 512
    most_per_address: int = 256
    open: "dict[Connection, None]" = field(default_factory=dict)
    by_address: Counter[str] = field(default_factory=Counter)

    def admit(self, new: "Connection") -> bool:
        """Take a connection; if there are too many, in the place of one that waits for its client.

        It goes from the address with most of these, and of its own the one that has waited for longest. One whose
        answer is being made keeps its place, and so does one whose body is coming, while there are others. So that
        whoever opens connections loses them, and nobody else.
        """
        full, crowded = len(self.open) >= self.most, self.by_address[new.address] >= self.most_per_address
        if full or crowded:
            rivals = [each for each in self.open if each.silent and (not crowded or each.address == new.address)]
            if not rivals:
                return False
            comes = time.monotonic() - COMING_S
            rivals = [each for each in rivals if each.heard < comes] or rivals
            crowd = Counter(each.address for each in rivals)
            loser = min(rivals, key=lambda each: (-crowd[each.address], each.since))
            self.remove(loser)
            loser.transport.abort()
        self.open[new] = None
        self.by_address[new.address] += 1
        return True

    def remove(self, connection: "Connection") -> None:
        """One that is closed, or about to be."""
        if self.open.pop(connection, False) is None:
            self.by_address[connection.address] -= 1
            self.by_address += Counter()  # drops the zeros: addresses come without end


class _Parser(h11.Connection):
    """h11, which takes Transfer-Encoding before Content-Length where a proxy in front may do the opposite."""

    _pieces = _bytes = 0

    def next_event(self) -> Any:
        """See h11.Connection."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._pieces = self._bytes = 0
            names = [name for name, _ in event.headers]
            size = len(event.target) + sum(len(name) + len(value) for name, value in event.headers)
            if size > MAX_HEAD_BYTES or len(names) > MAX_HEADERS:
                raise h11.RemoteProtocolError("the headers are too large", error_status_hint=431)
            if event.http_version not in (b"1.0", b"1.1"):
                raise h11.RemoteProtocolError("this version of HTTP is not supported", error_status_hint=505)
            if b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1"):
                raise h11.RemoteProtocolError("Transfer-Encoding beside another framing")
            if names.count(b"host") > 1:
                raise h11.RemoteProtocolError("more than one Host")
        elif isinstance(event, h11.Data):
            self._pieces, self._bytes = self._pieces + 1, self._bytes + len(event.data)
            if self._pieces > FREE_PIECES + self._bytes // PIECE_BYTES:
                raise h11.RemoteProtocolError("the body comes in too many pieces")
        return event


class Connection(H11Protocol):
    """A connection that may not be slow, nor one of too many."""

    def __init__(self, connections: Connections, **given: Any):
        super().__init__(**given)
        self.conn = _Parser(h11.SERVER, 16 << 10)
        self.gate = connections
        self.address, self.since = "", time.monotonic()
        self.heard = 0.0  # when the last part of a body came
        self.leaving = False
        self._write_left, self._paused = WRITE_S, 0.0
        self._timers: dict[str, asyncio.TimerHandle] = {}

    @property
    def silent(self) -> bool:
        """Whether no answer is being made for it that its client reads; whatever needs no engine is made at once."""
        if self.leaving or self.scope is None or self.cycle.response_complete or self.flow.write_paused:
            return True
        return not self.scope["state"].get(ANSWERING)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self.address = _network(self.client[0] if self.client else "")
        if not self.gate.admit(self):
            self._refuse(503, "too many connections; try again later", SERVER)
            return
        self._within("head", HEAD_S, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.gate.remove(self)
        for name in [*self._timers]:
            self._stop(name)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self.leaving:
            return
        super().data_received(data)
        if self.conn.their_state in (h11.SEND_BODY, h11.DONE):
            self.heard = time.monotonic()
        if self.leaving or self.conn.their_state is not h11.IDLE:
            self._stop("head")
        elif "head" not in self._timers:
            self._within("head", HEAD_S, self._late)

    def on_response_complete(self) -> None:
        """See H11Protocol."""
        self.since, self._write_left = time.monotonic(), WRITE_S
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:  # the next head has begun
            self._unset_keepalive_if_required()
            self._within("head", HEAD_S, self._late)

    def send_400_response(self, msg: str) -> None:
        """What h11 cannot read; called where its error is handled."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(status, f"the request cannot be read: {error or msg}"[:200], INVALID)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self.since = time.monotonic()
        self._paused = self.loop.time()
        self._within("write", max(self._write_left, 0.0), self.transport.abort)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._stop("write")
        self._write_left -= self.loop.time() - self._paused
        super().resume_writing()

    def _late(self) -> None:
        if not self.transport.is_closing():
            self._refuse(408, f"the headers did not come within {HEAD_S:g} s", INVALID)

    def _refuse(self, status: int, message: str, kind: str) -> None:
        """Answer, if nothing was answered yet, and close once the client has read it."""
        self.leaving, self.since = True, time.monotonic()
        self._unset_keepalive_if_required()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            detail = ErrorDetail(
                message=message, type=kind, param=None, code="bad_request" if kind == INVALID else None
            )
            body = ErrorResponse(error=detail).model_dump_json().encode()
            phrase = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}.get(
                status, ""
            )
            head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        if self.cycle is not None:  # whoever reads the body or answers stops
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._within("linger", LINGER_S, self.transport.abort)

    def shutdown(self) -> None:
        """See H11Protocol."""
        if self.leaving:
            self.transport.abort()
        else:
            super().shutdown()

    def _within(self, name: str, seconds: float, then: Any) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, then)

    def _stop(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()


def configure(app: ASGIApp, connections: Connections | None = None, **given: Any) -> uvicorn.Config:
    """How uvicorn serves `app`; `given` are its own settings."""
    made: Any = functools.partial(Connection, connections or Connections())
    return uvicorn.Config(app, http=made, **UVICORN | given)


def within_descriptors(most: int) -> int:
    """As many connections of `most` as the process has descriptors for, beside its files, pipes and children."""
    try:
        import resource  # not on Windows, which has no such limit
    except ImportError:
        return most
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > soft:
        soft = most + 512 if hard == resource.RLIM_INFINITY else min(hard, max(soft, most + 512))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(4, min(most, soft - 256 if soft >= 512 else soft // 4))


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:  # on a socket of both versions
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
