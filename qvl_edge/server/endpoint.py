"""From the body of a request to its response, or to its stream of server-sent events, for every kind of request."""

import asyncio
import contextlib
import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

from pydantic import BaseModel
from starlette import requests
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qvl_edge.answer import Answer, TokenLogprob
from qvl_edge.engine.engine import engine_error
from qvl_edge.engine.request import Piece, Request
from qvl_edge.engine.worker import Worker
from qvl_edge.errors import EngineError, QueueFull, QvlError, TimeLimit
from qvl_edge.server import fields
from qvl_edge.server.callers import Caller, Quotas
from qvl_edge.server.connection import ANSWERING
from qvl_edge.server.guard import Bodies, log_refusal, parse_json, read_body
from qvl_edge.server.messages import Conversation
from qvl_edge.server.metrics import Metrics
from qvl_edge.server.protocol import Box
from qvl_edge.server.refusal import Refusal, engine_refusal, invalid, refuse
from qvl_edge.server.settings import Settings

CLIENT_CLOSED = 499  # nginx's status for a client that left before its answer was complete; only the metrics see it
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
Event: TypeAlias = tuple[int, Piece | Answer]
Asked = TypeVar("Asked", bound=fields.Request)
Made = TypeVar("Made")


class Disconnected(Exception):
    """The caller closed the connection."""


class Backend:
    """The worker, as all endpoints share it."""

    def __init__(self, worker: Worker, settings: Settings, metrics: Metrics):
        self.worker, self.settings, self.metrics = worker, settings, metrics
        self.in_flight = 0
        self.bodies, self.quotas = Bodies(settings.body_memory), Quotas()

    @contextlib.contextmanager
    def place(self) -> Any:
        """A place among the concurrent requests. QueueFull if all are taken."""
        self.check_room()
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def check_room(self) -> None:
        """QueueFull if all places are taken."""
        if self.in_flight >= self.settings.max_concurrent:
            raise QueueFull(self.in_flight)

    def salt(self, caller: Caller | None, asked: fields.Request) -> str:
        """What separates the caches of this request from those of others: the same prompt says nothing of theirs."""
        apart = self.settings.access.separate and not self.settings.share_cache and caller is not None
        salt = f"{caller.name if apart and caller else ''}\0{asked.cache_salt or ''}"
        return hashlib.sha256(salt.encode()).hexdigest()  # its own may have 30 MB, and the caches keep it

    async def load_images(self, conversation: Conversation, param: str) -> None:
        """Put the images in the place of their URLs. Refusal for all of them and of the text that cannot be taken."""
        count, most = len(conversation.images), self.settings.limits.images
        if count > most:
            raise invalid(param, f"{count} images, at most {most} are accepted", code="too_many_images")
        found = conversation.refusals
        pixels, most = 0, self.settings.limits.pixels
        for element, where in conversation.images:
            try:
                element["image"] = loaded = await self.settings.media.load(element["image"], where)
            except Refusal as refusal:
                found.append(refusal.with_traceback(None))  # which has this list: a cycle with all pictures
                continue
            pixels += loaded.frame.width * loaded.frame.height
            if pixels > most:
                words = (
                    f"the images have more than {most / 1e6:.0f} Mpixel in all; shrink them (the model sees 448 x 448)"
                )
                found.append(invalid(param, words, code="too_many_pixels"))
                break
        refuse(found)

    async def events(
        self, asked: list[Request], whole: bool, receive: Receive, caller: Caller | None = None
    ) -> AsyncGenerator[Event | None, None]:
        """The worker's events, and None where there was none for ping_s. Disconnected when the caller has left."""
        events, began = self.worker.stream(asked, whole=whole), time.perf_counter()
        answers: list[Answer] = []
        silent = True
        gone = asyncio.ensure_future(_disconnected(receive))
        step = asyncio.ensure_future(anext(events, None))
        try:
            while True:
                await asyncio.wait({step, gone}, timeout=self.settings.ping_s, return_when=asyncio.FIRST_COMPLETED)
                if not step.done():
                    if gone.done():
                        raise Disconnected
                    yield None
                    continue
                event = step.result()
                if event is None:
                    self.metrics.answered(answers, time.perf_counter() - began, caller.name if caller else None)
                    return
                if silent:
                    self.metrics.first_token_s.observe(time.perf_counter() - began)
                    silent = False
                if isinstance(event[1], Answer):
                    answers.append(event[1])
                yield event
                step = asyncio.ensure_future(anext(events, None))
        finally:
            gone.cancel()
            step.cancel()
            await asyncio.wait({step})
            await events.aclose()


