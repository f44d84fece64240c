"""Who gets in, and what a request may weigh: keys, hosts, bodies, JSON, headers, logs."""

import http.client
import json
import logging
import socket
import sys
import time

import httpx
import pytest

from qvl_edge.errors import ConfigError
from qvl_edge.server import guard
from qvl_edge.server.guard import Access, is_loopback, parse_json
from qvl_edge.server.refusal import Refusal

from .harness import MODEL, ScriptedWorker, Server, serving

pytestmark = pytest.mark.slow

KEY = "sesame-ключ"
API = (
    "/v1/models",
    "/v1/models/small",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/metrics",
    "/openapi.json",
    "/nothing",
    "/docs",
)


@pytest.fixture(scope="module")
def locked():
    with serving(ScriptedWorker("x"), key=KEY) as running:
        yield running


@pytest.fixture
def open_server():
    with serving(ScriptedWorker("x")) as running:
        yield running


@pytest.mark.parametrize("path", API)
@pytest.mark.parametrize("value", ["", "Bearer", "Bearer wrong", "Basic sesame", f"Bearer {KEY}x", "Bearer \x80"])
def test_every_route_of_the_api_wants_the_key(locked: Server, path: str, value: str) -> None:
    headers = {"authorization": value.encode()} if value else {}
    response = httpx.get(locked.url + path, headers=headers)
    assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer" and KEY not in response.text


def test_with_the_key_the_api_answers(locked: Server) -> None:
    good = {"authorization": f"Bearer {KEY}".encode(), "content-type": "application/json"}
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "a"}]})
    assert httpx.get(f"{locked.url}/v1/models", headers=good).status_code == 200
    assert locked.post(content=body, headers=good).status_code == 200
    assert httpx.get(f"{locked.url}/nothing", headers=good).status_code == 404


@pytest.mark.parametrize("path", ["/health", "/", "/app.js", "/style.css", "/favicon.svg"])
def test_health_and_the_pages_files_need_no_key(locked: Server, path: str) -> None:
    assert httpx.get(locked.url + path).status_code == 200


@pytest.mark.parametrize("path", ["//health", "/health/", "/health/../v1/models", "/./v1/models", "/%2e%2e/etc/passwd"])
def test_no_spelling_of_a_path_goes_round_the_key(locked: Server, path: str) -> None:
    host, port = locked.url[7:].split(":")
    connection = http.client.HTTPConnection(host, int(port))
    connection.request("GET", path)  # unlike httpx this sends the path as it is
    assert connection.getresponse().status == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_other_machines_are_not_let_in_without_a_key(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="QVL_EDGE_API_KEY"):
        Access(host, None)
    assert Access(host, "k").api_key == "k"
    with pytest.raises(ConfigError, match="empty"):
        Access(host, " ")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1"])
def test_this_machine_needs_no_key(host: str) -> None:
    assert Access(host, None).api_key is None


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_without_a_key_a_name_from_elsewhere_is_refused(open_server: Server, host: str) -> None:
    response = httpx.get(f"{open_server.url}/v1/models", headers={"host": host})
    assert response.status_code == 400 and response.json()["error"]["code"] == "host_not_allowed"
    port = open_server.url.rpartition(":")[2]
    for own in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}"):
        assert httpx.get(f"{open_server.url}/v1/models", headers={"host": own}).status_code == 200


def test_a_foreign_page_gets_no_leave_from_the_browser(open_server: Server) -> None:
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    preflight = httpx.options(f"{open_server.url}/v1/chat/completions", headers=headers)
    assert preflight.status_code == 405
    plain = open_server.post(content=b"{}", headers={"content-type": "text/plain", "origin": "https://evil.example"})
    assert plain.status_code == 415 and plain.json()["error"]["code"] == "unsupported_media_type"
    for response in (preflight, plain, httpx.get(f"{open_server.url}/v1/models", headers=headers)):
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("host", ["host.docker.internal:8000", "qvl.internal", "192.168.1.7", "box.local"])
def test_with_a_key_a_private_name_works_and_without_one_the_refusal_says_so(
    locked: Server, open_server: Server, host: str
) -> None:
    good = {"authorization": f"Bearer {KEY}".encode(), "host": host.encode()}
    assert httpx.get(f"{locked.url}/v1/models", headers=good).status_code == 200
    refused = httpx.get(f"{open_server.url}/v1/models", headers={"host": host})
    assert refused.status_code == 400 and "with an API key" in refused.json()["error"]["message"]
    assert "host.docker.internal" in refused.json()["error"]["message"]


