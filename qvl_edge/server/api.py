"""The routes: OpenAI's chat completions with boxes, health, metrics, the API's description, and the page."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from qvl_edge.answer import Answer
from qvl_edge.errors import ImageError, PromptError, QvlError
from qvl_edge.server.chat import Call, Limits, load_images, parse_chat
from qvl_edge.server.engine import (
    Delta,
    Engine,
    EngineError,
    Event,
    Finished,
    OutOfMemory,
    QueueFull,
    Stopped,
    TimeLimit,
    TokenLogprob,
)
from qvl_edge.server.guard import Access, Guard, log_refusal, parse_json, read_body
from qvl_edge.server.media import Media
from qvl_edge.server.metrics import Metrics
from qvl_edge.server.openapi import document
from qvl_edge.server.refusal import RATE_LIMIT, SERVER, Refusal

STATIC = Path(__file__).with_name("static")
PAGE = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
LEFT = 499  # the caller left before the answer was complete; nobody sees this status but the metrics (nginx's number)


@dataclass(frozen=True)
class Settings:
    """How this server behaves."""

    model: str  # the name in /v1/models, which requests must give
    max_model_len: int  # positions: the prompt and its answer
    access: Access
    limits: Limits = Limits()
    media: Media = Media()
    defaults: dict[str, Any] = field(default_factory=dict)  # generation options for what a request leaves open
    max_body_bytes: int = 32 << 20
    max_concurrent: int = 32  # chat requests that are read, wait or run
    ping_s: float = 15.0  # a stream that is silent for so long gets a comment, so that nothing between closes it


def create_app(engine: Engine, settings: Settings) -> ASGIApp:
    """The server as an ASGI application; it closes `engine` when it ends."""
    return _Server(engine, settings).app


class _Gone(Exception):
    """The caller closed the connection."""


class _Server:
    def __init__(self, engine: Engine, settings: Settings):
        self.engine, self.settings = engine, settings
        self.metrics = Metrics()
        self.started = int(time.time())
        self.in_flight = 0
        self.document = document(settings.model, settings.limits, keyed=settings.access.api_key is not None)
        api = {
            "/v1/models": (self.models, "GET"),
            "/v1/models/{model}": (self.one_model, "GET"),
            "/v1/chat/completions": (self.chat, "POST"),
            "/health": (self.health, "GET"),
            "/metrics": (self.show_metrics, "GET"),
            "/openapi.json": (self.openapi, "GET"),
        }
        routes = [Route(path, endpoint, methods=[method]) for path, (endpoint, method) in api.items()]
        routes += [Route(path, _file(name, kind), methods=["GET"]) for path, (name, kind) in PAGE.items()]
        self.paths = {*api, *PAGE}
        inside = Starlette(
            routes=routes,
            lifespan=self.lifespan,
            exception_handlers={HTTPException: _on_http, Refusal: _on_refusal, Exception: _on_bug},
        )
        self.app: ASGIApp = Guard(inside, settings.access, self.count)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.engine.close)

    def count(self, path: str, status: int) -> None:
        # only paths of ours become labels: others are made up by whoever asks, without end
        self.metrics.requests[path if path in self.paths else "other", status] += 1

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        if request.path_params["model"] != self.settings.model:
            raise Refusal(404, "this model is not served here", code="model_not_found", param="model")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "id": settings.model,
            "object": "model",
            "created": self.started,
            "owned_by": "qvl-edge",
            "max_model_len": settings.max_model_len,
            "max_images": settings.limits.images,
        }

    async def show_metrics(self, request: Request) -> Response:
        text = self.metrics.render(waiting=self.engine.waiting, running=self.engine.running)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self.document)

    async def chat(self, request: Request) -> Response:
        if self.in_flight >= self.settings.max_concurrent:  # said before the body is read: bodies are memory
            raise _refusal_of(QueueFull(self.in_flight))
        self.in_flight += 1
        try:
            call = await self._read(request)
            listening = self._events(call, request.receive)
            try:
                # what is wrong shows before the first event, while the status is still open; a long wait ends that
                first = await anext(listening)
                if call.stream:
                    self.in_flight += 1  # until the stream ends
                    return _Stream(self._chunks(call, first, listening), self._leave)
                answers = await _collect(first, listening)
            except _Gone:
                return Response(status_code=LEFT)
            except BaseException:
                await listening.aclose()
                raise
        except (QvlError, EngineError) as error:
            raise _refusal_of(error) from None
        finally:
            self.in_flight -= 1
        choices = [_choice(index, *answers[index], call) for index in sorted(answers)]
        usage = self._usage([answer for answer, _ in answers.values()])
        return JSONResponse({**_head(call, "chat.completion"), "choices": choices, "usage": usage})

    def _leave(self) -> None:
        self.in_flight -= 1

    async def _read(self, request: Request) -> Call:
        """The checked request with its images; everything that takes long happens off the event loop."""
        settings = self.settings
        body = await read_body(request, settings.max_body_bytes)

        def understand() -> Call:
            return parse_chat(
                parse_json(body), model=settings.model, limits=settings.limits, defaults=settings.defaults
            )

        call = await asyncio.to_thread(understand)
        return call.with_request(await load_images(call.request, settings.media))

    async def _events(self, call: Call, receive: Receive) -> AsyncGenerator[Event | None, None]:
        """The engine's events; None where there was none for ping_s. _Gone when the caller leaves; times are kept."""
        events = self.engine.submit(call.request)
        began = time.perf_counter()
        silent = True
        gone = asyncio.ensure_future(_disconnected(receive))
        step: asyncio.Task[Event | None] | None = None
        try:
            while True:
                step = step or asyncio.ensure_future(_next(events))
                await asyncio.wait({step, gone}, timeout=self.settings.ping_s, return_when=asyncio.FIRST_COMPLETED)
                if step.done():
                    event, step = step.result(), None
                    if event is None:
                        self.metrics.request_s.observe(time.perf_counter() - began)
                        return
                    if silent:
                        self.metrics.first_token_s.observe(time.perf_counter() - began)
                        silent = False
                    yield event
                elif gone.done():
                    raise _Gone
                else:
                    yield None
        finally:
            gone.cancel()
            if step is not None:
                step.cancel()
                await asyncio.wait({step})
            await events.aclose()

    async def _chunks(
        self, call: Call, first: Event | None, listening: AsyncGenerator[Event | None, None]
    ) -> AsyncGenerator[str, None]:
        """The lines of a stream."""
        head = _head(call, "chat.completion.chunk")
        if call.include_usage:
            head["usage"] = None

        def chunk(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> str:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return _data({**head, "choices": [choice]})

        answers: list[Answer] = []
        begun: set[int] = set()
        try:
            async for event in _with_first(first, listening):
                if event is None:
                    yield ": ping\n\n"
                    continue
                if event.index not in begun:
                    begun.add(event.index)
                    yield chunk(event.index, {"role": "assistant", "content": ""})
                if isinstance(event, Delta):
                    yield chunk(event.index, {"content": event.text}, logprobs=_logprobs(event.logprobs))
                else:
                    answers.append(event.answer)
                    yield chunk(event.index, {"boxes": _boxes(event.answer, call)}, event.answer.finish_reason)
            usage = self._usage(answers)
            if call.include_usage:
                yield _data({**head, "choices": [], "usage": usage})
        except (QvlError, EngineError) as error:  # too late for a status
            refusal = _refusal_of(error)
            log_refusal(refusal, "POST")
            yield _data(refusal.to_dict())
        finally:
            await listening.aclose()
        yield "data: [DONE]\n\n"

    def _usage(self, answers: list[Answer]) -> dict[str, Any]:
        """OpenAI's usage of a request; the draws share one prompt."""
        usage, completion = answers[0].usage, sum(answer.usage.completion_tokens for answer in answers)
        self.metrics.prompt_tokens += usage.prompt_tokens
        self.metrics.cached_tokens += usage.cached_tokens
        self.metrics.completion_tokens += completion
        self.metrics.images += usage.images
        self.metrics.cached_images += usage.cached_images
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": usage.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }


class _Stream(Response):
    """Server-sent events from a generator, which is closed whatever happens; then `leave` is called."""

    def __init__(self, lines: AsyncGenerator[str, None], leave: Any):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self.lines, self.leave = lines, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the headers, then each line as it comes."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for line in self.lines:
                await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except _Gone:
            pass
        finally:
            await self.lines.aclose()
            self.leave()


def _file(name: str, kind: str) -> Any:
    """An endpoint that serves one file of the page, read once: no path of a request ever reaches the disk."""
    content = (STATIC / name).read_bytes()

    async def endpoint(request: Request) -> Response:
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    return endpoint


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _next(events: AsyncGenerator[Event, None]) -> Event | None:
    return await anext(events, None)


async def _with_first(first: Event | None, rest: AsyncGenerator[Event | None, None]) -> AsyncIterator[Event | None]:
    yield first
    async for event in rest:
        yield event


async def _collect(
    first: Event | None, listening: AsyncGenerator[Event | None, None]
) -> dict[int, tuple[Answer, tuple[TokenLogprob, ...]]]:
    """The answer of each draw and the log-probabilities of its tokens."""
    answers = {}
    logprobs: dict[int, tuple[TokenLogprob, ...]] = {}
    async for event in _with_first(first, listening):
        if isinstance(event, Delta):
            logprobs[event.index] = logprobs.get(event.index, ()) + event.logprobs
        elif isinstance(event, Finished):
            answers[event.index] = (event.answer, logprobs.get(event.index, ()))
    return answers


def _head(call: Call, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": call.model}


def _choice(index: int, answer: Answer, logprobs: tuple[TokenLogprob, ...], call: Call) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text, "refusal": None, "boxes": _boxes(answer, call)}
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(logprobs),
        "finish_reason": answer.finish_reason,
    }


