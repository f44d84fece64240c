"""The body of POST /v1/chat/completions -> a ChatRequest, checked field by field.

As OpenAI, a field that is not known is refused: a misspelt `temperature` must not be dropped in silence.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from qvl_edge.engine.constraint import FORMATS
from qvl_edge.server.engine import ChatRequest
from qvl_edge.server.media import Media
from qvl_edge.server.refusal import Refusal, invalid

MAX_STOPS = 4  # as OpenAI
MAX_TOP_LOGPROBS = 20  # as OpenAI
SEEDS = (-(1 << 63), (1 << 63) - 1)
MAX_INT = (1 << 31) - 1
# fields of OpenAI's that say nothing about the answer
WITHOUT_EFFECT = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
# fields whose neutral value is taken, because clients send it, and whose others are refused
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "min_p": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "modalities": (["text"],),
}
Turn: TypeAlias = list[dict[str, Any]]
FIELDS = frozenset(
    "model messages max_tokens max_completion_tokens temperature top_p top_k repetition_penalty n seed stop stream "
    "stream_options logprobs top_logprobs response_format".split()
)


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    messages: int = 256
    images: int = 16
    n: int = 8


@dataclass(frozen=True)
class Call:
    """What the body asks for; `request` has image URLs in the place of images until `load_images`."""

    model: str
    request: ChatRequest
    images: int
    stream: bool
    include_usage: bool

    def with_request(self, request: ChatRequest) -> "Call":
        """The same call with another request."""
        return replace(self, request=request)


def parse_chat(body: Any, *, model: str, limits: Limits, defaults: Mapping[str, Any]) -> Call:
    """Check the parsed JSON. Refusal 400 names the field; 404 for a model that is not served here.

    defaults: generation options for what the request leaves open.
    """
    if not isinstance(body, dict):
        raise invalid(None, "the body must be a JSON object")
    known = FIELDS | WITHOUT_EFFECT | NEUTRAL.keys()
    for name in body.keys() - known:
        raise invalid(str(name)[:64], "this field is not known", code="unknown_parameter")
    given = {name: value for name, value in body.items() if value is not None}
    asked = _text(given, "model")
    if asked is None:
        raise invalid("model", f"say which model; it is {model!r} here")
    if asked != model:
        message = f"the model {asked[:200]!r} is not served here; this one is {model!r}"
        raise Refusal(404, message, code="model_not_found", param="model")
    for name, values in NEUTRAL.items():
        if name in given and not any(given[name] == value for value in values):
            raise _unsupported(name)
    query, history, system = _turns(given.get("messages"), limits)
    images = sum("image" in element for turn in [query, *(asked for asked, _ in history)] for element in turn)
    if images > limits.images:
        raise invalid("messages", f"{images} images, at most {limits.images} are taken", code="too_many_images")
    stream = _bool(given, "stream")
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise invalid("stream_options", 'expected {"include_usage": true or false}')
    if options and not stream:
        raise invalid("stream_options", "only with stream=true")
    request = ChatRequest(
        query,
        history,
        system,
        {**defaults, **_generation(given)},
        n=_integer(given, "n", 1, limits.n) or 1,
        logprobs=_logprobs(given),
        response_format=_response_format(given),
    )
    return Call(asked, request, images, stream, _bool(options, "include_usage", "stream_options.include_usage"))


async def load_images(request: ChatRequest, media: Media) -> ChatRequest:
    """The request with each image file in the place of its URL. Refusal as from Media."""

    async def load(turn: Turn) -> Turn:
        return [{"image": await media.load(*e["image"])} if "image" in e else e for e in turn]

    history = [(await load(asked), answered) for asked, answered in request.history]
    return replace(request, query=await load(request.query), history=history)


def _generation(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options under their Hugging Face names; temperature 0 is greedy, any other one samples."""
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise invalid("max_tokens", "it and max_completion_tokens are the same thing; send one of them")
    options: dict[str, Any] = {
        "max_new_tokens": _integer(given, "max_tokens", 1, MAX_INT)
        or _integer(given, "max_completion_tokens", 1, MAX_INT),
        "top_p": _number(given, "top_p", 0, 1, above=True),
        "top_k": _integer(given, "top_k", 0, MAX_INT),
        "repetition_penalty": _number(given, "repetition_penalty", 0, 10, above=True),
        "seed": _integer(given, "seed", *SEEDS),
        "stop": _stop(given),
    }
    temperature = _number(given, "temperature", 0, 2)
    if temperature is not None:
        # below 1e-3 the logits leave float32's comfort, and sampling is greedy anyway
        options |= {"do_sample": False} if temperature < 1e-3 else {"do_sample": True, "temperature": temperature}
    return {name: value for name, value in options.items() if value is not None}


