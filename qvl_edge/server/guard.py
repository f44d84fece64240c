"""What runs before every route: authentication, security headers, and limits on the body and its JSON."""

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import re
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qvl_edge.errors import ConfigError
from qvl_edge.server.refusal import AUTHENTICATION, Refusal, invalid

log = logging.getLogger("qvl_edge.server")

MAX_DEPTH = 16  # of JSON; a request with a schema in response_format needs about ten
MAX_MARKS = 100_000  # brackets and commas of JSON: what bounds the objects that 32 MB can become
DRAIN_BYTES, DRAIN_S, DRAIN_IDLE_S = 64 << 20, 5.0, 1.0  # of a body that is not wanted any more: in all, and silent
BODY_TIMEOUT_S = 60.0  # for the whole body: bounds how long a slow sender holds a connection

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
OPEN_PATHS = frozenset({"/health", "/", "/app.js", "/style.css", "/favicon.svg"})
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})

_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\[\]:-]+")
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")
# an unterminated string matches up to the end of the body: trying again at each quote would take quadratic time
_MARKS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?+|[\[\]{},]', re.DOTALL)


@dataclass(frozen=True)
class Access:
    """Access control: by an API key; without one, for this machine only and under one of its own names."""

    host: str
    api_key: str | None
    origins: tuple[str, ...] = ()  # of pages elsewhere that browsers may let read responses; "*": all

    def __post_init__(self) -> None:
        for origin in self.origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"--allowed-origins {origin}: expected https://app.example.org, or *")
        if "*" in self.origins and self.api_key is None:
            raise ConfigError("--allowed-origins * would let every web page use this server; set QVL_EDGE_API_KEY too")
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("the API key is empty; give one, or leave it out to serve this machine only")
        if self.api_key is None and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines and there is no API key; set QVL_EDGE_API_KEY "
                "(or --api-key), or use --host 127.0.0.1"
            )

    def check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Refusal 401 without the key; without one set, 400 for a foreign Host header (DNS rebinding)."""
        if self.api_key is None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            # a name that an attacker points at 127.0.0.1 would give his page the same origin as this server
            if re.sub(r":[0-9]*$", "", host) not in LOOPBACK_NAMES | {self.host.lower()}:
                raise Refusal(
                    400,
                    "the Host header is not a name of this machine; with an API key (QVL_EDGE_API_KEY or --api-key) "
                    "every name is accepted, host.docker.internal and those of a private network among them",
                    code="host_not_allowed",
                )
            return
        if path in OPEN_PATHS:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.api_key.encode()):
            raise Refusal(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                kind=AUTHENTICATION,
                headers={"www-authenticate": "Bearer"},
            )


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

    def __init__(self, app: ASGIApp, access: Access, count: Callable[[str, int], None]):
        self.app, self.access, self.count = app, access, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
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
                self.count(scope["path"], message["status"])
                message = {**message, "headers": [*message["headers"], *extra]}
            elif unread and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _drain(watched)
                message = {**message, "body": b""}
            await send(message)

        try:
            self.access.check(scope["path"], headers)
            await self.app(scope, watched, guarded)
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


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a JSON request. Refusal: 415, 413 as soon as it exceeds `limit` bytes, 400 when it takes too long."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also makes browsers send a CORS preflight, which is refused
        raise Refusal(415, "the Content-Type must be application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "compressed bodies are not supported; send it uncompressed", code="unsupported_media_type")
    declared = request.headers.get("content-length", "")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            if declared.isascii() and declared.isdigit() and int(declared) > limit:
                raise _too_large(limit)
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        message = f"the body was not received within {BODY_TIMEOUT_S:g} s"
        raise Refusal(400, message, code="body_timeout", headers={"connection": "close"}) from None
    except ClientDisconnect:
        raise Refusal(400, "the connection was closed before the end of the body", code="body_cut") from None
    return bytes(body)


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
