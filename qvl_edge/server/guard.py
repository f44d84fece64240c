"""What runs before every route: authentication, security headers, and limits on the body and its JSON."""

import asyncio
import contextlib
import functools
import hashlib
import ipaddress
import logging
import re
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qvl_edge.errors import ConfigError
from qvl_edge.server import page
from qvl_edge.server.callers import Caller
from qvl_edge.server.refusal import AUTHENTICATION, RATE_LIMIT, Refusal, invalid

log = logging.getLogger("qvl_edge.server")

MAX_DEPTH = 16  # of JSON; a request with a schema in response_format needs about ten
MAX_MARKS = 100_000  # brackets and commas of JSON: what bounds the objects that 32 MB can become
DRAIN_BYTES, DRAIN_S, DRAIN_IDLE_S = 64 << 20, 30.0, 2.0  # of a body that is not wanted any more: in all, and silent
BODY_TIMEOUT_S = 60.0  # for the whole body
BODY_FREE_S, BODY_RATE = 10.0, 1024  # bytes a second that it must bring, on average, after so many seconds

PAGE_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
API_CSP = "default-src 'none'; frame-ancestors 'none'"
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
# open without a key: the health check, and files that are public in the package
OPEN_PATHS = frozenset({"/health", *page.FILES})
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})

_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\[\]:-]+")
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")
# an unterminated string matches up to the end of the body: trying again at each quote would take quadratic time
_MARKS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?+|[\[\]{},]', re.DOTALL)


@dataclass(frozen=True)
class Access:
    """Access control: by API keys; without one, for this machine only and under one of its own names."""

    host: str
    api_key: str | None
    origins: tuple[str, ...] = ()  # of pages elsewhere that browsers may let read responses; "*": all
    callers: tuple[Caller, ...] = ()  # more keys

    def __post_init__(self) -> None:
        for origin in self.origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"--allowed-origins {origin}: expected https://app.example.org, or *")
        if "*" in self.origins and not self.keyed:
            raise ConfigError("--allowed-origins * would let every web page use this server; set QVL_EDGE_API_KEY too")
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("the API key is empty; give one, or leave it out to serve this machine only")
        if len(self._by_digest) < len(self.callers) + (self.api_key is not None):
            raise ConfigError("the key of --api-key is in --api-keys-file too; give it in one place")
        if not self.keyed and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines and there is no API key; set QVL_EDGE_API_KEY "
                "(or --api-key), or use --host 127.0.0.1"
            )

    @property
    def keyed(self) -> bool:
        """Whether a key is wanted."""
        return bool(self._by_digest)

    @property
    def separate(self) -> bool:
        """Whether there is more than one caller, whose caches must not tell one of another."""
        return len(self._by_digest) > 1

    @functools.cached_property
    def _by_digest(self) -> dict[str, Caller]:
        own = () if self.api_key is None else (Caller.of_key("default", self.api_key),)
        return {caller.sha256: caller for caller in (*own, *self.callers)}

    def check(self, path: str, headers: dict[bytes, bytes]) -> Caller | None:
        """Whose key it is. Refusal 401 without one; 400 for a foreign Host (DNS rebinding) where none is set."""
        if not self.keyed:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            # a name that an attacker points at 127.0.0.1 would give his page the same origin as this server
            if re.sub(r":[0-9]*$", "", host) not in LOOPBACK_NAMES | {self.host.lower()}:
                raise Refusal(
                    400,
                    "the Host header is not a name of this machine; with an API key (QVL_EDGE_API_KEY or --api-key) "
                    "every name is accepted, host.docker.internal and those of a private network among them",
                    code="host_not_allowed",
                )
            return None
        if path in OPEN_PATHS:
            return None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # a hash tells by the time that its look-up takes nothing of the key
        caller = self._by_digest.get(hashlib.sha256(key.strip()).hexdigest())
        if scheme.lower() != b"bearer" or caller is None:
            raise Refusal(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                kind=AUTHENTICATION,
                headers={"www-authenticate": "Bearer"},
            )
        if path == "/metrics" and not caller.metrics:
            message = f"the key {caller.name!r} may not read the metrics, which count everybody; its table says metrics"
            raise Refusal(403, message, code="not_allowed", kind=AUTHENTICATION)
        return caller


def is_loopback(host: str) -> bool:
    """Whether a server bound to `host` can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI middleware: checks Access first, adds security headers and x-request-id to every response, and counts it.

    A response that comes before the whole body was read, as most refusals do, is complete when the rest has come, or
    DRAIN_BYTES of it: a connection that is closed while the client still sends is reset, and the response lost.
    """

    def __init__(self, app: ASGIApp, access: Access, count: Callable[[str, int, Caller | None], None]):
        self.app, self.access, self.count = app, access, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        caller: Caller | None = None
        csp = PAGE_CSP if scope["path"] in OPEN_PATHS else API_CSP
        extra = [(k.encode(), v.encode()) for k, v in {**HEADERS, "content-security-policy": csp}.items()]

        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        extra.append((b"x-request-id", given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()))
        unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"

        async def watched() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(scope["path"], message["status"], caller)
                message = {**message, "headers": [*message["headers"], *extra]}
            elif unread and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _drain(watched)
                message = {**message, "body": b""}
            await send(message)

        try:
            caller = self.access.check(scope["path"], headers)
            await self.app({**scope, "caller": caller}, watched, guarded)
        except Refusal as refusal:
            log_refusal(refusal, scope["method"])
            await respond(refusal)(scope, watched, guarded)
        except Exception as error:  # the 500 has been sent; the message is not logged, it may quote the request
            log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))


