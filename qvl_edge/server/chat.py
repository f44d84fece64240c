"""POST /v1/chat/completions: from the body to the response, or to its stream of server-sent events."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pydantic import BaseModel
from starlette import requests
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qvl_edge.answer import Answer, FinishReason, TokenLogprob
from qvl_edge.engine.request import SYSTEM, Piece, Request
from qvl_edge.engine.worker import Worker
from qvl_edge.errors import EngineError, QueueFull, QvlError
from qvl_edge.server import protocol
from qvl_edge.server.guard import Access, log_refusal, parse_json, read_body
from qvl_edge.server.media import Media
from qvl_edge.server.metrics import Metrics
from qvl_edge.server.protocol import ChatCompletionChunk, ChatCompletionRequest, Delta
from qvl_edge.server.refusal import engine_refusal, invalid
from qvl_edge.text.tokenizer import Tokenizer

CLIENT_CLOSED = 499  # nginx's status for a client that left before its answer was complete; only the metrics see it
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
Turn: TypeAlias = list[dict[str, Any]]
Event: TypeAlias = tuple[int, Piece | Answer]


@dataclass(frozen=True)
class Settings:
    """How a server behaves."""

    model: str  # the name in /v1/models, which requests must give
    max_model_len: int  # positions: the prompt and its answer
    access: Access
    limits: protocol.Limits = protocol.Limits()
    media: Media = Media()
    max_body_bytes: int = 32 << 20
    max_concurrent: int = 32  # chat requests that are being read, waiting or running
    ping_s: float = 15.0  # a stream that is silent for so long gets a comment, so that no proxy closes it


class Disconnected(Exception):
    """The caller closed the connection."""


class Chat:
    """The endpoint, an ASGI application."""

    def __init__(self, worker: Worker, settings: Settings, metrics: Metrics):
        self.worker, self.settings, self.metrics = worker, settings, metrics
        self.model = protocol.request_model(settings.model, settings.limits)
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. Refusal for what goes wrong before the response has begun."""
        if self.in_flight >= self.settings.max_concurrent:  # refused before the body is read: bodies take memory
            raise engine_refusal(QueueFull(self.in_flight))
        self.in_flight += 1
        try:
            asked, conversation = await self._read(requests.Request(scope, receive))
            reply = Reply(asked, len(conversation.images), self.worker.runtime.tokenizer)
            events = self._events(conversation.requests(asked), not asked.stream, receive)
            async with contextlib.aclosing(events):
                if asked.stream:
                    await self._stream(reply, events, send)
                else:
                    async for event in events:
                        if event is not None:
                            reply.add(*event)
                    await json_response(reply.completion())(scope, receive, send)
        except Disconnected:
            await Response(status_code=CLIENT_CLOSED)(scope, receive, send)
        except (QvlError, EngineError) as error:
            raise engine_refusal(error) from None
        finally:
            self.in_flight -= 1

    async def _read(self, request: requests.Request) -> tuple[ChatCompletionRequest, "Conversation"]:
        """The checked body, and its messages with their images; what takes long is done off the event loop."""
        body = await read_body(request, self.settings.max_body_bytes)
        asked = await asyncio.to_thread(lambda: self.model.parse(parse_json(body)))
        conversation = Conversation.of(asked.messages)
        count, most = len(conversation.images), self.settings.limits.images
        if count > most:
            raise invalid("messages", f"{count} images, at most {most} are accepted", code="too_many_images")
        for element, param in conversation.images:
            element["image"] = await self.settings.media.load(element["image"], param)
        return asked, conversation

    async def _events(self, asked: list[Request], whole: bool, receive: Receive) -> AsyncGenerator[Event | None, None]:
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
                    self.metrics.answered(answers, time.perf_counter() - began)
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

    async def _stream(self, reply: "Reply", events: AsyncGenerator[Event | None, None], send: Send) -> None:
        """Send the events as they come. What goes wrong before the first one is raised, to get its own status."""
        begun = False
        try:
            async for event in events:
                if not begun:
                    await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
                    begun = True
                lines = ": ping\n\n" if event is None else "".join(map(_data, reply.chunks(*event)))
                await send({"type": "http.response.body", "body": lines.encode(), "more_body": True})
            lines = "".join(map(_data, reply.last_chunks()))
        except (Disconnected, QvlError, EngineError) as error:
            if not begun:
                raise
            if isinstance(error, Disconnected):
                return
            refusal = engine_refusal(error)
            log_refusal(refusal, "POST")
            lines = _data(refusal.body)
        await send({"type": "http.response.body", "body": f"{lines}data: [DONE]\n\n".encode()})