class Reply(ABC):
    """The worker's events as the response to one request, whose conversation has so many `images`."""

    end: ClassVar[str] = "data: [DONE]\n\n"  # what a stream ends with

    def __init__(self, images: int = 0) -> None:
        self.images = images
        self.texts: dict[int, str] = {}  # of each answer that has begun, as it came
        self.logprobs: dict[int, list[TokenLogprob]] = {}
        self.answers: dict[int, Answer] = {}

    def add(self, index: int, event: Piece | Answer) -> None:
        """Keep what `whole` and `last_events` are made of."""
        self.texts.setdefault(index, "")
        logprobs = self.logprobs.setdefault(index, [])
        if isinstance(event, Piece):
            self.texts[index] += event.text
            logprobs += event.logprobs
        else:
            self.answers[index] = event

    def boxes(self, answer: Answer) -> list[Box]:
        """`image` counts the request's images; those of the oldest turns may have been left out of the prompt."""
        left_out = self.images - answer.usage.images
        return [Box(**{**box.to_dict(), "image": box.image + left_out}) for box in answer.boxes]

    @abstractmethod
    def whole(self) -> BaseModel:
        """The response, once all answers are complete."""

    @abstractmethod
    def events(self, index: int, event: Piece | Answer) -> Iterable[BaseModel]:
        """What a stream says of an event, which is added."""

    @abstractmethod
    def last_events(self) -> Iterable[BaseModel]:
        """What a stream says once all answers are complete."""

    def error(self, refusal: Refusal) -> BaseModel:
        """What a stream says of an error after it has begun."""
        return refusal.body


Read: TypeAlias = Callable[[Asked], Awaitable[tuple[list[Request], Reply]]]
"""A checked body -> what the engine is asked, and the reply that takes its answers."""


class Endpoint(Generic[Asked]):
    """POST of one kind of request, an ASGI application."""

    def __init__(self, backend: Backend, model: type[Asked], read: "Read[Asked]"):
        self.backend, self.model, self.read = backend, model, read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. Refusal for what goes wrong before the response has begun."""
        try:
            self.backend.check_room()  # refused before the body is read, if that is known already
            with contextlib.ExitStack() as places:
                await self._answer(requests.Request(scope, receive), send, scope.get("caller"), places)
            return
        except Disconnected:
            await Response(status_code=CLIENT_CLOSED)(scope, receive, send)
            return
        except (QvlError, EngineError, MemoryError) as error:
            # whose traceback would keep the request, and the request it: a cycle with all of its text and pictures
            refusal = engine_refusal(engine_error(error).with_traceback(None))
        raise refusal

    async def _answer(
        self, request: requests.Request, send: Send, caller: Caller | None, places: contextlib.ExitStack
    ) -> None:
        backend = self.backend
        with backend.bodies.one() as body:
            content = await read_body(request, backend.settings.max_body_bytes, backend.bodies, body)
            places.enter_context(backend.quotas.place(caller))
            places.enter_context(backend.place())
            request.scope.setdefault("state", {})[ANSWERING] = True
            began, limit_s = time.monotonic(), backend.worker.time_limit_s
            try:
                async with asyncio.timeout(limit_s):
                    asked, wanted, reply = await _unless_gone(self._read(content), request.receive)
            except TimeoutError:
                raise TimeLimit(f"the request exceeded its time limit of {limit_s:g} s while it was read") from None
        for each in wanted:
            each.cache_salt, each.time_limit_s = backend.salt(caller, asked), limit_s - (time.monotonic() - began)
        streamed = bool(asked.stream)
        del content, asked  # with the pictures' files
        events = backend.events(wanted, not streamed, request.receive, caller)
        async with contextlib.aclosing(events):
            if streamed:
                await _stream(reply, events, send)
                return
            async for event in events:
                if event is not None:
                    reply.add(*event)
        await json_response(reply.whole())(request.scope, request.receive, send)

    async def _read(self, content: bytes) -> tuple[Asked, list[Request], Reply]:
        # what takes long is done off the event loop
        asked = await asyncio.to_thread(lambda: self.model.parse(parse_json(content)))
        return asked, *await self.read(asked)


async def _stream(reply: Reply, events: AsyncGenerator[Event | None, None], send: Send) -> None:
    """Send the events as they come. What goes wrong before the first one is raised, to get its own status."""
    begun = False
    try:
        async for event in events:
            if not begun:
                await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
                begun = True
            lines = ": ping\n\n" if event is None else sse(reply.events(*event))
            await send({"type": "http.response.body", "body": lines.encode(), "more_body": True})
        lines = sse(reply.last_events())
    except (Disconnected, QvlError, EngineError) as error:
        if not begun:
            raise
        if isinstance(error, Disconnected):
            return
        refusal = engine_refusal(error.with_traceback(None))
        log_refusal(refusal, "POST")
        lines = sse([reply.error(refusal)])
    await send({"type": "http.response.body", "body": f"{lines}{reply.end}".encode()})


def json_response(body: BaseModel) -> Response:
    """A response with the fields that are set."""
    return Response(_json(body), media_type="application/json")


def sse(bodies: Iterable[BaseModel]) -> str:
    """Server-sent events; one with a `type` is named by it."""
    kinds: Sequence[tuple[str | None, BaseModel]] = [(getattr(body, "type", None), body) for body in bodies]
    return "".join(
        f"event: {kind}\ndata: {_json(body)}\n\n" if kind else f"data: {_json(body)}\n\n" for kind, body in kinds
    )


def _json(body: BaseModel) -> str:
    return body.model_dump_json(exclude_unset=True, by_alias=True)


async def _unless_gone(work: Coroutine[Any, Any, Made], receive: Receive) -> Made:
    """What `work` returns. Disconnected as soon as the caller has left, and nothing is worked for him any more."""
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Disconnected
        return doing.result()
    finally:
        gone.cancel()
        doing.cancel()
        del doing  # its error has it in the traceback


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
