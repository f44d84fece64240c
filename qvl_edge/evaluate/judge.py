"""Verdicts of a judge: a model behind OpenAI's API scores answers that no rule can score.

Requests are lines {"id", "messages", …} as touchstone.requests makes them. Each verdict is written as soon as it is
there, and a later run only asks for what is missing. A verdict belongs to the exact text of its request and to the
judge's name: with another model or other answers it is asked for again.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from qvl_edge.errors import QvlError
from qvl_edge.evaluate.task import QualityDataError
from qvl_edge.files import append_jsonl, read_jsonl, write_jsonl

_MAX_BYTES = 4 << 20  # of a response that are read; a verdict has a few hundred
KEPT = "the verdicts so far are kept, run the same command again"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class JudgeError(QvlError, OSError):
    """The judge cannot be asked, or does not answer."""


@dataclass(frozen=True)
class Judge:
    """A model at an address like https://HOST/v1; `key` may be empty. JudgeError if one of them cannot be used.

    The key goes to that address only: no redirect is followed, it travels unencrypted to this machine only, and an http
    address is asked directly even where the environment names a proxy, which could read the key.
    """

    address: str
    model: str
    key: str = field(default="", repr=False)
    retries: int = 4
    timeout_s: float = 300.0  # for one attempt, to the last byte of the response

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.address)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # an unclosed bracket, a port that is not a number
            valid = False
        if not valid or not _printable(self.address) or " " in self.address:
            raise JudgeError(f"--judge {self.address!r} is not an address like https://HOST/v1")
        if not _printable(self.key):
            bad = sum(not _printable(one) for one in self.key)
            raise JudgeError(
                f"{bad} of the key's {len(self.key)} characters are not printable ASCII, and no header can carry them; "
                "copy the key again"
            )
        if self.key and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise JudgeError(f"--judge {self.address} would send the key unencrypted; use https, or unset the key")

    def ask(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The judge's answer at temperature 0; its refusal, or "", where it would not answer.

        Busy servers and broken connections are retried, requests that the server rejects are not.
        """
        openai = _openai()
        text = json.dumps(messages, ensure_ascii=False).encode("utf-8", "replace")  # JSON can hold half a character
        # what the environment names for OpenAI is not sent to other servers
        kept_back = ["OpenAI-Organization", "OpenAI-Project", *([] if self.key else ["Authorization"])]
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=json.loads(text),
                temperature=0,
                extra_headers=dict.fromkeys(kept_back, openai.Omit()),
            )
        except openai.APIStatusError as error:
            what = f"HTTP {error.status_code}: {error.response.text[:300]}"
            if error.status_code not in (408, 409, 429) and error.status_code < 500:
                raise JudgeError(f"{self.address} rejects the request, {what}") from None
        except openai.APIError as error:
            what = str(error.__cause__ or error)
        else:
            return _content(response.content, self.address)
        raise JudgeError(f"{self.address} gave no answer in {self.retries + 1} attempts, the last time {what}; {KEPT}")

    @cached_property
    def _client(self) -> Any:
        """An openai.OpenAI whose responses are bounded in time and size."""
        openai, judge = _openai(), self

        class Bounded(openai.DefaultHttpxClient):  # type: ignore[name-defined]
            # its own timeout is for one read: a server that sends blanks to keep the connection open never times out
            def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
                deadline, body = time.monotonic() + judge.timeout_s, bytearray()
                response = super().send(request, stream=True, **options)
                try:
                    for piece in response.iter_raw():
                        body += piece[: _MAX_BYTES - len(body)]
                        if time.monotonic() > deadline:
                            raise JudgeError(f"{judge.address} did not end its answer in {judge.timeout_s:g} s; {KEPT}")
                        if len(body) == _MAX_BYTES:  # cut, so it is not JSON then
                            break
                finally:
                    response.close()
                return type(response)(
                    response.status_code, headers=response.headers, content=bytes(body), request=request
                )

        return openai.OpenAI(
            base_url=self.address,
            api_key=self.key or "none",
            max_retries=self.retries,
            timeout=self.timeout_s,
            http_client=Bounded(follow_redirects=False, trust_env=self.address.startswith("https")),
        )


def _openai() -> Any:
    try:
        import openai
    except ModuleNotFoundError as error:
        raise JudgeError(f"a judge needs {error.name}; install it with: pip install 'qvl-edge[evaluate]'") from None
    return openai


def _printable(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _content(body: bytes, address: str) -> str:
    try:
        message = json.loads(body)["choices"][0]["message"]
        content = message["content"]
        if content is None:  # a refusal, or an answer that a filter removed: a verdict that cannot be read
            content = message.get("refusal") or ""
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        content = None
    if not isinstance(content, str):
        raise JudgeError(
            f"{address} does not answer as OpenAI's chat completions do, the first of {len(body)} bytes read are "
            f"{body[:200]!r}"
        )
    return content.encode("utf-8", "replace").decode()


def read_requests(path: Path) -> list[dict[str, Any]]:
    """The requests of a file. QualityDataError if it is missing or holds anything else."""
    requests = [one for _, one in read_jsonl(path, error=QualityDataError)]
    known = {"id": str, "messages": list, "item": str, "group": str, "place": int}
    if not requests or not all(_has(one, known) and one["place"] in (1, 2) for one in requests):
        raise QualityDataError(f"{path} does not hold the requests that `qvl-edge evaluate` writes for a judge")
    return requests


def _has(value: Mapping[str, Any], fields: Mapping[str, type]) -> bool:
    return all(isinstance(value.get(name), kind) for name, kind in fields.items())


def fingerprint(request: Mapping[str, Any], model: str) -> str:
    """What a verdict belongs to: a hash of the judge's name and every word of the request."""
    words = json.dumps([model, request["messages"]], ensure_ascii=False)
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()


def ask_all(judge: Judge, requests: Sequence[Mapping[str, Any]], path: Path) -> dict[str, str]:
    """Verdicts by request id: those that `path` holds, and the missing ones, asked for and appended to it.

    QualityDataError, and nothing is written, if the file exists and holds anything else.
    """
    found = _read_lines(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, found)  # without the half line that a killed run may have left
    done = {one["request"] for one in found}
    missing = [one for one in requests if fingerprint(one, judge.model) not in done]
    for request in tqdm(missing, total=len(requests), initial=len(requests) - len(missing), unit="verdict"):
        line = {"id": request["id"], "request": fingerprint(request, judge.model), "model": judge.model}
        append_jsonl(path, [{**line, "verdict": judge.ask(request["messages"])}])
    return read_verdicts(path, requests, judge.model)


def read_verdicts(path: Path, requests: Sequence[Mapping[str, Any]], model: str) -> dict[str, str]:
    """Verdicts by request id, as far as `path` has them. QualityDataError if it holds anything else."""
    verdicts = {one["request"]: one["verdict"] for one in _read_lines(path)}
    wanted = {one["id"]: fingerprint(one, model) for one in requests}
    return {identity: verdicts[request] for identity, request in wanted.items() if request in verdicts}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a verdict file, none if it is missing. A last line cut short by a kill is dropped, but only after a
    verdict: a file with half a line and nothing else may be anything."""
    try:
        found = [one for _, one in read_jsonl(path, resuming=True, error=QualityDataError)]
    except QualityDataError as error:
        raise QualityDataError(f"{error}; {path} is not a file of verdicts, name another one") from None
    empty = not path.exists() or path.stat().st_size == 0
    if not (found or empty) or not all(_has(one, {"request": str, "verdict": str}) for one in found):
        raise QualityDataError(f"{path} is not a file of verdicts, name another one")
    return found
