"""Where images may come from, and every way that should not work."""

import asyncio
import base64
import contextlib
import io
import os
import socket
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from PIL import Image

from qvl_edge import child
from qvl_edge.engine.worker import Worker
from qvl_edge.errors import ImageError
from qvl_edge.server import media
from qvl_edge.server.fetch import Fetcher, is_public
from qvl_edge.server.media import Media
from qvl_edge.server.refusal import Refusal
from qvl_edge.vision.decoder import Decoders
from qvl_edge.vision.image import Picture, load_picture

from .harness import MODEL, ScriptedWorker, Server, data_uri, picture, serving, text

pytestmark = pytest.mark.slow

SECRET = "/etc/passwd"


@pytest.fixture
def png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((4, 3), 99).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[ScriptedWorker, Server]]:
    engine = ScriptedWorker("x")
    with serving(engine) as running:
        yield engine, running


def load(source: Media, url: str) -> Picture:
    return asyncio.run(source.load(url, "p"))


def is_of(picture: Picture, content: bytes) -> bool:
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    square = expected.resize((448, 448), Image.Resampling.BICUBIC)
    return picture.frame == (*expected.size, False) and picture.square.tobytes() == square.tobytes()


def refused(source: Media, url: str) -> str:
    with pytest.raises(Refusal) as said:
        load(source, url)
    assert said.value.status == 400 and said.value.param == "p"
    return str(said.value.code)


# ---------------------------------------------------------------- text opens nothing


watched: list[list[str]] = []  # audit hooks stay for good, so there is one, and tests push a list while they watch


@sys.addaudithook
def _watch(event: str, arguments: tuple) -> None:
    if watched and event in ("open", "socket.connect", "socket.getaddrinfo"):
        watched[-1].append(f"{event} {arguments}")


@contextlib.contextmanager
def watching() -> Iterator[list[str]]:
    """What any thread of this process opens, connects to or looks up, as the interpreter itself reports it."""
    seen: list[str] = []
    watched.append(seen)
    try:
        yield seen
    finally:
        watched.remove(seen)


@pytest.mark.parametrize("markup", [f"<img>{SECRET}</img>", f"Picture 1:<img>{SECRET}", "<img>http://10.9.8.7/</img>"])
def test_no_text_ever_opens_anything(server: Server, markup: str) -> None:
    with watching() as seen, contextlib.suppress(OSError):
        Path(SECRET).read_bytes()
    assert any(SECRET in line for line in seen)  # it would be seen
    good = data_uri(Image.new("RGB", (2, 2)))
    conversation = [
        {"role": "system", "content": markup},
        {"role": "user", "content": markup},
        {"role": "assistant", "content": markup},
        {"role": "user", "content": [picture(good), text(markup)]},
    ]
    with watching() as seen:
        said = server.post({"model": MODEL, "messages": conversation, "max_tokens": 2})
    if "</img>" in markup:  # Qwen-VL's own way to write an image is told what to do instead
        error = said.json()["error"]
        assert (said.status_code, error["code"]) == (400, "image_in_text") and "image_url" in error["message"]
    else:
        assert said.status_code == 200
    assert not [line for line in seen if SECRET in line or "10.9.8.7" in line]
    assert sum(line.startswith("socket.connect") for line in seen) == 1  # the test's own


def test_all_pictures_that_cannot_be_taken_are_named_at_once(server: Server) -> None:
    parts = [picture("ftp://a/b.png"), picture(data_uri(Image.new("RGB", (2, 2)))), picture("data:,"), text("a")]
    conversation = [{"role": "user", "content": parts}, {"role": "user", "content": "<img>a/b.png</img>"}]
    said = server.post({"model": MODEL, "messages": conversation}).json()["error"]
    assert said["code"] == "image_in_text" and said["param"] == "messages[1].content"  # known before any is opened
    for where in ("messages[1].content: ", "messages[0].content[0].image", "messages[0].content[2].image"):
        assert where in said["message"]
    assert "content[1]" not in said["message"]


# ---------------------------------------------------------------- data URIs


def test_the_picture_of_a_data_uri_arrives(png: bytes) -> None:
    assert is_of(load(Media(), data_uri(png)), png)
    assert is_of(load(Media(), data_uri(png).replace("image/png", "")), png)