def _turns(messages: Any, limits: Limits) -> tuple[Turn, list[tuple[Turn, str]], str | None]:
    """(query, history, system). User messages that follow one another are one turn, with a newline between them."""
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "expected a list with at least one message")
    if len(messages) > limits.messages:
        raise invalid("messages", f"{len(messages)} messages, at most {limits.messages} are taken")
    system: str | None = None
    history: list[tuple[Turn, str]] = []
    asked: Turn = []
    for index, message in enumerate(messages):
        param = f"messages[{index}]"
        if not isinstance(message, dict) or message.keys() - {"role", "content", "name", "refusal", "boxes"}:
            raise invalid(param, "expected an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role in ("system", "developer"):
            if index:
                raise invalid(param, "a system message comes first, and there is one at most")
            system = _plain(content, f"{param}.content")
        elif role == "user":
            turn = _user(content, f"{param}.content")
            asked = [*asked, {"text": "\n"}, *turn] if asked else turn
        elif role == "assistant":
            if not asked:
                raise invalid(param, "an assistant message follows a user message")
            history.append((asked, _plain(content, f"{param}.content")))
            asked = []
        else:
            raise invalid(f"{param}.role", "expected system, user or assistant")
    if not asked:
        raise invalid("messages", "the last message must be the user's; an answer is not continued here")
    return asked, history, system


def _user(content: Any, param: str) -> Turn:
    """A user's text and images; an image is {"image": (url, param)} for now."""
    if isinstance(content, str):
        return [{"text": _unicode(content, param)}]
    if not isinstance(content, list) or not content:
        raise invalid(param, "expected text, or a list of text and image_url parts")
    turn = [_part(part, f"{param}[{index}]") for index, part in enumerate(content)]
    pictures = [element for element in turn if "image" in element]
    texts = [element for element in turn if "text" in element]
    # OpenAI's examples put the picture last. Qwen-VL was trained with pictures first, and the small model here finds
    # nothing the other way round (0 of 6 against 6 of 6), so a text before all pictures goes behind them.
    return [*pictures, *texts] if turn == [*texts, *pictures] else turn


def _part(part: Any, param: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and part.keys() == {"type", "text"}:
        return {"text": _unicode(part["text"], f"{param}.text")}
    if kind == "image_url" and part.keys() == {"type", "image_url"}:
        image = part["image_url"]
        if not isinstance(image, dict) or image.keys() - {"url", "detail"} or not isinstance(image.get("url"), str):
            raise invalid(f"{param}.image_url", 'expected {"url": "data:image/…;base64,…"}')
        if image.get("detail", "auto") not in ("auto", "low", "high", "original"):
            raise invalid(f"{param}.image_url.detail", "expected auto, low or high (all the same here)")
        return {"image": (image["url"], f"{param}.image_url.url")}
    raise invalid(param, 'expected {"type": "text", "text": …} or {"type": "image_url", "image_url": {"url": …}}')


def _plain(content: Any, param: str) -> str:
    """Text, or text parts joined."""
    if isinstance(content, list) and content:
        elements = [_part(part, f"{param}[{index}]") for index, part in enumerate(content)]
        if all("text" in element for element in elements):
            return "".join(element["text"] for element in elements)
    elif isinstance(content, str):
        return _unicode(content, param)
    raise invalid(param, "expected text; images belong into user messages")


def _unicode(text: Any, param: str) -> str:
    if not isinstance(text, str):
        raise invalid(param, "expected a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid(param, "the text has half of a surrogate pair, which is no character") from None
    return text


def _text(given: Mapping[str, Any], name: str) -> str | None:
    return _unicode(given[name], name) if name in given else None


def _bool(given: Mapping[str, Any], name: str, param: str | None = None) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(param or name, "expected true or false")
    return bool(value)


def _integer(given: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():  # JSON has one kind of number: 1.0 is 1
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise invalid(name, f"expected an integer from {least} to {most}")
    return value


def _number(given: Mapping[str, Any], name: str, least: float, most: float, *, above: bool = False) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise invalid(name, "expected a number")
    if not least <= value <= most or (above and value == least):
        raise invalid(name, f"expected a number {'above' if above else 'from'} {least} {'and up ' * above}to {most}")
    return float(value)


def _stop(given: Mapping[str, Any]) -> list[str] | None:
    stop = given.get("stop")
    if stop is None:
        return None
    stops = stop if isinstance(stop, list) else [stop]
    if len(stops) > MAX_STOPS or not all(isinstance(text, str) and text for text in stops):
        raise invalid("stop", f"expected a string or at most {MAX_STOPS} strings, none of them empty")
    return [_unicode(text, "stop") for text in stops]


def _logprobs(given: Mapping[str, Any]) -> int | None:
    top = _integer(given, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if not _bool(given, "logprobs"):
        if top:
            raise invalid("top_logprobs", "only with logprobs=true")
        return None
    return top or 0


def _response_format(given: Mapping[str, Any]) -> dict[str, Any] | None:
    wanted = given.get("response_format")
    if wanted is None:
        return None
    if not isinstance(wanted, dict) or wanted.get("type") not in FORMATS:
        raise invalid("response_format", f"expected a type of {', '.join(FORMATS)}")
    return None if wanted["type"] == "text" else wanted


def _unsupported(name: str) -> Refusal:
    return invalid(name, "this is not supported yet", code="unsupported_parameter")
