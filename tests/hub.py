"""A stand-in for two hubs on loopback: what huggingface_hub 2.4 and modelscope-hub 0.5 ask of theirs, and faults.

Hugging Face: GET /api/models/R/revision/V, with ?blobs=true also its files, and /tree/C; HEAD and GET /R/resolve/C/F. A
git file is answered at once, with its blob's sha1 as ETag; an LFS file (weights) by a redirect to another host, with
X-Linked-ETag and X-Linked-Size.
ModelScope: GET /api/v1/models/R/repo/files and /repo?FilePath=F.
"""

import functools
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".bin")


@functools.cache
def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.cache
def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(json.dumps({name: git_sha1(content) for name, content in files.items()}).encode()).hexdigest()


@dataclass
class Request:
    """What was asked: file is "" for anything but a file's bytes."""

    method: str
    path: str
    host: str
    range: str | None
    token: str | None
    file: str = ""


@dataclass
class Hub:
    """repos: name -> revision -> file -> bytes. Faults are by file, and used up: set them again to have them again."""

    repos: dict[str, dict[str, dict[str, bytes]]]
    port: int = 0
    token: str | None = None  # if set, needed for everything but the storage host
    cut: dict[str, int] = field(default_factory=dict)  # the connection ends after so many bytes of an answer
    stall: dict[str, int] = field(default_factory=dict)  # … goes silent after so many
    endless: set[str] = field(default_factory=set)  # an answer has no length, and more bytes than the file
    damaged: set[str] = field(default_factory=set)  # one bit of an answer is wrong, each time
    requests: list[Request] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fetched(self) -> list[Request]:
        """The GETs of files that had an answer with their bytes."""
        return [request for request in self.requests if request.file and request.method == "GET"]

    def commit(self, name: str, revision: str) -> str | None:
        """The commit of a branch, or of itself."""
        commits = {branch: commit_of(files) for branch, files in self.repos[name].items()}
        return commits.get(revision) or next((commit for commit in commits.values() if commit == revision), None)

    def files(self, name: str, revision: str) -> dict[str, bytes]:
        branches = self.repos[name]
        return next(branches[b] for b in branches if revision in (b, self.commit(name, b)))


def files_of(folder: Path) -> dict[str, bytes]:
    """A checkpoint's files, and what published repositories have beside them."""
    extras = {name: f"# {name}".encode() for name in ("modeling_qwen.py", "visual.py", "README.md", "SimSun.ttf")}
    return {
        **{path.name: path.read_bytes() for path in sorted(folder.iterdir())},
        **extras,
        "assets/demo.jpeg": b"jpeg",
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        token = self.headers.get("Authorization")
        host = (self.headers.get("Host") or "").split(":")[0]
        self.asked = Request(self.command, unquote(url.path), host, self.headers.get("Range"), token)
        self.hub.requests.append(self.asked)
        parts = [part for part in unquote(url.path).split("/") if part]
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if parts[0] == "storage":
            self._content(parts[1], self._by_hash(parts[2]))
        elif self.hub.token and token != f"Bearer {self.hub.token}":
            self._error(401, "RepoNotFound")
        elif parts[:3] == ["api", "v1", "models"]:
            self._modelscope("/".join(parts[3:5]), parts[5:], query)
        elif parts[:2] == ["api", "models"]:
            self._hugging_face_api("/".join(parts[2:4]), parts[4:], blobs="blobs" in query)
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._error(404, "EntryNotFound")

    def _hugging_face_api(self, name: str, rest: list[str], *, blobs: bool) -> None:
        commit = self.hub.commit(name, rest[1] if rest else "main") if name in self.hub.repos else None
        if name not in self.hub.repos or commit is None:
            self._error(404, "RepoNotFound" if name not in self.hub.repos else "RevisionNotFound")
            return
        files = self.hub.files(name, commit)
        if rest and rest[0] == "tree":
            self._json(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
                    | ({"lfs": self._lfs(content, "oid")} if path.endswith(LFS) else {})
                    for path, content in files.items()
                ]
            )
            return
        siblings = [
            {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
            | ({"lfs": self._lfs(content, "sha256")} if path.endswith(LFS) else {})
            for path, content in files.items()
            if blobs
        ]
        self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": [], "private": False})

    @staticmethod
    def _lfs(content: bytes, hash_name: str) -> dict[str, object]:
        return {hash_name: sha256(content), "size": len(content), "pointerSize": 135}

    def _resolve(self, name: str, revision: str, file: str) -> None:
        content, commit = self.hub.files(name, revision)[file], self.hub.commit(name, revision)
        headers = {"X-Repo-Commit": str(commit)}
        if not file.endswith(LFS):
            self._content(file, content, {**headers, "ETag": f'"{git_sha1(content)}"'})
            return
        digest = sha256(content)
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        headers |= {"Location": f"http://localhost:{self.hub.port}/storage/{file}/{digest}"}
        self._send(302, b"", headers)

    def _by_hash(self, digest: str) -> bytes:
        every = (content for name in self.hub.repos.values() for files in name.values() for content in files.values())
        return next(content for content in every if sha256(content) == digest)

    def _modelscope(self, name: str, rest: list[str], query: dict[str, str]) -> None:
        if name not in self.hub.repos or query["Revision"] not in self.hub.repos[name]:
            self._json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
            return
        files = self.hub.repos[name][query["Revision"]]
        if rest == ["repo", "files"]:
            entries = [
                {"Name": p.split("/")[-1], "Path": p, "Type": "blob", "Size": len(c), "Sha256": sha256(c)}
                for p, c in files.items()
            ]
            self._json({"Code": 200, "Data": {"Files": entries}, "Success": True})
        else:
            self._content(query["FilePath"], files[query["FilePath"]])

    def _content(self, file: str, content: bytes, headers: dict[str, str] | None = None) -> None:
        """The bytes of a file, or of the range that is asked for; with the faults."""
        self.asked.file = file
        whole, start, status = len(content), 0, 200
        headers = {"Accept-Ranges": "bytes", **(headers or {})}
        if self.asked.range and self.command == "GET":
            first, last = self.asked.range.removeprefix("bytes=").split("-")
            start, end = int(first), int(last or whole - 1)
            content, status = content[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{end}/{whole}"
        if file in self.hub.damaged:
            content = bytes([content[0] ^ 1]) + content[1:]
        if file in self.hub.endless and self.command == "GET":
            self._send_without_end()
        else:
            self._send(status, content, headers, file)

    def _send_without_end(self) -> None:
        """48 MiB in chunks: an end, so that a client without a limit fails its test rather than fills the disk."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with suppress(ConnectionError):  # the client has had enough
            for _ in range(48):
                self.wfile.write(b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")

    def _send(self, status: int, body: bytes, headers: dict[str, str], file: str = "") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if file in self.hub.cut:
            body, self.close_connection = body[: self.hub.cut.pop(file)], True
        if file in self.hub.stall:
            self.wfile.write(body[: self.hub.stall.pop(file)])
            self.hub.stalled.set()
            self.hub.released.wait()
            self.close_connection = True
            return
        self.wfile.write(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code})


@contextmanager
def running(repos: dict[str, dict[str, dict[str, bytes]]]) -> Iterator[Hub]:
    """The hub, listening on a free port until the block ends."""
    hub = Hub(repos)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