APP = "https://app.example.org"


def test_only_pages_of_the_allowed_origins_may_read_responses() -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    with serving(ScriptedWorker("x"), access=Access("127.0.0.1", KEY, (APP,))) as server:
        path, key = f"{server.url}/v1/chat/completions", {"authorization": f"Bearer {KEY}".encode()}
        leave = httpx.options(path, headers={"origin": APP, **asked})  # a browser asks without the key
        assert leave.status_code == 200 and leave.headers["access-control-allow-origin"] == APP
        assert "x-stainless-os" in leave.headers["access-control-allow-headers"]
        foreign = httpx.options(path, headers={"origin": "https://evil.example", **asked})
        assert foreign.status_code == 400 and "access-control-allow-origin" not in foreign.headers
        models = f"{server.url}/v1/models"
        said = httpx.get(models, headers={"origin": APP.encode(), **key})
        assert said.headers["access-control-allow-origin"] == APP and "origin" in said.headers["vary"].lower()
        assert said.headers["x-frame-options"] == "DENY"
        other = httpx.get(models, headers={b"origin": b"https://evil.example", **key})
        assert "access-control-allow-origin" not in other.headers
        assert httpx.get(models, headers={"origin": APP}).status_code == 401


def test_an_origin_lets_in_no_other_host_and_no_page_at_all_without_a_key() -> None:
    with serving(ScriptedWorker("x"), access=Access("127.0.0.1", None, (APP,))) as server:
        assert httpx.get(f"{server.url}/v1/models", headers={"origin": APP, "host": "evil.example"}).status_code == 400
    assert Access("127.0.0.1", KEY, ("*",)).origins == ("*",)
    with pytest.raises(ConfigError, match="QVL_EDGE_API_KEY"):
        Access("127.0.0.1", None, ("*",))
    for origin in ("app.example.org", "null", "https://a.example/", "https://*.example", "https://a.example\n", ""):
        with pytest.raises(ConfigError, match="--allowed-origins"):
            Access("127.0.0.1", KEY, (origin,))


def test_every_response_has_the_id_of_its_request(open_server: Server) -> None:
    given = {"x-request-id": "req_1:a.b-c"}
    for path in ("/v1/models", "/nothing", "/health"):
        assert httpx.get(open_server.url + path, headers=given).headers["x-request-id"] == given["x-request-id"]
    made = {httpx.get(f"{open_server.url}/health").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2 and all(len(each) == 32 for each in made)
    for odd in ("a b", "x" * 129, "é"):
        headers = {b"x-request-id": odd.encode()}
        assert len(httpx.get(f"{open_server.url}/health", headers=headers).headers.get_list("x-request-id")[0]) == 32


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/nothing"])
def test_every_response_has_its_security_headers(open_server: Server, path: str) -> None:
    headers = httpx.get(open_server.url + path).headers
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert ("script-src 'self'" in policy) == (path in ("/", "/health"))


def test_a_declared_and_an_undeclared_large_body_are_refused_while_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(ScriptedWorker("x"), max_body_bytes=1000) as server:
        assert server.post(content=b"x" * 1001).status_code == 413
        assert server.post(content=iter([b"x" * 400] * 3)).status_code == 413
        assert server.ask("a" * 800).status_code == 200
        host, port = server.url[7:].split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:  # says 10 GB, sends nothing
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 10000000000\r\n\r\n".encode())
            assert b" 413 " in connection.recv(1000)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/nothing", "/v1/models"])
@pytest.mark.parametrize("keep", ["keep-alive", "close"])
def test_a_refusal_of_an_unread_body_arrives(path: str, keep: str) -> None:
    with serving(ScriptedWorker("x"), max_body_bytes=1000) as server:
        host, port = server.url[7:].split(":")
        size = 8 << 20  # more than the buffers of both ends hold
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: {keep}\r\n"
        for _ in range(3):
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode())
                time.sleep(0.05)  # the refusal is sent by now
                connection.sendall(b"x" * size)
                assert connection.recv(1000).startswith((b"HTTP/1.1 413", b"HTTP/1.1 404", b"HTTP/1.1 405"))


