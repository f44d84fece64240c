"""The schema of the API, stated once: pydantic models of its requests and responses, after OpenAI's chat completions.

Unknown fields are refused, as OpenAI does: a misspelt `temperature` must not be dropped silently.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    TypeAdapter,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qvl_edge.answer import FinishReason
from qvl_edge.engine.constraint import Format
from qvl_edge.options import GenerationOptions, Option
from qvl_edge.server.refusal import invalid, validation_refusal
from qvl_edge.text.boxes import GRID

MAX_STOPS = 4  # as OpenAI
MAX_TEMPERATURE = 2  # as OpenAI


class Model(BaseModel):
    """Base of the models: no conversion between types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @classmethod
    def parse(cls, body: Any) -> Self:
        """From parsed JSON. Refusal names the field that is wrong."""
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise validation_refusal(error, NEUTRAL) from None


StopText = Annotated[str, Field(min_length=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class TextPart(Model):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageURL(Model):
    """An image as a data URI, or as a URL or path where the server allows it. `detail` has no effect."""

    url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"


class ImagePart(Model):
    """An image of a user's message."""

    type: Literal["image_url"]
    image_url: ImageURL


def _listed(content: Any) -> Any:
    if not isinstance(content, str | list):
        raise PydanticCustomError("content", "expected text or a list of parts")
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _stops(stop: Any) -> Any:
    return [_STOP_TEXT.validate_python(stop)] if isinstance(stop, str) else stop


_STOP_TEXT = TypeAdapter[str](StopText)
Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(min_length=1)]
TextParts = Annotated[list[TextPart], Field(min_length=1)]
Stops = Annotated[list[StopText], Field(max_length=MAX_STOPS)]


class PlainMessage(Model):
    """A message without images."""

    content: Annotated[TextParts, FailFast(), BeforeValidator(_listed, json_schema_input_type=str | TextParts)]
    name: Any = None

    @property
    def text(self) -> str:
        """Its parts, joined."""
        return "".join(part.text for part in self.content)


class SystemMessage(PlainMessage):
    """Comes first; there is at most one."""

    role: Literal["system", "developer"]


class AssistantMessage(PlainMessage):
    """An earlier answer, with all that a response's message has."""

    role: Literal["assistant"]
    refusal: Any = None
    boxes: Any = None


class UserMessage(Model):
    """User messages that follow one another are one turn."""

    role: Literal["user"]
    content: Annotated[Parts, FailFast(), BeforeValidator(_listed, json_schema_input_type=str | Parts)]
    name: Any = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


def _option(name: str, most: float | None = None) -> Any:
    """A field with the range and the help of a generation option; `most`: OpenAI's own limit."""
    details: Option = next(item for item in fields(GenerationOptions) if item.name == name).metadata["option"]
    low: dict[str, Any] = {"gt" if details.above else "ge": details.least}
    return Field(None, le=details.most if most is None else most, description=details.help, **low)


class Sampling(Model):
    """Generation options, within the ranges of GenerationOptions."""

    max_tokens: int | None = _option("max_new_tokens")
    temperature: Number | None = _option("temperature", MAX_TEMPERATURE)
    top_p: Number | None = _option("top_p")
    top_k: int | None = _option("top_k")
    repetition_penalty: Number | None = _option("repetition_penalty")
    seed: int | None = _option("seed")
    stop: Annotated[Stops, BeforeValidator(_stops, json_schema_input_type=StopText | Stops)] | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value  # JSON may write 1 as 1.0

    def generation(self) -> dict[str, Any]:
        """The options that were given, under the names of GenerationOptions."""
        options = self.model_dump(include=set(Sampling.model_fields), exclude_none=True)
        return {{"max_tokens": "max_new_tokens"}.get(name, name): value for name, value in options.items()}


class StreamOptions(Model):
    """include_usage: one more event at the end, with the usage."""

    include_usage: bool | None = None
    include_obfuscation: Any = None


class ResponseFormat(Model, extra="allow"):
    """As OpenAI's, and {"type": "boxes"}: whatever boxes the answer has are well formed."""

    type: Format


class ChatCompletionRequest(Sampling):
    """The body of POST /v1/chat/completions; `request_model` adds the fields that have no effect."""

    model_config = ConfigDict(json_schema_extra={"not": {"required": ["max_tokens", "max_completion_tokens"]}})

    model: str
    messages: list[Message]
    max_completion_tokens: int | None = _option("max_new_tokens")
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = _option("logprobs")
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise invalid("max_tokens", "it and max_completion_tokens are the same thing; send one of them")
        if self.stream_options and self.stream_options.model_fields_set and not self.stream:
            raise invalid("stream_options", "only with stream=true")
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "only with logprobs=true")
        return self

    def generation(self) -> dict[str, Any]:
        """The options that were given, under the names of GenerationOptions."""
        options = super().generation()
        if self.max_completion_tokens is not None:
            options["max_new_tokens"] = self.max_completion_tokens
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        if self.response_format is not None and self.response_format.type != "text":
            options["response_format"] = self.response_format.model_dump()
        return options


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    messages: int = 256
    images: int = 16
    n: int = 8