@pytest.mark.parametrize(
    "url",
    ["data:", "data:,x", "data:image/png,abc", "data:text/html;base64,PGI+", "data:image/png;base64,", "DATA:x",
     "data:image/png;base64,@@@@", "data:image/png;base64,abc", "data:image/png;base64,YWJj\nYWJj",
     "data:image/png;base64,YWJj YWJj",
     "data:image/png;base64,YQ==YQ==", "data:image/png;base64,é"],
)  # fmt: skip
def test_what_is_no_picture_in_base64_is_refused(url: str) -> None:
    assert refused(Media(), url) == "bad_image"


def test_a_data_uri_may_be_written_in_any_way_and_base64_needs_none(png: bytes) -> None:
    body = base64.b64encode(png).decode()
    for url in (
        f"data:image/png;charset=utf-8;name=a.png;base64,{body}",
        f"DATA:;BASE64,\n{body[:40]}\r\n{body[40:]}\n",
        f"data:image/png;base64,{quote(body.rstrip('='), safe='')}",
        "data:image/png;base64," + base64.urlsafe_b64encode(png).decode(),
        body,
    ):
        assert is_of(load(Media(), url), png)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "AVIF", "TIFF", "ICO"])
def test_the_formats_of_the_web_and_of_scanners_are_taken(kind: str) -> None:
    assert load(Media(), data_uri(Image.new("RGB", (32, 32), "red"), kind)).frame == (32, 32, False)


def test_another_format_is_refused_by_its_name_and_with_the_way_out() -> None:
    for content, words in ((b"P6 1 1 255\n123", "accepted are JPEG"), (SVG, "an SVG drawing; render it to PNG")):
        with pytest.raises(Refusal, match=words):
            load(Media(), data_uri(content))


def test_transparency_and_orientation_are_as_in_the_runtime() -> None:
    image, tags, file = Image.new("RGBA", (4, 2), (9, 9, 9, 0)), Image.Exif(), io.BytesIO()
    tags[0x112] = 6
    image.save(file, "PNG", exif=tags)
    shown = load(Media(), data_uri(file.getvalue()))
    assert shown.frame == (2, 4, True) and shown.square.getpixel((0, 0)) == (255, 255, 255)
    assert load(Media(background="none"), data_uri(file.getvalue())).square.getpixel((0, 0)) == (9, 9, 9)


def test_pictures_are_made_for_the_model_that_is_served() -> None:
    visual = SimpleNamespace(image_size=56)
    made = Media().for_model(SimpleNamespace(config=SimpleNamespace(visual=visual), background="lime"))
    shown = load(made, data_uri(Image.new("RGBA", (8, 8))))
    assert shown.square.size == (56, 56) and shown.square.getpixel((0, 0)) == (0, 255, 0)


