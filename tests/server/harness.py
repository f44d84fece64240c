"""A real uvicorn on loopback in a thread, requests to it, and a worker that does as a test says."""

import asyncio
import base64
import contextlib
import io
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import torch
import uvicorn
from PIL import Image

from qvl_edge.answer import Answer, Timing, Usage
from qvl_edge.engine.request import Piece, Request
from qvl_edge.engine.worker import Worker
from qvl_edge.server.app import Settings, create_app
from qvl_edge.server.connection import Connections, configure
from qvl_edge.server.guard import Access
from qvl_edge.text.boxes import parse_boxes

MODEL = "small"
WAIT_S = 30.0  # the longest that a test waits for something that happens at once


@dataclass
class Server:
    """A server that runs, and ways to talk to it."""

    url: str
    worker: "Worker | ScriptedWorker | None"
    key: str | None = None

    @property
    def client(self) -> openai.OpenAI:
        """The client that people use, as it is."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, timeout=WAIT_S)

    def post(self, body: Any = None, **options: Any) -> httpx.Response:
        """POST a body (JSON, or `content=` as it is) to the chat completions."""
        if body is not None:
            options["json"] = body
        options.setdefault("headers", {"content-type": "application/json"})
        return httpx.post(f"{self.url}/v1/chat/completions", timeout=WAIT_S, **options)

    def ask(self, content: Any, *, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        """POST one user message."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}
        return self.post(body, **({"headers": headers} if headers else {}))

    def metric(self, name: str) -> float:
        """The value of a line of /metrics."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name + " ")).split()[-1])


class _Quick(uvicorn.Server):
    async def main_loop(self) -> None:  # which looks every 0.1 s whether it is to end
        while not self.should_exit:
            await asyncio.sleep(0.005)


@contextlib.contextmanager
def serving(
    worker: "Worker | ScriptedWorker",
    *,
    key: str | None = None,
    host: str = "127.0.0.1",
    connections: Connections | None = None,
    **settings: Any,
) -> Iterator[Server]:
    """Serve `worker` on a free port; it is closed at the end."""
    given = {"model": MODEL, "max_model_len": 8192, "access": Access(host, key), **settings}
    app = create_app(worker, Settings(**given))
    server = _Quick(configure(app, connections, host=host, port=0, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Server(f"http://{host}:{server.servers[0].sockets[0].getsockname()[1]}", worker, key)
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the server did not stop"


def until(holds: Callable[[], Any]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


def data_uri(image: Image.Image | bytes, kind: str = "PNG") -> str:
    """An image, or the bytes of a file, as a data URI."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        image = buffer.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(image).decode()}"


def picture(url: str) -> dict[str, Any]:
    """An image_url part."""
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    """A text part."""
    return {"type": "text", "text": words}


class ScriptedWorker:
    """Says `pieces` for every answer and remembers what it was asked; `before(index)` runs before each piece.

    forgets: images that its window has no room for; tokens: the bytes of token ids.
    """

    waiting = running = 0
    healthy = True
    device = torch.device("cpu")
    time_limit_s = 300.0

    def __init__(
        self,
        *pieces: str | Piece,
        before: Callable[[int], Any] | None = None,
        forgets: int = 0,
        tokens: Mapping[int, bytes] | None = None,
    ):
        self.pieces = [Piece(piece) if isinstance(piece, str) else piece for piece in pieces]
        self.before, self.forgets = before, forgets
        decode = SimpleNamespace(decode_bytes=lambda ids: b"".join((tokens or {})[token] for token in ids))
        self.runtime = SimpleNamespace(tokenizer=decode)
        self.requests: list[Request] = []
        self.cancelled = threading.Event()

    async def stream(
        self, requests: Sequence[Request], *, whole: bool = False
    ) -> AsyncGenerator[tuple[int, Piece | Answer], None]:
        """See Worker.stream; the pieces come one by one either way."""
        self.requests += requests
        complete = False
        try:
            for number, request in enumerate(requests):
                turns = [message.content for message in request.messages if not isinstance(message.content, str)]
                images = sum("image" in element for turn in turns for element in turn) - self.forgets
                said = ""
                for index, piece in enumerate(self.pieces):
                    if self.before is not None and (waits := self.before(index)) is not None:
                        await waits
                    said += piece.text
                    yield number, piece
                boxes = parse_boxes(said, image_sizes=[(100, 50)] * images)
                usage = Usage(
                    prompt_tokens=5,
                    cached_tokens=3,
                    completion_tokens=len(self.pieces),
                    image_tokens=256 * images,
                    images=images,
                    cached_images=0,
                )
                timing = Timing(0.0, 0.0, 0.0, 5, 0)
                yield number, Answer(said.strip(), boxes, [1] * len(self.pieces), "stop", usage, timing)
            complete = True
        finally:
            if not complete:
                self.cancelled.set()

    def close(self) -> None:
        """Nothing runs on its own."""


async def for_ever() -> None:
    """Wait without an end."""
    await asyncio.Event().wait()
