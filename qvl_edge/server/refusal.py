"""A request that is refused, in the shape that OpenAI's clients read."""

import json
from collections.abc import Container
from typing import Any

from pydantic import BaseModel, ValidationError

from qvl_edge.errors import ImageError, OutOfMemory, PromptError, QueueFull, QvlError, Stopped, TimeLimit

INVALID, AUTHENTICATION, RATE_LIMIT, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)
MAX_SHOWN = 40  # characters of a wrong value that a message repeats

_COMPLETE = ("missing", "too_short", "too_long", "union_tag_not_found")  # messages that need no value
_MESSAGES = {
    "model_type": "expected an object",
    "model_attributes_type": "expected an object",
    "union_tag_not_found": "Field required",
}


class ErrorDetail(BaseModel, extra="forbid"):
    """What went wrong; `param` is the path of the field, such as messages[0].content."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel, extra="forbid"):
    """The body of a response with a status of 400 or more."""

    error: ErrorDetail


class Refusal(Exception):
    """A status of 400 or more, and what its ErrorResponse says."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = INVALID,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.kind, self.headers = status, code, param, kind, headers or {}

    @property
    def body(self) -> ErrorResponse:
        """The body of the response."""
        return ErrorResponse(error=ErrorDetail(message=str(self), type=self.kind, param=self.param, code=self.code))


def invalid(param: str | None, message: str, *, code: str | None = None) -> Refusal:
    """400: the caller's mistake, at `param`."""
    return Refusal(400, message if param is None else f"{param}: {message}", param=param, code=code)


def engine_refusal(error: Exception) -> Refusal:
    """What the caller is told about an error of the engine."""
    final = {"x-should-retry": "false"}  # read by OpenAI's clients, which would send a 503 twice more
    if isinstance(error, QvlError) and not isinstance(error, MemoryError):  # FitError is both
        code = {ImageError: "bad_image", PromptError: "bad_prompt"}.get(type(error))
        return Refusal(400, str(error), code=code, param="messages" if code else None)
    if isinstance(error, QueueFull):
        wait = {"retry-after": str(error.retry_after)}
        return Refusal(429, str(error), code="queue_full", kind=RATE_LIMIT, headers=wait)
    if isinstance(error, OutOfMemory | MemoryError):
        return Refusal(503, str(error), code="out_of_memory", kind=SERVER, headers=final)
    if isinstance(error, TimeLimit):
        return Refusal(503, str(error), code="time_limit", kind=SERVER, headers=final)
    if isinstance(error, Stopped):
        return Refusal(503, str(error), code="stopping", kind=SERVER, headers={"retry-after": "5"})
    return Refusal(500, "the server failed; its log says where", code="internal_error", kind=SERVER, headers=final)


def validation_refusal(error: ValidationError, unsupported: Container[str] = ()) -> Refusal:
    """The first thing that is wrong with a body, an unknown field at its top before all others.

    unsupported: fields of which only the neutral value is accepted.
    """
    found = error.errors(include_url=False)
    first = next((each for each in found if each["type"] == "extra_forbidden" and len(each["loc"]) == 1), found[0])
    kind, path, value, context = first["type"], list(first["loc"]), first["input"], first.get("ctx", {})
    message = _MESSAGES.get(kind, first["msg"])
    if kind == "extra_forbidden":
        return invalid(_param(path), "this field is not known", code="unknown_parameter")
    if not path:
        return invalid(None, "the body must be a JSON object")
    if path[0] in unsupported:
        return invalid(_param(path[:1]), "this is not supported yet", code="unsupported_parameter")
    if kind.startswith("union_tag"):
        path.append(context["discriminator"].strip("'"))
    if kind == "union_tag_invalid":
        message, value = f"expected one of {context['expected_tags']}", value[path[-1]]
    if kind not in _COMPLETE:
        message = f"{message}, not {_short(value)}"
    if path == ["model"] and kind == "literal_error" and isinstance(value, str):
        return Refusal(404, f"model: {message}", code="model_not_found", param="model")
    return invalid(_param(path), message)


def _param(path: list[Any]) -> str:
    """messages[0].content. Behind the index of an object pydantic puts the tag of its union, which is left out."""
    names = [
        name
        for at, name in enumerate(path)
        if isinstance(name, int) or at in (0, len(path) - 1) or not isinstance(path[at - 1], int)
    ]
    return "".join(f"[{name}]" if isinstance(name, int) else f".{name[:64]}" for name in names).removeprefix(".")


def _short(value: Any) -> str:
    """A wrong value for its message: JSON that is cut; lists and objects are only named."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value[:MAX_SHOWN] if isinstance(value, str) else value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"