def test_a_picture_is_decoded_once_for_all_answers(scripted, png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, server = scripted
    decoded: list[str] = []
    decode = media._DECODERS.decode
    monkeypatch.setattr(media._DECODERS, "decode", lambda *a: decoded.append("") or decode(*a))
    assert server.ask([picture(data_uri(png)), text("a")], n=3).status_code == 200
    assert len(decoded) == 1
    one, two, three = (request.messages[-1].content[0]["image"] for request in engine.requests[-3:])
    assert one is two is three and isinstance(one, Picture)


def test_no_process_for_a_picture_is_no_fault_of_the_caller(scripted, png: bytes, monkeypatch) -> None:
    def start(*_, **__) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(media, "_DECODERS", Decoders())
    monkeypatch.setattr(child, "start", start)
    assert scripted[1].ask([picture(data_uri(png))]).status_code == 503


def test_the_refusal_names_the_part(scripted) -> None:
    _, server = scripted
    error = server.ask([text("a"), picture("data:image/png;base64,@")]).json()["error"]
    assert error["param"] == "messages[0].content[1].image_url.url" and error["code"] == "bad_image"


def test_an_image_past_the_byte_cap_is_refused(png: bytes) -> None:
    assert is_of(load(Media(max_bytes=len(png)), data_uri(png)), png)
    assert refused(Media(max_bytes=len(png) - 3), data_uri(png)) == "bad_image"


def bomb(width: int, height: int) -> bytes:
    """A PNG of this size whose pixels would be zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(10_000, 6_401), (50_000, 50_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="at most 64|decoded"):
        load_picture(bomb(*size), 448)
    assert refused(Media(), data_uri(bomb(*size))) == "bad_image"


def test_only_the_first_of_many_frames_is_taken(runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(100)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    with serving(Worker(runtime)) as server:
        said = server.ask([picture(data_uri(buffer.getvalue(), "GIF")), text("a")], max_tokens=1)
    assert said.status_code == 200 and said.json()["usage"]["prompt_tokens"] < 2 * 256


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) run\n"


@pytest.mark.parametrize(
    "content", [SVG, EPS, b"%PDF-1.4", b"<html>", b"", b"\0" * 1000, b"II*\0" + b"\0" * 100, b"P6 1 1 255\n123"]
)
def test_what_is_no_picture_of_the_listed_formats_is_refused(content: bytes) -> None:
    assert refused(Media(), data_uri(content)) == "bad_image"


def test_a_polyglot_is_the_picture_that_its_header_says_and_nothing_else(png: bytes, scripted) -> None:
    engine, server = scripted
    for tail in (SVG, b"PK\x03\x04", b"<script>alert(1)</script>", EPS):
        assert server.ask([picture(data_uri(png + tail))]).status_code == 200
        (element,) = engine.requests[-1].messages[-1].content
        assert is_of(element["image"], png)
        assert refused(Media(), data_uri(tail + png)) == "bad_image"


def test_a_picture_cut_in_the_middle_is_a_400(server: Server, scenes: list) -> None:
    whole = io.BytesIO()
    scenes[0].image.save(whole, "PNG")
    error = server.ask([picture(data_uri(whole.getvalue()[:5000]))]).json()["error"]
    assert error["code"] == "bad_image" and "damaged" in error["message"]


# ---------------------------------------------------------------- files


def test_files_and_other_schemes_are_refused_unless_they_were_allowed(scripted, png: bytes, tmp_path: Path) -> None:
    _, server = scripted
    (tmp_path / "a.png").write_bytes(png)
    cases = {
        f"file://{tmp_path}/a.png": "local_not_allowed",
        f"{tmp_path}/a.png": "local_not_allowed",
        "": "local_not_allowed",
        "http://example.org/a.png": "fetch_not_allowed",
        "HTTPS://example.org/a.png": "fetch_not_allowed",
        "gopher://127.0.0.1:70/_": "scheme_not_allowed",
        "ftp://example.org/a.png": "scheme_not_allowed",
        "javascript:alert(1)": "scheme_not_allowed",
        "blob:x": "scheme_not_allowed",
    }
    for url, code in cases.items():
        assert server.ask([picture(url)]).json()["error"]["code"] == code, url


@pytest.fixture
def tree(tmp_path: Path, png: bytes) -> Path:
    """root/ with pictures, links and pipes, and a secret beside it."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for place in (root / "a b.png", root / "sub/c.png", tmp_path / "secret.png"):
        place.write_bytes(png)
    (root / "inside.png").symlink_to(root / "sub/c.png")
    (root / "outside.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe.png")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2/d.png").write_bytes(png)
    return root


@pytest.mark.parametrize(
    "path",
    [
        "file://{root}/a%20b.png",
        "file://localhost{root}/sub/c.png",
        "{root}/sub/c.png",
        "sub/c.png",
        "inside.png",
        "sub/../a b.png",
    ],
)
def test_files_below_the_allowed_folder_are_read(tree: Path, png: bytes, path: str) -> None:
    assert is_of(load(Media(local_root=tree), path.format(root=tree)), png)


@pytest.mark.parametrize(
    "path",
    ["file:///etc/passwd", "/etc/passwd", "../secret.png", "file://{root}/../secret.png",
     "file://{root}/%2e%2e/secret.png", "sub/../../secret.png",
     "outside.png", "up/secret.png", "loop", "pipe.png", "sub", "", "none.png", "a\0b.png", "file://{root}/a%00.png",
     "file://evil.example/{root}/sub/c.png",
     "file://{root}/sub/c.png?x", "{root}2/d.png", "/dev/zero", "/proc/self/environ", "a" * 5000],
)  # fmt: skip
def test_what_leads_out_of_the_allowed_folder_looks_like_a_missing_file(tree: Path, path: str) -> None:
    assert refused(Media(local_root=tree), path.format(root=tree)) == "file_not_found"


def test_a_refused_path_keeps_no_descriptor_open(tree: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    refused(Media(local_root=tree), "sub")
    before = open_files()
    for path in ("sub", "pipe.png", "none.png", ".") * 20:
        refused(Media(local_root=tree), path)
    assert open_files() <= before


def test_a_file_that_is_no_picture_or_too_large_is_refused(tree: Path, png: bytes) -> None:
    (tree / "words.png").write_text("root:x:0:0")
    (tree / "big.png").write_bytes(png + b"\0" * 1000)
    assert refused(Media(local_root=tree), "words.png") == "bad_image"
    assert refused(Media(local_root=tree, max_bytes=1000), "big.png") == "bad_image"


# ---------------------------------------------------------------- fetching


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "240.0.0.1", "255.255.255.255",
     "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1",
     "::ffff:8.8.8.8", "::127.0.0.1",
     "64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1", "100::1",
     "192.0.0.1", "192.0.0.9", "192.0.0.15", "2001:1::1", "3fff::1", "3fff:fff:ffff::1"],
)  # fmt: skip
def test_private_addresses_in_any_form_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "2001:4860:4860::8888"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