@dataclass
class Conversation:
    """Messages as a Request takes them; an image's element holds its URL until the image is loaded."""

    query: Turn = field(default_factory=list)
    history: list[tuple[Turn, str]] = field(default_factory=list)
    system: str = SYSTEM
    images: list[tuple[dict[str, Any], str]] = field(default_factory=list)  # each element with the param of its URL

    @classmethod
    def of(cls, messages: Sequence[protocol.Message]) -> "Conversation":
        """Refusal 400 for messages in another order than a conversation's."""
        made = cls()
        for index, message in enumerate(messages):
            param = f"messages[{index}]"
            if isinstance(message, protocol.SystemMessage):
                if index:
                    raise invalid(param, "a system message comes first, and there is at most one")
                made.system = message.text
            elif isinstance(message, protocol.UserMessage):
                made.query += [{"text": "\n"}] * bool(made.query) + made._turn(message.content, f"{param}.content")
            elif made.query:
                made.history.append((made.query, message.text))
                made.query = []
            else:
                raise invalid(param, "an assistant message follows a user message")
        if not made.query:
            raise invalid("messages", "the last message must be the user's; an answer is not continued here")
        return made

    def _turn(self, parts: list[protocol.Part], param: str) -> Turn:
        turn: Turn = []
        for index, part in enumerate(parts):
            if isinstance(part, protocol.TextPart):
                turn.append({"text": part.text})
            else:
                turn.append({"image": part.image_url.url})
                self.images.append((turn[-1], f"{param}[{index}].image_url.url"))
        # OpenAI's examples put the image last. Qwen-VL was trained with images first, and the small model here finds
        # nothing the other way round (0 of 6 against 6 of 6), so text before all images is moved behind them.
        is_image = ["image" in element for element in turn]
        return sorted(turn, key=lambda element: "image" not in element) if is_image == sorted(is_image) else turn

    def requests(self, asked: ChatCompletionRequest) -> list[Request]:
        """One for each of the n answers; number i has seed + i."""
        options = asked.generation()
        seeds = [{} if asked.seed is None else {"seed": asked.seed + index} for index in range(asked.n or 1)]
        return [Request(self.query, self.history, self.system, generation={**options, **seed}) for seed in seeds]


class Reply:
    """The worker's events as the response to one request, whose messages have so many `images`."""

    def __init__(self, asked: ChatCompletionRequest, images: int, tokenizer: Tokenizer):
        self.images, self.decode = images, tokenizer.decode_bytes
        self.include_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        self.head: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        self.head["model"] = asked.model
        self.logprobs: dict[int, list[TokenLogprob]] = {}  # of each answer that has begun
        self.answers: dict[int, Answer] = {}

    def add(self, index: int, event: Piece | Answer) -> None:
        """Keep what `completion` and `last_chunks` are made of."""
        logprobs = self.logprobs.setdefault(index, [])
        if isinstance(event, Piece):
            logprobs += event.logprobs
        else:
            self.answers[index] = event

    def completion(self) -> protocol.ChatCompletion:
        """The whole response, once all answers are complete."""
        choices = []
        for index, answer in sorted(self.answers.items()):
            message = protocol.AnswerMessage(
                role="assistant", content=answer.text, refusal=None, boxes=self._boxes(answer)
            )
            logprobs, reason = self._logprobs(self.logprobs[index]), answer.finish_reason
            choices.append(protocol.Choice(index=index, message=message, logprobs=logprobs, finish_reason=reason))
        return protocol.ChatCompletion(**self.head, object="chat.completion", choices=choices, usage=self._usage())

    def chunks(self, index: int, event: Piece | Answer) -> Iterator[ChatCompletionChunk]:
        """The role when an answer begins; its text; its boxes and finish_reason when it ends."""
        if index not in self.logprobs:
            yield self._chunk(index, Delta(role="assistant", content=""))
        self.add(index, event)
        if isinstance(event, Piece):
            yield self._chunk(index, Delta(content=event.text), self._logprobs(event.logprobs))
        else:
            yield self._chunk(index, Delta(boxes=self._boxes(event)), finish_reason=event.finish_reason)

    def last_chunks(self) -> Iterator[ChatCompletionChunk]:
        """The usage, if it was asked for, once all answers are complete."""
        if self.include_usage:
            yield ChatCompletionChunk(**self.head, object="chat.completion.chunk", choices=[], usage=self._usage())

    def _chunk(
        self,
        index: int,
        delta: Delta,
        logprobs: protocol.Logprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> ChatCompletionChunk:
        choice = protocol.ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        no_usage: dict[str, Any] = {"usage": None} if self.include_usage else {}
        return ChatCompletionChunk(**self.head, object="chat.completion.chunk", choices=[choice], **no_usage)

    def _usage(self) -> protocol.Usage:
        usage = self.answers[0].usage  # the answers share one prompt
        completion = sum(answer.usage.completion_tokens for answer in self.answers.values())
        return protocol.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=completion,
            total_tokens=usage.prompt_tokens + completion,
            prompt_tokens_details={"cached_tokens": usage.cached_tokens},
        )

    def _boxes(self, answer: Answer) -> list[protocol.Box]:
        """`image` counts the request's images; those of the oldest turns may have been left out of the prompt."""
        left_out = self.images - answer.usage.images
        return [protocol.Box(**{**box.to_dict(), "image": box.image + left_out}) for box in answer.boxes]

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> protocol.Logprobs | None:
        if not tokens:
            return None

        def shown(token_id: int, logprob: float) -> dict[str, Any]:
            token = self.decode([token_id])
            return {"token": token.decode(errors="replace"), "bytes": list(token), "logprob": logprob}

        content = []
        for token in tokens:
            top = [protocol.TopLogprob(**shown(*other)) for other in token.top]
            content.append(protocol.TokenLogprob(**shown(token.token_id, token.logprob), top_logprobs=top))
        return protocol.Logprobs(content=content, refusal=None)


def json_response(body: BaseModel) -> Response:
    """A response with the fields that are set."""
    return Response(body.model_dump_json(exclude_unset=True), media_type="application/json")


def _data(body: BaseModel) -> str:
    return f"data: {body.model_dump_json(exclude_unset=True)}\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
