"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from qvl_edge.answer import Answer, FinishReason, TokenLogprob
from qvl_edge.engine.request import Piece, Request
from qvl_edge.server import protocol
from qvl_edge.server.endpoint import Backend, Endpoint, Reply
from qvl_edge.server.messages import Conversation
from qvl_edge.server.protocol import ChatCompletionChunk, ChatCompletionRequest, Delta
from qvl_edge.text.tokenizer import Tokenizer


def chat_endpoint(backend: Backend) -> Endpoint[ChatCompletionRequest]:
    """The endpoint."""
    settings = backend.settings

    async def read(asked: ChatCompletionRequest) -> tuple[list[Request], Reply]:
        conversation = Conversation.of(asked.messages)
        options = asked.generation()
        await backend.load_images(conversation, "messages")
        wanted = [
            Request(messages=conversation.messages, continued=asked.continued, generation=generation)
            for generation in draws(options, asked.n)
        ]
        head = new_head("chatcmpl", asked.model, settings.fingerprint)
        return wanted, ChatReply(asked, head, len(conversation.images), backend.worker.runtime.tokenizer)

    return Endpoint(backend, protocol.request_model(settings.model, settings.limits, *settings.aliases), read)


def draws(options: dict[str, Any], count: int | None) -> list[dict[str, Any]]:
    """The options of each of `count` answers; number i has seed + i."""
    seed = options.get("seed")
    return [options if seed is None else options | {"seed": seed + index} for index in range(count or 1)]


def new_head(kind: str, model: str, fingerprint: str) -> dict[str, Any]:
    """What a response and the chunks of a stream begin with."""
    made = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time())}
    return {**made, "model": model, "system_fingerprint": fingerprint}


def usage_of(answers: Sequence[Answer], prompts: int = 1) -> protocol.Usage:
    """Of answers that share `prompts` prompts evenly, in their order."""
    first = answers[:: len(answers) // prompts]
    prompt, cached = (sum(getattr(a.usage, name) for a in first) for name in ("prompt_tokens", "cached_tokens"))
    completion = sum(answer.usage.completion_tokens for answer in answers)
    return protocol.Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details={"cached_tokens": cached},
    )


class ChatReply(Reply):
    """A chat completion, or its chunks."""

    def __init__(self, asked: ChatCompletionRequest, head: dict[str, Any], images: int, tokenizer: Tokenizer):
        super().__init__(images)
        self.head, self.continued, self.decode = head, asked.continued, tokenizer.decode_bytes
        self.include_usage = bool(asked.stream_options and asked.stream_options.include_usage)

    def whole(self) -> protocol.ChatCompletion:
        """See Reply."""
        choices = []
        for index, answer in sorted(self.answers.items()):
            # what continues a text may begin with a space that belongs to it
            content = self.texts[index] if self.continued else answer.text
            message = protocol.AnswerMessage(role="assistant", content=content, refusal=None, boxes=self.boxes(answer))
            logprobs, reason = self._logprobs(self.logprobs[index]), answer.finish_reason
            choices.append(protocol.Choice(index=index, message=message, logprobs=logprobs, finish_reason=reason))
        return protocol.ChatCompletion(**self.head, object="chat.completion", choices=choices, usage=self._usage())

    def events(self, index: int, event: Piece | Answer) -> Iterator[ChatCompletionChunk]:
        """The role when an answer begins; its text; its boxes and finish_reason when it ends."""
        if index not in self.texts:
            yield self._chunk(index, Delta(role="assistant", content=""))
        self.add(index, event)
        if isinstance(event, Piece):
            yield self._chunk(index, Delta(content=event.text), self._logprobs(event.logprobs))
        else:
            yield self._chunk(index, Delta(boxes=self.boxes(event)), finish_reason=event.finish_reason)

    def last_events(self) -> Iterator[ChatCompletionChunk]:
        """The usage, if it was asked for."""
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
        return usage_of(list(self.answers.values()))

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
