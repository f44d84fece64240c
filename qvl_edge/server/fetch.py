"""Fetch images from allowed hosts without server-side request forgery: only public addresses are connected to.

A name is resolved once and the connection goes to the address that was checked, so that DNS rebinding has no effect.
Proxies of the environment are not used: they would resolve the name again.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

from qvl_edge.server.refusal import Refusal, invalid

MAX_REDIRECTS = 3
TIMEOUT_S = 10.0  # for DNS, connections, redirects and the body together
MAX_BYTES = 20 << 20
MAX_HEADER_BYTES = 16 << 10
PORTS = {"http": 80, "https": 443}
REDIRECTS = frozenset({301, 302, 303, 307, 308})

# IETF protocol assignments and documentation (RFC 6890, RFC 9637), whatever Python's own tables say of them
_NEVER_PUBLIC = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "2001::/23", "3fff::/20")))
_NAME = re.compile(r"(?=.{1,253}$)([a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]*[a-z0-9]|localhost")
_CLEAN = re.compile(r"[!-~]+")  # printable ASCII without spaces: nothing that could end a header line

Resolve = Callable[[str, int], Awaitable[list[str]]]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet.

    For IPv6 that is 2000::/3 without the ranges that embed an IPv4 address (6to4, Teredo); v4-mapped addresses and
    NAT64 lie outside of it.
    """
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        inside = ip in ipaddress.ip_network("2000::/3")
        if not inside or ip.sixtofour is not None or ip.teredo is not None:
            return False
    if any(ip in network for network in _NEVER_PUBLIC):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_private)


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of `host`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True)
class Fetcher:
    """Fetches from `domains` ("host", or "host:port" for a port that is not the scheme's), only."""

    domains: frozenset[str]
    resolve: Resolve = resolve
    is_public: Callable[[str], bool] = is_public
    timeout_s: float = TIMEOUT_S
    max_bytes: int = MAX_BYTES
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    async def fetch(self, url: str, param: str) -> bytes:
        """The body of `url`. Refusal 400 at `param` if it is not allowed, too large, too slow or missing."""
        try:
            async with asyncio.timeout(self.timeout_s):
                for _ in range(MAX_REDIRECTS + 1):
                    answer = await self._get(url, param)
                    if isinstance(answer, bytes):
                        return answer
                    target = urljoin(url, answer)
                    if url.startswith("https:") and not target.startswith("https:"):
                        raise _refused(param, "the image's host redirects from https to http")
                    url = target
                raise _refused(param, f"the image's URL has more than {MAX_REDIRECTS} redirects")
        except TimeoutError:
            raise _refused(param, f"the image was not received within {self.timeout_s:g} s") from None
        except (OSError, ssl.SSLError, h11.ProtocolError, EOFError) as error:
            raise _refused(param, f"the image could not be fetched ({type(error).__name__})") from None

    async def _get(self, url: str, param: str) -> bytes | str:
        """The body, or the target of a redirect."""
        parts, host, port = self._allowed(url, param)
        addresses = await self.resolve(host.strip("[]"), port)
        if not addresses or not all(self.is_public(address) for address in addresses):
            raise _refused(param, "the image's host has an address that is not public")
        tls = {"ssl": self.tls, "server_hostname": host} if parts.scheme == "https" else {}
        reader, writer = await _connect(addresses, port, tls)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADER_BYTES)
            headers = [("Host", parts.netloc), ("Accept", "image/*"), ("Accept-Encoding", "identity")]
            request = h11.Request(method="GET", target=target, headers=[*headers, ("Connection", "close")])
            writer.write(connection.send(request) + connection.send(h11.EndOfMessage()))
            await writer.drain()
            return await self._answer(connection, reader, param)
        finally:
            writer.transport.abort()  # not close(): that would wait for TLS's close_notify

    def _allowed(self, url: str, param: str) -> tuple[SplitResult, str, int]:
        """The URL's parts, its host and its port. Refusal unless the host is one of the listed ones."""
        try:
            if not _CLEAN.fullmatch(url):
                raise ValueError
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise _refused(param, "the URL is malformed") from None
        if parts.scheme not in PORTS:
            raise _refused(param, "only http and https are fetched")
        if "@" in parts.netloc or not _is_plain_host(host):
            raise _refused(
                param, "the URL's host must be a name or a standard IP address, without a user, octal or decimal form"
            )
        default = PORTS[parts.scheme]
        name = host if port in (None, default) else f"{host}:{port}"
        if name not in self.domains:
            raise _refused(param, "the URL's host is not among --allowed-media-domains", code="domain_not_allowed")
        return parts, host, port or default

    async def _answer(self, connection: h11.Connection, reader: asyncio.StreamReader, param: str) -> bytes | str:
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Response):
                found = {bytes(name).lower(): bytes(value) for name, value in event.headers}
                if event.status_code in REDIRECTS and b"location" in found:
                    return found[b"location"].decode("latin-1")
                if event.status_code != 200:
                    raise _refused(param, f"the image's host answered with status {event.status_code}")
                if found.get(b"content-encoding", b"identity") != b"identity":
                    raise _refused(param, "the image's host applied a Content-Encoding")
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self.max_bytes:
                    raise _refused(param, f"the image has more than {self.max_bytes} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body)
            elif isinstance(event, h11.ConnectionClosed):
                raise EOFError


async def _connect(
    addresses: Iterable[str], port: int, tls: dict[str, object]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the first of `addresses` that accepts one."""
    problem = OSError("no address")
    for address in addresses:
        try:
            return await asyncio.open_connection(address, port, **tls)  # type: ignore[arg-type]
        except OSError as error:
            problem = error
    raise problem


def _is_plain_host(host: str) -> bool:
    """A DNS name, dotted IPv4 with four decimal numbers, or IPv6; not 2130706433, 0x7f.1 or 0177.0.0.1."""
    if _NAME.fullmatch(host):
        return True
    try:
        return "%" not in host and bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _refused(param: str, message: str, *, code: str = "image_not_fetched") -> Refusal:
    return invalid(param, message, code=code)
