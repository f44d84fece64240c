"""A request that is refused, in the shape that OpenAI's clients read."""

import difflib
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from qvl_edge.errors import ContextError, ImageError, OutOfMemory, PromptError, QueueFull, QvlError, Stopped, TimeLimit

INVALID, AUTHENTICATION, RATE_LIMIT, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)
MAX_SHOWN = 40  # characters of a wrong value that a message repeats
MAX_REASONS, MAX_PLACES = 16, 8  # that a message lists, and fields for each

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
        params: Sequence[str] | None = None,
        kind: str = INVALID,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.kind, self.headers = status, code, param, kind, headers or {}
        # for the log: fields of the schema; an unknown one is the caller's text
        self.params = params if params is not None else [param] if param and code != "unknown_parameter" else []

    @property
    def body(self) -> ErrorResponse:
        """The body of the response."""
        return ErrorResponse(error=ErrorDetail(message=str(self), type=self.kind, param=self.param, code=self.code))


def invalid(param: str | None, message: str, *, code: str | None = None) -> Refusal:
    """400: the caller's mistake, at `param`."""
    return Refusal(400, message if param is None else f"{param}: {message}", param=param, code=code)


def refuse(found: Sequence[Refusal]) -> None:
    """Raise what was found, if anything, as one refusal: the first, with what all of them say."""
    if found:
        first, params = found[0], [param for each in found for param in each.params]
        message = "; ".join(dict.fromkeys(map(str, found[:MAX_REASONS])))
        raise Refusal(
            first.status,
            message + (f"; {len(found) - MAX_REASONS} more" if len(found) > MAX_REASONS else ""),
            code=first.code,
            param=first.param,
            params=params[:MAX_PLACES],
            kind=first.kind,
            headers=first.headers,
        )


def engine_refusal(error: Exception) -> Refusal:
    """What the caller is told about an error of the engine."""
    final = {"x-should-retry": "false"}  # read by OpenAI's clients, which would send a 503 twice more
    if isinstance(error, QvlError) and not isinstance(error, MemoryError):  # FitError is both
        codes = {ImageError: "bad_image", PromptError: "bad_prompt", ContextError: "context_length_exceeded"}
        code = codes.get(type(error))
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


def validation_refusal(error: ValidationError, unsupported: Container[str], known: Iterable[str]) -> Refusal:
    """All that is wrong with a body, unknown fields at its top before all others; what is wrong alike is said once.

    unsupported: fields of which only the neutral value is accepted. known: all fields.
    """
    found = sorted(error.errors(include_url=False), key=lambda each: not _is_unknown_field(each))
    reasons: dict[str, dict[str, None]] = {}  # message -> params, in order
    codes, params = list[str | None](), list[str]()
    for each in found:
        param, message, code = _wrong(each, unsupported)
        places = reasons.setdefault(message, {})
        if (param or "") not in places:
            places[param or ""] = None
            codes.append(code)
            params += [param] if param and code != "unknown_parameter" else []
    first = next(iter(next(iter(reasons.values())))) or None
    if first == "model" and codes == ["model_not_found"]:
        return Refusal(404, f"model: {next(iter(reasons))}", code="model_not_found", param="model")
    if codes.count("unknown_parameter") == 1 == len(found[0]["loc"]) and first is not None:
        near = difflib.get_close_matches(first, known, 1)
        message, *rest = reasons
        hint = f" (did you mean {near[0]}?)" if near else ""
        reasons = {message + hint: reasons[message], **{other: reasons[other] for other in rest}}
    lines = [_line(list(places), message) for message, places in list(reasons.items())[:MAX_REASONS]]
    more = [f"{len(reasons) - MAX_REASONS} more"] if len(reasons) > MAX_REASONS else []
    code = codes[0] if codes[0] != "model_not_found" else None
    return Refusal(400, "; ".join([*lines, *more]), code=code, param=first, params=params[:MAX_PLACES])


def _is_unknown_field(error: Mapping[str, Any]) -> bool:
    return error["type"] == "extra_forbidden" and len(error["loc"]) == 1


def _line(places: list[str], message: str) -> str:
    more = [f"{len(places) - MAX_PLACES} more"] if len(places) > MAX_PLACES else []
    named = ", ".join([*places[:MAX_PLACES], *more])
    return f"{named}: {message}" if named else message


def _wrong(error: Mapping[str, Any], unsupported: Container[str]) -> tuple[str | None, str, str | None]:
    """(param, what is wrong, code) of one of pydantic's errors."""
    kind, path, value, context = error["type"], list(error["loc"]), error["input"], error.get("ctx", {})
    message = _MESSAGES.get(kind, error["msg"])
    if kind == "extra_forbidden":
        return _param(path), "this field is not known", "unknown_parameter"
    if not path:
        return None, "the body must be a JSON object", None
    if path[0] in unsupported:
        return _param(path[:1]), "this is not supported yet", "unsupported_parameter"
    if kind.startswith("union_tag"):
        path.append(context["discriminator"].strip("'"))
    if kind == "union_tag_invalid":
        message, value = f"expected one of {context['expected_tags']}", value[path[-1]]
    if path[0] == "logit_bias":  # its keys are the caller's
        path = path[:1]
    if kind not in _COMPLETE:
        message = f"{message}, not {_short(value)}"
    missing = path == ["model"] and kind == "literal_error" and isinstance(value, str)
    return _param(path), message, "model_not_found" if missing else None


def _param(path: list[Any]) -> str:
    """messages[0].content. Behind the index of an object pydantic puts the tag of its union, which is left out, and so
    is the name of a type that one of several could be."""
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