async def _drain(receive: Receive) -> None:
    """Read the rest of a body, within bounds."""
    left = DRAIN_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            while left > 0:
                message = await asyncio.wait_for(receive(), DRAIN_IDLE_S)
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def respond(refusal: Refusal) -> Response:
    """The refusal as a response."""
    return Response(refusal.body.model_dump_json(), refusal.status, refusal.headers, media_type="application/json")


def log_refusal(refusal: Refusal, method: str) -> None:
    """Log the status, the reason and the fields, and nothing of the request's content, as unknown fields are."""
    log.info("refused %s: %s", method, " ".join([str(refusal.status), refusal.code or refusal.kind, *refusal.params]))


@dataclass(eq=False)
class Body:
    """One that is in memory."""

    size: int = 0
    reading: asyncio.Timeout | None = None  # None: it is read
    put_out: bool = False


@dataclass
class Bodies:
    """Those of all requests, from their first byte until nothing of them is needed any more: at most so many bytes.

    They take no place in the queue while they come: 32 slow ones of 55 bytes would give everybody else 429. Where there
    are too many bytes, the largest that is still being read goes.
    """

    most: int
    held: dict[Body, None] = field(default_factory=dict)

    @contextlib.contextmanager
    def one(self) -> Iterator[Body]:
        """Another."""
        body = Body()
        self.held[body] = None
        try:
            yield body
        finally:
            self.held.pop(body, None)

    def make_room(self) -> None:
        """Put out the largest ones, as long as there are too many bytes."""
        while sum(body.size for body in self.held) > self.most:
            largest = max((body for body in self.held if body.reading is not None), key=lambda body: body.size)
            del self.held[largest]
            largest.put_out = True
            assert largest.reading is not None
            with contextlib.suppress(RuntimeError):  # its time is over already
                largest.reading.reschedule(0)  # now


async def read_body(request: Request, limit: int, bodies: Bodies | None = None, body: Body | None = None) -> bytes:
    """The body of a JSON request. Refusal: 415, 413 as soon as it exceeds `limit` bytes, 400 when it takes too long,
    429 when others take the memory."""
    body = body or Body()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also makes browsers send a CORS preflight, which is refused
        raise Refusal(415, "the Content-Type must be application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "compressed bodies are not supported; send it uncompressed", code="unsupported_media_type")
    declared = request.headers.get("content-length", "")
    content, began = bytearray(), asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(min(BODY_FREE_S, BODY_TIMEOUT_S)) as body.reading:
            if declared.isascii() and declared.isdigit() and int(declared) > limit:
                raise _too_large(limit)
            async for chunk in request.stream():
                content += chunk
                body.size = len(content)
                if body.size > limit:
                    raise _too_large(limit)
                if not body.put_out:
                    body.reading.reschedule(began + min(BODY_FREE_S + body.size / BODY_RATE, BODY_TIMEOUT_S))
                if bodies is not None:
                    bodies.make_room()
    except TimeoutError:
        close = {"connection": "close"}
        if body.put_out:
            message = "the requests of others take the memory for bodies; try again later, or send a smaller one"
            raise Refusal(
                429, message, code="queue_full", kind=RATE_LIMIT, headers={"retry-after": "1", **close}
            ) from None
        message = (
            f"the body was not received within {BODY_TIMEOUT_S:g} s, or came slower than {BODY_RATE} bytes a second"
        )
        raise Refusal(400, message, code="body_timeout", headers=close) from None
    except ClientDisconnect:
        raise Refusal(400, "the connection was closed before the end of the body", code="body_cut") from None
    finally:
        body.reading = None
    return bytes(content)


def _too_large(limit: int) -> Refusal:
    return Refusal(
        413,
        f"the body has more than {limit} bytes; shrink the images (the model sees 448 x 448)",
        code="request_too_large",
        headers={"connection": "close"},
    )


def parse_json(body: bytes) -> Any:
    """JSON with bounded depth and number of values. Refusal 400 says what is wrong."""
    depth = 0
    for count, mark in enumerate(_MARKS.finditer(body)):
        if mark[0] in (b"[", b"{"):
            depth += 1
        elif mark[0] in (b"]", b"}"):
            depth -= 1
        if depth > MAX_DEPTH:
            raise invalid(None, f"the JSON is more than {MAX_DEPTH} levels deep", code="invalid_json")
        if count > MAX_MARKS:
            raise invalid(None, f"the JSON has more than {MAX_MARKS} values", code="invalid_json")
    try:
        return from_json(body, allow_inf_nan=False)  # it refuses lone surrogates too, so that all text is Unicode
    except ValueError as error:  # its message says where, and quotes nothing
        raise invalid(None, f"the body is not valid JSON: {error}", code="invalid_json") from None