def test_a_body_without_an_end_is_read_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "DRAIN_BYTES", 100_000)
    with serving(ScriptedWorker("x"), max_body_bytes=1000) as server:
        host, port = server.url[7:].split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 10000000000\r\n\r\n".encode())
            with pytest.raises(OSError):
                for _ in range(10_000):
                    connection.sendall(b"x" * 100_000)
        monkeypatch.setattr(guard, "DRAIN_S", 0.05)
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(f"{head}Content-Length: 10000000000\r\n\r\n".encode())
            assert b" 413 " in connection.makefile("rb").read()  # to the end of the connection


def test_a_body_that_trickles_in_is_cut(open_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 0.05)
    host, port = open_server.url[7:].split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        answer = connection.makefile("rb").read()
        assert b" 400 " in answer and b"body_timeout" in answer


def test_a_compressed_body_is_not_unpacked(open_server: Server) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert open_server.post(content=b"\x1f\x8b", headers=headers).status_code == 415


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nonsense", b"{} {}", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b'{"a": NaN}', b'{"a": -Infinity}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 100_000, b'{"a":' * 50 + b"1" + b"}" * 50, b"[" + b"1," * 200_000 + b"1]",
        b'{"a": "\\ud800"}', b'{"\\udfff": 1}', b'{"a": "\xed\xa0\x80"}', b'{"a": "\xff"}', b'{"a": "\n"}', b"[1,]",
        b'"' + b"\\" * 99_999, b'{"a": "' + b'\\"' * 50_000,
    ],
)  # fmt: skip
def test_broken_deep_and_crowded_json_is_a_400(open_server: Server, body: bytes) -> None:
    response = open_server.post(content=body)
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("body", [b"[]", b"3", b'"a"', b"null"])
def test_json_that_is_no_object_is_a_400(open_server: Server, body: bytes) -> None:
    assert open_server.post(content=body).json()["error"]["message"] == "the body must be a JSON object"


def test_brackets_within_strings_are_not_depth() -> None:
    deep = json.dumps({"a": '[{"' * 5000, 'k\\"[': "\\"}).encode()
    assert parse_json(deep) == json.loads(deep)
    nested = "[" * guard.MAX_DEPTH + "]" * guard.MAX_DEPTH
    assert parse_json(nested.encode()) == json.loads(nested)
    with pytest.raises(Refusal, match="16 levels"):
        parse_json(f"[{nested}]".encode())
    assert sys.getrecursionlimit() > guard.MAX_DEPTH


@pytest.mark.parametrize("injected", [b"x\r\nX-Evil: 1", b"x\nX-Evil: 1", b"x\x00y"])
def test_line_ends_in_headers_and_paths_give_no_header(open_server: Server, injected: bytes) -> None:
    host, port = open_server.url[7:].split(":")
    for request in (
        b"GET /" + injected + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /%0d%0aX-Evil:%201 HTTP/1.1\r\nHost: localhost\r\nX-A: " + injected + b"\r\nConnection: close\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(request)
            answer = connection.makefile("rb").read()
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404")) and b"evil" not in answer.lower()


def test_the_log_says_why_without_what(open_server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "qvl_edge.server")
    secret = "a-secret-of-the-caller"
    open_server.ask(secret)
    open_server.ask(secret, temperature=9)
    open_server.post({"model": secret, "messages": [], secret: 1})
    httpx.get(f"{open_server.url}/{secret}?{secret}", headers={"authorization": f"Bearer {secret}"})
    ours = [record.getMessage() for record in caplog.records if record.name == "qvl_edge.server"]
    assert ours == [
        "refused POST: 400 invalid_request_error temperature",
        "refused POST: 400 unknown_parameter model messages",
    ]
