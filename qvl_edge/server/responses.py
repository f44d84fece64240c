"""POST /v1/responses, without state: every request brings its whole conversation."""

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field

from qvl_edge.answer import Answer
from qvl_edge.engine.request import Piece, Request
from qvl_edge.server.endpoint import Backend, Endpoint, Reply
from qvl_edge.server.fields import JsonSchema, Model, NoItems, Nothing, Tolerant, complete, option
from qvl_edge.server.fields import Request as Fields
from qvl_edge.server.messages import Conversation, RefusalPart, TextPart, listed
from qvl_edge.server.protocol import Box, Count
from qvl_edge.server.refusal import Refusal, invalid
from qvl_edge.server.settings import Limits


class InputText(Tolerant):
    """Text, as it was asked or answered."""

    type: Literal["input_text", "output_text"]
    text: str


class InputImage(Tolerant):
    """An image."""

    type: Literal["input_image"]
    image_url: str
    detail: Any = None
    file_id: None = None


InputPart = Annotated[InputText | InputImage | TextPart | RefusalPart, Field(discriminator="type")]


class InputMessage(Tolerant):
    """A message, an answer of an earlier response among them."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[
        list[InputPart], FailFast(), BeforeValidator(listed, json_schema_input_type=str | list[InputPart])
    ]
    id: Any = None
    status: Any = None


class Reasoning(Tolerant):
    """What other models thought before an answer; left out."""

    type: Literal["reasoning"]
    id: Any = None
    summary: Any = None


class ItemReference(Tolerant):
    """An item that a server would have kept; this one keeps none."""

    type: Literal["item_reference"]
    id: Any = None


def _items(given: Any) -> Any:
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if isinstance(given, list):
        return [{"type": "message", **item} if isinstance(item, dict) and "role" in item else item for item in given]
    return given


Item = Annotated[InputMessage | Reasoning | ItemReference, Field(discriminator="type")]
Items = Annotated[list[Item], Field(min_length=1)]


class TextFormat(JsonSchema):
    """Text, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]


class TextSettings(Tolerant):
    """format: as response_format of chat completions, in one object."""

    format: TextFormat | None = None
    verbosity: Any = None


class ResponseRequest(Fields):
    """The body of POST /v1/responses."""

    input: Annotated[Items, BeforeValidator(_items, json_schema_input_type=str | Items)]
    instructions: str | None = None
    max_output_tokens: int | None = option("max_new_tokens")
    text: TextSettings | None = None

    def generation(self) -> dict[str, Any]:
        """The options that were given, under the names of GenerationOptions."""
        options = super().generation()
        if self.max_output_tokens is not None:
            options["max_new_tokens"] = self.max_output_tokens
        shape = self.text.format if self.text else None
        if shape is not None and shape.type != "text":
            if "response_format" in options:
                raise invalid("text.format", "response_format says already what the answer is to look like")
            schema = {"schema": shape.schema_}
            options["response_format"] = {"type": shape.type} | ({"json_schema": schema} if shape.schema_ else {})
        return options

    def turns(self) -> Conversation:
        """The instructions and the messages. Refusal 400 if there are none."""
        made = Conversation()
        if self.instructions:
            made.add("system", [self.instructions], "instructions")
        for at, item in enumerate(self.input):
            if isinstance(item, InputMessage):
                param = f"input[{at}].content"
                parts = [
                    (part.image_url, f"{param}[{index}].image_url") if isinstance(part, InputImage) else part.text
                    for index, part in enumerate(item.content)
                ]
                made.add(item.role, parts, param)
            elif isinstance(item, ItemReference):
                told = "no response is kept here; send the item itself, as clients do with store=false"
                made.refusals.append(invalid(f"input[{at}]", told))
        if not made.messages and not made.refusals:
            raise invalid("input", "there is no message in it")
        return made


class Sent(Model):
    """Base of what is sent with its defaults, as OpenAI does here."""

    def model_post_init(self, _: Any) -> None:
        """Count defaults as set."""
        self.model_fields_set.update(type(self).model_fields)


