"""The schema of chat completions, after OpenAI's, and of what else the server says."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from qvl_edge.answer import FinishReason
from qvl_edge.server.fields import Model, NoItems, Nothing, Request, Tolerant, complete, option
from qvl_edge.server.messages import ChatMessage
from qvl_edge.server.refusal import Refusal, invalid, refuse
from qvl_edge.server.settings import Limits
from qvl_edge.text.boxes import GRID

__all__ = ["ChatCompletionRequest", "Limits", "request_model"]
Count = Annotated[int, Field(ge=0)]


class StreamOptions(Tolerant):
    """include_usage: one more event at the end, with the usage."""

    include_usage: bool | None = None
    include_obfuscation: Any = None
    continuous_usage_stats: Any = None


class ChatCompletionRequest(Request):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = option("max_new_tokens")
    n: int | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = option("logprobs")
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        last, continued = self.messages[-1].role == "assistant", self.continue_final_message
        found = [*self.conflicts(), *stream_conflicts(self.stream_options, self.stream)]
        if None is not self.max_tokens != self.max_completion_tokens is not None:
            told = "it and max_completion_tokens are the same thing and differ; send one of them"
            found.append(invalid("max_tokens", told))
        if self.top_logprobs and not self.logprobs:
            found.append(invalid("top_logprobs", "only with logprobs=true"))
        if continued and not last:
            found.append(invalid("continue_final_message", "the last message is not the assistant's"))
        elif self.add_generation_prompt is self.continued:
            told = "a new answer is begun, or the assistant's last message is continued"
            found.append(invalid("add_generation_prompt", told))
        refuse(found)
        return self

    @property
    def continued(self) -> bool:
        """Whether the last message is the assistant's and is continued."""
        if self.messages[-1].role != "assistant":
            return False
        return not self.add_generation_prompt if self.continue_final_message is None else self.continue_final_message

    def generation(self) -> dict[str, Any]:
        """The options that were given, under the names of GenerationOptions."""
        options = super().generation()
        if self.max_completion_tokens is not None:
            options["max_new_tokens"] = self.max_completion_tokens
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        return options


def stream_conflicts(options: StreamOptions | None, stream: bool | None) -> list[Refusal]:
    """A refusal for an option that has nothing to work on, as OpenAI does."""
    useless = options is not None and options.include_usage and not stream
    return [invalid("stream_options", "only with stream=true")] if useless else []


def request_model(name: str, limits: Limits, *aliases: str) -> type[ChatCompletionRequest]:
    """ChatCompletionRequest for a server of a model with these names."""
    text = f"In any order; an assistant's last is continued. At most {limits.images} images."
    messages = Field(min_length=1, max_length=limits.messages, description=text)
    neutral = {
        "tools": NoItems,
        "tool_choice": Literal["none", "auto"],
        "parallel_tool_calls": bool,
        "functions": NoItems,
        "function_call": Literal["none", "auto"],
        "modalities": Annotated[list[Literal["text"]], Field(max_length=1)],
        "audio": None,
        "web_search_options": None,
        "documents": NoItems,
        "chat_template": None,
        "mm_processor_kwargs": Nothing,
        "echo": Literal[False],
    }
    # the ChatML template has no variables, and a prediction of the answer changes its speed only
    ignored = ("reasoning_effort", "reasoning", "verbosity", "prediction", "chat_template_kwargs")
    n = (int | None, Field(None, ge=1, le=limits.n))
    return complete(
        ChatCompletionRequest, (name, *aliases), neutral, ignored, messages=(list[ChatMessage], messages), n=n
    )


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


class Head(Model):
    """What every response and chunk begins with."""

    id: str
    created: Count
    model: str
    system_fingerprint: str


class ChatCompletion(Head):
    """The response, without stream=true."""

    object: Literal["chat.completion"]
    choices: list[Choice]
    usage: Usage


class ChatCompletionChunk(Head):
    """An event of a stream."""

    object: Literal["chat.completion.chunk"]
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