async def no_resolving(host: str, port: int) -> list[str]:
    raise AssertionError(f"{host} was looked up")


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://other.example/a.png", "domain_not_allowed"),
        ("http://sub.img.example/a.png", "domain_not_allowed"),
        ("http://img.example:22/a.png", "domain_not_allowed"),
        ("http://127.0.0.1/a.png", "domain_not_allowed"),
        ("http://[::1]/a.png", "domain_not_allowed"),
        ("http://[::ffff:127.0.0.1]/a.png", "domain_not_allowed"),
        ("http://169.254.169.254/latest/meta-data", "domain_not_allowed"),
        ("http://2130706433/", "image_not_fetched"),
        ("http://0x7f000001/", "image_not_fetched"),
        ("http://0177.0.0.1/", "image_not_fetched"),
        ("http://127.1/", "image_not_fetched"),
        ("http://img.example@127.0.0.1/", "image_not_fetched"),
        ("http://127.0.0.1#@img.example/", "domain_not_allowed"),
        ("http://img.example\\@127.0.0.1/", "image_not_fetched"),
        ("http://img.example./", "image_not_fetched"),
        ("http://img.example:99999/", "image_not_fetched"),
        ("http://img.example/a\r\nX-Evil: 1", "image_not_fetched"),
        ("http://img.example/ a", "image_not_fetched"),
        ("http://ｉmg.example/", "image_not_fetched"),
        ("http://", "image_not_fetched"),
        ("http://[::1", "image_not_fetched"),
    ],
)
def test_a_host_that_is_not_listed_is_not_even_looked_up(url: str, code: str) -> None:
    fetcher = Fetcher(frozenset({"img.example"}), resolve=no_resolving)
    assert refused(Media(fetcher=fetcher), url) == code


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "169.254.169.254"], ["::ffff:10.0.0.1"], []])
def test_one_address_that_is_not_public_refuses_the_host(addresses: list[str]) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return addresses

    assert refused(Media(fetcher=Fetcher(frozenset({"img.example"}), resolve=resolve)), "http://img.example/") == (
        "image_not_fetched"
    )


@contextlib.contextmanager
def host(serve: Callable[[socket.socket], None]) -> Iterator[tuple[int, list[bytes]]]:
    """A server of one's own making on 127.0.0.1: its port, and the requests that came."""
    listening = socket.create_server(("127.0.0.1", 0))
    requests: list[bytes] = []

    def loop() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                requests.append(connection.recv(65536))
                serve(connection)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1], requests
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(10)


