"""A request that is turned down, in the shape that OpenAI's clients read."""

import json
from typing import Any

INVALID, AUTHENTICATION, RATE_LIMIT, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)


class Refusal(Exception):
    """An HTTP status of 400 or more, and {"error": {"message", "type", "param", "code"}}."""

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

    def to_dict(self) -> dict[str, Any]:
        """The body."""
        param = None if self.param is None else _sendable(self.param)
        return {"error": {"message": _sendable(str(self)), "type": self.kind, "param": param, "code": self.code}}

    def to_json(self) -> bytes:
        """The body, encoded."""
        return json.dumps(self.to_dict(), ensure_ascii=False).encode()


def _sendable(text: str) -> str:
    """A message or a field's name may quote a lone surrogate out of the request, which no UTF-8 has."""
    return text.encode("utf-8", "backslashreplace").decode()


def invalid(param: str | None, message: str, *, code: str | None = None) -> Refusal:
    """400: the caller's mistake, at `param` (a path such as messages[0].content)."""
    return Refusal(400, message if param is None else f"{param}: {message}", param=param, code=code)