def _boxes(answer: Answer, call: Call) -> list[dict[str, Any]]:
    """The answer's boxes; `image` counts the request's images, of which the oldest turns' may not be in the prompt."""
    left_out = call.images - answer.usage.images
    return [{**box.to_dict(), "image": box.image + left_out} for box in answer.boxes]


def _logprobs(tokens: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
    if not tokens:
        return None

    def said(token: bytes, logprob: float) -> dict[str, Any]:
        return {"token": token.decode(errors="replace"), "bytes": list(token), "logprob": logprob}

    content = [{**said(t.token, t.logprob), "top_logprobs": [said(*other) for other in t.top]} for t in tokens]
    return {"content": content, "refusal": None}


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _refusal_of(error: Exception) -> Refusal:
    """What the caller is told about an error of the engine."""
    stay_away = {"x-should-retry": "false"}  # read by OpenAI's clients, which would try a 503 twice more
    if isinstance(error, QvlError) and not isinstance(error, MemoryError):  # FitError is both
        code = {ImageError: "bad_image", PromptError: "bad_prompt"}.get(type(error))
        return Refusal(400, str(error), code=code, param="messages" if code else None)
    if isinstance(error, QueueFull):
        wait = {"retry-after": str(error.retry_after)}
        return Refusal(429, str(error), code="queue_full", kind=RATE_LIMIT, headers=wait)
    if isinstance(error, OutOfMemory | MemoryError):
        return Refusal(503, str(error), code="out_of_memory", kind=SERVER, headers=stay_away)
    if isinstance(error, TimeLimit):
        return Refusal(503, str(error), code="time_limit", kind=SERVER, headers=stay_away)
    if isinstance(error, Stopped):
        return Refusal(503, str(error), code="stopping", kind=SERVER, headers={"retry-after": "5"})
    return Refusal(500, "the server failed; its log says where", code="internal_error", kind=SERVER, headers=stay_away)


def _respond(refusal: Refusal) -> Response:
    return Response(refusal.to_json(), refusal.status, refusal.headers, media_type="application/json")


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    log_refusal(error, request.method)
    return _respond(error)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: ("there is no such path", "not_found"), 405: ("this path takes another method", "method_not_allowed")}
    message, code = words.get(error.status_code, ("the request cannot be taken", "bad_request"))
    return _respond(Refusal(error.status_code, message, code=code, headers=dict(error.headers or {})))


async def _on_bug(request: Request, error: Exception) -> Response:
    return _respond(_refusal_of(error))