def saying(*pieces: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(b"".join(pieces))


def fetcher(port: int, *, lookups: list[str] | None = None, **options) -> Fetcher:
    """Takes 127.0.0.1 alone for a public address; img.example is there."""

    async def resolve(name: str, _: int) -> list[str]:
        if lookups is not None:
            lookups.append(name)
        return ["127.0.0.1"] if name == "img.example" and len(lookups or [0]) < 3 else ["10.0.0.1"]

    domains = frozenset({f"img.example:{port}", "inner.example"})
    return Fetcher(domains, resolve=resolve, is_public=lambda address: address == "127.0.0.1", **options)


OK = b"HTTP/1.1 200 OK\r\n"


def test_a_listed_host_is_fetched_at_the_address_that_was_checked(png: bytes) -> None:
    lookups: list[str] = []
    with host(saying(OK, f"Content-Length: {len(png)}\r\n\r\n".encode(), png)) as (port, requests):
        assert is_of(load(Media(fetcher=fetcher(port, lookups=lookups)), f"http://img.example:{port}/a.png?b=1"), png)
    assert lookups == ["img.example"]  # once: a name that changes its address has no second say
    head = requests[0].decode().split("\r\n")
    assert head[0] == "GET /a.png?b=1 HTTP/1.1" and f"Host: img.example:{port}" in head
    assert not [line for line in head if line.lower().startswith(("cookie", "authorization", "user-agent", "referer"))]


def test_a_body_in_chunks_or_until_the_end_of_the_connection_is_read(png: bytes) -> None:
    chunked = b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%b\r\n0\r\n\r\n" % (len(png), png)
    for body in (chunked, b"\r\n" + png):
        with host(saying(OK, body)) as (port, _):
            assert is_of(load(Media(fetcher=fetcher(port)), f"http://img.example:{port}/"), png)


@pytest.mark.parametrize(
    "location",
    ["http://127.0.0.1/", "http://169.254.169.254/", "http://inner.example/", "//evil.example/", "file:///etc/passwd",
     "gopher://img.example/",
     "http://img.example:22/", "http://2130706433/", "http://[::1]/"],
)  # fmt: skip
def test_a_redirect_is_checked_like_the_first_url(location: str) -> None:
    with host(saying(b"HTTP/1.1 302 Found\r\nLocation: ", location.encode(), b"\r\nContent-Length: 0\r\n\r\n")) as (
        port,
        requests,
    ):
        assert refused(Media(fetcher=fetcher(port)), f"http://img.example:{port}/") in (
            "image_not_fetched",
            "domain_not_allowed",
        )
    assert len(requests) == 1


def test_a_name_whose_address_changes_is_checked_again_at_each_redirect() -> None:
    lookups: list[str] = []
    with host(saying(b"HTTP/1.1 307 x\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n")) as (port, requests):
        code = refused(Media(fetcher=fetcher(port, lookups=lookups)), f"http://img.example:{port}/")
    assert code == "image_not_fetched" and len(lookups) == 3  # the third answer was 10.0.0.1
    assert len(requests) == 2


def test_a_redirect_does_not_leave_https(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def redirects(_: Fetcher, url: str, __: str) -> str:
        asked.append(url)
        return "http://img.example/a.png"

    monkeypatch.setattr(Fetcher, "_get", redirects)
    with pytest.raises(Refusal, match="from https to http"):
        load(Media(fetcher=fetcher(443)), "https://img.example/a.png")
    assert asked == ["https://img.example/a.png"]


def test_the_fourth_redirect_is_one_too_many() -> None:
    with host(saying(b"HTTP/1.1 301 x\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n")) as (port, requests):
        with pytest.raises(Refusal, match="more than 3 redirects"):
            load(Media(fetcher=fetcher(port)), f"http://img.example:{port}/")
    assert len(requests) == 4


def endless(head: bytes, piece: bytes) -> Callable[[socket.socket], None]:
    def serve(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)

    return serve


def test_an_endless_body_is_cut_at_the_cap() -> None:
    for head in (b"\r\n", b"Content-Length: 99999999999\r\n\r\n"):
        with host(endless(OK + head, b"\0" * 65536)) as (port, _):
            with pytest.raises(Refusal, match="more than 1000000 bytes"):
                load(Media(fetcher=fetcher(port, max_bytes=1_000_000)), f"http://img.example:{port}/")


def test_endless_headers_are_cut() -> None:
    with host(endless(OK, b"X-A: " + b"a" * 1000 + b"\r\n")) as (port, _):
        assert refused(Media(fetcher=fetcher(port)), f"http://img.example:{port}/") == "image_not_fetched"


def test_a_slow_drip_ends_with_the_time_for_the_whole() -> None:
    released = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(OK + b"\r\n")
        while not released.wait(0.01):  # never silent for long, so no timeout of a single read ends it
            connection.sendall(b"\0")

    with host(drip) as (port, _):
        with pytest.raises(Refusal, match="within 0.1 s"):
            load(Media(fetcher=fetcher(port, timeout_s=0.1)), f"http://img.example:{port}/")
        released.set()


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 404 x\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nx",
     b"SSH-2.0-OpenSSH\r\n", b"",
     b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort",
     b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n<svg/>"],
)  # fmt: skip
def test_what_is_no_image_over_http_is_refused(answer: bytes) -> None:
    with host(saying(answer)) as (port, _):
        assert refused(Media(fetcher=fetcher(port)), f"http://img.example:{port}/") in (
            "image_not_fetched",
            "bad_image",
        )


def test_a_certificate_of_another_name_is_refused(tmp_path: Path) -> None:
    with host(saying(b"not TLS")) as (port, requests):
        url = f"https://img.example:{port}/"
        assert refused(Media(fetcher=fetcher(port)), url) == "image_not_fetched"
    assert requests[0][:1] == b"\x16" and b"img.example" in requests[0]  # a TLS hello that names the host (SNI)