class OutputText(Sent):
    """The text of an answer, with its boxes."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []
    boxes: list[Box] = []


class OutputMessage(Sent):
    type: Literal["message"] = "message"
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ResponseUsage(Sent):
    """Token counts."""

    input_tokens: Count
    input_tokens_details: dict[Literal["cached_tokens"], Count]
    output_tokens: Count
    output_tokens_details: dict[Literal["reasoning_tokens"], Count]
    total_tokens: Count


class ResponseBody(Sent):
    """The response."""

    id: str
    object: Literal["response"] = "response"
    created_at: Count
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, str | None] | None = None
    incomplete_details: dict[Literal["reason"], Literal["max_output_tokens"]] | None = None
    instructions: str | None
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool = False
    temperature: float | None
    top_p: float | None
    max_output_tokens: int | None
    tool_choice: Literal["none"] = "none"
    tools: list[Any] = []
    previous_response_id: None = None
    store: Literal[False] = False
    metadata: dict[str, Any] = {}
    usage: ResponseUsage | None = None


class ResponseEvent(Model, extra="allow"):
    """An event of a stream, by its `type`."""

    type: str
    sequence_number: Count


def response_model(name: str, limits: Limits, *aliases: str) -> type[ResponseRequest]:
    """ResponseRequest for a server of a model with these names."""
    neutral = {
        "previous_response_id": None,  # no response is kept
        "conversation": None,
        "prompt": None,
        "background": Literal[False],
        "truncation": Literal["disabled", "auto"],
        "tools": NoItems,
        "tool_choice": Literal["none", "auto"],
        "parallel_tool_calls": bool,
        "include": list[Literal["reasoning.encrypted_content"]],
        "max_tool_calls": int,
        "top_logprobs": Literal[0],
        "context_management": NoItems,
        "mm_processor_kwargs": Nothing,
    }
    items = Annotated[Items, Field(max_length=limits.messages)]
    given = Annotated[items, BeforeValidator(_items, json_schema_input_type=str | Items)]
    description = "A text, or messages in any order: no response is kept, so that a request brings all of them"
    ignored = ("reasoning", "stream_options")
    return complete(ResponseRequest, (name, *aliases), neutral, ignored, input=(given, Field(description=description)))


def response_endpoint(backend: Backend) -> Endpoint[ResponseRequest]:
    """The endpoint."""
    settings = backend.settings

    async def read(asked: ResponseRequest) -> tuple[list[Request], Reply]:
        conversation, options = asked.turns(), asked.generation()
        await backend.load_images(conversation, "input")
        request = Request(messages=conversation.messages, generation=options)
        continued = conversation.messages[-1].role == "assistant"
        return [request], ResponseReply(asked, len(conversation.images), continued)

    return Endpoint(backend, response_model(settings.model, settings.limits, *settings.aliases), read)


class ResponseReply(Reply):
    """A response, or its events."""

    end = ""

    def __init__(self, asked: ResponseRequest, images: int, continued: bool):
        super().__init__(images)
        # without its pictures, which would stay until the answer ends
        self.asked, self.continued, self.number = asked.model_copy(update={"input": []}), continued, 0
        self.id, self.message_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self) -> ResponseBody:
        """See Reply."""
        return self._body(self.answers[0])

    def events(self, index: int, event: Piece | Answer) -> Iterator[ResponseEvent]:
        """A message with one part begins; its text; the ends of text, part and message."""
        place = {"item_id": self.message_id, "output_index": 0, "content_index": 0}
        if not self.texts:
            yield from (self._event(f"response.{kind}", response=self._body()) for kind in ("created", "in_progress"))
            item = OutputMessage(id=self.message_id, status="in_progress", content=[])
            yield self._event("response.output_item.added", output_index=0, item=item)
            yield self._event("response.content_part.added", **place, part=OutputText(text=""))
        self.add(index, event)
        if isinstance(event, Piece):
            yield self._event("response.output_text.delta", **place, delta=event.text, logprobs=[])
            return
        message = self._message(event)
        (part,) = message.content
        yield self._event("response.output_text.done", **place, text=part.text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=part)
        yield self._event("response.output_item.done", output_index=0, item=message)

    def last_events(self) -> Iterable[ResponseEvent]:
        """The whole response."""
        body = self.whole()
        yield self._event(f"response.{body.status}", response=body)

    def error(self, refusal: Refusal) -> ResponseEvent:
        """See Reply."""
        return self._event("error", code=refusal.code, message=str(refusal), param=refusal.param)

    def _event(self, kind: str, **content: Any) -> ResponseEvent:
        self.number += 1
        return ResponseEvent(type=kind, sequence_number=self.number - 1, **content)

    def _message(self, answer: Answer) -> OutputMessage:
        # a stream's text is as it came, and so is one that continues another: its first space belongs to it
        text = self.texts[0] if self.continued or self.asked.stream else answer.text
        part = OutputText(text=text, boxes=self.boxes(answer))
        status: Any = "completed" if answer.finish_reason == "stop" else "incomplete"
        return OutputMessage(id=self.message_id, status=status, content=[part])

    def _body(self, answer: Answer | None = None) -> ResponseBody:
        asked, made = self.asked, dict[str, Any]()
        if answer is not None:
            message, usage = self._message(answer), answer.usage
            made |= {"output": [message], "status": message.status}
            if message.status == "incomplete":
                made["incomplete_details"] = {"reason": "max_output_tokens"}
            made["usage"] = ResponseUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details={"cached_tokens": usage.cached_tokens},
                output_tokens=usage.completion_tokens,
                output_tokens_details={"reasoning_tokens": 0},
                total_tokens=usage.prompt_tokens + usage.completion_tokens,
            )
        made |= {"temperature": asked.temperature, "top_p": asked.top_p, "max_output_tokens": asked.max_output_tokens}
        made |= {"instructions": asked.instructions, "model": asked.model, "id": self.id, "created_at": self.created}
        return ResponseBody(**{"status": "in_progress", "output": [], **made})