_NO_ITEMS = Annotated[list[Any], Field(max_length=0)]
# fields of which only the neutral value is accepted, because clients send it
NEUTRAL: dict[str, Any] = {
    "presence_penalty": Literal[0],
    "frequency_penalty": Literal[0],
    "min_p": Literal[0],
    "logit_bias": Annotated[dict[str, Any], Field(max_length=0)],
    "tools": _NO_ITEMS,
    "tool_choice": Literal["none", "auto"],
    "parallel_tool_calls": bool,
    "functions": _NO_ITEMS,
    "modalities": Annotated[list[Literal["text"]], Field(max_length=1)],
}
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


def request_model(name: str, limits: Limits) -> type[ChatCompletionRequest]:
    """ChatCompletionRequest for a server of the model `name`."""
    text = f"A system message first, if any; the user's last. At most {limits.images} images."
    messages = Field(min_length=1, max_length=limits.messages, description=text)
    narrowed: dict[str, Any] = {
        "model": (Literal[name], ...),
        "messages": (list[Message], messages),
        "n": (int | None, Field(None, ge=1, le=limits.n)),
        **{field: (kind | None, None) for field, kind in NEUTRAL.items()},
        **{field: (Any, Field(None, description="without effect")) for field in IGNORED},
    }
    return create_model("ChatCompletionRequest", __base__=ChatCompletionRequest, **narrowed)


Corners = Annotated[list[int], Field(min_length=4, max_length=4)]
Points = Annotated[list[list[int]], Field(min_length=4, max_length=4)]


class Box(Model):
    """A region that the answer names; `quad` only where the model wrote four points."""

    label: str | None
    corners: Annotated[Corners, Field(description=f"x1, y1, x2, y2 from 0 to {GRID}, as the model wrote them")]
    pixels: Annotated[Corners, Field(description="x1, y1, x2, y2 in pixels of the image as it was sent")]
    image: Annotated[Count, Field(description="which of the request's images, from 0")]
    quad: Points = []
    quad_pixels: Points = []


class TopLogprob(Model):
    """A token and its natural-log probability, before any sampling option."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(Model):
    """Of the tokens that an answer, or a chunk of it, is made of."""

    content: list[TokenLogprob]
    refusal: None


class Delta(Model):
    """What a chunk adds to an answer: first its role, then text, at its end its boxes."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    boxes: list[Box] = []


class AnswerMessage(Model):
    role: Literal["assistant"]
    content: str
    refusal: None
    boxes: list[Box]


class ChunkChoice(Model):
    index: Count
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class Choice(Model):
    index: Count
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason


class Usage(Model):
    """Token counts; all n answers have the same prompt."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: dict[Literal["cached_tokens"], Count]


class ChatCompletion(Model):
    """The response, without stream=true."""

    id: str
    object: Literal["chat.completion"]
    created: Count
    model: str
    choices: list[Choice]
    usage: Usage


class ChatCompletionChunk(Model):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: Count
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(Model):
    """The model that is served. max_model_len: positions for the prompt and its answer."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    max_model_len: Count
    max_images: Count


class ModelList(Model):
    object: Literal["list"]
    data: list[ModelCard]


class Health(Model):
    status: Literal["ok"]
