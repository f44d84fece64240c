"""The messages of a request, and the conversation that they are to the engine."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field
from pydantic_core import PydanticCustomError

from qvl_edge.server.fields import NoItems, Tolerant
from qvl_edge.server.refusal import Refusal, invalid
from qvl_edge.text.prompt import Message

_MARKUP = re.compile(r"<img>((?:(?!<img>|</img>).)*+)</img>", re.DOTALL)
_LIKE_A_PATH = re.compile(r"[./\\:]|\w{32}")  # or base64


class TextPart(Tolerant):
    """Text of a message."""

    type: Literal["text"]
    text: str


class RefusalPart(Tolerant):
    """What an earlier answer refused; to this model it is what the assistant said."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """As text."""
        return self.refusal


class ImageURL(Tolerant):
    """An image as a data URI, or as a URL or path where the server allows it. `detail` has no effect."""

    url: str
    detail: Any = None


def _image_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ImagePart(Tolerant):
    """An image of a user's message; vLLM takes the bare URL too."""

    type: Literal["image_url"]
    image_url: Annotated[ImageURL, BeforeValidator(_image_url, json_schema_input_type=str | ImageURL)]


def listed(content: Any) -> Any:
    """Content as a list of parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise PydanticCustomError("content", "expected text or a list of parts")
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
SaidPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(min_length=1)]


class SystemMessage(Tolerant):
    """Instructions; without one at the beginning the model has its usual one."""

    role: Literal["system", "developer"]
    content: Annotated[list[TextPart], FailFast(), BeforeValidator(listed, json_schema_input_type=str | list[TextPart])]
    name: Any = None


class AssistantMessage(Tolerant):
    """An earlier answer, with all that a response's message has; the last of all is continued."""

    role: Literal["assistant"]
    content: Annotated[
        list[SaidPart], FailFast(), BeforeValidator(listed, json_schema_input_type=str | list[SaidPart] | None)
    ] = []
    name: Any = None
    refusal: Any = None
    boxes: Any = None
    tool_calls: NoItems | None = None
    function_call: None = None
    audio: None = None


class UserMessage(Tolerant):
    """User messages that follow one another are one turn."""

    role: Literal["user"]
    content: Annotated[Parts, FailFast(), BeforeValidator(listed, json_schema_input_type=str | Parts)]
    name: Any = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


@dataclass
class Conversation:
    """Turns as the engine takes them; an image's element holds its URL until the image is loaded."""

    messages: list[Message] = field(default_factory=list)
    images: list[tuple[dict[str, Any], str]] = field(default_factory=list)  # each element with the param of its URL
    refusals: list[Refusal] = field(default_factory=list)  # raised with those of the images, so that all are told

    @classmethod
    def of(cls, messages: Iterable[ChatMessage]) -> "Conversation":
        """Of the messages of a chat completion."""
        made = cls()
        for at, message in enumerate(messages):
            param = f"messages[{at}].content"
            parts = [
                (part.image_url.url, f"{param}[{index}].image_url.url") if isinstance(part, ImagePart) else part.text
                for index, part in enumerate(message.content)
            ]
            made.add(message.role, parts, param)
        return made

    def add(self, role: str, parts: Iterable[str | tuple[str, str]], param: str) -> None:
        """A turn of texts, and of URLs with the params of theirs."""
        elements: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, str):
                if role != "assistant":  # a model may have written anything
                    self.refusals += markup(part, param)
                elements.append({"text": part})
            elif role != "user":
                told = f"an image in a message of the role {role!r}; only a user's may have images"
                self.refusals.append(invalid(part[1], told))
            else:
                elements.append({"image": part[0]})
                self.images.append((elements[-1], part[1]))
        # OpenAI's examples put the image last. Qwen-VL was trained with images first, and the small model here finds
        # nothing the other way round (0 of 6 against 6 of 6), so text before all images is moved behind them.
        is_image = ["image" in element for element in elements]
        if is_image == sorted(is_image):
            elements.sort(key=lambda element: "image" not in element)
        last = self.messages[-1] if self.messages else None
        if role == "user" and last is not None and last.role == "user":
            # the small model finds 20 of 20 shapes with one turn, and 18 where the image is in the second of two
            self.messages[-1] = Message(role, [*_elements(last), {"text": "\n"}, *elements])
        elif role == "user":
            self.messages.append(Message(role, elements))
        else:
            words = "".join(element["text"] for element in elements)
            self.messages.append(Message("system" if role == "developer" else role, words))


def _elements(message: Message) -> list[Mapping[str, Any]]:
    return [element for element in message.content if isinstance(element, Mapping)]


def markup(text: str, param: str) -> list[Refusal]:
    """A refusal for Qwen-VL's own way to write an image, which would be read as letters here; none for other text."""
    if not any(_LIKE_A_PATH.search(found[1]) for found in _MARKUP.finditer(text)):
        return []
    told = (
        "<img>…</img> in text opens nothing here; send the picture to /v1/chat/completions beside the text: "
        '{"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}'
    )
    return [invalid(param, told, code="image_in_text")]
